"""One page that shows a whole run: self-contained, offline, and small however many checks there were.

Rows are counted into one cell for each operation and implementation; findings are shown up to a stated number, some of
every kind; ``templates/`` lays it out.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from detoracle.reports.growing import growth_plots
from detoracle.reports.layout import laid_out
from detoracle.reports.picture import draw
from detoracle.reports.record import KNOWN_FAILURE, Measurement, Picture, Report, Row
from detoracle.reports.tally import Cell, Tally
from detoracle.reports.text import visible

__all__ = ["MOST_BYTES", "MOST_FINDINGS", "render"]

MOST_FINDINGS = 200
"""Findings that the page shows; the others are in results.csv."""

MOST_BYTES = 3_000_000
"""Size of the page that findings and pictures may fill."""

_PICTURES = MOST_BYTES // 2  # bytes
_MOST_NOTES = 50
_MOST_LINES = 500  # of a table
_SYMBOLS = {"equal": "✓", "ambiguous": "≈", "undefined": "○", KNOWN_FAILURE: "△"}


def render(report: Report) -> str:
    """The page.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        HTML. Where findings would make it larger than `MOST_BYTES`, fewer of them are shown.

    Examples
    --------
    >>> page = render(Report("nothing yet", "detoracle compare", "2026-01-01T00:00:00Z", 1.0, 0, {}))
    >>> "Nothing was checked" in page
    True
    """
    tally = Tally(report.rows)
    pictures = _Pictures(report.pictures)
    growth = growth_plots(report.growth, report.measurements)
    most = MOST_FINDINGS
    while True:
        shown = _shown(tally.cells.values(), most)
        page = laid_out(
            "report",
            "tables",
            _FILTERS,
            title=report.title,
            report=report,
            tally=tally,
            shown=shown,
            shown_ids={cell.id for cell, _ in shown},
            pictures=pictures,
            notes=tally.notes.most_common(_MOST_NOTES),
            benched=any(m.phase or m.first_call or m.floor_share for m in report.measurements),
            on_gpu=any(m.launches for m in report.measurements),
            growth=growth,
            most_lines=_MOST_LINES,
        )
        if most == 0 or len(page.encode()) <= MOST_BYTES:
            return page
        most //= 2


# ------------------------------------------------------------------------------------------------------- findings
def _shown(cells: Iterable[Cell], most: int) -> list[tuple[Cell, list[Row]]]:
    """As many findings as there is room for: first one of each clause of each cell, then a second, and so on."""
    ranked: list[tuple[int, int, Cell, Row]] = []
    for cell in cells:
        seen: Counter[str] = Counter()
        for row in cell.findings:
            seen[row.clause] += 1
            ranked.append((seen[row.clause], len(ranked), cell, row))
    kept = sorted(ranked, key=lambda item: item[:2])[:most]
    groups: dict[str, tuple[Cell, list[Row]]] = {}
    for _, _, cell, row in sorted(kept, key=lambda item: item[1]):
        groups.setdefault(cell.id, (cell, []))[1].append(row)
    return list(groups.values())


class _Pictures:
    """Pictures of findings, drawn when first asked for, while there is room."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._of: dict[tuple[str, str, str, str], list[Picture]] = defaultdict(list)
        for picture in pictures:
            self._of[picture.operation, picture.implementation, picture.scene, picture.setting].append(picture)
        self._drawn: dict[int, Markup | None] = {}
        self._bytes = 0

    def of(self, row: Row) -> list[tuple[Picture, Markup | None]]:
        """Pictures of a row, each with its drawing, or None where there is no room."""
        key = row.operation, row.implementation, row.scene, row.setting
        return [(picture, self._drawing(picture)) for picture in self._of.get(key, [])]

    def _drawing(self, picture: Picture) -> Markup | None:
        if id(picture) not in self._drawn:
            drawing = draw(picture)
            fits = self._bytes + len(drawing) <= _PICTURES
            self._bytes += len(drawing) if fits else 0
            self._drawn[id(picture)] = drawing if fits else None
        return self._drawn[id(picture)]


def _replay(file: str) -> str:
    return f"detoracle replay {shlex.quote(visible(file))}"


# --------------------------------------------------------------------------------------------------- how it is put
def _gain(measurement: Measurement) -> tuple[str, str]:
    """Kind and words of a ratio: only an interval that clears 1 says faster or slower."""
    if measurement.implementation == measurement.baseline:
        return "baseline", "· baseline"
    if measurement.low > 1:
        return "faster", "▲ faster"
    if measurement.high < 1:
        return "slower", "▼ slower"
    return "inconclusive", "○ inconclusive"


def _certain(measurement: Measurement) -> bool:
    """Is there an interval at all? Few rounds give 0 to infinity."""
    return 0 < measurement.low <= measurement.times_faster <= measurement.high < math.inf


def _axis(ratio: float) -> float:
    """Place of a ratio on a logarithmic axis of 120 pixels, from 1/8 to 8 times."""
    return round(62 + 20 * min(max(math.log2(ratio), -3.0), 3.0), 1)


_FILTERS: Mapping[str, Callable[..., Any]] = {
    "share": lambda part, whole: f"{part / whole:.2%}" if whole else "–",
    "percent": lambda share: f"{share:.1%}",
    "ulps": lambda value: f"{value:,.3g} units in the last place" if math.isfinite(value) else "not finite",
    "exponent": lambda value: f"{value:.2f}",
    "symbol": lambda status: _SYMBOLS.get(status, "✗"),
    "kind": lambda status: status if status in _SYMBOLS else "finding",
    "replay": _replay,
    "gain": _gain,
    "certain": _certain,
    "axis": _axis,
}
