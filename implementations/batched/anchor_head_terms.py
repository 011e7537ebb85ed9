"""The anchor head's loss terms: dense rows, no loop, weighted and reduced as `detoracle.reference` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements

__all__ = [
    "cross_entropy",
    "giou_loss",
    "l1_loss",
    "overlaps_mmdet",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]

_EPS = 2.0**-23  # beside an average factor


def _reduced(
    loss: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None, loss_weight: float
) -> Tensor:
    loss = loss if weight is None else loss * weight
    if reduction == "none":
        return loss * loss_weight
    if isinstance(avg_factor, Tensor):  # of whole numbers, beside which the epsilon would be single precision
        avg_factor = avg_factor.to(torch.promote_types(loss.dtype, torch.float32))
    if avg_factor is not None:
        return loss.sum() / (avg_factor + _EPS) * loss_weight
    return (loss.sum() if reduction == "sum" else loss.mean()) * loss_weight


@implements("boxes.overlaps_mmdet", name="batched")
def overlaps_mmdet(
    boxes_a: Tensor, boxes_b: Tensor, *, mode: str = "iou", aligned: bool = False, eps: float = 1e-6
) -> Tensor:
    """IoU, share of the first box, or GIoU; all pairs at once, which costs (G, N) memory."""
    if not aligned:
        boxes_a, boxes_b = boxes_a.unsqueeze(-2), boxes_b.unsqueeze(-3)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = boxes_a.unbind(-1), boxes_b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection, area_a = width * height, (ax2 - ax1) * (ay2 - ay1)
    if mode == "iof":
        return intersection / area_a.clamp(min=eps)
    union = (area_a + (bx2 - bx1) * (by2 - by1) - intersection).clamp(min=eps)
    if mode == "iou":
        return intersection / union
    outer_width = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    outer_height = (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    enclosure = (outer_width * outer_height).clamp(min=eps)
    return intersection / union - (enclosure - union) / enclosure


@implements("anchor_head.cross_entropy", name="batched")
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Softmax cross entropy of rows."""
    classes = None if class_weight is None else logits.new_tensor(class_weight)
    loss = F.cross_entropy(logits, labels.long(), weight=classes, ignore_index=ignore_index, reduction="none")
    if avg_non_ignore and avg_factor is None and reduction == "mean":
        avg_factor = (labels != ignore_index).sum()
    return _reduced(loss, weight, reduction, avg_factor, loss_weight)


@implements("anchor_head.sigmoid_cross_entropy", name="batched")
def sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Binary cross entropy against one-hot rows; background rows are all zero, negative labels cost nothing."""
    kept = ((labels >= 0) & (labels != ignore_index))[:, None]
    target = (_one_hot(labels, logits) & kept).to(logits.dtype)
    classes = None if class_weight is None else logits.new_tensor(class_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=classes, reduction="none")
    if avg_non_ignore and avg_factor is None and reduction == "mean":
        avg_factor = kept.sum() * logits.shape[1]
    row_weight = kept.to(logits.dtype) if weight is None else weight[:, None] * kept
    return _reduced(loss, row_weight, reduction, avg_factor, loss_weight)


@implements("anchor_head.sigmoid_focal_loss", name="batched")
def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    activated: bool = False,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Focal loss against one-hot rows; labels that do not exist count as background."""
    present = _one_hot(labels, logits)
    target = present.to(logits.dtype)
    probability = logits if activated else logits.sigmoid()
    if activated:
        entropy = F.binary_cross_entropy(logits, target, reduction="none")
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    error = torch.where(present, 1 - probability, probability)
    loss = torch.where(present, alpha * entropy, (1 - alpha) * entropy) * error**gamma
    return _reduced(loss, None if weight is None else weight[:, None], reduction, avg_factor, loss_weight)


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)


@implements("anchor_head.smooth_l1_loss", name="batched")
def smooth_l1_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 1.0,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Parabola up to `beta`, line beyond."""
    loss = F.smooth_l1_loss(predicted, target, beta=beta, reduction="none")
    return _reduced(loss, weight, reduction, avg_factor, loss_weight)


@implements("anchor_head.l1_loss", name="batched")
def l1_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Absolute differences."""
    return _reduced((predicted - target).abs(), weight, reduction, avg_factor, loss_weight)


@implements("anchor_head.giou_loss", name="batched")
def giou_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """1 - GIoU; with no weight above zero, the weighted coordinates themselves, as published, chosen without a sync."""
    row_weight = weight.mean(-1) if weight is not None and weight.ndim == 2 else weight
    loss = 1 - overlaps_mmdet(predicted, target, mode="giou", aligned=True, eps=eps)
    value = _reduced(loss, row_weight, reduction, avg_factor, loss_weight)
    if weight is None or reduction == "none":
        return value
    unweighted = (predicted * (weight if weight.ndim == 2 else weight[:, None])).sum()
    return torch.where((weight > 0).any(), value, unweighted)
