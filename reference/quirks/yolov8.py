"""Quirks of YOLOv8 that the oracle keeps: targets and assignment here, boxes and loss in `yolov8_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detoracle.reference import yolov8
from detoracle.reference.quirks.quirk import Quirk
from detoracle.reference.quirks.yolov8_loss import LOSS_QUIRKS, behaviour_of

__all__ = ["QUIRKS"]

_FAR = [900.0, 900.0, 908.0, 908.0]  # a prediction that overlaps nothing
_ROW = [[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [28.0, 4.0]]  # four anchor points of stride 8


def _assign(
    gts: list[list[float]], boxes: list[list[float]], scores: list[list[float]], labels: list[int], topk: int
) -> dict[str, Any]:
    """Arguments of `assign` for one image with a row of four anchors."""
    return {
        "scores": torch.tensor([scores]),
        "boxes": torch.tensor([boxes]),
        "anchor_points": torch.tensor(_ROW),
        "gt_boxes": torch.tensor([gts]),
        "gt_labels": torch.tensor([labels]),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "topk": topk,
    }


def _all_claimed_no_overlap() -> dict[str, Any]:
    # Both later boxes hold the last anchor, the first one does not; no prediction overlaps anything.
    gts = [[0.0, 0.0, 8.0, 8.0], [16.0, 0.0, 32.0, 8.0], [24.0, 0.0, 32.0, 8.0]]
    return _assign(gts, [_FAR] * 4, [[0.5]] * 4, [0, 0, 0], topk=4)


def _third_party_wins() -> dict[str, Any]:
    # Ground truth 0 prefers anchor 1, whose class score is better, but anchor 0's box fits it best of the three.
    gts = [[0.0, 0.0, 16.0, 8.0], [0.0, 0.0, 12.0, 8.0], [0.0, 0.0, 11.0, 8.0]]
    boxes = [[0.0, 0.0, 15.0, 8.0], [1.0, 0.0, 17.0, 8.0], _FAR, _FAR]
    return _assign(gts, boxes, [[0.0001, 0.9], [0.9, 0.0001], [0.1, 0.1], [0.1, 0.1]], [0, 1, 1], topk=1)


def _twins() -> dict[str, Any]:
    box = [0.0, 0.0, 8.0, 8.0]
    return _assign([box, box], [box, _FAR, _FAR, _FAR], [[0.5]] * 4, [0, 0], topk=1)


def _one_fits() -> dict[str, Any]:
    gt = [0.0, 0.0, 32.0, 8.0]
    return _assign([gt], [gt, _FAR, _FAR, _FAR], [[0.5]] * 4, [0], topk=4)


def _few_anchors() -> dict[str, Any]:
    return {**_one_fits(), "topk": 10}


def _class(label: int) -> dict[str, Any]:
    gt = [0.0, 0.0, 32.0, 8.0]
    return _assign([gt], [gt] * 4, [[0.1, 0.9]] * 4, [label], topk=4)


def _between_centres() -> dict[str, Any]:
    return _assign([[7.0, 3.0, 9.0, 5.0]], [[7.0, 3.0, 9.0, 5.0]] * 4, [[0.5]] * 4, [0], topk=4)


def _line() -> dict[str, Any]:
    return _assign([[4.0, 0.0, 4.0, 8.0]], [[0.0, 0.0, 8.0, 8.0]] * 4, [[0.5]] * 4, [0], topk=4)


def _nan_score() -> dict[str, Any]:
    arguments = _class(0)
    arguments["scores"][0, 0, 0] = torch.nan
    return arguments


def _edge() -> dict[str, Any]:
    arguments = _assign([[4.0, 0.0, 20.0, 8.0]], [[4.0, 0.0, 20.0, 8.0]] * 4, [[0.5]] * 4, [0], topk=4)
    del arguments["topk"]
    return arguments


def _half(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _half_overlap() -> dict[str, Any]:
    # The prediction covers a twentieth of the box, and lies in its middle.
    arguments = _assign([[0.0, 0.0, 32.0, 8.0]], [[12.8, 3.2, 19.2, 4.8]] * 4, [[0.5]] * 4, [0], topk=4)
    return _half(arguments)


def _half_metric() -> dict[str, Any]:
    arguments = _half_overlap()
    del arguments["topk"]
    return arguments


def _flat_targets() -> dict[str, Any]:
    return {
        "batch_index": torch.tensor([0, 0]),
        "labels": torch.tensor([3, 5]),
        "boxes": torch.tensor([[-0.25, 0.0, 0.75, 0.25], [0.5, 0.5, 0.5, 0.5]]),
        "batch_size": 1,
        "image_size": (32, 32),
    }


def _outside_batch() -> dict[str, Any]:
    return {**_flat_targets(), "batch_index": torch.tensor([0, 1])}


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "yolov8.first-gt-wins-zero-overlaps",
        "yolov8.assign",
        "A contested anchor without any overlap goes to the image's first ground truth, even if it lies outside that.",
        "Takes the first of equal overlaps over all ground truths.",
        "Choose among the claimants; such positives have score 0.",
        ("T5",),
        _all_claimed_no_overlap,
        lambda: yolov8.assign(**_all_claimed_no_overlap()).gt_index.tolist() == [[0, -1, 1, 0]],
    ),
    Quirk(
        "yolov8.conflict-over-all-gts",
        "yolov8.assign",
        "A contested anchor goes to the largest overlap of all ground truths, also to one that never claimed it.",
        "Takes the largest overlap of the whole column.",
        "None: the published results depend on it.",
        ("T4",),
        _third_party_wins,
        lambda: yolov8.assign(**_third_party_wins()).gt_index.tolist() == [[0, 0, -1, -1]],
    ),
    Quirk(
        "yolov8.gt-without-anchor",
        "yolov8.assign",
        "A ground truth can lose every anchor it claimed, and then trains nothing.",
        "Leaves it without an anchor, silently.",
        "Report the ground truth as unmatched.",
        ("T7",),
        _twins,
        lambda: yolov8.assign(**_twins()).gt_index.tolist() == [[0, -1, -1, -1]],
    ),
    Quirk(
        "yolov8.zero-metric-fill-up",
        "yolov8.assign",
        "A ground truth with fewer than k anchors of positive metric also takes anchors of metric 0, with score 0.",
        "Which of them depends on top-k's order among equal values, and on how many outside the box it picks.",
        "Leave them background, or pick the lowest index: the scores are 0 either way.",
        ("T6",),
        _one_fits,
        lambda: (
            yolov8.assign(**_one_fits()).gt_index.tolist() == [[0, 0, 0, 0]]
            and yolov8.assign(**_one_fits()).quality[0, 1:].tolist() == [0.0, 0.0, 0.0]
        ),
    ),
    Quirk(
        "yolov8.few-anchors",
        "yolov8.assign",
        "Fewer anchors than k cannot be assigned.",
        "Raises 'selected index k out of range', as soon as any image of the batch has a ground truth.",
        "Claim all anchors.",
        ("S5",),
        _few_anchors,
        lambda: behaviour_of(yolov8.assign, _few_anchors()) == "yolov8.few-anchors",
    ),
    Quirk(
        "yolov8.negative-class",
        "yolov8.assign",
        "A ground truth of class -1 is scored as the last class and trained as class 0.",
        "Negative indexing reads the last column; the target label is clamped at 0.",
        "A named error that gives the label.",
        ("L2",),
        lambda: _class(-1),
        lambda: (
            yolov8.assign(**_class(-1)).extra["labels"].tolist() == [[0, 0, 0, 0]]
            and torch.equal(yolov8.assign(**_class(-1)).quality, yolov8.assign(**_class(1)).quality)
        ),
    ),
    Quirk(
        "yolov8.label-out-of-range",
        "yolov8.assign",
        "A class index of C or more cannot be assigned.",
        "Indexing the scores raises on a CPU; on a GPU a device assertion ends the process.",
        "A named error that gives the label.",
        ("L1",),
        lambda: _class(2),
        lambda: behaviour_of(yolov8.assign, _class(2)) == "yolov8.label-out-of-range",
    ),
    Quirk(
        "yolov8.tiny-gt-without-anchor",
        "yolov8.assign",
        "A ground truth smaller than a cell that lies between anchor points trains nothing.",
        "Only anchor points strictly inside the box count; from 8.4 on, short sides are widened first.",
        "Report the ground truth as unmatched.",
        ("C10",),
        _between_centres,
        lambda: not bool(yolov8.assign(**_between_centres()).positive.any()),
    ),
    Quirk(
        "yolov8.degenerate-gt-untrained",
        "yolov8.assign",
        "A ground truth without area trains nothing.",
        "No anchor point lies strictly inside it.",
        "Drop boxes without area before training.",
        ("N3",),
        _line,
        lambda: not bool(yolov8.assign(**_line()).positive.any()),
    ),
    Quirk(
        "yolov8.nan-spoils-the-image",
        "yolov8.assign",
        "One NaN score of a ground truth's class at an anchor inside it makes every target score of the image NaN.",
        "The best metric is NaN, and so is the largest normalised metric of every anchor.",
        "Raise a named error for non-finite predictions.",
        ("N9",),
        _nan_score,
        lambda: bool(yolov8.assign(**_nan_score()).quality.isnan().all()),
    ),
    Quirk(
        "yolov8.half-eps-vanishes",
        "yolov8.assign",
        "In float16 a ground truth whose metrics are all 0 makes the image's target scores NaN.",
        "The epsilon of 1e-9 is 0 in float16, and the normalisation divides 0 by 0.",
        "Compute the assignment in float32.",
        ("D4",),
        _half_overlap,
        lambda: bool(yolov8.assign(**_half_overlap()).quality.isnan().any()),
    ),
    Quirk(
        "yolov8.half-metric-underflows",
        "yolov8.align",
        "In float16 the metric of an overlap below about 0.06 is 0.",
        "The sixth power underflows, so that top-k sees ties; autocast computes it in float32, so CPU and GPU differ.",
        "Compute the metric in float32.",
        ("D4", "D5"),
        _half_metric,
        lambda: (
            bool((yolov8.align(**_half_metric())[1][0, 0] > 0).all())
            and not bool(yolov8.align(**_half_metric())[0].any())
        ),
    ),
    Quirk(
        "yolov8.edge-is-outside",
        "yolov8.align",
        "An anchor point exactly on a box's edge is outside it.",
        "All four distances must exceed 1e-9.",
        "None.",
        (),
        _edge,
        lambda: yolov8.align(**_edge())[2].tolist() == [[[False, True, False, False]]],
    ),
    Quirk(
        "yolov8.negative-sum-is-padding",
        "yolov8.pad_targets",
        "A ground truth whose four coordinates sum to zero or less passes for padding, even if it covers anchors.",
        "Padding is told from ground truths by the sum of coordinates.",
        "Count ground truths explicitly.",
        ("L4",),
        _flat_targets,
        lambda: yolov8.pad_targets(**_flat_targets())[2].tolist() == [[False, True]],
    ),
    Quirk(
        "yolov8.image-outside-batch",
        "yolov8.pad_targets",
        "A ground truth of an image outside the batch is dropped.",
        "No image asks for its rows.",
        "A named error that gives the index.",
        (),
        _outside_batch,
        lambda: yolov8.pad_targets(**_outside_batch())[1].tolist() == [[3]],
    ),
    *LOSS_QUIRKS,
)
