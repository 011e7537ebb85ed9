"""Monte Carlo arithmetic: every operation that rounds errs by a rounding, at random.

Run in float64 with the unit of a lower precision, a computation shows what its roundings there can lead to, forward
and backward: also where large terms cancel inside, which moving its inputs alone does not show. Operations that only
choose, copy or change signs are exact and stay so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Shaken"]

_aten = torch.ops.aten
_CORRECTLY_ROUNDED = (_aten.add, _aten.div, _aten.mul, _aten.rsub, _aten.sqrt, _aten.sub)
_OTHERS = (
    _aten.addmm,
    _aten.atan,
    _aten.atan2,
    _aten.binary_cross_entropy,
    _aten.binary_cross_entropy_backward,
    _aten.binary_cross_entropy_with_logits,
    _aten.bmm,
    _aten.exp,
    _aten.expm1,
    _aten.log,
    _aten.log1p,
    _aten.log2,
    _aten.log_sigmoid_backward,
    _aten.log_sigmoid_forward,
    _aten.logsumexp,
    _aten.mean,
    _aten.mm,
    _aten.nll_loss_backward,
    _aten.nll_loss_forward,
    _aten.pow,
    _aten.prod,
    _aten.reciprocal,
    _aten.rsqrt,
    _aten.sigmoid,
    _aten.sigmoid_backward,
    _aten.smooth_l1_loss,
    _aten.smooth_l1_loss_backward,
    _aten.softplus,
    _aten.softplus_backward,
    _aten.sum,
    _aten._log_softmax,
    _aten._log_softmax_backward_data,
    _aten._softmax,
    _aten._softmax_backward_data,
)
_UNITS = {**dict.fromkeys(_CORRECTLY_ROUNDED, 1), **dict.fromkeys(_OTHERS, 2)}
"""Unit roundoffs by which a result may be off: library functions promise a unit in the last place, which is two."""


class Shaken(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch leaves the base untyped
    """Within it, floating results of rounding operations move up or down by a unit roundoff or two.

    Parameters
    ----------
    dtype : torch.dtype
        Whose unit.
    seed : int
        Decides the directions.
    sign : int
        -1 turns them all around.

    Examples
    --------
    >>> one = torch.ones(3, dtype=torch.float64)
    >>> with Shaken(torch.float32, 0):
    ...     moved = one.exp() - torch.e
    >>> bool(((moved.abs() > 1e-8) & (moved.abs() < 1e-6)).all())
    True
    """

    def __init__(self, dtype: torch.dtype, seed: int, sign: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # ditto
        self._unit = sign * torch.finfo(dtype).eps / 2
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        units = _UNITS.get(function.overloadpacket)
        if units is None:
            return found
        if isinstance(found, tuple):
            return tuple(self._moved(value, units) for value in found)
        return self._moved(found, units)

    def _moved(self, value: Any, units: int) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        up = torch.randint(0, 2, value.shape, generator=self._generator).to(value.device)
        return value * (1 + units * self._unit * (2 * up - 1).to(value.dtype))
