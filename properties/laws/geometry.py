"""Laws of geometry: an image that is mirrored, transposed, enlarged or moved is assigned as it was.

Mirroring negates coordinates, transposing swaps them and enlarging doubles them: all exact in floating point, so that
the changed outcome is judged as the original's. Moving rounds, and has an expectation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Operation

__all__ = ["LAWS"]

Columns = Callable[[Tensor, str], Tensor]

_BY = (64.0, 128.0)  # whole strides

_KINDS: dict[str, dict[str, str]] = {
    "yolox.candidates": {"anchor_points": "point", "anchor_strides": "length", "gt_boxes": "centre"},
    "yolox.assign": {
        "anchor_points": "point",
        "anchor_strides": "length",
        "gt_boxes": "centre",
        "predictions": "centre",
    },
    "yolox.cost": {"gt_boxes": "centre", "predictions": "centre"},
    "boxes.iou_loss_yolox": {"predicted": "centre", "target": "centre"},
    "boxes.iou_yolox": {"boxes_a": "form", "boxes_b": "form"},
    "ssd.jaccard": {"boxes_a": "corners", "boxes_b": "corners"},
    "ssd.match": {"priors": "centre", "gt_boxes": "corners", "loc_target": "offset"},
    "anchor_head.assign": {"anchors": "corners", "gt_boxes": "corners", "ignore_boxes": "corners"},
    "anchor_head.giou_loss": {"predicted": "corners", "target": "corners"},
    "boxes.overlaps_mmdet": {"boxes_a": "corners", "boxes_b": "corners"},
    "rtmdet.candidates": {"priors": "prior", "gt_boxes": "corners"},
    "rtmdet.cost": {"priors": "prior", "gt_boxes": "corners", "boxes": "corners"},
    "rtmdet.assign": {"priors": "prior", "gt_boxes": "corners", "boxes": "corners"},
    "rtmdet.giou_loss": {"predicted": "corners", "target": "corners"},
    "yolov8.align": {"anchor_points": "point", "gt_boxes": "corners", "boxes": "corners"},
    "yolov8.assign": {"anchor_points": "point", "gt_boxes": "corners", "boxes": "corners"},
    "boxes.iou_ultralytics": {"boxes_a": "form", "boxes_b": "form"},
}
"""What the first columns of an operation's inputs and outputs are."""


def _kinds(question: Question) -> Mapping[str, str]:
    kinds = _KINDS[question.operation.name]
    form = "corners" if question.arguments.get("form", "xyxy") == "xyxy" else "centre"
    return {name: form if kind == "form" else kind for name, kind in kinds.items()}


def _changed(values: Mapping[str, Any], kinds: Mapping[str, str], change: Columns) -> dict[str, Any]:
    return {n: change(v, kinds[n]) if n in kinds and v is not None else v for n, v in values.items()}


def _exact(change: Columns, back: Columns | None = None) -> Callable[[Question], FollowUp | None]:
    def follow_up(question: Question) -> FollowUp | None:
        kinds = _kinds(question)
        if question.arguments.get("gt_masks") is not None:
            return None

        def restored(outcomes: Sequence[Outcome]) -> Outcome:
            (outcome,) = outcomes
            return replace(outcome, outputs=_changed(outcome.outputs, kinds, back or change), gradients={})

        return FollowUp((_changed(question.arguments, kinds, change),), restored)

    return follow_up


def _columns(tensor: Tensor, order: Sequence[int], factors: Sequence[float]) -> Tensor:
    """First columns in another order and times factors; the rest as it is."""
    first = tensor[..., list(order)] * tensor.new_tensor(factors)
    return torch.cat([first, tensor[..., len(order) :]], dim=-1)


def _transposed(tensor: Tensor, kind: str) -> Tensor:
    if kind == "length":
        return tensor
    return _columns(tensor, (1, 0) if kind == "point" else (1, 0, 3, 2), (1, 1) if kind == "point" else (1, 1, 1, 1))


def _mirrored(tensor: Tensor, kind: str) -> Tensor:
    if kind == "corners":
        return _columns(tensor, (2, 1, 0, 3), (-1, 1, -1, 1))
    return tensor if kind == "length" else _columns(tensor, (0,), (-1,))


def _upside_down(tensor: Tensor, kind: str) -> Tensor:
    return _transposed(_mirrored(_transposed(tensor, kind), kind), kind)


def _doubled(tensor: Tensor, kind: str) -> Tensor:
    if kind == "offset":
        return tensor
    columns = {"length": 0, "point": 2}.get(kind, 4)
    return _columns(tensor, range(columns), [2] * columns) if columns else tensor * 2


def _halved(tensor: Tensor, kind: str) -> Tensor:
    columns = {"offset": 0, "point": 2}.get(kind, 4)
    return _columns(tensor, range(columns), [0.5] * columns)


def _moved(question: Question) -> FollowUp | None:
    kinds = _kinds(question)
    if question.arguments.get("gt_masks") is not None:
        return None

    def change(tensor: Tensor, kind: str) -> Tensor:
        if kind == "length":
            return tensor
        by = tensor.new_zeros(tensor.shape[-1])
        by[:2] = tensor.new_tensor(_BY)
        if kind == "corners":
            by[2:4] = by[:2]
        return tensor + by

    return FollowUp((_changed(question.arguments, kinds, change),), None)


def _concerns(operation: Operation) -> bool:
    return operation.name in _KINDS


def _in_pixels(operation: Operation) -> bool:
    return _concerns(operation) and operation.system != "ssd"


LAWS = (
    Law("mirror", "Left and right may be exchanged.", _concerns, _exact(_mirrored)),
    Law("upside-down", "Top and bottom may be exchanged.", _concerns, _exact(_upside_down)),
    Law("transpose", "x and y may be exchanged.", _concerns, _exact(_transposed)),
    Law("scale", "Pixels may be half as large.", _concerns, _exact(_doubled, _halved)),
    Law("translate", "The image may lie elsewhere, by whole strides.", _in_pixels, _moved),
)
