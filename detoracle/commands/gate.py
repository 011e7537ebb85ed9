"""``gate``: what changed since the baseline, and may it be released?"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from detoracle.commands.common import write_json
from detoracle.properties.known_failures import problems, read_known_failures
from detoracle.reference.errors import InputError
from detoracle.reports.characteristics import measure_gate
from detoracle.reports.gate import Change, changes, environment_key
from detoracle.reports.history import append
from detoracle.reports.record import KNOWN_FAILURE, Measurement, Report
from detoracle.reports.writing import read_report, write_report

__all__ = ["gate"]

_THRESHOLD = 1.05


def gate(
    baseline: Annotated[Path | None, typer.Option(help="Folder of baselines, one an environment.")] = None,
    run: Annotated[Path, typer.Option(help="The run to judge, of compare or bench.")] = Path("detoracle-report"),
    accept: Annotated[bool, typer.Option("--accept", help="Make the run the new baseline.")] = False,
    known_failures: Annotated[Path | None, typer.Option(help="TOML list of failures to expect.")] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Measure the gate's own false alarms and power on this machine.")
    ] = False,
    trials: Annotated[int, typer.Option(min=1, help="Trials of --self-test.")] = 100,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the changes to this file.")] = None,
) -> None:
    """Compare a run with its baseline: verdicts, exact counters, timings. Exit code 1 if something got worse.

    A run that checked less than its baseline fails too. Thresholds of timings are read from [tool.detoracle.gate] of
    pyproject.toml: ``threshold``, and per operation in ``thresholds``.
    """
    threshold = _thresholds(Path("pyproject.toml"))
    if self_test:
        _self_test(trials, threshold(""), json)
        return
    if baseline is None:
        raise InputError("--baseline", expected="a folder", got="none", fix="Or measure the gate with --self-test.")
    current = read_report(run)
    place = baseline / environment_key(current.environment)
    if accept:
        write_report(current, place)
        append(current, baseline / "history.jsonl")
        print(f"baseline: {place}")
        return
    found = changes(_baseline(baseline, place), current, threshold=threshold, again=_again)
    listed = _known(known_failures, current)
    append(current, baseline / "history.jsonl")
    _show(found, listed)
    write_json(json, {"changes": [vars(change) for change in found], "known_failures": listed})
    if listed or any(change.fails for change in found):
        raise typer.Exit(1)


def _baseline(folder: Path, place: Path) -> Report:
    if not (place / "results.json").is_file():
        there = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise InputError(
            "--baseline",
            expected=f"a baseline for this environment, {place.name}",
            got=", ".join(there) or "none",
            fix="Make one with --accept.",
        )
    return read_report(place)


def _known(path: Path | None, report: Report) -> list[str]:
    """Known failures that are out of date or match nothing."""
    if path is None:
        return []
    failures = [(row.clause, row.scene, row.setting) for row in report.rows if row.wrong or row.status == KNOWN_FAILURE]
    return problems(read_known_failures(path), failures, datetime.datetime.now(datetime.UTC).date())


def _thresholds(pyproject: Path) -> Callable[[str], float]:
    settings: dict[str, Any] = {}
    if pyproject.is_file():
        try:
            tool = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("tool", {})
            settings = tool.get("detoracle", {}).get("gate", {})
            usual, special = settings.get("threshold", _THRESHOLD), settings.get("thresholds", {})
            if not all(isinstance(value, int | float) and value > 1 for value in (usual, *special.values())):
                raise ValueError(f"{usual!r}, {special!r}")
        except (ValueError, AttributeError) as error:
            raise InputError("[tool.detoracle.gate]", expected="factors above 1", got=str(error)) from error
    return lambda operation: settings.get("thresholds", {}).get(operation, settings.get("threshold", _THRESHOLD))


def _again(m: Measurement) -> Measurement | None:
    """Take a measurement of the bench once more, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"--{axis}={getattr(m, axis)}" for axis in ("batch", "gts", "anchors", "classes")]
        names = ["--rival", m.baseline] if ":" in m.baseline else ["--implementation", m.baseline]
        arguments = ["bench", m.operation, "--implementation", m.implementation, *names, *sizes]
        arguments += ["--setting", m.setting, "--rounds", str(m.rounds), "--out", folder]
        arguments += ["--forward"] if m.phase == "forward" else []
        code = "from detoracle.cli import main; main()"
        subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
        try:
            found = read_report(Path(folder)).measurements
        except InputError:
            return None
    return next((one for one in found if one.implementation == m.implementation and one.inputs == m.inputs), None)


def _show(found: tuple[Change, ...], listed: list[str]) -> None:
    table = Table("", "kind", "operation", "implementation", "on", "change", "before", "after", box=None)
    for change in sorted(found, key=lambda c: not c.fails):
        mark = "FAILS" if change.fails else ""
        where = change.operation, change.implementation, change.where
        table.add_row(mark, change.kind, *where, change.outcome, change.before, change.after)
    if found:
        Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    for text in listed:
        print(text)
    fewer = sum(change.outcome == "fewer" for change in found)
    if fewer:
        print(f"{fewer} counters fell: make this run the new baseline with --accept")
    failed = sum(change.fails for change in found) + len(listed)
    print(f"gate: {failed} failures, {len(found)} changes looked at" if failed else "gate: passed")


def _self_test(trials: int, threshold: float, json: Path | None) -> None:
    rates = measure_gate(trials, threshold=threshold)
    for rate in rates:
        unchanged = "unchanged" if not rate.slowdown else "one operation more"
        planted = f"{rate.slowdown:.0%} slower" if rate.what == "timing" and rate.slowdown else unchanged
        print(f"{rate.what}, {planted}: failed {rate.failed} of {rate.trials} ({rate.share:.1%})")
    write_json(json, [vars(rate) for rate in rates])
