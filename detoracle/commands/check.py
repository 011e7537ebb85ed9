"""``check``: is a stranger's callable right?"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from detoracle.commands.common import device_named, dtype_named, write_json
from detoracle.properties.checking import Result, cases, judge_case, smallest_failure
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.known_failures import KnownFailure, problems, read_known_failures
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenefile import SavedScene, write_scene
from detoracle.properties.systems import System, find_operation
from detoracle.properties.worker import Worker
from detoracle.reference.contract import Operation

__all__ = ["check"]

_MOST_TIMEOUTS = 3  # a callable that hangs so often is not asked again


def check(
    operation: Annotated[str, typer.Argument(help="Such as yolox.assign; see 'detoracle list'.")],
    implementation: Annotated[str, typer.Argument(metavar="package.module:callable")],
    examples: Annotated[int, typer.Option(min=0, help="Random scenes beside the edge-case catalogue.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides the random scenes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    known_failures: Annotated[Path | None, typer.Option(help="TOML list of failures to expect.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for failing scenes.")] = Path("detoracle-check"),
    time_limit: Annotated[float, typer.Option(help="Seconds one call may take.")] = 60.0,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Check a third party's callable against the oracle on edge cases and random scenes.

    Writes the smallest failing scene of each violated clause; exit code 1 if there is one that is not known.
    """
    system, found = find_operation(operation)
    entries = read_known_failures(known_failures) if known_failures else ()
    place: dict[str, Any] = {"device": device_named(device), "dtype": dtype_named(dtype)}
    results: list[Result] = []
    with Worker(time_limit=time_limit) as worker:
        worker.require(implementation)

        def call(arguments: Any) -> Any:
            return worker.perform(found, implementation, arguments)

        console = Console(stderr=True)
        scenes = list(chain(edge_cases(), random_scenes(examples, seed=seed)))
        for scene in track(scenes, operation, console=console, disable=not console.is_terminal, transient=True):
            for case in cases(system, found, scene, **place):
                results.append(judge_case(case, expect(system, found, case.arguments), call))
            if sum(result.verdict.status == "timeout" for result in results) >= _MOST_TIMEOUTS:
                print(f"stopped after {_MOST_TIMEOUTS} time-outs")
                break
        failures = [result for result in results if result.verdict.wrong]
        saved = list(_save(system, found, implementation, _unknown(failures, entries), call, out))
    _conclude(found, implementation, results, entries, saved, seed, json)


def _clause(result: Result) -> str:
    return result.verdict.findings[0].clause


def _unknown(failures: list[Result], entries: tuple[KnownFailure, ...]) -> list[Result]:
    return [f for f in failures if not any(e.covers(_clause(f), f.case.scene.name) for e in entries)]


def _save(
    system: System, operation: Operation, implementation: str, failures: list[Result], call: Any, out: Path
) -> Iterator[dict[str, Any]]:
    """For each violated clause, its smallest failing scene, as a file."""
    by_clause: dict[str, Result] = {}
    for failure in failures:
        by_clause.setdefault(_clause(failure), failure)
    for number, (clause, failure) in enumerate(by_clause.items(), start=1):
        if failure.verdict.status not in ("timeout",):
            failure = smallest_failure(system, operation, failure, call)
        path = out / f"{operation.name}-{number}.scene.json"
        texts = tuple(f"{f.clause} {f.where}: {f.message}" for f in failure.verdict.findings)
        write_scene(path, SavedScene(operation.name, failure.case.name, failure.case.arguments, implementation, texts))
        times = sum(_clause(f) == clause for f in failures)
        yield {"clause": clause, "scene": failure.case.name, "file": str(path), "findings": texts, "times": times}


def _conclude(
    operation: Operation,
    implementation: str,
    results: list[Result],
    entries: tuple[KnownFailure, ...],
    saved: list[dict[str, Any]],
    seed: int,
    json: Path | None,
) -> None:
    failures = [(_clause(r), r.case.scene.name) for r in results if r.verdict.wrong]
    stale = problems(entries, failures, datetime.datetime.now(datetime.UTC).date())
    counts: dict[str, int] = {}
    for result in results:
        counts[result.verdict.status] = counts.get(result.verdict.status, 0) + 1
    for failure in saved:
        print(
            f"{failure['clause']} fails on {failure['times']} of {len(results)} cases, "
            f"at its smallest on {failure['scene']}:"
        )
        for text in failure["findings"]:
            print(f"  {text}")
        print(f"  replay: detoracle replay {failure['file']}")
    for text in stale:
        print(text)
    verdict = "wrong" if saved or stale else "right"
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    print(f"{operation.name} by {implementation}: {verdict} ({len(results)} cases with seed {seed}: {summary})")
    body = {"operation": operation.name, "implementation": implementation, "verdict": verdict, "counts": counts}
    write_json(json, {**body, "seed": seed, "failures": saved, "known_failures": stale})
    if verdict == "wrong":
        raise typer.Exit(1)
