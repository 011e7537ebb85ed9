"""Losses written another way: the same on paper, but other terms cancel, and so other roundings remain.

Cross entropy is as right as the logarithm of the exponentials' sum less the class's logit, though logits of hundreds
then leave an error of theirs in a small probability. Of a binary one, 1 - sigmoid(-x) is as right as sigmoid(x).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Rearranged"]


class Rearranged(TorchFunctionMode):
    """Within it, softmax and the cross entropies are worked out by another formula.

    Of the options only those are heeded that an oracle sets; the binary cross entropy is never reduced.

    Examples
    --------
    >>> logits = torch.tensor([[150.0, 146.0]])
    >>> with Rearranged():
    ...     other = torch.log_softmax(logits, dim=1)
    >>> (other - torch.log_softmax(logits, dim=1)).abs().lt(1e-5).all().item(), other.equal(logits.log_softmax(1))
    (True, False)
    """

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _OTHERWISE.get(function, function)(*args, **(kwargs or {}))


def _log_softmax(logits: Tensor, dim: int) -> Tensor:
    return logits - logits.logsumexp(dim, keepdim=True)


def _softmax(logits: Tensor, dim: int) -> Tensor:
    return _log_softmax(logits, dim).exp()


def _cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None, ignore_index: int, reduction: str, **_: Any
) -> Tensor:
    log_probability = _log_softmax(logits, 1)
    return F.nll_loss(log_probability, target, weight=weight, ignore_index=ignore_index, reduction=reduction)


def _binary_cross_entropy(logits: Tensor, target: Tensor, *, pos_weight: Tensor | None, **_: Any) -> Tensor:
    log_sigmoid = F.logsigmoid(logits)
    present = target if pos_weight is None else target * pos_weight
    return (1 - target) * (logits - log_sigmoid) - present * log_sigmoid


_OTHERWISE: dict[Any, Any] = {
    torch.log_softmax: _log_softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
