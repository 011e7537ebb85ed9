"""Plots of how cost grows with the size of a workload, and the exponents that were fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from detoracle.reports.plot import Point, Series, plot
from detoracle.reports.record import Growth, Measurement

__all__ = ["GrowthPlots", "growth_plots"]

_AXES = ("batch", "gts", "anchors", "classes")
_WORDS = {"batch": "images", "gts": "ground truths an image", "anchors": "anchors an image", "classes": "classes"}


@dataclass(frozen=True)
class GrowthPlots:
    """How all implementations of an operation grow along one axis.

    Attributes
    ----------
    operation, phase, across, fixed : str
        What the axis is called, and the sizes that stay.
    growth : tuple of Growth
        One an implementation.
    drawings : tuple of Markup
        Time, and peak live bytes.
    """

    operation: str
    phase: str
    across: str
    fixed: str
    growth: tuple[Growth, ...]
    drawings: tuple[Markup, ...]


def growth_plots(growth: Sequence[Growth], measurements: Sequence[Measurement]) -> tuple[GrowthPlots, ...]:
    """Plot all that was fitted.

    Parameters
    ----------
    growth : sequence of Growth
    measurements : sequence of Measurement
        That were fitted.

    Returns
    -------
    tuple of GrowthPlots
        One for each operation, phase, axis and fixed sizes.

    Examples
    --------
    >>> growth_plots((), ())
    ()
    """
    groups: dict[tuple[str, ...], list[Growth]] = {}
    for fit in growth:
        groups.setdefault((fit.operation, fit.phase, fit.axis, fit.fixed), []).append(fit)
    return tuple(
        GrowthPlots(operation, phase, _WORDS.get(axis, axis), fixed, tuple(fits), tuple(_drawings(fits, measurements)))
        for (operation, phase, axis, fixed), fits in groups.items()
    )


def _drawings(fits: Sequence[Growth], measurements: Sequence[Measurement]) -> Iterator[Markup]:
    quantities: tuple[tuple[str, str, Callable[[Measurement], float], Callable[[Growth], float]], ...] = (
        ("Time of one call", "milliseconds", lambda m: m.milliseconds, lambda g: g.time_exponent),
        ("Peak live bytes", "bytes", lambda m: float(m.peak_live_bytes), lambda g: g.bytes_exponent),
    )
    for title, unit, cost, exponent in quantities:
        series = [
            _series(number, fit, _fitted(fit, measurements), cost, exponent(fit)) for number, fit in enumerate(fits)
        ]
        yield plot(title, _WORDS.get(fits[0].axis, fits[0].axis), unit, series, log_x=True)


def _fitted(fit: Growth, measurements: Sequence[Measurement]) -> list[Measurement]:
    """Measurements that a fit was made from, by size."""

    def others(m: Measurement) -> str:
        return ", ".join(f"{getattr(m, axis)} {axis}" for axis in _AXES if axis != fit.axis)

    key = (fit.operation, fit.implementation, fit.phase)
    found = [m for m in measurements if (m.operation, m.implementation, m.phase) == key and others(m) == fit.fixed]
    return sorted((m for m in found if _size(m, fit.axis) > 0), key=lambda m: _size(m, fit.axis))


def _size(m: Measurement, axis: str) -> float:
    value: Any = getattr(m, axis, 0)
    return float(value)


def _series(
    number: int, fit: Growth, measured: Sequence[Measurement], cost: Callable[[Measurement], float], exponent: float
) -> Series:
    values = [(_size(m, fit.axis), cost(m)) for m in measured if 0 < cost(m) < math.inf]
    points = tuple(Point(x, y, y, y, f"{x:g} {fit.axis}, {y:,.4g}") for x, y in values)
    name = f"{fit.implementation}: grows as {fit.axis}^{exponent:.2f}"
    if not points or not math.isfinite(exponent):
        return Series(name, points, number)
    # A fitted line goes through the mean of the logarithms.
    middle_x, middle_y = (sum(math.log(value[i]) for value in values) / len(values) for i in (0, 1))
    ends = {values[0][0], values[-1][0]}
    fitted = tuple((x, math.exp(middle_y + exponent * (math.log(x) - middle_x))) for x in sorted(ends))
    return Series(name, points, number, fitted if len(ends) == 2 else ())
