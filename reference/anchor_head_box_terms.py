"""Box terms of the anchor head's loss, weighted and reduced by the rule of the class terms."""

from __future__ import annotations

import torch
from torch import Tensor

from detoracle.reference.anchor_head_boxes import SOURCE
from detoracle.reference.anchor_head_terms import weighted
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["giou_loss", "l1_loss", "smooth_l1_loss"]


@operation("anchor_head.smooth_l1_loss", kind="values", gradients=("predicted",), source=SOURCE)
def smooth_l1_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 1.0,
    reduction: str = "mean",
    avg_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Half the squared distance over beta for distances below beta, else the distance less beta/2.

    Without rows the loss is a scalar 0, also where it should not be reduced.

    Parameters
    ----------
    predicted : Tensor (N, 4) float
        Deltas, or boxes in pixels.
    target : Tensor (N, 4) float
        The same.
    weight : Tensor (N, 4) float or None
        Of each number.
    beta : float
        Where the parabola ends, more than 0.
    reduction : {"none", "mean", "sum"}
        As in `weighted`.
    avg_factor : float or None
        As in `weighted`.
    loss_weight : float
        Multiplies the result.

    Returns
    -------
    loss : Tensor (...) float
        (N, 4) if not reduced.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.beta-not-positive``, ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> smooth_l1_loss(torch.tensor([[0.5, 2, 0, 0]]), torch.zeros(1, 4), reduction="none").tolist()
    [[0.125, 1.5, 0.0, 0.0]]
    """
    if beta <= 0:
        raise UpstreamRaises(
            "anchor_head.beta-not-positive", expected="beta > 0", got=str(beta), where="anchor_head.smooth_l1_loss"
        )
    distance = torch.abs(predicted - target)
    loss = torch.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)
    return weighted(_rows(loss), weight, reduction=reduction, avg_factor=avg_factor) * loss_weight


@operation("anchor_head.l1_loss", kind="values", gradients=("predicted",), source=SOURCE)
def l1_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    avg_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Distance of every number.

    Without rows the loss is a scalar 0, also where it should not be reduced.

    Parameters
    ----------
    predicted : Tensor (N, 4) float
        Deltas, or boxes in pixels.
    target : Tensor (N, 4) float
        The same.
    weight : Tensor (N, 4) float or None
        Of each number.
    reduction : {"none", "mean", "sum"}
        As in `weighted`.
    avg_factor : float or None
        As in `weighted`.
    loss_weight : float
        Multiplies the result.

    Returns
    -------
    loss : Tensor (...) float
        (N, 4) if not reduced.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> l1_loss(torch.tensor([[1.0, 0, 0, -3]]), torch.zeros(1, 4)).item()
    1.0
    """
    loss = torch.abs(predicted - target)
    return weighted(_rows(loss), weight, reduction=reduction, avg_factor=avg_factor) * loss_weight


def _rows(loss: Tensor) -> Tensor:
    """Loss of rows; without any, a scalar 0."""
    return loss if len(loss) else loss.sum()


@operation("anchor_head.giou_loss", kind="values", gradients=("predicted",), source=SOURCE)
def giou_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    reduction: str = "mean",
    avg_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """1 - GIoU of every pair of boxes.

    Where no weight is positive, the sum of the predicted coordinates times their weights stands in: 0 for weights of 0,
    but no loss at all for negative ones.

    Parameters
    ----------
    predicted : Tensor (N, 4) float
        xyxy in pixels.
    target : Tensor (N, 4) float
        xyxy in pixels.
    weight : Tensor (...) float or None
        Of each pair (N,), or (N, 4), of which the mean counts.
    eps : float
        As in `overlaps_mmdet`.
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
    InputError
        If the weight is neither (N,) nor (N, 4).
    UpstreamRaises
        ``anchor_head.sum-with-average-factor``.

    Examples
    --------
    >>> round(giou_loss(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])).item(), 4)
    0.6667
    """
    if weight is not None and tuple(weight.shape) not in (predicted.shape[:1], predicted.shape):
        raise InputError(
            "weight", expected="(N,) or (N, 4)", got=str(tuple(weight.shape)), where="anchor_head.giou_loss"
        )
    if weight is not None and reduction != "none" and not int((weight > 0).sum()):
        return (predicted * (weight if weight.ndim == 2 else weight[:, None])).sum()
    each = weight.mean(-1) if weight is not None and weight.ndim == 2 else weight
    overlap = unchecked(overlaps_mmdet)(predicted, target, mode="giou", aligned=True, eps=eps)
    return weighted(1 - overlap, each, reduction=reduction, avg_factor=avg_factor) * loss_weight
