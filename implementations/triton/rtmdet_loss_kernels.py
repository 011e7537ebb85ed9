"""RTMDet's loss as two kernels, one program per image and block of cells of a level.

`sums` reads every class logit, and boxes of the positives; each program leaves its own sums, which are then added in a
fixed order. `gradients` writes every channel of both maps once. A gradient is computed where it is written, with the
scale that arrives, so that it needs no memory before the backward pass and no second pass over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import bce_with_logits, power, sigmoid, sign
from detoracle.implementations.triton.boxes import giou_slopes
from detoracle.implementations.triton.launching import tuned

__all__ = ["Level", "Settings", "Targets", "gradients", "sums"]

_IGNORED = tl.constexpr(-2)


class Level(NamedTuple):
    """Maps of a level, and where its cells stand among the priors.

    Attributes
    ----------
    class_logits, distances : Tensor (B, C, H, W), (B, 4, H, W) float
        Contiguous.
    cells : int
    start : int
        Prior of the first cell.
    """

    class_logits: Any
    distances: Any
    cells: Any
    start: Any


class Targets(NamedTuple):
    """What priors are trained towards.

    Attributes
    ----------
    priors : Tensor (A, 4) float32
    gt_index, quality : Tensor (B, A) int64, (B, A) float32
    gt_boxes, gt_labels : Tensor (B, G, 4) float32, (B, G) int
    num_anchors, num_gts, num_classes : int
    """

    priors: Any
    gt_index: Any
    quality: Any
    gt_boxes: Any
    gt_labels: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any


class Settings(NamedTuple):
    """Exponent of the quality focal loss, weight of positives in it if above 0, and smallest area of the GIoU loss."""

    beta: Any
    pos_weight: Any
    giou_eps: Any


@triton.jit
def _target(level, targets, image, cell, there):
    """Ground truth of cells, below 0 for none, its label, and their quality."""
    at = image.to(tl.int64) * targets.num_anchors + level.start + cell
    ground_truth = tl.load(targets.gt_index + at, mask=there, other=-1).to(tl.int32)
    quality = tl.load(targets.quality + at, mask=there, other=0.0)
    row = image * targets.num_gts + tl.maximum(ground_truth, 0)
    label = tl.load(targets.gt_labels + row, mask=there & (ground_truth >= 0), other=-1).to(tl.int32)
    return ground_truth, label, quality


@triton.jit
def _weights(ground_truth, settings):
    """Weights of cells in the class loss."""
    weight = (ground_truth != _IGNORED).to(tl.float32)
    return tl.where((ground_truth >= 0) & (settings.pos_weight > 0.0), settings.pos_weight, weight)


@triton.jit
def _focal(logit, target, beta, SQUARE: tl.constexpr):  # noqa: N803
    """Quality focal loss of logits, and its derivative."""
    entropy, away = bce_with_logits(logit, target)
    probability = sigmoid(logit)
    if SQUARE:
        factor, slope = away * away, 2.0 * away
    else:
        factor, slope = power(tl.abs(away), beta), beta * power(tl.abs(away), beta - 1.0) * sign(away)
    return entropy * factor, away * factor + entropy * slope * (probability * (1.0 - probability))


@triton.jit
def _class_terms(
    level,
    targets,
    settings,
    image,
    cell,
    there,
    label,
    quality,
    first,
    SQUARE: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Class losses (cells, classes), their derivatives, where they lie, and which exist."""
    channel = first + tl.arange(0, CLASSES)
    here = (channel < targets.num_classes)[None, :] & there[:, None]
    at = (image.to(tl.int64) * targets.num_classes + channel[None, :]) * level.cells + cell[:, None]
    logit = tl.load(level.class_logits + at, mask=here, other=0.0).to(tl.float32)
    target = tl.where(channel[None, :] == label[:, None], quality[:, None], 0.0)
    loss, derivative = _focal(logit, target, settings.beta, SQUARE)
    return tl.where(here, loss, 0.0), derivative, at, here


@triton.jit
def _box_terms(level, targets, settings, image, cell, positive, ground_truth):
    """Sides of positives' boxes, their GIoU loss, and its derivatives by the sides."""
    at = level.distances + image.to(tl.int64) * 4 * level.cells + cell
    prior = targets.priors + 4 * (level.start + cell)
    x, y = tl.load(prior, positive, 0.0), tl.load(prior + 1, positive, 0.0)
    left, top = tl.load(at, positive, 0.0).to(tl.float32), tl.load(at + level.cells, positive, 0.0).to(tl.float32)
    at += 2 * level.cells
    right, bottom = tl.load(at, positive, 1.0).to(tl.float32), tl.load(at + level.cells, positive, 1.0).to(tl.float32)
    gt = targets.gt_boxes + 4 * (image * targets.num_gts + ground_truth)
    gt_left, gt_top = tl.load(gt, positive, 0.0), tl.load(gt + 1, positive, 0.0)
    gt_right, gt_bottom = tl.load(gt + 2, positive, 1.0), tl.load(gt + 3, positive, 1.0)
    box = (x - left, y - top, x + right, y + bottom)
    giou, slopes = giou_slopes(box, (gt_left, gt_top, gt_right, gt_bottom), settings.giou_eps)
    return box, 1.0 - giou, slopes


@triton.jit
def sums(
    level,
    targets,
    settings,
    parts,
    SQUARE: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Sum class and box losses, and sides, and count positives and those of quality above 0: (P, 5), of each program.

    The box losses are weighted by the quality, and so are the sides, which the loss is where no quality is above 0.
    """
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    ground_truth, label, quality = _target(level, targets, image, cell, there)
    positive = ground_truth >= 0
    classes = tl.zeros([CELLS], tl.float32)
    for first in range(0, targets.num_classes, CLASSES):
        terms = _class_terms(level, targets, settings, image, cell, there, label, quality, first, SQUARE, CLASSES)
        classes += tl.sum(terms[0], 1)
    out = parts + 5 * (image * tl.num_programs(0) + tl.program_id(0))
    tl.store(out, tl.sum(tl.where(there, classes * _weights(ground_truth, settings), 0.0), 0))
    number = tl.sum(positive.to(tl.float32), 0)
    tl.store(out + 3, number)
    if number > 0:
        box, loss, _ = _box_terms(level, targets, settings, image, cell, positive, ground_truth)
        sides = box[0] * quality + box[1] * quality + box[2] * quality + box[3] * quality
        tl.store(out + 1, tl.sum(tl.where(positive, loss * quality, 0.0), 0))
        tl.store(out + 2, tl.sum(tl.where(positive, sides, 0.0), 0))
        tl.store(out + 4, tl.sum((positive & (quality > 0.0)).to(tl.float32), 0))


@tuned("size", "SQUARE")
@triton.jit
def gradients(
    level,
    targets,
    settings,
    scales,
    to_logits,
    to_distances,
    size,
    SQUARE: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write the gradients of a level's maps, from those of its sums; a sum that has none adds nothing, nor NaN.

    No number depends on another's place: the tile may be any, and is chosen by the size class.
    """
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    ground_truth, label, quality = _target(level, targets, image, cell, there)
    positive = ground_truth >= 0
    to_class, to_box, to_sides = tl.load(scales), tl.load(scales + 1), tl.load(scales + 2)

    _, _, slopes = _box_terms(level, targets, settings, image, cell, positive, ground_truth)
    for side in tl.static_range(4):
        outwards = -1.0 if side < 2 else 1.0
        by_box = tl.where(to_box == 0.0, 0.0, -slopes[side] * (quality * to_box))
        total = by_box + tl.where(to_sides == 0.0, 0.0, quality * to_sides)
        at = (image.to(tl.int64) * 4 + side) * level.cells + cell
        tl.store(to_distances + at, tl.where(positive, total * outwards, 0.0), mask=there)
    weight = _weights(ground_truth, settings) * to_class
    for first in range(0, targets.num_classes, CLASSES):
        terms = _class_terms(level, targets, settings, image, cell, there, label, quality, first, SQUARE, CLASSES)
        tl.store(to_logits + terms[2], terms[1] * weight[:, None], mask=terms[3])
