"""Running error analysis: run an oracle in float64 and know what float32 may do instead.

A `Bounded` is a float64 tensor with, beside every element, a bound on the rounding error that a float32 (or half)
evaluation of the same formula can make there. A `Decision` is a boolean tensor with the *margin* of every element:
the distance from the point where it flips, in units of that bound. Both go through the ordinary torch functions, so
that the oracles' own stage functions explain themselves unmodified:

>>> import torch
>>> x = Bounded.exact(torch.tensor([1.0, 2.0]), torch.float32)
>>> bool((torch.log(x * 3).error < 1e-6).all())
True
>>> (x > 1.0).value.tolist(), (x > 1.0).margin.tolist()
([False, True], [inf, inf])

A value known without error decides with an infinite margin, also when it sits exactly on the edge; a value that
carries an error decides with margin |distance| / error, and below 1 either outcome is right.

The model is the standard one: every operation commits a relative error of at most one unit roundoff ``u`` (two for
transcendental functions), a sum of n terms n * u of the sum of magnitudes, in whatever order it is taken. Results
that fit in a few bits (grid coordinates, halves, small integers) are exact in any order and commit none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bounded", "Decision", "Precision", "known", "known_range", "log_at_least", "value_of"]

_ROBUST_BITS = 20  # results that fit in so many significant bits are exact however the formula is arranged

_SATURATED = 40.0  # exp(-40) added to 1 is lost in every precision


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
            info.eps / 2, info.max, info.smallest_normal, min(_ROBUST_BITS, digits - 4 if digits > 8 else digits)
        )


class _Dispatching:
    """Operators and methods all go to the same table of rules, keyed by the torch function's name."""

    value: Tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in _RULES:
            raise AttributeError(f"{type(self).__name__} has no rule for '{name}'")
        rule = _RULES[name]
        return lambda *args, **kwargs: rule(self, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in _RULES:
            raise NotImplementedError(f"no error rule for torch function '{name}'; write the formula with ruled ones")
        return _RULES[name](*args, **(kwargs or {}))

    def __add__(self, other: Any) -> Any:
        return _RULES["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return _RULES["add"](other, self)

    def __sub__(self, other: Any) -> Any:
        return _RULES["sub"](self, other)

    def __rsub__(self, other: Any) -> Any:
        return _RULES["sub"](other, self)

    def __mul__(self, other: Any) -> Any:
        return _RULES["mul"](self, other)

    def __rmul__(self, other: Any) -> Any:
        return _RULES["mul"](other, self)

    def __truediv__(self, other: Any) -> Any:
        return _RULES["div"](self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _RULES["div"](other, self)

    def __pow__(self, other: Any) -> Any:
        return _RULES["pow"](self, other)

    def __rpow__(self, other: Any) -> Any:
        return _RULES["rpow"](self, other)

    def __neg__(self) -> Any:
        return _RULES["neg"](self)

    def __gt__(self, other: Any) -> Any:
        return _RULES["gt"](self, other)

    def __lt__(self, other: Any) -> Any:
        return _RULES["lt"](self, other)

    def __ge__(self, other: Any) -> Any:
        return _RULES["ge"](self, other)

    def __le__(self, other: Any) -> Any:
        return _RULES["le"](self, other)

    def __and__(self, other: Any) -> Any:
        return _RULES["logical_and"](self, other)

    def __or__(self, other: Any) -> Any:
        return _RULES["logical_or"](self, other)

    def __invert__(self) -> Any:
        return _RULES["logical_not"](self)

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


def known_range(x: Any, low: float, high: float | Tensor) -> Any:
    """State that a result lies in a range, however it is rounded. Tightens a bound; a tensor stays as it is.

    Examples
    --------
    >>> import torch
    >>> ratio = Bounded(torch.tensor(0.25), torch.tensor(9.0), Precision.of(torch.float32))
    >>> known_range(ratio, 0.0, 1.0).error.item()
    0.75
    """
    if not isinstance(x, Bounded):
        return x
    farthest = torch.maximum(high - x.value, x.value - low)
    holds = (x.value >= low) & (x.value <= high)
    return Bounded(x.value, torch.where(holds, torch.minimum(x.error, farthest), x.error), x.precision)


def log_at_least(x: Any, low: float, log: Callable[[Tensor], Tensor] = torch.log) -> Any:
    """Logarithm clamped from below, whose bound stays finite where its argument may be zero.

    Parameters
    ----------
    x : Tensor or Bounded
    low : float
    log : callable
        `torch.log` or `torch.log1p`.

    Examples
    --------
    >>> import torch
    >>> log_at_least(torch.tensor([0.0, 1.0]), -100.0).tolist()
    [-100.0, 0.0]
    >>> log_at_least(Bounded.exact(torch.tensor(0.0), torch.float32), -100.0).error.item()
    0.0
    """
    if not isinstance(x, Bounded):
        return torch.clamp(log(x), min=low)
    at_ends = _log if log is torch.log else _log1p
    value, above, below = (torch.clamp(at_ends(t), min=low) for t in (x.value, x.upper, x.lower))
    spread = torch.maximum(_gap(above, value), _gap(below, value)).masked_fill(x.error == 0, 0.0)
    result = _rounded(value, spread, x.precision, 2.0)
    return Bounded(result.value, result.error.masked_fill(above == low, 0.0), x.precision)


def _plain_index(index: Any) -> Any:
    return tuple(value_of(i) for i in index) if isinstance(index, tuple) else value_of(index)


# --------------------------------------------------------------------------------------------------- rounding
def _precision(*xs: Any) -> Precision:
    """Of mixed operands the finest, to which PyTorch promotes the others."""
    return min((x.precision for x in xs if isinstance(x, Bounded)), key=lambda precision: precision.unit)


def _split(x: Any, like: Bounded | None = None) -> tuple[Any, Any]:
    """Value and error of an operand; constants, tensors and decisions are exact."""
    if isinstance(x, Bounded):
        return x.value, x.error
    x = value_of(x)
    return (x.double(), 0.0) if isinstance(x, Tensor) else (x, 0.0)


def _rounded(value: Tensor, error: Tensor, precision: Precision, units: float = 1.0) -> Bounded:
    """Add the operation's own rounding; emulate the precision's overflow and underflow."""
    value = torch.as_tensor(value)
    magnitude = value.abs()
    subnormal = 2 * precision.unit * precision.smallest
    kept = magnitude + error >= subnormal / 4  # else it is zero for certain
    flushed = (magnitude + units * subnormal * kept).masked_fill(magnitude >= precision.smallest, 0.0)
    own = units * precision.unit * magnitude + flushed
    from_exact = error == 0
    if bool(from_exact.any()):  # an exact operand may give an exact result; everything else commits a rounding
        exact = value == 0
        if units <= 1:
            scaled = torch.ldexp(torch.frexp(value)[0], torch.tensor(precision.bits, device=value.device))
            exact = exact | ((scaled == scaled.round()) & (magnitude >= precision.smallest))
        own = own.masked_fill(exact & from_exact, 0.0)
    error = torch.nan_to_num(error + own, nan=math.inf, posinf=math.inf)
    if not bool((magnitude + error).amax() <= precision.largest if value.numel() else True):
        overflow = magnitude - error > precision.largest
        value = torch.where(overflow, value.sign() * math.inf, value)
        error = torch.where(overflow | value.isinf(), 0.0, error)
        error = torch.where(value.abs() + error > precision.largest, math.inf * (error > 0), error)
        error = error.nan_to_num(nan=0.0, posinf=math.inf)
    return Bounded(value, error, precision)


def _linear(operation: Callable[[Any, Any], Tensor]) -> Callable[..., Bounded]:
    def rule(a: Any, b: Any) -> Bounded:
        (av, ae), (bv, be) = _split(a), _split(b)
        value = operation(av, bv)
        return _rounded(value, torch.zeros_like(value) + ae + be, _precision(a, b))

    return rule


def _mul(a: Any, b: Any) -> Any:
    for mask, other in ((a, b), (b, a)):
        if isinstance(mask, Decision):
            return _where(mask, other, other * 0)
    (av, ae), (bv, be) = _split(a), _split(b)
    value = torch.as_tensor(av * bv)
    error = _product(_abs(av), be) + _product(_abs(bv), ae) + _product(ae, be)
    return _rounded(value, error + torch.zeros_like(value), _precision(a, b))


def _product(magnitude: Any, error: Any) -> Any:
    """0 * inf is 0 here: no error times anything is no error."""
    return torch.nan_to_num(torch.as_tensor(magnitude, dtype=torch.float64) * error, nan=0.0, posinf=math.inf)


def _abs(x: Any) -> Any:
    return x.abs() if isinstance(x, Tensor) else abs(x)


def _div(a: Any, b: Any) -> Bounded:
    (av, ae), (bv, be) = _split(a), _split(b)
    value = torch.as_tensor(av / bv)
    nearest = torch.as_tensor(_abs(bv) - be, dtype=torch.float64).clamp_min(0)
    error = torch.as_tensor((ae + _product(_abs(value), be)) / nearest)
    error = torch.where(torch.as_tensor(ae == 0) & torch.as_tensor(be == 0), 0.0, error)
    result = _rounded(value, error + torch.zeros_like(value), _precision(a, b))
    certain_nan = torch.as_tensor((av == 0) & (bv == 0) & (ae == 0) & (be == 0))  # 0/0, however it is rounded
    return Bounded(result.value, result.error.masked_fill(certain_nan, 0.0), result.precision)


def _monotone(
    function: Callable[..., Tensor], units: float, *, at_ends: Callable[..., Tensor] | None = None
) -> Callable[..., Bounded]:
    """Rule for an elementwise function that is monotone where it matters: its bound is read off at both ends.

    `at_ends` takes its place there where an end may stick out of its domain.
    """

    def rule(x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
        args, kwargs = tuple(value_of(a) for a in args), {k: value_of(v) for k, v in kwargs.items()}
        value = function(x.value, *args, **kwargs)
        above, below = ((at_ends or function)(end, *args, **kwargs) for end in (x.upper, x.lower))
        spread = torch.maximum(_gap(above, value), _gap(below, value))
        spread = torch.where(x.error == 0, 0.0, spread)
        return _rounded(value, spread, x.precision, units) if units else Bounded(value, spread, x.precision)

    return rule


def _clamp(x: Bounded, min: float | None = None, max: float | None = None) -> Bounded:
    """Where a limit applies that the precision cannot hold, the result is off by the limit's own rounding."""
    result = _monotone(torch.clamp, 0.0)(x, min=min, max=max)
    limits = torch.zeros_like(result.value)
    for limit in (limit for limit in (min, max) if limit is not None):
        at_limit = (result.value - limit).abs() <= x.precision.unit * abs(limit)
        limits = torch.where(at_limit, float(limit), limits)
    return Bounded(result.value, result.error + _rounded(limits, limits * 0, x.precision).error, x.precision)


def _sigmoid(x: Bounded) -> Bounded:
    """Saturated ones are exactly 1, however the formula is arranged."""
    result = _monotone(torch.sigmoid, 4.0)(x)
    return Bounded(result.value, result.error.masked_fill(x.lower > _SATURATED, 0.0), x.precision)


def _sqrt_rule(x: Bounded) -> Bounded:
    """Not every PyTorch build rounds it correctly, but that of an exact 1 is 1."""
    result = _monotone(torch.sqrt, 2.0, at_ends=_sqrt)(x)
    return Bounded(result.value, result.error.masked_fill((x.value == 1) & (x.error == 0), 0.0), x.precision)


def _softmax(x: Bounded, dim: int) -> Any:
    shifted = (x - x.amax(dim, keepdim=True)).exp()
    return shifted / shifted.sum(dim, keepdim=True)


def _log_softmax(x: Bounded, dim: int) -> Any:
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _gap(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, torch.nan_to_num((a - b).abs(), nan=math.inf, posinf=math.inf))


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(0).log()


def _log1p(x: Tensor) -> Tensor:
    return x.clamp_min(-1).log1p()


def _sqrt(x: Tensor) -> Tensor:
    return x.clamp_min(0).sqrt()


def _pow(x: Any, exponent: float) -> Any:
    if exponent == 2:
        return _mul(x, x)
    if exponent == 0.5:
        return _RULES["sqrt"](x)
    return _monotone(lambda t: t.clamp_min(0) ** exponent, 2.0 * max(1.0, abs(exponent)))(x)


def _power_of(x: Bounded, base: float) -> Bounded:
    """``base ** x``: its relative error grows with the exponent's size."""
    result = _monotone(lambda t: torch.as_tensor(base, dtype=torch.float64) ** t, 2.0)(x)
    extra = result.precision.unit * math.log(base) * x.value.abs() * result.value.abs()
    return Bounded(result.value, torch.nan_to_num(result.error + extra, nan=0.0, posinf=math.inf), x.precision)


def _sum(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(x, Decision):
        return x.value.sum() if dim is None else x.value.sum(dim, keepdim)
    dims = tuple(range(x.ndim)) if dim is None else dim
    terms = math.prod(x.shape[d] for d in ((dims,) if isinstance(dims, int) else dims))
    add: Callable[[Tensor], Tensor] = (lambda t: t.sum()) if dim is None else (lambda t: t.sum(dim, keepdim))
    value, propagated, magnitude = add(x.value), add(x.error), add(x.value.abs())
    if terms <= 1:
        return Bounded(value, propagated, x.precision)
    # Exact in any order only if all terms, and so all partial sums, are multiples of a step that is not too fine.
    _, exponent = torch.frexp(x.value.abs().sum(dims, keepdim=True))
    steps = torch.ldexp(x.value, x.precision.bits - exponent)
    exact = (propagated == 0) & ((steps != steps.round()).sum(dims, keepdim=keepdim) == 0)
    added = ((x.value != 0) | (x.error > 0)).sum(dims, keepdim=keepdim)  # adding zero commits no error
    own = (added - 1).clamp(min=0) * x.precision.unit * magnitude
    own = torch.nan_to_num(own, nan=0.0, posinf=math.inf)
    return _rounded(value, propagated + own.masked_fill(exact, 0.0), x.precision)


def _prod(x: Bounded, dim: int) -> Bounded:
    parts = [x.select(dim, i) for i in range(x.shape[dim])]
    result: Bounded = parts[0]
    for part in parts[1:]:
        result = _mul(result, part)
    return result


def _where(condition: Any, a: Any, b: Any) -> Any:
    """Choose; where the choice itself is ambiguous, the bound covers both branches."""
    mask = value_of(condition)
    if not (isinstance(a, Bounded) or isinstance(b, Bounded)):
        return torch.where(mask, value_of(a), value_of(b))
    (av, ae), (bv, be) = _split(a), _split(b)
    value = torch.where(mask, av, bv)
    error = torch.where(mask, ae, be) + torch.zeros_like(value)
    if isinstance(condition, Decision) and bool(condition.ambiguous.any()):
        other, other_error = torch.where(mask, bv, av), torch.where(mask, be, ae)
        error = torch.where(condition.ambiguous, torch.maximum(error, _gap(other, value) + other_error), error)
    return Bounded(value, error, _precision(a, b))


def _extreme(name: str) -> Callable[..., Any]:
    """max/min of two operands: as in the exact case, off by at most the larger error."""
    pick = torch.maximum if name == "maximum" else torch.minimum

    def rule(a: Any, b: Any) -> Bounded:
        like = _precision(a, b)
        (av, ae), (bv, be) = _split(a), _split(b)
        av, bv = torch.as_tensor(av, dtype=torch.float64), torch.as_tensor(bv, dtype=torch.float64)
        value = pick(av, bv)
        low, high = pick(av - ae, bv - be), pick(av + ae, bv + be)
        return Bounded(value, torch.maximum(_gap(low, value), _gap(high, value)), like)

    return rule


def _extreme_over(pick: Callable[..., Tensor]) -> Callable[..., Bounded]:
    def rule(x: Bounded, dim: Any, keepdim: bool = False) -> Bounded:
        value, low, high = (pick(t, dim=dim, keepdim=keepdim) for t in (x.value, x.lower, x.upper))
        return Bounded(value, torch.maximum(_gap(low, value), _gap(high, value)), x.precision)

    return rule


# --------------------------------------------------------------------------------------------------- decisions
def _compare(operation: Callable[[Any, Any], Tensor]) -> Callable[..., Decision]:
    def rule(a: Any, b: Any) -> Decision:
        (av, ae), (bv, be) = _split(a), _split(b)
        error = torch.as_tensor(ae + be, dtype=torch.float64)
        distance = _gap(torch.as_tensor(av, dtype=torch.float64), torch.as_tensor(bv, dtype=torch.float64))
        margin = torch.where(error == 0, math.inf, distance / error)
        value = operation(av, bv)
        return Decision(value, margin.expand_as(value))

    return rule


def _decision(x: Any) -> Decision:
    if isinstance(x, Decision):
        return x
    return Decision(x, torch.full(x.shape, math.inf, dtype=torch.float64, device=x.device))


def _and(a: Any, b: Any) -> Decision:
    a, b = _decision(a), _decision(b)
    both_true, both_false = a.value & b.value, ~a.value & ~b.value
    lone_false = torch.where(a.value, b.margin, a.margin)
    margin = torch.where(
        both_true,
        torch.minimum(a.margin, b.margin),
        torch.where(both_false, torch.maximum(a.margin, b.margin), lone_false),
    )
    return Decision(both_true, margin)


def _not(a: Decision) -> Decision:
    return Decision(~a.value, a.margin)


def _or(a: Any, b: Any) -> Decision:
    return _not(_and(_not(_decision(a)), _not(_decision(b))))


def _all(x: Decision, dim: int, keepdim: bool = False) -> Decision:
    value = x.value.all(dim, keepdim)
    if x.value.shape[dim] == 0:
        return _decision(value)
    weakest_true = x.margin.masked_fill(~x.value, math.inf).amin(dim, keepdim)
    strongest_false = x.margin.masked_fill(x.value, 0.0).amax(dim, keepdim)
    return Decision(value, torch.where(value, weakest_true, strongest_false))


def _any(x: Decision, dim: int, keepdim: bool = False) -> Decision:
    return _not(_all(_not(x), dim, keepdim))


# --------------------------------------------------------------------------------------------------- structure
def _structural(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)
    return lambda x, *args, **kwargs: x._map(lambda t: method(t, *(value_of(a) for a in args), **kwargs))


def _joined(join: Callable[..., Tensor]) -> Callable[..., Any]:
    def rule(parts: Sequence[Any], dim: int = 0) -> Any:
        if all(isinstance(p, Decision) for p in parts):
            return Decision(join([p.value for p in parts], dim), join([p.margin for p in parts], dim))
        split = [_split(p) for p in parts]
        errors = [torch.zeros_like(v) + e for v, e in split]
        return Bounded(join([v for v, _ in split], dim), join(errors, dim), _precision(*parts))

    return rule


def _unbind(x: Any, dim: int = 0) -> tuple[Any, ...]:
    return tuple(x.select(dim, i) for i in range(x.shape[dim]))


def _split_sizes(x: Any, sizes: Any, dim: int = 0) -> tuple[Any, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _like(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: function(x.value, *args, **kwargs)


def _new_tensor(x: Bounded, data: Any) -> Bounded:
    """Constants in the precision, which may not hold them exactly."""
    value = x.value.new_tensor(data)
    return _rounded(value, torch.zeros_like(value), x.precision)


def _square(x: Bounded) -> Any:
    return _mul(x, x)


def _bce_with_logits(
    logits: Any, targets: Any, *, reduction: str, pos_weight: Bounded | None = None, **_: Any
) -> Bounded:
    """Binary cross entropy from logits, elementwise: max(x, 0) - x * t + log(1 + exp(-|x|)).

    PyTorch subtracts log(sigmoid(x)) from (1 - t) * x, so that terms as large as x cancel: the error is one of x.
    """
    if reduction != "none":
        raise NotImplementedError("sum the elementwise loss instead, so that its error is known")
    if not isinstance(logits, Bounded):
        logits = Bounded(logits.double(), torch.zeros_like(logits.double()), targets.precision)
    loss: Bounded = logits.clamp(min=0) - logits * targets + (-logits.abs()).exp().log1p()
    cancelled = 2 * logits.precision.unit * logits.value.abs().nan_to_num(nan=0.0, posinf=0.0)
    if pos_weight is not None:
        present = targets * (pos_weight - 1) + 1
        loss = logits * (1 - targets) + present * ((-logits).clamp(min=0) + (-logits.abs()).exp().log1p())
        cancelled = cancelled * present.value.abs().clamp(min=1)
    return Bounded(loss.value, loss.error + cancelled, loss.precision)


def _bce(probability: Bounded, targets: Tensor, *, reduction: str, **_: Any) -> Bounded:
    """Binary cross entropy from probabilities, elementwise, each logarithm clamped at -100."""
    if reduction != "none":
        raise NotImplementedError("sum the elementwise loss instead, so that its error is known")
    present, absent = log_at_least(probability, -100.0), log_at_least(-probability, -100.0, torch.log1p)
    return -(present * targets + absent * (1 - targets))  # type: ignore[no-any-return]


def _cross_entropy(
    logits: Bounded,
    target: Tensor,
    *,
    reduction: str,
    weight: Bounded | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Any:
    """Cross entropy of rows of logits against class indices: log of the exponentials' sum, less the class's logit."""
    if reduction != "none":
        raise NotImplementedError("sum the elementwise loss instead, so that its error is known")
    largest = logits.value.amax(1)
    log_sum = (logits - largest[:, None]).exp().sum(1).log() + largest
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    loss = log_sum - logits.gather(1, index[:, None])[:, 0]
    return torch.where(kept, loss if weight is None else loss * weight[index], 0.0)


def _smooth_l1(predicted: Any, target: Any, *, reduction: str, **_: Any) -> Bounded:
    """Smooth L1 loss with beta 1, elementwise."""
    if reduction != "none":
        raise NotImplementedError("sum the elementwise loss instead, so that its error is known")
    distance = (predicted - target).abs()
    return _monotone(lambda d: torch.where(d < 1, 0.5 * d * d, d - 0.5), 2.0)(distance)


def _mean(x: Bounded, dim: Any = None, keepdim: bool = False) -> Bounded:
    total = _sum(x, dim, keepdim)
    return _div(total, x.value.numel() / max(total.value.numel(), 1))


def _abs_rule(x: Bounded) -> Bounded:
    return Bounded(x.value.abs(), x.error, x.precision)


_STRUCTURAL = (
    "reshape",
    "view",
    "flatten",
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "expand",
    "select",
    "narrow",
    "index_select",
    "gather",
    "contiguous",
    "clone",
    "movedim",
    "t",
    "repeat_interleave",
    "expand_as",
    "masked_select",
)
_RULES: dict[str, Callable[..., Any]] = {
    **{name: _structural(name) for name in _STRUCTURAL},
    "__getitem__": lambda x, index: x[index],
    "cat": _joined(torch.cat), "stack": _joined(torch.stack), "unbind": _unbind, "split": _split_sizes,
    "split_with_sizes": _split_sizes, "detach": lambda x: x, "zeros_like": _like(torch.zeros_like),
    "ones_like": _like(torch.ones_like), "full_like": _like(torch.full_like), "double": lambda x: x,
    "new_zeros": _like(Tensor.new_zeros), "new_full": _like(Tensor.new_full), "new_tensor": _new_tensor,
    "numel": _like(Tensor.numel), "size": _like(Tensor.size), "dim": _like(Tensor.dim), "to": lambda x, *_, **__: x,
    "isnan": _like(torch.isnan), "isfinite": _like(torch.isfinite), "isinf": _like(torch.isinf),
    "add": _linear(lambda a, b: a + b), "sub": _linear(lambda a, b: a - b), "mul": _mul, "div": _div,
    "true_divide": _div, "neg": lambda x: Bounded(-x.value, x.error, x.precision), "abs": _abs_rule,
    "pow": _pow, "rpow": _power_of, "square": _square,
    "binary_cross_entropy_with_logits": _bce_with_logits, "binary_cross_entropy": _bce,
    "cross_entropy": _cross_entropy, "smooth_l1_loss": _smooth_l1, "exp": _monotone(torch.exp, 2.0),
    "log": _monotone(torch.log, 2.0, at_ends=_log),
    "log1p": _monotone(torch.log1p, 2.0, at_ends=_log1p), "sqrt": _sqrt_rule, "sigmoid": _sigmoid,
    "atan": _monotone(torch.atan, 2.0), "softplus": _monotone(torch.nn.functional.softplus, 4.0),
    "clamp": _clamp, "softmax": _softmax, "log_softmax": _log_softmax, "long": lambda x: x.value.long(),
    "clamp_min": _monotone(torch.clamp_min, 0.0),
    "clamp_max": _monotone(torch.clamp_max, 0.0), "floor": _monotone(torch.floor, 0.0),
    "sum": _sum, "mean": _mean, "prod": _prod, "where": _where, "maximum": _extreme("maximum"),
    "minimum": _extreme("minimum"), "amax": _extreme_over(torch.amax), "amin": _extreme_over(torch.amin),
    "gt": _compare(lambda a, b: a > b), "lt": _compare(lambda a, b: a < b), "ge": _compare(lambda a, b: a >= b),
    "le": _compare(lambda a, b: a <= b), "logical_and": _and, "logical_or": _or, "logical_not": _not,
    "bitwise_and": _and, "bitwise_or": _or, "bitwise_not": _not, "all": _all, "any": _any,
}  # fmt: skip
