"""SimOTA on the pairs that can matter: how `detoracle.implementations.sparse.yolox` assigns.

A ground truth claims at most ten anchors, and prefers those in its *geometry*: any pair outside costs a penalty on top.
Of all the pairs of ground truths and candidates, then, only few need a cost:

- the pairs of the geometry, at most 25 cells a level, which the grid lists;
- where they are fewer than the claims, pairs outside that may be cheap enough. The class cost is never negative, so
  that a pair costs at least its IoU cost and the penalty. The ten best IoUs are known, for dynamic k needs them; once
  these pairs have a cost, some are in hand that the ground truth could claim, and none that must cost more than they do
  can be claimed. Rounding is monotonic and keeps this true to the last bit;
- those of an anchor that several claim with all ground truths of its image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detoracle.implementations.sparse.dynamic_k import Boxes, ClassRows, ClassTable, Matcher, Pairs, Truths, chosen
from detoracle.implementations.sparse.grid import Grid
from detoracle.reference.assignment import BACKGROUND, Assignment
from detoracle.reference.errors import InputError

__all__ = ["Predictions", "match"]

_CENTER_RADIUS = {"tutorial": 2.5, "official": 1.5}  # half side of the square about a centre, in strides
_PENALTY = {"tutorial": 1e5, "official": 1e6}
_MOST_CLAIMS = 10


class Predictions(NamedTuple):
    """What a head predicts, read where it is needed.

    Attributes
    ----------
    boxes : Tensor (B, 4, A) float
        cx, cy, w, h in pixels.
    objectness : Tensor (B, A) float
        Logits.
    class_rows : ClassRows
    num_classes : int
    """

    boxes: Tensor
    objectness: Tensor
    class_rows: ClassRows
    num_classes: int


def match(
    predictions: Predictions, grid: Grid, gt_boxes: Tensor, gt_labels: Tensor, counted: Tensor, flavour: str
) -> Assignment:
    """Assign ground truths, of which those counted (B, G) take part, to anchors.

    Raises
    ------
    InputError
        If the class of one that takes part does not exist.
    """
    image, column = counted.nonzero(as_tuple=True)
    truths = Truths(image, gt_boxes[image, column], gt_labels[image, column].long(), counted.sum(1))
    if bool(((truths.label < 0) | (truths.label >= predictions.num_classes)).any()):
        expected, got = f"0 to {predictions.num_classes - 1}", str(truths.label.tolist())
        raise InputError("gt_labels", expected=expected, got=got, where="yolox.assign")
    gt_index = torch.full_like(predictions.objectness, BACKGROUND, dtype=torch.int64)
    quality, dynamic_k = torch.zeros_like(predictions.objectness), torch.zeros_like(counted, dtype=torch.int64)
    if len(image):
        candidate, *geometry = _candidates(grid, gt_boxes, counted, flavour)
        matcher = _Matcher(predictions, grid, truths, candidate, flavour)
        winner, dynamic_k[image, column] = matcher.match(*grid.inside(*geometry))
        at = (winner >= 0).nonzero(as_tuple=True)
        row = winner[at]
        gt_index[at], quality[at] = column[row], matcher.iou(row, at[1])
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k})


def _candidates(grid: Grid, gt_boxes: Tensor, counted: Tensor, flavour: str) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (B, A), and the geometry of each ground truth that counts: columns (T, ...) and rows (T, ...)."""
    x, y, width, height = gt_boxes[..., None].unbind(2)
    box_x, near_x = _spans(x, width, grid.x, grid.x_strides, flavour)
    box_y, near_y = _spans(y, height, grid.y, grid.y_strides, flavour)
    if flavour == "official":
        return grid.covered(near_x & counted[..., None], near_y), near_x[counted], near_y[counted]
    either_x, either_y = torch.cat([box_x, near_x], 1), torch.cat([box_y, near_y], 1)
    candidate = grid.covered(either_x & counted.repeat(1, 2)[..., None], either_y)
    return candidate, (box_x & near_x)[counted], (box_y & near_y)[counted]


def _spans(centre: Tensor, size: Tensor, at: Tensor, strides: Tensor, flavour: str) -> tuple[Tensor, Tensor]:
    """Along one axis, whether coordinates are inside a box, and inside the square about its centre."""
    reach = _CENTER_RADIUS[flavour] * strides
    in_box = (at > centre - size / 2) & (at < centre + size / 2)
    return in_box, (at > centre - reach) & (at < centre + reach)


def _boxes(boxes: Tensor) -> Boxes:
    """Sides of boxes given by centres and sizes, the first dimension."""
    x, y, width, height = boxes
    # 0 * x is NaN for a centre at infinity, whose IoU is NaN too.
    area = width * height + 0 * x + 0 * y
    return Boxes(x - width / 2, y - height / 2, x + width / 2, y + height / 2, area)


def _iou_cost(iou: Tensor) -> Tensor:
    return 3.0 * -torch.log(iou + 1e-8)


class _Matcher(Matcher):
    def __init__(self, predictions: Predictions, grid: Grid, truths: Truths, candidate: Tensor, flavour: str) -> None:
        super().__init__(
            _boxes(truths.box.mT), _boxes(predictions.boxes.transpose(0, 1)), truths, candidate, _MOST_CLAIMS
        )
        self.flavour, self.penalty = flavour, _PENALTY[flavour]
        self.objectness = predictions.objectness
        self.table = ClassTable(predictions.class_rows, self._class_terms, predictions.objectness)
        self.x, self.y, self.strides = grid.points()
        self.sides = truths.box.mT.contiguous()

    def match(self, row: Tensor, anchor: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """From the geometry, ragged rows of anchors: ground truth of each anchor (B, A), and numbers of claims (T,)."""
        dynamic_k, best, filled = self.best()
        rows, places = (filled & (counts < dynamic_k)[:, None]).nonzero(as_tuple=True)
        self.table.add(chosen(self.truths.image, torch.cat([row, rows])), torch.cat([anchor, best[rows, places]]))
        geometry = Pairs(row, anchor, self._cost_inside(row, anchor))

        cheap = geometry.at((geometry.cost < self.penalty).nonzero()[:, 0]).counts(len(counts))
        short = cheap < dynamic_k
        claimed = geometry.smallest(dynamic_k.masked_fill(short, 0))
        [rows] = short.nonzero(as_tuple=True)
        if len(rows):
            seeds = best[rows].where(filled[rows], best[rows, :1])
            bound = self._bound(rows, seeds, filled[rows], (dynamic_k - cheap)[rows])
            claimed = Pairs.join(claimed, self._beyond(rows, bound, geometry).smallest(dynamic_k))
        return self.resolve(claimed), dynamic_k

    def iou_of(self, a: Boxes, b: Boxes) -> Tensor:
        width = torch.minimum(a.right, b.right).sub_(torch.maximum(a.left, b.left)).clamp_(min=0)
        height = torch.minimum(a.bottom, b.bottom).sub_(torch.maximum(a.top, b.top)).clamp_(min=0)
        intersection = width.mul_(height)
        return intersection / torch.add(a.area, b.area, out=height).sub_(intersection)

    def cost(self, row: Tensor, anchor: Tensor) -> Tensor:
        cost = self._cost_inside(row, anchor)
        return cost.where(self._preferred(row, anchor), cost + self.penalty)

    def _cost_inside(self, row: Tensor, anchor: Tensor) -> Tensor:
        """Cost of pairs in the geometry; those outside cost the penalty more."""
        own, none = self.table.of(chosen(self.truths.image, row), anchor, chosen(self.truths.label, row))
        others = (none + torch.log1p(-own).clamp_(min=-100)).to(own.dtype)
        return others.sub_(own.log().clamp_(min=-100)).add_(_iou_cost(self.iou(row, anchor)))

    def _class_terms(self, image: Tensor, anchor: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, and cross entropies with 0."""
        probability = logits.sigmoid().mul_(self.objectness[image, anchor].sigmoid()[:, None]).sqrt_()
        return probability, torch.log1p(-probability).neg_().clamp_(max=100)

    def _preferred(self, row: Tensor, anchor: Tensor) -> Tensor:
        """Which pairs are in the geometry."""
        x, y, width, height = (chosen(side, row) for side in self.sides)
        strides = chosen(self.strides, anchor)
        box_x, near_x = _spans(x, width, chosen(self.x, anchor), strides, self.flavour)
        box_y, near_y = _spans(y, height, chosen(self.y, anchor), strides, self.flavour)
        return near_x & near_y if self.flavour == "official" else box_x & near_x & box_y & near_y

    def _bound(self, rows: Tensor, seeds: Tensor, filled: Tensor, missing: Tensor) -> Tensor:
        """Cost that no pair outside the geometry may exceed to be claimed, (R, 1), from some such pairs (R, 10)."""
        row = rows[:, None].expand_as(seeds)
        cost = (self._cost_inside(row, seeds) + self.penalty).masked_fill_(
            self._preferred(row, seeds) | ~filled, torch.inf
        )
        return cost.sort(1).values.gather(1, missing[:, None] - 1)

    def _beyond(self, rows: Tensor, bound: Tensor, geometry: Pairs) -> Pairs:
        """Pairs of these ground truths that may be claimed: their geometry, and those within the bound."""
        row, anchor = self.within(rows, bound, lambda iou: _iou_cost(iou).add_(self.penalty))
        outside = (~self._preferred(row, anchor)).nonzero()[:, 0]
        row, anchor = chosen(row, outside), chosen(anchor, outside)
        self.table.add(chosen(self.truths.image, row), anchor)
        inside = geometry.at(torch.isin(geometry.row, rows).nonzero()[:, 0])
        both = Pairs.join(inside, Pairs(row, anchor, self._cost_inside(row, anchor) + self.penalty))
        return both.at((both.row * len(self.x) + both.anchor).argsort())
