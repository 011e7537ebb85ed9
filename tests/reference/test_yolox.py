"""YOLOX by hand, by brute force and by finite differences: each stage, both flavours."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.reference import yolox, yolox_cost, yolox_loss
from detoracle.reference.errors import InputError, UpstreamRaises

FLAVOURS = tuple(yolox_cost.FLAVOURS)
ONE = torch.ones(1, 1, dtype=torch.bool)


def grid(sizes: list[tuple[int, int]], strides: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return yolox.anchor_grid(sizes, strides, like=torch.zeros((), dtype=dtype))[1:]


def scene(seed: int, *, gts: tuple[int, ...] = (3, 0, 5), classes: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """Arguments of `yolox.loss`: random maps whose boxes have the size of the ground truths, on a 64 px image."""
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(len(gts), 5 + classes, s, s, generator=generator, dtype=dtype) for s in (8, 4, 2)]
    for level, cells in zip(raw, (8, 4, 2), strict=True):
        level[:, 2:4] = level[:, 2:4] / 4 + math.log(cells / 2)  # about 32 px
    boxes = torch.rand(len(gts), max(gts), 4, generator=generator, dtype=dtype) * 40 + 10
    labels = torch.randint(classes, (len(gts), max(gts)), generator=generator)
    valid = torch.arange(max(gts)) < torch.tensor(gts)[:, None]
    return {"raw": raw, "strides": [8, 16, 32], "gt_boxes": boxes, "gt_labels": labels, "gt_valid": valid}


def assign_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    sizes = [tuple(level.shape[2:]) for level in arguments["raw"]]
    points, strides = grid(sizes, arguments["strides"], arguments["gt_boxes"].dtype)
    ground_truths = {name: arguments[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    predictions = yolox.decode(arguments["raw"], arguments["strides"])
    return {"predictions": predictions, "anchor_points": points, "anchor_strides": strides, **ground_truths}


# ------------------------------------------------------------------------------------------------------ by hand
def test_anchors_come_level_by_level_and_row_by_row() -> None:
    cells, points, strides = yolox.anchor_grid([(2, 3), (1, 1)], [8, 16], like=torch.zeros(()))
    assert cells.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 0]]
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert strides.tolist() == [8] * 6 + [16]


def test_decoding_offsets_from_the_corner_and_takes_exponentials_of_sizes() -> None:
    raw = torch.zeros(1, 6, 2, 2, dtype=torch.float64)
    raw[0, :, 1, 0] = torch.tensor([0.25, -0.5, math.log(2), math.log(0.5), 7, -3], dtype=torch.float64)
    third = yolox.decode([raw], [8])[0, 2]  # column 0, row 1
    assert third.tolist() == [0.25 * 8, (1 - 0.5) * 8, 16, 4, 7, -3]


@pytest.mark.parametrize(
    ("flavour", "candidate", "geometry"),
    [
        # GT centre (20, 20), 16 x 48: box x 12..28, y -4..44; squares of half side 20 and 12.
        (
            "tutorial",
            lambda x, y: abs(x - 20) < 20 and abs(y - 20) < 24,
            lambda x, y: abs(x - 20) < 8 and abs(y - 20) < 20,
        ),
        (
            "official",
            lambda x, y: abs(x - 20) < 12 and abs(y - 20) < 12,
            lambda x, y: abs(x - 20) < 12 and abs(y - 20) < 12,
        ),
    ],
)
def test_candidates_of_one_box(flavour: str, candidate: Any, geometry: Any) -> None:
    points, strides = grid([(8, 8)], [8])
    found, preferred = yolox_cost.candidates(
        points, strides, torch.tensor([[[20.0, 20, 16, 48]]], dtype=torch.float64), ONE, flavour=flavour
    )
    places = points.tolist()
    box = (lambda x, y: abs(x - 20) < 8 and abs(y - 20) < 24) if flavour == "tutorial" else (lambda x, y: False)
    square = (lambda x, y: abs(x - 20) < 20 and abs(y - 20) < 20) if flavour == "tutorial" else candidate
    assert found[0].tolist() == [box(x, y) or square(x, y) for x, y in places]
    assert preferred[0, 0].tolist() == [geometry(x, y) for x, y in places]


def test_the_centre_square_grows_with_the_anchors_own_stride() -> None:
    points, strides = torch.tensor([[36.0, 4.0], [36.0, 4.0]]), torch.tensor([8.0, 16.0])
    found, _ = yolox_cost.candidates(points, strides, torch.tensor([[[4.0, 4, 2, 2]]]), ONE)
    assert found.tolist() == [[False, True]]  # 32 px away: 2.5 * 8 = 20 and 2.5 * 16 = 40


@pytest.mark.parametrize(("x", "inside"), [(12.0, False), (12.125, True), (27.875, True), (28.0, False)])
def test_a_point_on_an_edge_is_outside(x: float, inside: bool) -> None:
    points, strides = torch.tensor([[x, 64.0]]), torch.tensor([0.5])
    found, _ = yolox_cost.candidates(points, strides, torch.tensor([[[20.0, 60, 16, 16]]]), ONE)
    assert found.item() is inside


@pytest.mark.parametrize(("flavour", "penalty"), [("tutorial", 1e5), ("official", 1e6)])
def test_cost_of_one_pair(flavour: str, penalty: float) -> None:
    predictions = torch.tensor([[[8.0, 8, 16, 16, 1.5, -0.5, 2.0, 0.25]]] * 1, dtype=torch.float64)
    gt = torch.tensor([[[12.0, 8, 16, 16]]], dtype=torch.float64)  # overlap 12 x 16 of 16 x 16 each
    iou = 192 / (256 + 256 - 192)
    probability = [math.sqrt(1 / (1 + math.exp(-c)) / (1 + math.exp(-1.5))) for c in (-0.5, 2.0, 0.25)]
    class_cost = -math.log(probability[1]) - math.log(1 - probability[0]) - math.log(1 - probability[2])
    expected = class_cost - 3 * math.log(iou + 1e-8)
    for geometry, extra in ((ONE[None], 0.0), (~ONE[None], penalty)):
        cost, found = yolox_cost.cost(predictions, gt, torch.tensor([[1]]), ONE, ONE, geometry, flavour=flavour)
        assert found.item() == iou
        assert cost.item() == pytest.approx(expected + extra, rel=8 * torch.finfo(torch.float64).eps)


def test_logarithms_are_clamped_at_minus_100() -> None:
    """A certain prediction of the wrong class costs 100 for the right one and 100 for the wrong, not infinity."""
    predictions = torch.tensor([[[8.0, 8, 16, 16, 900, -900, 900]]], dtype=torch.float64)
    gt = torch.tensor([[[8.0, 8, 16, 16]]], dtype=torch.float64)
    cost, _ = yolox_cost.cost(predictions, gt, torch.tensor([[0]]), ONE, ONE, ONE[None])
    assert cost.item() == 200 - 3 * math.log(1 + 1e-8)


def test_pairs_outside_the_candidates_and_padding_cost_infinity() -> None:
    predictions = torch.zeros(1, 2, 6).index_fill(2, torch.tensor([2, 3]), 8.0)
    gt, labels = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 0, 0]]]), torch.tensor([[0, 9]])  # a padded label is not read
    valid, candidate = torch.tensor([[True, False]]), torch.tensor([[True, False]])
    cost, iou = yolox_cost.cost(predictions, gt, labels, valid, candidate, torch.ones(1, 2, 2, dtype=torch.bool))
    assert cost.isinf().tolist() == [[[False, True], [True, True]]]
    assert iou.tolist() == [[[1, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("ious", "k"),
    [
        ([0.1] * 3, 1),
        ([0.5, 0.5, 0.5, 0.49], 1),
        ([0.5, 0.5, 0.5, 0.5], 2),
        ([1.0] * 12, 10),
        ([0.25] * 12, 2),
        ([math.nan, 1.0, 1.0], 1),
        ([1.0, 1.0], 2),
    ],
)
def test_dynamic_k_sums_ten_and_truncates(ious: list[float], k: int) -> None:
    assert yolox._dynamic_k(torch.tensor([ious])).tolist() == [k]


def test_ious_with_other_ground_truths_candidates_count() -> None:
    """Twelve candidates, two overlap well by half: k is 3, though only one lies near the ground truth by cost."""
    iou = torch.tensor([[[0.75, 0.75, 0.75, 0.75]]])
    cost = torch.tensor([[[1.0, 1e5, 1e5 + 1, 1e5 + 2]]])
    gt_index, k = yolox.dynamic_k_matching(cost, iou, torch.ones(1, 4, dtype=torch.bool), ONE)
    assert (gt_index.tolist(), k.tolist()) == ([[0, 0, 0, -1]], [[3]])


def test_a_contested_anchor_goes_to_one_that_never_claimed_it() -> None:
    cost = torch.tensor([[[3.0, 9.0, 9.5], [4.0, 9.0, 9.5], [2.0, 1.0, 9.5]]])
    iou = torch.full((1, 3, 3), 0.2)
    every = torch.ones(1, 3, dtype=torch.bool)
    gt_index, k = yolox.dynamic_k_matching(cost, iou, every, every)
    assert (gt_index.tolist(), k.tolist()) == ([[2, 2, -1]], [[1, 1, 1]])  # 0 and 1 are left with nothing


def test_the_official_count_drops_the_last_row_for_one_of_no_positive_sum() -> None:
    boxes = torch.tensor([[[-40.0, -30, 50, 10], [32, 32, 20, 20], [8, 8, 4, 4]]])
    labels, valid = torch.tensor([[2, 0, 1]]), torch.tensor([[True, True, True]])
    counted = [yolox.counted_ground_truths(boxes, labels, valid, flavour=f).tolist() for f in FLAVOURS]
    assert counted == [[[True, True, True]], [[True, True, False]]]
    labels[0, 0] = 11  # now the first row sums to 1
    assert yolox.counted_ground_truths(boxes, labels, valid, flavour="official").all()


# --------------------------------------------------------------------------------------------------- brute force
def brute_force(
    predictions: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor, flavour: str
) -> Any:
    """One image's assignment in plain Python floats, pair by pair."""
    rules = yolox_cost.FLAVOURS[flavour]
    anchors, gts = range(len(points)), range(len(boxes))
    near, both = set(), set()
    for g, a in itertools.product(gts, anchors):
        (x, y), s, (cx, cy, w, h) = points[a].tolist(), strides[a].item(), boxes[g].tolist()
        box = cx - w / 2 < x < cx + w / 2 and cy - h / 2 < y < cy + h / 2
        square = max(abs(x - cx), abs(y - cy)) < rules.center_radius * s
        if (box or square) if rules.box_counts else square:
            near.add(a)
        if (box and square) if rules.box_counts else square:
            both.add((g, a))
    cost, iou = {}, {}
    for g, a in itertools.product(gts, sorted(near)):
        (cx, cy, w, h), (px, py, pw, ph, objectness, *classes) = boxes[g].tolist(), predictions[a].tolist()
        wide = min(cx + w / 2, px + pw / 2) - max(cx - w / 2, px - pw / 2)
        high = min(cy + h / 2, py + ph / 2) - max(cy - h / 2, py - ph / 2)
        shared = wide * high if wide > 0 and high > 0 else 0.0
        iou[g, a] = shared / (w * h + pw * ph - shared)
        total = -3 * math.log(iou[g, a] + 1e-8) + (0 if (g, a) in both else rules.penalty)
        for c, logit in enumerate(classes):
            p = math.sqrt(1 / (1 + math.exp(-logit)) / (1 + math.exp(-objectness)))
            total -= math.log(p if c == labels[g] else 1 - p)
        cost[g, a] = total
    claims = {}
    for g in gts:
        k = max(int(sum(sorted((iou[g, a] for a in near), reverse=True)[:10])), 1)
        claims[g] = set(sorted(near, key=lambda a: cost[g, a])[:k])
    outcome = []
    for a in anchors:
        claimants = [g for g in gts if a in claims[g]]
        outcome.append(min(gts, key=lambda g: cost[g, a]) if len(claimants) > 1 else claimants[0] if claimants else -1)
    return outcome, [len(claims[g]) for g in gts]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("seed", range(4))
def test_assignment_equals_brute_force(flavour: str, seed: int) -> None:
    given = assign_arguments(scene(seed, gts=(6, 1, 0, 3)))
    found = yolox.assign(**given, flavour=flavour)
    for image, valid in enumerate(given["gt_valid"]):
        expected, k = brute_force(
            given["predictions"][image],
            given["anchor_points"],
            given["anchor_strides"],
            given["gt_boxes"][image, valid],
            given["gt_labels"][image, valid],
            flavour,
        )
        assert found.gt_index[image].tolist() == expected
        assert found.extra["dynamic_k"][image, valid].tolist() == k
        assert not found.extra["dynamic_k"][image, ~valid].any()
    assert found.extra["dynamic_k"].max() > 1
    assert found.positive.sum() > 8
    assert not found.quality[~found.positive].any()


# --------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_gradient_equals_finite_differences(flavour: str) -> None:
    """Central differences of the loss with the assignment and matched IoUs, which are constants, held fixed."""
    arguments = scene(1, gts=(2, 0, 1), classes=2)
    for level in arguments["raw"]:
        level.requires_grad_()
    found = yolox_loss.loss(**arguments, flavour=flavour, use_l1=True)["total"]
    gradients = torch.autograd.grad(found, arguments["raw"])
    matched = yolox.assign(**assign_arguments(arguments), flavour=flavour)
    sizes = [tuple(level.shape[2:]) for level in arguments["raw"]]
    cells, _, strides = yolox.anchor_grid(sizes, arguments["strides"], like=arguments["gt_boxes"])

    def total(raw: list[Tensor]) -> float:
        predictions = yolox.decode(raw, arguments["strides"])
        ground_truths = arguments["gt_boxes"], arguments["gt_labels"]
        return yolox_loss._loss(yolox._flatten(raw), predictions, cells, strides, *ground_truths, matched, True)[
            "total"
        ].item()

    step = torch.finfo(torch.float64).eps ** (1 / 3)
    raw = [level.detach() for level in arguments["raw"]]
    for level, values in enumerate(raw):
        gradient = gradients[level].flatten()
        for index in sorted(set(torch.linspace(0, values.numel() - 1, 60).long().tolist())):
            ends = []
            for sign in (1, -1):
                moved = [v.clone() for v in raw]
                moved[level].view(-1)[index] += sign * step
                ends.append(total(moved))
            # truncation and cancellation are both of the order of step squared for a loss of order 10
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
                gradient[index].item(), abs=100 * step**2, rel=step
            )


def test_the_parts_add_up_over_positives_and_all_anchors() -> None:
    """One image, 2 x 2 cells of 8 px, zero logits; the box of cell (0, 0) is predicted half a cell off."""
    raw = torch.zeros(1, 7, 2, 2, dtype=torch.float64)
    arguments: dict[str, Any] = {
        "gt_boxes": torch.tensor([[[4.0, 0, 8, 8]]], dtype=torch.float64),
        "gt_labels": torch.tensor([[1]]),
    }
    parts = yolox_loss.loss([raw], [8], **arguments, gt_valid=ONE, use_l1=True)
    eps = 8 * torch.finfo(torch.float64).eps
    iou = 32 / (64 + 64 - 32)
    assert parts["box"].item() == pytest.approx(5 * (1 - iou**2), rel=eps)
    assert parts["objectness"].item() == pytest.approx(4 * math.log(2), rel=eps)
    assert parts["classification"].item() == pytest.approx(2 * math.log(2), rel=eps)
    assert parts["l1"].item() == pytest.approx(0.5 + 2 * math.log(1 + 1e-8), rel=eps)
    assert parts["total"].item() == pytest.approx(sum(v.item() for n, v in parts.items() if n != "total"), rel=eps)


def test_a_batch_without_ground_truth_is_divided_by_one() -> None:
    arguments = scene(0, gts=(0, 0))
    parts = yolox_loss.loss(**arguments)
    every = torch.cat([level[:, 4].flatten() for level in arguments["raw"]])
    assert parts["box"].item() == parts["classification"].item() == 0
    expected = math.fsum(math.log1p(math.exp(x)) for x in every.tolist())
    assert parts["total"].item() == pytest.approx(expected, rel=len(every) * torch.finfo(torch.float64).eps)


def test_l1_is_off_unless_asked_for() -> None:
    assert "l1" not in yolox_loss.loss(**scene(0))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_as_they_are_and_dtypes_are_kept(flavour: str, dtype: torch.dtype) -> None:
    arguments = scene(0, dtype=dtype)
    before = copy.deepcopy(arguments)
    parts = yolox_loss.loss(**arguments, flavour=flavour, use_l1=True)
    assert {part.dtype for part in parts.values()} == {dtype}
    found = yolox.assign(**assign_arguments(arguments), flavour=flavour)
    assert (found.gt_index.dtype, found.quality.dtype) == (torch.int64, dtype)
    assert all(torch.equal(a, b) for a, b in zip(arguments.pop("raw"), before.pop("raw"), strict=True))
    assert all(torch.equal(torch.as_tensor(arguments[n]), torch.as_tensor(before[n])) for n in arguments)


# ------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "behaviour"),
    [
        (lambda a: a["gt_labels"].fill_(3), "yolox.label-out-of-range"),
        (lambda a: a["gt_labels"].fill_(-1), "yolox.label-out-of-range"),
        (lambda a: a["gt_boxes"].add_(9000.0), "yolox.no-candidate"),
        (lambda a: a["raw"][0][:, 5].fill_(math.nan), "yolox.non-finite-prediction"),
        (lambda a: a["raw"][0][:, 4].fill_(math.nan), "yolox.non-finite-prediction"),
    ],
)
def test_named_behaviours(change: Any, behaviour: str) -> None:
    arguments = scene(0)
    change(arguments)
    with pytest.raises(UpstreamRaises) as caught:
        yolox_loss.loss(**arguments)
    assert caught.value.behaviour == behaviour
    assert "image 0" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [8, 16]}, "yolox: strides: expected 3 positive numbers, one a level"),
        ({"strides": [8, 16, 0]}, "3 positive numbers"),
        (
            {"gt_boxes": torch.zeros(3, 5, 5)},
            r"yolox.loss: gt_boxes: expected a float Tensor of shape \(B, G, 4\) with B=3",
        ),
        ({"gt_labels": torch.zeros(3, 4, dtype=torch.int64)}, "gt_labels: expected a int Tensor"),
        ({"gt_valid": torch.zeros(3, 5)}, "gt_valid: expected a bool Tensor"),
        ({"flavour": "newest"}, 'flavour: expected {"tutorial", "official"}, got \'newest\''),
        ({"raw": []}, "raw: expected a non-empty list of Tensor"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        yolox_loss.loss(**{**scene(0), **change})


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="at least one image"):
        yolox.decode([torch.zeros(0, 6, 2, 2)], [8])
