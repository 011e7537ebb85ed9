"""Tensors that carry the rounding error, and decisions that carry the margin, of an evaluation in another precision.

Operators, methods and torch functions all go to one table of rules (`detoracle.reference.rounding_rules`), keyed by the
torch function's name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bounded", "Decision", "Precision", "known", "nothing_by_luck", "value_of"]

_robust_bits = ContextVar("robust_bits", default=20)
"""Results that fit in so many significant bits are exact however the formula is arranged: grids, halves, integers."""


@contextmanager
def nothing_by_luck() -> Iterator[None]:
    """Within it every operation rounds, though its result fit in a few bits, which one in sixteen does by luck alone.

    Examples
    --------
    >>> import torch
    >>> with nothing_by_luck():
    ...     three = Bounded.exact(torch.tensor(1.0), torch.float32) + 2
    >>> bool(three.error > 0)
    True
    """
    before = _robust_bits.set(0)
    try:
        yield
    finally:
        _robust_bits.reset(before)


@functools.cache
def _rules() -> Mapping[str, Callable[..., Any]]:
    """The table, which is made of the types below."""
    from detoracle.reference.rounding_rules import RULES

    return RULES


@dataclass(frozen=True)
class Precision:
    """Unit roundoff and range of the dtype whose errors are bounded."""

    unit: float
    largest: float
    smallest: float
    bits: int

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """Facts of a floating dtype."""
        info = torch.finfo(dtype)
        digits = round(-math.log2(info.eps)) + 1
        return cls(
            info.eps / 2, info.max, info.smallest_normal, min(_robust_bits.get(), digits - 4 if digits > 8 else digits)
        )

    def error_of(self, number: float) -> float:
        """Rounding error of a number that is written in a formula: 0 if the precision holds it.

        Examples
        --------
        >>> import torch
        >>> single = Precision.of(torch.float32)
        >>> single.error_of(0.75), 0 < single.error_of(0.1) < 1e-8
        (0.0, True)
        """
        mantissa = math.frexp(number)[0] / self.unit
        return 0.0 if not math.isfinite(number) or mantissa == round(mantissa) else self.unit * abs(number)


def _operator(rule: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _rules()[rule](self, other)


def _reflected(rule: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _rules()[rule](other, self)


class _Dispatching:
    """Operators and methods all go to the same table of rules, keyed by the torch function's name."""

    value: Tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in _rules():
            raise AttributeError(f"{type(self).__name__} has no rule for '{name}'")
        rule = _rules()[name]
        return lambda *args, **kwargs: rule(self, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in _rules():
            raise NotImplementedError(f"no error rule for torch function '{name}'; write the formula with ruled ones")
        return _rules()[name](*args, **(kwargs or {}))

    __add__, __radd__ = _operator("add"), _reflected("add")
    __sub__, __rsub__ = _operator("sub"), _reflected("sub")
    __mul__, __rmul__ = _operator("mul"), _reflected("mul")
    __truediv__, __rtruediv__ = _operator("div"), _reflected("div")
    __pow__, __rpow__ = _operator("pow"), _operator("rpow")
    __gt__, __lt__ = _operator("gt"), _operator("lt")
    __ge__, __le__ = _operator("ge"), _operator("le")
    __and__, __or__ = _operator("logical_and"), _operator("logical_or")

    def __neg__(self) -> Any:
        return _rules()["neg"](self)

    def __invert__(self) -> Any:
        return _rules()["logical_not"](self)

    def __getitem__(self, index: Any) -> Any:
        return self._map(lambda t: t[_plain_index(index)])

    def __len__(self) -> int:
        return len(self.value)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.value.ndim

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.value.device


@dataclass(frozen=True, eq=False)
class Bounded(_Dispatching):
    """A float64 tensor and a bound on its rounding error in another precision.

    Attributes
    ----------
    value, error : Tensor float64
        The float64 result, and how far a result in `precision` may be from it.
    precision : Precision
        The precision whose errors are bounded.

    Examples
    --------
    >>> import torch
    >>> third = Bounded.exact(torch.tensor(1.0), torch.float32) / 3
    >>> bool(abs(third.value - torch.tensor(1.0) / 3) <= third.error)
    True
    """

    value: Tensor
    error: Tensor
    precision: Precision

    @classmethod
    def exact(cls, tensor: Tensor, dtype: torch.dtype) -> Any:
        """Take a tensor as given, without error, to be computed with in `dtype`.

        Typed ``Any``, because it takes a Tensor's place in functions that are typed for tensors.
        """
        value = tensor.detach().double()
        return cls(value, torch.zeros_like(value), Precision.of(dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Always float64, the dtype of `value`."""
        return self.value.dtype

    @property
    def lower(self) -> Tensor:
        """Smallest value a right evaluation may return."""
        return self.value - self.error

    @property
    def upper(self) -> Tensor:
        """Largest value a right evaluation may return."""
        return self.value + self.error

    def _map(self, function: Callable[[Tensor], Tensor]) -> Bounded:
        return Bounded(function(self.value), function(self.error), self.precision)


@dataclass(frozen=True, eq=False)
class Decision(_Dispatching):
    """A boolean tensor and the margin of each element, in units of the rounding error (1 = as large as the error).

    Examples
    --------
    >>> import torch
    >>> a = Decision(torch.tensor([True, False]), torch.tensor([0.5, 9.0]))
    >>> b = Decision(torch.tensor([True, True]), torch.tensor([3.0, 3.0]))
    >>> (a & b).margin.tolist(), (a | b).margin.tolist()
    ([0.5, 9.0], [3.0, 3.0])
    """

    value: Tensor
    margin: Tensor

    @property
    def ambiguous(self) -> Tensor:
        """Elements that a right evaluation may decide either way."""
        return self.margin < 1

    @property
    def dtype(self) -> torch.dtype:
        """Always bool."""
        return self.value.dtype

    def _map(self, function: Callable[[Tensor], Tensor]) -> Decision:
        return Decision(function(self.value), function(self.margin))


def value_of(x: Any) -> Any:
    """Plain tensor behind a `Bounded` or `Decision`; anything else unchanged.

    Examples
    --------
    >>> import torch
    >>> value_of(Bounded.exact(torch.tensor(2.0), torch.float32)).item()
    2.0
    """
    return x.value if isinstance(x, _Dispatching) else x


def known(x: Any) -> Any:
    """Settle what depends on a decision: a `Decision` becomes its plain boolean tensor.

    Examples
    --------
    >>> import torch
    >>> known(Bounded.exact(torch.tensor(2.0), torch.float32) > 1).item()
    True
    """
    return x.value if isinstance(x, Decision) else x


def _plain_index(index: Any) -> Any:
    return tuple(value_of(i) for i in index) if isinstance(index, tuple) else value_of(index)
