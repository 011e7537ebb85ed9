"""Error rules of arithmetic: what an operation makes of its operands' errors, and the rounding it commits itself.

A NaN is certain, with a bound of 0, where no operand carries an error or one of them is a certain NaN: every evaluation
must give it. Any other NaN has an infinite bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.bounded import Bounded, Decision, Precision, value_of

__all__ = ["log_at_least", "log_ratio"]

_SATURATED = 40.0  # exp(-40) added to 1 is lost in every precision

Operand = tuple[Any, Any]  # value and error: tensors, or numbers


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
    result = _rounded(value, _spread(x, value, above, below), x.precision, 2.0)
    return Bounded(result.value, result.error.masked_fill(above == low, 0.0), x.precision)


def log_ratio(a: Any, b: Any) -> Any:
    """Logarithm of a quotient, which is as right as a difference of logarithms: its bound admits both.

    Parameters
    ----------
    a, b : Tensor or Bounded

    Examples
    --------
    >>> import torch
    >>> wide, narrow = torch.tensor([512.0]), torch.tensor([500.0])
    >>> apart = torch.log(wide) - torch.log(narrow) - torch.log(wide.double() / narrow.double())
    >>> quotient, bound = log_ratio(wide, narrow), log_ratio(Bounded.exact(wide, torch.float32), narrow)
    >>> quotient.equal(torch.log(wide / narrow)), bool(apart.abs() < bound.error)
    (True, True)
    """
    logarithm = torch.log(a / b)
    if not isinstance(logarithm, Bounded):
        return logarithm
    sizes = sum(value_of(x).double().abs().log().abs() for x in (a, b))
    apart = (2 * logarithm.precision.unit * sizes).masked_fill(~logarithm.value.isfinite(), 0.0)
    return Bounded(logarithm.value, logarithm.error + apart, logarithm.precision)


# ---------------------------------------------------------------------------------------------------- operands
def _precision(*xs: Any) -> Precision:
    """Of mixed operands the finest, to which PyTorch promotes the others."""
    return min((x.precision for x in xs if isinstance(x, Bounded)), key=lambda precision: precision.unit)


def _operand(x: Any, precision: Precision) -> Operand:
    """Value and error; tensors and decisions are exact, and so are numbers that the precision holds."""
    if isinstance(x, Bounded):
        return x.value, x.error
    x = value_of(x)
    return (x.double(), 0.0) if isinstance(x, Tensor) else (x, precision.error_of(x))


def _operands(a: Any, b: Any) -> tuple[Operand, Operand, Precision]:
    precision = _precision(a, b)
    return _operand(a, precision), _operand(b, precision), precision


def _certainly_nan(x: Tensor, *operands: Operand) -> Tensor:
    """Where a NaN, come from these operands, comes from them in every evaluation: in wider ones less overflows."""
    certain = torch.ones_like(x, dtype=torch.bool)
    for value, error in operands:
        finite = value.isfinite() if isinstance(value, Tensor) else True
        certain = certain & torch.as_tensor(error == 0, device=x.device) & finite
    for value, error in operands:
        if isinstance(value, Tensor):
            certain = certain | (value.isnan() & torch.as_tensor(error == 0, device=x.device))
    return certain & x.isnan()


def _certain_nan(x: Bounded) -> Tensor:
    """NaN where it is certain, 0 elsewhere."""
    return torch.where(x.value.isnan() & (x.error == 0), math.nan, 0.0)


def _product(magnitude: Any, error: Any) -> Any:
    """0 * inf is 0 here: no error times anything is no error."""
    return torch.nan_to_num(torch.as_tensor(magnitude, dtype=torch.float64) * error, nan=0.0, posinf=math.inf)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, torch.nan_to_num((a - b).abs(), nan=math.inf, posinf=math.inf))


def _spread(x: Bounded, value: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Error that a monotone function's operand leaves to its `value`, given the values at both ends."""
    return torch.maximum(_gap(above, value), _gap(below, value)).masked_fill(x.error == 0, 0.0)


# ---------------------------------------------------------------------------------------------------- rounding
def _rounded(
    value: Tensor, error: Tensor, precision: Precision, units: float = 1.0, operands: tuple[Operand, ...] = ()
) -> Bounded:
    """Add the operation's own rounding; emulate the precision's overflow and underflow.

    A NaN is certain if `operands` make it so; without any, if `error` is 0.
    """
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
    bound = torch.nan_to_num(error + own, nan=math.inf, posinf=math.inf)
    if not bool((magnitude + bound).amax() <= precision.largest if value.numel() else True):
        overflow = magnitude - bound > precision.largest
        value = torch.where(overflow, value.sign() * math.inf, value)
        bound = torch.where(overflow | value.isinf(), 0.0, bound)
        bound = torch.where(value.abs() + bound > precision.largest, math.inf * (bound > 0), bound)
        bound = bound.nan_to_num(nan=0.0, posinf=math.inf)
        certain = _certainly_nan(value, *operands) if operands else value.isnan() & from_exact
        bound = bound.masked_fill(certain, 0.0)
    return Bounded(value, bound, precision)


def _linear(operation: Callable[[Any, Any], Tensor]) -> Callable[..., Bounded]:
    def rule(a: Any, b: Any) -> Bounded:
        (av, ae), (bv, be), precision = _operands(a, b)
        value = operation(av, bv)
        error = torch.zeros_like(value) + _unless_lost(ae, value, bv) + _unless_lost(be, value, av)
        return _rounded(value, error, precision, operands=((av, ae), (bv, be)))

    return rule


def _unless_lost(error: Any, total: Tensor, other: Any) -> Any:
    """A number's error in a sum: none where the number itself, such as an epsilon, is lost beside the `other` term."""
    return error * (total.abs() != _abs(other)).double() if isinstance(error, float) and error else error


def _abs(x: Any) -> Any:
    return x.abs() if isinstance(x, Tensor) else abs(x)


def _mul(a: Any, b: Any) -> Any:
    for mask, other in ((a, b), (b, a)):
        if isinstance(mask, Decision):
            return _where(mask, other, other * 0)
    (av, ae), (bv, be), precision = _operands(a, b)
    value = torch.as_tensor(av * bv)
    error = _product(_abs(av), be) + _product(_abs(bv), ae) + _product(ae, be)
    return _rounded(value, error + torch.zeros_like(value), precision, operands=((av, ae), (bv, be)))


def _div(a: Any, b: Any) -> Bounded:
    (av, ae), (bv, be), precision = _operands(a, b)
    value = torch.as_tensor(av / bv)
    nearest = torch.as_tensor(_abs(bv) - be, dtype=torch.float64).clamp_min(0)
    error = torch.as_tensor((ae + _product(_abs(value), be)) / nearest)
    error = torch.where(torch.as_tensor(ae == 0) & torch.as_tensor(be == 0), 0.0, error)
    return _rounded(value, error + torch.zeros_like(value), precision, operands=((av, ae), (bv, be)))


def _neg(x: Bounded) -> Bounded:
    return Bounded(-x.value, x.error, x.precision)


def _magnitude(x: Bounded) -> Bounded:
    return Bounded(x.value.abs(), x.error, x.precision)


def _square(x: Bounded) -> Any:
    return _mul(x, x)


# --------------------------------------------------------------------------------------------------- functions
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
        spread = _spread(x, value, above, below)
        return _rounded(value, spread, x.precision, units) if units else Bounded(value, spread, x.precision)

    return rule


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(0).log()


def _log1p(x: Tensor) -> Tensor:
    return x.clamp_min(-1).log1p()


def _sqrt(x: Tensor) -> Tensor:
    return x.clamp_min(0).sqrt()


def _clamp(x: Bounded, min: float | None = None, max: float | None = None) -> Bounded:
    """Where a limit applies that the precision cannot hold, the result is off by the limit's own rounding."""
    result = _monotone(torch.clamp, 0.0)(x, min=min, max=max)
    error = result.error
    for limit in (min, max):
        off = 0.0 if limit is None else x.precision.error_of(limit)
        if limit is not None and off:
            error = error + off * ((result.value - limit).abs() <= off)
    return Bounded(result.value, error, x.precision)


def _exponential(function: Callable[[Tensor], Tensor], units: float) -> Callable[[Bounded], Bounded]:
    """Rule for an exponential, which hardware takes in base 2: its argument is rounded once more."""
    rule = _monotone(function, units)

    def of_rounded(x: Bounded) -> Bounded:
        once_more = x.precision.unit * x.value.abs().nan_to_num(posinf=0.0)
        return rule(Bounded(x.value, x.error + once_more, x.precision))

    return of_rounded


def _sigmoid(x: Bounded) -> Bounded:
    """Saturated ones are exactly 1, however the formula is arranged."""
    result = _exponential(torch.sigmoid, 4.0)(x)
    return Bounded(result.value, result.error.masked_fill(x.lower > _SATURATED, 0.0), x.precision)


def _square_root(x: Bounded) -> Bounded:
    """Not every PyTorch build rounds it correctly, but that of an exact 1 is 1."""
    result = _monotone(torch.sqrt, 2.0, at_ends=_sqrt)(x)
    return Bounded(result.value, result.error.masked_fill((x.value == 1) & (x.error == 0), 0.0), x.precision)


def _pow(x: Any, exponent: float) -> Any:
    if exponent == 2:
        return _mul(x, x)
    if exponent == 0.5:
        return _square_root(x)
    return _monotone(lambda t: t.clamp_min(0) ** exponent, 2.0 * max(1.0, abs(exponent)))(x)


def _power_of(x: Bounded, base: float) -> Bounded:
    """``base ** x``."""
    return _exponential(lambda t: torch.as_tensor(base, dtype=torch.float64) ** t, 2.0)(x)


# -------------------------------------------------------------------------------------------------- reductions
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
    operands = ((value, propagated), (add(_certain_nan(x)), 0.0)) if bool(value.isnan().any()) else ()
    return _rounded(value, propagated + own.masked_fill(exact, 0.0), x.precision, operands=operands)


def _mean(x: Bounded, dim: Any = None, keepdim: bool = False) -> Bounded:
    total = _sum(x, dim, keepdim)
    return _div(total, x.value.numel() / max(total.value.numel(), 1))


def _prod(x: Bounded, dim: int) -> Bounded:
    parts = [x.select(dim, i) for i in range(x.shape[dim])]
    result: Bounded = parts[0]
    for part in parts[1:]:
        result = _mul(result, part)
    return result


def _softmax(x: Bounded, dim: int) -> Any:
    shifted = (x - x.amax(dim, keepdim=True)).exp()
    return shifted / shifted.sum(dim, keepdim=True)


def _log_softmax(x: Bounded, dim: int) -> Any:
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


# ------------------------------------------------------------------------------------------------------ choices
def _where(condition: Any, a: Any, b: Any) -> Any:
    """Choose; where the choice itself is ambiguous, the bound covers both branches."""
    mask = value_of(condition)
    if not (isinstance(a, Bounded) or isinstance(b, Bounded)):
        return torch.where(mask, value_of(a), value_of(b))
    (av, ae), (bv, be), precision = _operands(a, b)
    value = torch.where(mask, av, bv)
    error = torch.where(mask, ae, be) + torch.zeros_like(value)
    if isinstance(condition, Decision) and bool(condition.ambiguous.any()):
        other, other_error = torch.where(mask, bv, av), torch.where(mask, be, ae)
        error = torch.where(condition.ambiguous, torch.maximum(error, _gap(other, value) + other_error), error)
    return Bounded(value, error, precision)


def _extreme(name: str) -> Callable[..., Any]:
    """max/min of two operands: as in the exact case, off by at most the larger error."""
    pick = torch.maximum if name == "maximum" else torch.minimum

    def rule(a: Any, b: Any) -> Bounded:
        (av, ae), (bv, be), precision = _operands(a, b)
        av, bv = torch.as_tensor(av, dtype=torch.float64), torch.as_tensor(bv, dtype=torch.float64)
        value = pick(av, bv)
        low, high = pick(av - ae, bv - be), pick(av + ae, bv + be)
        error = torch.maximum(_gap(low, value), _gap(high, value))
        return Bounded(value, error.masked_fill(_certainly_nan(value, (av, ae), (bv, be)), 0.0), precision)

    return rule


def _extreme_over(pick: Callable[..., Tensor]) -> Callable[..., Bounded]:
    def rule(x: Bounded, dim: Any, keepdim: bool = False) -> Bounded:
        value, low, high = (pick(t, dim=dim, keepdim=keepdim) for t in (x.value, x.lower, x.upper))
        error = torch.maximum(_gap(low, value), _gap(high, value))
        if bool(value.isnan().any()):
            error = error.masked_fill(pick(_certain_nan(x), dim=dim, keepdim=keepdim).isnan(), 0.0)
        return Bounded(value, error, x.precision)

    return rule
