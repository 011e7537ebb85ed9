"""What a right gradient is: the oracle's in float64, and how far rounding may take it from there.

The bound is measured, not guessed: by the error that the plain oracle makes in the dtype under test, and by how much
the float64 gradient moves when every input, and the result of every operation, moves by one rounding. Both are taken
at their largest over an anchor's channels. A random move may by luck have little effect, so a gradient that is out of
bounds is judged by more of them, and by those of the same formula written another way. At a kink the derivatives of
both sides are right, and where the output is NaN, so is a gradient of NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.kinks import OtherSide
from detoracle.properties.outputs import perform
from detoracle.properties.rearranged import Rearranged
from detoracle.properties.shaken import Shaken
from detoracle.reference.contract import Operation, returns_of

__all__ = ["RightGradient", "in_float64", "right_gradients", "tensors_of"]

_DRAWS = 2  # times that all numbers are moved at first ...
_MOST_DRAWS = 16  # ... and at most, before a gradient is wrong
_CLEARLY_WRONG = 16.0  # times its bound, and beyond every other's too: from there no more draws are asked for


@dataclass(eq=False)
class RightGradient:
    """Gradient to one input.

    Attributes
    ----------
    exact, bound : Tensor float64
        Gradient in float64, and its bound.
    judged : Tensor bool
        False where the plain oracle overflows or is NaN: a finite gradient is no worse there.
    more : iterator of Tensor float64
        Bounds by more moves.
    may_be_nan : Tensor bool
        True where what is differentiated is NaN.
    otherwise : callable
        Bound that admits the derivatives of both sides of every kink, and another way to write the formula.
    """

    exact: Tensor
    bound: Tensor
    judged: Tensor
    more: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    may_be_nan: Tensor = field(default_factory=lambda: torch.tensor(False))
    otherwise: Callable[[], Tensor] = lambda: torch.zeros(())

    def wrong(self, given: Tensor) -> Tensor:
        """Elements of a gradient of the same shape that are out of bounds."""
        wrong = self._outside(given, self.bound)
        if bool(wrong.any()):
            self.bound = torch.maximum(self.bound, self.otherwise())
            wrong = self._outside(given, self.bound)
        while bool(wrong.any()) and not self._clearly_wrong(given):
            wider = next(self.more, None)
            if wider is None:
                break
            self.bound = torch.maximum(self.bound, wider)
            wrong = self._outside(given, self.bound)
        return wrong

    def _clearly_wrong(self, given: Tensor) -> bool:
        # Where all is cancellation, an element that no draw has moved yet may err as much as one that was moved.
        largest = self.bound.nan_to_num(posinf=0.0).amax()
        return bool(self._outside(given, torch.maximum(_CLEARLY_WRONG * self.bound, largest)).any())

    def _outside(self, given: Tensor, bound: Tensor) -> Tensor:
        return outside(given, self.exact, bound) & self.judged & ~(given.isnan() & self.may_be_nan)


def right_gradients(
    operation: Operation, call: Callable[..., Any], arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, RightGradient]:
    """Work out the gradients to all differentiable inputs of an operation.

    Parameters
    ----------
    operation : Operation
    call : callable
        The oracle, or its loss of a given assignment.
    arguments : mapping
        Keyword arguments of `call`.
    dtype : torch.dtype
        Dtype under test.

    Returns
    -------
    dict of str to RightGradient
        By input name, ``raw[0]`` for lists. Without those that the oracle has no gradient to.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> one = torch.tensor([[4.0, 4, 4, 4]])
    >>> pair = {"predicted": one, "target": one + 1, "variant": "iou"}
    >>> right = right_gradients(boxes.iou_loss_yolox.operation, boxes.iou_loss_yolox, pair, torch.float32)
    >>> right["predicted"].wrong(right["predicted"].exact * 1.001).any().item()
    True
    """
    if not operation.gradients:
        return {}
    double = in_float64(arguments)
    plain, exact = (perform(operation, call, given) for given in (arguments, double))
    moves: list[Mapping[str, Tensor | None]] = []

    def move(number: int) -> Mapping[str, Tensor | None]:
        """Gradients to all inputs when they and all results have moved; none where the oracle raises there."""
        while len(moves) <= number:
            moved = _moved(double, dtype, len(moves))
            with Shaken(dtype, *_pair(len(moves))):
                moves.append(perform(operation, call, moved).gradients)
        return moves[number]

    @cache
    def other_ways() -> tuple[Mapping[str, Tensor | None], ...]:
        """Gradients to all inputs by the derivatives of either side of every kink, and by rearranged formulas."""
        ways = []
        for first in (True, False):
            with OtherSide(first=first):
                ways.append(perform(operation, call, double).gradients)
        for number in range(_DRAWS):
            with Shaken(dtype, *_pair(number)), Rearranged():
                ways.append(perform(operation, call, double).gradients)
        return tuple(ways)

    def otherwise(name: str, gradient: Tensor) -> Tensor:
        ways = (way.get(name) for way in other_ways())
        bounds = [gradient_bound(gradient, way, row=_row(gradient), dtype=dtype) for way in ways if way is not None]
        return torch.stack([torch.zeros_like(gradient), *(bound.expand_as(gradient) for bound in bounds)]).amax(0)

    undefined = exact.outputs[returns_of(operation.oracle)[0].name].isnan() if exact.outputs else None
    found = {}
    for name, gradient in exact.gradients.items():
        coarse = plain.gradients.get(name)
        if gradient is None or coarse is None or undefined is None:
            continue
        bounds = _moved_bounds(name, gradient, move, dtype)
        bound = gradient_bound(gradient, coarse, row=_row(gradient)).expand_as(gradient)
        for _ in range(_DRAWS):
            bound = torch.maximum(bound, next(bounds))
        nan = _undefined(undefined, gradient)
        found[name] = RightGradient(gradient, bound, coarse.isfinite(), bounds, nan, partial(otherwise, name, gradient))
    return found


def _undefined(output: Tensor, gradient: Tensor) -> Tensor:
    """Elements of a gradient that some NaN of the output, given as a mask, depends on: its row where both have rows."""
    if output.ndim and len(output) == len(gradient):
        rows = output.flatten(1).any(1) if output.ndim > 1 else output
        return rows.view(-1, *[1] * (gradient.ndim - 1)).expand_as(gradient)
    return output.any().expand_as(gradient)


def _moved_bounds(
    name: str, exact: Tensor, move: Callable[[int], Mapping[str, Tensor | None]], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Bounds on a gradient by what it becomes when all numbers move."""
    for number in range(_MOST_DRAWS):
        nearby = move(number).get(name)
        bound = gradient_bound(exact, exact if nearby is None else nearby, row=_row(exact), dtype=dtype).expand_as(
            exact
        )
        yield 2 * bound if dtype == torch.float64 else bound  # there the exact one errs as much as the one to judge


def _row(gradient: Tensor) -> int:
    """Dimension of an anchor's channels."""
    return 1 if gradient.ndim == 4 else -1


def tensors_of(arguments: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors among the arguments, those in lists included.

    Examples
    --------
    >>> [len(tensor) for tensor in tensors_of({"raw": [torch.zeros(2), torch.zeros(3)], "strides": [8, 16]})]
    [2, 3]
    """
    for value in arguments.values():
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Tensor))


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with all floating tensors in float64.

    Examples
    --------
    >>> in_float64({"raw": [torch.zeros(1)]})["raw"][0].dtype
    torch.float64
    """
    return {name: _floats(value, Tensor.double) for name, value in arguments.items()}


def _floats(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_floats(v, change) for v in value]
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _pair(draw: int) -> tuple[int, int]:
    """Seed and sign of a draw: the second of a pair moves the other way, across whatever the first stayed before."""
    return draw // 2, 1 - 2 * (draw % 2)


def _moved(arguments: Mapping[str, Any], dtype: torch.dtype, draw: int) -> dict[str, Any]:
    """Every float up or down by one rounding, at random."""
    seed, sign = _pair(draw)
    generator = torch.Generator().manual_seed(seed)
    unit = sign * torch.finfo(dtype).eps / 2

    def move(tensor: Tensor) -> Tensor:
        direction = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + unit * direction)

    return {name: _floats(value, move) for name, value in arguments.items()}
