"""An assignment as a drawing: ground truths, anchors, and who was given to whom.

Every drawing is one SVG element without ids or references, styled for light and dark, that stands alone as a file and goes
into a page as it is. A ground truth is told by its number, and its anchors by colour (the palette of Okabe and Ito, made for
colour-blind readers) *and* shape. Anchors that nobody gets are dots, one path a level, however many there are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reports.record import Picture
from detoracle.reports.text import short, visible

__all__ = ["draw", "draw_assignment"]

_SIDE = 400.0  # pixels of an image's longer side
_PAD = 16.0  # room about the image, for boxes that stick out
_COLUMN = 300.0  # least width of a panel, for its caption
_CAPTION, _LEGEND = 26.0, 44.0
_MOST_NAMED = 40  # ground truths whose label is written beside their number
_MOST_TOOLTIPS = 150  # differing anchors that explain themselves; beyond, rings only

_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_POLYGONS = (
    (),  # a circle
    ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    ((0, -1.15), (1.1, 0.8), (-1.1, 0.8)),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((0, 1.15), (1.1, -0.8), (-1.1, -0.8)),
    ((-0.4, -1.15), (0.4, -1.15), (0.4, -0.4), (1.15, -0.4), (1.15, 0.4), (0.4, 0.4), (0.4, 1.15), (-0.4, 1.15),
     (-0.4, 0.4), (-1.15, 0.4), (-1.15, -0.4), (-0.4, -0.4)),
)  # fmt: skip
# Seven colours and six shapes: the first 42 ground truths differ in the pair.

_STYLE = (
    ".detoracle-picture{--ink:#1c2026;--paper:#fff;--faint:#9aa3ad;font:12px system-ui,sans-serif;fill:var(--ink)}"
    "@media screen and (prefers-color-scheme:dark){.detoracle-picture{--ink:#f2f4f7;--paper:#15181d;--faint:#79828d}}"
    ".detoracle-picture :is(.dots,.casing,.box,.plain,.ring){fill:none;stroke-linejoin:round}"
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
    >>> picture = Picture("yolox.assign", "mine", "one box", "", 0, (8, 8), [[0, 0, 8, 8]], [3], [[4, 4]], [8], [0], [-1], [9])
    >>> draw(picture).count("<title>anchor 0, stride 8: expected ground truth 0, given background, margin 9</title>")
    2
    """
    differing = [a for a, (e, g) in enumerate(zip(picture.expected, picture.given, strict=True)) if e != g]
    named = differing[:_MOST_TOOLTIPS]
    listed = "; ".join(_difference(picture, anchor) for anchor in differing[:5])
    sides = (("oracle", picture.expected), (picture.implementation, picture.given))
    counts = " and ".join(str(sum(index >= 0 for index in outcome)) for _, outcome in sides)
    description = f"Oracle and implementation assign {counts} anchors and differ at {len(differing)}. {listed}"
    if len(named) < len(differing):
        description += f". The first {len(named)} have a tooltip"
    legend = (
        "Number, colour and shape tell the ground truths; a mark is an anchor assigned to one, × an ignored anchor.",
        "Ring: the two differ here, broken where rounding could decide it (margin up to 1).",
    )
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
    >>> picture = Picture("yolox.assign", "", "one box", "", 0, (8, 8), [[0, 0, 8, 8]], [3], [[4, 4]], [8], [0], [0], [9])
    >>> draw_assignment(picture).endswith("</svg>")
    True
    """
    description = f"{sum(index >= 0 for index in picture.expected)} anchors are assigned."
    legend = ("Number, colour and shape tell the ground truths;", "a mark is an anchor assigned to one, × an ignored anchor.")
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
    sizes = f"{_n(picture.size[1])} by {_n(picture.size[0])} pixels"
    has = f"{sizes}, {len(picture.gt_boxes)} ground truths, {len(picture.anchor_points)} anchors. "
    parts = [
        f'<svg class="detoracle-picture" xmlns="http://www.w3.org/2000/svg" role="img" width="{_n(width)}"'
        f' height="{_n(height)}" viewBox="0 0 {_n(width)} {_n(height)}">',
        f"<title>{escape(short(title))}</title><desc>{escape(visible(has + description + lost))}</desc>",
        f"<style>{_STYLE}</style>",
    ]
    for number, (name, outcome) in enumerate(sides):
        left = number * column
        caption = f'<title>{escape(short(name))}</title>{escape(short(name, 44))}'
        parts.append(f'<text x="{_n(left + _PAD)}" y="18" font-weight="600">{caption}</text>')
        inner = "".join(_panel(picture, view, outcome, differing))
        parts.append(
            f'<svg x="{_n(left)}" y="{_n(_CAPTION)}" width="{_n(view.width + 2 * _PAD)}"'
            f' height="{_n(view.height + 2 * _PAD)}" overflow="hidden"><g transform="translate({_PAD} {_PAD})">{inner}</g></svg>'
        )
    for line, text in enumerate(legend):
        y = height - _LEGEND + 18 + 16 * line
        parts.append(f'<text x="{_PAD}" y="{_n(y)}" font-size="11">{escape(text)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _panel(picture: Picture, view: _View, outcome: Sequence[int], differing: Sequence[int]) -> Iterator[str]:
    yield f'<path class="paper" d="M0 0h{_n(view.width)}v{_n(view.height)}H0z"/>'
    yield from _levels(picture, view)
    yield from _boxes(picture, view)
    yield from _marks(picture, view, outcome)
    yield from _rings(picture, view, differing)
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
        path, step = _dots(levels[stride])
        size = min(max(0.1 * stride * view.scale, 1.2), 2.8) + 0.6 * min(rank, 4)
        yield f'<path class="dots" d="{path}" stroke-width="{_n(size)}" stroke-dasharray="0 {step:.4g}"/>'


def _dots(places: Iterable[tuple[float, float]]) -> tuple[str, float]:
    """A path whose dashes, drawn as dots, fall on the places, and the dashes' step: a regular row is one line."""
    rows: dict[float, list[float]] = defaultdict(list)
    for x, y in sorted(places):
        rows[y].append(x)
    step = min((b - a for xs in rows.values() for a, b in zip(xs, xs[1:], strict=False)), default=1.0)
    path = []
    for y, xs in rows.items():
        start, length = xs[0], 0
        for x in [*xs[1:], math.inf]:
            if abs(start + (length + 1) * step - x) < step / 8:
                length += 1
                continue
            path.append(f"M{_n(start)} {_n(y)}h{_n((length + 0.25) * step)}")
            start, length = x, 0
    return "".join(path), step


def _boxes(picture: Picture, view: _View) -> Iterator[str]:
    """Outlines; dashed where corners are swapped or a side is zero."""
    drawn = [(g, box, _outline(view.box(box))) for g, box in enumerate(picture.gt_boxes) if _known(box)]
    yield f'<path class="casing" d="{"".join(outline for _, _, outline in drawn)}"/>' if drawn else ""
    for g, box, outline in drawn:
        area = box[0] < box[2] and box[1] < box[3]
        kind, remark = ("box", "") if area else ("box bad", ", without area")
        corners = ", ".join(f"{value:.6g}" for value in box)
        title = f"ground truth {g}, label {picture.gt_labels[g]}, box ({corners}){remark}"
        yield f'<path class="{kind}" stroke="{_colour(g)}" d="{outline}"><title>{title}</title></path>'


def _marks(picture: Picture, view: _View, outcome: Sequence[int]) -> Iterator[str]:
    """Assigned anchors, one path a ground truth; ignored ones and such as name no ground truth."""
    places: dict[int, set[tuple[float, float]]] = defaultdict(set)
    for point, index in zip(picture.anchor_points, outcome, strict=True):
        place = view.point(point)
        if index != BACKGROUND and place is not None:
            places[index if IGNORED <= index < len(picture.gt_boxes) else len(picture.gt_boxes)].add(place)
    for index, found in sorted(places.items()):
        if index == IGNORED:
            yield f'<path class="plain" d="{_stamp("m-2-2l4 4m-4 0l4-4", found)}"/>'
        elif index == len(picture.gt_boxes):
            title = "<title>assigned to a ground truth that is not there</title>"
            yield f'<path class="plain" d="{_stamp("m-4-4h8v8h-8zm0 4h8", found)}">{title}</path>'
        else:
            yield f'<path class="mark" fill="{_colour(index)}" d="{_stamp(_shape(index, view.mark), found)}"/>'


def _rings(picture: Picture, view: _View, differing: Sequence[int]) -> Iterator[str]:
    """Rings about differing anchors, broken where rounding decides."""
    silent = []
    for number, anchor in enumerate(differing):
        place = view.point(picture.anchor_points[anchor])
        if place is None:
            continue
        ring = _stamp(_circle(view.mark + 3), [place])
        if number >= _MOST_TOOLTIPS:
            silent.append(ring)
            continue
        kind = "ring open" if picture.margin[anchor] <= 1 else "ring"
        yield f'<path class="{kind}" d="{ring}"><title>{_difference(picture, anchor)}</title></path>'
    yield f'<path class="ring" d="{"".join(silent)}"/>' if silent else ""


def _numbers(picture: Picture, view: _View) -> Iterator[str]:
    """Numbers at the boxes' top left corners, with mark and label where there is room."""
    few = len(picture.gt_boxes) <= _MOST_NAMED
    for g, box in enumerate(picture.gt_boxes):
        if _known(box):
            left, top, _, _ = view.box(box)
            x, y = max(left, 0.0) + 2, top - 4 if top > 14 else max(top, 0.0) + 12
            if few:
                yield f'<path class="mark" fill="{_colour(g)}" d="{_stamp(_shape(g, 4), [(x + 4, y - 4)])}"/>'
            text = f"{g}: label {picture.gt_labels[g]}" if few else str(g)
            yield f'<text class="number" x="{_n(x + 12 * few)}" y="{_n(y)}" font-size="{11 if few else 8}">{text}</text>'


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


def _colour(gt: int) -> str:
    return _PALETTE[gt % len(_PALETTE)]


def _shape(gt: int, radius: float) -> str:
    """Path of a ground truth's mark, from its centre."""
    polygon = [(x * radius, y * radius) for x, y in _POLYGONS[gt % len(_POLYGONS)]]
    if not polygon:
        return _circle(radius)
    steps = [(x - a, y - b) for (a, b), (x, y) in zip(polygon, polygon[1:], strict=False)]
    return f"m{_n(polygon[0][0])} {_n(polygon[0][1])}l" + " ".join(f"{_n(x)} {_n(y)}" for x, y in steps) + "z"


def _circle(radius: float) -> str:
    r, d = _n(radius), _n(2 * radius)
    return f"m-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0-{d} 0z"


def _outline(box: tuple[float, float, float, float]) -> str:
    left, top, width, height = map(_n, box)
    return f"M{left} {top}h{width}v{height}h-{width}z"


def _stamp(shape: str, places: Iterable[tuple[float, float]]) -> str:
    """One shape at many places."""
    return "".join(f"M{_n(x)} {_n(y)}{shape}" for x, y in sorted(places))


def _n(value: float) -> str:
    """A number with a decimal, where it has one."""
    return f"{value:.1f}".removesuffix(".0")
