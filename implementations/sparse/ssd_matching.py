"""SSD's matching by way of the priors that can matter to each ground truth.

A prior takes the ground truth it overlaps most if by the threshold at least, and every ground truth takes the prior
that overlaps it most. So only those pairs matter whose overlap reaches the threshold, or as much as the ground truth is
known to have with some prior. Priors of one shape are grouped into blocks of neighbours. No overlap with a block's
priors exceeds what the extremes of their sides and sizes allow; where that is too little, the block is left out.
Bounds are computed as overlaps are, by the same operations in the same order, and rounding is monotonic: they hold to
the last bit, and ties are all found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.sparse.dynamic_k import Boxes

__all__ = ["Matches", "matches"]

_BLOCK = 32  # priors whose overlaps are bounded together


class Matches(NamedTuple):
    """Matched priors, image by image and in order: image, prior, ground truth, overlap, each (N,)."""

    image: Tensor
    prior: Tensor
    ground_truth: Tensor
    overlap: Tensor


def matches(priors: Tensor, gt_boxes: Tensor, gt_valid: Tensor, threshold: float) -> Matches | None:
    """Match the priors of every image; waits six times, for sizes and to check the boxes.

    Parameters
    ----------
    priors : Tensor (P, 4) float
        cx, cy, w, h in units of the image side.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in units of the image side.
    gt_valid : Tensor (B, G) bool
    threshold : float

    Returns
    -------
    Matches or None
        None if all pairs may matter: a box has no area, or one that is not finite, or the threshold is not positive.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> found = matches(boxes, torch.tensor([[[0.0, 0, 0.5, 0.25]]]), torch.ones(1, 1, dtype=torch.bool), 0.5)
    >>> [field.tolist() for field in found]
    [[0], [0], [0], [0.5]]
    """
    image, column = gt_valid.nonzero(as_tuple=True)
    half = priors[:, 2:] / 2
    prior_boxes = _boxes(torch.cat([priors[:, :2] - half, priors[:, :2] + half], dim=-1))
    truths = _boxes(gt_boxes[image, column])
    if not threshold > 0 or not bool(_regular(prior_boxes) & _regular(truths)):
        return None
    if not len(image):
        return Matches(image, image, image, truths.area)
    members = _blocks(priors)
    row, block = _worth_it(truths, prior_boxes, members, threshold).nonzero(as_tuple=True)
    prior = members[block]
    overlap = _overlap(truths.at(row).at((slice(None), None)), prior_boxes.at(prior))

    start = image * len(priors)  # number of an image's first prior in the batch
    pair, place = (overlap >= threshold).nonzero(as_tuple=True)
    row_of_pair = row[pair]
    where, value = start[row_of_pair] + prior[pair, place], overlap[pair, place]
    most = priors.new_zeros(len(gt_valid) * len(priors)).scatter_reduce_(0, where, value, "amax")
    nobody = torch.full_like(most, len(image), dtype=torch.int64)
    first = nobody.scatter_reduce_(0, where, row_of_pair.where(value == most[where], len(image)), "amin")
    own = start + _best_priors(row, prior, overlap, len(image), len(priors))
    forced = torch.full_like(first, -1).scatter_reduce_(0, own, torch.arange(len(image), device=own.device), "amax")
    matched = forced.where(forced >= 0, first)  # the last of those whose best prior it is, or the first of the best

    [at] = (matched < len(image)).nonzero(as_tuple=True)
    winner = matched[at]
    of_image = at - start[winner]
    return Matches(image[winner], of_image, column[winner], _overlap(truths.at(winner), prior_boxes.at(of_image)))


def _boxes(corners: Tensor) -> Boxes:
    left, top, right, bottom = corners.mT.contiguous()
    return Boxes(left, top, right, bottom, (right - left) * (bottom - top))


def _regular(boxes: Boxes) -> Tensor:
    """Whether all have an area: then overlaps are finite and not negative."""
    wide, high = boxes.right > boxes.left, boxes.bottom > boxes.top
    return (wide & high & (boxes.area > 0) & boxes.area.isfinite()).all()


def _overlap(a: Boxes, b: Boxes) -> Tensor:
    width = torch.minimum(a.right, b.right).sub_(torch.maximum(a.left, b.left)).clamp_(min=0)
    height = torch.minimum(a.bottom, b.bottom).sub_(torch.maximum(a.top, b.top)).clamp_(min=0)
    intersection = width.mul_(height)
    return intersection / torch.add(a.area, b.area, out=height).sub_(intersection)


def _blocks(priors: Tensor) -> Tensor:
    """Priors of each block (K, 32): neighbours of one shape; a block that has fewer repeats its last one."""
    x, y, width, height = priors.unbind(1)
    shape, band = width + 2 * height, (y / height).floor()  # equal sums of unlike shapes only loosen bounds
    order = x.argsort(stable=True)
    for key in (band, shape):
        order = order[key[order].argsort(stable=True)]
    shape, band = shape[order], band[order]
    number = torch.arange(len(order), device=order.device)
    new = torch.ones_like(number, dtype=torch.bool)
    new[1:] = (shape[1:] != shape[:-1]) | (band[1:] != band[:-1])
    place = number - number.where(new, 0).cummax(0).values
    [first] = (place % _BLOCK == 0).nonzero(as_tuple=True)
    last = F.pad(first[1:], (0, 1), value=len(order)) - 1
    return order[torch.minimum(first[:, None] + torch.arange(_BLOCK, device=order.device), last[:, None])]


def _worth_it(truths: Boxes, priors: Boxes, members: Tensor, threshold: float) -> Tensor:
    """Blocks that may matter to each ground truth, (T, K) bool."""
    block = priors.at(members)
    widest, highest = (block.right - block.left).amax(1), (block.bottom - block.top).amax(1)
    left, top, right, bottom, area = (field[:, None] for field in truths)
    width = torch.minimum(right, block.right.amax(1)).sub_(torch.maximum(left, block.left.amin(1)))
    height = torch.minimum(bottom, block.bottom.amax(1)).sub_(torch.maximum(top, block.top.amin(1)))
    intersection = width.minimum(widest).clamp_(min=0).mul_(height.minimum(highest).clamp_(min=0))
    bound = intersection / torch.add(area, block.area.amin(1), out=height).sub_(intersection)
    likely = _overlap(truths.at((slice(None), None)), priors.at(members[bound.argmax(1)])).amax(1)
    return bound >= likely.clamp(max=threshold)[:, None]


def _best_priors(row: Tensor, prior: Tensor, overlap: Tensor, truths: int, priors: int) -> Tensor:
    """Prior that overlaps each ground truth most (T,), the first of several, from overlaps by block (N, 32)."""
    in_block = overlap.amax(1)
    most = in_block.new_zeros(truths).scatter_reduce_(0, row, in_block, "amax")[row]
    first = prior.masked_fill(overlap < most[:, None], priors).amin(1)
    return first.new_full((truths,), priors).scatter_reduce_(0, row, first, "amin")
