"""What kernels share that match ground truths and anchors: where predictions lie, sums over classes, and claims.

A claim adds 2**32 and the ground truth's number to the anchor's counter: integers add up to the same in any order, the
high half counts who claims, and the low half is the number if one did.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import before, key_value

__all__ = [
    "Terms",
    "apart",
    "cheaper",
    "claimants",
    "dynamic_claims",
    "ground_truth",
    "keep",
    "lay_claims",
    "logits",
    "without",
]

_CLAIM = tl.constexpr(1 << 32)
_NUMBER = tl.constexpr(0xFFFFFFFF)


# -------------------------------------------------------------------------------------------------------- where it lies
@triton.jit
def ground_truth(batch, row):
    """Four numbers of a ground truth's box, or of several."""
    at = batch.gt_boxes + row * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def logits(batch, image, anchor, channel, there, LEVELS: tl.constexpr):  # noqa: N803
    """Class logits at anchors and channels, broadcast, from whichever level they lie in."""
    found = tl.zeros(there.shape, tl.float32)
    for level in tl.static_range(LEVELS):
        here = there & (anchor >= batch.starts[level]) & (anchor < batch.starts[level + 1])
        strides = batch.map_strides[level]
        at = batch.maps[level] + image.to(tl.int64) * strides[0] + channel * strides[1]
        at += (anchor - batch.starts[level]).to(tl.int64) * strides[2]
        found = tl.where(here, tl.load(at, mask=here, other=0.0).to(tl.float32), found)
    return found


# ---------------------------------------------------------------------------------------------------- sums over classes
class Terms(NamedTuple):
    """What "no class at all" costs each candidate, (B, A): all classes but the largest, the largest, and its class."""

    others: Any
    largest: Any
    largest_class: Any


@triton.jit
def apart(costs, channel, others, largest, largest_class):
    """Sums of costs (anchors, channels), the largest kept apart: what takes one off again would cancel with it.

    Takes and gives the sum of all others, the largest, and its channel; a sum is NaN if any cost is.
    """
    top = tl.max(costs, 1)
    place = tl.min(tl.where(costs == top[:, None], channel[None, :], 0x7FFFFFFF), 1)
    rest = tl.sum(tl.where(channel[None, :] == place[:, None], 0.0, costs), 1)
    undefined = tl.max((costs != costs).to(tl.int32), 1) > 0
    others += tl.where(undefined, float("nan"), rest + tl.minimum(top, largest))
    return others, tl.maximum(top, largest), tl.where(top > largest, place, largest_class)


@triton.jit
def keep(terms, at, near, others, largest, largest_class):
    """Write the terms of anchors."""
    tl.store(terms.others + at, others, mask=near)
    tl.store(terms.largest + at, largest, mask=near)
    tl.store(terms.largest_class + at, largest_class, mask=near)


@triton.jit
def without(terms, at, there, label, own):
    """Sums of the terms of anchors over all classes but one, whose own term is given."""
    others, largest = tl.load(terms.others + at, there, 0.0), tl.load(terms.largest + at, there, 0.0)
    own_is_largest = tl.load(terms.largest_class + at, there, 0) == label
    return tl.where(own_is_largest, others, largest + (others - own))


# --------------------------------------------------------------------------------------------------------------- claims
@triton.jit
def dynamic_claims(overlaps, undefined, most):
    """How many anchors a ground truth claims: as many as its `most` largest IoUs add up to, of keys of minus the IoU.

    At least one, and one if any IoU is NaN; none of none.
    """
    negative, _ = key_value(overlaps)
    total = tl.sum(tl.where(before(overlaps, most), -negative, 0.0), 0)
    claims = tl.maximum(tl.minimum(total, most), 1.0).to(tl.int32)
    return tl.where((undefined != 0) & (most > 0), 1, claims)


@triton.jit
def lay_claims(claimed, batch, image, row, anchor, kept):
    """Claim anchors for a ground truth."""
    one = tl.full(anchor.shape, _CLAIM, tl.int64) + (row - image * batch.num_gts)
    tl.atomic_add(claimed + image.to(tl.int64) * batch.num_anchors + anchor, one, mask=kept)


@triton.jit
def claimants(claimed, at, there):
    """How many claim each anchor, and which ground truth does if it is one, else -1."""
    counter = tl.load(claimed + at, mask=there, other=0)
    number = (counter >> 32).to(tl.int32)
    return number, tl.where(number == 1, (counter & _NUMBER).to(tl.int32), -1)


@triton.jit
def cheaper(contested, winner, lowest, ground_truth, cost):
    """Winner and lowest cost so far, after one more ground truth; of equal ones the first wins, and of all a NaN."""
    undefined = (cost != cost) & (lowest == lowest)
    better = contested & ((winner < 0) | (cost < lowest) | undefined)
    return tl.where(better, ground_truth, winner), tl.where(better, cost, lowest)
