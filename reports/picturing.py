"""From one judged image to a `Picture`: what the oracle assigned, and what an implementation did."""

from __future__ import annotations

from torch import Tensor

from detoracle.properties.systems import Canvas
from detoracle.reference.explain.explanation import Explanation
from detoracle.reports.record import Picture, Row

__all__ = ["picture_of"]


def picture_of(row: Row, canvas: Canvas, explanation: Explanation, given: Tensor | None) -> Picture:
    """The first image on which an implementation is wrong; the first of all if it is nowhere.

    Parameters
    ----------
    row : Row
        What the picture belongs to.
    canvas : Canvas
        Boxes and anchors, from `System.canvas`.
    explanation : Explanation
        What could rightly be assigned.
    given : Tensor (B, A) int or None
        What the implementation assigned; None for the oracle's assignment twice.

    Returns
    -------
    Picture

    Examples
    --------
    >>> from detoracle.properties.checking import cases
    >>> from detoracle.properties.comparison import expect
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> from detoracle.properties.systems import find_operation
    >>> system, operation = find_operation("yolox.assign")
    >>> case = next(cases(system, operation, edge_cases()[0]))
    >>> canvas = system.canvas(operation.name, dict(case.arguments))
    >>> explanation = expect(system, operation, case.arguments).explanation
    >>> row = Row(operation.name, "mine", case.scene.name, case.setting, "equal")
    >>> picture_of(row, canvas, explanation, None).image
    0
    """
    given = explanation.gt_index if given is None else given
    wrong = explanation.wrong(given.long()).any(1).nonzero().flatten().tolist()
    image = wrong[0] if wrong else 0
    valid = canvas.gt_valid[image]
    number = int(valid.nonzero().max()) + 1 if valid.any() else 0  # indices count padding in between
    return Picture(
        operation=row.operation,
        implementation=row.implementation,
        scene=row.scene,
        setting=row.setting,
        image=image,
        size=canvas.size,
        gt_boxes=canvas.gt_boxes[image, :number].tolist(),
        gt_labels=canvas.gt_labels[image, :number].tolist(),
        anchor_points=canvas.anchor_points.tolist(),
        anchor_strides=canvas.anchor_strides.tolist(),
        expected=explanation.gt_index[image].tolist(),
        given=given[image].tolist(),
        margin=explanation.margin[image].tolist(),
    )
