"""The stages of an assignment on one image, as data for a page that steps through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from detoracle.properties.comparison import expect
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.picturing import picture_of
from detoracle.reports.record import Picture, Row
from detoracle.reports.stage import Run, Stage
from detoracle.reports.stages_dynamic_k import rtmdet_stages, yolox_stages
from detoracle.reports.stages_overlap import anchor_head_stages, ssd_stages
from detoracle.reports.stages_yolov8 import yolov8_stages

__all__ = ["EXPLAINED", "Story", "story_of"]

EXPLAINED: Mapping[str, Callable[[Run], Iterator[Stage]]] = {
    "yolox.assign": yolox_stages,
    "ssd.match": ssd_stages,
    "anchor_head.assign": anchor_head_stages,
    "rtmdet.assign": rtmdet_stages,
    "yolov8.assign": yolov8_stages,
}
"""Operations whose stages can be told, each with what tells them."""

_PER_IMAGE = ("gt_boxes", "gt_labels", "gt_valid")  # of a canvas


@dataclass(frozen=True)
class Story:
    """An assignment, stage by stage.

    Attributes
    ----------
    operation, scene : str
    picture : Picture
        The image, and the oracle's outcome on it.
    stages : tuple of Stage
        In the order data flows; the last is the result.
    """

    operation: str
    scene: str
    picture: Picture
    stages: tuple[Stage, ...]


def story_of(operation: str, arguments: Mapping[str, Any], *, scene: str, image: int = 0) -> Story:
    """Run the oracle's stages one by one on an image.

    Parameters
    ----------
    operation : str
        One of `EXPLAINED`.
    arguments : mapping
        Of the whole batch.
    scene : str
        What to call it.
    image : int

    Returns
    -------
    Story

    Raises
    ------
    InputError
        If the operation has no such stages, or there is no such image.
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> from detoracle.properties.checking import cases
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> case = next(cases(*find_operation("yolox.assign"), edge_cases()[0]))
    >>> [stage.name for stage in story_of("yolox.assign", case.arguments, scene=case.name).stages]
    ['Candidates', 'Cost', 'Dynamic k', 'Claims', 'Conflicts', 'Result']
    """
    if operation not in EXPLAINED:
        raise InputError("operation", expected=f"one of {', '.join(EXPLAINED)}", got=repr(operation), where="explain")
    system, found = find_operation(operation)
    images = len(arguments["gt_valid"])
    if not 0 <= image < images:
        raise InputError("image", expected=f"0 to {images - 1}", got=str(image), where=scene)
    canvas = system.canvas(operation, dict(arguments))
    explanation = expect(system, found, arguments).explanation
    if canvas is None or explanation is None:
        found.oracle(**arguments)  # says what it raises here
        raise InputError("scene", expected="one in which the oracle assigns anchors", got=scene)
    drawn = picture_of(
        Row(operation, "", scene, "", "equal"),
        replace(canvas, **{name: getattr(canvas, name)[image : image + 1] for name in _PER_IMAGE}),
        replace(explanation, worlds=explanation.worlds[image : image + 1]),
        None,
    )
    run = Run(arguments, image, explanation, canvas.anchor_strides.tolist())
    return Story(operation, scene, replace(drawn, image=image), tuple(EXPLAINED[operation](run)))
