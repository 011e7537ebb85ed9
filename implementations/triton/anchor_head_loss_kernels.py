"""The anchor head's loss as two kernels, one program per image, anchor of a cell, and block of cells of a level.

`sums` reads every logit and delta, once; each program leaves its own sums, which are then added in a fixed order.
`gradients` reads them again and writes every channel of both maps once. A gradient is computed where it is written,
with the scale that arrives, so that it needs no memory before the backward pass and no second pass over it.

Anchors that are not trained have a weight of 0, by which losses and slopes are multiplied: as published, what is not
finite there is NaN in the sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import at_least, larger, log1p, power, sign, smaller
from detoracle.implementations.triton.boxes import giou_slopes
from detoracle.implementations.triton.launching import tuned

__all__ = ["GIOU", "L1", "SMOOTH_L1", "Level", "Settings", "Targets", "gradients", "sums"]

L1, SMOOTH_L1, GIOU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Level(NamedTuple):
    """Maps of a level, of K anchors a cell, and where they stand among all.

    Attributes
    ----------
    scores, deltas : Tensor (B, K*C, H, W), (B, K*4, H, W) float
        Contiguous.
    cells : int
    start : int
        First anchor; those of a cell follow one another.
    """

    scores: Any
    deltas: Any
    cells: Any
    start: Any


class Targets(NamedTuple):
    """What anchors are trained towards.

    Attributes
    ----------
    anchors : Tensor (A, 4) float32
    gt_index : Tensor (B, A) int64
    gt_boxes, gt_labels : Tensor (B, G, 4) float32, (B, G) int
    num_anchors, num_gts, num_classes : int
    """

    anchors: Any
    gt_index: Any
    gt_boxes: Any
    gt_labels: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any


class Settings(NamedTuple):
    """Those of `anchor_head.loss` of the same names; weight of positives; and the largest logarithm of a decoded side.

    Means and standard deviations are tuples of four.
    """

    gamma: Any
    alpha: Any
    positive: Any
    beta: Any
    eps: Any
    means: Any
    stds: Any
    limit: Any


@triton.jit
def _target(level, targets, image, cell, there):
    """Anchors of cells and their ground truths, -1 for background, -2 for those that are not trained."""
    anchor = level.start + cell * tl.num_programs(1) + tl.program_id(1)
    at = image.to(tl.int64) * targets.num_anchors + anchor
    return anchor, tl.load(targets.gt_index + at, there, -2).to(tl.int32)


@triton.jit
def _row(targets, image, ground_truth):
    """Where ground truths stand among those of all images."""
    return image * targets.num_gts + tl.maximum(ground_truth, 0)


@triton.jit
def _focal(logit, present, settings, SQUARE: tl.constexpr):  # noqa: N803
    """Focal losses of logits whose class is present or not, and their derivatives."""
    against = tl.where(present, -logit, logit)
    small = tl.exp(-tl.abs(against))
    inverse = tl.div_rn(1.0, 1.0 + small)
    error = tl.where(against >= 0.0, inverse, small * inverse)
    right = tl.where(against >= 0.0, small * inverse, inverse)
    entropy = at_least(against, 0.0) + log1p(small)
    factor = error * error if SQUARE else power(error, settings.gamma)
    factor = tl.where(present, settings.alpha, 1.0 - settings.alpha) * factor
    slope = factor * (settings.gamma * right * entropy + error)
    return factor * entropy, tl.where(present, -slope, slope)


@triton.jit
def _class_terms(
    level,
    targets,
    settings,
    image,
    cell,
    there,
    ground_truth,
    first,
    SQUARE: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Weighted class losses (classes, cells), their derivatives, where they lie, and which are there."""
    positive = ground_truth >= 0
    label = tl.load(targets.gt_labels + _row(targets, image, ground_truth), positive, -1).to(tl.int32)
    weight = tl.where(positive, settings.positive, (ground_truth == -1).to(tl.float32))
    column = first + tl.arange(0, CLASSES)
    exists = (column < targets.num_classes)[:, None] & there[None, :]
    map_ = image.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    at = (map_ * targets.num_classes + column[:, None]) * level.cells + cell[None, :]
    logit = tl.load(level.scores + at, exists, 0.0).to(tl.float32)
    loss, slope = _focal(logit, (column[:, None] == label[None, :]) & positive[None, :], settings, SQUARE)
    return loss * weight[None, :], slope * weight[None, :], at, exists


@triton.jit
def _four(pointer, step, there, beyond):
    """Four numbers a step apart, the last two of which are `beyond` where there are none."""
    low = tl.load(pointer, there, 0.0).to(tl.float32), tl.load(pointer + step, there, 0.0).to(tl.float32)
    pointer += 2 * step
    high = tl.load(pointer, there, beyond).to(tl.float32), tl.load(pointer + step, there, beyond).to(tl.float32)
    return low[0], low[1], high[0], high[1]


@triton.jit
def _encoded(anchor, box, settings):
    """Deltas of boxes relative to anchors."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = tl.div_rn((box[2] + box[0]) * 0.5 - (anchor[2] + anchor[0]) * 0.5, width)
    y = tl.div_rn((box[3] + box[1]) * 0.5 - (anchor[3] + anchor[1]) * 0.5, height)
    w, h = tl.log(tl.div_rn(box[2] - box[0], width)), tl.log(tl.div_rn(box[3] - box[1], height))
    x, y = tl.div_rn(x - settings.means[0], settings.stds[0]), tl.div_rn(y - settings.means[1], settings.stds[1])
    w, h = tl.div_rn(w - settings.means[2], settings.stds[2]), tl.div_rn(h - settings.means[3], settings.stds[3])
    return x, y, w, h


@triton.jit
def _half_side(side, delta, limit):
    """Half a decoded side, and its derivative by the logarithm, which is cut off beyond the limit."""
    half = side * tl.exp(smaller(larger(delta, -limit), limit)) * 0.5
    return half, tl.where(tl.abs(delta) <= limit, half, 0.0)


@triton.jit
def _through(slope, by_delta):
    """Slope by a delta, 0 where it is cut off, whatever the slope by what it means."""
    return tl.where(by_delta == 0.0, 0.0, slope * by_delta)


@triton.jit
def _decoded(anchor, delta, settings):
    """Boxes that deltas mean; derivatives of centres and half sides by the deltas."""
    stds, means = settings.stds, settings.means
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (anchor[2] + anchor[0]) * 0.5 + width * (delta[0] * stds[0] + means[0])
    y = (anchor[3] + anchor[1]) * 0.5 + height * (delta[1] * stds[1] + means[1])
    half_w, by_w = _half_side(width, delta[2] * stds[2] + means[2], settings.limit)
    half_h, by_h = _half_side(height, delta[3] * stds[3] + means[3], settings.limit)
    slopes = width * stds[0], height * stds[1], by_w * stds[2], by_h * stds[3]
    return (x - half_w, y - half_h, x + half_w, y + half_h), slopes


@triton.jit
def _distance(predicted, target, beta, LOSS: tl.constexpr):  # noqa: N803
    """L1 loss of a coordinate, or the smooth one, and its derivative."""
    away = predicted - target
    loss, slope = tl.abs(away), sign(away)
    if LOSS == SMOOTH_L1:
        near = loss < beta
        loss = tl.where(near, 0.5 * loss * loss / beta, loss - 0.5 * beta)
        slope = tl.where(away <= -beta, -1.0, tl.where(away >= beta, 1.0, away / beta))
    return loss, slope


@triton.jit
def _box_losses(predicted, target, settings, LOSS: tl.constexpr):  # noqa: N803
    """Losses of boxes or deltas, and their derivatives by the four numbers predicted."""
    if LOSS == GIOU:
        giou, slopes = giou_slopes(predicted, target, settings.eps)
        return 1.0 - giou, (-slopes[0], -slopes[1], -slopes[2], -slopes[3])
    else:
        a, by_a = _distance(predicted[0], target[0], settings.beta, LOSS)
        b, by_b = _distance(predicted[1], target[1], settings.beta, LOSS)
        c, by_c = _distance(predicted[2], target[2], settings.beta, LOSS)
        d, by_d = _distance(predicted[3], target[3], settings.beta, LOSS)
        return a + b + c + d, (by_a, by_b, by_c, by_d)


@triton.jit
def _box_terms(
    level,
    targets,
    settings,
    image,
    cell,
    there,
    number,
    ground_truth,
    LOSS: tl.constexpr,  # noqa: N803
    DECODED: tl.constexpr,  # noqa: N803
):
    """Weighted box losses of cells, their derivatives by the four deltas, and where the first of these lies."""
    positive = ground_truth >= 0
    map_ = image.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    at = map_ * 4 * level.cells + cell
    predicted = _four(level.deltas + at, level.cells, there, 0.0)
    anchor = _four(targets.anchors + 4 * number, 1, there, 1.0)
    target = _four(targets.gt_boxes + 4 * _row(targets, image, ground_truth), 1, positive, 1.0)
    by_delta = predicted
    if DECODED:
        predicted, by_delta = _decoded(anchor, predicted, settings)
    else:
        target = _encoded(anchor, target, settings)
    left, top = tl.where(positive, target[0], 0.0), tl.where(positive, target[1], 0.0)
    right, bottom = tl.where(positive, target[2], 0.0), tl.where(positive, target[3], 0.0)
    loss, slopes = _box_losses(predicted, (left, top, right, bottom), settings, LOSS)
    if DECODED:
        to_x, to_y = (slopes[0] + slopes[2]) * by_delta[0], (slopes[1] + slopes[3]) * by_delta[1]
        to_w, to_h = _through(slopes[2] - slopes[0], by_delta[2]), _through(slopes[3] - slopes[1], by_delta[3])
        slopes = (to_x, to_y, to_w, to_h)
    return loss * positive.to(tl.float32), slopes, at


@triton.jit
def sums(
    level,
    targets,
    settings,
    parts,
    LOSS: tl.constexpr,  # noqa: N803
    DECODED: tl.constexpr,  # noqa: N803
    SQUARE: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Sum class and box losses, (P, 2), of each program."""
    image = tl.program_id(2)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    number, ground_truth = _target(level, targets, image, cell, there)
    classes = tl.zeros([CELLS], tl.float32)
    for first in range(0, targets.num_classes, CLASSES):
        terms = _class_terms(level, targets, settings, image, cell, there, ground_truth, first, SQUARE, CLASSES)
        classes += tl.sum(tl.where(terms[3], terms[0], 0.0), 0)
    box, _, _ = _box_terms(level, targets, settings, image, cell, there, number, ground_truth, LOSS, DECODED)
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    out = parts + 2 * program
    tl.store(out, tl.sum(classes, 0))
    tl.store(out + 1, tl.sum(tl.where(there, box, 0.0), 0))


@tuned("size", "LOSS", "DECODED", "SQUARE")
@triton.jit
def gradients(
    level,
    targets,
    settings,
    scales,
    to_scores,
    to_deltas,
    size,
    LOSS: tl.constexpr,  # noqa: N803
    DECODED: tl.constexpr,  # noqa: N803
    SQUARE: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write the gradients of a level's maps, from those of its two sums.

    No number depends on another's place: the tile may be any, and is chosen by the size class.
    """
    image = tl.program_id(2)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    number, ground_truth = _target(level, targets, image, cell, there)
    to_class, to_box = tl.load(scales), tl.load(scales + 1)
    for first in range(0, targets.num_classes, CLASSES):
        terms = _class_terms(level, targets, settings, image, cell, there, ground_truth, first, SQUARE, CLASSES)
        tl.store(to_scores + terms[2], terms[1] * to_class, terms[3])
    _, slopes, at = _box_terms(level, targets, settings, image, cell, there, number, ground_truth, LOSS, DECODED)
    weight = (ground_truth >= 0).to(tl.float32) * to_box
    for side in tl.static_range(4):
        tl.store(to_deltas + at + side * level.cells, slopes[side] * weight, there)
