from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import VALUE_FACTOR, outside
from detoracle.reference import rtmdet, rtmdet_loss
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.rtmdet import levels_given, loss_given
from detoracle.reference.rounding import Bounded

EPS = torch.finfo(torch.float32).eps


def batch(gts: list[list[float]], *, images: int = 1, reach: float = 8.0, **settings: Any) -> dict[str, Any]:
    """Images of 64 px, strides 8 and 16, two classes of logit 0, every prediction a square around its prior."""
    boxes = torch.tensor([gts]).reshape(1, -1, 4).expand(images, -1, 4).clone()
    return {
        "class_logits": [torch.zeros(images, 2, side, side) for side in (8, 4)],
        "distances": [torch.full((images, 4, side, side), reach) for side in (8, 4)],
        "strides": [8, 16],
        "gt_boxes": boxes,
        "gt_labels": torch.zeros(images, boxes.shape[1], dtype=torch.int64),
        "gt_valid": torch.ones(images, boxes.shape[1], dtype=torch.bool),
        **settings,
    }


def random_batch(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given = batch([[0.0] * 4] * 3, images=2)
    centre, size = 64 * torch.rand(2, 3, 2, generator=generator), 10 + 30 * torch.rand(2, 3, 2, generator=generator)
    given["gt_boxes"] = torch.cat([centre - size / 2, centre + size / 2], dim=-1).to(dtype)
    given["gt_labels"] = torch.randint(2, (2, 3), generator=generator)
    given["gt_valid"][1, 1] = False
    for name, scale in (("class_logits", 1), ("distances", 8)):
        maps = [torch.randn(t.shape, generator=generator).to(dtype) for t in given[name]]
        given[name] = [scale * t if scale == 1 else scale * t.exp() for t in maps]
    return given


def exact(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, tensor.dtype)


def same(got: Tensor, expected: float | Tensor, bounded: Any) -> bool:
    """Is a result what was computed by hand in float64, but for its rounding?"""
    hand = torch.as_tensor(expected, dtype=torch.float64)
    return not outside(got, hand.expand(got.shape), VALUE_FACTOR * bounded.error).any()


# ------------------------------------------------------------------------------------------------------- targets
def test_targets_of_positives_background_and_ignored() -> None:
    gt_boxes = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]], [[8.0, 9.0, 10.0, 11.0], [0.0] * 4]])
    gt_labels, gt_index = torch.tensor([[2, 1], [0, 3]]), torch.tensor([[1, -1, 0], [-2, 0, -1]])
    quality = torch.tensor([[0.5, 0.0, 0.25], [0.0, 0.75, 0.0]])
    labels, weights, boxes, metrics = rtmdet_loss.targets(gt_index, quality, gt_boxes, gt_labels, num_classes=4)
    assert labels.tolist() == [[1, 4, 2], [4, 0, 4]]
    assert weights.tolist() == [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    assert boxes[0].tolist() == [[4.0, 5.0, 6.0, 7.0], [0.0] * 4, [0.0, 1.0, 2.0, 3.0]]
    assert boxes[1].tolist() == [[0.0] * 4, [8.0, 9.0, 10.0, 11.0], [0.0] * 4]
    assert torch.equal(metrics, quality)


@pytest.mark.parametrize(("pos_weight", "expected"), [(-1.0, 1.0), (0.0, 1.0), (2.5, 2.5)])
def test_weight_of_positives(pos_weight: float, expected: float) -> None:
    one = torch.tensor([[0, -1, -2]]), torch.zeros(1, 3), torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    _, weights, _, _ = rtmdet_loss.targets(*one, num_classes=1, pos_weight=pos_weight)
    assert weights.tolist() == [[expected, 1.0, 0.0]]


def test_targets_without_ground_truths() -> None:
    none = torch.tensor([[-1, -2]]), torch.zeros(1, 2), torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.int64)
    labels, weights, boxes, metrics = rtmdet_loss.targets(*none, num_classes=3)
    assert (labels.tolist(), weights.tolist()) == ([[3, 3]], [[1.0, 0.0]])
    assert not boxes.any()
    assert not metrics.any()


# ----------------------------------------------------------------------------------------------------------- QFL
def entropy(logit: float, target: float) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_qfl_by_hand(beta: float) -> None:
    logits, quality, labels = [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], [0.25, 0.9], [2, 3]
    expected = torch.tensor(
        [
            sum(
                entropy(x, t := q if c == label else 0.0) * abs(t - 1 / (1 + math.exp(-x))) ** beta
                for c, x in enumerate(row)
            )
            for row, q, label in zip(logits, quality, labels, strict=True)
        ],
        dtype=torch.float64,
    )
    given = (torch.tensor(logits), torch.tensor(quality), torch.tensor(labels))
    rows = rtmdet_loss.qfl(*given, beta=beta, reduction="none")
    bounded = rtmdet_loss._qfl(*map(exact, given[:2]), given[2], beta=beta, reduction="none")
    assert same(rows, expected.float().double(), bounded)


def test_a_quality_of_the_background_is_not_read() -> None:
    logits, labels = torch.tensor([[0.5, -1.0]] * 3), torch.tensor([2, -1, 7])
    junk, zeros = torch.tensor([math.nan, 9.0, -9.0]), torch.zeros(3)
    assert torch.equal(rtmdet_loss.qfl(logits, junk, labels), rtmdet_loss.qfl(logits, zeros, labels))


def test_dense_and_labelled_qualities_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, quality = torch.randn(9, 4, generator=generator), torch.rand(9, generator=generator)
    labels = torch.arange(9) % 5
    dense = torch.where(labels[:, None] == torch.arange(4), quality[:, None], 0.0)
    assert torch.equal(rtmdet_loss.qfl(logits, quality, labels), rtmdet_loss.qfl(logits, dense))


def test_activated_predictions_are_probabilities() -> None:
    logits, quality = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.25, 0.0]])
    bounded = rtmdet_loss._qfl(exact(logits), exact(quality))
    probability = rtmdet_loss.qfl(torch.sigmoid(logits), quality, activated=True)
    spread = rtmdet_loss._qfl(torch.sigmoid(exact(logits)), exact(quality), activated=True)
    assert same(probability, bounded.value, spread)
    certain = rtmdet_loss.qfl(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), activated=True)
    assert certain.item() == 0


def test_reductions_weights_and_average_factors() -> None:
    logits, quality = torch.tensor([[0.5], [1.5], [-0.5]]), torch.tensor([[0.0], [1.0], [0.5]])
    weight = torch.tensor([1.0, 2.0, 4.0])
    rows = rtmdet_loss.qfl(logits, quality, reduction="none")
    weighted = rows * weight
    for settings, expected in (
        ({"reduction": "none", "weight": weight}, weighted),
        ({"reduction": "none", "weight": weight, "average_factor": 3.0}, weighted),
        ({"reduction": "sum"}, rows.sum()),
        ({"reduction": "mean", "weight": weight}, weighted.mean()),
        ({"average_factor": 7.0, "weight": weight, "loss_weight": 0.5}, 0.5 * (weighted.sum() / (7.0 + EPS))),
        ({"average_factor": 0.0}, rows.sum() / EPS),
    ):
        assert torch.equal(rtmdet_loss.qfl(logits, quality, **settings), expected)


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_qfl_gradient_by_finite_differences(activated: bool, beta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    given = (torch.sigmoid(given) if activated else given).requires_grad_()
    quality = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rtmdet_loss.qfl(x, quality, activated=activated, beta=beta), (given,))


def test_qfl_gradient_at_a_met_target_is_zero() -> None:
    logits = torch.zeros(1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(rtmdet_loss.qfl(logits, torch.tensor([[0.5]])), logits)
    assert gradient.tolist() == [[0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wider_quality_is_refused_but_under_autocast(dtype: torch.dtype) -> None:
    logits, labels = torch.zeros(2, 2, dtype=dtype), torch.tensor([0, 2])
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.qfl: rtmdet\.quality-dtype: expected logits that hold"):
        rtmdet_loss.qfl(logits, torch.zeros(2), labels)
    assert rtmdet_loss.qfl(logits, torch.zeros(2, dtype=dtype), labels).dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        assert rtmdet_loss.qfl(logits, torch.zeros(2), labels).dtype == torch.float32


def test_what_terms_refuse() -> None:
    logits = torch.zeros(3, 2)
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.sum-with-average-factor: expected reduction 'mean' or 'none'"):
        rtmdet_loss.qfl(logits, logits, reduction="sum", average_factor=1.0)
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.weight-shape: expected one weight a row, \(3,\), got \(3, 2\)"):
        rtmdet_loss.qfl(logits, logits, weight=logits)
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.probability-out-of-range: expected 0 to 1"):
        rtmdet_loss.qfl(logits - 1, logits, activated=True)
    with pytest.raises(InputError, match=r"rtmdet\.qfl: quality: expected shape \(3,\), got \(3, 2\)"):
        rtmdet_loss.qfl(logits, logits, torch.zeros(3, dtype=torch.int64))
    boxes = torch.zeros(3, 4)
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.giou_loss: rtmdet\.weight-shape"):
        rtmdet_loss.giou_loss(boxes, boxes, torch.ones(3, 2))


# ------------------------------------------------------------------------------------------------------ GIoU loss
def pair() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 4.0, 4.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]] * 2)


def test_giou_loss_by_hand() -> None:
    predicted, target = pair()
    rows = rtmdet_loss.giou_loss(predicted, target, reduction="none")
    bounded = rtmdet_loss._giou_loss(exact(predicted), exact(target), reduction="none")
    assert same(rows, torch.tensor([1 - 1 / 3, 1 - 1 / 4], dtype=torch.float64), bounded)
    assert torch.equal(rows, 1 - overlaps_mmdet(predicted, target, mode="giou", aligned=True))


def test_weights_of_sides_are_averaged() -> None:
    sides = torch.tensor([[1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    by_side, by_row = (rtmdet_loss.giou_loss(*pair(), weight, reduction="none") for weight in (sides, sides.mean(1)))
    assert torch.equal(by_side, by_row)


@pytest.mark.parametrize("shape", [(2,), (2, 4)])
def test_without_a_positive_weight_boxes_are_summed(shape: tuple[int, ...]) -> None:
    predicted, target = pair()
    predicted.requires_grad_()
    loss = rtmdet_loss.giou_loss(predicted, target, torch.zeros(shape), loss_weight=2.0, average_factor=3.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, predicted)[0].tolist() == [[0.0] * 4] * 2
    assert rtmdet_loss.giou_loss(predicted, target, -torch.ones(shape), loss_weight=2.0).item() == -12
    assert rtmdet_loss.giou_loss(predicted, target, -torch.ones(shape), reduction="none").shape == (2,)


def test_giou_gradient_by_finite_differences() -> None:
    target = pair()[1].double() + 0.25
    predicted = (pair()[0].double() + torch.tensor([0.1, 0.2, 0.3, 0.4])).requires_grad_()
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rtmdet_loss.giou_loss(x, target, weight), (predicted,))


# ----------------------------------------------------------------------------------------------------------- loss
def test_loss_by_hand() -> None:
    """One positive at (24, 24) of IoU 49/64 on the first level, everything else background of logit 0."""
    given = batch([[17.0, 17.0, 31.0, 31.0]])
    parts = rtmdet_loss.loss(**given)
    gt_index = torch.full((1, 80), -1)
    gt_index[0, 27] = 0
    bounded = loss_given(gt_index, **given)
    quality, background = 49 / 64, math.log(2) / 4
    positive = math.log(2) * (quality - 0.5) ** 2
    by_hand = {
        "classification": [127 * background + positive, 32 * background],
        "box": [2 * (1 - quality) * quality, 0.0],
    }
    for name, values in by_hand.items():
        assert same(parts[name], torch.tensor(values, dtype=torch.float64) / (1 + EPS), bounded[name])
    total = (sum(by_hand["classification"]) + sum(by_hand["box"])) / (1 + EPS)
    assert same(parts["total"], total, bounded["total"])


def test_levels_add_up_to_the_average_factor() -> None:
    given = random_batch(2)
    parts = rtmdet_loss.loss(**given)
    gt_index = rtmdet.assign(*_assignment_arguments(given)).gt_index
    levels = levels_given(gt_index, **given, dtype=None)
    for name, part in (("classification", "class_part"), ("box", "box_part")):
        factor = sum(getattr(level, part) for level in levels)
        assert factor > 1
        assert torch.equal(parts[name], torch.stack([getattr(level, name) for level in levels]) / factor)


def _assignment_arguments(given: dict[str, Any]) -> list[Any]:
    sizes = [(8, 8), (4, 4)]
    points = rtmdet.priors(sizes, given["strides"])
    boxes = rtmdet.decode(points[:, :2], rtmdet_loss._flatten(given["distances"]))
    ground_truths = [given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")]
    inside = torch.ones(boxes.shape[:2], dtype=torch.bool)
    return [rtmdet_loss._flatten(given["class_logits"]), boxes, points, inside, *ground_truths]


def test_loss_gradient_by_finite_differences() -> None:
    given = random_batch(3, torch.float64)
    shapes = [t.shape for name in ("class_logits", "distances") for t in given[name]]
    gt_index = rtmdet.assign(*_assignment_arguments(given)).gt_index
    base = torch.cat([t.flatten() for name in ("class_logits", "distances") for t in given[name]])
    direction = torch.randn(len(base), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    quality = rtmdet.assign(*_assignment_arguments(given)).quality

    def along(step: Tensor) -> Tensor:
        maps = [
            part.reshape(shape)
            for part, shape in zip(
                torch.split(base + step * direction, [s.numel() for s in shapes]), shapes, strict=True
            )
        ]
        points = rtmdet.priors([(8, 8), (4, 4)], given["strides"])
        boxes = rtmdet.decode(points[:, :2], rtmdet_loss._flatten(maps[2:]))
        # Neither the assignment nor the quality of its positives moves along.
        aims = rtmdet_loss.targets(gt_index, quality, given["gt_boxes"], given["gt_labels"], num_classes=2)
        weights = rtmdet_loss._Weights(2.0, 1.0, 2.0, 1e-6)
        levels = rtmdet_loss._level_losses(rtmdet_loss._flatten(maps[:2]), boxes, aims, [64, 16], weights)
        return rtmdet_loss._normalised(levels, *rtmdet_loss._average_factors(levels))["total"]

    leaves = [t.requires_grad_() for name in ("class_logits", "distances") for t in given[name]]
    gradients = torch.autograd.grad(rtmdet_loss.loss(**given)["total"], leaves)
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (step,))
    (slope,) = torch.autograd.grad(along(step), step)
    projected = torch.cat([g.flatten() for g in gradients]) * direction
    rounding = len(base) * torch.finfo(torch.float64).eps * projected.abs().sum()
    assert (slope - projected.sum()).abs() <= rounding


def test_no_gradient_through_assignment_and_a_zero_one_where_there_are_no_positives() -> None:
    given = batch([[17.0, 17.0, 31.0, 31.0]])
    for level in given["distances"]:
        level.requires_grad_()
    total = rtmdet_loss.loss(**given)["total"]
    first, second = torch.autograd.grad(total, given["distances"])
    assert first[0, :, 3, 3].all()
    first[0, :, 3, 3] = 0
    assert not first.any()
    assert torch.equal(second, torch.zeros_like(second))


def test_a_non_finite_box_of_a_level_without_positives_makes_the_loss_nan_and_its_gradient_zero() -> None:
    given = batch([[17.0, 17.0, 31.0, 31.0]])
    given["distances"][1][0, 0, 0, 0] = math.inf
    for level in given["distances"]:
        level.requires_grad_()
    parts = rtmdet_loss.loss(**given)
    assert parts["box"].isnan().tolist() == [False, True]
    _, gradient = torch.autograd.grad(parts["total"], given["distances"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_padding_of_images_leaves_cells_out() -> None:
    given = batch([[17.0, 17.0, 31.0, 31.0]], pad_shapes=torch.tensor([[33, 64]]))
    parts, whole = rtmdet_loss.loss(**given), rtmdet_loss.loss(**{**given, "pad_shapes": None})
    assert parts["classification"].tolist() < whole["classification"].tolist()
    assert torch.equal(parts["box"], whole["box"])
    covering = {**given, "pad_shapes": torch.tensor([[57, 57]])}
    assert torch.equal(rtmdet_loss.loss(**covering)["total"], whole["total"])


def test_an_allowed_border_compares_strides() -> None:
    given = batch([[33.0, 33.0, 47.0, 47.0]], allowed_border=0, image_shapes=torch.tensor([[12, 12]]))
    parts, whole = rtmdet_loss.loss(**given), rtmdet_loss.loss(**{**given, "allowed_border": -1})
    # Strides of 8 are inside an image of 12 px, those of 16 are not: the second level takes no part at all.
    assert torch.equal(parts["box"][0], whole["box"][0])
    assert parts["classification"][1] == 0
    with pytest.raises(InputError, match=r"rtmdet\.loss: image_shapes: expected image sizes with an allowed border"):
        rtmdet_loss.loss(**{**given, "image_shapes": None})


@pytest.mark.parametrize(
    ("pads", "behaviour", "got"),
    [
        ([[0, 64], [64, 0]], "rtmdet.no-valid-prior", "none in image 0, 1"),
        ([[64, 64], [0, 64]], "rtmdet.no-valid-prior-in-one-image", "none in image 1"),
    ],
)
def test_images_without_a_valid_prior_are_named(pads: list[list[int]], behaviour: str, got: str) -> None:
    with pytest.raises(UpstreamRaises, match=got) as caught:
        rtmdet_loss.loss(**batch([[17.0, 17.0, 31.0, 31.0]], images=2, pad_shapes=torch.tensor(pads)))
    assert caught.value.behaviour == behaviour


def test_what_the_loss_refuses() -> None:
    given = batch([[17.0, 17.0, 31.0, 31.0]])
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.unequal-strides: expected equal strides along x and y"):
        rtmdet_loss.loss(**{**given, "strides": [8, (16, 8)]})
    with pytest.raises(InputError, match=r"strides: expected one for each of 2 levels, got 3"):
        rtmdet_loss.loss(**{**given, "strides": [8, 16, 32]})
    with pytest.raises(InputError, match=r"rtmdet\.loss: distances: expected maps of sizes \[\(8, 8\), \(4, 4\)\]"):
        rtmdet_loss.loss(**{**given, "distances": given["distances"][::-1]})
    with pytest.raises(InputError, match=r"for at least one image"):
        rtmdet_loss.loss(**batch([[17.0, 17.0, 31.0, 31.0]], images=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_under_autocast_only(dtype: torch.dtype) -> None:
    given = random_batch(5)
    half = {**given, **{name: [t.to(dtype) for t in given[name]] for name in ("class_logits", "distances")}}
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.quality-dtype"):
        rtmdet_loss.loss(**half)
    with torch.autocast("cpu", dtype=dtype):
        parts = rtmdet_loss.loss(**half)
    assert parts["total"].dtype == torch.float32
    assert parts["total"].isfinite()


def test_ignored_boxes_are_not_read() -> None:
    given = random_batch(6)
    ignored = torch.tensor([[[0.0, 0.0, 64.0, 64.0], [math.nan] * 4]] * 2)
    assert torch.equal(rtmdet_loss.loss(**given, ignored_boxes=ignored)["total"], rtmdet_loss.loss(**given)["total"])


def test_inputs_are_not_written_to() -> None:
    given = random_batch(7)
    before = copy.deepcopy(given)
    rtmdet_loss.loss(**given)
    for name in ("class_logits", "distances"):
        assert all(torch.equal(a, b) for a, b in zip(given[name], before[name], strict=True))
    assert all(torch.equal(given[name], before[name]) for name in ("gt_boxes", "gt_labels", "gt_valid"))
