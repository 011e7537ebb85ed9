"""Tables that a page shows where the run has them: laws, planted faults and false alarms, drift."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detoracle.properties.laws.catalogue import LAWS, departures_of
from detoracle.reference.contract import Operation
from detoracle.reference.errors import InputError
from detoracle.reports.record import Report, Table

__all__ = ["alarm_table", "drift_tables", "kill_table", "law_table", "read_tables", "with_tables"]


def law_table(operations: Sequence[Operation]) -> Table:
    """Which laws the operations obey: how a right answer changes when the question does.

    Parameters
    ----------
    operations : sequence of Operation

    Returns
    -------
    Table
        One line a law that concerns one of them.

    Examples
    --------
    >>> from detoracle.reference import ssd
    >>> table = law_table([ssd.match.operation])
    >>> next(line for line in table.lines if line[0] == "empty-image")[2:]
    ['0 of 1', '', 'ssd.match']
    """
    lines = []
    for law in LAWS:
        concerned = [operation for operation in operations if law.concerns(operation)]
        departing = {operation.name: departures_of(law, operation) for operation in concerned}
        obeying = [name for name, found in departing.items() if not found]
        none = [name for name, found in departing.items() if any(departure.whole for departure in found)]
        part = [name for name, found in departing.items() if found and name not in none]
        if concerned:
            lines.append(
                [law.id, law.statement, f"{len(obeying)} of {len(concerned)}", ", ".join(part), ", ".join(none)]
            )
    note = (
        "How a right answer changes when the question does. 'detoracle check' judges one law in turn beside each case."
    )
    return Table("Laws", note, ("law", "what it says", "operations that obey it", "in part", "not"), lines)


def kill_table(faults: Sequence[Mapping[str, Any]]) -> Table:
    """Planted faults, and which clause caught each after how many scenes.

    Parameters
    ----------
    faults : sequence of mapping
        As in the JSON of ``detoracle faults``.

    Returns
    -------
    Table

    Examples
    --------
    >>> fault = {"id": "a", "operation": "yolox.assign", "origin": "", "seeds": 2, "killed": 2}
    >>> kill_table([{**fault, "clauses": {"yolox.assign[outcome]": 2}, "median": 1, "most": 3}]).lines[0][2]
    '2 of 2'
    """
    columns = ("fault", "operation", "caught", "by clause (times)", "scenes needed: median", "most", "origin")
    lines = [
        [
            fault["id"],
            fault["operation"],
            f"{fault['killed']} of {fault['seeds']}",
            ", ".join(f"{clause} ({times})" for clause, times in fault["clauses"].items()) or "survives",
            f"{fault['median']:g}",
            str(fault["most"]),
            fault["origin"],
        ]
        for fault in faults
    ]
    caught = sum(fault["killed"] == fault["seeds"] for fault in faults)
    note = f"Deliberately wrong implementations: {caught} of {len(faults)} were caught with every seed."
    return Table("Planted faults", note, columns, lines)


def alarm_table(totals: Sequence[Mapping[str, Any]]) -> Table:
    """Right code in other arithmetic, and how often it was called wrong.

    Parameters
    ----------
    totals : sequence of mapping
        As in the JSON of ``detoracle faults --false-alarms``.

    Returns
    -------
    Table

    Examples
    --------
    >>> total = {"implementation": "loop", "arithmetic": "float64", "calls": 9, "false_alarms": 0}
    >>> alarm_table([total]).note
    'Right code in other arithmetic: 0 false alarms in 9 calls.'
    """
    columns = ("implementation", "arithmetic", "calls", "false alarms")
    lines = [[total["implementation"], total["arithmetic"], *(str(total[n]) for n in _ALARMS)] for total in totals]
    calls, alarms = (sum(total[name] for total in totals) for name in _ALARMS)
    note = f"Right code in other arithmetic: {alarms:,} false alarms in {calls:,} calls."
    return Table("False alarms", note, columns, lines)


_ALARMS = ("calls", "false_alarms")


def drift_tables(atlas: Mapping[str, Any]) -> tuple[Table, ...]:
    """Which release of a genuine package changed what, and where each departs from its oracle.

    Parameters
    ----------
    atlas : mapping
        As in the ``atlas.json`` of `detoracle.reports.drift`.

    Returns
    -------
    tuple of Table

    Examples
    --------
    >>> [table.title for table in drift_tables({"checks": [], "changes": []})]
    ['Drift: what changed when', 'Drift: every release']
    """
    changes = [
        [
            change["package"],
            f"{change['before']} → {change['after']}",
            change["operation"],
            ", ".join(change["began"]),
            ", ".join(change["ceased"]),
        ]
        for change in atlas["changes"]
    ]
    releases = [
        [
            one["package"],
            one["release"],
            one["operation"],
            str(sum(one["counts"].values())),
            ", ".join(f"{failure['clause']} ({failure['times']})" for failure in one["failures"]) or "nothing",
        ]
        for one in atlas["checks"]
    ]
    when = ("package", "releases", "operation", "began to depart in", "no longer departs in")
    every = ("package", "release", "operation", "cases", "departs in (times)")
    return (
        Table("Drift: what changed when", "Releases whose departures from the oracle changed.", when, changes),
        Table("Drift: every release", "The oracle is the yardstick, not the judge.", every, releases),
    )


def read_tables(path: Path) -> tuple[Table, ...]:
    """Tables of a file that ``detoracle faults --json`` or the drift atlas wrote.

    Parameters
    ----------
    path : Path

    Returns
    -------
    tuple of Table

    Raises
    ------
    InputError
        If it cannot be read, or is neither.

    Examples
    --------
    >>> read_tables(Path("nowhere.json"))
    Traceback (most recent call last):
    detoracle.reference.errors.InputError: nowhere.json: expected JSON of 'detoracle faults' or a drift atlas, got ...
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if "changes" in body:
            return drift_tables(body)
        return (kill_table(body["faults"]),) if "faults" in body else (alarm_table(body["totals"]),)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError(path.name, expected="JSON of 'detoracle faults' or a drift atlas", got=got) from error


def with_tables(report: Report, tables: Sequence[Table]) -> Report:
    """The report with tables, instead of older ones of the same title.

    Examples
    --------
    >>> empty = Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {})
    >>> twice = with_tables(with_tables(empty, [alarm_table([])]), [alarm_table([])])
    >>> [table.title for table in twice.tables]
    ['False alarms']
    """
    titles = {table.title for table in tables}
    return replace(report, tables=(*(t for t in report.tables if t.title not in titles), *tables))
