"""The table of error rules: for every torch function that an oracle uses, what it makes of bounds and margins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.bounded import Bounded, Decision, value_of
from detoracle.reference.rounding_arithmetic import (
    _clamp,
    _div,
    _exponential,
    _extreme,
    _extreme_over,
    _gap,
    _linear,
    _log,
    _log1p,
    _log_softmax,
    _magnitude,
    _mean,
    _monotone,
    _mul,
    _neg,
    _operand,
    _operands,
    _pow,
    _power_of,
    _precision,
    _prod,
    _rounded,
    _sigmoid,
    _softmax,
    _square,
    _square_root,
    _sum,
    _where,
    log_at_least,
)

__all__ = ["RULES"]


# --------------------------------------------------------------------------------------------------- decisions
def _compare(operation: Callable[[Any, Any], Tensor]) -> Callable[..., Decision]:
    def rule(a: Any, b: Any) -> Decision:
        (av, ae), (bv, be), _ = _operands(a, b)
        error = torch.as_tensor(ae + be, dtype=torch.float64)
        distance = _gap(torch.as_tensor(av, dtype=torch.float64), torch.as_tensor(bv, dtype=torch.float64))
        margin = torch.where(error == 0, math.inf, (distance / error).nan_to_num(nan=0.0, posinf=math.inf))
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
        precision = _precision(*parts)
        values, errors = zip(*(_operand(part, precision) for part in parts), strict=True)
        errors = tuple(torch.zeros_like(value) + error for value, error in zip(values, errors, strict=True))
        return Bounded(join(values, dim), join(errors, dim), precision)

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


# ------------------------------------------------------------------------------------------------------- losses
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
    error = (loss.error + cancelled).masked_fill(logits.value.isinf(), math.inf)  # formulas differ in inf - inf
    return Bounded(loss.value, error, loss.precision)


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
RULES: dict[str, Callable[..., Any]] = {
    **{name: _structural(name) for name in _STRUCTURAL},
    "__getitem__": lambda x, index: x[index],
    "cat": _joined(torch.cat), "stack": _joined(torch.stack), "unbind": _unbind, "split": _split_sizes,
    "split_with_sizes": _split_sizes, "detach": lambda x: x, "zeros_like": _like(torch.zeros_like),
    "ones_like": _like(torch.ones_like), "full_like": _like(torch.full_like), "double": lambda x: x,
    "new_zeros": _like(Tensor.new_zeros), "new_full": _like(Tensor.new_full), "new_tensor": _new_tensor,
    "numel": _like(Tensor.numel), "size": _like(Tensor.size), "dim": _like(Tensor.dim), "to": lambda x, *_, **__: x,
    "isnan": _like(torch.isnan), "isfinite": _like(torch.isfinite), "isinf": _like(torch.isinf),
    "add": _linear(lambda a, b: a + b), "sub": _linear(lambda a, b: a - b), "mul": _mul, "div": _div,
    "true_divide": _div, "neg": _neg, "abs": _magnitude,
    "pow": _pow, "rpow": _power_of, "square": _square,
    "binary_cross_entropy_with_logits": _bce_with_logits, "binary_cross_entropy": _bce,
    "cross_entropy": _cross_entropy, "smooth_l1_loss": _smooth_l1, "exp": _exponential(torch.exp, 2.0),
    "log": _monotone(torch.log, 2.0, at_ends=_log),
    "log1p": _monotone(torch.log1p, 2.0, at_ends=_log1p), "sqrt": _square_root, "sigmoid": _sigmoid,
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
