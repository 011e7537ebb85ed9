"""History: one JSON line a run, only ever appended to, and a plot of it.

A line holds when the run was, its commit and environment, how many checks had which verdict, and every measurement's
ratio, interval and counters. A line that is torn, because the machine stopped while it was written, is skipped.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detoracle.reference.errors import InputError
from detoracle.reports.gate import COUNTERS, environment_key
from detoracle.reports.record import Measurement, Report

__all__ = ["FORMAT", "Entry", "append", "read"]

FORMAT = "detoracle-history/1"


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes
    ----------
    started, commit, environment : str
        UTC; empty without a checkout; `environment_key`.
    verdicts : dict of str to int
    measurements : tuple of dict
        operation, implementation, workload, phase, baseline, times_faster, low, high and the counters.
    """

    started: str
    commit: str
    environment: str
    verdicts: dict[str, int]
    measurements: tuple[dict[str, Any], ...]


def append(report: Report, path: Path) -> None:
    """Add a run at the end.

    Parameters
    ----------
    report : Report
    path : Path
        Made if need be.

    Raises
    ------
    InputError
        If the file cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "history.jsonl"
    >>> append(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}), file)
    >>> [entry.started for entry in read(file)]
    ['2026-01-01T00:00:00Z']
    """
    body = {
        "format": FORMAT,
        "started": report.started,
        "commit": str(report.environment.get("commit", "")),
        "environment": environment_key(report.environment),
        "verdicts": dict(Counter(row.status for row in report.rows)),
        "measurements": [_brief(m) for m in report.measurements],
    }
    line = json.dumps(body, sort_keys=True).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)  # one call: lines of two runs never mix
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(
            path.name,
            expected="a file that can be appended to",
            got=f"{type(error).__name__}: {error.strerror}",
            fix="Choose another folder, or make room and allow writing there.",
        ) from error


def _brief(m: Measurement) -> dict[str, Any]:
    names = ("operation", "implementation", "workload", "phase", "baseline", "times_faster", *COUNTERS)
    interval = {"low": m.low, "high": m.high} if m.low > 0 else {"low": m.times_faster, "high": m.times_faster}
    return {**{name: getattr(m, name) for name in names}, **interval}


def read(path: Path) -> tuple[Entry, ...]:
    """Read a history.

    Raises
    ------
    InputError
        If there is none, or a line is of another format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        got = type(error).__name__
        raise InputError(path.name, expected="a history that 'detoracle gate' wrote", got=got) from error
    return tuple(_entries(lines, path.name))


def _entries(lines: Sequence[str], name: str) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        try:
            body = json.loads(line)
        except ValueError:
            continue  # torn
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise InputError(name, expected=FORMAT, got=f"{line:.60}", where=f"line {number}")
        yield Entry(body["started"], body["commit"], body["environment"], body["verdicts"], tuple(body["measurements"]))
