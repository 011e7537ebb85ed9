"""Terms of the anchor head's loss, written down plainly: one class at a time, then one rule for weights and means.

Arguments, results and their meaning are those of the operations in `detoracle.reference`; arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.loop.anchor_head_boxes import overlaps_mmdet
from detoracle.implementations.registry import implements

__all__ = [
    "cross_entropy",
    "giou_loss",
    "l1_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]

_EPS = 2.0**-23  # beside an average factor

Factor = float | Tensor | None


def _reduced(cost: Tensor, weight: Tensor | None, reduction: str, avg_factor: Factor) -> Tensor:
    """Weighted cost, summed, averaged or as it is."""
    if weight is not None:
        cost = cost * weight
    if reduction == "none":
        return cost
    if avg_factor is not None:
        return cost.sum() / (float(avg_factor) + _EPS)
    if reduction == "sum":
        return cost.sum()
    return cost.mean()


# --------------------------------------------------------------------------------------------------- class losses
@implements("anchor_head.cross_entropy", name="loop")
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
    avg_factor: Factor = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Softmax cross entropy of rows: minus the logarithm of the probability of the row's class."""
    kept = labels != ignore_index
    label = labels.long() * kept
    log_probability = torch.log_softmax(logits, dim=1)
    cost = -log_probability.gather(1, label[:, None])[:, 0]
    if class_weight is not None:
        cost = cost * logits.new_tensor(class_weight)[label]
    cost = torch.where(kept, cost, 0)
    if avg_non_ignore and avg_factor is None and reduction == "mean":
        avg_factor = int(kept.sum())
    return _reduced(cost, weight, reduction, avg_factor) * loss_weight


@implements("anchor_head.sigmoid_cross_entropy", name="loop")
def sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
    avg_factor: Factor = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Binary cross entropy, a class at a time; rows of a negative or the ignored label cost nothing."""
    kept = (labels >= 0) & (labels != ignore_index)
    columns = []
    for label in range(logits.shape[1]):
        present = kept & (labels == label)
        cost = _binary_cross_entropy(logits[:, label], present)
        if class_weight is not None:
            cost = torch.where(present, cost * class_weight[label], cost)
        columns.append(cost)
    row_weight = kept.to(logits.dtype)
    if weight is not None:
        row_weight = row_weight * weight
    if avg_non_ignore and avg_factor is None and reduction == "mean":
        avg_factor = int(kept.sum()) * logits.shape[1]
    return _reduced(torch.stack(columns, dim=1), row_weight[:, None], reduction, avg_factor) * loss_weight


@implements("anchor_head.sigmoid_focal_loss", name="loop")
def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    activated: bool = False,
    reduction: str = "mean",
    avg_factor: Factor = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Focal loss, a class at a time: the more certain and right a logit, the less it counts."""
    columns = []
    for label in range(logits.shape[1]):
        present = labels == label
        if activated:
            probability = logits[:, label]
            cost = F.binary_cross_entropy(probability, present.to(logits.dtype), reduction="none")
        else:
            probability = torch.sigmoid(logits[:, label])
            cost = _binary_cross_entropy(logits[:, label], present)
        error = torch.where(present, 1 - probability, probability)
        balanced = torch.where(present, alpha * cost, (1 - alpha) * cost)
        columns.append(balanced * error**gamma)
    row_weight = None if weight is None else weight[:, None]
    return _reduced(torch.stack(columns, dim=1), row_weight, reduction, avg_factor) * loss_weight


def _binary_cross_entropy(logit: Tensor, present: Tensor) -> Tensor:
    """Cost (N,) of the logits of one class, of single precision at least."""
    target = present.to(torch.promote_types(logit.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


# ----------------------------------------------------------------------------------------------------- box losses
@implements("anchor_head.smooth_l1_loss", name="loop")
def smooth_l1_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 1.0,
    reduction: str = "mean",
    avg_factor: Factor = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Parabola for distances below `beta`, a line of slope 1 beyond."""
    distance = (predicted - target).abs()
    parabola = 0.5 * distance**2 / beta
    line = distance - 0.5 * beta
    cost = torch.where(distance < beta, parabola, line)
    return _reduced(_rows(cost), weight, reduction, avg_factor) * loss_weight


@implements("anchor_head.l1_loss", name="loop")
def l1_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    avg_factor: Factor = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Distance of every number."""
    cost = (predicted - target).abs()
    return _reduced(_rows(cost), weight, reduction, avg_factor) * loss_weight


def _rows(cost: Tensor) -> Tensor:
    """Costs of rows; without any, a scalar 0."""
    return cost if len(cost) else cost.sum()


@implements("anchor_head.giou_loss", name="loop")
def giou_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    reduction: str = "mean",
    avg_factor: Factor = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """1 - GIoU of pairs; where no weight is positive, the weighted coordinates stand in."""
    row_weight = weight
    if weight is not None and weight.ndim == 2:
        row_weight = weight.mean(dim=1)
    if weight is not None and reduction != "none" and not (weight > 0).any():
        coordinate_weight = weight if weight.ndim == 2 else weight[:, None]
        return (predicted * coordinate_weight).sum()
    cost = 1 - overlaps_mmdet(predicted, target, mode="giou", aligned=True, eps=eps)
    return _reduced(cost, row_weight, reduction, avg_factor) * loss_weight
