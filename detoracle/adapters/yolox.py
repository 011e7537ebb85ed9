"""YOLOX: operations of `detoracle.reference.yolox`, and its two IoUs.

The releases up to 0.3.0 are the ``tutorial`` flavour, with the ``official`` way of counting rows in the loss. The
official flavour itself was never released under this name; the fork ``pixeltable-yolox`` is, and has the same module.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detoracle.adapters.genuine import genuine

__all__ = ["assign", "decode", "iou", "iou_loss", "loss"]


def _head_class() -> Any:
    module = genuine("yolox.models.yolo_head")
    return module.YOLOXHead if hasattr(module, "YOLOXHead") else module.YoloxHead


@cache
def _head(classes: int, strides: tuple[int, ...], flavour: str) -> Any:
    """A head; its layers are never run."""
    kind = _head_class()
    installed = "official" if hasattr(kind, "get_geometry_constraint") else "tutorial"
    if flavour not in (installed, ""):
        raise NotImplementedError(f"the installed release is the {installed} flavour")
    return kind(classes, width=1 / 64, strides=list(strides), in_channels=[64] * len(strides))


def decode(*, raw: list[Tensor], strides: Sequence[int]) -> Tensor:
    """``yolox.decode`` by ``YOLOXHead.get_output_and_grid``, level by level."""
    return torch.cat(_outputs(_head(raw[0].shape[1] - 5, tuple(strides), ""), raw, strides)[0], dim=1)


def _outputs(head: Any, raw: list[Tensor], strides: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Decoded predictions and cells of each level; the maps are copied, for the genuine code writes to them."""
    kind = raw[0].type()
    pairs = [
        head.get_output_and_grid(level.clone(), number, stride, kind)
        for number, (level, stride) in enumerate(zip(raw, strides, strict=True))
    ]
    return [output for output, _ in pairs], [grid for _, grid in pairs]


def assign(
    *,
    predictions: Tensor,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    flavour: str = "tutorial",
) -> tuple[Tensor, Tensor]:
    """``yolox.assign`` by ``YOLOXHead.get_assignments``, image by image, with the rows that the flavour counts."""
    head = _head(predictions.shape[2] - 5, (8, 16, 32), flavour)
    cells = (anchor_points / anchor_strides[:, None] - 0.5).round()
    grid = {
        "expanded_strides": anchor_strides[None],
        "x_shifts": cells[None, :, 0],
        "y_shifts": cells[None, :, 1],
        "total_num_anchors": len(anchor_points),
    }
    gt_index = torch.full(predictions.shape[:2], -1, device=predictions.device)
    quality = predictions.new_zeros(predictions.shape[:2])
    for image, valid in enumerate(gt_valid):
        rows = valid.nonzero().flatten()
        if flavour == "official":
            sums = gt_boxes[image, rows].sum(1) + gt_labels[image, rows]
            rows = rows[: int((sums > 0).sum())]
        if not len(rows):
            continue
        given = {
            **grid,
            "batch_idx": image,
            "num_gt": len(rows),
            "gt_bboxes_per_image": gt_boxes[image, rows],
            "gt_classes": gt_labels[image, rows].to(gt_boxes),
            "bboxes_preds_per_image": predictions[image, :, :4],
            "bbox_preds": predictions[..., :4],
            "obj_preds": predictions[..., 4:5],
            "cls_preds": predictions[..., 5:],
            "labels": None,
            "imgs": None,
        }
        taken = inspect.signature(head.get_assignments).parameters
        _, foreground, ious, matched, _ = head.get_assignments(**{n: v for n, v in given.items() if n in taken})
        gt_index[image, foreground] = rows[matched]
        quality[image, foreground] = ious
    return gt_index, quality


def loss(
    *,
    raw: list[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    flavour: str = "tutorial",
    use_l1: bool = False,
) -> dict[str, Tensor]:
    """``yolox.loss`` by ``YOLOXHead.get_losses``."""
    head = _head(raw[0].shape[1] - 5, tuple(strides), flavour)
    head.use_l1 = use_l1
    outputs, grids = _outputs(head, raw, strides)
    undecoded = [level[:, :4].flatten(2).transpose(1, 2) for level in raw] if use_l1 else []
    rows = torch.cat([gt_labels[..., None].to(gt_boxes), gt_boxes], dim=-1)
    labels = rows.new_zeros(*gt_valid.shape, 5)
    for target, row, valid in zip(labels, rows, gt_valid, strict=True):
        target[: int(valid.sum())] = row[valid]  # the genuine code takes the first rows
    total, box, objectness, classification, l1, _ = head.get_losses(
        None,
        [grid[..., 0] for grid in grids],
        [grid[..., 1] for grid in grids],
        [grid.new_full(grid.shape[:2], stride) for grid, stride in zip(grids, strides, strict=True)],
        labels,
        torch.cat(outputs, dim=1),
        undecoded,
        dtype=raw[0].dtype,
    )
    parts = {"box": box, "objectness": objectness, "classification": classification, "l1": l1}
    return {"total": total, **{n: p if isinstance(p, Tensor) else total.new_tensor(p) for n, p in parts.items()}}


def iou(*, boxes_a: Tensor, boxes_b: Tensor, form: str = "cxcywh") -> Tensor:
    """``boxes.iou_yolox`` by ``bboxes_iou``."""
    overlap: Tensor = genuine("yolox.utils").bboxes_iou(boxes_a, boxes_b, form == "xyxy")
    return overlap


def iou_loss(*, predicted: Tensor, target: Tensor, variant: str = "iou") -> Tensor:
    """``boxes.iou_loss_yolox`` by ``IOUloss``; its GIoU is the official one from release 0.2 on."""
    losses = genuine("yolox.models.losses")
    kind = losses.IOUloss if hasattr(losses, "IOUloss") else losses.IouLoss
    if variant == "giou_tutorial":
        raise NotImplementedError("the installed release has the other GIoU")
    module = kind(reduction="none", loss_type=variant)
    loss: Tensor = module(predicted, target)
    return loss
