"""A stage of an assignment as a drawing; what belongs to one ground truth is shown while that is the chosen one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from markupsafe import Markup, escape

from detoracle.reference.assignment import IGNORED
from detoracle.reports.record import Picture
from detoracle.reports.scenery import PAD, View, draw_boxes, draw_levels, draw_numbers, is_known
from detoracle.reports.shapes import circle, colour_of, decimal, mark_of, outline, stamp
from detoracle.reports.stage import Layer, Stage
from detoracle.reports.text import short

__all__ = ["draw_stage"]

_SHADES = 5
_MOST_TOLD = 200  # anchors of a layer that have a tooltip
_CROSS = "m-2-2l4 4m-4 0l4-4"


def draw_stage(picture: Picture, stage: Stage, shown: Sequence[int], chosen: int | None) -> Markup:
    """Draw a stage.

    Parameters
    ----------
    picture : Picture
        Boxes and anchors.
    stage : Stage
    shown : sequence of int
        Ground truths that can be chosen; layers of others are left out.
    chosen : int or None
        The one that is chosen at first.

    Returns
    -------
    Markup
        One ``<svg>`` element without ids. Groups of the class ``of`` carry ``data-gt``; the page's style and script
        decide which of them is seen.

    Examples
    --------
    >>> picture = Picture("yolox.assign", "", "a", "", 0, (8, 8), [[0, 0, 8, 8]], [3], [[4, 4]], [8], [0], [0], [9])
    >>> stage = Stage("Claims", "", "", (Layer("ring", {0: 0.0}, {0: "anchor 0"}, gt=0),))
    >>> "<title>anchor 0</title>" in draw_stage(picture, stage, [0], 0)
    True
    """
    view = View.of(picture)
    width, height = view.width + 2 * PAD, view.height + 2 * PAD
    own: dict[int, list[str]] = {gt: [] for gt in shown}
    every: list[str] = []
    for layer in stage.layers:
        drawn = "".join(_layer(picture, view, layer))
        if layer.gt is None:
            every.append(drawn)
        elif layer.gt in own:
            own[layer.gt].append(drawn)
    title = f"{stage.name}: {picture.operation} on {picture.scene}, image {picture.image}"
    parts = [
        f'<svg class="detoracle-picture" xmlns="http://www.w3.org/2000/svg" role="img" width="{decimal(width)}"'
        f' height="{decimal(height)}" viewBox="{-PAD:g} {-PAD:g} {decimal(width)} {decimal(height)}">',
        f"<title>{escape(short(title))}</title><desc>{escape(short(stage.legend))}</desc>",
        f'<path class="paper" d="M0 0h{decimal(view.width)}v{decimal(view.height)}H0z"/>',
        *draw_levels(picture, view),
        *(_group(gt, _outline(picture, view, gt), chosen) for gt in own),
        *draw_boxes(picture, view),
        *every,
        *(_group(gt, "".join(drawn), chosen) for gt, drawn in own.items()),
        *draw_numbers(picture, view),
        "</svg>",
    ]
    return Markup("".join(parts))


def _outline(picture: Picture, view: View, gt: int) -> str:
    """The chosen ground truth's box, under its coloured one."""
    box = picture.gt_boxes[gt]
    return f'<path class="chosen-box" d="{outline(*view.box(box))}"/>' if is_known(box) else ""


def _group(gt: int, drawn: str, chosen: int | None) -> str:
    return f'<g class="of{" chosen" if gt == chosen else ""}" data-gt="{gt}">{drawn}</g>'


def _layer(picture: Picture, view: View, layer: Layer) -> Iterator[str]:
    for area in layer.areas:
        if is_known(area):
            yield f'<path class="area" d="{outline(*view.box(area))}"/>'
    places = {a: place for a in layer.values if (place := view.point(picture.anchor_points[a])) is not None}
    if layer.kind == "shade":
        yield from _shades(picture, view, layer, places)
    elif layer.kind == "mark":
        yield from _marks(view, layer, places)
    elif layer.kind == "ring":
        yield from _rings(view, layer, places)
    for anchor in list(layer.told)[:_MOST_TOLD]:
        if anchor in places:
            spot = stamp(circle(view.mark + 2), [places[anchor]])
            yield f'<path class="spot" d="{spot}"><title>{escape(short(layer.told[anchor]))}</title></path>'


def _shades(picture: Picture, view: View, layer: Layer, places: dict[int, tuple[float, float]]) -> Iterator[str]:
    """Dots, one path a shade and stride; the darkest are drawn last, and so on top."""
    groups: dict[tuple[int, float], set[tuple[float, float]]] = defaultdict(set)
    strides = sorted(set(picture.anchor_strides))
    for anchor, place in places.items():
        level = min(int(layer.values[anchor] * _SHADES), _SHADES - 1)
        groups[level, min(strides.index(picture.anchor_strides[anchor]), 4)].add(place)
    for (level, rank), found in sorted(groups.items()):
        size = decimal(view.mark * 2 * (1 + 0.2 * rank))
        yield f'<path class="shade shade-{level}" stroke-width="{size}" d="{stamp("h0", found)}"/>'


def _marks(view: View, layer: Layer, places: dict[int, tuple[float, float]]) -> Iterator[str]:
    groups: dict[int, set[tuple[float, float]]] = defaultdict(set)
    for anchor, place in places.items():
        groups[int(layer.values[anchor])].add(place)
    for gt, found in sorted(groups.items()):
        if gt == IGNORED:
            yield f'<path class="plain faint" d="{stamp(_CROSS, found)}"/>'
        else:
            yield f'<path class="mark" fill="{colour_of(gt)}" d="{stamp(mark_of(gt, view.mark), found)}"/>'


def _rings(view: View, layer: Layer, places: dict[int, tuple[float, float]]) -> Iterator[str]:
    rings = stamp(circle(view.mark + 2), set(places.values()))
    yield f'<path class="ring" d="{rings}"/>' if rings else ""
