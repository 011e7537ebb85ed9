"""MaxIoU as two kernels: how `detoracle.implementations.triton.anchor_head` assigns.

Both are one program per image and block of anchors, which walks the ground truths of its image and computes overlaps in
registers. `best_anchors` leaves the largest overlap of each ground truth and the first anchor that has it, by an atomic
minimum of one key: in any order the same. `assign` computes the overlaps again, by the same operations and so to the
same bit, and knows then of each anchor the best ground truth and the last one that claims it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import key_value, keys_of, larger
from detoracle.implementations.triton.boxes import area, overlap_mmdet, shared_area
from detoracle.implementations.triton.matching import cheaper

__all__ = ["Batch", "Rules", "assign", "best_anchors"]

_LEAST_AREA = tl.constexpr(1e-6)


class Batch(NamedTuple):
    """A anchors, and G ground truths and I regions to ignore of each image; boxes are left, top, right, bottom.

    Attributes
    ----------
    anchors : Tensor (A, 4) float32
    inside : Tensor (B, A) bool
        Anchors that take part.
    gt_boxes, gt_valid : Tensor (B, G, 4) float32, (B, G) bool
    regions, region_valid : Tensor (B, I, 4) float32, (B, I) bool
    num_anchors, num_gts, num_regions : int
    """

    anchors: Any
    inside: Any
    gt_boxes: Any
    gt_valid: Any
    regions: Any
    region_valid: Any
    num_anchors: Any
    num_gts: Any
    num_regions: Any


class Rules(NamedTuple):
    """Best overlap from which an anchor is positive; from and below which it is background; of one that claims.

    The last is the share in a region to ignore above which an anchor has no overlaps; infinite without regions.
    """

    positive: Any
    low: Any
    high: Any
    claiming: Any
    share: Any


@triton.jit
def _box(boxes, row, there):
    """Sides of boxes; those that are not there fill the unit square."""
    at = boxes + 4 * row
    left, top = tl.load(at, there, 0.0), tl.load(at + 1, there, 0.0)
    return left, top, tl.load(at + 2, there, 1.0), tl.load(at + 3, there, 1.0)


@triton.jit
def _taking_part(batch, rules, image, anchor, OF_ANCHORS: tl.constexpr):  # noqa: N803
    """Anchors, which of them are inside, and which lie in a region to ignore."""
    there = anchor < batch.num_anchors
    box = _box(batch.anchors, anchor, there)
    inside = tl.load(batch.inside + image.to(tl.int64) * batch.num_anchors + anchor, there, 0) != 0
    most = tl.zeros(anchor.shape, tl.float32)
    for number in range(batch.num_regions):
        row = image * batch.num_regions + number
        if tl.load(batch.region_valid + row) != 0:
            region = _box(batch.regions, row, True)
            whole = area(box) if OF_ANCHORS else area(region)
            most = larger(most, tl.div_rn(shared_area(box, region), larger(whole, _LEAST_AREA)))
    return box, inside, most > rules.share


@triton.jit
def _overlap(gt, box, ignored):
    return tl.where(ignored, -1.0, overlap_mmdet(gt, box, _LEAST_AREA))


@triton.jit
def best_anchors(
    batch,
    rules,
    best,
    OF_ANCHORS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Find the smallest key (B, G) of minus the overlap and an anchor; a NaN is the largest overlap."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    box, inside, ignored = _taking_part(batch, rules, image, anchor, OF_ANCHORS)
    for number in range(batch.num_gts):
        row = image * batch.num_gts + number
        if tl.load(batch.gt_valid + row) != 0:
            overlap = _overlap(_box(batch.gt_boxes, row, True), box, ignored)
            overlap = tl.where(overlap == overlap, overlap, float("inf"))
            tl.atomic_min(best + row, tl.min(keys_of(-overlap, anchor, inside), 0))


@triton.jit
def assign(
    batch,
    rules,
    best,
    gt_index,
    quality,
    CLAIMS: tl.constexpr,  # noqa: N803
    ALL: tl.constexpr,  # noqa: N803
    OF_ANCHORS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Give each anchor to the last ground truth that claims it, or else to the best; write indices and overlaps."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    box, inside, ignored = _taking_part(batch, rules, image, anchor, OF_ANCHORS)
    winner, last = tl.full([ANCHORS], -1, tl.int32), tl.full([ANCHORS], -1, tl.int32)
    lowest = tl.zeros([ANCHORS], tl.float32)  # minus the best overlap
    for number in range(batch.num_gts):
        row = image * batch.num_gts + number
        if tl.load(batch.gt_valid + row) != 0:
            overlap = _overlap(_box(batch.gt_boxes, row, True), box, ignored)
            winner, lowest = cheaper(inside, winner, lowest, number, -overlap)
            if CLAIMS:
                negative, first = key_value(tl.load(best + row))
                most = -negative
                if (most >= rules.claiming) & (most < float("inf")):  # which stands for NaN
                    claimed = (overlap == most) if ALL else (anchor == first)
                    last = tl.where(claimed & inside, number, last)
    highest = -lowest
    background = (highest >= rules.low) & (highest < rules.high)
    chosen = tl.where(highest >= rules.positive, winner, tl.where(background, -1, -2))
    chosen = tl.where(last >= 0, last, tl.where(winner < 0, -1, chosen))  # without ground truths all is background
    chosen = tl.where(inside, chosen, -2)
    positive = chosen >= 0
    gt = _box(batch.gt_boxes, image * batch.num_gts + tl.maximum(chosen, 0), positive)
    at = image.to(tl.int64) * batch.num_anchors + anchor
    there = anchor < batch.num_anchors
    tl.store(gt_index + at, chosen.to(tl.int64), there)
    tl.store(quality + at, tl.where(positive, _overlap(gt, box, ignored), 0.0), there)
