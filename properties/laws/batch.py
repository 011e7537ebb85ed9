"""Laws of the batch: images do not know of each other, but for the number that a loss is divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.laws.axes import Change, along, axis_of, has, joined, mapped, narrowed, size_of
from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Operation, arguments_of, returns_of
from detoracle.reference.explain.explanation import Explanation

__all__ = ["LAWS"]


def _positives(gt_index: Tensor, _quality: Tensor) -> Tensor:
    return (gt_index >= 0).sum().double()


def _total_quality(gt_index: Tensor, quality: Tensor) -> Tensor:
    return quality[gt_index >= 0].double().sum()


_DIVISORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "yolox.loss": _positives,
    "ssd.loss": _positives,
    "anchor_head.loss": _positives,
    "anchor_head.ssd_loss": _positives,
    "rtmdet.loss": _total_quality,
    "yolov8.loss": _total_quality,
}
"""What a loss is divided by, from the assignment and its quality: 1 at least, in the anchor head for each image."""

_TIMES_IMAGES = frozenset({"yolov8.loss"})  # whose total, alone of its outputs, is multiplied by the number of images


def _alone(question: Question) -> FollowUp | None:
    operation, number = question.operation, size_of(question.operation, question.arguments, "B")
    if number < 2:
        return None
    calls = tuple(along(operation, question.arguments, "B", narrowed(image, 1)) for image in range(number))
    if operation.kind != "loss":
        return FollowUp(calls, lambda outcomes: joined(operation, outcomes, "B"))
    explanation = question.expectation.explanation
    if explanation is None or bool(explanation.ambiguous.any()):
        return None  # images alone may rightly be assigned otherwise, and be divided by another number
    shares = _shares(_DIVISORS[operation.name], explanation, of_images=operation.system == "anchor_head")
    return FollowUp(calls, lambda outcomes: _added(question, outcomes, shares))


def _shares(divisor: Callable[[Tensor, Tensor], Tensor], explanation: Explanation, *, of_images: bool) -> Tensor:
    """Each image's divisor alone, as a share of the batch's."""
    gt_index = explanation.gt_index
    quality = explanation.quality(gt_index).value
    each = torch.stack([divisor(*image) for image in zip(gt_index, quality, strict=True)])
    together = each.clamp(min=1).sum() if of_images else each.sum().clamp(min=1)
    return each.clamp(min=1) / together


def _added(question: Question, outcomes: Sequence[Outcome], shares: Tensor) -> Outcome:
    """Outcome of a batch from those of its images: sums, or one after the other where there is one an image."""
    operation, outputs = question.operation, {}
    images = len(outcomes) if operation.name in _TIMES_IMAGES else 1
    for documented in returns_of(operation.oracle):
        name, factor = documented.name, images if documented.name == "total" else 1
        if all(name in outcome.outputs for outcome in outcomes):
            each = [o.outputs[name].double() * share * factor for o, share in zip(outcomes, shares, strict=True)]
            outputs[name] = torch.cat(each) if axis_of(documented, "B") is not None else torch.stack(each).sum(0)
    gradients: dict[str, Tensor | None] = {}
    for name in outcomes[0].gradients:
        found = [outcome.gradients[name] for outcome in outcomes]
        there = [g * (float(s) * images) for g, s in zip(found, shares, strict=True) if g is not None]
        gradients[name] = torch.cat(there) if len(there) == len(found) else None
    return Outcome(outputs, gradients)


def _twice(question: Question) -> FollowUp:
    """The batch followed by itself."""
    operation, number = question.operation, size_of(question.operation, question.arguments, "B")
    call = along(operation, question.arguments, "B", lambda tensor, axis: torch.cat([tensor, tensor], axis))
    return FollowUp((call,), lambda outcomes: _per_image(operation, outcomes[0], narrowed(number, number)))


def _beside_an_empty_one(question: Question) -> FollowUp | None:
    """The last image once more, in front and without ground truths."""
    operation, number = question.operation, size_of(question.operation, question.arguments, "B")
    valid = question.arguments.get("gt_valid")
    if valid is None:
        return None  # it is optional

    def change(tensor: Tensor, axis: int) -> Tensor:
        return torch.cat([tensor.narrow(axis, number - 1, 1), tensor], axis)

    call: dict[str, Any] = along(operation, question.arguments, "B", change)
    call["gt_valid"] = torch.cat([torch.zeros_like(valid[:1]), valid])

    def back(outcomes: Sequence[Outcome]) -> Outcome:
        found = _per_image(operation, outcomes[0], narrowed(1, number))
        share = number / (number + 1) if operation.name in _TIMES_IMAGES else 1
        return Outcome(found.outputs, {n: None if g is None else g * share for n, g in found.gradients.items()})

    return FollowUp((call,), back)


def _per_image(operation: Operation, outcome: Outcome, change: Change) -> Outcome:
    """Outcome of some of the images: what is not one an image, such as a sum, is left out."""
    found = mapped(operation, outcome, "B", change)
    kept = {output.name for output in returns_of(operation.oracle) if axis_of(output, "B") is not None}
    return Outcome({name: output for name, output in found.outputs.items() if name in kept}, found.gradients)


def _several(operation: Operation) -> bool:
    return has(operation, "B") and (operation.kind == "loss" or _one_an_image(operation))


def _one_an_image(operation: Operation) -> bool:
    return has(operation, "B") and axis_of(returns_of(operation.oracle)[0], "B") is not None


def _may_be_empty(operation: Operation) -> bool:
    return _several(operation) and any(argument.name == "gt_valid" for argument in arguments_of(operation.oracle))


LAWS = (
    Law(
        "split",
        "An image alone gets the answers it has in a batch; a loss differs by its divisor only.",
        _several,
        _alone,
    ),
    Law("join", "Images keep their answers when others join the batch.", _one_an_image, _twice),
    Law(
        "empty-image",
        "An image without ground truths beside the others changes nothing for them.",
        _may_be_empty,
        _beside_an_empty_one,
    ),
)
