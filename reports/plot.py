"""Line plots as inline SVG: one series a line, told by its number, its colour and its mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from detoracle.reports.shapes import colour_of, decimal, mark_of, stamp
from detoracle.reports.text import short

__all__ = ["Point", "Series", "plot"]

_WIDTH, _HEIGHT = 360.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 12.0, 28.0, 40.0
_LINE = 17.0  # height of a line of the legend
_MOST_TICKS = 8

_STYLE = (
    ".detoracle-plot{--ink:#1c2026;--paper:#fff;--faint:#d9dde3;font:12px system-ui,sans-serif;fill:var(--ink)}"
    "@media screen and (prefers-color-scheme:dark){.detoracle-plot{--ink:#f2f4f7;--paper:#15181d;--faint:#363d47}}"
    ".detoracle-plot .paper{fill:var(--paper);stroke:var(--faint)}"
    ".detoracle-plot .grid{stroke:var(--faint);fill:none}"
    ".detoracle-plot .line{fill:none;stroke-width:2}"
    ".detoracle-plot .dashed{stroke-dasharray:5 4;stroke-width:1.2}"
    ".detoracle-plot .mark{stroke:var(--ink);stroke-width:.7}"
    ".detoracle-plot .bar{stroke:var(--ink);stroke-width:1.2;fill:none}"
)


@dataclass(frozen=True)
class Point:
    """One value, its interval (the value itself where there is none), and what its tooltip says."""

    x: float
    y: float
    low: float
    high: float
    told: str


@dataclass(frozen=True)
class Series:
    """A line of a plot.

    Attributes
    ----------
    name : str
    points : tuple of Point
        From left to right.
    number : int
        Decides colour and mark.
    fitted : tuple of (float, float), or empty
        Ends of a straight line to draw dashed instead of joining the points.
    """

    name: str
    points: tuple[Point, ...]
    number: int = 0
    fitted: tuple[tuple[float, float], ...] = ()


def plot(
    title: str, across: str, up: str, series: Sequence[Series], *, log_x: bool = False, level: float = 0
) -> Markup:
    """Draw series on a logarithmic vertical axis.

    Parameters
    ----------
    title : str
    across, up : str
        What the axes show.
    series : sequence of Series
        Values that are not positive and finite are left out.
    log_x : bool
        The horizontal axis is logarithmic too.
    level : float
        A value to mark by a line across; 0 for none.

    Returns
    -------
    Markup
        One ``<svg>`` element, without ids or references.

    Examples
    --------
    >>> drawn = plot(
    ...     "time", "GTs", "ms", [Series("mine", (Point(1, 2, 2, 2, "a"), Point(2, 4, 4, 4, "b")))], log_x=True
    ... )
    >>> drawn.count("<title>"), "mine" in drawn
    (3, True)
    """
    xs = [p.x for s in series for p in s.points if _drawable(p, log_x)]
    ys = [y for s in series for p in s.points if _drawable(p, log_x) for y in (p.low, p.y, p.high) if _positive(y)]
    ys += [y for s in series for _, y in s.fitted] + ([level] if level else [])
    place_x = _axis(xs, _LEFT, _WIDTH - _RIGHT, log=log_x)
    place_y = _axis(ys, _HEIGHT - _BOTTOM, _TOP, log=True)
    height = _HEIGHT + _LINE * len(series)
    parts = [
        f'<svg class="detoracle-plot" xmlns="http://www.w3.org/2000/svg" role="img" width="{decimal(_WIDTH)}"'
        f' height="{decimal(height)}" viewBox="0 0 {decimal(_WIDTH)} {decimal(height)}">',
        f"<title>{escape(short(title))}</title><desc>{escape(_described(series))}</desc><style>{_STYLE}</style>",
        f'<text x="{decimal(_LEFT)}" y="16" font-weight="600">{escape(short(title, 60))}</text>',
        f'<path class="paper" d="M{_LEFT} {_TOP}H{_WIDTH - _RIGHT}V{_HEIGHT - _BOTTOM}H{_LEFT}z"/>',
        *_grid(xs, ys, place_x, place_y, log_x, level),
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{escape(short(across, 60))}</text>',
        f'<text x="14" y="{_TOP + 4}" transform="rotate(-90 14 {_TOP + 4})" text-anchor="end">{escape(up)}</text>',
    ]
    for line, one in enumerate(series):
        parts += _line(one, place_x, place_y, log_x)
        y = _HEIGHT + _LINE * line + 2
        mark = stamp(mark_of(one.number, 4.5), [(20, y)])
        parts.append(f'<path class="mark" fill="{colour_of(one.number)}" d="{mark}"/>')
        parts.append(f'<text x="32" y="{decimal(y + 4)}">{escape(short(one.name, 46))}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _drawable(point: Point, log_x: bool) -> bool:
    return _positive(point.y) and (_positive(point.x) if log_x else math.isfinite(point.x))


def _axis(values: Sequence[float], start: float, end: float, *, log: bool) -> Callable[[float], float]:
    """Map values to pixels, with a twentieth of the axis to spare at both ends."""
    scaled = [math.log(value) if log else value for value in values] or [0.0]
    low, high = min(scaled), max(scaled)
    span = high - low or 1.0
    middle = (low + high) / 2

    def place(value: float) -> float:
        return (start + end) / 2 + (end - start) * ((math.log(value) if log else value) - middle) / span * 0.9

    return place


def _grid(
    xs: Sequence[float],
    ys: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    log_x: bool,
    level: float,
) -> Iterator[str]:
    for value in _ticks(ys):
        y = decimal(place_y(value))
        yield f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{_short_number(value)}</text>'
    if level:
        yield f'<path class="bar" d="M{_LEFT} {decimal(place_y(level))}H{_WIDTH - _RIGHT}"/>'
    distinct = sorted(set(xs))
    for value in distinct[:: math.ceil(len(distinct) / _MOST_TICKS) or 1]:
        x = decimal(place_x(value))
        yield f'<path class="grid" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        yield f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_short_number(value)}</text>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers between the least and the largest value: powers of ten, with 2 and 5 times them where few."""
    if not values:
        return []
    low, high = min(values) * 0.999, max(values) * 1.001
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS) or 1]


def _short_number(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.3g}"


def _line(
    series: Series, place_x: Callable[[float], float], place_y: Callable[[float], float], log_x: bool
) -> Iterator[str]:
    points = [p for p in series.points if _drawable(p, log_x)]
    ends = series.fitted if series.fitted else [(p.x, p.y) for p in points]
    path = "L".join(f"{decimal(place_x(x))} {decimal(place_y(y))}" for x, y in ends)
    if len(ends) > 1:
        kind = "line dashed" if series.fitted else "line"
        yield f'<path class="{kind}" stroke="{colour_of(series.number)}" d="M{path}"/>'
    for point in points:
        x, y = place_x(point.x), place_y(point.y)
        if _positive(point.low) and _positive(point.high) and point.low < point.high:
            yield f'<path class="bar" d="M{decimal(x)} {decimal(place_y(point.low))}V{decimal(place_y(point.high))}"/>'
        mark = stamp(mark_of(series.number, 4), [(x, y)])
        told = escape(short(f"{series.name}: {point.told}"))
        yield f'<path class="mark" fill="{colour_of(series.number)}" d="{mark}"><title>{told}</title></path>'


def _described(series: Sequence[Series]) -> str:
    """The plot in words."""
    return ". ".join(short(f"{one.name}: {', '.join(p.told for p in one.points[:12])}") for one in series)
