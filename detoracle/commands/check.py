"""``check``: is a stranger's callable right?"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from detoracle.commands.common import device_named, dtype_named, write_json, written_command
from detoracle.properties.checking import Result, smallest_of
from detoracle.properties.examination import MOST_TIMEOUTS, examine, scenes_of_examination
from detoracle.properties.known_failures import problems, read_known_failures
from detoracle.properties.scenefile import SavedScene, write_scene
from detoracle.properties.systems import System, find_operation
from detoracle.properties.trials import Subject
from detoracle.properties.worker import Worker
from detoracle.reference.contract import Operation
from detoracle.reports.environment import environment
from detoracle.reports.record import KNOWN_FAILURE, Report, Row
from detoracle.reports.rows import row_of
from detoracle.reports.writing import locked, write_report

__all__ = ["check"]


def check(
    operation: Annotated[str, typer.Argument(help="Such as yolox.assign; see 'detoracle list'.")],
    implementation: Annotated[str, typer.Argument(metavar="package.module:callable")],
    examples: Annotated[int, typer.Option(min=0, help="Random scenes beside the edge-case catalogue.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides the random scenes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    known_failures: Annotated[Path | None, typer.Option(help="TOML list of failures to expect.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report and of failing scenes.")] = Path("detoracle-check"),
    time_limit: Annotated[float, typer.Option(help="Seconds one call may take.")] = 60.0,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Check a third party's callable on edge cases and random scenes, against the oracle and the laws in turn.

    Writes a report, and the smallest failing scene of each violated clause; exit code 1 if there is one that is not
    known.
    """
    clock, started = time.monotonic(), datetime.now(UTC)
    system, found = find_operation(operation)
    entries = read_known_failures(known_failures) if known_failures else ()
    place: dict[str, Any] = {"device": device_named(device), "dtype": dtype_named(dtype)}
    with locked(out), Worker(time_limit=time_limit) as worker:
        worker.require(implementation)

        def call(arguments: Any) -> Any:
            return worker.perform(found, implementation, arguments)

        console = Console(stderr=True)
        scenes = scenes_of_examination(examples, seed)
        progress = track(scenes, operation, console=console, disable=not console.is_terminal, transient=True)
        subject = Subject(system, found, implementation, worker, time_limit)
        results = list(examine(subject, progress, seed=seed, **place))
        if sum(result.verdict.status == "timeout" for result in results) >= MOST_TIMEOUTS:
            print(f"stopped after {MOST_TIMEOUTS} time-outs")
        today = started.date()
        current = [entry for entry in entries if entry.expires >= today]
        rows = [row_of(operation, implementation, result, current) for result in results]
        unknown = [result for row, result in zip(rows, results, strict=True) if row.wrong]
        saved = list(_save(system, found, implementation, unknown, call, out))
        failed = [(row.clause, row.scene, row.setting) for row in rows if row.wrong or row.status == KNOWN_FAILURE]
        stale = problems(entries, failed, today)
        report = Report(
            title=f"{operation} by {implementation}",
            command=written_command(sys.argv),
            started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            seconds=round(time.monotonic() - clock, 1),
            seed=seed,
            environment=environment(),
            rows=tuple(_with_files(rows, saved)),
            notes=tuple(stale),
        )
        page = write_report(report, out)
    _conclude(found, implementation, results, saved, stale, seed, page, json)


def _save(
    system: System, operation: Operation, implementation: str, failures: list[Result], call: Any, out: Path
) -> Iterator[dict[str, Any]]:
    """For each violated clause, its smallest failing scene, as a file."""
    by_clause: dict[str, list[Result]] = {}
    for failure in failures:
        by_clause.setdefault(failure.clause, []).append(failure)
    for number, (clause, members) in enumerate(by_clause.items(), start=1):
        repeatable = [member for member in members if member.verdict.status != "timeout" and member.trial == ""]
        failure = smallest_of(system, operation, repeatable, call) if repeatable else members[0]
        path = out / f"{operation.name}-{number}.scene.json"
        texts = tuple(f"{f.clause} {f.where}: {f.message}" for f in failure.verdict.findings)
        write_scene(path, SavedScene(operation.name, failure.case.name, failure.case.arguments, implementation, texts))
        name = failure.case.name
        yield {"clause": clause, "scene": name, "file": str(path), "findings": texts, "times": len(members)}


def _with_files(rows: Iterable[Row], saved: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """The rows; the first failure of a clause names the file of the smallest one."""
    files = {failure["clause"]: Path(failure["file"]).name for failure in saved}
    for row in rows:
        yield replace(row, scene_file=files.pop(row.clause)) if row.wrong and row.clause in files else row


def _conclude(
    operation: Operation,
    implementation: str,
    results: list[Result],
    saved: list[dict[str, Any]],
    stale: list[str],
    seed: int,
    page: Path,
    json: Path | None,
) -> None:
    counts: dict[str, int] = {}
    for result in results:
        counts[result.verdict.status] = counts.get(result.verdict.status, 0) + 1
    for failure in saved:
        print(
            f"{failure['clause']} fails in {failure['times']} of {len(results)} checks, "
            f"at its smallest on {failure['scene']}:"
        )
        for text in failure["findings"]:
            print(f"  {text}")
        print(f"  replay: detoracle replay {failure['file']}")
    for text in stale:
        print(text)
    verdict = "wrong" if saved or stale else "right"
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    laws, tried = (sum(result.law is not None for result in results), sum(result.trial != "" for result in results))
    asked = f"{len(results) - laws - tried} cases, {laws} laws and {tried} trials with seed {seed}"
    print(f"{operation.name} by {implementation}: {verdict} ({asked}: {summary})")
    body = {"operation": operation.name, "implementation": implementation, "verdict": verdict, "counts": counts}
    print(f"report: {page}")
    write_json(json, {**body, "seed": seed, "failures": saved, "known_failures": stale})
    if verdict == "wrong":
        raise typer.Exit(1)
