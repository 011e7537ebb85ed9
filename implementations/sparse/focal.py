"""Focal loss of a great many logits towards 0, and its gradient: one sigmoid and one softplus an entry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["focal_background_loss"]

_CHUNK = 1 << 17  # logits treated at a time: a few such tensors fit a cache
_LINEAR = 40.0  # from here on softplus(x) is x, in float64 too


def focal_background_loss(
    logits: Tensor, weight: Tensor, *, gamma: float = 2.0, gradient: Tensor | None = None
) -> Tensor:
    """Weighted sum of p**gamma * softplus over all logits; where there is room, its gradient is written.

    Parameters
    ----------
    logits : Tensor (K, C, N) float
        Of any dtype; sums are in float32 at least.
    weight : Tensor (K, N) float
        Of all classes of a row.
    gamma : float
    gradient : Tensor (K, C, N) float, optional
        To be filled.

    Returns
    -------
    loss : Tensor () float

    Examples
    --------
    >>> room = torch.empty(1, 1, 2)
    >>> logits, weight = torch.tensor([[[0.0, 100.0]]]), torch.tensor([[1.0, 2.0]])
    >>> round(float(focal_background_loss(logits, weight, gradient=room)), 4)
    200.1733
    >>> [round(slope, 4) for slope in room.flatten().tolist()]
    [0.2983, 2.0]
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    _, classes, columns = logits.shape
    step = max(1, _CHUNK // max(1, classes * columns))
    across = max(1, _CHUNK // max(1, classes))
    sums = [weight.new_zeros((), dtype=dtype)]
    for start in range(0, len(logits), step):
        for first in range(0, columns, across):
            part = slice(start, start + step), slice(None), slice(first, first + across)
            each = weight[part[0], part[2]]
            x = logits[part].to(dtype)
            probability = torch.sigmoid(x)
            modulation = probability**gamma
            entropy = F.softplus(x, threshold=_LINEAR)
            if gradient is not None:
                # The product rule, where the slope of the entropy is p and that of the modulation
                # gamma * modulation * (1 - p).
                slope = (1 - probability).mul_(entropy)
                slope = torch.add(probability, slope, alpha=gamma, out=slope).mul_(modulation)
                torch.mul(slope, each[:, None], out=gradient[part])
            sums.append((modulation.mul_(entropy).sum(1) * each).sum())
    return torch.stack(sums).sum()
