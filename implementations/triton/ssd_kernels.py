"""SSD's matching and mining as four kernels: how `detoracle.implementations.triton.ssd` assigns.

`best_priors` is one program per ground truth: it walks the priors, keeps the key of the best one in registers, and
claims that prior by an atomic maximum of the ground truth's number, so that the last one wins in any order. `match`,
per image and block of priors, walks the ground truths of its image, takes the best in registers unless the prior is
claimed, and writes the targets. `entropies` reads the logits, once, and leaves two numbers a prior. `mine`, one
program per image, selects the hardest without sorting them: four passes over the losses as 32-bit integers that order
alike, each of which counts the values of eight more bits, find the last loss that is taken; a fifth takes all above,
and of those that equal it the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import key_value, keys_of
from detoracle.implementations.triton.boxes import area, shared_area

__all__ = ["Matching", "Terms", "best_priors", "entropies", "log_softmax", "match", "mine", "tile"]

_RADIX = tl.constexpr(256)
_LOWEST_ORDER = tl.constexpr(0x80000000)  # added to a signed order, it counts from 0


class Matching(NamedTuple):
    """P priors, and G ground truths of each image.

    Attributes
    ----------
    priors : Tensor (P, 4) float32
        cx, cy, w, h.
    gt_boxes, gt_labels, gt_valid : Tensor (B, G, 4) float32, (B, G) int, (B, G) bool
        Left, top, right, bottom.
    num_priors, num_gts : int
    """

    priors: Any
    gt_boxes: Any
    gt_labels: Any
    gt_valid: Any
    num_priors: Any
    num_gts: Any


class Terms(NamedTuple):
    """What mining reads of each prior, (B, P): largest logit, cross entropy with its class, and that class."""

    largest: Any
    entropy: Any
    class_target: Any


@triton.jit
def _prior(given, prior, there):
    """Centre and size of priors; those that are not there fill the unit square."""
    at = given.priors + 4 * prior
    x, y = tl.load(at, there, 0.5), tl.load(at + 1, there, 0.5)
    return x, y, tl.load(at + 2, there, 1.0), tl.load(at + 3, there, 1.0)


@triton.jit
def _ground_truth(given, row):
    """Corners of ground truths."""
    at = given.gt_boxes + 4 * row
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _overlap(gt, prior):
    """IoU of ground truths with priors, NaN if neither has an area."""
    half_w, half_h = prior[2] / 2, prior[3] / 2
    corners = prior[0] - half_w, prior[1] - half_h, prior[0] + half_w, prior[1] + half_h
    shared = shared_area(gt, corners)
    return tl.div_rn(shared, area(gt) + area(corners) - shared)


@triton.jit
def best_priors(given, claimed, PRIORS: tl.constexpr):  # noqa: N803
    """Let a ground truth claim the prior that it overlaps most; a NaN is most, and the first of equals the best."""
    row = tl.program_id(0)
    if tl.load(given.gt_valid + row) != 0:
        gt = _ground_truth(given, row)
        best = tl.full([PRIORS], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for first in range(0, given.num_priors, PRIORS):
            prior = first + tl.arange(0, PRIORS)
            there = prior < given.num_priors
            overlap = _overlap(gt, _prior(given, prior, there))
            overlap = tl.where(overlap == overlap, overlap, float("inf"))
            best = tl.minimum(best, keys_of(-overlap, prior, there))
        _, prior = key_value(tl.min(best, 0))
        image = row // given.num_gts
        at = image.to(tl.int64) * given.num_priors + prior
        tl.atomic_max(claimed + at, row - image * given.num_gts)


@triton.jit
def match(
    given,
    claimed,
    gt_index,
    quality,
    class_target,
    loc_target,
    threshold,
    of_centre,
    of_size,
    PRIORS: tl.constexpr,  # noqa: N803
):
    """Give each prior to who claims it last, or else to whom it overlaps most, if by the threshold; write targets."""
    image = tl.program_id(1)
    prior = tl.program_id(0) * PRIORS + tl.arange(0, PRIORS)
    there = prior < given.num_priors
    box = _prior(given, prior, there)
    winner, most = tl.full([PRIORS], -1, tl.int32), tl.zeros([PRIORS], tl.float32)
    for number in range(given.num_gts):
        row = image * given.num_gts + number
        if tl.load(given.gt_valid + row) != 0:
            overlap = _overlap(_ground_truth(given, row), box)
            undefined = (overlap != overlap) & (most == most)  # the first NaN wins
            better = (winner < 0) | (overlap > most) | undefined
            winner = tl.where(better, number, winner)
            most = tl.where(better, overlap, most)
    at = image.to(tl.int64) * given.num_priors + prior
    claim = tl.load(claimed + at, there, -1)
    winner = tl.where(claim >= 0, claim, tl.where(most < threshold, -1, winner))

    matched = there & (winner >= 0)
    row = image * given.num_gts + tl.maximum(winner, 0)
    label = tl.load(given.gt_labels + row, matched, -1).to(tl.int64)
    positive = label >= 0
    gt = given.gt_boxes + 4 * row
    left, top = tl.load(gt, positive, 0.0), tl.load(gt + 1, positive, 0.0)
    right, bottom = tl.load(gt + 2, positive, 1.0), tl.load(gt + 3, positive, 1.0)
    overlap = _overlap((left, top, right, bottom), box)
    tl.store(gt_index + at, tl.where(positive, winner, -1).to(tl.int64), there)
    tl.store(class_target + at, label + 1, there)
    tl.store(quality + at, tl.where(positive, overlap, 0.0), there)
    x = tl.div_rn((left + right) / 2 - box[0], of_centre * box[2])
    y = tl.div_rn((top + bottom) / 2 - box[1], of_centre * box[3])
    width = tl.div_rn(tl.log(tl.div_rn(right - left, box[2])), of_size)
    height = tl.div_rn(tl.log(tl.div_rn(bottom - top, box[3])), of_size)
    out = loc_target + 4 * at
    tl.store(out, tl.where(positive, x, 0.0), there)
    tl.store(out + 1, tl.where(positive, y, 0.0), there)
    tl.store(out + 2, tl.where(positive, width, 0.0), there)
    tl.store(out + 3, tl.where(positive, height, 0.0), there)


@triton.jit
def tile(conf, row, there, first, classes, CLASSES: tl.constexpr):  # noqa: N803
    """Some logits of rows in float32, -inf where there are none; where they lie, and their classes."""
    label = first + tl.arange(0, CLASSES)
    at = row.to(tl.int64)[:, None] * classes + label[None, :]
    exists = there[:, None] & (label < classes)[None, :]
    return tl.load(conf + at, exists, float("-inf")).to(tl.float32), at, label


@triton.jit
def log_softmax(conf, row, there, classes, ROWS: tl.constexpr, CLASSES: tl.constexpr):  # noqa: N803
    """Largest logit of each row (NaN if any is), and the logarithm of the sum of exponentials beyond it."""
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, classes, CLASSES):
        logit, _, _ = tile(conf, row, there, first, classes, CLASSES)
        largest = tl.maximum(largest, tl.max(logit, 1))
    finite = tl.where(largest == float("-inf"), 0.0, largest)  # no NaN of -inf less -inf
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, classes, CLASSES):
        logit, _, _ = tile(conf, row, there, first, classes, CLASSES)
        total += tl.sum(tl.exp(logit - finite[:, None]), 1)
    return tl.where(total == total, largest, float("nan")), tl.log(tl.where(there, total, 1.0))


@triton.jit
def entropies(
    conf,
    terms,
    rows,
    classes,
    ROWS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write each prior's largest logit, and its cross entropy with its class, (B, P)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    top, rest = log_softmax(conf, row, there, classes, ROWS, CLASSES)
    own = tl.load(terms.class_target + row, there, 0)
    own_logit = tl.load(conf + row.to(tl.int64) * classes + own, there, 0.0).to(tl.float32)
    tl.store(terms.largest + row, top, there)
    tl.store(terms.entropy + row, rest + (top - own_logit), there)


@triton.jit
def _ranked(terms, highest, lowest, at, there):
    """Losses by which priors are ranked, 0 for positives, and integers from 0 that order alike; NaN is the highest.

    The logarithm is of exponentials of logits less the highest of the batch: -inf where a row lies too low.
    """
    below = tl.load(terms.largest + at, there, 0.0) - highest
    loss = tl.load(terms.entropy + at, there, 0.0)
    loss = tl.where(below < lowest, loss - float("inf"), loss) + 0.0 * highest  # all are NaN unless that is finite
    loss = tl.where(tl.load(terms.class_target + at, there, 1) > 0, 0.0, loss)
    order = keys_of(loss, at, there) >> 32
    return loss, order + _LOWEST_ORDER


@triton.jit
def mine(
    terms,
    highest,
    negative,
    mining_loss,
    lowest,
    neg_pos,
    priors,
    PRIORS: tl.constexpr,  # noqa: N803
):
    """Mark the hardest of an image, as many as its positives allow, and write their losses."""
    start = tl.program_id(0).to(tl.int64) * priors
    most = tl.load(highest)
    lanes = tl.arange(0, PRIORS)
    positives = tl.zeros([PRIORS], tl.int64)
    for first in range(0, priors, PRIORS):
        there = first + lanes < priors
        positives += (tl.load(terms.class_target + start + first + lanes, there, 0) > 0).to(tl.int64)
    left = tl.minimum(tl.sum(positives, 0) * neg_pos, priors - 1)  # to be found among those that begin like the last
    found = left * 0  # the bits of the last one taken
    digits = tl.arange(0, _RADIX)
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros([_RADIX], tl.int32)
        for first in range(0, priors, PRIORS):
            there = first + lanes < priors
            _, order = _ranked(terms, most, lowest, start + first + lanes, there)
            alike = there & ((order >> (shift + 8)) == found)
            counts += tl.histogram(((order >> shift) & 0xFF).to(tl.int32), _RADIX, mask=alike)
        reached = tl.cumsum(counts, 0, reverse=True)  # how many have this digit or a higher one
        last = tl.max(tl.where(reached >= tl.maximum(left, 1), digits, 0), 0)
        left -= tl.sum(tl.where(digits > last, counts, 0), 0)
        found = (found << 8) | last
    taken = left * 0  # of those that equal the last
    for first in range(0, priors, PRIORS):
        at = start + first + lanes
        there = first + lanes < priors
        loss, order = _ranked(terms, most, lowest, at, there)
        tied = there & (order == found)
        place = taken + tl.cumsum(tied.to(tl.int32), 0)
        hard = there & ((order > found) | (tied & (place <= left)))
        taken += tl.sum(tied.to(tl.int64), 0)
        tl.store(negative + at, hard, there)
        tl.store(mining_loss + at, tl.where(hard, loss, 0.0), there)
