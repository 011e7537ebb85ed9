"""RTMDet's loss as two kernels, one program per image and block of cells of a level.

`sums` reads every class logit, and boxes of the positives; each program leaves its own sums, which are then added in a
fixed order. `gradients` writes every channel of both maps once. A gradient is computed where it is written, with the
scale that arrives, so that it needs no memory before the backward pass and no second pass over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import area, bce_with_logits, larger, power, sigmoid, smaller
from detoracle.implementations.triton.yolox_loss_kernels import _side, _sign

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
        factor, slope = power(tl.abs(away), beta), beta * power(tl.abs(away), beta - 1.0) * _sign(away)
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
def _at_least(x, least):
    """The larger of both, and its derivative by the first, of which a tie leaves half."""
    return larger(x, least), tl.where(x == least, 0.5, (x > least).to(tl.float32))


@triton.jit
def _giou(a, b, eps):
    """GIoU of boxes (left, top, right, bottom) with ground truths, and its derivatives by the sides of the first."""
    across, by_left, by_right = _side(a[0], a[2], b[0], b[2])
    down, by_top, by_bottom = _side(a[1], a[3], b[1], b[3])
    grows_across, grows_down = (across >= 0.0).to(tl.float32), (down >= 0.0).to(tl.float32)
    across, down = larger(across, 0.0), larger(down, 0.0)
    shared = across * down
    union, of_union = _at_least(area(a) + area(b) - shared, eps)
    width, height = larger(a[2], b[2]) - smaller(a[0], b[0]), larger(a[3], b[3]) - smaller(a[1], b[1])
    wide, high = (width >= 0.0).to(tl.float32), (height >= 0.0).to(tl.float32)
    width, height = larger(width, 0.0), larger(height, 0.0)
    enclosure, of_enclosure = _at_least(width * height, eps)
    iou, filled = tl.div_rn(shared, union), tl.div_rn(union, enclosure)
    giou = iou - tl.div_rn(enclosure - union, enclosure)

    by_union = (tl.div_rn(1.0, enclosure) - tl.div_rn(iou, union)) * of_union
    by_shared = tl.div_rn(1.0, union) - by_union
    by_enclosure = -tl.div_rn(filled, enclosure) * of_enclosure
    by_across, by_down = by_shared * down * grows_across, by_shared * across * grows_down
    by_width, by_height = by_enclosure * height * wide, by_enclosure * width * high
    # An end that does not bound what both share bounds what encloses both: the two derivatives add up to +-1.
    to_left = by_across * by_left - by_union * (a[3] - a[1]) + by_width * (-1.0 - by_left)
    to_right = by_across * by_right + by_union * (a[3] - a[1]) + by_width * (1.0 - by_right)
    to_top = by_down * by_top - by_union * (a[2] - a[0]) + by_height * (-1.0 - by_top)
    to_bottom = by_down * by_bottom + by_union * (a[2] - a[0]) + by_height * (1.0 - by_bottom)
    return giou, (to_left, to_top, to_right, to_bottom)


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
    giou, slopes = _giou(box, (gt_left, gt_top, gt_right, gt_bottom), settings.giou_eps)
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


@triton.jit
def gradients(
    level,
    targets,
    settings,
    scales,
    to_logits,
    to_distances,
    SQUARE: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write the gradients of a level's maps, from those of its sums; a sum that has none adds nothing, nor NaN."""
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
