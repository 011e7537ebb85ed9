"""Laws of memory: how numbers are stored, how they are cut into calls and how often one asks does not matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.laws.axes import (
    along,
    axis_of,
    has,
    joined,
    mapped,
    narrowed,
    row_symbol,
    size_of,
    with_tensors,
)
from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Operation, arguments_of, returns_of

__all__ = ["LAWS"]


def _again(question: Question) -> FollowUp:
    return FollowUp((question.arguments,), _as_it_is)


def _as_it_is(outcomes: Sequence[Outcome]) -> Outcome:
    return outcomes[0]


def _laid_out_otherwise(question: Question) -> FollowUp:
    """Axes stored in reverse, and every number followed by a zero that is not part of the tensor."""

    def change(tensor: Tensor) -> Tensor:
        axes = list(range(tensor.ndim))[::-1]
        stored = tensor.permute(axes)
        return torch.stack([stored, torch.zeros_like(stored)], dim=-1)[..., 0].permute(axes)

    return FollowUp((_tensors(question.arguments, change),), _as_it_is)


def _tensors(arguments: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: with_tensors(value, change) for name, value in arguments.items()}


def _expanded(question: Question) -> FollowUp | None:
    """Each image shown twice by a stride of zero; even images answer by the first showing, odd ones by the second."""
    operation, number = question.operation, size_of(question.operation, question.arguments, "B")

    def shown_twice(image: int) -> dict[str, Any]:
        return along(
            operation, question.arguments, "B", lambda t, axis: t.narrow(axis, image, 1).expand(*_doubled(t, axis))
        )

    def back(outcomes: Sequence[Outcome]) -> Outcome:
        seen = [mapped(operation, o, "B", narrowed(image % 2, 1)) for image, o in enumerate(outcomes)]
        return joined(operation, seen, "B")

    return FollowUp(tuple(shown_twice(image) for image in range(number)), back)


def _doubled(tensor: Tensor, axis: int) -> list[int]:
    return [2 if place == axis % tensor.ndim else side for place, side in enumerate(tensor.shape)]


def _in_halves(question: Question) -> FollowUp | None:
    """Rows that do not know of each other, in two calls."""
    operation, symbol = question.operation, row_symbol(question.operation) or ""
    number = size_of(operation, question.arguments, symbol)
    if number < 2:
        return None
    parts = (narrowed(0, number // 2), narrowed(number // 2, number - number // 2))
    calls = tuple(along(operation, question.arguments, symbol, part) for part in parts)
    return FollowUp(calls, lambda outcomes: joined(operation, outcomes, symbol))


def _in_double(question: Question) -> FollowUp:
    return FollowUp((_tensors(question.arguments, lambda t: t.double() if t.is_floating_point() else t),), None)


def _always(operation: Operation) -> bool:
    return any(argument.tensor for argument in arguments_of(operation.oracle))


def _answers_images(operation: Operation) -> bool:
    return has(operation, "B") and axis_of(returns_of(operation.oracle)[0], "B") is not None


def _goes_by_row(operation: Operation) -> bool:
    symbol, outputs = row_symbol(operation), returns_of(operation.oracle)
    return operation.kind == "values" and symbol is not None and all(axis_of(o, symbol) is not None for o in outputs)


LAWS = (
    Law("deterministic", "The same call twice gives the same bits.", _always, _again, bitwise=True),
    Law("any-layout", "How the numbers of a tensor lie in memory does not matter.", _always, _laid_out_otherwise),
    Law("expanded", "Images of a batch that share their memory get the answers of one.", _answers_images, _expanded),
    Law("chunked", "Rows in two calls get the answers of one call.", _goes_by_row, _in_halves),
    Law("float64", "Inputs in float64 get answers of that precision.", _always, _in_double),
)
