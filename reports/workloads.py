"""Workloads of the bench: one call of an operation, of a given size.

A workload is a number of images, ground truths an image, anchors an image and classes. Its images are realistic ones:
everyday photographs or crowds. The kind matters as much as the number: at 100 ground truths an image, those of
everyday size hold some fifty times the anchor points of those in a crowd.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from detoracle.properties.checking import Case, cases
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation, arguments_of
from detoracle.reference.errors import InputError

__all__ = ["STANDARD_ANCHORS", "Workload", "hash_of", "images_of", "rolled", "sides", "workload_case"]

_PRESETS: Mapping[str, Literal["coco", "crowd"]] = {"realistic": "coco", "crowd": "crowd"}
_MOST_EVERYDAY = 51  # ground truths; fuller images are crowds
_STEP = 32  # pixels between image sides that are tried for a number of anchors
_LARGEST = 2048
_STRIDES = {"anchor_head": (8, 16, 32, 64, 128)}  # others have the scene's own
_SSD_SIDE = 300

STANDARD_ANCHORS: Mapping[str, int] = {
    "yolox": 8400,
    "ssd": 8732,
    "anchor_head": 76_725,
    "rtmdet": 8400,
    "yolov8": 8400,
}
"""Anchors of each system at its published input size: 640 pixels, 300 for SSD."""


@dataclass(frozen=True)
class Workload:
    """Size of one call.

    Attributes
    ----------
    batch, gts, anchors, classes : int
        Images; ground truths and anchors an image; classes, without background.

    Examples
    --------
    >>> str(Workload(16, 20, 8400, 80))
    '16x20'
    >>> str(Workload(4, 5, 2100, 80))
    '4x5, 2100 anchors'
    """

    batch: int
    gts: int
    anchors: int
    classes: int

    def __str__(self) -> str:
        """Images by ground truths, and what is not usual."""
        usual = self.anchors in STANDARD_ANCHORS.values()
        return (
            f"{self.batch}x{self.gts}"
            + ("" if usual else f", {self.anchors} anchors")
            + ("" if self.classes in (80, 20) else f", {self.classes} classes")
        )


def sides(system: str) -> dict[int, int]:
    """Image sides in pixels by the number of anchors that a square image of that side has.

    Examples
    --------
    >>> sides("yolov8")[8400], sides("anchor_head")[76725], sides("ssd")
    (640, 640, {8732: 300})
    """
    if system == "ssd":
        return {STANDARD_ANCHORS["ssd"]: _SSD_SIDE}
    per_cell = 9 if system == "anchor_head" else 1
    strides = _STRIDES.get(system, (8, 16, 32))
    return {
        per_cell * sum((-(-side // stride)) ** 2 for stride in strides): side
        for side in range(_STEP, _LARGEST + 1, _STEP)
    }


def workload_case(
    system: System,
    operation: Operation,
    workload: Workload,
    *,
    seed: int = 0,
    scenes: str = "",
    setting: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Arguments of an operation at a workload's size.

    Parameters
    ----------
    system : System
    operation : Operation
    workload : Workload
    seed : int
        Decides ground truths and predictions.
    scenes : {"", "realistic", "crowd"}
        Everyday images or crowds; if empty, crowds where there are more ground truths than everyday images have.
    setting : str, optional
        Name of one of the operation's argument sets; the first if left out.
    device : str
    dtype : torch.dtype

    Returns
    -------
    Case

    Raises
    ------
    InputError
        If no image has so many anchors, or there are no such scenes or setting.

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> case = workload_case(*find_operation("yolov8.loss"), Workload(2, 5, 84, 80))
    >>> [tuple(level.shape) for level in case.arguments["raw"]]
    [(2, 144, 8, 8), (2, 144, 4, 4), (2, 144, 2, 2)]
    """
    scene = _scene(system.name, workload, scenes, seed)
    found = []
    for case in cases(system, operation, scene, device=device, dtype=dtype):
        if setting in (None, case.setting):
            return case
        found.append(case.setting)
    settings = ", ".join(map(repr, found)) or "(the operation has none at this size)"
    raise InputError("--setting", expected=f"one of {settings}", got=repr(setting), where=operation.name)


def _scene(system: str, workload: Workload, scenes: str, seed: int) -> Scene:
    if scenes not in ("", *_PRESETS):
        raise InputError("--scenes", expected=f"one of {', '.join(_PRESETS)}", got=repr(scenes), where="bench")
    table = sides(system)
    if workload.anchors not in table:
        near = sorted(table, key=lambda anchors: abs(anchors - workload.anchors))[:4]
        expected = f"as many as a square image has, such as {', '.join(map(str, sorted(near)))}"
        raise InputError("--anchors", expected=expected, got=str(workload.anchors), where=system)
    side = table[workload.anchors]
    drawn = realistic(
        _PRESETS[scenes or ("realistic" if workload.gts <= _MOST_EVERYDAY else "crowd")],
        num_images=workload.batch,
        seed=seed,
        image_size=(side, side),
        num_classes=workload.classes,
        num_gts=workload.gts,
    )
    return Scene(
        name=str(workload),
        image_size=drawn.image_size,
        num_classes=drawn.num_classes,
        gt_boxes=drawn.gt_boxes,
        gt_labels=drawn.gt_labels,
        tags=frozenset({"realistic", *(drawn.tags & {"crowd"})}),
        seed=seed,
        strides=_STRIDES.get(system, drawn.strides),
    )


def rolled(operation: Operation, arguments: Mapping[str, Any], shift: int) -> dict[str, Any]:
    """Copy arguments with the images in another order: fresh tensors, and an answer that is known.

    Parameters
    ----------
    operation : Operation
    arguments : mapping
    shift : int
        Places by which every image moves on; the last ones come first.

    Returns
    -------
    dict

    Examples
    --------
    >>> from detoracle.reference.yolox import assign
    >>> rolled(assign.operation, {"gt_labels": torch.tensor([[0], [1], [2]])}, 1)["gt_labels"].flatten().tolist()
    [2, 0, 1]
    """
    moved = copy.deepcopy(dict(arguments))
    for name in _per_image(operation, arguments):
        value = moved[name]
        moved[name] = [v.roll(shift, 0) for v in value] if isinstance(value, list) else value.roll(shift, 0)
    return moved


def images_of(operation: Operation, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Split arguments into those of one image each.

    Parameters
    ----------
    operation : Operation
    arguments : mapping

    Yields
    ------
    dict

    Examples
    --------
    >>> from detoracle.reference.yolox import assign
    >>> [one["gt_labels"].tolist() for one in images_of(assign.operation, {"gt_labels": torch.tensor([[4], [5]])})]
    [[[4]], [[5]]]
    """
    names = set(_per_image(operation, arguments))
    first = [arguments[name] for name in names]
    number = len(first[0][0] if isinstance(first[0], list) else first[0]) if first else 0

    def one(value: Any, image: int) -> Any:
        return [one(v, image) for v in value] if isinstance(value, list) else value[image : image + 1]

    for image in range(number):
        yield {name: one(value, image) if name in names else value for name, value in arguments.items()}


def hash_of(arguments: Mapping[str, Any]) -> str:
    """Hash of arguments, bit for bit.

    Parameters
    ----------
    arguments : mapping

    Returns
    -------
    str
        16 hexadecimal digits.

    Examples
    --------
    >>> hash_of({"a": torch.zeros(2)}) == hash_of({"a": torch.zeros(2)})
    True
    >>> hash_of({"a": torch.zeros(2)}) == hash_of({"a": -torch.zeros(2)})
    False
    """
    digest = hashlib.sha256()
    for name, value in sorted(arguments.items()):
        for item in value if isinstance(value, list) else [value]:
            digest.update(f"{name} {item.dtype} {tuple(item.shape)}".encode() if isinstance(item, Tensor) else b"")
            exact = item.detach().cpu().contiguous().view(-1).view(torch.uint8) if isinstance(item, Tensor) else None
            digest.update(f"{name} {item!r}".encode() if exact is None else exact.numpy().data)
    return digest.hexdigest()[:16]


def _per_image(operation: Operation, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Names of the arguments whose first axis is the images."""
    for argument in arguments_of(operation.oracle):
        if argument.name in arguments and argument.tensor is not None and argument.tensor[0][:1] == ("B",):
            value = arguments[argument.name]
            if isinstance(value, Tensor | list):
                yield argument.name
