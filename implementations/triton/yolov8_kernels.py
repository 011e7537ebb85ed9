"""Task-aligned assignment as four kernels: how `detoracle.implementations.triton.yolov8` assigns.

Only pairs of a ground truth and an anchor inside it have a metric. `decode` is one program per image and block of cells
of a level, and decodes the boxes of anchors inside any ground truth. `claim` is one program per ground truth: on a grid
it walks the rectangle of cells that its box covers, elsewhere all points; it computes CIoU and metric in registers, and
keeps the largest there, as keys in which the lowest anchor breaks ties. What it claims beyond metrics above 0 are the
first anchors with a 0, wherever they lie: these are found among the first of the image by counting. Only claims inside
the box count. `resolve`, one program per image and block of anchors, takes the claimant if it is one, and else the
largest CIoU of all ground truths of the image; it leaves each ground truth's best metric and CIoU, as integers that
order as they do. `scale` makes qualities of the metrics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import (
    before,
    key_value,
    keys_of,
    larger,
    nothing,
    power,
    sigmoid,
    smallest,
)
from detoracle.implementations.triton.boxes import ciou
from detoracle.implementations.triton.matching import cheaper, claimants, ground_truth, lay_claims, logits

__all__ = ["Batch", "Best", "Grid", "claim", "decode", "distribution", "resolve", "scale"]

_MARGIN = tl.constexpr(1e-9)  # a point inside a box is farther than this from every side
_EPS = tl.constexpr(1e-9)


class Batch(NamedTuple):
    """What all kernels read, of B images, A anchors, G ground truths and C classes.

    Attributes
    ----------
    points : Tensor (A, 2) float32
        In pixels.
    boxes, box_strides : Tensor (B, 4, A) float, and its strides
        Left, top, right, bottom in pixels; only those of anchors inside a ground truth need be there.
    maps, map_strides : tuple of Tensor (B, C, Al) float, and their strides
        Class logits of each level, or probabilities.
    starts : tuple of int
        First anchor of each level, and A.
    gt_boxes, gt_labels, counted : Tensor (B, G, 4) float32, (B, G) int, (B, G) bool
        Ground truths, and which of them take part; classes below 0 count from the last.
    num_anchors, num_gts, num_classes : int
    alpha, beta : float
        Exponents of score and CIoU.
    """

    points: Any
    boxes: Any
    box_strides: Any
    maps: Any
    map_strides: Any
    starts: Any
    gt_boxes: Any
    gt_labels: Any
    counted: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any
    alpha: Any
    beta: Any


class Grid(NamedTuple):
    """Pixels a cell, columns and rows of each level, tuples of as many; empty where points are no grid."""

    steps: Any
    widths: Any
    heights: Any


class Best(NamedTuple):
    """Best metric and CIoU of each ground truth's anchors, (B, G) int32 that are floats, and spoilt images, (B,)."""

    metric: Any
    overlap: Any
    spoilt: Any


@triton.jit
def _points(batch, anchor, there):
    return tl.load(batch.points + 2 * anchor, there, 0.0), tl.load(batch.points + 2 * anchor + 1, there, 0.0)


@triton.jit
def inside(x, y, box):
    """Whether points lie strictly in a box."""
    across = (x - box[0] > _MARGIN) & (box[2] - x > _MARGIN)
    return across & (y - box[1] > _MARGIN) & (box[3] - y > _MARGIN)


@triton.jit
def _pairs(batch, image, row, anchor, near, LEVELS: tl.constexpr, LOGITS: tl.constexpr):  # noqa: N803
    """CIoU, not below 0, and metric of a ground truth with anchors inside it; 0 where they are not near."""
    strides = batch.box_strides
    at = batch.boxes + image.to(tl.int64) * strides[0] + anchor.to(tl.int64) * strides[2]
    left, top = tl.load(at, near, 0.0).to(tl.float32), tl.load(at + strides[1], near, 0.0).to(tl.float32)
    at += 2 * strides[1]
    right, bottom = tl.load(at, near, 1.0).to(tl.float32), tl.load(at + strides[1], near, 1.0).to(tl.float32)
    overlap = larger(ciou(ground_truth(batch, row), (left, top, right, bottom)), 0.0)
    label = tl.load(batch.gt_labels + row).to(tl.int32)
    label = tl.where(label < 0, label + batch.num_classes, label)
    score = logits(batch, image, anchor, label, near, LEVELS)
    if LOGITS:
        score = sigmoid(score)
    metric = power(score, batch.alpha) * power(overlap, batch.beta)
    return tl.where(near, overlap, 0.0), tl.where(near, metric, 0.0)


@triton.jit
def distribution(at, step, there, reg_max, BINS: tl.constexpr):  # noqa: N803
    """Distances of which bins of logits are the distribution; and logits, probabilities and log of their sum's scale.

    The bins of a row lie `step` apart. Where there is but one, it is the distance.
    """
    bins = tl.arange(0, BINS)
    read = there[:, None] & (bins < reg_max)[None, :]
    logits = tl.load(at[:, None] + bins[None, :] * step, mask=read, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(read, logits, float("-inf")), 1)
    largest = tl.where(there, largest, 0.0)
    powers = tl.where(read, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.where(there, tl.sum(powers, 1), 1.0)
    probability = tl.div_rn(powers, total[:, None] + tl.zeros_like(powers))
    distance = tl.sum(logits, 1) if BINS == 1 else tl.sum(probability * bins[None, :].to(tl.float32), 1)
    return distance, logits, probability, largest + tl.log(total)


@triton.jit
def decode(
    batch,
    raw,
    step,
    reg_max,
    start,
    cells,
    boxes,
    BINS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Decode boxes of a level's maps, (B, 4, A) in pixels, of anchors inside any ground truth."""
    image = tl.program_id(1)
    cell = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = cell < cells
    x, y = _points(batch, start + cell, there)
    near = tl.zeros([ANCHORS], tl.int1)
    for gt in range(batch.num_gts):
        row = image * batch.num_gts + gt
        if tl.load(batch.counted + row) != 0:
            near = near | inside(x, y, ground_truth(batch, row))
    near = near & there
    if tl.max(near.to(tl.int32), 0) > 0:
        at = raw + image.to(tl.int64) * (4 * reg_max + batch.num_classes) * cells + cell
        out = boxes + image.to(tl.int64) * 4 * batch.num_anchors + start + cell
        for side in tl.static_range(4):
            distance, _, _, _ = distribution(at + side * reg_max * cells, cells, near, reg_max, BINS)
            point = x if side % 2 == 0 else y
            edge = tl.div_rn(point, step) + (distance if side >= 2 else -distance)
            tl.store(out + side * batch.num_anchors, edge * step, mask=near)


@triton.jit
def _bounds(low, high, step, cells):
    """First cell of an axis that may lie between two coordinates, and the first beyond; more rather than fewer."""
    end = cells * 1.0
    slack = 2.0 + end / 64  # points of half precision are off by some cells
    first, last = low / step - slack, high / step + slack
    first = tl.where(first > 0.0, tl.minimum(first, end), 0.0)
    last = tl.where(last > 0.0, tl.minimum(last, end), 0.0)  # NaN is inside nothing
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _zeros(batch, foremost, left, gt, image, LANES: tl.constexpr):  # noqa: N803
    """First anchors of metric 0, as many as are left, and which of the lanes hold one inside the box.

    If any is left, all other metrics are claimed: so many zeros stand among as many anchors as are claimed at most.
    """
    anchor = tl.arange(0, LANES)
    _, claimed = key_value(foremost)
    other = (claimed[None, :] == anchor[:, None]) & before(foremost, LANES)[None, :]
    zero = (anchor < batch.num_anchors) & (tl.sum(other.to(tl.int32), 1) == 0)
    earlier = (anchor[None, :] < anchor[:, None]) & zero[None, :]
    chosen = zero & (tl.sum(earlier.to(tl.int32), 1) < left)
    x, y = _points(batch, anchor, chosen)
    return anchor, chosen & inside(x, y, gt)


@triton.jit
def claim(
    batch,
    grid,
    claimed,
    best,
    most,
    LANES: tl.constexpr,  # noqa: N803
    LEVELS: tl.constexpr,  # noqa: N803
    LOGITS: tl.constexpr,  # noqa: N803
    GRID: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Let a ground truth claim its anchors of largest metric, and remember images of which one is NaN."""
    row = tl.program_id(0)
    image = row // batch.num_gts
    if tl.load(batch.counted + row) != 0:
        gt = ground_truth(batch, row)
        foremost = nothing(LANES)
        undefined = 0
        for level in tl.static_range(LEVELS):
            start = batch.starts[level]
            width, columns = batch.num_anchors, batch.num_anchors
            first_column, first_row, number = 0, 0, batch.num_anchors
            if GRID:
                width = grid.widths[level]
                first_column, last_column = _bounds(gt[0], gt[2], grid.steps[level], width)
                first_row, last_row = _bounds(gt[1], gt[3], grid.steps[level], grid.heights[level])
                columns = tl.maximum(last_column - first_column, 1)
                number = tl.maximum(last_column - first_column, 0) * tl.maximum(last_row - first_row, 0)
            for first in range(0, number, ANCHORS):
                place = first + tl.arange(0, ANCHORS)
                there = place < number
                anchor = start + (first_row + place // columns) * width + first_column + place % columns
                x, y = _points(batch, anchor, there)
                near = there & inside(x, y, gt)
                if tl.max(near.to(tl.int32), 0) > 0:
                    overlap, metric = _pairs(batch, image, row, anchor, near, LEVELS, LOGITS)
                    wrong = (metric != metric) | (overlap != overlap)
                    undefined = undefined | tl.max(wrong.to(tl.int32), 0)
                    value = tl.where(metric == metric, -metric, float("-inf"))  # NaN is the largest
                    foremost = smallest(foremost, keys_of(value, anchor, near & (metric != 0.0)))
        if undefined != 0:
            tl.store(best.spoilt + image, 1)
        _, anchor = key_value(foremost)
        kept = before(foremost, most)
        lay_claims(claimed, batch, image, row, anchor, kept)
        left = most - tl.sum(kept.to(tl.int32), 0)
        if left > 0:
            anchor, kept = _zeros(batch, foremost, left, gt, image, LANES)
            lay_claims(claimed, batch, image, row, anchor, kept)


@triton.jit
def resolve(
    batch,
    claimed,
    best,
    gt_index,
    metrics,
    LEVELS: tl.constexpr,  # noqa: N803
    LOGITS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Give each anchor to who claims it; if several do, to the largest CIoU of all, or the first if there is none."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < batch.num_anchors
    at = image.to(tl.int64) * batch.num_anchors + anchor
    number, winner = claimants(claimed, at, there)
    x, y = _points(batch, anchor, number > 0)
    if tl.max(number, 0) > 1:
        winner = tl.where(number > 1, 0, winner)
        lowest = tl.zeros([ANCHORS], tl.float32)
        for gt in range(batch.num_gts):
            row = image * batch.num_gts + gt
            if tl.load(batch.counted + row) != 0:
                near = (number > 1) & inside(x, y, ground_truth(batch, row))
                overlap, _ = _pairs(batch, image, row, anchor, near, LEVELS, LOGITS)
                winner, lowest = cheaper(near, winner, lowest, gt, -overlap)
    assigned = winner >= 0
    row = image * batch.num_gts + tl.maximum(winner, 0)
    near = assigned & (tl.load(batch.counted + row, mask=assigned, other=0) != 0)
    near = near & inside(x, y, ground_truth(batch, row))
    overlap, metric = _pairs(batch, image, row, anchor, near, LEVELS, LOGITS)
    tl.store(gt_index + at, winner.to(tl.int64), mask=there)
    tl.store(metrics + at, metric, mask=there)
    tl.atomic_max(best.metric + row, metric.to(tl.int32, bitcast=True), mask=near & (metric >= 0.0))
    tl.atomic_max(best.overlap + row, overlap.to(tl.int32, bitcast=True), mask=near & (overlap >= 0.0))


@triton.jit
def scale(batch, best, gt_index, metrics, quality, ANCHORS: tl.constexpr):  # noqa: N803
    """Scale metrics such that each ground truth's best is its best CIoU; one NaN is enough for a whole image."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < batch.num_anchors
    at = image.to(tl.int64) * batch.num_anchors + anchor
    winner = tl.load(gt_index + at, mask=there, other=-1).to(tl.int32)
    row, assigned = image * batch.num_gts + tl.maximum(winner, 0), winner >= 0
    best_metric = tl.load(best.metric + row, mask=assigned, other=0).to(tl.float32, bitcast=True)
    best_overlap = tl.load(best.overlap + row, mask=assigned, other=0).to(tl.float32, bitcast=True)
    scaled = tl.div_rn(tl.load(metrics + at, mask=there, other=0.0) * best_overlap, best_metric + _EPS)
    spoilt = tl.load(best.spoilt + image) != 0
    tl.store(quality + at, tl.where(spoilt, float("nan"), tl.where(assigned, scaled, 0.0)), mask=there)
