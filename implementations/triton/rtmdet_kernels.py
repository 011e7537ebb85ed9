"""Dynamic soft labels as three kernels: how `detoracle.implementations.triton.rtmdet` assigns.

`candidates` is one program per image and block of priors, and finds the candidates and what "no class at all" costs
them. `claim` is one program per ground truth: it walks the candidates of its image, computes IoU and cost in registers,
and keeps the largest IoUs and the smallest costs there, as keys in which the lowest prior breaks ties. No class cost is
below zero: a block of candidates of which none is cheap enough without its classes is not asked for them, and as the
distance cost grows tenfold with every stride, that is most of them. A claim adds 2**32 and the ground truth's number to
the prior's counter; integers add up to the same in any order. `resolve`, again per block of priors, takes the number if
one claimed, and else computes the costs of all ground truths of the image anew, in registers, of the contested alone.

Class logits lie in one map a level, which a kernel takes as tuples of pointers and strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import (
    bce_with_logits,
    before,
    key_value,
    keys_of,
    nothing,
    power_of_ten,
    smallest,
)
from detoracle.implementations.triton.boxes import overlap_mmdet
from detoracle.implementations.triton.matching import (
    apart,
    cheaper,
    claimants,
    dynamic_claims,
    ground_truth,
    keep,
    lay_claims,
    logits,
    without,
)

__all__ = ["Batch", "candidates", "claim", "resolve"]

_IGNORED = tl.constexpr(-2)


class Batch(NamedTuple):
    """What all kernels read, of B images, A priors, G ground truths and C classes.

    Attributes
    ----------
    priors, inside : Tensor (A, 4) float32, (B, A) bool
        x, y and strides in pixels; and which take part.
    boxes, box_strides : Tensor (B, 4, A) float, and its strides
        Left, top, right, bottom in pixels.
    maps, map_strides : tuple of Tensor (B, C, Al) float, and their strides
        Class logits of each level.
    starts : tuple of int
        First prior of each level, and A.
    gt_boxes, gt_labels, counted : Tensor (B, G, 4) float32, (B, G) int, (B, G) bool
        Ground truths, and which of them take part.
    centers : Tensor (B, G, 2) float32
        From where distances are measured.
    num_anchors, num_gts, num_classes : int
    radius, iou_weight : float
        Strides at which the distance cost is 1, and weight of the IoU cost.
    """

    priors: Any
    inside: Any
    boxes: Any
    box_strides: Any
    maps: Any
    map_strides: Any
    starts: Any
    gt_boxes: Any
    gt_labels: Any
    counted: Any
    centers: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any
    radius: Any
    iou_weight: Any


@triton.jit
def _class_cost(logit, iou):
    """Cost of a class whose probability should be the IoU."""
    entropy, away = bce_with_logits(logit, iou)
    return entropy * (away * away)


@triton.jit
def _overlaps(batch, image, anchor, there, gt):
    """IoU of predictions with a ground truth."""
    strides = batch.box_strides
    at = batch.boxes + image.to(tl.int64) * strides[0] + anchor.to(tl.int64) * strides[2]
    left, top = tl.load(at, there, 0.0).to(tl.float32), tl.load(at + strides[1], there, 0.0).to(tl.float32)
    at += 2 * strides[1]
    right, bottom = tl.load(at, there, 0.0).to(tl.float32), tl.load(at + strides[1], there, 0.0).to(tl.float32)
    return overlap_mmdet(gt, (left, top, right, bottom), 1e-6)


@triton.jit
def _position_costs(batch, row, anchor, there, iou):
    """IoU cost and distance cost of a ground truth with priors."""
    prior = batch.priors + 4 * anchor
    x, y, stride = tl.load(prior, there, 0.0), tl.load(prior + 1, there, 0.0), tl.load(prior + 2, there, 1.0)
    x, y = x - tl.load(batch.centers + 2 * row), y - tl.load(batch.centers + 2 * row + 1)
    distance = tl.div_rn(tl.sqrt_rn(x * x + y * y), stride)
    return -tl.log(iou + 1e-7) * batch.iou_weight, power_of_ten(distance - batch.radius)


@triton.jit
def _all_class_costs(batch, terms, image, row, anchor, there, iou, LEVELS: tl.constexpr):  # noqa: N803
    """Class costs of a ground truth with candidates, summed over all classes."""
    label = tl.load(batch.gt_labels + row).to(tl.int32)
    logit = logits(batch, image, anchor, label, there, LEVELS)
    at = image.to(tl.int64) * batch.num_anchors + anchor
    return without(terms, at, there, label, _class_cost(logit, 0.0)) + _class_cost(logit, iou)


@triton.jit
def candidates(
    batch,
    terms,
    candidate,
    LEVELS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Find the candidates, inside any ground truth, and what they cost as "another class"."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < batch.num_anchors
    x, y = tl.load(batch.priors + 4 * anchor, mask=there), tl.load(batch.priors + 4 * anchor + 1, mask=there)
    near = tl.zeros([ANCHORS], tl.int1)
    for gt in range(batch.num_gts):
        row = image * batch.num_gts + gt
        if tl.load(batch.counted + row) != 0:
            left, top, right, bottom = ground_truth(batch, row)
            near = near | ((x > left) & (y > top) & (x < right) & (y < bottom))
    at = image.to(tl.int64) * batch.num_anchors + anchor
    near = near & there & (tl.load(batch.inside + at, mask=there, other=0) != 0)
    tl.store(candidate + at, near, mask=there)
    if tl.max(near.to(tl.int32), 0) > 0:
        others, largest = tl.zeros([ANCHORS], tl.float32), tl.zeros([ANCHORS], tl.float32)
        largest_class = tl.full([ANCHORS], -1, tl.int32)
        for first in range(0, batch.num_classes, CLASSES):
            channel = first + tl.arange(0, CLASSES)
            read = near[:, None] & (channel < batch.num_classes)[None, :]
            logit = logits(batch, image, anchor[:, None], channel[None, :], read, LEVELS)
            costs = tl.where(read, _class_cost(logit, 0.0), 0.0)
            others, largest, largest_class = apart(costs, channel, others, largest, largest_class)
        keep(terms, at, near, others, largest, largest_class)


@triton.jit
def claim(
    batch,
    terms,
    listed,
    numbers,
    claimed,
    dynamic_k,
    most,
    LANES: tl.constexpr,  # noqa: N803
    LEVELS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Let a ground truth claim its cheapest candidates, which an image lists: as many as `most` IoUs add up to."""
    row = tl.program_id(0)
    image = row // batch.num_gts
    number = tl.load(numbers + image).to(tl.int32)
    start = image.to(tl.int64) * batch.num_anchors
    if (tl.load(batch.counted + row) != 0) & (number > 0):
        overlaps, cheapest = nothing(LANES), nothing(LANES)
        undefined = 0
        gt = ground_truth(batch, row)
        for first in range(0, number, ANCHORS):
            place = first + tl.arange(0, ANCHORS)
            there = place < number
            anchor = tl.load(listed + start + place, mask=there, other=0)
            iou = _overlaps(batch, image, anchor, there, gt)
            undefined = undefined | tl.max((there & (iou != iou)).to(tl.int32), 0)
            overlaps = smallest(overlaps, keys_of(-iou, anchor, there))
            iou_cost, distance_cost = _position_costs(batch, row, anchor, there, iou)
            least = tl.min(keys_of(iou_cost + distance_cost, anchor, there), 0)
            if least < tl.max(cheapest, 0):
                classes = _all_class_costs(batch, terms, image, row, anchor, there, iou, LEVELS)
                cheapest = smallest(cheapest, keys_of(classes + iou_cost + distance_cost, anchor, there))
        claims = dynamic_claims(overlaps, undefined, most)
        tl.store(dynamic_k + row, claims.to(tl.int64))
        _, anchor = key_value(cheapest)
        lay_claims(claimed, batch, image, row, anchor, before(cheapest, claims))


@triton.jit
def resolve(
    batch,
    terms,
    claimed,
    gt_index,
    quality,
    LEVELS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Give each prior to who claims it; if several do, to the cheapest of all, also one that does not claim."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < batch.num_anchors
    at = image.to(tl.int64) * batch.num_anchors + anchor
    number, winner = claimants(claimed, at, there)
    if tl.max(number, 0) > 1:
        contested = number > 1
        lowest = tl.zeros([ANCHORS], tl.float32)
        for gt in range(batch.num_gts):
            row = image * batch.num_gts + gt
            if tl.load(batch.counted + row) != 0:
                iou = _overlaps(batch, image, anchor, contested, ground_truth(batch, row))
                iou_cost, distance_cost = _position_costs(batch, row, anchor, contested, iou)
                classes = _all_class_costs(batch, terms, image, row, anchor, contested, iou, LEVELS)
                cost = classes + iou_cost + distance_cost
                winner, lowest = cheaper(contested, winner, lowest, gt, cost)
    assigned = winner >= 0
    gt = ground_truth(batch, image * batch.num_gts + tl.maximum(winner, 0))
    iou = _overlaps(batch, image, anchor, assigned, gt)
    takes_part = tl.load(batch.inside + at, mask=there, other=0) != 0
    tl.store(gt_index + at, tl.where(takes_part, winner, _IGNORED).to(tl.int64), mask=there)
    tl.store(quality + at, tl.where(assigned, iou, 0.0), mask=there)
