"""A run in a few lines of Markdown: for a comment on a pull request, or the summary of a CI step.

Names are strangers'. They stand in code, where no platform looks for mentions, links or formulas, and every character
that Markdown or HTML could act on is a character reference.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from detoracle.reports.record import KNOWN_FAILURE, Measurement, Report, Row
from detoracle.reports.tally import Cell, Tally
from detoracle.reports.text import short, visible

__all__ = ["MOST_BYTES", "summary_of"]

MOST_BYTES = 60_000
"""Size of the summary: below what platforms accept as a comment."""

_MOST_LINES = 40  # of each table; fewer where names are long
_MOST_COLUMNS = 12
_MOST_SHOWN = 100  # characters of a name
_MARKS = {"equal": "✓", "ambiguous": "≈", "undefined": "○", KNOWN_FAILURE: "△"}
_ACTIVE = re.compile(r"[^\w ,;/()%.+-]|_|(?<=www)\.", re.IGNORECASE)


def summary_of(report: Report) -> str:
    """The summary.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        Markdown of at most `MOST_BYTES` in UTF-8: the verdict, a table of operations and implementations, the first
        findings with the command that replays each, and timings.

    Examples
    --------
    >>> rows = (Row("yolox.assign", "mine", "one box", "", "equal"),)
    >>> print(summary_of(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}, rows)))
    ### ✓ detoracle: no findings
    <BLANKLINE>
    1 operation × 1 implementation, 1 check: 1 equal, 0 ambiguous, 0 undefined, 0 expected to fail, 0 findings.
    <BLANKLINE>
    | operation | <code>mine</code> |
    | --- | --- |
    | <code>yolox.assign</code> | ✓ 1 |
    <BLANKLINE>
    Seed 0: <code>c</code>
    <BLANKLINE>
    """
    tally = Tally(report.rows)
    most = _MOST_LINES
    while True:
        text = "\n\n".join(["\n".join(part) for part in _parts(report, tally, most)]) + "\n"
        if most == 0 or len(text.encode()) <= MOST_BYTES:
            return text
        most //= 2


def _parts(report: Report, tally: Tally, most: int) -> Iterator[list[str]]:
    yield [f"### {_verdict(tally)}"]
    yield [f"{tally.sentence}."]
    if tally.cells:
        yield _matrix(tally, most)
    if tally.findings:
        yield _findings([row for cell in tally.cells.values() for row in cell.findings], most)
    if report.measurements:
        yield _timings(report.measurements, most)
    yield [f"Seed {report.seed}: {_code(report.command)}"]


def _verdict(tally: Tally) -> str:
    if tally.findings:
        return f"✗ detoracle: {tally.findings:,} finding{'' if tally.findings == 1 else 's'}"
    if tally.counts["equal"] + tally.counts["ambiguous"]:
        return "✓ detoracle: no findings"
    return "○ detoracle: nothing was judged"


def _matrix(tally: Tally, most: int) -> list[str]:
    columns = tally.implementations[: min(most, _MOST_COLUMNS)]
    lines = [
        [_code(operation), *(_cell(tally.cells.get((operation, name))) for name in columns)]
        for operation in tally.operations[:most]
    ]
    left_out = len(tally.implementations) - len(columns)
    more = [f"\n{left_out:,} more implementations are in the report."] if left_out else []
    return _table(["operation", *map(_code, columns)], lines, len(tally.operations)) + more


def _cell(cell: Cell | None) -> str:
    """The worst status of a cell, and how many checks had it."""
    if cell is None:
        return ""
    if cell.findings:
        return f"✗ {len(cell.findings):,} of {cell.checks:,}"
    return f"{_MARKS.get(cell.worst, '✗')} {cell.checks:,}"


def _findings(rows: Sequence[Row], most: int) -> list[str]:
    lines = []
    for row in rows[:most]:
        replay = _code(f"detoracle replay {shlex.quote(visible(row.scene_file))}") if row.scene_file else ""
        what = f"{row.where} {row.message}".strip()
        lines.append([*map(_code, (row.clause or row.status, row.implementation, row.place, what)), replay])
    return _table(["clause", "implementation", "scene", "finding", "replay"], lines, len(rows))


def _timings(measurements: Sequence[Measurement], most: int) -> list[str]:
    lines = [
        [
            *map(_code, (m.operation, m.implementation, m.workload)),
            f"{m.milliseconds:.3g}",
            "baseline" if m.implementation == m.baseline else f"{m.times_faster:.3g} ({m.low:.3g} to {m.high:.3g})",
            f"{m.operations:,}",
        ]
        for m in measurements[:most]
    ]
    head = ["operation", "implementation", "workload", "ms", "times faster (95 %)", "operations"]
    return _table(head, lines, len(measurements))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], whole: int) -> list[str]:
    """A table, and below it how many of all its lines were left out."""
    shown = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]]
    return [*shown, f"\n{whole - len(lines):,} more are in the report."] if whole > len(lines) else shown


def _code(text: str) -> str:
    """A stranger's text as code, with nothing in it that acts; empty where there is none."""
    escaped = _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", short(text, _MOST_SHOWN))
    return f"<code>{escaped}</code>" if escaped.strip() else ""
