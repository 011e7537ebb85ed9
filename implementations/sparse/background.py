"""Cross entropy of a great many logits towards 0, and its gradient: one exponential an entry, few logarithms.

A sum of softplus(x) = max(x, 0) + log(1 + e) with e = exp(-abs(x)) needs no logarithm of every entry, for a product of
factors has one. Factors are kept as what they are above 1, so that small losses do not drown in the 1:
(1 + a)(1 + b) = 1 + (a + b + a b). And e is the smaller of the probabilities p and 1 - p over the larger, where p is
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["background_loss"]

_CHUNK = 1 << 17  # logits treated at a time: a few such tensors fit a cache
_FOLDS = 6  # 2**6 factors of at most 2 are far from overflow


def background_loss(logits: Tensor, *, scale: float = 1.0, gradient: Tensor | None = None) -> Tensor:
    """Sum of softplus over all logits; where there is room, `scale` times its gradient is written.

    Parameters
    ----------
    logits : Tensor (C, N) float
        Of any dtype; sums are in float32 at least. Minus infinity costs nothing.
    scale : float
    gradient : Tensor (C, N) float, optional
        To be filled.

    Returns
    -------
    loss : Tensor () float

    Examples
    --------
    >>> room = torch.empty(1, 2)
    >>> round(float(background_loss(torch.tensor([[0.0, 100.0]]), scale=2.0, gradient=room)), 4), room.tolist()
    (100.6931, [[1.0, 2.0]])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    room = logits.new_empty(min(step, len(logits)), logits.shape[1], dtype=dtype)
    sums = [logits.new_zeros((), dtype=dtype)]
    for start in range(0, len(logits), step):
        part = logits[start : start + step].to(dtype)
        probability = torch.sigmoid(part)
        other = torch.sub(1, probability, out=room[: len(part)])
        factors = torch.minimum(probability, other)
        factors = _product(factors.div_(torch.maximum(probability, other, out=other)))
        sums += [factors.log1p_().sum(), torch.clamp(part, min=0, out=other).sum()]
        if gradient is not None:
            torch.mul(probability, scale, out=gradient[start : start + step])
    return torch.stack(sums).sum()


def _product(above: Tensor) -> Tensor:
    """Multiply factors 1 + a, given and returned by their a's, along rows (C, N) until few rows are left; in place."""
    for _ in range(_FOLDS):
        half = (len(above) + 1) // 2
        first, second = above[: len(above) - half], above[half:]
        torch.addcmul(first, first, second, out=first).add_(second)
        above = above[:half]
    return above
