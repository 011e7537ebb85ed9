"""MaxIoU of one image in pieces: how `detoracle.implementations.sparse.anchor_head` assigns.

Only ground truths that meet the rectangle about a piece are compared with its anchors. Thresholds need the best overlap
of each anchor, and which ground truth it is with of the few positives alone. A ground truth claims the anchors whose
overlap equals its best one: they are in runs whose best equals it. What is needed of these pairs is computed again,
by the same operations, and so to the same bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.sparse.dynamic_k import Boxes
from detoracle.reference.assignment import BACKGROUND, IGNORED

__all__ = ["Overlaps", "Pieces", "Rules", "boxes_of"]

_CHUNK = 1 << 17  # overlaps computed at a time: a few such tensors fit a cache
_RUN = 128  # anchors among which a ground truth's best overlap is found again
_LEAST_UNION = 1e-6


class Rules(NamedTuple):
    """Best overlap from which an anchor is positive; from and below which it is background; of one that claims."""

    positive: float
    low: float
    high: float
    claiming: float
    claims_all: bool
    claims: bool


def boxes_of(corners: Tensor) -> Boxes:
    """Sides and areas (N,) of boxes (N, 4).

    Examples
    --------
    >>> boxes_of(torch.tensor([[0.0, 1, 2, 5]])).area.tolist()
    [8.0]
    """
    left, top, right, bottom = corners.mT.contiguous()
    return Boxes(left, top, right, bottom, (right - left) * (bottom - top))


def _iou(a: Boxes, b: Boxes) -> Tensor:
    """IoU of boxes, broadcast."""
    width = torch.minimum(a.right, b.right).sub_(torch.maximum(a.left, b.left)).clamp_(min=0)
    height = torch.minimum(a.bottom, b.bottom).sub_(torch.maximum(a.top, b.top)).clamp_(min=0)
    intersection = width.mul_(height)
    return intersection / torch.add(a.area, b.area, out=height).sub_(intersection).clamp_(min=_LEAST_UNION)


class Pieces(NamedTuple):
    """Anchors in pieces of one length, the last of which may be shorter.

    Attributes
    ----------
    anchors : Boxes (A,)
    length : int
    left, top, right, bottom : Tensor (P, 1) float
        Of the rectangle about each piece.
    finite : Tensor (P, 1) bool
        Whether all areas are.
    """

    anchors: Boxes
    length: int
    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor
    finite: Tensor

    @classmethod
    def of(cls, anchors: Boxes, rows: int) -> Pieces:
        """Pieces of anchors that are to be compared with so many ground truths."""
        runs = max(1, 2 * _CHUNK // (_RUN * max(1, rows)))  # as about half of the ground truths are near
        length = runs * _RUN
        left, top, right, bottom, area = (_folded(side, length) for side in anchors)
        return cls(
            anchors,
            length,
            left.amin(1, keepdim=True),
            top.amin(1, keepdim=True),
            right.amax(1, keepdim=True),
            bottom.amax(1, keepdim=True),
            area.isfinite().all(1, keepdim=True),
        )

    def near(self, truths: Boxes) -> Tensor:
        """Ground truths (T,) that may overlap some anchor of a piece, a mask (P, T); of others all overlaps are 0."""
        apart = (truths.right <= self.left) | (truths.left >= self.right)
        apart |= (truths.bottom <= self.top) | (truths.top >= self.bottom)
        return ~(apart & self.finite & truths.area.isfinite())  # where an area overflows, an overlap may be no number


def _folded(values: Tensor, length: int) -> Tensor:
    """Values (N,) as rows (P, L), of which the last is filled up with the last value."""
    missing = -len(values) % length
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, length)


class Overlaps:
    """Overlaps of an image's ground truths with all anchors, never all at once.

    Parameters
    ----------
    truths : Boxes (T,)
        At least one.
    pieces : Pieces
        Of the anchors.
    inside : Tensor (A,) bool
        Anchors that take part; others have overlaps of minus infinity.
    ignored : Tensor (A,) bool
        Anchors whose overlaps are -1.

    Examples
    --------
    >>> boxes, mask = boxes_of(torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8]])), torch.tensor([True, True])
    >>> overlaps = Overlaps(boxes, Pieces.of(boxes, 2), mask, ~mask)
    >>> overlaps.assigned(Rules(0.5, 0.0, 0.4, 0.0, claims_all=True, claims=False)).tolist()
    [0, 1]
    """

    def __init__(self, truths: Boxes, pieces: Pieces, inside: Tensor, ignored: Tensor) -> None:
        self.truths, self.pieces, self.anchors, self.inside = truths, pieces, pieces.anchors, inside
        self.kept = inside & ~ignored
        self.all_kept = bool(self.kept.all())
        self.instead = torch.zeros_like(self.anchors.area)
        if not self.all_kept:
            self.instead.masked_fill_(ignored, -1.0).masked_fill_(~inside, -torch.inf)

    def of(self, row: Tensor | slice | tuple[slice, None], anchor: Tensor | slice) -> Tensor:
        """Overlaps of ground truths and anchors, broadcast."""
        overlaps = _iou(self.truths.at(row), self.anchors.at(anchor))
        return overlaps if self.all_kept else overlaps.where(self.kept[anchor], self.instead[anchor])

    def assigned(self, rules: Rules) -> Tensor:
        """Ground truth, of T, of each anchor (A,), or what else it is; waits four times."""
        best, of_runs = self._best()
        chosen = torch.where((best >= rules.low) & (best < rules.high), BACKGROUND, IGNORED)
        [high] = (best >= rules.positive).nonzero(as_tuple=True)
        for some in torch.split(high, max(1, _CHUNK // len(of_runs))):
            chosen[some] = self.of((slice(None), None), some).max(0).indices
        if rules.claims:
            row, anchor = self._claims(of_runs, rules)
            last = torch.full_like(chosen, BACKGROUND).scatter_reduce_(0, anchor, row, "amax")
            chosen = last.where(last >= 0, chosen)
        return chosen.where(self.inside, IGNORED)

    def _best(self) -> tuple[Tensor, Tensor]:
        """Best overlaps of anchors (A,), and of ground truths in each run (T, R)."""
        near, length = self.pieces.near(self.truths), self.pieces.length
        of_anchors = self.instead.clone()
        of_truths = _folded(self.instead, _RUN).amax(1).repeat(near.shape[1], 1)
        rows = torch.split(near.nonzero()[:, 1], near.sum(1).tolist())
        for number, row in enumerate(rows):
            if len(row):
                part = slice(number * length, (number + 1) * length)
                overlaps = self.of(row[:, None], part)
                of_anchors[part] = torch.maximum(of_anchors[part], overlaps.amax(0))
                runs = F.pad(overlaps, (0, -overlaps.shape[1] % _RUN), value=-torch.inf).view(len(row), -1, _RUN)
                first = number * length // _RUN
                of_truths[row, first : first + runs.shape[1]] = runs.amax(2)
        return of_anchors, of_truths

    def _claims(self, of_runs: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
        """Pairs (N,) of a ground truth and an anchor that it overlaps most."""
        most = of_runs.amax(1, keepdim=True)
        row, run = ((of_runs == most) & (most >= rules.claiming)).nonzero(as_tuple=True)
        within = torch.arange(_RUN, device=row.device)
        found = [torch.zeros(0, _RUN, dtype=torch.bool, device=row.device)]
        for rows, runs in zip(*(torch.split(index, _CHUNK // _RUN) for index in (row, run)), strict=True):
            anchor = runs[:, None] * _RUN + within
            present = anchor < len(self.inside)
            anchor = anchor.clamp(max=len(self.inside) - 1)
            found.append((self.of(rows[:, None], anchor) == most[rows]) & present & self.inside[anchor])
        pair, place = torch.cat(found).nonzero(as_tuple=True)
        row, anchor = row[pair], run[pair] * _RUN + place
        if not rules.claims_all:
            first = torch.full_like(most[:, 0], len(self.inside), dtype=torch.int64)
            first.scatter_reduce_(0, row, anchor, "amin")
            [row] = (first < len(self.inside)).nonzero(as_tuple=True)
            anchor = first[row]
        return row, anchor
