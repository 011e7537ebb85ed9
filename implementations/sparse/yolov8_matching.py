"""Task-aligned assignment on the pairs that count: how `detoracle.implementations.sparse.yolov8` assigns.

A pair of a ground truth and an anchor has a metric and an overlap only if the anchor is inside the box; of any other
both are 0. On a grid these pairs are rectangles of cells. Only they are listed, ground truth by ground truth:

- the claims of a ground truth are the largest metrics of its row of the list. What it claims beyond those above 0 are
  the first anchors with a 0, most of them outside the box, where a claim does not count;
- the largest overlap of all ground truths at a contested anchor is that of a listed pair, or 0, by which it goes to
  the first ground truth of the image;
- a metric that is NaN spoils its image, and only those of listed pairs can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from detoracle.implementations.batched import yolov8 as batched
from detoracle.implementations.sparse.grid import Grid
from detoracle.implementations.sparse.ragged import top_columns
from detoracle.reference.assignment import BACKGROUND

__all__ = ["Predictions", "Settings", "Truths", "match"]

_EPS = 1e-9
_CHUNK = 1 << 18  # metrics compared at a time


class Settings(NamedTuple):
    """Claims of a ground truth, and exponents of score and overlap, above 0."""

    topk: int
    alpha: float
    beta: float


class Truths(NamedTuple):
    """Ground truths: boxes (B, G, 4) in pixels, classes (B, G), and which of them take part (B, G)."""

    boxes: Tensor
    labels: Tensor
    counted: Tensor


class Predictions(NamedTuple):
    """What a head predicts, read where it is needed.

    Attributes
    ----------
    boxes : callable
        From a mask (B, A): left, top, right and bottom in pixels, (4, B, A), of the anchors it marks; of others any.
    scores : callable
        From image and class of ground truths, (T,) each, and ground truth and anchor of pairs, (N,) each: probabilities
        (N,).
    num_classes : int
    """

    boxes: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    num_classes: int


def match(predictions: Predictions, grid: Grid, truths: Truths, settings: Settings) -> tuple[Tensor, Tensor]:
    """Ground truth and quality (B, A) of each anchor of a grid in pixels; waits some times, for sizes."""
    (images, _), anchors = truths.counted.shape, sum(grid.lengths)
    left, top, right, bottom = truths.boxes[..., None].unbind(2)
    in_columns = (grid.x - left > _EPS) & (right - grid.x > _EPS) & truths.counted[..., None]
    in_rows = (grid.y - top > _EPS) & (bottom - grid.y > _EPS)
    image, column = truths.counted.nonzero(as_tuple=True)
    row, anchor, counts = grid.inside(in_columns[image, column], in_rows[image, column])
    gt_index = torch.full((images, anchors), BACKGROUND, device=anchor.device)
    quality = truths.boxes.new_zeros(images, anchors)
    if not len(anchor):
        return gt_index, quality

    place = (image * anchors).index_select(0, row) + anchor  # faster than indexing, as below
    boxes = predictions.boxes(grid.covered(in_columns, in_rows)).flatten(1)
    target = truths.boxes[image, column].mT.contiguous()
    predicted, wanted = [side.index_select(0, place) for side in boxes], [side.index_select(0, row) for side in target]
    overlap = batched._iou(batched._sides(wanted), batched._sides(predicted)).clamp_(min=0)
    label = truths.labels[image, column].long().remainder(predictions.num_classes)
    score = predictions.scores(image, label, row, anchor)
    metric = score**settings.alpha * overlap**settings.beta

    claims = _claims(metric, row, anchor, counts, settings.topk)
    owner, orphans = _owners(place, overlap, claims, images * anchors)
    [assigned] = (owner >= 0).nonzero(as_tuple=True)
    pair = owner[assigned]
    of_row, own, own_overlap = row[pair], metric[pair], overlap[pair]
    best, best_overlap = (
        values.new_zeros(len(counts)).scatter_reduce_(0, of_row, values, "amax")[of_row]
        for values in (own, own_overlap)
    )
    gt_index.view(-1)[orphans] = 0
    gt_index.view(-1)[assigned] = column[of_row]
    quality = quality.to(metric.dtype)
    quality.view(-1)[assigned] = own * best_overlap / (best + _EPS)
    quality[image[row[metric.isnan().nonzero()[:, 0]]]] = torch.nan
    return gt_index, quality


def _claims(metric: Tensor, row: Tensor, anchor: Tensor, counts: Tensor, topk: int) -> Tensor:
    """Pairs (N,), as indices into ragged rows of metrics, that are claimed."""
    claims = _largest(metric, counts, topk)
    claims = claims[metric[claims] != 0]
    left = topk - torch.zeros_like(counts).index_add_(0, row[claims], torch.ones_like(claims))
    # A zero is claimed only if fewer zeros of its ground truth come before it, inside or outside, than are left.
    [zeros] = ((metric == 0) & (anchor < 2 * topk)).nonzero(as_tuple=True)
    before = (metric != 0).cumsum(0)
    first = (counts.cumsum(0) - counts)[row[zeros]]
    above = torch.where(first > 0, before[first - 1], 0)  # of the rows above
    return torch.cat([claims, zeros[anchor[zeros] - (before[zeros] - above) < left[row[zeros]]]])


def _largest(metric: Tensor, counts: Tensor, topk: int) -> Tensor:
    """Indices of each row's largest metrics; NaN is the largest.

    Rows of similar length are searched together, as tables of limited size.
    """
    first = counts.cumsum(0) - counts
    length, order = counts.sort(descending=True)
    lengths, start, found = length.tolist(), 0, []
    padded = torch.cat([metric, metric.new_full((1,), -torch.inf)])
    while start < len(lengths) and lengths[start] > 0:
        last = start + max(1, _CHUNK // lengths[start])
        columns, rows = torch.arange(lengths[start], device=metric.device), order[start:last, None]
        index = (first[rows] + columns).masked_fill_(columns >= counts[rows], len(metric))
        table = padded.index_select(0, index.flatten()).view_as(index)
        found.append(index.gather(1, top_columns(table, min(topk, len(columns)))[1]).flatten())
        start = last
    largest = torch.cat(found)
    return largest[largest < len(metric)]


def _owners(place: Tensor, overlap: Tensor, claims: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Pair by which each place is assigned, -1 if by none, and places that several claim without any overlap."""
    owner = torch.full((places,), -1, device=place.device)
    owner[place[claims]] = claims
    contested = torch.zeros_like(owner).index_add_(0, place[claims], torch.ones_like(claims)) > 1
    [rivals] = contested.index_select(0, place).nonzero(as_tuple=True)
    at, overlap = place[rivals], overlap[rivals].nan_to_num(nan=torch.inf)
    largest = overlap.new_zeros(places).scatter_reduce_(0, at, overlap, "amax")
    first = rivals.where(overlap == largest[at], len(place))  # of equal ones the first
    owner.scatter_reduce_(0, at, first, "amin", include_self=False)
    orphan = contested & (largest == 0)
    return owner.masked_fill_(orphan, -1), orphan.nonzero()[:, 0]
