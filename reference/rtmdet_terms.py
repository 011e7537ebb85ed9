"""RTMDet's two loss terms as functions of their own: quality focal loss and GIoU loss, weighted and reduced.

Stages 2 and 3 of `detoracle.reference.rtmdet_loss`, where they are put together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rounding import value_of
from detoracle.reference.rtmdet_points import SOURCE

__all__ = ["giou_loss", "qfl"]

_AVERAGE_EPS = torch.finfo(torch.float32).eps  # added to an average factor, whatever the dtype


# ------------------------------------------------------------------------------------------------- 2. class loss
@operation("rtmdet.qfl", kind="values", gradients=("predicted",), source=SOURCE)
def qfl(
    predicted: Tensor,
    quality: Tensor,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    activated: bool = False,
    beta: float = 2.0,
    reduction: str = "mean",
    average_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Quality focal loss: binary cross entropy towards a quality, weighted by the distance from it.

    Each entry costs BCE(x, q) * |q - sigmoid(x)|^beta, where q is the quality in the labelled class and 0 in all
    others; a row costs the sum over its classes. The gradient flows through both factors.

    Parameters
    ----------
    predicted : Tensor (N, C) float
        Logits, or probabilities if `activated`.
    quality : Tensor (..., Q) float
        With labels, (N,): the target in the labelled class. Without, (N, C): the target of every class.
    labels : Tensor (N,) int or None
        Class; anything outside 0 to C-1 is background, whose quality is not read.
    weight : Tensor (..., W) float or None
        One a row, (N,). Upstream multiplies whatever broadcasts.
    activated : bool
        `predicted` are probabilities.
    beta : float
        Exponent of the distance.
    reduction : {"none", "mean", "sum"}
    average_factor : float or None
        Replaces the number of rows in the mean; must not come with ``sum``.
    loss_weight : float

    Returns
    -------
    loss : Tensor (...) float
        (N,) with reduction ``none``, otherwise ().

    Raises
    ------
    UpstreamRaises
        ``rtmdet.quality-dtype``: a quality of a wider dtype than the logits (labelled, and not under autocast).
        ``rtmdet.probability-out-of-range``, ``rtmdet.weight-shape``, ``rtmdet.sum-with-average-factor``.
    InputError
        If `quality` has another shape.

    Examples
    --------
    >>> logits, quality = torch.zeros(2, 2), torch.tensor([0.5, 0.9])
    >>> [round(v, 4) for v in qfl(logits, quality, torch.tensor([0, 2]), reduction="none").tolist()]
    [0.1733, 0.3466]
    """
    shape = predicted.shape if labels is None else predicted.shape[:1]
    if quality.shape != shape:
        raise InputError("quality", expected=f"shape {tuple(shape)}", got=str(tuple(quality.shape)), where="rtmdet.qfl")
    target = quality
    if labels is not None:
        _require_wide_logits(predicted, quality.dtype, where="rtmdet.qfl")
        classes = torch.arange(predicted.shape[1], device=labels.device)
        target = torch.where(labels[:, None] == classes, quality[:, None], 0.0)
    if activated:
        if not bool(((value_of(predicted) >= 0) & (value_of(predicted) <= 1)).all()):
            raise UpstreamRaises(
                "rtmdet.probability-out-of-range", expected="0 to 1", got="something outside", where="rtmdet.qfl"
            )
        entropy, probability = F.binary_cross_entropy(predicted, target, reduction="none"), predicted
    else:
        entropy = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        probability = torch.sigmoid(predicted)
    rows = (entropy * torch.abs(target - probability) ** beta).sum(1)
    return loss_weight * _reduced(rows, weight, reduction, average_factor, where="rtmdet.qfl")


def _require_wide_logits(predicted: Tensor, quality: torch.dtype, *, where: str) -> None:
    """Upstream writes losses in the quality's dtype over those in the logits' dtype; autocast makes both float32."""
    if torch.promote_types(predicted.dtype, quality) != predicted.dtype and not torch.is_autocast_enabled(
        predicted.device.type
    ):
        raise UpstreamRaises(
            "rtmdet.quality-dtype",
            expected=f"logits that hold qualities of {quality}, or autocast",
            got=str(predicted.dtype),
            where=where,
        )


def _reduced(
    loss: Tensor, weight: Tensor | None, reduction: str, average_factor: float | None, *, where: str
) -> Tensor:
    """Weighted loss of rows, reduced."""
    if weight is not None:
        try:
            loss = loss * weight
        except RuntimeError as error:
            got, expected = str(tuple(weight.shape)), f"one weight a row, {tuple(loss.shape)}"
            raise UpstreamRaises("rtmdet.weight-shape", expected=expected, got=got, where=where) from error
    if reduction == "none":
        return loss
    if average_factor is None:
        return loss.mean() if reduction == "mean" else loss.sum()
    if reduction == "sum":
        raise UpstreamRaises(
            "rtmdet.sum-with-average-factor", expected="reduction 'mean' or 'none'", got="'sum'", where=where
        )
    return loss.sum() / (average_factor + _AVERAGE_EPS)


# --------------------------------------------------------------------------------------------------- 3. box loss
@operation("rtmdet.giou_loss", kind="values", gradients=("predicted",), source=SOURCE)
def giou_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    reduction: str = "mean",
    average_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """1 - GIoU of matched boxes, weighted and reduced.

    If no weight is above 0 (and the loss is to be reduced), the result is the sum of the *boxes* times the weights: 0
    with a gradient of 0 where all weights are 0, but nonsense where some are negative, and NaN if a box is.

    Parameters
    ----------
    predicted : Tensor (N, 4) float
        Left, top, right, bottom in pixels.
    target : Tensor (N, 4) float
        Left, top, right, bottom in pixels.
    weight : Tensor (..., W) float or None
        One a row, (N,), or one a side, (N, 4), which are averaged.
    eps : float
        Smallest area in square pixels.
    reduction : {"none", "mean", "sum"}
    average_factor : float or None
        Replaces the number of rows in the mean; must not come with ``sum``.
    loss_weight : float

    Returns
    -------
    loss : Tensor (...) float
        (N,) with reduction ``none``, otherwise ().

    Raises
    ------
    UpstreamRaises
        ``rtmdet.weight-shape``, ``rtmdet.sum-with-average-factor``.

    Examples
    --------
    >>> a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    >>> round(float(giou_loss(a, b, loss_weight=2.0)), 4), float(giou_loss(b, a, torch.tensor([-1.0])))
    (1.3333, -6.0)
    """
    if weight is not None and reduction != "none" and not int((weight > 0).sum()):
        return (predicted * (weight[:, None] if weight.ndim == 1 else weight)).sum()
    rows = 1 - unchecked(overlaps_mmdet)(predicted, target, mode="giou", aligned=True, eps=eps)
    if weight is not None and weight.shape == predicted.shape:
        weight = weight.mean(-1)
    return loss_weight * _reduced(rows, weight, reduction, average_factor, where="rtmdet.giou_loss")
