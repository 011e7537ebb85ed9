"""Change tensors along an axis that a contract names, such as the images B, wherever an operation has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Argument, Operation, arguments_of, returns_of

__all__ = ["Change", "along", "axis_of", "has", "joined", "mapped", "narrowed", "row_symbol", "size_of", "with_tensors"]

Change = Callable[[Tensor, int], Tensor]


def axis_of(argument: Argument, symbol: str) -> int | None:
    """Axis of a documented tensor, counted from the end; None if it has no such axis.

    Examples
    --------
    >>> axis_of(Argument("gt_boxes", "Tensor (B, G, 4) float", "", False), "G")
    -2
    """
    shape = argument.tensor[0] if argument.tensor else ()
    return shape.index(symbol) - len(shape) if symbol in shape else None


def has(operation: Operation, *symbols: str) -> bool:
    """Has some input each of the named axes?

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> has(boxes.iou_yolox.operation, "G", "N"), has(boxes.iou_yolox.operation, "B")
    (True, False)
    """
    inputs = arguments_of(operation.oracle)
    return all(any(axis_of(argument, symbol) is not None for argument in inputs) for symbol in symbols)


def row_symbol(operation: Operation) -> str | None:
    """Name of the axis along which all rows or anchors lie; None if they have none, or lie in maps.

    Examples
    --------
    >>> from detoracle.reference import ssd, yolox, yolox_loss
    >>> row_symbol(ssd.match.operation), row_symbol(yolox.assign.operation), row_symbol(yolox_loss.loss.operation)
    ('P', 'A', None)
    """
    inputs = [argument.tensor for argument in arguments_of(operation.oracle) if argument.tensor]
    symbol = next((symbol for symbol in ("A", "P", "N") if has(operation, symbol)), None)
    hidden = any(is_list or ("..." in shape and symbol not in shape) for shape, _, is_list in inputs)
    return None if hidden else symbol


def size_of(operation: Operation, arguments: Mapping[str, Any], symbol: str) -> int:
    """Size of a named axis; 0 if no argument has it.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> size_of(boxes.iou_yolox.operation, {"boxes_a": torch.zeros(3, 4), "boxes_b": torch.zeros(2, 4)}, "G")
    3
    """
    for argument in arguments_of(operation.oracle):
        axis, value = axis_of(argument, symbol), arguments.get(argument.name)
        if axis is not None and value is not None:
            return int((value[0] if isinstance(value, list) else value).shape[axis])
    return 0


def along(operation: Operation, arguments: Mapping[str, Any], symbol: str, change: Change) -> dict[str, Any]:
    """Arguments with a change made to every tensor that has an axis.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.zeros(3, 4), "boxes_b": torch.zeros(2, 4)}
    >>> fewer = along(boxes.iou_yolox.operation, pair, "G", lambda tensor, axis: tensor.narrow(axis, 0, 1))
    >>> [len(boxes) for boxes in fewer.values()]
    [1, 2]
    """
    changed = dict(arguments)
    for argument in arguments_of(operation.oracle):
        axis, value = axis_of(argument, symbol), arguments.get(argument.name)
        if axis is not None and value is not None:
            changed[argument.name] = with_tensors(value, lambda tensor, axis=axis: change(tensor, axis))  # type: ignore[misc]
    return changed


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Value with a change made to it, or to each tensor of a list.

    Examples
    --------
    >>> with_tensors([torch.zeros(1), 8], lambda tensor: tensor + 1)
    [tensor([1.]), 8]
    """
    if isinstance(value, list):
        return [with_tensors(item, change) for item in value]
    return change(value) if isinstance(value, Tensor) else value


def narrowed(start: int, length: int) -> Change:
    """Change that keeps some of an axis.

    Examples
    --------
    >>> narrowed(1, 2)(torch.arange(4), 0).tolist()
    [1, 2]
    """
    return lambda tensor, axis: tensor.narrow(axis, start, length)


def mapped(operation: Operation, outcome: Outcome, symbol: str, change: Change) -> Outcome:
    """Outcome with a change made to every output and gradient that has an axis.

    Gradients are left out unless they are those of a single number: the weights of other outputs' gradients go by
    position, and would move.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> outcome = Outcome({"iou": torch.zeros(3, 2)})
    >>> mapped(boxes.iou_yolox.operation, outcome, "N", narrowed(0, 1)).outputs["iou"].shape
    torch.Size([3, 1])
    """
    outputs, inputs = ({a.name: a for a in of(operation.oracle)} for of in (returns_of, arguments_of))

    def one(documented: Argument, tensor: Tensor | None) -> Any:
        axis = axis_of(documented, symbol)
        return tensor if axis is None or tensor is None else change(tensor, axis)

    of_a_number = outcome.outputs[next(iter(outputs))].ndim == 0
    gradients = outcome.gradients if of_a_number else {}
    return Outcome(
        {name: one(outputs[name], output) for name, output in outcome.outputs.items()},
        {name: one(inputs[name.partition("[")[0]], gradient) for name, gradient in gradients.items()},
    )


def joined(operation: Operation, outcomes: Sequence[Outcome], symbol: str) -> Outcome:
    """Outputs of several outcomes, one after the other along an axis; gradients are left out.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> outcome = Outcome({"iou": torch.zeros(3, 2)})
    >>> joined(boxes.iou_yolox.operation, [outcome, outcome], "N").outputs["iou"].shape
    torch.Size([3, 4])
    """
    outputs = {}
    for documented in returns_of(operation.oracle):
        axis, name = axis_of(documented, symbol), documented.name
        if axis is not None and all(name in outcome.outputs for outcome in outcomes):
            outputs[name] = torch.cat([outcome.outputs[name] for outcome in outcomes], dim=axis)
    return Outcome(outputs)
