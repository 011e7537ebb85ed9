"""Dynamic soft labels on the pairs that can matter: how `detoracle.implementations.sparse.rtmdet` assigns.

Any candidate may be claimed by any ground truth of its image, but its cost grows tenfold with every stride of distance,
and neither the class cost nor the IoU cost is ever below zero (but for what a logarithm of slightly more than 1 gives):

- the pairs of the largest IoUs are known, for dynamic k needs them; once they have a cost, as many are in hand as a
  ground truth claims, and the dearest of these *bounds* what a claimed pair may cost;
- the bound gives a distance, and so a rectangle of cells in each level; of the candidates in it, those whose IoU cost
  and distance cost exceed the bound are out, and the others need a class cost;
- an anchor that several claim needs the costs of all ground truths of its image.

Bounds are widened by far more than rounding. A bound that is infinite, as where all costs overflow, rules nothing out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.sparse.dynamic_k import Boxes, ClassRows, ClassTable, Matcher, Pairs, Truths, chosen
from detoracle.implementations.sparse.grid import Grid

__all__ = ["RTMDetMatcher", "Settings"]

_ROUNDINGS = 64  # by which a bound is widened: more than a cost suffers
_LEAST_IOU_COST = 1e-6  # by which an IoU cost of weight 1 is below 0 at most: log(1 + 1e-7), generously


class Settings(NamedTuple):
    """How costs are weighted, and how many IoUs add up."""

    topk: int
    soft_center_radius: float
    iou_weight: float


class RTMDetMatcher(Matcher):
    """The stages of one call.

    Parameters
    ----------
    boxes : Tensor (B, A, 4) float
    class_rows : ClassRows
    priors : Tensor (A, 4) float
    grid : Grid
        Of the priors.
    truths : Truths
    centers : Tensor (T, 2) float
    candidate : Tensor (B, A) bool
    settings : Settings
    """

    def __init__(
        self,
        boxes: Tensor,
        class_rows: ClassRows,
        priors: Tensor,
        grid: Grid,
        truths: Truths,
        centers: Tensor,
        candidate: Tensor,
        settings: Settings,
    ) -> None:
        super().__init__(_boxes(truths.box), _boxes(boxes), truths, candidate, settings.topk)
        self.priors, self.grid, self.centers = priors.mT.contiguous(), grid, centers.mT.contiguous()
        self.candidate, self.settings = candidate.contiguous(), settings
        self.table = ClassTable(class_rows, _class_terms, self.predicted.area)

    def match(self) -> tuple[Tensor, Tensor]:
        """Ground truth of each anchor (B, A), and numbers of claims (T,)."""
        dynamic_k, best, filled = self.best()
        seeds = best.where(filled, best[:, :1])
        row = torch.arange(len(seeds), device=seeds.device)[:, None].expand_as(seeds)
        some = filled[:, 0].nonzero()[:, 0]
        self.table.add(self.truths.image[row[some]].flatten(), seeds[some].flatten())
        cost = self.cost(row[some], seeds[some]).masked_fill(~filled[some], torch.inf).sort(1).values
        bound = cost.new_zeros(dynamic_k.shape)
        bound[some] = cost.gather(1, dynamic_k[some, None] - 1)[:, 0].nan_to_num(nan=torch.inf, posinf=torch.inf)
        weight = abs(self.settings.iou_weight)
        bound = bound + _ROUNDINGS * torch.finfo(bound.dtype).eps * (bound.abs() + weight) + _LEAST_IOU_COST * weight
        if self.settings.iou_weight < 0:
            bound = torch.full_like(bound, torch.inf)

        row, anchor = self._near(bound)
        parts = self._parts(row, anchor)
        least = parts.iou_cost + parts.distance_cost
        [within] = (~(least > chosen(bound, row))).nonzero(as_tuple=True)  # a NaN may be claimed too
        row, anchor, parts = (
            chosen(row, within),
            chosen(anchor, within),
            _Parts(*(chosen(part, within) for part in parts)),
        )
        self.table.add(chosen(self.truths.image, row), anchor)
        return self.resolve(Pairs(row, anchor, self._cost(row, anchor, parts)).smallest(dynamic_k)), dynamic_k

    def _near(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs with the candidates at which the distance cost alone is within the bound, and some more, in order."""
        strides = torch.log10(bound.clamp(min=torch.finfo(bound.dtype).tiny)) + self.settings.soft_center_radius
        reach = (strides + strides.abs() / 32 + 1 / 32)[:, None]  # a slack much wider than any rounding
        in_columns = (self.grid.x - self.centers[0, :, None]).abs() <= reach * self.grid.x_strides
        in_rows = (self.grid.y - self.centers[1, :, None]).abs() <= reach * self.grid.y_strides
        all_out = bound[:, None] == torch.inf  # also of ground truths whose centre is no number
        row, anchor, _ = self.grid.inside(in_columns | all_out, in_rows | all_out)
        [kept] = chosen(self.candidate.view(-1), chosen(self._first, row) + anchor).nonzero(as_tuple=True)
        return chosen(row, kept), chosen(anchor, kept)

    def iou_of(self, a: Boxes, b: Boxes) -> Tensor:
        """IoU, of a union no smaller than a millionth."""
        width = torch.minimum(a.right, b.right).sub_(torch.maximum(a.left, b.left)).clamp_(min=0)
        height = torch.minimum(a.bottom, b.bottom).sub_(torch.maximum(a.top, b.top)).clamp_(min=0)
        intersection = width.mul_(height)
        return intersection / torch.add(a.area, b.area, out=height).sub_(intersection).clamp_(min=1e-6)

    def cost(self, row: Tensor, anchor: Tensor) -> Tensor:
        """Cost of classes, IoU and distance."""
        return self._cost(row, anchor, self._parts(row, anchor))

    def _cost(self, row: Tensor, anchor: Tensor, parts: _Parts) -> Tensor:
        own, none = self.table.of(chosen(self.truths.image, row), anchor, chosen(self.truths.label, row))
        others = (none - _background(own)).to(own.dtype)
        class_cost = others + ((1 - parts.iou) * own - F.logsigmoid(own)) * (parts.iou - torch.sigmoid(own)) ** 2
        return class_cost + parts.iou_cost + parts.distance_cost

    def _parts(self, row: Tensor, anchor: Tensor) -> _Parts:
        iou = self.iou(row, anchor)
        (x, y), (to_x, to_y) = self.priors[:2], self.centers
        away_x = chosen(x, anchor).sub_(chosen(to_x, row)).square_()
        away_y = chosen(y, anchor).sub_(chosen(to_y, row)).square_()
        distance = away_x.add_(away_y).sqrt_().div_(chosen(self.priors[2], anchor))
        iou_cost = torch.log(iou + 1e-7).neg_().mul_(self.settings.iou_weight)
        return _Parts(iou, iou_cost, 10.0 ** distance.sub_(self.settings.soft_center_radius))


class _Parts(NamedTuple):
    """IoU, IoU cost and distance cost of pairs."""

    iou: Tensor
    iou_cost: Tensor
    distance_cost: Tensor


def _boxes(boxes: Tensor) -> Boxes:
    """Sides (...) of boxes (..., 4)."""
    left, top, right, bottom = (side.contiguous() for side in boxes.unbind(-1))
    return Boxes(left, top, right, bottom, (right - left) * (bottom - top))


def _background(logits: Tensor) -> Tensor:
    """Quality focal loss of every entry towards 0."""
    return (logits - F.logsigmoid(logits)) * torch.sigmoid(logits) ** 2


def _class_terms(image: Tensor, anchor: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits, _background(logits)
