from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import ssd
from detoracle.reference.boxes import cxcywh_to_xyxy
from detoracle.reference.errors import DetoracleError, InputError, UpstreamRaises
from detoracle.reference.explain.ssd import loss_given

QUADRANTS = torch.tensor(
    [[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]
)
ONE_MAP: dict[str, Any] = {"image_size": 64, "feature_maps": [4], "steps": [16], "min_sizes": [22], "max_sizes": [36]}


def ground_truths(gts: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    return {
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_labels": torch.tensor([labels if labels is not None else [0] * len(gts)], dtype=torch.int64),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
    }


def random_arguments(
    generator: torch.Generator, *, images: int = 2, gts: int = 4, classes: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """A batch on one feature map, whose second image has one ground truth fewer, with a gap in the padding."""
    priors = ssd.priors(**ONE_MAP, aspect_ratios=[[2, 3]], like=torch.zeros((), dtype=dtype))
    centre, size = (
        torch.rand(images, gts, 2, generator=generator),
        0.1 + 0.7 * torch.rand(images, gts, 2, generator=generator),
    )
    valid = torch.ones(images, gts, dtype=torch.bool)
    valid[1:, 0] = False
    return {
        "loc": torch.randn(images, len(priors), 4, generator=generator).to(dtype),
        "conf": 3 * torch.randn(images, len(priors), classes, generator=generator).to(dtype),
        "priors": priors,
        "gt_boxes": torch.cat([centre - size / 2, centre + size / 2], dim=-1).to(dtype),
        "gt_labels": torch.randint(classes - 1, (images, gts), generator=generator),
        "gt_valid": valid,
    }


def gradients(loc: Tensor, conf: Tensor, gts: dict[str, Any], **settings: Any) -> tuple[Tensor, ...]:
    """Gradients of the total loss to offsets and logits, on the quadrants."""
    loc, conf = loc.requires_grad_(), conf.requires_grad_()
    return torch.autograd.grad(ssd.loss(loc, conf, QUADRANTS, **gts, **settings)["total"], (loc, conf))


def matching(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("priors", "gt_boxes", "gt_labels", "gt_valid")}


# -------------------------------------------------------------------------------------------------------- match
def slow_match(overlap: list[list[float]], labels: list[int], threshold: float) -> list[int]:
    """Matching of one image by plain loops: ground truth of each prior, -1 for background."""
    matched = []
    for column in zip(*overlap, strict=True):
        best = max(column)
        matched.append(column.index(best) if best >= threshold else -1)
    for gt, row in enumerate(overlap):
        matched[row.index(max(row))] = gt
    return [-1 if gt < 0 or labels[gt] < 0 else gt for gt in matched]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_match_equals_plain_loops(threshold: float) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        given = matching(random_arguments(generator))
        given["gt_labels"][0, 2] = -1
        result = ssd.match(**given, threshold=threshold)
        for image, valid in enumerate(given["gt_valid"]):
            rows = valid.nonzero().flatten()
            overlap = ssd.jaccard(given["gt_boxes"][image, valid], cxcywh_to_xyxy(given["priors"]))
            expected = slow_match(overlap.tolist(), given["gt_labels"][image, valid].tolist(), threshold)
            assert result.gt_index[image].tolist() == [int(rows[g]) if g >= 0 else -1 for g in expected]
            assert result.quality[image].tolist() == [
                overlap[g, p].item() if g >= 0 else 0.0 for p, g in enumerate(expected)
            ]


def test_match_targets_follow_the_assignment() -> None:
    given = matching(random_arguments(torch.Generator().manual_seed(3)))
    result = ssd.match(**given)
    for image, prior in itertools.product(*map(range, result.gt_index.shape)):
        gt = int(result.gt_index[image, prior])
        offsets, label = result.extra["loc_target"][image, prior], int(result.extra["class_target"][image, prior])
        if gt < 0:
            assert (offsets.tolist(), label) == ([0.0] * 4, 0)
        else:
            expected = ssd.encode(given["gt_boxes"][image, gt][None], given["priors"][prior][None])[0]
            assert torch.equal(offsets, expected)
            assert label == int(given["gt_labels"][image, gt]) + 1


def test_overlap_at_the_threshold_is_positive() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 1.0]])
    # The second ground truth covers two quadrants, each at overlap 0.5 exactly.
    assert ssd.match(QUADRANTS, **gts).gt_index.tolist() == [[0, 1, -1, 1]]
    assert ssd.match(QUADRANTS, **gts, threshold=0.5 + 2**-24).gt_index.tolist() == [[0, 1, -1, -1]]


def test_the_best_prior_is_kept_below_the_threshold() -> None:
    gts = ground_truths([[0.0, 0.0, 0.0625, 0.0625], [0.5, 0.5, 1.0, 1.0]])
    result = ssd.match(QUADRANTS, **gts)
    assert result.gt_index.tolist() == [[0, -1, -1, 1]]
    assert result.quality.tolist() == [[2.0**-6, 0.0, 0.0, 1.0]]


def test_the_last_of_three_keeps_a_shared_best_prior_and_the_first_takes_the_rest() -> None:
    priors = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.625], [0.5, 0.5, 0.625, 0.5]])
    gts = ground_truths([[0.25, 0.25, 0.75, 0.75]] * 3, [0, 1, 2])
    assert ssd.match(priors, **gts).gt_index.tolist() == [[2, 0, 0]]


def test_class_minus_one_still_takes_its_best_prior_away() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5]] * 2, [0, -1])
    assert ssd.match(QUADRANTS, **gts).gt_index.tolist() == [[-1, -1, -1, -1]]


def test_a_nan_overlap_is_not_below_the_threshold() -> None:
    priors = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]])
    gts = ground_truths([[0.5, 0.5, 0.5, 0.5]])
    result = ssd.match(priors, **gts)
    assert result.gt_index.tolist() == [[0, 0, -1]]
    assert result.quality[0, :2].isnan().all()


# ----------------------------------------------------------------------------------------------- hard negatives
def slow_mining(losses: list[float], positive: list[bool], neg_pos: int) -> list[int]:
    """Places of the negatives, by plain sorting."""
    number = min(neg_pos * sum(positive), len(losses) - 1)
    ranking = sorted(range(len(losses)), key=lambda p: -(0.0 if positive[p] else losses[p]))
    return sorted(p for p in ranking[:number] if not positive[p])


@pytest.mark.parametrize("neg_pos", [0, 1, 3, 50])
def test_hard_negatives_equal_plain_sorting(neg_pos: int) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(10):
        conf = 3 * torch.randn(3, 12, 4, generator=generator, dtype=torch.float64)
        gt_index = torch.randint(-1, 3, (3, 12), generator=generator)
        gt_index[:, :6] = -1
        labels = torch.randint(3, (3, 3), generator=generator)
        chosen = ssd.hard_negatives(conf, gt_index, labels, neg_pos=neg_pos)
        loss = ssd.log_sum_exp(conf) - conf[..., 0]
        for image in range(3):
            positive = (gt_index[image] >= 0).tolist()
            expected = slow_mining(loss[image].tolist(), positive, neg_pos)
            assert (chosen.gt_index[image] == -1).nonzero().flatten().tolist() == expected
            assert torch.equal(chosen.gt_index[image][gt_index[image] >= 0], gt_index[image][gt_index[image] >= 0])
            assert torch.equal(chosen.quality[image][expected], loss[image][expected])
            assert int((chosen.quality[image] != 0).sum()) == len(expected)


def test_log_sum_exp_underflows_below_the_maximum_of_the_batch() -> None:
    conf = torch.tensor([[[0.0, 0.0]], [[-90.0, -90.0]], [[-110.0, -110.0]]])
    assert ssd.log_sum_exp(conf).isinf().tolist() == [[False], [False], [True]]
    assert ssd.log_sum_exp(conf.half()).isinf().tolist() == [[False], [True], [True]]
    assert ssd.log_sum_exp(conf[1:]).isinf().tolist() == [[False], [False]]


def test_one_nan_makes_every_row_nan() -> None:
    assert ssd.log_sum_exp(torch.tensor([[[0.0, math.nan]], [[0.0, 0.0]]])).isnan().all()


# --------------------------------------------------------------------------------------------------------- loss
def test_loss_by_hand() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5]], [1])
    loc = torch.tensor([[[0.5, 0.0, -3.0, 0.0], *[[9.0] * 4] * 3]])
    conf = torch.tensor([[[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    parts = ssd.loss(loc, conf, QUADRANTS, **gts, neg_pos=1)
    # The target offsets are 0. Prior 2 is the hardest negative.
    bounded = loss_given(torch.tensor([[0, -2, -1, -2]]), loc, conf, QUADRANTS, **gts)
    assert parts["localisation"].item() == 0.5 * 0.5**2 + 2.5
    expected = torch.tensor(2 * math.log(3), dtype=torch.float64)
    assert not outside(parts["classification"], expected, bounded["classification"].error)
    assert parts["total"].item() == (parts["localisation"] + parts["classification"]).item()


def test_negatives_are_counted_per_image_and_positives_per_batch() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]], [0, 0])
    batch: dict[str, Any] = {name: torch.cat([tensor, tensor]) for name, tensor in gts.items()}
    batch["gt_valid"][1, 1] = False
    loc, conf = torch.zeros(2, 4, 4), torch.zeros(2, 4, 2)
    parts = ssd.loss(loc, conf, QUADRANTS, **batch, neg_pos=1)
    # Three positives; two negatives are due in the first image and one in the second, each costing log 2.
    second: dict[str, Any] = {name: tensor[1:] for name, tensor in batch.items()}
    alone = ssd.loss(loc[1:], conf[1:], QUADRANTS, **second, neg_pos=0)
    assert parts["classification"].item() == (alone["classification"] * 6 / 3).item()


def test_a_positive_among_the_negatives_counts_once() -> None:
    corners = cxcywh_to_xyxy(QUADRANTS)[:3].tolist()
    parts = ssd.loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), QUADRANTS, **ground_truths(corners))
    per_prior = torch.nn.functional.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    assert parts["classification"].item() == (per_prior * 4 / 3).item()


def test_gradients_agree_with_finite_differences() -> None:
    given = random_arguments(torch.Generator().manual_seed(5))
    leaves = [given.pop(name).requires_grad_() for name in ("loc", "conf")]
    assert torch.autograd.gradcheck(lambda loc, conf: ssd.loss(loc, conf, **given)["total"], leaves)


@pytest.mark.parametrize(("distance", "slope"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (-1.0, -1.0), (7.0, 1.0)])
def test_smooth_l1_slope_at_its_kinks(distance: float, slope: float) -> None:
    loc = torch.zeros(1, 4, 4)
    loc[0, 0, 0] = distance
    of_loc, _ = gradients(loc, torch.zeros(1, 4, 2), ground_truths([[0.0, 0.0, 0.5, 0.5]]))
    assert of_loc[0].tolist() == [[slope, 0.0, 0.0, 0.0]] + [[0.0] * 4] * 3


def test_priors_that_take_no_part_get_no_gradient() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5]])
    _, of_conf = gradients(torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), gts, neg_pos=1)
    assert of_conf[0].tolist() == [[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]


def test_without_positives_the_loss_is_nan_and_its_gradients_zero() -> None:
    loc, conf, gts = torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), ground_truths([[0.0, 0.0, 0.5, 0.5]], [-1])
    assert all(part.isnan() for part in ssd.loss(loc, conf, QUADRANTS, **gts).values())
    assert not any(gradient.any() for gradient in gradients(loc, conf, gts))


def test_a_line_costs_infinity_with_finite_gradients() -> None:
    loc, conf, gts = torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), ground_truths([[0.25, 0.0, 0.25, 0.5]])
    assert ssd.loss(loc, conf, QUADRANTS, **gts)["localisation"].item() == math.inf
    assert all(gradient.isfinite().all() for gradient in gradients(loc, conf, gts))


# ------------------------------------------------------------------------------------------- dtypes, inputs, errors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_operation_stays_in_the_dtype(dtype: torch.dtype) -> None:
    given = random_arguments(torch.Generator().manual_seed(6), dtype=dtype)
    matched = ssd.match(**matching(given))
    assert matched.quality.dtype == matched.extra["loc_target"].dtype == dtype
    assert ssd.hard_negatives(given["conf"], matched.gt_index, given["gt_labels"]).quality.dtype == dtype
    assert ssd.decode(given["loc"], given["priors"]).dtype == ssd.log_sum_exp(given["conf"]).dtype == dtype
    assert {part.dtype for part in ssd.loss(**given).values()} == {dtype}


def test_inputs_are_left_as_they_are() -> None:
    given = random_arguments(torch.Generator().manual_seed(7))
    before = copy.deepcopy(given)
    matched = ssd.match(**matching(given))
    gt_index = matched.gt_index.clone()
    ssd.hard_negatives(given["conf"], matched.gt_index, given["gt_labels"])
    ssd.decode(given["loc"], given["priors"])
    ssd.encode(given["gt_boxes"][0], given["priors"][:4])
    ssd.loss(**given)
    assert torch.equal(matched.gt_index, gt_index)
    assert all(torch.equal(given[name], before[name]) for name in given)


def error_of(call: Any, **arguments: Any) -> DetoracleError:
    with pytest.raises(DetoracleError) as caught:
        call(**arguments)
    return caught.value


def test_an_image_without_ground_truth_is_named() -> None:
    given = random_arguments(torch.Generator().manual_seed(8))
    given["gt_valid"][1] = False
    error = error_of(ssd.loss, **given)
    assert isinstance(error, UpstreamRaises)
    assert str(error) == "ssd.match, image 1: ssd.no-ground-truth: expected a ground truth in every image, got none."


@pytest.mark.parametrize("label", [3, -2])
def test_a_label_out_of_range_is_named(label: int) -> None:
    given = random_arguments(torch.Generator().manual_seed(9))
    given["gt_labels"][1, 3] = label
    error = error_of(ssd.loss, **given)
    assert isinstance(error, UpstreamRaises)
    assert str(error) == (
        "ssd.loss, image 1: ssd.label-out-of-range: "
        f"expected labels from -1 to 2, as conf has 4 classes with the background, got {label}."
    )
    gt_index = torch.full((2, 96), 3)
    again = error_of(ssd.hard_negatives, conf=given["conf"], gt_index=gt_index, gt_labels=given["gt_labels"])
    assert str(again).startswith("ssd.hard_negatives, image 1: ssd.label-out-of-range")


def test_a_label_out_of_range_that_nothing_matches_is_no_error() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5]] * 2, [9, 0])
    assert ssd.loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), QUADRANTS, **gts)["total"].isfinite()


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (ssd.loss, {"neg_pos": -1}, "ssd.hard_negatives: neg_pos: expected 0 or more, got -1."),
        (ssd.loss, {"variances": (0.1, 0.0)}, "ssd.match: variances: expected two positive numbers, got [0.1, 0.0]."),
        (
            ssd.loss,
            {"gt_labels": torch.zeros(2, 4)},
            "ssd.loss: gt_labels: expected a int Tensor of shape (B, G) with B=2, G=4, "
            "got float32 Tensor of shape (2, 4).",
        ),
        (
            ssd.loss,
            {"priors": QUADRANTS.double()},
            "ssd.loss: priors: expected a float Tensor of shape (P, 4) with P=96, got float64 Tensor of shape (4, 4).",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Any, change: dict[str, Any], message: str) -> None:
    error = error_of(call, **{**random_arguments(torch.Generator().manual_seed(10)), **change})
    assert isinstance(error, InputError)
    assert str(error) == message


def test_empty_batches_and_indices_out_of_range_are_refused() -> None:
    nothing = torch.zeros(0, 1)
    empty = error_of(
        ssd.match, priors=QUADRANTS, gt_boxes=torch.zeros(0, 1, 4), gt_labels=nothing.long(), gt_valid=nothing.bool()
    )
    assert str(empty) == "ssd.match: gt_valid, priors: expected an image and a prior at least, got 0 images, 4 priors."
    no_class = error_of(
        ssd.hard_negatives,
        conf=torch.zeros(1, 4, 0),
        gt_index=torch.zeros(1, 4).long(),
        gt_labels=torch.zeros(1, 1).long(),
    )
    assert str(no_class) == "ssd.hard_negatives: conf: expected an image, a prior and a class, got (1, 4, 0)."
    index = error_of(
        ssd.hard_negatives,
        conf=torch.zeros(1, 4, 2),
        gt_index=torch.ones(1, 4).long(),
        gt_labels=torch.zeros(1, 1).long(),
    )
    assert str(index) == (
        "ssd.hard_negatives: gt_index: expected indices below 1, the number of gt_labels of an image, got 1."
    )
