"""Anchor points, padded ground truths and task-aligned assignment: by hand, by brute force, and its quirks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import yolov8
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.yolov8 import explain_assign

FAR = [900.0, 900.0, 908.0, 908.0]  # a prediction that overlaps nothing


def row(
    gts: list[list[float]],
    boxes: list[list[float]],
    *,
    topk: int,
    scores: list[list[float]] | None = None,
    labels: list[int] | None = None,
) -> dict[str, Any]:
    """Anchor points 4, 12, 20, ... on a line; one class of score 0.25 unless scores say otherwise."""
    count = len(boxes)
    return {
        "scores": torch.tensor([scores or [[0.25]] * count]),
        "boxes": torch.tensor([boxes]),
        "anchor_points": torch.stack([torch.arange(count) * 8 + 4.0, torch.full((count,), 4.0)], dim=1),
        "gt_boxes": torch.tensor([gts]),
        "gt_labels": torch.tensor([labels or [0] * len(gts)]),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "topk": topk,
    }


def scene(seed: int, num_images: int = 2, num_gts: int = 4) -> dict[str, Any]:
    """Small random images of 64 px, in float64, most predictions overlapping something."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    maps = [torch.zeros(1, 1, 64 // s, 64 // s, dtype=torch.float64) for s in (16, 32)]
    points, strides = yolov8.anchor_points(maps, [16, 32])
    points = points * strides[:, None]
    centre, half = random(num_images, num_gts, 2) * 64, random(num_images, num_gts, 2) * 20 + 4
    reach = random(num_images, len(points), 4) * 20
    return {
        "scores": random(num_images, len(points), 3),
        "boxes": torch.cat([points - reach[..., :2], points + reach[..., 2:]], dim=-1),
        "anchor_points": points,
        "gt_boxes": torch.cat([centre - half, centre + half], dim=-1),
        "gt_labels": torch.randint(3, (num_images, num_gts), generator=generator),
        "gt_valid": torch.arange(num_gts) < torch.randint(num_gts + 1, (num_images, 1), generator=generator),
        "topk": 4,
    }


# ------------------------------------------------------------------------------------------------------ anchor points
def test_anchor_points_are_cell_centres_level_by_level() -> None:
    points, strides = yolov8.anchor_points([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)], [8, 16])
    assert points.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5]]
    assert strides.tolist() == [8.0] * 6 + [16.0]


def test_strides_must_fit_the_levels() -> None:
    with pytest.raises(InputError) as error:
        yolov8.anchor_points([torch.zeros(1, 1, 2, 2)], [8, 16])
    assert str(error.value) == ("yolov8.anchor_points: strides: expected 1 positive numbers, one a level, got [8, 16].")


# ------------------------------------------------------------------------------------------------------ ground truths
def test_rows_are_grouped_by_image_in_their_order() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.25, 0.25]])
    gt_boxes, gt_labels, gt_valid = yolov8.pad_targets(
        torch.tensor([2, 0, 2]), torch.tensor([5, 6, 7]), boxes, batch_size=3, image_size=(32, 64)
    )
    assert gt_labels.tolist() == [[6, 0], [0, 0], [5, 7]]
    assert gt_valid.tolist() == [[True, False], [False, False], [True, True]]
    assert gt_boxes[2].tolist() == [[24.0, 8.0, 40.0, 24.0], [8.0, 12.0, 24.0, 20.0]]
    assert gt_boxes[0].tolist() == [[0.0, 0.0, 64.0, 32.0], [0.0] * 4]


def test_a_batch_without_ground_truths_has_no_slots() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    gt_boxes, gt_labels, gt_valid = yolov8.pad_targets(none, none, torch.zeros(0, 4), batch_size=3, image_size=(32, 32))
    assert gt_boxes.shape == (3, 0, 4)
    assert gt_labels.shape == gt_valid.shape == (3, 0)


def test_an_image_outside_the_batch_still_counts_for_the_width() -> None:
    boxes = torch.full((3, 4), 0.5)
    labels = torch.tensor([1, 2, 3])
    _, gt_labels, gt_valid = yolov8.pad_targets(
        torch.tensor([0, 1, 1]), labels, boxes, batch_size=1, image_size=(32, 32)
    )
    assert gt_labels.tolist() == [[1, 0]]
    assert gt_valid.tolist() == [[True, False]]


def test_boxes_of_sum_zero_or_less_are_padding() -> None:
    boxes = torch.tensor([[[-9.0, -9.0, 9.0, 9.0], [-9.0, -9.0, 9.0, 9.5], [0.0] * 4, [-9.0, -9.0, 2.0, 2.0]]])
    counted = yolov8.counted_ground_truths(boxes, torch.ones(1, 4, dtype=torch.bool))
    assert counted.tolist() == [[False, True, False, False]]


# ---------------------------------------------------------------------------------------------------------- alignment
def test_a_perfect_prediction_has_the_root_of_its_score() -> None:
    box = [0.0, 0.0, 16.0, 8.0]
    arguments = row([box], [box] * 4, topk=1)
    del arguments["topk"]
    metric, overlaps, in_gt = yolov8.align(**arguments)
    assert in_gt.tolist() == [[[True, True, False, False]]]
    assert overlaps.tolist() == [[[1.0, 1.0, 0.0, 0.0]]]
    assert metric.tolist() == [[[0.5, 0.5, 0.0, 0.0]]]


def test_exponents_are_settings() -> None:
    box = [0.0, 0.0, 16.0, 8.0]
    arguments = row([box], [[0.0, 0.0, 8.0, 8.0]] * 4, topk=1)
    del arguments["topk"]
    metric, overlaps, _ = yolov8.align(**arguments, alpha=1.0, beta=2.0)
    assert torch.equal(metric[0, 0, :2], 0.25 * overlaps[0, 0, :2] ** 2)
    assert 0 < float(overlaps[0, 0, 0]) < 0.5


def test_padding_has_an_inside_but_no_metric() -> None:
    box = [0.0, 0.0, 16.0, 8.0]
    arguments = row([box], [box] * 4, topk=1)
    del arguments["topk"]
    arguments["gt_valid"] = torch.zeros(1, 1, dtype=torch.bool)
    metric, overlaps, in_gt = yolov8.align(**arguments)
    assert in_gt.any()
    assert not metric.any()
    assert not overlaps.any()


# --------------------------------------------------------------------------------------------------------- assignment
def ciou(gt: list[float], predicted: list[float]) -> float:
    """CIoU of two corner boxes, in plain Python."""
    width = max(min(gt[2], predicted[2]) - max(gt[0], predicted[0]), 0.0)
    height = max(min(gt[3], predicted[3]) - max(gt[1], predicted[1]), 0.0)
    sides = [(b[2] - b[0], b[3] - b[1] + 1e-7) for b in (gt, predicted)]
    iou = width * height / (sides[0][0] * sides[0][1] + sides[1][0] * sides[1][1] - width * height + 1e-7)
    diagonal = (max(gt[2], predicted[2]) - min(gt[0], predicted[0])) ** 2
    diagonal += (max(gt[3], predicted[3]) - min(gt[1], predicted[1])) ** 2
    distance = (predicted[0] + predicted[2] - gt[0] - gt[2]) ** 2 / 4
    distance += (predicted[1] + predicted[3] - gt[1] - gt[3]) ** 2 / 4
    shape = 4 / math.pi**2 * (math.atan(sides[1][0] / sides[1][1]) - math.atan(sides[0][0] / sides[0][1])) ** 2
    return iou - distance / (diagonal + 1e-7) - shape * shape / (shape - iou + 1 + 1e-7)


def brute_force(image: int, given: dict[str, Any]) -> tuple[list[int], list[float]]:
    """One image's assignment and quality, pair by pair in plain Python."""
    points, boxes, scores = (
        given["anchor_points"].tolist(),
        given["boxes"][image].tolist(),
        given["scores"][image].tolist(),
    )
    gts, labels, valid = (given[n][image].tolist() for n in ("gt_boxes", "gt_labels", "gt_valid"))
    overlap = [[0.0] * len(points) for _ in gts]
    metric = [[0.0] * len(points) for _ in gts]
    holds = [[False] * len(points) for _ in gts]
    for g, gt in enumerate(gts):
        for a, (x, y) in enumerate(points):
            holds[g][a] = valid[g] and min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y) > 1e-9
            if holds[g][a]:
                overlap[g][a] = max(ciou(gt, boxes[a]), 0.0)
                metric[g][a] = scores[a][labels[g]] ** 0.5 * overlap[g][a] ** 6
    claims: list[list[int]] = [[] for _ in points]
    for g in range(len(gts)):
        for a in sorted(range(len(points)), key=lambda a: -metric[g][a])[: given["topk"]] if valid[g] else []:
            if holds[g][a]:
                claims[a].append(g)
    winner = [-1] * len(points)
    for a, claimants in enumerate(claims):
        if len(claimants) == 1:
            winner[a] = claimants[0]
        elif claimants:
            winner[a] = max(range(len(gts)), key=lambda g: overlap[g][a])
    quality = [0.0] * len(points)
    for g in range(len(gts)):
        mine = [a for a in range(len(points)) if winner[a] == g]
        for a in mine:
            best = max(metric[g][b] for b in mine) + 1e-9
            quality[a] = metric[g][a] * max(overlap[g][b] for b in mine) / best
    return winner, quality


@pytest.mark.parametrize("seed", range(12))
def test_assignment_equals_brute_force(seed: int) -> None:
    given = scene(seed)
    result = yolov8.assign(**given)
    expected = explain_assign(**given, dtype=torch.float64).quality(result.gt_index)
    for image in range(2):
        winner, quality = brute_force(image, given)
        assert result.gt_index[image].tolist() == winner
        wrong = outside(torch.tensor(quality, dtype=torch.float64), expected.value[image], expected.error[image])
        assert not wrong.any()
    assert not outside(result.quality, expected.value, expected.error).any()


def test_the_best_positive_gets_the_best_overlap() -> None:
    box = [0.0, 0.0, 32.0, 8.0]
    # The second anchor overlaps less but scores more, and has the best metric: 0.9 ** 0.5 against 0.01 ** 0.5.
    boxes = [box, [0.0, 0.0, 31.0, 8.0], FAR, FAR]
    arguments = row([box], boxes, topk=2, scores=[[0.01], [0.9], [0.5], [0.5]])
    result = yolov8.assign(**arguments)
    assert result.gt_index.tolist() == [[0, 0, -1, -1]]
    quality = result.quality[0].tolist()
    assert max(quality) == quality[1] == 1.0  # the best overlap is that of the first anchor
    assert 0 < quality[0] < 0.2


def test_targets_follow_the_assignment() -> None:
    first, second = [0.0, 0.0, 8.0, 8.0], [16.0, 0.0, 32.0, 8.0]
    arguments = row([first, second], [first, FAR, second, FAR], topk=1, scores=[[0.5] * 3] * 4, labels=[2, 1])
    result = yolov8.assign(**arguments)
    assert result.gt_index.tolist() == [[0, -1, 1, -1]]
    assert result.extra["labels"].tolist() == [[2, 2, 1, 2]]
    assert result.extra["boxes"].tolist() == [[first, first, second, first]]
    one_hot = torch.tensor([[[0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]])
    assert torch.equal(result.extra["scores"], one_hot * result.quality[..., None])


def test_a_batch_without_ground_truths_is_background_of_class_c() -> None:
    given = scene(0, num_gts=0)
    result = yolov8.assign(**{**given, "topk": 99})  # top-k is never asked
    assert result.gt_index.eq(-1).all()
    assert result.extra["labels"].eq(3).all()
    assert not any(result.extra[name].any() for name in ("boxes", "scores"))
    assert not result.quality.any()


def test_padding_is_not_read() -> None:
    given = scene(3)
    padding = ~given["gt_valid"]
    assert padding.any()
    boxes, labels = given["gt_boxes"].clone(), given["gt_labels"].clone()
    boxes[padding], labels[padding] = torch.nan, 77
    want, got = yolov8.assign(**given), yolov8.assign(**{**given, "gt_boxes": boxes, "gt_labels": labels})
    assert torch.equal(want.gt_index, got.gt_index)
    assert torch.equal(want.quality, got.quality)


def test_few_anchors_raise_even_for_padding() -> None:
    arguments = row([[0.0, 0.0, 8.0, 8.0]], [FAR] * 4, topk=5)
    arguments["gt_valid"] = torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(UpstreamRaises) as error:
        yolov8.assign(**arguments)
    assert str(error.value) == "yolov8.assign: yolov8.few-anchors: expected 5 anchors or more, got 4."


@pytest.mark.parametrize("label", [-4, 3])
def test_a_label_out_of_range_raises(label: int) -> None:
    arguments = row([[0.0, 0.0, 8.0, 8.0]], [FAR] * 4, topk=1, scores=[[0.5] * 3] * 4, labels=[label])
    with pytest.raises(UpstreamRaises) as error:
        yolov8.assign(**arguments)
    assert error.value.behaviour == "yolov8.label-out-of-range"
    assert f"expected labels -3 to 2, got [{label}]" in str(error.value)


def test_negative_labels_count_from_the_last_class() -> None:
    box = [0.0, 0.0, 32.0, 8.0]
    scores = [[0.1, 0.4, 0.9]] * 4
    results = {k: yolov8.assign(**row([box], [box] * 4, topk=4, scores=scores, labels=[k])) for k in (-1, -2, 1, 2)}
    assert torch.equal(results[-1].quality, results[2].quality)
    assert torch.equal(results[-2].quality, results[1].quality)
    assert results[-2].extra["labels"].tolist() == [[0] * 4]


def test_an_empty_batch_is_an_error() -> None:
    given = scene(0)
    empty = {name: t[:0] if name not in ("anchor_points", "topk") else t for name, t in given.items()}
    with pytest.raises(InputError, match=r"yolov8.assign: batch: expected at least one image, got none\."):
        yolov8.assign(**empty)


def test_shapes_are_checked() -> None:
    given = scene(0)
    with pytest.raises(InputError, match=r"gt_boxes: expected a float Tensor of shape \(B, G, 4\) with B=2"):
        yolov8.assign(**{**given, "gt_boxes": given["gt_boxes"][0]})


def test_inputs_are_not_written_to() -> None:
    given = scene(1)
    before = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
    yolov8.assign(**given)
    assert all(torch.equal(given[name], t) for name, t in before.items())


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_works(dtype: torch.dtype) -> None:
    box = [0.0, 0.0, 16.0, 8.0]
    arguments = row([box], [[1.0, 0.0, 15.0, 8.0], [2.0, 0.0, 15.0, 8.0], FAR, FAR], topk=2)
    result = yolov8.assign(**cast(arguments, dtype))
    assert result.gt_index.tolist() == [[0, 0, -1, -1]]
    assert result.quality.dtype == dtype
    assert 1 > result.quality[0, 0] > result.quality[0, 1] > 0


def test_scores_in_half_and_boxes_in_float32_mix() -> None:
    given = cast(scene(2), torch.float32)
    result = yolov8.assign(**{**given, "scores": given["scores"].half()})
    assert result.quality.dtype == torch.float32
    assert result.positive.any()
