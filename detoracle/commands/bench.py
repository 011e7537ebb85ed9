"""``bench``: how fast, next to what, and how it grows."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from detoracle.commands.common import device_named, dtype_named, write_json, written_command
from detoracle.implementations.registry import Implementation, discover
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.bench import Bench, copy_speed, growth, measure
from detoracle.reports.compare import Part, read_part, run_key, write_part
from detoracle.reports.environment import environment
from detoracle.reports.record import Measurement, Report, to_json
from detoracle.reports.workloads import STANDARD_ANCHORS, Workload
from detoracle.reports.writing import locked, write_report

__all__ = ["bench"]

_BASELINE = "loop"


def bench(
    operation: Annotated[str, typer.Argument(help="Such as yolox.loss; see 'detoracle list'.")],
    implementation: Annotated[
        list[str] | None, typer.Option(help="Only implementations of this name, or package.module:callable.")
    ] = None,
    rival: Annotated[
        str, typer.Option(help="package.module:callable that the others are compared with, instead of 'loop'.")
    ] = "",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images; may be repeated, as may the next.")] = None,
    gts: Annotated[list[int] | None, typer.Option(min=1, help="Ground truths an image.")] = None,
    anchors: Annotated[list[int] | None, typer.Option(min=1, help="Anchors an image; decides its side.")] = None,
    classes: Annotated[list[int] | None, typer.Option(min=1, help="Classes, without background.")] = None,
    scenes: Annotated[str, typer.Option(help="realistic or crowd; by default crowds from 52 ground truths on.")] = "",
    setting: Annotated[str | None, typer.Option(help="One of its argument sets, such as a flavour.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help="Time the forward pass alone.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each; six or more give an interval.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Decides the workloads.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("detoracle-bench"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run finished.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Time implementations against each other, and count what a call costs; every output is checked.

    Without sizes: 16 images of 20 ground truths. Sizes given three times or more also give growth exponents. Exit code
    1 if an output was wrong.
    """
    clock, started = time.monotonic(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    system, found = find_operation(operation)
    settings = Bench(device_named(device), dtype_named(dtype), seed, rounds, forward, setting, scenes)
    chosen = _chosen(found.name, implementation or [], rival, settings.device)
    calls = {one.name: one.load() for one in chosen}
    baseline = chosen[0].name
    usual = (STANDARD_ANCHORS[system.name], 20 if system.name == "ssd" else 80)
    sizes = product(batch or [16], gts or [20], anchors or [usual[0]], classes or [usual[1]])
    speed = copy_speed(settings.device)
    key = run_key(settings, chosen)
    parts: list[Part] = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    with locked(out):
        for workload in (Workload(*size) for size in sizes):
            name = f"{found.name}-{'-'.join(map(str, vars(workload).values()))}"
            part = read_part(name, key, out) if resume else None
            if part is None:
                rows, measurements = measure(
                    system, found, calls, workload, settings, baseline=baseline, bytes_a_second=speed
                )
                part = Part(name, rows, measurements)
                write_part(part, key, out)
            parts.append(part)
            _show(part, console)
    measured = tuple(m for part in parts for m in part.measurements)
    report = Report(
        title=f"Bench of {found.name}",
        command=written_command(sys.argv),
        started=started,
        seconds=round(time.monotonic() - clock, 1),
        seed=seed,
        environment=environment(),
        rows=tuple(row for part in parts for row in part.rows),
        measurements=measured,
        growth=growth(measured),
        notes=(f"A copy moved {speed / 1e9:.1f} GB/s in this run, read and written bytes together.",),
    )
    page = write_report(report, out)
    write_json(json, to_json(report))
    for fit in report.growth:
        print(
            f"{fit.implementation}: time grows as {fit.axis}^{fit.time_exponent:.2f}, peak live bytes as "
            f"{fit.axis}^{fit.bytes_exponent:.2f} ({fit.fixed}, {fit.points} sizes)"
        )
    print(f"report: {page}")
    if report.findings:
        raise typer.Exit(1)


def _chosen(operation: str, names: list[str], rival: str, device: str) -> list[Implementation]:
    """Implementations to time, the baseline first."""
    found = [one for one in discover(Path("pyproject.toml"), device=device) if one.operation == operation]
    targets = [Implementation(operation, name, name) for name in names if ":" in name]
    known = {one.name for one in (*found, *targets)}
    if unknown := [name for name in names if name not in known]:
        raise InputError("--implementation", expected=f"one of {', '.join(sorted(known))}", got=", ".join(unknown))
    chosen = [*(one for one in found if not names or one.name in names), *targets]
    if rival:
        return [Implementation(operation, rival, rival), *(one for one in chosen if one.name != rival)]
    chosen.sort(key=lambda one: one.name != _BASELINE)
    if not chosen:
        raise InputError("--implementation", expected="at least one", got="none", where=operation)
    return chosen


def _show(part: Part, console: Console) -> None:
    columns = ["workload", "implementation", "ms", "times faster", "95 %", "of floor", "operations", "syncs", "peak MB"]
    on_gpu = any(m.launches for m in part.measurements)
    table = Table(*columns, *(("replayed, ms", "launches", "GPU's peak MB") if on_gpu else ()), box=None)
    for m in part.measurements:
        table.add_row(*_cells(m), *(_gpu_cells(m) if on_gpu else ()))
    console.print(table)
    for row in part.rows:
        if row.wrong:
            print(f"finding: {row.clause} by {row.implementation} on {row.scene}: {row.message}")


def _cells(m: Measurement) -> tuple[str, ...]:
    return (
        m.workload,
        m.implementation,
        f"{m.milliseconds:.2f}",
        f"{m.times_faster:.2f}",
        f"{m.low:.2f} to {m.high:.2f}",
        f"{m.floor_share:.1%}",
        str(m.operations),
        str(m.host_syncs),
        f"{m.peak_live_bytes / 1e6:.1f}",
    )


def _gpu_cells(m: Measurement) -> tuple[str, ...]:
    replayed = f"{m.replay_milliseconds:.2f}" if m.replay_milliseconds else "not capturable"
    return replayed, str(m.launches), f"{m.device_peak_bytes / 1e6:.1f}"
