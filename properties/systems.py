"""What the suite knows of one system: how a scene becomes arguments, and how its results are explained."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from detoracle.properties.scenes import Scene
from detoracle.reference.contract import Operation
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["NAMES", "Canvas", "System", "every_operation", "every_system", "find_operation", "system_of"]

NAMES = ("yolox", "ssd", "anchor_head", "rtmdet", "yolov8")
Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Canvas:
    """What a picture of an operation's arguments shows.

    Attributes
    ----------
    size : tuple of float
        Height and width of the image in pixels.
    gt_boxes : Tensor (B, G, 4) float
        xyxy pixels.
    gt_labels : Tensor (B, G) int
    gt_valid : Tensor (B, G) bool
    anchor_points : Tensor (A, 2) float
        Pixels; the centres of anchor boxes.
    anchor_strides : Tensor (A,) float
    """

    size: tuple[float, float]
    gt_boxes: Tensor
    gt_labels: Tensor
    gt_valid: Tensor
    anchor_points: Tensor
    anchor_strides: Tensor


@dataclass(frozen=True)
class System:
    """One of the five systems.

    Attributes
    ----------
    name : str
    operations : tuple of Operation
        Those of the system, and of the box functions it alone uses.
    shared : frozenset of str
        Names of native inputs that are not per image, such as strides; all others have the images first.
    native : callable
        Turns a `Scene` into the system's native input, with ``gt_boxes``, ``gt_labels`` and ``gt_valid`` padded.
    arguments : callable
        Operation name and native input to the argument sets to call it with, by a short name of the setting.
    explain : mapping of str to callable
        Per operation: same arguments plus ``dtype``; returns an `Explanation` for an assignment and a loss, and bounded
        outputs otherwise. An operation of kind ``values`` without one runs its oracle on bounded inputs.
    loss_given : mapping of str to callable
        Per loss: its value for a given assignment.
    canvas : callable
        Operation name and arguments to what a picture of them shows, or None if they have no image.
    safe : callable
        Where the oracle raises a named behaviour: arguments whose result a safe implementation may return instead, or
        None.
    """

    name: str
    operations: tuple[Operation, ...]
    shared: frozenset[str]
    native: Callable[[Scene], Arguments]
    arguments: Callable[[str, Arguments], Iterator[tuple[str, Arguments]]]
    explain: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    loss_given: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    canvas: Callable[[str, Arguments], Canvas | None] = lambda _operation, _arguments: None
    safe: Callable[[UpstreamRaises, Arguments], Arguments | None] = lambda _behaviour, _arguments: None


def system_of(name: str) -> System:
    """Look a system up.

    Examples
    --------
    >>> system_of("yolox").operations[0].name
    'yolox.decode'
    """
    if name not in NAMES:
        raise InputError("system", expected=f"one of {', '.join(NAMES)}", got=repr(name))
    system: System = importlib.import_module(f"detoracle.properties.{name}").SYSTEM
    return system


def every_system() -> tuple[System, ...]:
    """All systems, in the suite's order."""
    return tuple(system_of(name) for name in NAMES)


def every_operation() -> tuple[tuple[System, Operation], ...]:
    """All operations with the system that brings their scenes.

    Examples
    --------
    >>> "boxes.iou_yolox" in [operation.name for _, operation in every_operation()]
    True
    """
    return tuple((system, operation) for system in every_system() for operation in system.operations)


def find_operation(name: str) -> tuple[System, Operation]:
    """Find an operation by name.

    Raises
    ------
    InputError
        Naming the nearest ones.

    Examples
    --------
    >>> find_operation("yolox.assign")[1].kind
    'assignment'
    """
    prefix = name.partition(".")[0]
    systems = (system_of(prefix),) if prefix in NAMES else every_system()
    table = {operation.name: (system, operation) for system in systems for operation in system.operations}
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3) or sorted(table)
        raise InputError("operation", expected=f"one of {', '.join(near)}", got=repr(name), fix="See 'detoracle list'.")
    return table[name]
