"""Derivatives where there is none: at a kink, any value between those of its two sides is as right as another.

A side clamped at 0 passes its gradient on at exactly 0 if written as `torch.clamp`, and none as `torch.relu`; of two
equal numbers `torch.maximum` serves both by half, a comparison one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["OtherSide"]


class OtherSide(TorchFunctionMode):
    """Within it, functions with a kink have the derivative of one of its sides there; their values are the same.

    Parameters
    ----------
    first : bool
        Of equal numbers the first is the larger, or the smaller, one; else the second. A number at a limit is beyond
        it. 0 is positive, or else negative.

    Examples
    --------
    >>> side = torch.zeros(2, requires_grad=True)
    >>> with OtherSide(first=True):
    ...     clamped = side.clamp(min=0)
    >>> torch.autograd.grad(clamped.sum(), side)[0].tolist()
    [0.0, 0.0]
    """

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self._first = first

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinked = _KINKED.get(function)
        if kinked is None:
            return function(*args, **(kwargs or {}))
        return kinked(self._first, *args, **(kwargs or {}))


def _clamp(_: bool, x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    limits = [limit.detach() if isinstance(limit, Tensor) else limit for limit in (min, max)]
    clamped = torch.clamp(x.detach(), *limits)
    inside = torch.ones_like(clamped, dtype=torch.bool)
    inside = inside if limits[0] is None else inside & (x > limits[0])
    inside = inside if limits[1] is None else inside & (x < limits[1])
    return torch.where(inside, x, clamped)


def _maximum(first: bool, x: Tensor, y: Tensor) -> Tensor:
    return _chosen((x >= y) if first else (x > y), x, y, torch.maximum)


def _minimum(first: bool, x: Tensor, y: Tensor) -> Tensor:
    return _chosen((x <= y) if first else (x < y), x, y, torch.minimum)


def _chosen(is_x: Tensor, x: Tensor, y: Tensor, usual: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.where(x.isnan() | y.isnan(), usual(x, y), torch.where(is_x, x, y))


def _abs(first: bool, x: Tensor) -> Tensor:
    return torch.where((x >= 0) if first else (x > 0), x, -x)


_KINKED: dict[Any, Callable[..., Tensor]] = {
    torch.clamp: _clamp,
    Tensor.clamp: _clamp,
    torch.maximum: _maximum,
    Tensor.maximum: _maximum,
    torch.minimum: _minimum,
    Tensor.minimum: _minimum,
    torch.abs: _abs,
    Tensor.abs: _abs,
}
