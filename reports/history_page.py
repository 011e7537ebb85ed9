"""The history as a page: how ratios and counters went, run by run, for every operation and workload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from detoracle.reports.gate import COUNTERS
from detoracle.reports.history import Entry
from detoracle.reports.layout import laid_out
from detoracle.reports.plot import Point, Series, plot

__all__ = ["render_history"]

_PLOTTED = {"operations": "Operations dispatched", "peak_live_bytes": "Peak live bytes"}
_MOST_CHANGES = 500
_MOST_RUNS = 200


class _Change(NamedTuple):
    """A counter that was another one in the run before."""

    run: int
    operation: str
    implementation: str
    workload: str
    counter: str
    before: int
    after: int


class _Group(NamedTuple):
    """One operation on one workload."""

    operation: str
    workload: str
    phase: str
    drawings: tuple[Markup, ...]


def render_history(entries: Sequence[Entry], name: str) -> str:
    """The page.

    Parameters
    ----------
    entries : sequence of Entry
        In the order of the runs; of very many, the last ones are shown.
    name : str
        Of the history's file.

    Returns
    -------
    str
        HTML, self-contained.

    Examples
    --------
    >>> page = render_history([Entry("2026-01-01T00:00:00Z", "abc", "cpu", {"equal": 3}, ())], "history.jsonl")
    >>> "1 run" in page
    True
    """
    first = max(len(entries) - _MOST_RUNS, 0) + 1
    runs = list(enumerate(entries, start=1))[first - 1 :]
    found = list(_changes(runs))
    return laid_out(
        "history",
        "tables",
        {},
        title=f"History {name}",
        number=len(entries),
        runs=runs,
        groups=list(_groups(runs)),
        changes=found[-_MOST_CHANGES:],
        more=max(len(found) - _MOST_CHANGES, 0),
    )


def _key(m: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(m["operation"]), str(m["workload"]), str(m["phase"])


def _groups(runs: Sequence[tuple[int, Entry]]) -> Iterator[_Group]:
    """Plots of each operation and workload, in the order they first occur."""
    taken: dict[tuple[str, str, str], dict[str, list[tuple[int, Mapping[str, Any]]]]] = {}
    for number, entry in runs:
        for m in entry.measurements:
            taken.setdefault(_key(m), {}).setdefault(str(m["implementation"]), []).append((number, m))
    for (operation, workload, phase), implementations in taken.items():
        ratios = [
            Series(name, tuple(_ratio(run, m) for run, m in found), number)
            for number, (name, found) in enumerate(implementations.items())
            if any(m["implementation"] != m["baseline"] for _, m in found)
        ]
        drawings = [plot("Times faster than the baseline", "run", "ratio", ratios, level=1.0)] if ratios else []
        for counter, title in _PLOTTED.items():
            series = [
                Series(name, tuple(_counted(run, m, counter) for run, m in found), number)
                for number, (name, found) in enumerate(implementations.items())
            ]
            drawings.append(plot(title, "run", counter.replace("_", " "), series))
        yield _Group(operation, workload, phase, tuple(drawings))


def _ratio(number: int, m: Mapping[str, Any]) -> Point:
    ratio, low, high = (float(m[name]) for name in ("times_faster", "low", "high"))
    return Point(number, ratio, low, high, f"run {number}: {ratio:.3g} times ({low:.3g} to {high:.3g})")


def _counted(number: int, m: Mapping[str, Any], counter: str) -> Point:
    count = int(m[counter])
    return Point(number, count, count, count, f"run {number}: {count:,}")


def _changes(runs: Sequence[tuple[int, Entry]]) -> Iterator[_Change]:
    """Counters that changed from one run to the next that has them."""
    last: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for number, entry in runs:
        for m in entry.measurements:
            key = (*_key(m), str(m["implementation"]))
            before = last.get(key, m)
            for counter in COUNTERS:
                if before[counter] != m[counter]:
                    told = counter.replace("_", " ")
                    yield _Change(number, key[0], key[3], key[1], told, before[counter], m[counter])
            last[key] = m
