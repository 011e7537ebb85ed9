"""``compare``: the main job."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from detoracle.commands.common import (
    chosen_operations,
    device_named,
    dtype_named,
    scenes_named,
    write_json,
    written_command,
)
from detoracle.implementations.registry import Implementation, discover
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.properties.worker import Worker
from detoracle.reference.contract import Operation
from detoracle.reference.errors import InputError
from detoracle.reference.quirks.ledger import ledger
from detoracle.reports.compare import Part, Settings, compare_operation, read_part, run_key, write_part
from detoracle.reports.environment import environment
from detoracle.reports.record import Report, Surprise, to_json
from detoracle.reports.sheets import law_table
from detoracle.reports.writing import locked, write_report

__all__ = ["compare"]

Chosen = list[tuple[System, Operation, list[Implementation]]]


def compare(
    operation: Annotated[list[str] | None, typer.Option(help="Only this operation; may be repeated.")] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(help="Only implementations of this name, or package.module:callable (with one --operation)."),
    ] = None,
    scenes: Annotated[
        list[str] | None, typer.Option(help="edge, realistic, crowd, or a file or folder; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Decides every random scene.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("detoracle-report"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over finished operations of an interrupted run.")
    ] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds one call may take.")] = 60.0,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Compare implementations with the oracles on scenes: correctness and cost, to CSV, JSON and one HTML page."""
    clock, started = time.monotonic(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    settings = Settings(device_named(device), dtype_named(dtype), seed, time_limit)
    names = scenes or ["realistic"]
    chosen = _chosen(operation or [], implementation or [], settings.device)
    all_scenes = [scene for name in names for scene in scenes_named(name, seed=seed)]
    key = run_key(settings, names, chosen)
    with locked(out):
        parts = _parts(chosen, all_scenes, settings, out, key if resume else None, key)
    report = Report(
        title=f"Implementations against oracles, {' and '.join(Path(name).name for name in names)} scenes",
        command=written_command(sys.argv),
        started=started,
        seconds=round(time.monotonic() - clock, 1),
        seed=seed,
        environment=environment(),
        rows=tuple(row for part in parts for row in part.rows),
        measurements=tuple(m for part in parts for m in part.measurements),
        pictures=tuple(p for part in parts for p in part.pictures),
        quirks=_quirks({operation.name for _, operation, _ in chosen}),
        tables=(law_table([operation for _, operation, _ in chosen]),),
        notes=tuple(f"{s.name}: {s.note}" for s in all_scenes if "file" in s.tags and s.note),
    )
    page = write_report(report, out)
    write_json(json, to_json(report))
    _summarise(report)
    print(f"report: {page}")
    if report.findings:
        raise typer.Exit(1)


def _chosen(operations: list[str], implementations: list[str], device: str) -> Chosen:
    pairs = chosen_operations(operations)
    targets = [name for name in implementations if ":" in name]
    if targets and len(operations) != 1:
        raise InputError(
            "--implementation", expected="one --operation beside package.module:callable", got=str(len(operations))
        )
    found = [*discover(Path("pyproject.toml"), device=device), *(Implementation(operations[0], t, t) for t in targets)]
    known = {one.name for one in found}
    if unknown := [name for name in implementations if name not in known]:
        raise InputError("--implementation", expected=f"one of {', '.join(sorted(known))}", got=", ".join(unknown))
    return [
        (
            system,
            op,
            [one for one in found if one.operation == op.name and (not implementations or one.name in implementations)],
        )
        for system, op in pairs
    ]


def _parts(
    chosen: Chosen, scenes: list[Scene], settings: Settings, out: Path, resumed: str | None, key: str
) -> list[Part]:
    parts = []
    names = {one.name for _, _, implementations in chosen for one in implementations}
    with ExitStack() as stack:
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(console=console, disable=not console.is_terminal, transient=True))
        workers = {name: stack.enter_context(Worker(time_limit=settings.time_limit)) for name in sorted(names)}
        task = progress.add_task("comparing", total=len(chosen))
        for system, operation, implementations in chosen:
            progress.update(task, description=operation.name)
            part = read_part(operation.name, resumed, out) if resumed else None
            if part is None:
                part = compare_operation(system, operation, implementations, scenes, workers, settings, out)
                write_part(part, key, out)
            parts.append(part)
            progress.advance(task)
    return parts


def _quirks(operations: set[str]) -> tuple[Surprise, ...]:
    return tuple(
        Surprise(quirk.id, quirk.operation, quirk.statement, quirk.upstream, quirk.safe, " ".join(quirk.defects))
        for quirk in ledger()
        if quirk.operation in operations
    )


def _summarise(report: Report) -> None:
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in report.rows:
        count = counts.setdefault((row.operation, row.implementation), {})
        count[row.status] = count.get(row.status, 0) + 1
    faster = {(m.operation, m.implementation): m.times_faster for m in report.measurements}
    table = Table("operation", "implementation", "checks", "verdicts", "times faster than the oracle", box=None)
    for (operation, implementation), count in counts.items():
        verdicts = ", ".join(f"{number} {status}" for status, number in count.items())
        ratio = faster.get((operation, implementation))
        table.add_row(operation, implementation, str(sum(count.values())), verdicts, f"{ratio:.2f}" if ratio else "")
    console = Console(soft_wrap=True)
    console.print(table)
    for row in report.findings[:10]:
        print(f"finding: {row.clause} by {row.implementation} on {row.scene} {row.setting}: {row.where} {row.message}")
    print(f"{len(report.rows)} checks, {len(report.findings)} findings")
