"""YOLOX by way of what can matter: costs of few pairs, losses of positives, and a gradient that is written once.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolox`. The assignment is in
`detoracle.implementations.sparse.yolox_matching`. The loss reads objectness of all anchors, but boxes and classes of
those alone that an assignment can need; its gradient to the head's maps is zeros, the objectness and the positives'
channels.

What it trades: it waits for the device some tens of times, for sizes, and so suits a CPU; memory grows with the
candidates and not with the anchors times the ground truths. What differs from the oracle: arguments are not checked,
but for labels; an image with ground truths but no candidate is background (the oracle raises); NaN spoils only what
depends on it. The gradient cannot be differentiated again. Anchor points that are no grid are left to `batched`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import yolox as batched
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse.grid import Grid
from detoracle.implementations.sparse.maps import Listed, flat, listed, read
from detoracle.implementations.sparse.memory import zeros
from detoracle.implementations.sparse.yolox_matching import Predictions, match
from detoracle.reference.assignment import Assignment

__all__ = ["assign", "loss"]


@implements("yolox.assign", name="sparse")
@torch.no_grad()
def assign(
    predictions: Tensor,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
) -> Assignment:
    """SimOTA: which ground truth each anchor is trained towards, and the IoU it has with it.

    Examples
    --------
    >>> points, strides = torch.tensor([[4.0, 4.0], [44.0, 4.0]]), torch.tensor([8.0, 8.0])
    >>> predictions = torch.tensor([[[8.0, 8, 16, 16, 0, 0], [44.0, 4, 16, 16, 0, 0]]])
    >>> gt, one = torch.tensor([[[8.0, 8, 16, 16]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> assign(predictions, points, strides, gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1]]
    """
    grid = Grid.of_points(anchor_points, anchor_strides)
    if grid is None:
        return batched.assign(
            predictions, anchor_points, anchor_strides, gt_boxes, gt_labels, gt_valid, flavour=flavour
        )

    def class_rows(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, anchor = wanted.nonzero(as_tuple=True)
        return image, anchor, predictions[image, anchor, 5:]

    found = Predictions(predictions[..., :4].mT, predictions[..., 4], class_rows, predictions.shape[-1] - 5)
    counted = batched._counted(gt_boxes, gt_labels, gt_valid, flavour)
    return match(found, grid, gt_boxes, gt_labels, counted, flavour)


@implements("yolox.loss", name="sparse")
def loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    use_l1: bool = False,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, objectness, classification, and l1 if asked for.

    Examples
    --------
    >>> gt, one = torch.tensor([[[4.0, 4, 8, 8]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss([torch.zeros(1, 6, 2, 2)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> round(float(parts["objectness"]), 4)
    2.7726
    """
    grid = Grid.of_maps([(level.shape[2], level.shape[3]) for level in raw], strides, like=raw[0])
    assignment = _assign([level.detach() for level in raw], grid, gt_boxes, gt_labels, gt_valid, flavour)
    positive = assignment.positive
    where = listed(positive, grid.lengths)
    image, anchor = flat(where, grid.lengths)
    objectness, rows = _Read.apply(where, *raw)  # type: ignore[no-untyped-call]

    cell, stride = torch.stack(grid.cells(), dim=1)[anchor], grid.points()[2][anchor][:, None]
    ground_truth = assignment.gt_index[image, anchor]
    gt_box = gt_boxes[image, ground_truth]
    class_target = torch.zeros_like(rows[:, 5:])
    class_target.scatter_(1, gt_labels[image, ground_truth].long()[:, None], assignment.quality[image, anchor][:, None])

    predicted = torch.cat([(rows[:, :2] + cell) * stride, rows[:, 2:4].exp() * stride], dim=1)
    parts = {
        "box": 5.0 * batched.iou_loss_yolox(predicted, gt_box).sum(),
        "objectness": F.binary_cross_entropy_with_logits(objectness, positive.to(objectness.dtype), reduction="sum"),
        "classification": F.binary_cross_entropy_with_logits(rows[:, 5:], class_target, reduction="sum"),
    }
    if use_l1:
        in_cells = gt_box / stride
        target = torch.cat([in_cells[:, :2] - cell, torch.log(in_cells[:, 2:] + 1e-8)], dim=1)
        parts["l1"] = (rows[:, :4] - target).abs().sum()
    parts = {name: part / max(len(image), 1) for name, part in parts.items()}
    total = parts["box"] + parts["objectness"] + parts["classification"]
    return {"total": total + parts["l1"] if use_l1 else total, **parts}


@torch.no_grad()
def _assign(
    raw: list[Tensor], grid: Grid, gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, flavour: str
) -> Assignment:
    """Assign from head maps, of which boxes and objectness alone are read whole."""

    def class_rows(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = listed(wanted, grid.lengths)
        return *flat(where, grid.lengths), read([level[:, 5:] for level in raw], where)

    column, row = grid.cells()
    few = torch.cat([level[:, :5].flatten(2) for level in raw], dim=2)
    boxes = torch.cat([few[:, :2] + torch.stack([column, row]), few[:, 2:4].exp()], dim=1).mul_(grid.points()[2])
    predictions = Predictions(boxes, few[:, 4], class_rows, raw[0].shape[1] - 5)
    counted = batched._counted(gt_boxes, gt_labels, gt_valid, flavour)
    return match(predictions, grid, gt_boxes, gt_labels, counted, flavour)


class _Read(torch.autograd.Function):
    """Objectness of all anchors (B, A), and all channels of listed ones (N, 5+C); writes the maps' gradient once."""

    @staticmethod
    def forward(ctx: Any, where: Listed, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """Read."""
        ctx.where, ctx.shapes = where, [level.shape for level in raw]
        return torch.cat([level[:, 4].flatten(1) for level in raw], dim=1), read(raw, where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_objectness: Tensor, to_rows: Tensor) -> tuple[Tensor | None, ...]:
        """Write zeros, the rows, and the objectness, of which the rows have none."""
        lengths = [height * width for _, _, height, width in ctx.shapes]
        gradients = []
        for shape, at, rows, objectness in zip(
            ctx.shapes,
            ctx.where,
            torch.split(to_rows, [len(image) for image, _, _ in ctx.where]),
            torch.split(to_objectness, lengths, dim=1),
            strict=True,
        ):
            gradient = zeros(shape, like=to_rows)
            flat = gradient.flatten(2)
            flat[at] = rows
            flat[:, 4] = objectness
            gradients.append(gradient)
        return None, *gradients
