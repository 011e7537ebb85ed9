"""What every drawing of an image shows: how pixels become drawn ones, anchors by level, boxes, marks, numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reports.record import Picture
from detoracle.reports.shapes import colour_of, decimal, dots, mark_of, outline, stamp

__all__ = [
    "PAD",
    "STYLE",
    "View",
    "draw_boxes",
    "draw_levels",
    "draw_marks",
    "draw_numbers",
    "is_known",
    "outcome_name",
]

PAD = 16.0
"""Room about the image, for boxes that stick out."""

_SIDE = 400.0  # pixels of an image's longer side
_MOST_NAMED = 40  # ground truths whose label is written beside their number

STYLE = (
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
"""Of the class ``detoracle-picture``, for light and dark."""


@dataclass(frozen=True)
class View:
    """How image pixels become drawn ones."""

    width: float
    height: float
    scale: float
    mark: float

    @staticmethod
    def of(picture: Picture) -> View:
        """The whole image, or where it has no size, all that can be seen of its content."""
        height, width = picture.size
        if not (1e-6 < height < math.inf and 1e-6 < width < math.inf):
            content = [*picture.anchor_points, *(b[2:] for b in picture.gt_boxes if is_known(b))]
            width, height = (max([1.0, *(p[axis] for p in content if p[axis] < math.inf)]) for axis in (0, 1))
        scale = _SIDE / max(height, width)
        least = min((s for s in picture.anchor_strides if 0 < s < math.inf), default=8.0)
        mark = min(max(0.42 * least * scale, 2.2), 4.5)
        return View(max(width * scale, 1.0), max(height * scale, 1.0), scale, mark)

    def point(self, point: Sequence[float]) -> tuple[float, float] | None:
        """Where a point is drawn; None where it cannot be seen."""
        x, y = (round(value * self.scale, 2) if math.isfinite(value) else math.inf for value in point)
        seen = -PAD <= x <= self.width + PAD and -PAD <= y <= self.height + PAD
        return (x, y) if seen else None

    def box(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """Left, top, width and height as drawn: inside the panel, never inverted, never too small to see."""
        x1, x2 = sorted(min(max(value * self.scale, -PAD), self.width + PAD) for value in box[::2])
        y1, y2 = sorted(min(max(value * self.scale, -PAD), self.height + PAD) for value in box[1::2])
        return x1, y1, max(x2 - x1, 1.5), max(y2 - y1, 1.5)


def draw_levels(picture: Picture, view: View) -> Iterator[str]:
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


def draw_boxes(picture: Picture, view: View) -> Iterator[str]:
    """Outlines; dashed where corners are swapped or a side is zero."""
    drawn = [(g, box, outline(*view.box(box))) for g, box in enumerate(picture.gt_boxes) if is_known(box)]
    yield f'<path class="casing" d="{"".join(path for _, _, path in drawn)}"/>' if drawn else ""
    for g, box, path in drawn:
        area = box[0] < box[2] and box[1] < box[3]
        kind, remark = ("box", "") if area else ("box bad", ", without area")
        corners = ", ".join(f"{value:.6g}" for value in box)
        title = f"ground truth {g}, label {picture.gt_labels[g]}, box ({corners}){remark}"
        yield f'<path class="{kind}" stroke="{colour_of(g)}" d="{path}"><title>{title}</title></path>'


def draw_marks(picture: Picture, view: View, outcome: Sequence[int]) -> Iterator[str]:
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


def draw_numbers(picture: Picture, view: View) -> Iterator[str]:
    """Numbers at the boxes' top left corners, with mark and label where there is room."""
    few = len(picture.gt_boxes) <= _MOST_NAMED
    for g, box in enumerate(picture.gt_boxes):
        if is_known(box):
            left, top, _, _ = view.box(box)
            x, y = max(left, 0.0) + 2, top - 4 if top > 14 else max(top, 0.0) + 12
            if few:
                yield f'<path class="mark" fill="{colour_of(g)}" d="{stamp(mark_of(g, 4), [(x + 4, y - 4)])}"/>'
            text = f"{g}: label {picture.gt_labels[g]}" if few else str(g)
            place = f'x="{decimal(x + 12 * few)}" y="{decimal(y)}" font-size="{11 if few else 8}"'
            yield f'<text class="number" {place}>{text}</text>'


def outcome_name(index: int, gts: int) -> str:
    """An anchor's outcome in words.

    Examples
    --------
    >>> outcome_name(0, 1), outcome_name(-1, 1), outcome_name(7, 1)
    ('ground truth 0', 'background', 'ground truth 7, which is not there')
    """
    names = {BACKGROUND: "background", IGNORED: "ignored"}
    return names.get(index, f"ground truth {index}{'' if 0 <= index < gts else ', which is not there'}")


def is_known(box: Sequence[float]) -> bool:
    """Can a box be placed, if only at the panel's edge?

    Examples
    --------
    >>> is_known([0, 0, 1, math.inf]), is_known([0, 0, 1, math.nan])
    (True, False)
    """
    return not any(math.isnan(value) for value in box)
