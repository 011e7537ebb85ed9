"""YOLOv8's loss as two kernels, one program per image and block of cells of a level.

`sums` reads every class logit, and box logits of the positives; each program leaves its own sums, which are then added
in a fixed order. `gradients` writes every channel of every cell once: box logits of the positives, classes of all. A
gradient is computed where it is written, with the scale that arrives, so that it needs no memory before the backward
pass and no second pass over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import bce_with_logits
from detoracle.implementations.triton.boxes import ciou_slopes
from detoracle.implementations.triton.yolov8_kernels import distribution

__all__ = ["Level", "Targets", "gradients", "sums"]

_LAST_BIN_MARGIN = tl.constexpr(0.01)


class Level(NamedTuple):
    """Maps of a level, and where its cells stand among the anchors.

    Attributes
    ----------
    raw : Tensor (B, 4*R+C, H, W) float
        Contiguous.
    step : float
        Pixels a cell.
    cells : int
    start : int
        Anchor of the first cell.
    """

    raw: Any
    step: Any
    cells: Any
    start: Any


class Targets(NamedTuple):
    """What anchors are trained towards.

    Attributes
    ----------
    points : Tensor (A, 2) float32
        In cells.
    gt_index, quality : Tensor (B, A) int64, (B, A) float32
    gt_boxes, gt_labels : Tensor (B, G, 4) float32, (B, G) int
        In pixels; classes below 0 train the first.
    num_anchors, num_gts, num_classes, reg_max : int
    """

    points: Any
    gt_index: Any
    quality: Any
    gt_boxes: Any
    gt_labels: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any
    reg_max: Any


@triton.jit
def _channel(level, targets, image, channel, cell):
    """Where a channel of cells lies."""
    return (image.to(tl.int64) * (4 * targets.reg_max + targets.num_classes) + channel) * level.cells + cell


@triton.jit
def _target(level, targets, image, cell, there):
    """Ground truth of cells, -1 for background, its label, and their quality."""
    at = image.to(tl.int64) * targets.num_anchors + level.start + cell
    ground_truth = tl.load(targets.gt_index + at, mask=there, other=-1).to(tl.int32)
    row = image * targets.num_gts + tl.maximum(ground_truth, 0)
    label = tl.load(targets.gt_labels + row, mask=there & (ground_truth >= 0), other=-1).to(tl.int32)
    label = tl.where(ground_truth >= 0, tl.maximum(label, 0), -1)
    return ground_truth, label, tl.load(targets.quality + at, mask=there, other=0.0)


@triton.jit
def _distribution(level, targets, image, cell, positive, side, BINS: tl.constexpr):  # noqa: N803
    """Distances to a side, and the distribution they are from."""
    at = level.raw + _channel(level, targets, image, side * targets.reg_max, cell)
    return distribution(at, level.cells, positive, targets.reg_max, BINS)


@triton.jit
def _wanted(level, targets, image, cell, positive, ground_truth):
    """Points and boxes of ground truths of positives, in cells."""
    point = targets.points + 2 * (level.start + cell)
    x, y = tl.load(point, positive, 0.0), tl.load(point + 1, positive, 0.0)
    at = targets.gt_boxes + 4 * (image * targets.num_gts + ground_truth)
    left, top = tl.load(at, positive, 0.0) / level.step, tl.load(at + 1, positive, 0.0) / level.step
    right, bottom = tl.load(at + 2, positive, 1.0) / level.step, tl.load(at + 3, positive, 1.0) / level.step
    return x, y, (left, top, right, bottom)


@triton.jit
def _nearest_bins(wanted, reg_max):
    """Bin left of a distance, and how much the one right of it weighs."""
    last = reg_max - 1.0
    kept = tl.minimum(tl.maximum(wanted, 0.0), last - _LAST_BIN_MARGIN)
    left = tl.minimum(tl.floor(kept), last - 1.0)
    return left, kept - left


@triton.jit
def _dfl(logits, log_sum, wanted, reg_max, BINS: tl.constexpr):  # noqa: N803
    """Cross entropy to the two bins about a distance, and what each bin weighs in it."""
    left, on_right = _nearest_bins(wanted, reg_max)
    bins = tl.arange(0, BINS).to(tl.float32)[None, :]
    is_left, is_right = bins == left[:, None], bins == left[:, None] + 1.0
    to_left = log_sum - tl.sum(tl.where(is_left, logits, 0.0), 1)
    to_right = log_sum - tl.sum(tl.where(is_right, logits, 0.0), 1)
    weights = tl.where(is_left, 1.0 - on_right[:, None], 0.0) + tl.where(is_right, on_right[:, None], 0.0)
    return to_left * (1.0 - on_right) + to_right * on_right, weights


@triton.jit
def _box_terms(level, targets, image, cell, positive, ground_truth, BINS: tl.constexpr):  # noqa: N803
    """CIoU and DFL of positives, derivatives of the CIoU by the four distances, and those wanted."""
    x, y, gt = _wanted(level, targets, image, cell, positive, ground_truth)
    wanted = (x - gt[0], y - gt[1], gt[2] - x, gt[3] - y)
    left, of_left, _, sum_left = _distribution(level, targets, image, cell, positive, 0, BINS)
    top, of_top, _, sum_top = _distribution(level, targets, image, cell, positive, 1, BINS)
    right, of_right, _, sum_right = _distribution(level, targets, image, cell, positive, 2, BINS)
    bottom, of_bottom, _, sum_bottom = _distribution(level, targets, image, cell, positive, 3, BINS)
    ciou, slopes = ciou_slopes((x - left, y - top, x + right, y + bottom), gt)
    dfl = ciou * 0.0
    if BINS > 1:
        on_left, _ = _dfl(of_left, sum_left, wanted[0], targets.reg_max, BINS)
        on_top, _ = _dfl(of_top, sum_top, wanted[1], targets.reg_max, BINS)
        on_right, _ = _dfl(of_right, sum_right, wanted[2], targets.reg_max, BINS)
        on_bottom, _ = _dfl(of_bottom, sum_bottom, wanted[3], targets.reg_max, BINS)
        dfl = (on_left + on_top + on_right + on_bottom) / 4
    return ciou, dfl, (-slopes[0], -slopes[1], slopes[2], slopes[3]), wanted


@triton.jit
def _class_terms(level, targets, image, cell, there, label, quality, first, CLASSES: tl.constexpr):  # noqa: N803
    """Class losses (cells, classes), their derivatives, where they lie, and which exist."""
    channel = first + tl.arange(0, CLASSES)
    here = (channel < targets.num_classes)[None, :] & there[:, None]
    at = _channel(level, targets, image, 4 * targets.reg_max + channel[None, :], cell[:, None])
    logit = tl.load(level.raw + at, mask=here, other=0.0).to(tl.float32)
    # A target is a quality times 1 or 0: one that is NaN spoils them all.
    target = quality[:, None] * (channel[None, :] == label[:, None]).to(tl.float32)
    loss, derivative = bce_with_logits(logit, target)
    return tl.where(here, loss, 0.0), derivative, at, here


@triton.jit
def sums(
    level,
    targets,
    parts,
    BINS: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Sum box, class and DFL losses, (P, 3), of each program; those of boxes are weighted by the quality."""
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    ground_truth, label, quality = _target(level, targets, image, cell, there)
    positive = ground_truth >= 0
    classes = tl.zeros([CELLS], tl.float32)
    for first in range(0, targets.num_classes, CLASSES):
        classes += tl.sum(_class_terms(level, targets, image, cell, there, label, quality, first, CLASSES)[0], 1)
    out = parts + 3 * (image * tl.num_programs(0) + tl.program_id(0))
    tl.store(out + 1, tl.sum(classes, 0))
    if tl.max(positive.to(tl.int32), 0) > 0:
        ciou, dfl, _, _ = _box_terms(level, targets, image, cell, positive, ground_truth, BINS)
        tl.store(out, tl.sum(tl.where(positive, (1.0 - ciou) * quality, 0.0), 0))
        tl.store(out + 2, tl.sum(tl.where(positive, dfl * quality, 0.0), 0))


@triton.jit
def gradients(
    level,
    targets,
    scales,
    gradient,
    BINS: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write the gradient of a level's maps, from those of the three sums."""
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    ground_truth, label, quality = _target(level, targets, image, cell, there)
    positive = ground_truth >= 0
    bins = tl.arange(0, BINS)
    here = there[:, None] & (bins < targets.reg_max)[None, :]
    if tl.max(positive.to(tl.int32), 0) > 0:
        _, _, slopes, wanted = _box_terms(level, targets, image, cell, positive, ground_truth, BINS)
        to_box, to_dfl = quality * tl.load(scales), quality * tl.load(scales + 2) / 4
        for side in tl.static_range(4):
            distance, logits, probability, log_sum = _distribution(level, targets, image, cell, positive, side, BINS)
            if BINS == 1:
                total = tl.zeros_like(probability) - (slopes[side] * to_box)[:, None]
            else:
                _, weights = _dfl(logits, log_sum, wanted[side], targets.reg_max, BINS)
                away = bins[None, :].to(tl.float32) - distance[:, None]
                total = (probability - weights) * to_dfl[:, None]
                total -= probability * away * (slopes[side] * to_box)[:, None]
            at = _channel(level, targets, image, side * targets.reg_max + bins[None, :], cell[:, None])
            tl.store(gradient + at, tl.where(positive[:, None], total, 0.0), mask=here)
    else:
        for side in tl.static_range(4):
            at = _channel(level, targets, image, side * targets.reg_max + bins[None, :], cell[:, None])
            tl.store(gradient + at, tl.zeros([CELLS, BINS], tl.float32), mask=here)
    to_class = tl.load(scales + 1)
    for first in range(0, targets.num_classes, CLASSES):
        terms = _class_terms(level, targets, image, cell, there, label, quality, first, CLASSES)
        tl.store(gradient + terms[2], terms[1] * to_class, mask=terms[3])
