"""An assignment as a drawing: ground truths, anchors, and who was given to whom.

Every drawing is one SVG element without ids or references, styled for light and dark, that stands alone as a file and
goes into a page as it is. A ground truth is told by its number, and its anchors by colour *and* shape. Anchors that
nobody gets are dots, one path a level, however many there are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reports.record import Picture
from detoracle.reports.shapes import circle, colour_of, decimal, dots, mark_of, outline, stamp
from detoracle.reports.text import short, visible

__all__ = ["draw", "draw_assignment"]

_SIDE = 400.0  # pixels of an image's longer side
_PAD = 16.0  # room about the image, for boxes that stick out
_COLUMN = 300.0  # least width of a panel, for its caption
_CAPTION, _LEGEND = 26.0, 44.0
_MOST_NAMED = 40  # ground truths whose label is written beside their number
_MOST_RINGS = 150  # differing anchors that are ringed and explain themselves; those beyond have a halo

_STYLE = (
    ".detoracle-picture{--ink:#1c2026;--paper:#fff;--faint:#9aa3ad;font:12px system-ui,sans-serif;fill:var(--ink)}"
    "@media screen and (prefers-color-scheme:dark){.detoracle-picture{--ink:#f2f4f7;--paper:#15181d;--faint:#79828d}}"
    ".detoracle-picture .halo{stroke:var(--faint);stroke-opacity:.55;stroke-linecap:round}"
    ".detoracle-picture :is(.dots,.halo,.casing,.box,.plain,.ring){fill:none;stroke-linejoin:round}"
    ".detoracle-picture .paper{fill:var(--paper);stroke:var(--faint)}"
    ".detoracle-picture .dots{stroke:var(--faint);stroke-linecap:round}"
    ".detoracle-picture .casing{stroke:var(--ink);stroke-width:3.4;stroke-opacity:.6}"
    ".detoracle-picture .box{stroke-width:2;pointer-events:all}"
    ".detoracle-picture .bad{stroke-dasharray:5 3}"
    ".detoracle-picture .mark{stroke:var(--ink);stroke-width:.7}"
    ".detoracle-picture .plain{stroke:var(--ink);stroke-width:1.2}"
    ".detoracle-picture .ring{stroke:var(--ink);stroke-width:1.6;pointer-events:all}"
    ".detoracle-picture .open{stroke-dasharray:2.5 2}"
    ".detoracle-picture .number{font-weight:600;stroke:var(--paper);stroke-width:3;paint-order:stroke}"
)


def draw(picture: Picture) -> Markup:
    """Draw what the oracle assigned beside what the implementation did, with every difference ringed.

    Parameters
    ----------
    picture : Picture
        Boxes may be inverted, huge or not finite: they are clipped or left out, and the description says so.

    Returns
    -------
    Markup
        One ``<svg>`` element.

    Examples
    --------
    >>> picture = Picture(
    ...     "yolox.assign", "mine", "one box", "", 0, (8, 8), [[0, 0, 8, 8]], [3], [[4, 4]], [8], [0], [-1], [9]
    ... )
    >>> draw(picture).count("<title>anchor 0, stride 8: expected ground truth 0, given background, margin 9</title>")
    2
    """
    differing = [a for a, (e, g) in enumerate(zip(picture.expected, picture.given, strict=True)) if e != g]
    listed = "; ".join(_difference(picture, anchor) for anchor in differing[:5])
    sides = (("oracle", picture.expected), (picture.implementation, picture.given))
    counts = " and ".join(str(sum(index >= 0 for index in outcome)) for _, outcome in sides)
    description = f"Oracle and implementation assign {counts} anchors and differ at {len(differing)}. {listed}"
    legend = [
        "Number, colour and shape tell the ground truths; a mark is an anchor assigned to one, × an ignored anchor.",
        "Ring: the two differ here, broken where rounding could decide it (margin up to 1).",
    ]
    if len(differing) > _MOST_RINGS:
        description += f". Of those, the first {_MOST_RINGS} are ringed, and the others have a grey halo"
        legend[1] += f" Grey halo: so they do, beyond the first {_MOST_RINGS}."
    title = f"{picture.operation} by {picture.implementation} on {picture.scene}, image {picture.image}"
    return _svg(picture, title, description, sides, differing, legend)


def draw_assignment(picture: Picture) -> Markup:
    """Draw the oracle's assignment alone.

    Parameters
    ----------
    picture : Picture

    Returns
    -------
    Markup
        One ``<svg>`` element.

    Examples
    --------
    >>> picture = Picture(
    ...     "yolox.assign", "", "one box", "", 0, (8, 8), [[0, 0, 8, 8]], [3], [[4, 4]], [8], [0], [0], [9]
    ... )
    >>> draw_assignment(picture).endswith("</svg>")
    True
    """
    description = f"{sum(index >= 0 for index in picture.expected)} anchors are assigned."
    legend = (
        "Number, colour and shape tell the ground truths;",
        "a mark is an anchor assigned to one, × an ignored anchor.",
    )
    title = f"{picture.operation} on {picture.scene}, image {picture.image}"
    return _svg(picture, title, description, (("oracle", picture.expected),), [], legend)


def _svg(
    picture: Picture,
    title: str,
    description: str,
    sides: Sequence[tuple[str, Sequence[int]]],
    differing: Sequence[int],
    legend: Sequence[str],
) -> Markup:
    """Panels side by side, captions above, legend below."""
    view = _View.of(picture)
    column = max(view.width + 2 * _PAD, _COLUMN)
    width, height = column * len(sides), _CAPTION + view.height + 2 * _PAD + _LEGEND
    unseen = [str(g) for g, box in enumerate(picture.gt_boxes) if not _known(box)]
    lost = f" Not drawn, for lack of a place: ground truth {', '.join(unseen[:20])}." if unseen else ""
    sizes = f"{decimal(picture.size[1])} by {decimal(picture.size[0])} pixels"
    has = f"{sizes}, {len(picture.gt_boxes)} ground truths, {len(picture.anchor_points)} anchors. "
    parts = [
        f'<svg class="detoracle-picture" xmlns="http://www.w3.org/2000/svg" role="img" width="{decimal(width)}"'
        f' height="{decimal(height)}" viewBox="0 0 {decimal(width)} {decimal(height)}">',
        f"<title>{escape(short(title))}</title><desc>{escape(visible(has + description + lost))}</desc>",
        f"<style>{_STYLE}</style>",
    ]
    for number, (name, outcome) in enumerate(sides):
        left = number * column
        caption = f"<title>{escape(short(name))}</title>{escape(short(name, 44))}"
        parts.append(f'<text x="{decimal(left + _PAD)}" y="18" font-weight="600">{caption}</text>')
        inner = "".join(_panel(picture, view, outcome, differing))
        place = f'x="{decimal(left)}" y="{decimal(_CAPTION)}"'
        size = f'width="{decimal(view.width + 2 * _PAD)}" height="{decimal(view.height + 2 * _PAD)}"'
        moved = f'<g transform="translate({decimal(_PAD)} {decimal(_PAD)})">{inner}</g>'
        parts.append(f'<svg {place} {size} overflow="hidden">{moved}</svg>')  # what sticks out is clipped
    for line, text in enumerate(legend):
        y = height - _LEGEND + 18 + 16 * line
        parts.append(f'<text x="{_PAD}" y="{decimal(y)}" font-size="11">{escape(text)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _panel(picture: Picture, view: _View, outcome: Sequence[int], differing: Sequence[int]) -> Iterator[str]:
    yield f'<path class="paper" d="M0 0h{decimal(view.width)}v{decimal(view.height)}H0z"/>'
    yield from _levels(picture, view)
    yield from _boxes(picture, view)
    yield from _halos(picture, view, differing[_MOST_RINGS:])
    yield from _marks(picture, view, outcome)
    yield from _rings(picture, view, differing[:_MOST_RINGS])
    yield from _numbers(picture, view)


@dataclass(frozen=True)
class _View:
    """How image pixels become drawn ones."""

    width: float
    height: float
    scale: float
    mark: float

    @staticmethod
    def of(picture: Picture) -> _View:
        """The whole image, or where it has no size, all that can be seen of its content."""
        height, width = picture.size
        if not (1e-6 < height < math.inf and 1e-6 < width < math.inf):
            content = [*picture.anchor_points, *(b[2:] for b in picture.gt_boxes if _known(b))]
            width, height = (max([1.0, *(p[axis] for p in content if p[axis] < math.inf)]) for axis in (0, 1))
        scale = _SIDE / max(height, width)
        least = min((s for s in picture.anchor_strides if 0 < s < math.inf), default=8.0)
        mark = min(max(0.42 * least * scale, 2.2), 4.5)
        return _View(max(width * scale, 1.0), max(height * scale, 1.0), scale, mark)

    def point(self, point: Sequence[float]) -> tuple[float, float] | None:
        """Where a point is drawn; None where it cannot be seen."""
        x, y = (round(value * self.scale, 2) if math.isfinite(value) else math.inf for value in point)
        seen = -_PAD <= x <= self.width + _PAD and -_PAD <= y <= self.height + _PAD
        return (x, y) if seen else None

    def box(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """Left, top, width and height as drawn: inside the panel, never inverted, never too small to see."""
        x1, x2 = sorted(min(max(value * self.scale, -_PAD), self.width + _PAD) for value in box[::2])
        y1, y2 = sorted(min(max(value * self.scale, -_PAD), self.height + _PAD) for value in box[1::2])
        return x1, y1, max(x2 - x1, 1.5), max(y2 - y1, 1.5)


def _levels(picture: Picture, view: _View) -> Iterator[str]:
    """All anchors as dots, larger at coarser levels."""
    levels: dict[float, set[tuple[float, float]]] = defaultdict(set)
    for point, stride in zip(picture.anchor_points, picture.anchor_strides, strict=True):
        place = view.point(point)
        if place is not None:
            levels[stride if stride < math.inf else 0.0].add(place)
    for rank, stride in enumerate(sorted(levels)):
        path, step = dots(levels[stride])
        size = min(max(0.1 * stride * view.scale, 1.2), 2.8) + 0.6 * min(rank, 4)
        yield f'<path class="dots" d="{path}" stroke-width="{decimal(size)}" stroke-dasharray="0 {step:.4g}"/>'


def _boxes(picture: Picture, view: _View) -> Iterator[str]:
    """Outlines; dashed where corners are swapped or a side is zero."""
    drawn = [(g, box, outline(*view.box(box))) for g, box in enumerate(picture.gt_boxes) if _known(box)]
    yield f'<path class="casing" d="{"".join(path for _, _, path in drawn)}"/>' if drawn else ""
    for g, box, path in drawn:
        area = box[0] < box[2] and box[1] < box[3]
        kind, remark = ("box", "") if area else ("box bad", ", without area")
        corners = ", ".join(f"{value:.6g}" for value in box)
        title = f"ground truth {g}, label {picture.gt_labels[g]}, box ({corners}){remark}"
        yield f'<path class="{kind}" stroke="{colour_of(g)}" d="{path}"><title>{title}</title></path>'


def _marks(picture: Picture, view: _View, outcome: Sequence[int]) -> Iterator[str]:
    """Assigned anchors, one path a ground truth; ignored ones and such as name no ground truth."""
    places: dict[int, set[tuple[float, float]]] = defaultdict(set)
    for point, index in zip(picture.anchor_points, outcome, strict=True):
        place = view.point(point)
        if index != BACKGROUND and place is not None:
            places[index if IGNORED <= index < len(picture.gt_boxes) else len(picture.gt_boxes)].add(place)
    for index, found in sorted(places.items()):
        if index == IGNORED:
            yield f'<path class="plain" d="{stamp("m-2-2l4 4m-4 0l4-4", found)}"/>'
        elif index == len(picture.gt_boxes):
            title = "<title>assigned to a ground truth that is not there</title>"
            yield f'<path class="plain" d="{stamp("m-4-4h8v8h-8zm0 4h8", found)}">{title}</path>'
        else:
            yield f'<path class="mark" fill="{colour_of(index)}" d="{stamp(mark_of(index, view.mark), found)}"/>'


def _halos(picture: Picture, view: _View, differing: Sequence[int]) -> Iterator[str]:
    """Halos about differing anchors, in one path."""
    places = {place for anchor in differing if (place := view.point(picture.anchor_points[anchor])) is not None}
    if places:
        path, step = dots(places)
        width = decimal(2 * view.mark + 4)
        yield f'<path class="halo" d="{path}" stroke-width="{width}" stroke-dasharray="0 {step:.4g}"/>'


def _rings(picture: Picture, view: _View, differing: Sequence[int]) -> Iterator[str]:
    """Rings about differing anchors, broken where rounding decides."""
    for anchor in differing:
        place = view.point(picture.anchor_points[anchor])
        if place is not None:
            kind = "ring open" if picture.margin[anchor] <= 1 else "ring"
            ring = stamp(circle(view.mark + 3), [place])
            yield f'<path class="{kind}" d="{ring}"><title>{_difference(picture, anchor)}</title></path>'


def _numbers(picture: Picture, view: _View) -> Iterator[str]:
    """Numbers at the boxes' top left corners, with mark and label where there is room."""
    few = len(picture.gt_boxes) <= _MOST_NAMED
    for g, box in enumerate(picture.gt_boxes):
        if _known(box):
            left, top, _, _ = view.box(box)
            x, y = max(left, 0.0) + 2, top - 4 if top > 14 else max(top, 0.0) + 12
            if few:
                yield f'<path class="mark" fill="{colour_of(g)}" d="{stamp(mark_of(g, 4), [(x + 4, y - 4)])}"/>'
            text = f"{g}: label {picture.gt_labels[g]}" if few else str(g)
            place = f'x="{decimal(x + 12 * few)}" y="{decimal(y)}" font-size="{11 if few else 8}"'
            yield f'<text class="number" {place}>{text}</text>'


def _difference(picture: Picture, anchor: int) -> str:
    expected, given = (_outcome(o[anchor], len(picture.gt_boxes)) for o in (picture.expected, picture.given))
    where = f"anchor {anchor}, stride {picture.anchor_strides[anchor]:g}"
    return f"{where}: expected {expected}, given {given}, margin {picture.margin[anchor]:.3g}"


def _outcome(index: int, gts: int) -> str:
    names = {BACKGROUND: "background", IGNORED: "ignored"}
    return names.get(index, f"ground truth {index}{'' if 0 <= index < gts else ', which is not there'}")


def _known(box: Sequence[float]) -> bool:
    """Can a box be placed, if only at the panel's edge?"""
    return not any(math.isnan(value) for value in box)
