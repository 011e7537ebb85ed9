"""``faults``: the suite sits its own exam."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from detoracle.commands.common import write_json, written_command
from detoracle.properties.faults.cheats import CHEATS
from detoracle.properties.faults.fault import examined, faults_of
from detoracle.properties.faults.ledger import Ledger, Sitting, alarm_sittings, cheat_sittings, fault_sittings, work
from detoracle.properties.systems import NAMES
from detoracle.reference.errors import InputError
from detoracle.reports.environment import environment
from detoracle.reports.record import Report
from detoracle.reports.record import Table as Sheet
from detoracle.reports.sheets import alarm_table, kill_table
from detoracle.reports.writing import write_report

__all__ = ["faults"]


def faults(
    system: Annotated[list[str] | None, typer.Option(help="Only this system; may be repeated. Without cheats.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Random scenes before the edge-case catalogue.")] = 20,
    seed: Annotated[int, typer.Option(help="Decides the random scenes.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted up from --seed.")] = 1,
    cheats: Annotated[bool, typer.Option(help="Also let callables sit that try to fool the harness.")] = True,
    false_alarms: Annotated[
        bool, typer.Option("--false-alarms", help="Right code in other arithmetic, instead.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of results, for resuming, and of a page of them.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Let the suite find planted faults, and print which clause caught which after how many scenes.

    Exit code 1 if a fault survives, or something right is called wrong.
    """
    clock, started = time.monotonic(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    known = NAMES if false_alarms else examined()
    if unknown := [name for name in system or [] if name not in known]:
        raise InputError("--system", expected=f"one of {', '.join(known)}", got=", ".join(unknown))
    chosen, numbers = system or list(known), range(seed, seed + seeds)
    ledger = Ledger(out)
    if false_alarms:
        found = _done(alarm_sittings(chosen, numbers, examples, ledger), ledger, jobs)
        body = _tell_alarms(found)
        shown: Sheet = alarm_table(body["totals"])
    else:
        asked = [fault for name in chosen for fault in faults_of(name)]
        sittings = fault_sittings(asked, numbers, examples, ledger)
        if cheats and not system:
            sittings += cheat_sittings(CHEATS, numbers, ledger)
        found = _done(sittings, ledger, jobs)
        body = _tell_kills(found, [*asked, *(CHEATS if cheats and not system else ())])
        shown = kill_table(body["faults"])
    write_json(json, {"schema": 1, "examples": examples, "seeds": list(numbers), **body})
    if out is not None:
        seconds = round(time.monotonic() - clock, 1)
        report = Report(shown.title, written_command(sys.argv), started, seconds, seed, environment(), tables=(shown,))
        print(f"report: {write_report(report, out)}")
    if body["failed"]:
        raise typer.Exit(1)


def _done(sittings: list[Sitting], ledger: Ledger, jobs: int) -> list[dict[str, Any]]:
    """What the ledger holds, and what the rest of the sittings find."""
    console = Console(stderr=True)
    found = track(
        work(sittings, ledger, jobs), "exam", total=len(sittings), console=console, disable=not console.is_terminal
    )
    return [*ledger.kept, *(entry for entries in found for entry in entries)]


def _tell_kills(found: list[dict[str, Any]], asked: list[Any]) -> dict[str, Any]:
    """Print the kill matrix; returns it."""
    by_fault: dict[str, list[dict[str, Any]]] = {fault.id: [] for fault in asked}
    for entry in found:
        by_fault[entry["fault"]].append(entry)
    rows = [_row(fault, by_fault[fault.id]) for fault in asked]
    headers = ("fault", "killed", "by", "scenes: median", "most", "origin")
    table = Table(*(Column(header, overflow="fold") for header in headers), box=None)
    for row in rows:
        by = ", ".join(row["clauses"]) if row["clauses"] else "SURVIVES"
        table.add_row(
            row["id"], f"{row['killed']}/{row['seeds']}", by, f"{row['median']:g}", str(row["most"]), row["origin"]
        )
    _wide().print(table)
    survivors = [row["id"] for row in rows if row["killed"] < row["seeds"]]
    kills, sat = sum(row["killed"] for row in rows), sum(row["seeds"] for row in rows)
    print(f"{len(rows) - len(survivors)} of {len(rows)} faults caught with every seed ({kills} of {sat} sittings)")
    return {"failed": bool(survivors), "faults": rows, "killed": kills, "sittings": sat, "survivors": survivors}


def _wide() -> Console:
    """A console that leaves a table readable where its output is kept in a file."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def _row(fault: Any, entries: list[dict[str, Any]]) -> dict[str, Any]:
    needed = [entry["examples"] for entry in entries]
    clauses = Counter(entry["clause"] for entry in entries if entry["clause"])
    return {
        "id": fault.id,
        "operation": fault.operation,
        "origin": fault.origin,
        "seeds": len(entries),
        "killed": clauses.total(),
        "clauses": dict(clauses.most_common()),
        "median": median(needed),
        "most": max(needed),
    }


def _tell_alarms(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Print calls and false alarms of each implementation and arithmetic; returns them."""
    totals: dict[tuple[str, str], list[Any]] = {}
    for entry in found:
        total = totals.setdefault((entry["implementation"], entry["arithmetic"]), [0, []])
        total[0] += entry["calls"]
        total[1] += entry["alarms"]
    table = Table("implementation", "arithmetic", "calls", "false alarms", box=None)
    for (name, arithmetic), (calls, alarms) in totals.items():
        table.add_row(name, arithmetic, str(calls), str(len(alarms)))
    _wide().print(table)
    alarms = [f"{name}, {arithmetic}: {text}" for (name, arithmetic), total in totals.items() for text in total[1]]
    for text in alarms:
        print(text)
    calls = sum(total[0] for total in totals.values())
    print(f"{len(alarms)} false alarms in {calls} calls")
    return {"failed": bool(alarms), "calls": calls, "false_alarms": alarms, "totals": list(_totals(totals))}


def _totals(totals: dict[tuple[str, str], list[Any]]) -> Iterator[dict[str, Any]]:
    for (name, arithmetic), (calls, alarms) in totals.items():
        yield {"implementation": name, "arithmetic": arithmetic, "calls": calls, "false_alarms": len(alarms)}
