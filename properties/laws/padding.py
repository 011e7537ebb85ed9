"""Laws of padding: rows of ground truths and anchors that take no part may hold anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.laws.axes import along, mapped, narrowed, row_symbol, size_of
from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Operation, arguments_of

__all__ = ["LAWS"]

_EXTRA = 2
_HUGE = 2.0**100
_NO_CLASS = -7
_FAR_AWAY = -(2.0**20)  # pixels, or sides of the image
_FLAGS, _PLACES = {"inside", "candidate"}, {"anchor_points", "priors"}
_GARBAGE = 1.5  # of predictions, whose NaN a sum over anchors could not be rid of


def _more_padding(question: Question) -> FollowUp | None:
    """More rows of padding, and in all of them NaN, huge numbers and no class."""
    operation, arguments = question.operation, question.arguments
    valid = arguments.get("gt_valid")
    if valid is None:
        return None  # it is optional
    padding = ~torch.cat([valid, valid.new_zeros(len(valid), _EXTRA)], dim=1)

    def change(tensor: Tensor, axis: int) -> Tensor:
        rows = tensor.transpose(axis, 1)
        longer = torch.cat([rows, rows.new_zeros(len(rows), _EXTRA, *rows.shape[2:])], dim=1)
        column = [1] * (longer.ndim - 2)
        odd = (torch.arange(longer.shape[1], device=longer.device) % 2).bool().reshape(-1, *column)
        return torch.where(padding.reshape(*padding.shape, *column), _garbage(longer, odd), longer).transpose(axis, 1)

    call: dict[str, Any] = {**along(operation, arguments, "G", change), "gt_valid": ~padding}
    return FollowUp((call,), lambda outcomes: mapped(operation, outcomes[0], "G", narrowed(0, valid.shape[1])))


def _garbage(like: Tensor, odd: Tensor) -> Tensor:
    if like.is_floating_point():
        huge = torch.full_like(like, min(_HUGE, torch.finfo(like.dtype).max))
        return torch.where(odd, torch.nan, huge)
    return torch.full_like(like, True if like.dtype == torch.bool else _NO_CLASS)


def _more_anchors(question: Question) -> FollowUp | None:
    """More anchors that take no part: told so, or too far away from every ground truth."""
    operation, arguments, symbol = question.operation, question.arguments, row_symbol(question.operation) or ""
    number = size_of(operation, arguments, symbol)

    def change(tensor: Tensor, axis: int) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = _EXTRA
        return torch.cat([tensor, tensor.new_full(shape, False if tensor.dtype == torch.bool else _GARBAGE)], dim=axis)

    call = along(operation, arguments, symbol, change)
    for place in _PLACES & call.keys():
        call[place][number:, :2] = _FAR_AWAY

    def back(outcomes: Sequence[Outcome]) -> Outcome:
        return mapped(operation, outcomes[0], symbol, narrowed(0, number))

    return FollowUp((call,), back)


def _have_padding(operation: Operation) -> bool:
    return "gt_valid" in _names(operation)


def _choose_anchors(operation: Operation) -> bool:
    return _have_padding(operation) and operation.kind != "loss" and bool(_names(operation) & (_PLACES | _FLAGS))


def _names(operation: Operation) -> set[str]:
    return {argument.name for argument in arguments_of(operation.oracle)}


LAWS = (
    Law("padding", "Rows of padding, however many, may hold anything.", _have_padding, _more_padding),
    Law("more-anchors", "Anchors that take no part change nothing for the others.", _choose_anchors, _more_anchors),
)
