"""Paths of an SVG drawing: pure text, from drawn pixels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

__all__ = ["circle", "colour_of", "decimal", "dots", "mark_of", "outline", "stamp"]

# Seven colours (Okabe and Ito's, for colour-blind readers) and six shapes: 42 ground truths differ in the pair.
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


def decimal(value: float) -> str:
    """A number with one decimal, where it has one.

    Examples
    --------
    >>> decimal(2.0), decimal(2.26)
    ('2', '2.3')
    """
    return f"{value:.1f}".removesuffix(".0")


def colour_of(gt: int) -> str:
    """Colour of a ground truth.

    Examples
    --------
    >>> colour_of(0) == colour_of(7)
    True
    """
    return _PALETTE[gt % len(_PALETTE)]


def mark_of(gt: int, radius: float) -> str:
    """Path of a ground truth's mark, from its centre.

    Examples
    --------
    >>> mark_of(3, 4), mark_of(0, 4) == circle(4)
    ('m0 -5l5 5 -5 5 -5 -5z', True)
    """
    polygon = [(x * radius, y * radius) for x, y in _POLYGONS[gt % len(_POLYGONS)]]
    if not polygon:
        return circle(radius)
    steps = " ".join(f"{decimal(x - a)} {decimal(y - b)}" for (a, b), (x, y) in pairwise(polygon))
    return f"m{decimal(polygon[0][0])} {decimal(polygon[0][1])}l{steps}z"


def circle(radius: float) -> str:
    """Path of a circle, from its centre.

    Examples
    --------
    >>> circle(3)
    'm-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z'
    """
    r, d = decimal(radius), decimal(2 * radius)
    return f"m-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0-{d} 0z"


def outline(left: float, top: float, width: float, height: float) -> str:
    """Path of a box.

    Examples
    --------
    >>> outline(1, 2, 3, 4)
    'M1 2h3v4h-3z'
    """
    return f"M{decimal(left)} {decimal(top)}h{decimal(width)}v{decimal(height)}h-{decimal(width)}z"


def stamp(path: str, places: Iterable[tuple[float, float]]) -> str:
    """One relative path at many places.

    Examples
    --------
    >>> stamp("h1", [(2, 3), (0, 1)])
    'M0 1h1M2 3h1'
    """
    return "".join(f"M{decimal(x)} {decimal(y)}{path}" for x, y in sorted(places))


def dots(places: Iterable[tuple[float, float]]) -> tuple[str, float]:
    """A path whose dashes, drawn as dots, fall on the places: a regular row is one line.

    Parameters
    ----------
    places : iterable of (float, float)

    Returns
    -------
    str
        Path.
    float
        Distance from dash to dash.

    Examples
    --------
    >>> dots((x, y) for y in (4, 12) for x in (4, 12, 20, 28))
    ('M4 4h26M4 12h26', 8)
    """
    rows: dict[float, list[float]] = defaultdict(list)
    for x, y in sorted(places):
        rows[y].append(x)
    step = min((b - a for xs in rows.values() for a, b in pairwise(xs)), default=1.0)
    path = []
    for y, xs in rows.items():
        start, length = xs[0], 0
        for x in [*xs[1:], math.inf]:
            if abs(start + (length + 1) * step - x) < step / 8:
                length += 1
                continue
            path.append(f"M{decimal(start)} {decimal(y)}h{decimal((length + 0.25) * step)}")
            start, length = x, 0
    return "".join(path), step
