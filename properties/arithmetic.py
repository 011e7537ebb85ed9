"""Right implementations that round differently: what must not be called wrong.

Each arithmetic runs any implementation, forward and backward, in a way that compilers, libraries and accelerators do:
sums in another order, products fused with the sum that follows, or all of it in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from detoracle.implementations.registry import Implementation
from detoracle.properties.checking import cases
from detoracle.properties.comparison import expect
from detoracle.properties.outputs import Outcome, normalised, perform
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation

__all__ = ["ARITHMETICS", "Alarms", "false_alarms"]

_aten = torch.ops.aten


# -------------------------------------------------------------------------------------------------- sums in any order
class _Permuted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reductions over permuted copies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        change = _CHANGES.get(function)
        return function(*(change(self._order, args) if change else args), **(kwargs or {}))

    def _order(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)


Order = Callable[[int], Tensor]


def _all_of_it(order: Order, args: Sequence[Any]) -> list[Any]:
    tensor = args[0]
    return [tensor.flatten()[order(tensor.numel()).to(tensor.device)].view_as(tensor), *args[1:]]


def _along(order: Order, args: Sequence[Any]) -> list[Any]:
    """Along the dimensions that the second argument names; none of them names all."""
    tensor, dims = args[0], args[1] if len(args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims or range(tensor.ndim)
    for dim in dims if tensor.ndim else ():
        tensor = tensor.index_select(dim, order(tensor.shape[dim]).to(tensor.device))
    return [tensor, *args[1:]]


def _inner(first: int) -> Callable[[Order, Sequence[Any]], list[Any]]:
    """The inner dimension of a product of the arguments ``first`` and ``first + 1``."""

    def change(order: Order, args: Sequence[Any]) -> list[Any]:
        changed = list(args)
        taken = order(args[first].shape[-1]).to(args[first].device)
        changed[first] = args[first].index_select(-1, taken)
        changed[first + 1] = args[first + 1].index_select(-2, taken)
        return changed

    return change


def _pairs(order: Order, args: Sequence[Any]) -> list[Any]:
    """A loss of two tensors of one shape, if it is reduced: both in the same new order."""
    if args[0].shape != args[1].shape or 0 in args[2:]:
        return list(args)
    taken = order(args[0].numel()).to(args[0].device)
    return [*(t.flatten()[taken].view_as(t) for t in args[:2]), *args[2:]]


_CHANGES: dict[Any, Callable[[Order, Sequence[Any]], list[Any]]] = {
    _aten.sum.default: _all_of_it,
    _aten.mean.default: _all_of_it,
    _aten.prod.default: _all_of_it,
    _aten.sum.dim_IntList: _along,
    _aten.mean.dim: _along,
    _aten.prod.dim_int: _along,
    _aten.logsumexp.default: _along,
    _aten.linalg_vector_norm.default: lambda order, args: [_along(order, [args[0], *args[2:3]])[0], *args[1:]],
    _aten.mm.default: _inner(0),
    _aten.bmm.default: _inner(0),
    _aten.addmm.default: _inner(1),
    _aten.smooth_l1_loss.default: lambda order, args: _pairs(order, args) if len(args) > 2 else list(args),
    _aten.mse_loss.default: lambda order, args: _pairs(order, args) if len(args) > 2 else list(args),
}


# --------------------------------------------------------------------------------------------------- multiply and add
class _Fused(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A product that is added to something is not rounded before, as by a fused multiply-add."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (_aten.add.Tensor, _aten.sub.Tensor) and isinstance(args[1], Tensor):
            sign = -1.0 if function is _aten.sub.Tensor else 1.0
            fused = self._fused(args[0], args[1], sign * kwargs.get("alpha", 1))
            if fused is not None:
                return fused
        found = function(*args, **kwargs)
        if function is _aten.mul.Tensor and found.dtype == torch.float32:
            factors = [f if isinstance(f, Tensor) else torch.tensor(f) for f in args]
            self._products[found] = (found._version, [(f, f._version) for f in factors])
        return found

    def _fused(self, left: Tensor, right: Tensor, scale: float) -> Tensor | None:
        if torch.result_type(left, right) != torch.float32:
            return None
        exact = self._exact(left), self._exact(right)
        if exact[0] is not None:
            return (exact[0] + scale * right.double()).float()
        return None if exact[1] is None else (left.double() + scale * exact[1]).float()

    def _exact(self, tensor: Tensor) -> Tensor | None:
        """The product behind a tensor in double precision, which holds it exactly; None if it is none by now."""
        version, factors = self._products.get(tensor, (None, ()))
        if tensor._version != version or any(f._version != v for f, v in factors):
            return None
        exact: Tensor = factors[0][0].double() * factors[1][0].double()
        return exact


# ------------------------------------------------------------------------------------------------------ all in double
def _in_double(operation: Operation, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Outcome:
    def cast(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, list):
            return [cast(v, change) for v in value]
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def doubled(**given: Any) -> Any:
        outputs = normalised(operation, call(**{name: cast(v, Tensor.double) for name, v in given.items()}))
        rounded = {name: cast(output, Tensor.float) for name, output in outputs.items()}
        return list(rounded.values()) if any("[" in name for name in rounded) else rounded

    return perform(operation, doubled, arguments)


def _under(mode: Callable[[], TorchDispatchMode]) -> Callable[..., Outcome]:
    def run(operation: Operation, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Outcome:
        with mode():
            return perform(operation, call, arguments)

    return run


_RANGE = 80.0  # the exponential of its negative is the last that float32 holds in full


def _leaves_range(operation: Operation, arguments: Mapping[str, Any]) -> bool:
    """Do logits underflow by SSD's published formula, which takes the whole batch's maximum off, but not in float64?"""
    conf = arguments.get("conf")
    return operation.name.startswith("ssd.") and conf is not None and bool((conf.amax() - conf.amax(-1) > _RANGE).any())


ARITHMETICS: Mapping[str, Callable[[Operation, Callable[..., Any], Mapping[str, Any]], Outcome]] = {
    "as it is": perform,
    "permuted": _under(_Permuted),
    "fused": _under(_Fused),
    "double": _in_double,
}
"""Ways to run a float32 implementation, by name; each takes what `perform` takes."""


# -------------------------------------------------------------------------------------------------------- false alarms
@dataclass(frozen=True)
class Alarms:
    """Calls of right implementations in one arithmetic, and those that were called wrong.

    Attributes
    ----------
    implementation, arithmetic : str
    calls : int
    alarms : tuple of str
        Scene, clause and message of each call that was called wrong.
    """

    implementation: str
    arithmetic: str
    calls: int
    alarms: tuple[str, ...]


def false_alarms(
    system: System, operation: Operation, implementations: Sequence[Implementation], scenes: Iterator[Scene]
) -> tuple[Alarms, ...]:
    """Judge right implementations of one operation in every arithmetic.

    Parameters
    ----------
    system : System
    operation : Operation
    implementations : sequence of Implementation
        Right ones.
    scenes : iterator of Scene

    Returns
    -------
    tuple of Alarms
        One for each implementation and arithmetic.

    Examples
    --------
    >>> from detoracle.implementations.registry import discover
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> from detoracle.properties.systems import find_operation
    >>> mine = [one for one in discover() if one.operation == "boxes.iou_yolox"]
    >>> found = false_alarms(*find_operation("boxes.iou_yolox"), mine, iter(edge_cases()[:2]))
    >>> {alarms.arithmetic for alarms in found} == ARITHMETICS.keys(), [a for alarms in found for a in alarms.alarms]
    (True, [])
    """
    loaded = [(one.name, one.load()) for one in implementations]
    runs = [(name, call, arithmetic) for name, call in loaded for arithmetic in ARITHMETICS]
    calls = {(name, arithmetic): 0 for name, _, arithmetic in runs}
    alarms: dict[tuple[str, str], list[str]] = {key: [] for key in calls}
    for scene in scenes:
        for case in cases(system, operation, scene):
            expectation = expect(system, operation, case.arguments)
            for name, call, arithmetic in runs:
                if arithmetic == "double" and _leaves_range(operation, case.arguments):
                    continue
                calls[name, arithmetic] += 1
                verdict = expectation.judge(ARITHMETICS[arithmetic](operation, call, case.arguments))
                if verdict.wrong:
                    first = verdict.findings[0]
                    alarms[name, arithmetic].append(f"{case.name}: {first.clause} {first.where}: {first.message}")
    return tuple(Alarms(*key, calls[key], tuple(found)) for key, found in alarms.items())
