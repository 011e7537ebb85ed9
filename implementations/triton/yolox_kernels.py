"""SimOTA as three kernels: how `detoracle.implementations.triton.yolox` assigns.

`candidates` is one program per image and block of anchors, and finds the candidates and what "no class at all" costs
them. `claim` is one program per ground truth: it walks the candidates of its image, computes IoU and cost in registers,
and keeps the ten largest IoUs and the ten smallest costs there, as keys in which the lowest anchor breaks ties.
`resolve`, again per block of anchors, takes the claimant if it is one, and else computes the costs of all ground truths
of the image anew, in registers, of the contested anchors alone.

Class logits lie in one map a level, which a kernel takes as tuples of pointers and strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import (
    before,
    binary_entropy,
    key_value,
    keys_of,
    larger,
    nothing,
    sigmoid,
    smaller,
    smallest,
)
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

_LANES = tl.constexpr(16)  # a power of two that holds the ten claims


class Batch(NamedTuple):
    """What all kernels read, of B images, A anchors, G ground truths and C classes.

    Attributes
    ----------
    points, steps : Tensor (A, 2), (A,) float32
        Anchor points and strides in pixels.
    boxes, box_strides : Tensor (B, 4, A) float, and its strides
        cx, cy, w, h in pixels.
    objectness, objectness_strides : Tensor (B, A) float, and its strides
    maps, map_strides : tuple of Tensor (B, C, Al) float, and their strides
        Class logits of each level.
    starts : tuple of int
        First anchor of each level, and A.
    gt_boxes, gt_labels, counted : Tensor (B, G, 4) float32, (B, G) int, (B, G) bool
        Ground truths, and which of them take part.
    num_anchors, num_gts, num_classes : int
    radius, penalty : float
        Half side of the square about a centre in strides, and cost of a pair outside the geometry.
    """

    points: Any
    steps: Any
    boxes: Any
    box_strides: Any
    objectness: Any
    objectness_strides: Any
    maps: Any
    map_strides: Any
    starts: Any
    gt_boxes: Any
    gt_labels: Any
    counted: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any
    radius: Any
    penalty: Any


@triton.jit
def _sureness(batch, image, anchor, there):
    """Probabilities of an object."""
    strides = batch.objectness_strides
    at = batch.objectness + image.to(tl.int64) * strides[0] + anchor.to(tl.int64) * strides[1]
    return sigmoid(tl.load(at, mask=there, other=0.0).to(tl.float32))


@triton.jit
def _inside(batch, anchor, there, gt):
    """Whether anchor points lie strictly in a box, and in the square about its centre."""
    x, y = tl.load(batch.points + 2 * anchor, mask=there), tl.load(batch.points + 2 * anchor + 1, mask=there)
    reach = batch.radius * tl.load(batch.steps + anchor, mask=there)
    half_w, half_h = gt[2] / 2, gt[3] / 2
    in_box = (x > gt[0] - half_w) & (x < gt[0] + half_w) & (y > gt[1] - half_h) & (y < gt[1] + half_h)
    in_square = (x > gt[0] - reach) & (x < gt[0] + reach) & (y > gt[1] - reach) & (y < gt[1] + reach)
    return in_box, in_square


@triton.jit
def _ious(batch, image, anchor, there, gt):
    """IoU of predictions with ground truths; NaN of boxes without area, 0 unless they overlap strictly."""
    strides = batch.box_strides
    at = batch.boxes + image.to(tl.int64) * strides[0] + anchor.to(tl.int64) * strides[2]
    x, y = tl.load(at, there, 0.0).to(tl.float32), tl.load(at + strides[1], there, 0.0).to(tl.float32)
    at += 2 * strides[1]
    w, h = tl.load(at, there, 1.0).to(tl.float32), tl.load(at + strides[1], there, 1.0).to(tl.float32)
    across = smaller(x + w / 2, gt[0] + gt[2] / 2) - larger(x - w / 2, gt[0] - gt[2] / 2)
    down = smaller(y + h / 2, gt[1] + gt[3] / 2) - larger(y - h / 2, gt[1] - gt[3] / 2)
    shared = across * down * ((across > 0.0) & (down > 0.0)).to(tl.float32)
    return tl.div_rn(shared, gt[2] * gt[3] + w * h - shared)


@triton.jit
def _pairs(batch, terms, image, row, anchor, there, OFFICIAL: tl.constexpr, LEVELS: tl.constexpr):  # noqa: N803
    """IoU and cost of a ground truth with anchors, which are candidates."""
    gt = ground_truth(batch, row)
    iou = _ious(batch, image, anchor, there, gt)
    label = tl.load(batch.gt_labels + row).to(tl.int32)
    logit = logits(batch, image, anchor, label, there, LEVELS)
    own_is, own_is_not = binary_entropy(tl.sqrt_rn(sigmoid(logit) * _sureness(batch, image, anchor, there)))
    rest = without(terms, image.to(tl.int64) * batch.num_anchors + anchor, there, label, own_is_not)
    cost = own_is + rest - 3.0 * tl.log(iou + 1e-8)
    in_box, in_square = _inside(batch, anchor, there, gt)
    return iou, tl.where(in_square if OFFICIAL else in_box & in_square, cost, cost + batch.penalty)


@triton.jit
def candidates(
    batch,
    terms,
    candidate,
    OFFICIAL: tl.constexpr,  # noqa: N803
    LEVELS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Find the candidates, and their entropies with "no class at all"."""
    image = tl.program_id(1)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < batch.num_anchors
    near = tl.zeros([ANCHORS], tl.int1)
    for gt in range(batch.num_gts):
        row = image * batch.num_gts + gt
        if tl.load(batch.counted + row) != 0:
            in_box, in_square = _inside(batch, anchor, there, ground_truth(batch, row))
            near = near | (in_square if OFFICIAL else in_box | in_square)
    near = near & there
    at = image.to(tl.int64) * batch.num_anchors + anchor
    tl.store(candidate + at, near, mask=there)
    if tl.max(near.to(tl.int32), 0) > 0:
        sureness = _sureness(batch, image, anchor, near)
        others, largest = tl.zeros([ANCHORS], tl.float32), tl.zeros([ANCHORS], tl.float32)
        largest_class = tl.full([ANCHORS], -1, tl.int32)
        for first in range(0, batch.num_classes, CLASSES):
            channel = first + tl.arange(0, CLASSES)
            read = near[:, None] & (channel < batch.num_classes)[None, :]
            logit = logits(batch, image, anchor[:, None], channel[None, :], read, LEVELS)
            _, entropy = binary_entropy(tl.sqrt_rn(sigmoid(logit) * sureness[:, None]))
            entropy = tl.where(read, entropy, 0.0)
            others, largest, largest_class = apart(entropy, channel, others, largest, largest_class)
        keep(terms, at, near, others, largest, largest_class)


@triton.jit
def claim(
    batch,
    terms,
    listed,
    numbers,
    claimed,
    dynamic_k,
    MOST: tl.constexpr,  # noqa: N803
    OFFICIAL: tl.constexpr,  # noqa: N803
    LEVELS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Let a ground truth claim its cheapest candidates, which an image lists."""
    row = tl.program_id(0)
    image = row // batch.num_gts
    number = tl.load(numbers + image).to(tl.int32)
    start = image.to(tl.int64) * batch.num_anchors
    if (tl.load(batch.counted + row) != 0) & (number > 0):
        overlaps, cheapest = nothing(_LANES), nothing(_LANES)
        undefined = 0
        for first in range(0, number, ANCHORS):
            place = first + tl.arange(0, ANCHORS)
            there = place < number
            anchor = tl.load(listed + start + place, mask=there, other=0)
            iou, cost = _pairs(batch, terms, image, row, anchor, there, OFFICIAL, LEVELS)
            undefined = undefined | tl.max((there & (iou != iou)).to(tl.int32), 0)
            overlaps = smallest(overlaps, keys_of(-iou, anchor, there))
            cheapest = smallest(cheapest, keys_of(cost, anchor, there))
        claims = dynamic_claims(overlaps, undefined, MOST)
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
    OFFICIAL: tl.constexpr,  # noqa: N803
    LEVELS: tl.constexpr,  # noqa: N803
    ANCHORS: tl.constexpr,  # noqa: N803
):
    """Give each anchor to who claims it; if several do, to the cheapest of all, also one that does not claim."""
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
                _, cost = _pairs(batch, terms, image, row, anchor, contested, OFFICIAL, LEVELS)
                winner, lowest = cheaper(contested, winner, lowest, gt, cost)
    assigned = winner >= 0
    gt = ground_truth(batch, image * batch.num_gts + tl.maximum(winner, 0))
    tl.store(gt_index + at, winner.to(tl.int64), mask=there)
    tl.store(quality + at, tl.where(assigned, _ious(batch, image, anchor, assigned, gt), 0.0), mask=there)
