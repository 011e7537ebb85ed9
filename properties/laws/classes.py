"""The law of classes: with the classes in reverse order, and labels renumbered alike, the answer is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.laws.axes import with_tensors
from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.laws.order import renamed
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Argument, Operation, arguments_of, returns_of

__all__ = ["LAWS"]

_PER_CELL = "Sl"  # channels of all classes of all anchors of a cell


def _follow_up(question: Question) -> FollowUp | None:
    inputs, outputs = ({a.name: a for a in of(question.operation.oracle)} for of in (arguments_of, returns_of))
    number = _num_classes(question)
    by_number = "labels" not in inputs or question.arguments.get("labels") is not None
    if number < 2 or not by_number or _shapeless(question):
        return None

    def flipped(documented: Argument, value: Any) -> Any:
        axis, first = _channels(question, documented)
        return value if axis is None else with_tensors(value, lambda t: _flip(t, axis, first, number, question))

    def back(outcomes: Sequence[Outcome]) -> Outcome:
        (outcome,) = outcomes
        found = {name: flipped(outputs[name], output) for name, output in outcome.outputs.items()}
        of_a_number = found[next(iter(outputs))].ndim == 0
        gradients = outcome.gradients if of_a_number else {}
        return Outcome(found, {name: flipped(inputs[name.partition("[")[0]], g) for name, g in gradients.items()})

    call = {name: flipped(inputs[name], value) for name, value in question.arguments.items()}
    label = _renumbered(number)
    if call.get("class_weight") is not None:
        call["class_weight"] = [*reversed(call["class_weight"][:number]), *call["class_weight"][number:]]
    if "ignore_index" in call:
        call["ignore_index"] = int(label(torch.tensor(call["ignore_index"])))
    return renamed(FollowUp((call,), back), {"gt_labels": label, "labels": label})


def _concerns(operation: Operation) -> bool:
    """Has it a channel a class, or a number of classes?"""
    inputs = arguments_of(operation.oracle)
    channels = any(_has_channels(argument) for argument in inputs)
    return channels or any(argument.name == "num_classes" for argument in inputs)


def _has_channels(documented: Argument) -> bool:
    shape = documented.tensor[0] if documented.tensor else ()
    return bool({"C", "5+C", "4*R+C", _PER_CELL} & set(shape))


def _shapeless(question: Question) -> bool:
    """Is the first output a tensor whose axes the contract does not name?"""
    first = returns_of(question.operation.oracle)[0]
    return "(...)" in first.type and question.answer.outputs[first.name].ndim > 0


def _renumbered(number: int) -> Callable[[Tensor], Tensor]:
    """Labels in reverse; what is no class stays."""

    def change(label: Tensor) -> Tensor:
        return torch.where((label >= 0) & (label < number), number - 1 - label, label)

    return change


def _num_classes(question: Question) -> int:
    arguments = question.arguments
    if "num_classes" in arguments:
        return int(arguments["num_classes"])
    for documented in arguments_of(question.operation.oracle):
        axis, first = _channels(question, documented)
        if axis is not None:
            value = arguments[documented.name]
            channels = (value[0] if isinstance(value, list) else value).shape[axis]
            if documented.tensor is not None and _PER_CELL in documented.tensor[0]:
                channels = channels // _per_cell(question) - (
                    arguments.get("class_loss", "cross_entropy") == "cross_entropy"
                )
            return int(channels - first)
    return 0


def _channels(question: Question, documented: Argument) -> tuple[int | None, int]:
    """Axis with a channel a class, and the channel of the first class."""
    shape = documented.tensor[0] if documented.tensor else ()
    for axis, dimension in enumerate(shape):
        if dimension in ("C", _PER_CELL):
            return axis - len(shape), int(question.operation.system == "ssd")
        if dimension == "5+C":
            return axis - len(shape), 5
        if dimension == "4*R+C":
            return axis - len(shape), 4 * question.arguments.get("reg_max", 16)
    return None, 0


def _per_cell(question: Question) -> int:
    """Anchors of a cell."""
    return int(question.arguments["bbox_preds"][0].shape[1] // 4)


def _flip(tensor: Tensor, axis: int, first: int, number: int, question: Question) -> Tensor:
    if "cls_scores" in question.arguments:
        by_anchor = torch.unflatten(tensor, axis, (_per_cell(question), -1))
        return _reverse(by_anchor, axis, 0, number).flatten(axis - 1, axis)
    return _reverse(tensor, axis, first, number)


def _reverse(tensor: Tensor, axis: int, first: int, number: int) -> Tensor:
    before, classes, after = torch.split(tensor, [first, number, tensor.shape[axis] - first - number], dim=axis)
    return torch.cat([before, classes.flip(axis), after], dim=axis)


LAWS = (
    Law(
        "permute-classes",
        "Classes in another order, and labels renumbered alike, change nothing.",
        _concerns,
        _follow_up,
    ),
)
