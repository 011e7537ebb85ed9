"""Class terms of the anchor head's loss: a loss per row or number, times a weight, reduced by a common rule.

The terms of boxes are in `detoracle.reference.anchor_head_box_terms`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.reference.anchor_head_boxes import SOURCE
from detoracle.reference.contract import operation
from detoracle.reference.errors import UpstreamRaises

__all__ = [
    "cross_entropy",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "weighted",
]

_AVG_FACTOR_EPS = torch.finfo(torch.float32).eps


def weighted(
    loss: Tensor, weight: Tensor | None = None, *, reduction: str = "mean", avg_factor: float | None = None
) -> Tensor:
    """Multiply a loss by its weight and reduce it.

    Parameters
    ----------
    loss : Tensor (...)
        Unreduced.
    weight : Tensor (...) or None
        Broadcast against it.
    reduction : {"none", "mean", "sum"}
        What to do without `avg_factor`.
    avg_factor : float, optional
        Divide the sum by it, plus 1.19e-7, instead of taking the mean; ``none`` ignores it.

    Returns
    -------
    loss : Tensor

    Raises
    ------
    UpstreamRaises
        ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> weighted(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0])).item()
    0.5
    >>> weighted(torch.ones(2), avg_factor=4).item()
    0.5
    """
    if weight is not None:
        loss = loss * weight
    if avg_factor is not None and reduction == "sum":
        raise UpstreamRaises(
            "anchor_head.sum-with-average-factor",
            expected="reduction 'mean' or 'none' beside avg_factor",
            got="'sum'",
            where="anchor_head losses",
        )
    if reduction == "none":
        return loss
    if avg_factor is not None:
        return loss.sum() / (avg_factor + _AVG_FACTOR_EPS)
    return loss.sum() if reduction == "sum" else loss.mean()


# ------------------------------------------------------------------------------------------------- class losses
@operation("anchor_head.cross_entropy", kind="values", gradients=("logits",), source=SOURCE)
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
    avg_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Softmax cross entropy of every row against its class.

    Parameters
    ----------
    logits : Tensor (N, C) float
        One column a class, background the last.
    labels : Tensor (N,) int
        0 to C-1.
    weight : Tensor (N,) float or None
        Of each row.
    class_weight : sequence of float or None
        Of each class.
    ignore_index : int
        Rows of this label cost 0.
    avg_non_ignore : bool
        The mean is over the other rows only.
    reduction : {"none", "mean", "sum"}
        As in `weighted`.
    avg_factor : float or None
        As in `weighted`.
    loss_weight : float
        Multiplies the result.

    Returns
    -------
    loss : Tensor (...) float
        (N,) if not reduced.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.label-out-of-range``, ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> round(cross_entropy(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
    0.6931
    """
    kept = labels != ignore_index
    _check_labels(labels[kept], logits.shape[1] - 1, where="anchor_head.cross_entropy")
    classes = None if class_weight is None else logits.new_tensor(list(class_weight))
    loss = F.cross_entropy(logits, labels.long(), weight=classes, ignore_index=ignore_index, reduction="none")
    average = _average(avg_factor, reduction, kept) if avg_non_ignore else avg_factor
    return weighted(loss, weight, reduction=reduction, avg_factor=average) * loss_weight


@operation("anchor_head.sigmoid_cross_entropy", kind="values", gradients=("logits",), source=SOURCE)
def sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    avg_non_ignore: bool = False,
    reduction: str = "mean",
    avg_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Binary cross entropy of every logit against its row's class as a one-hot vector.

    A label of C or more is all-zero, that is background; a row of a negative label costs 0. Neither is refused. Half
    precision logits are compared in single precision.

    Parameters
    ----------
    logits : Tensor (N, C) float
        One column a class, without background.
    labels : Tensor (N,) int
        0 to C-1, C for background.
    weight : Tensor (N,) float or None
        Of each row.
    class_weight : sequence of float or None
        Of each class where it is *present*; its absence weighs 1.
    ignore_index : int
        Rows of this label cost 0.
    avg_non_ignore : bool
        The mean is over the logits of rows that cost something.
    reduction : {"none", "mean", "sum"}
        As in `weighted`.
    avg_factor : float or None
        As in `weighted`.
    loss_weight : float
        Multiplies the result.

    Returns
    -------
    loss : Tensor (...) float
        (N, C) if not reduced.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> sigmoid_cross_entropy(torch.zeros(2, 2), torch.tensor([1, -1]), reduction="none").gt(0).tolist()
    [[True, True], [False, False]]
    """
    kept = ((labels >= 0) & (labels != ignore_index))[:, None].expand(logits.shape)
    present = _one_hot(labels, logits.shape[1]) & kept
    classes = None if class_weight is None else logits.new_tensor(list(class_weight))
    target = present.to(torch.promote_types(logits.dtype, torch.float32))  # its dtype is the result's
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=classes, reduction="none")
    each = kept.to(target.dtype) if weight is None else weight[:, None] * kept
    average = _average(avg_factor, reduction, kept) if avg_non_ignore else avg_factor
    return weighted(loss, each, reduction=reduction, avg_factor=average) * loss_weight


@operation("anchor_head.sigmoid_focal_loss", kind="values", gradients=("logits",), source=SOURCE)
def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    activated: bool = False,
    reduction: str = "mean",
    avg_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Binary cross entropy of every logit, times the probability of error to the power of gamma, times alpha.

    Parameters
    ----------
    logits : Tensor (N, C) float
        One column a class, without background.
    labels : Tensor (N,) int
        0 to C-1, C for background.
    weight : Tensor (N,) float or None
        Of each row.
    gamma : float
        How much less easy examples count.
    alpha : float
        Weight of a class that is present; one that is absent weighs 1 - alpha.
    activated : bool
        The "logits" are probabilities already.
    reduction : {"none", "mean", "sum"}
        As in `weighted`.
    avg_factor : float or None
        As in `weighted`.
    loss_weight : float
        Multiplies the result.

    Returns
    -------
    loss : Tensor (...) float
        (N, C) if not reduced.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.label-out-of-range``, ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> round(sigmoid_focal_loss(torch.zeros(1, 1), torch.tensor([0])).item(), 4)
    0.0433
    """
    _check_labels(labels, logits.shape[1], where="anchor_head.sigmoid_focal_loss")
    target = _one_hot(labels, logits.shape[1]).to(logits.dtype)
    probability = logits if activated else torch.sigmoid(logits)
    error = (1 - probability) * target + probability * (1 - target)
    entropy = F.binary_cross_entropy if activated else F.binary_cross_entropy_with_logits
    loss = entropy(logits, target, reduction="none") * ((alpha * target + (1 - alpha) * (1 - target)) * error**gamma)
    each = None if weight is None else weight[:, None]
    return weighted(loss, each, reduction=reduction, avg_factor=avg_factor) * loss_weight


def _check_labels(labels: Tensor, largest: int, *, where: str) -> None:
    outside = labels[(labels < 0) | (labels > largest)]
    if len(outside):
        raise UpstreamRaises(
            "anchor_head.label-out-of-range",
            expected=f"labels 0 to {largest}",
            got=str(int(outside[0])),
            where=where,
        )


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(N,) to (N, C) bool; a label that is no column has none."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def _average(avg_factor: float | None, reduction: str, kept: Tensor) -> float | None:
    """Number of elements that a mean is over, where none is given."""
    return int(kept.sum()) if avg_factor is None and reduction == "mean" else avg_factor
