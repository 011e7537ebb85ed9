"""torchvision: box overlaps, GIoU and focal loss as its documentation defines them.

torchvision has no epsilon where mmdet has one, so that degenerate boxes may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detoracle.adapters.genuine import genuine

__all__ = ["focal_loss", "giou_loss", "jaccard"]


def jaccard(*, boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """``ssd.jaccard`` by ``torchvision.ops.box_iou``."""
    overlap: Tensor = genuine("torchvision.ops").box_iou(boxes_a, boxes_b)
    return overlap


def focal_loss(
    *,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float = 0.25,
    **rest: Any,
) -> Tensor:
    """``anchor_head.sigmoid_focal_loss`` by ``torchvision.ops.sigmoid_focal_loss``."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (labels[:, None] == classes).to(logits)
    per_entry = genuine("torchvision.ops").sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma)
    return _reduced(per_entry if weight is None else per_entry * weight[:, None], **rest)


def giou_loss(
    *, predicted: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **rest: Any
) -> Tensor:
    """``anchor_head.giou_loss`` by ``torchvision.ops.generalized_box_iou_loss``."""
    per_box = genuine("torchvision.ops").generalized_box_iou_loss(predicted, target, eps=eps)
    if weight is not None:
        per_box = per_box * (weight.mean(-1) if weight.ndim > 1 else weight)
    return _reduced(per_box, **rest)


def _reduced(
    terms: Tensor, *, reduction: str = "mean", avg_factor: float | None = None, loss_weight: float = 1.0, **other: Any
) -> Tensor:
    """The operation's reduction: that is mmdet's, and no part of torchvision."""
    if any(other.values()):
        raise NotImplementedError(f"torchvision has no {', '.join(other)}")
    if reduction == "none":
        return terms * loss_weight
    total = terms.sum()
    if reduction == "mean":
        total = total / (terms.numel() if avg_factor is None else avg_factor + torch.finfo(terms.dtype).eps)
    return total * loss_weight
