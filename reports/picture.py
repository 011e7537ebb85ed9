"""An assignment as a drawing: ground truths, anchors, and who was given to whom.

Every drawing is one SVG element without ids or references, styled for light and dark, that stands alone as a file and
goes into a page as it is. A ground truth is told by its number, and its anchors by colour *and* shape. Anchors that
nobody gets are dots, one path a level, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup, escape

from detoracle.reports.record import Picture
from detoracle.reports.scenery import (
    PAD,
    STYLE,
    View,
    draw_boxes,
    draw_levels,
    draw_marks,
    draw_numbers,
    is_known,
    outcome_name,
)
from detoracle.reports.shapes import circle, decimal, dots, stamp
from detoracle.reports.text import short, visible

__all__ = ["draw", "draw_assignment"]

_COLUMN = 300.0  # least width of a panel, for its caption
_CAPTION, _LEGEND = 26.0, 44.0
_MOST_RINGS = 150  # differing anchors that are ringed and explain themselves; those beyond have a halo


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
    view = View.of(picture)
    column = max(view.width + 2 * PAD, _COLUMN)
    width, height = column * len(sides), _CAPTION + view.height + 2 * PAD + _LEGEND
    unseen = [str(g) for g, box in enumerate(picture.gt_boxes) if not is_known(box)]
    lost = f" Not drawn, for lack of a place: ground truth {', '.join(unseen[:20])}." if unseen else ""
    sizes = f"{decimal(picture.size[1])} by {decimal(picture.size[0])} pixels"
    has = f"{sizes}, {len(picture.gt_boxes)} ground truths, {len(picture.anchor_points)} anchors. "
    parts = [
        f'<svg class="detoracle-picture" xmlns="http://www.w3.org/2000/svg" role="img" width="{decimal(width)}"'
        f' height="{decimal(height)}" viewBox="0 0 {decimal(width)} {decimal(height)}">',
        f"<title>{escape(short(title))}</title><desc>{escape(visible(has + description + lost))}</desc>",
        f"<style>{STYLE}</style>",
    ]
    for number, (name, outcome) in enumerate(sides):
        left = number * column
        caption = f"<title>{escape(short(name))}</title>{escape(short(name, 44))}"
        parts.append(f'<text x="{decimal(left + PAD)}" y="18" font-weight="600">{caption}</text>')
        inner = "".join(_panel(picture, view, outcome, differing))
        place = f'x="{decimal(left)}" y="{decimal(_CAPTION)}"'
        size = f'width="{decimal(view.width + 2 * PAD)}" height="{decimal(view.height + 2 * PAD)}"'
        moved = f'<g transform="translate({decimal(PAD)} {decimal(PAD)})">{inner}</g>'
        parts.append(f'<svg {place} {size} overflow="hidden">{moved}</svg>')  # what sticks out is clipped
    for line, text in enumerate(legend):
        y = height - _LEGEND + 18 + 16 * line
        parts.append(f'<text x="{PAD}" y="{decimal(y)}" font-size="11">{escape(text)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _panel(picture: Picture, view: View, outcome: Sequence[int], differing: Sequence[int]) -> Iterator[str]:
    yield f'<path class="paper" d="M0 0h{decimal(view.width)}v{decimal(view.height)}H0z"/>'
    yield from draw_levels(picture, view)
    yield from draw_boxes(picture, view)
    yield from _halos(picture, view, differing[_MOST_RINGS:])
    yield from draw_marks(picture, view, outcome)
    yield from _rings(picture, view, differing[:_MOST_RINGS])
    yield from draw_numbers(picture, view)


def _halos(picture: Picture, view: View, differing: Sequence[int]) -> Iterator[str]:
    """Halos about differing anchors, in one path."""
    places = {place for anchor in differing if (place := view.point(picture.anchor_points[anchor])) is not None}
    if places:
        path, step = dots(places)
        width = decimal(2 * view.mark + 4)
        yield f'<path class="halo" d="{path}" stroke-width="{width}" stroke-dasharray="0 {step:.4g}"/>'


def _rings(picture: Picture, view: View, differing: Sequence[int]) -> Iterator[str]:
    """Rings about differing anchors, broken where rounding decides."""
    for anchor in differing:
        place = view.point(picture.anchor_points[anchor])
        if place is not None:
            kind = "ring open" if picture.margin[anchor] <= 1 else "ring"
            ring = stamp(circle(view.mark + 3), [place])
            yield f'<path class="{kind}" d="{ring}"><title>{_difference(picture, anchor)}</title></path>'


def _difference(picture: Picture, anchor: int) -> str:
    expected, given = (outcome_name(o[anchor], len(picture.gt_boxes)) for o in (picture.expected, picture.given))
    where = f"anchor {anchor}, stride {picture.anchor_strides[anchor]:g}"
    return f"{where}: expected {expected}, given {given}, margin {picture.margin[anchor]:.3g}"
