"""Everything a run leaves behind, made from one `Report`.

================== ==================================================================================
file               holds
================== ==================================================================================
results.json       the whole `Report`; one row, measurement or picture a line; `read_report` reads it
results.csv        its rows
measurements.csv   its measurements
report.html        one page that opens from disk, without a network
junit.xml          its rows as test cases, for a CI system
summary.md         the verdict in a few lines, for a comment on a pull request
badge.svg          the verdict as a picture, for a README
.lock              while somebody writes: the number of that process
================== ==================================================================================

Each file is the old one or the whole new one, never half. What the columns mean is said in `detoracle.reports.record`,
and to programs in ``schema/report-1.json`` beside this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detoracle.properties.scenefile import UNFINISHED, write_atomically
from detoracle.reference.errors import InputError
from detoracle.reports.badge import badge_of
from detoracle.reports.junit import junit_of
from detoracle.reports.markdown import summary_of
from detoracle.reports.page import render
from detoracle.reports.record import Measurement, Report, Row, from_json, to_json
from detoracle.reports.tables import csv_of

__all__ = ["locked", "read_report", "write_report"]


def write_report(report: Report, folder: Path) -> Path:
    """Write everything that a run leaves behind.

    Parameters
    ----------
    report : Report
    folder : Path
        Made if need be; older files of the same names are replaced.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        If the folder cannot be written to, or another run is writing there.

    Examples
    --------
    >>> import tempfile
    >>> report = Report("nothing yet", "detoracle compare", "2026-01-01T00:00:00Z", 1.0, 0, {})
    >>> with tempfile.TemporaryDirectory() as name:
    ...     page = write_report(report, Path(name))
    ...     print(*sorted(file.name for file in Path(name).iterdir()))
    ...     read_report(Path(name)) == report
    badge.svg junit.xml measurements.csv report.html results.csv results.json summary.md
    True
    """
    texts = {
        "results.json": _json(to_json(report)),
        "results.csv": csv_of(Row, report.rows),
        "measurements.csv": csv_of(Measurement, report.measurements),
        "report.html": render(report),
        "junit.xml": junit_of(report),
        "summary.md": summary_of(report),
        "badge.svg": badge_of(report),
    }
    with locked(folder):
        for name, text in texts.items():
            write_atomically(folder / name, text)
    return folder / "report.html"


def read_report(folder: Path) -> Report:
    """Read a finished run.

    Parameters
    ----------
    folder : Path
        With a ``results.json``.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        If there is none, or it is no report.

    Examples
    --------
    >>> read_report(Path("nowhere"))
    Traceback (most recent call last):
    detoracle.reference.errors.InputError: nowhere: expected a folder with a results.json, got FileNotFoundError. ...
    """
    try:
        body = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            folder.name,
            expected="a folder with a results.json",
            got=type(error).__name__,
            fix="'detoracle compare --out FOLDER' writes one.",
        ) from error
    except ValueError as error:
        raise InputError("results.json", expected="JSON", got=str(error), fix="Run it again to make one.") from error
    return from_json(body)


def _json(body: Mapping[str, Any]) -> str:
    """JSON with one row, measurement or picture a line."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n " + ",\n ".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
        return json.dumps(value, allow_nan=False)

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text(value)}" for name, value in body.items()) + "\n}\n"


# --------------------------------------------------------------------------------------------------- one at a time
@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; of an owner that died, its lock is taken over and its half-written files removed.

    Within one process it may be held again, so that a run can hold it from its first scene file to its page.

    Parameters
    ----------
    folder : Path
        Made if need be.

    Raises
    ------
    InputError
        If another process holds it, or the folder cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name, locked(Path(name)), locked(Path(name)):
    ...     [file.name for file in Path(name).iterdir()]
    ['.lock']
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = _take(lock)
    except OSError as error:
        raise InputError(
            str(folder),
            expected="a folder that can be written to",
            got=f"{type(error).__name__}: {error.strerror}",
            fix="Choose another folder, or make room and allow writing there.",
        ) from error
    try:
        yield
    finally:
        if ours:
            lock.unlink(missing_ok=True)


def _take(lock: Path) -> bool:
    """Make the lock file; False if this process has it already."""
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        try:
            owner = lock.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:  # given back a moment ago
            return _take(lock)
        if owner == str(os.getpid()):
            return False
        if _runs(owner):
            raise InputError(
                str(lock.parent),
                expected="a folder that no other run writes to",
                got=f"one that process {owner or 'unknown'} is writing to",
                fix=f"Wait for it, choose another folder, or delete {lock} if no run is under way.",
            ) from None
        lock.unlink(missing_ok=True)
        for half_written in lock.parent.rglob(f".*{UNFINISHED}"):
            half_written.unlink(missing_ok=True)
        return _take(lock)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    except OSError:
        lock.unlink()
        raise
    return True


def _runs(process: str) -> bool:
    """Does a process still run? Where that cannot be known, yes."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    return True
