"""Dynamic k, common to YOLOX and RTMDet: how many anchors a ground truth claims, and who gets the contested ones.

Each ground truth claims as many anchors as its largest IoUs with the image's candidates add up to; an anchor that
several claim goes to the ground truth of the smallest cost in the image. Only the IoUs are computed of all pairs, some
ground truths at a time; costs are computed of lists of pairs that can matter. What these are, and what a pair costs,
each system says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from detoracle.implementations.sparse.ragged import ragged_arange, ragged_smallest, top_columns
from detoracle.reference.assignment import BACKGROUND

__all__ = ["Boxes", "ClassRows", "ClassTable", "Matcher", "Pairs", "Truths", "chosen"]

_CHUNK = 1 << 18  # IoUs computed at a time: a few such tensors fit a cache
_COLUMNS = _CHUNK // 4  # costs compared at a time

ClassRows = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From a mask (B, A): image (N,) and anchor (N,) of its anchors in any order, and their class logits (N, C)."""


def chosen(values: Tensor, index: Tensor) -> Tensor:
    """Choose values (N,) by an index of any shape; faster than indexing.

    Examples
    --------
    >>> chosen(torch.tensor([5.0, 6.0]), torch.tensor([[1, 0]])).tolist()
    [[6.0, 5.0]]
    """
    return values.index_select(0, index.reshape(-1)).view(index.shape)


class Boxes(NamedTuple):
    """Sides and areas of boxes, all of one shape."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor
    area: Tensor

    def at(self, index: Tensor | slice | tuple[slice, None]) -> Boxes:
        """Choose boxes."""
        return Boxes(*(field[index] for field in self))

    def take(self, index: Tensor) -> Boxes:
        """Choose boxes by their places in all of them, of any shape; faster than indexing."""
        return Boxes(*(chosen(field.view(-1), index) for field in self))


class Truths(NamedTuple):
    """All ground truths that count, in one list of T: image, box (T, 4), class, and how many an image has (B,)."""

    image: Tensor
    box: Tensor
    label: Tensor
    per_image: Tensor


class Pairs(NamedTuple):
    """Pairs of a ground truth, numbered 0 to T-1, and an anchor of its image; sorted by both."""

    row: Tensor
    anchor: Tensor
    cost: Tensor

    def at(self, index: Tensor) -> Pairs:
        """Choose pairs."""
        return Pairs(*(chosen(field, index) for field in self))

    def counts(self, rows: int) -> Tensor:
        """Pairs of each ground truth."""
        return self.row.new_zeros(rows).index_add_(0, self.row, torch.ones_like(self.row))

    def smallest(self, take: Tensor) -> Pairs:
        """Cheapest pairs of each ground truth; of as cheap ones the first anchor, and NaN is the dearest."""
        return self.at(ragged_smallest(self.cost, self.counts(len(take)), take).nonzero()[:, 0])

    @classmethod
    def join(cls, first: Pairs, second: Pairs) -> Pairs:
        """Put lists together, one behind the other."""
        return cls(*(torch.cat(fields) for fields in zip(first, second, strict=True)))


class ClassTable:
    """Class terms of the anchors that were asked for.

    A ground truth's target differs from "no class at all" in one class. What "none" costs is therefore summed over
    classes once an anchor, in float64, so that one class can be taken off again.

    Parameters
    ----------
    rows : ClassRows
    terms : callable
        From image, anchor and logits (N, C): what is to be kept of each class, and what "none" costs it, both (N, C).
    like : Tensor (B, A) float
    """

    def __init__(self, rows: ClassRows, terms: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], like: Tensor):
        self._rows, self._terms = rows, terms
        self._place = torch.full_like(like, -1, dtype=torch.int64)
        self._kept = self._none = like.new_empty(0)

    def add(self, image: Tensor, anchor: Tensor) -> None:
        """Provide for these anchors."""
        wanted = torch.zeros_like(self._place, dtype=torch.bool)
        wanted.view(-1).index_fill_(0, image * wanted.shape[1] + anchor, True)
        image, anchor, logits = self._rows(wanted.logical_and_(self._place < 0))
        known = len(self._none)
        self._place[image, anchor] = torch.arange(known, known + len(image), device=image.device)
        kept, cost = self._terms(image, anchor, logits)
        none = cost.double().sum(1)
        self._kept = torch.cat([self._kept, kept]) if known else kept
        self._none = torch.cat([self._none, none]) if known else none

    def of(self, image: Tensor, anchor: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """What was kept of a class, and what "none" costs all classes, in float64."""
        place = chosen(self._place.view(-1), image * self._place.shape[1] + anchor)
        return chosen(self._kept.view(-1), place * self._kept.shape[1] + label), chosen(self._none, place)


class Matcher(ABC):
    """The stages of one call, which share predictions, candidates and ground truths.

    Parameters
    ----------
    gt : Boxes (T,)
    predicted : Boxes (B, A)
    truths : Truths
    candidate : Tensor (B, A) bool
    most_claims : int
        Largest IoUs that add up to the number of claims.
    """

    def __init__(self, gt: Boxes, predicted: Boxes, truths: Truths, candidate: Tensor, most_claims: int):
        self.gt, self.truths = gt, truths
        self.predicted = Boxes(*(field.contiguous() for field in predicted))  # viewed as flat
        self._first = truths.image * candidate.shape[1]  # place of each one's image among the anchors of all
        self.most_claims = most_claims
        image, self.anchor = candidate.nonzero(as_tuple=True)
        self._candidates = self.predicted.take(image * candidate.shape[1] + self.anchor)
        self._gts, self._per_image = truths.per_image.tolist(), candidate.sum(1).tolist()

    @abstractmethod
    def iou_of(self, a: Boxes, b: Boxes) -> Tensor:
        """IoU of boxes, broadcast."""

    @abstractmethod
    def cost(self, row: Tensor, anchor: Tensor) -> Tensor:
        """Cost of pairs, of any shape, whose anchors the class table knows."""

    def iou(self, row: Tensor, anchor: Tensor) -> Tensor:
        """IoU of pairs, of any shape."""
        return self.iou_of(self.gt.take(row), self.predicted.take(chosen(self._first, row) + anchor))

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Find the largest IoUs of each ground truth.

        Returns
        -------
        dynamic_k : Tensor (T,) int
            Number of claims: the sum of the IoUs, truncated, at least 1 unless there is no candidate; a NaN makes it 1.
        anchor : Tensor (T, K) int
        filled : Tensor (T, K) bool
            False behind the last, where the image has fewer than K candidates.
        """
        shape = len(self.truths.image), max(self.most_claims, 1)
        best, anchor = self.gt.area.new_zeros(shape), self.anchor.new_zeros(shape)
        filled = torch.zeros_like(best, dtype=torch.bool)
        for rows, candidates in self._chunks(self._gts):
            iou = self.iou_of(self.gt.at((rows, None)), self._candidates.at(candidates))
            most = min(shape[1], iou.shape[1])
            best[rows, :most], columns = top_columns(iou, most)
            anchor[rows, :most] = self.anchor[candidates][columns]
            filled[rows, :most] = True
        claims = best[:, : self.most_claims].sum(1).nan_to_num(nan=1.0).long().clamp(min=1)
        return claims.minimum(filled.sum(1)), anchor, filled

    def _chunks(self, per_image: list[int]) -> Iterator[tuple[slice, slice]]:
        """Some rows of an image, of which it has so many, and the candidates of the same image, as slices of all."""
        last_row = last = 0
        for rows, candidates in zip(per_image, self._per_image, strict=True):
            row, last_row, first, last = last_row, last_row + rows, last, last + candidates
            step = max(1, _CHUNK // max(1, candidates))
            for start in range(row, last_row if candidates else row, step):
                yield slice(start, min(start + step, last_row)), slice(first, last)

    def within(self, rows: Tensor, bound: Tensor, least: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """List pairs of some ground truths whose least cost, a function of the IoU, is not above their bound (R, 1)."""
        found, gt = [], self.gt.at(rows)
        per_image = self.truths.image[rows].bincount(minlength=len(self._per_image)).tolist()
        for chunk, candidates in self._chunks(per_image):
            cost = least(self.iou_of(gt.at((chunk, None)), self._candidates.at(candidates)))
            row, column = (~(cost > bound[chunk])).nonzero(as_tuple=True)  # a NaN may be claimed too
            found.append((rows[chunk][row], self.anchor[candidates][column]))
        row, anchor = (torch.cat(part) for part in zip(*found, strict=True))
        return row, anchor

    def resolve(self, claimed: Pairs) -> Tensor:
        """Ground truth, of T, that gets each anchor (B, A): its only claimant, or the cheapest of the image.

        A NaN is the cheapest here, as it is to `torch.argmin`.
        """
        images, anchors = self.predicted.area.shape
        key = chosen(self._first, claimed.row) + claimed.anchor
        winner = torch.full((images * anchors,), BACKGROUND, device=key.device)
        winner[key] = claimed.row
        claimants = torch.zeros_like(winner).index_add_(0, key, torch.ones_like(key))
        contested = (claimants > 1).nonzero()[:, 0]
        for part in torch.split(contested, max(1, _COLUMNS // max(self._gts))):
            winner[part] = self._cheapest(part.div(anchors, rounding_mode="floor"), part % anchors)
        return winner.view(images, anchors)

    def _cheapest(self, image: Tensor, anchor: Tensor) -> Tensor:
        """Ground truths (N,), of T, that cost least at these anchors; NaN is the least."""
        rivals = chosen(self.truths.per_image, image)
        which, place = ragged_arange(rivals)
        first = self.truths.per_image.cumsum(0) - self.truths.per_image
        row = chosen(first, chosen(image, which)) + place
        cost = self.cost(row, chosen(anchor, which))
        cost = cost.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return row[ragged_smallest(cost, rivals, torch.ones_like(rivals))]
