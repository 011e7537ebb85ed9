"""Loss terms of the anchor head: closed forms, reductions, weights, labels out of range, gradients, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference.anchor_head_box_terms import giou_loss, l1_loss, smooth_l1_loss
from detoracle.reference.anchor_head_terms import cross_entropy, sigmoid_cross_entropy, sigmoid_focal_loss, weighted
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rounding import Bounded

Term = Callable[..., Tensor]
EPS = torch.finfo(torch.float32).eps
ROWS = 9


def class_rows(
    seed: int = 0, *, columns: int = 4, labels: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": (3 * torch.randn(ROWS, columns, generator=generator)).to(dtype),
        "labels": torch.randint(labels, (ROWS,), generator=generator),
        "weight": torch.rand(ROWS, generator=generator).to(dtype),
    }


def box_rows(seed: int = 0, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    corner, other = (10 * torch.rand(2, ROWS, 2, generator=generator)).unbind()
    size, another = (1 + 10 * torch.rand(2, ROWS, 2, generator=generator)).unbind()
    return {
        "predicted": torch.cat([corner, corner + size], dim=1).to(dtype),
        "target": torch.cat([other, other + another], dim=1).to(dtype),
        "weight": torch.rand(ROWS, 4, generator=generator).to(dtype),
    }


CLASS_TERMS: list[Term] = [cross_entropy, sigmoid_cross_entropy, sigmoid_focal_loss]
BOX_TERMS: list[Term] = [smooth_l1_loss, l1_loss, giou_loss]


def rows_of(term: Term, **settings: Any) -> dict[str, Any]:
    return class_rows(**settings) if term in CLASS_TERMS else box_rows(**settings)


# ----------------------------------------------------------------------------------------------------- reductions
@pytest.mark.parametrize("term", CLASS_TERMS + BOX_TERMS)
def test_reductions_of_the_weighted_rows(term: Term) -> None:
    given = rows_of(term)
    rows = term(**{**given, "weight": None}, reduction="none")
    weight = given["weight"].mean(-1) if term is giou_loss else given["weight"]
    each = rows * (weight if weight.ndim == rows.ndim else weight[:, None])
    assert torch.equal(term(**given, reduction="none"), each)
    assert torch.equal(term(**given, reduction="sum"), each.sum())
    assert torch.equal(term(**given), each.mean())
    assert torch.equal(term(**given, avg_factor=7), each.sum() / (7 + EPS))
    assert torch.equal(term(**given, reduction="none", avg_factor=7), each)
    assert torch.equal(term(**given, reduction="sum", loss_weight=2.5), each.sum() * 2.5)


@pytest.mark.parametrize("term", CLASS_TERMS + BOX_TERMS)
def test_a_sum_cannot_be_averaged(term: Term) -> None:
    with pytest.raises(
        UpstreamRaises, match=r"anchor_head.sum-with-average-factor: expected reduction 'mean' or 'none'"
    ):
        term(**rows_of(term), reduction="sum", avg_factor=2.0)


def test_an_average_factor_of_zero_divides_by_the_epsilon() -> None:
    assert weighted(torch.ones(2), avg_factor=0).item() == 2 / EPS


# ---------------------------------------------------------------------------------------------------- class terms
def test_cross_entropy_is_the_logarithm_of_the_softmax() -> None:
    given = class_rows()
    del given["weight"]
    expected = F.nll_loss(F.log_softmax(given["logits"], dim=1), given["labels"], reduction="none")
    assert torch.equal(cross_entropy(**given, reduction="none"), expected)
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0]).double()
    weighed = cross_entropy(**given, reduction="none", class_weight=weights.tolist())
    assert torch.equal(weighed, expected * weights[given["labels"]])


def test_ignored_rows_cost_nothing_and_may_leave_the_mean() -> None:
    logits, labels = torch.zeros(4, 2).double(), torch.tensor([0, 1, 7, 7])
    half = torch.tensor(2.0).double().log().item()
    for term, columns in ((cross_entropy, 1), (sigmoid_cross_entropy, 2)):
        settings: dict[str, Any] = {"ignore_index": 7}
        rows = term(logits, labels, reduction="none", **settings)
        assert rows.flatten().tolist() == [half] * 2 * columns + [0] * 2 * columns
        for reducing, expected in (
            ({}, half / 2),
            ({"avg_non_ignore": True}, 2 * columns * half / (2 * columns + EPS)),
            ({"avg_non_ignore": True, "reduction": "sum"}, 2 * columns * half),
            ({"avg_non_ignore": True, "avg_factor": 4}, 2 * columns * half / (4 + EPS)),
        ):
            assert term(logits, labels, **settings, **reducing).item() == expected


def test_sigmoid_cross_entropy_of_one_hot_rows() -> None:
    logits = torch.tensor([[2.0, -1.0]] * 5).double()
    rows = sigmoid_cross_entropy(logits, torch.tensor([0, 1, 2, 9, -1]), reduction="none")
    present, absent = F.softplus(-logits[0]), F.softplus(logits[0])
    expected = [[present[0], absent[1]], [absent[0], present[1]], [*absent], [*absent], [0.0, 0.0]]
    bounded = _bounded(
        sigmoid_cross_entropy, {"logits": logits, "labels": torch.tensor([0, 1, 2, 9, -1])}, reduction="none"
    )
    assert not outside(torch.tensor(expected), bounded.value, bounded.error).any()
    assert not outside(rows, bounded.value, bounded.error).any()


def test_sigmoid_class_weights_weigh_presence() -> None:
    logits, labels = torch.zeros(2, 2).double(), torch.tensor([0, 2])
    rows = sigmoid_cross_entropy(logits, labels, reduction="none", class_weight=[3.0, 5.0])
    half = torch.tensor(2.0).double().log().item()
    assert rows.tolist() == [[3 * half, half], [half, half]]


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
def test_focal_loss_in_plain_python(gamma: float, alpha: float) -> None:
    given = class_rows(columns=3)
    rows = sigmoid_focal_loss(given["logits"], given["labels"], reduction="none", gamma=gamma, alpha=alpha)
    bounded = _bounded(
        sigmoid_focal_loss, {k: given[k] for k in ("logits", "labels")}, reduction="none", gamma=gamma, alpha=alpha
    )
    for n, c in ((n, c) for n in range(ROWS) for c in range(3)):
        probability = 1 / (1 + math.exp(-given["logits"][n, c].item()))
        present = int(given["labels"][n]) == c
        right = probability if present else 1 - probability
        expected = -(alpha if present else 1 - alpha) * (1 - right) ** gamma * math.log(right)
        assert abs(expected - bounded.value[n, c].item()) <= bounded.error[n, c].item()
    assert not outside(rows, bounded.value, bounded.error).any()


def test_focal_loss_of_probabilities() -> None:
    probabilities, labels = torch.tensor([[0.5, 0.25]]).double(), torch.tensor([0])
    rows = sigmoid_focal_loss(probabilities, labels, activated=True, reduction="none")
    assert rows.tolist() == [[0.25 * 0.25 * math.log(2), 0.75 * 0.0625 * -math.log1p(-0.25)]]


@pytest.mark.parametrize(
    ("term", "labels"),
    [(cross_entropy, [0, 4]), (cross_entropy, [-1, 0]), (sigmoid_focal_loss, [0, 5]), (sigmoid_focal_loss, [-1])],
)
def test_labels_that_do_not_exist_raise(term: Term, labels: list[int]) -> None:
    with pytest.raises(UpstreamRaises) as caught:
        term(torch.zeros(len(labels), 4), torch.tensor(labels))
    assert caught.value.behaviour == "anchor_head.label-out-of-range"
    wrong = next(label for label in labels if label not in range(4))
    assert str(caught.value).endswith(f"got {wrong}.")


def test_the_label_of_background_is_the_number_of_columns() -> None:
    assert sigmoid_focal_loss(torch.zeros(1, 4), torch.tensor([4])).isfinite()


# ------------------------------------------------------------------------------------------------------ box terms
def test_box_terms_by_hand() -> None:
    predicted, target = torch.tensor([[0.0, 1, -2, 8]]), torch.tensor([[0.5, 1, 2, 7]])
    assert l1_loss(predicted, target, reduction="none").tolist() == [[0.5, 0, 4, 1]]
    assert smooth_l1_loss(predicted, target, reduction="none").tolist() == [[0.125, 0, 3.5, 0.5]]
    assert smooth_l1_loss(predicted, target, reduction="none", beta=2.0).tolist() == [[0.0625, 0, 3, 0.25]]
    assert smooth_l1_loss(predicted, target, reduction="none", beta=0.25).tolist() == [[0.375, 0, 3.875, 0.875]]


def test_the_parabola_ends_at_beta() -> None:
    predicted = torch.tensor([[0.25, -0.25, 0.5, 0]], requires_grad=True)
    [gradient] = torch.autograd.grad(
        smooth_l1_loss(predicted, torch.zeros(1, 4), beta=0.25, reduction="sum"), predicted
    )
    assert gradient.tolist() == [[1, -1, 1, 0]]


@pytest.mark.parametrize("term", [l1_loss, smooth_l1_loss])
def test_a_perfect_prediction_has_no_gradient(term: Term) -> None:
    boxes = torch.ones(2, 4, requires_grad=True)
    [gradient] = torch.autograd.grad(term(boxes, torch.ones(2, 4), reduction="sum"), boxes)
    assert (gradient == 0).all()


def test_beta_must_be_positive() -> None:
    with pytest.raises(UpstreamRaises, match=r"anchor_head.beta-not-positive: expected beta > 0, got 0.0"):
        smooth_l1_loss(torch.ones(1, 4), torch.ones(1, 4), beta=0.0)


@pytest.mark.parametrize("term", [l1_loss, smooth_l1_loss])
def test_without_rows_there_is_a_scalar_with_a_gradient(term: Term) -> None:
    nothing = torch.zeros(0, 4, requires_grad=True)
    for settings in ({"reduction": "none"}, {}, {"reduction": "sum"}, {"avg_factor": 3.0}):
        loss = term(nothing, torch.zeros(0, 4), **settings)
        assert (loss.shape, loss.item()) == ((), 0.0)
        assert torch.autograd.grad(loss, nothing)[0].shape == (0, 4)


def test_giou_loss_by_hand() -> None:
    first, second = torch.tensor([[0.0, 0, 4, 4]]).double(), torch.tensor([[2.0, 2, 6, 6]]).double()
    assert giou_loss(first, second).item() == 1 - (4 / 28 - 8 / 36)
    assert giou_loss(first, first).item() == 0
    assert giou_loss(first, first, eps=64.0).item() == 1 - (16 / 64 - (64 - 64) / 64)


@pytest.mark.parametrize("shape", [(2,), (2, 4)])
def test_giou_without_a_positive_weight_sums_the_boxes(shape: tuple[int, ...]) -> None:
    boxes = torch.tensor([[1.0, 2, 3, 4], [0, 0, 2, 2]], requires_grad=True)
    for value, expected in ((0.0, 0.0), (-1.0, -14.0)):
        loss = giou_loss(boxes, boxes.detach() + 1, torch.full(shape, value), loss_weight=9.0, avg_factor=3.0)
        assert loss.item() == expected
        assert torch.autograd.grad(loss, boxes)[0].tolist() == [[value] * 4] * 2
    unreduced = giou_loss(boxes, boxes.detach(), torch.zeros(shape), reduction="none")
    assert unreduced.tolist() == [0, 0]


def test_giou_weights_have_a_shape() -> None:
    with pytest.raises(InputError, match=r"anchor_head.giou_loss: weight: expected \(N,\) or \(N, 4\), got \(3,\)"):
        giou_loss(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3))


# ---------------------------------------------------------------------------------------------- gradients, bounds
def _bounded(term: Term, given: dict[str, Any], dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    bounded = {n: Bounded.exact(t, dtype) if t.is_floating_point() else t for n, t in given.items()}
    return unchecked(term)(**bounded, **settings)


@pytest.mark.parametrize("term", CLASS_TERMS + BOX_TERMS)
def test_gradients_equal_finite_differences(term: Term) -> None:
    given = rows_of(term)
    first = next(iter(given))
    leaf = given.pop(first).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term(**{first: x}, **given, avg_factor=5.0), leaf)


@pytest.mark.parametrize("settings", [{"reduction": "none"}, {}, {"avg_factor": 3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", CLASS_TERMS + BOX_TERMS)
def test_bounds_hold(term: Term, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    given = rows_of(term, seed=3, dtype=dtype)
    bounded = _bounded(term, given, dtype, **settings)
    assert not outside(term(**given, **settings), bounded.value, bounded.error).any()


@pytest.mark.parametrize("term", [cross_entropy, sigmoid_cross_entropy])
def test_bounds_hold_with_class_weights_and_ignored_rows(term: Term) -> None:
    given = class_rows(seed=4, dtype=torch.float32)
    settings: dict[str, Any] = {"class_weight": [0.3, 1.7, 2.9, 0.01], "ignore_index": 2, "reduction": "none"}
    bounded = _bounded(term, given, torch.float32, **settings)
    rows = term(**given, **settings)
    assert not outside(rows, bounded.value, bounded.error).any()
    assert outside(rows * (1 + 2**-12), bounded.value, bounded.error).any()


def test_bounds_of_probabilities_hold() -> None:
    probabilities, labels = torch.rand(50, 3, generator=torch.Generator().manual_seed(5)), torch.randint(4, (50,))
    probabilities[0], labels[0] = torch.tensor([0.0, 1.0, 0.5]), 0
    given = {"logits": probabilities, "labels": labels}
    bounded = _bounded(sigmoid_focal_loss, given, torch.float32, activated=True, reduction="none")
    rows = sigmoid_focal_loss(probabilities, labels, activated=True, reduction="none")
    assert not outside(rows, bounded.value, bounded.error).any()
    assert rows[0].isfinite().all()


@pytest.mark.parametrize("term", CLASS_TERMS + BOX_TERMS)
def test_inputs_stay_as_they_are(term: Term) -> None:
    given, before = rows_of(term), rows_of(term)
    term(**given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_shapes_are_checked() -> None:
    with pytest.raises(
        InputError, match=r"anchor_head.cross_entropy: labels: expected a int Tensor of shape \(N\) with N=2"
    ):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
