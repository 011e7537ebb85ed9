"""SSD's loss as two kernels, one program per block of priors of the whole batch.

`sums` adds the smooth L1 losses of positives and the cross entropies of all that are trained, which mining has left
behind, so that the logits are not read again; each program leaves its own sums, which are then added in a fixed order.
`gradients` writes every offset and logit once: zero, but for the priors that are trained, whose logits alone it reads.
A gradient is computed where it is written, with the scale that arrives, so that it needs no memory before the backward
pass and no second pass over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.ssd_kernels import log_softmax, tile

__all__ = ["Targets", "gradients", "sums"]


class Targets(NamedTuple):
    """What priors are trained towards, (B, P, 4) and (B, P).

    Attributes
    ----------
    loc_target : Tensor (B, P, 4) float32
    class_target : Tensor (B, P) int64
        Positive for positives.
    negative : Tensor (B, P) bool
        Hardest priors, positives among them included.
    """

    loc_target: Any
    class_target: Any
    negative: Any


@triton.jit
def _distances(loc, targets, row, positive):
    """Where offsets (rows, 4) lie, and how far from their targets they are."""
    at = row.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    offset = tl.load(loc + at, positive[:, None], 0.0).to(tl.float32)
    return at, offset - tl.load(targets.loc_target + at, positive[:, None], 0.0)


@triton.jit
def _target(targets, row, there):
    """Class of priors, and whether they are positive, and trained at all."""
    label = tl.load(targets.class_target + row, there, 0)
    positive = label > 0
    return label, positive, positive | (tl.load(targets.negative + row, there, 0) != 0)


@triton.jit
def sums(loc, targets, entropy, parts, rows, ROWS: tl.constexpr):  # noqa: N803
    """Sum smooth L1 and cross entropies, and count positives, (N, 3), of each program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    _, positive, trained = _target(targets, row, there)
    _, distance = _distances(loc, targets, row, positive)
    far = tl.abs(distance)
    smooth = tl.where(far < 1.0, 0.5 * far * far, far - 0.5)
    out = parts + 3 * tl.program_id(0)
    tl.store(out, tl.sum(tl.sum(smooth, 1), 0))
    tl.store(out + 1, tl.sum(tl.load(entropy + row, trained, 0.0), 0))
    tl.store(out + 2, tl.sum(positive.to(tl.float32), 0))


@triton.jit
def gradients(
    loc,
    conf,
    targets,
    scales,
    to_loc,
    to_conf,
    rows,
    classes,
    ROWS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write the gradients of offsets and logits, from those of the two sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    label, positive, trained = _target(targets, row, there)
    at, distance = _distances(loc, targets, row, positive)
    slope = tl.where(distance < -1.0, -1.0, tl.where(distance > 1.0, 1.0, distance))
    tl.store(to_loc + at, tl.where(positive[:, None], slope * tl.load(scales), 0.0), there[:, None])

    scale = tl.load(scales + 1)
    largest, logarithm = log_softmax(conf, row, trained, classes, ROWS, CLASSES)
    for first in range(0, classes, CLASSES):
        logit, out, column = tile(conf, row, trained, first, classes, CLASSES)
        probability = tl.exp((logit - largest[:, None]) - logarithm[:, None])
        total = (probability - (column[None, :] == label[:, None]).to(tl.float32)) * scale
        exists = there[:, None] & (column < classes)[None, :]
        tl.store(to_conf + out, tl.where(trained[:, None], total, 0.0), exists)
