"""Laws of order: images, ground truths and anchors in reverse order give the same answer in reverse.

A reversal is its own inverse: what changes the arguments also maps the outcome back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.laws.axes import along, axis_of, has, mapped, row_symbol, size_of
from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Operation, returns_of

__all__ = ["LAWS", "renamed"]


def _reversed(question: Question, symbol: str) -> FollowUp | None:
    operation = question.operation
    first = returns_of(operation.oracle)[0]
    named = "(...)" not in first.type or question.answer.outputs[first.name].ndim == 0
    if not named or size_of(operation, question.arguments, symbol) < 2:
        return None
    calls = (along(operation, question.arguments, symbol, _flip),)
    return FollowUp(calls, lambda outcomes: mapped(operation, outcomes[0], symbol, _flip))


def _flip(tensor: Tensor, axis: int) -> Tensor:
    return tensor.flip(axis)


def _images(question: Question) -> FollowUp | None:
    return _reversed(question, "B")


def _have_images(operation: Operation) -> bool:
    return has(operation, "B") and _answers(operation, "B")


def _answers(operation: Operation, symbol: str) -> bool:
    """Does the answer go by the named axis, or is it a number?"""
    first = returns_of(operation.oracle)[0]
    return operation.kind == "loss" or axis_of(first, symbol) is not None or "(...)" in first.type


def _anchors(question: Question) -> FollowUp | None:
    return _reversed(question, row_symbol(question.operation) or "")


def _have_anchors(operation: Operation) -> bool:
    symbol = row_symbol(operation)
    return symbol is not None and _answers(operation, symbol)


def _ground_truths(question: Question) -> FollowUp | None:
    follow_up = _reversed(question, "G")
    last = size_of(question.operation, question.arguments, "G") - 1

    def renumber(index: Tensor) -> Tensor:
        return torch.where(index >= 0, last - index, index)

    return None if follow_up is None else renamed(follow_up, {"gt_index": renumber})


def _have_ground_truths(operation: Operation) -> bool:
    return has(operation, "G") and "(...)" not in returns_of(operation.oracle)[0].type


def renamed(follow_up: FollowUp, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> FollowUp:
    """Rename indices or labels among the inputs and outputs of a follow-up as well.

    Examples
    --------
    >>> from detoracle.properties.outputs import Outcome
    >>> plain = FollowUp(({"gt_index": torch.tensor([0])},), lambda outcomes: outcomes[0])
    >>> other = renamed(plain, {"gt_index": lambda index: 1 - index})
    >>> other.calls[0]["gt_index"].item(), other.back([Outcome({"gt_index": torch.tensor([1])})]).outputs
    (1, {'gt_index': tensor([0])})
    """
    back = follow_up.back
    assert back is not None

    def rename(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: changes[name](v) if name in changes and v is not None else v for name, v in values.items()}

    def renamed_back(outcomes: Any) -> Outcome:
        outcome = back(outcomes)
        return replace(outcome, outputs=rename(outcome.outputs))

    return FollowUp(tuple(rename(call) for call in follow_up.calls), renamed_back)


LAWS = (
    Law("permute-images", "Images in another order get the same answers in that order.", _have_images, _images),
    Law(
        "permute-gts",
        "Ground truths in another order are assigned the same anchors.",
        _have_ground_truths,
        _ground_truths,
    ),
    Law("permute-anchors", "Anchors in another order get the same answers in that order.", _have_anchors, _anchors),
)
