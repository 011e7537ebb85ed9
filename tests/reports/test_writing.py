"""What a run leaves on disk: readable again, safe to open, whole or not there, and written by one run at a time."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from detoracle.reference.errors import InputError
from detoracle.reports.record import Measurement, Picture, Report, Row
from detoracle.reports.tables import csv_of
from detoracle.reports.text import short, visible
from detoracle.reports.writing import locked, read_report, write_report

FILES = ["badge.svg", "junit.xml", "measurements.csv", "report.html", "results.csv", "results.json", "summary.md"]
ROW = Row(
    "yolox.assign", "mine", "one box", "official", "different", "yolox.assign[outcome]", "image 0, anchor 3",
    "expected ground truth 0, got -1", 2, 1, 10, 1, "", "single tiny", "scenes/yolox.assign-mine-1.scene.json",
)  # fmt: skip
MEASUREMENT = Measurement(
    "yolox.assign", "mine", "coco", 1.25, 0.1 + 0.2, 0.0, float("inf"), "oracle", 4, 20, 1, 7, 8, 9
)
PICTURE = Picture(
    "yolox.assign", "mine", "one box", "official", 0, (8.0, 8.0), [[0.0, 0.0, 8.0, 8.0]], [3], [[4.0, 4.0]], [8.0],
    [0], [-1], [float("inf")],
)  # fmt: skip
REPORT = Report(
    "a title", "detoracle compare", "2026-01-01T00:00:00Z", 1.5, 7, {"torch": "2.6"},
    (ROW,), (MEASUREMENT,), (PICTURE,), ("a note",),
)  # fmt: skip
HOSTILE = {
    "script": "<script>alert('1')</script>",
    "quotes": "\"'`,;\\",
    "long": "n" * 4000,
    "right to left": "abc\u202efed\u200f\u2067",
    "control": "a\x00b\x1b[31mc\x7f\x85",
    "lines": "one\r\ntwo\u2028three\ttab",
    "surrogate": "half\ud83d",
    "formula": '=HYPERLINK("x")',
    "path": "../../etc/passwd",
}


def _hostile(text: str) -> Report:
    """A report that has a text wherever a stranger could put it."""
    strings: dict[str, Any] = {field.name: text for field in fields(Row) if field.type == "str"}
    row = Row(**strings)
    measurement = Measurement(text, text, text, 1.0, 1.0, 1.0, 1.0, text, 8, 1, 1, 1, 1, 1)
    picture = replace(PICTURE, operation=text, implementation=text, scene=text, setting=text)
    return Report(text, text, text, 1.0, 0, {text: text}, (row,), (measurement,), (picture,), (text,))


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    page = write_report(REPORT, tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    assert _names(page.parent) == FILES
    assert read_report(page.parent) == REPORT


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in FILES}
    write_report(read_report(tmp_path), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == first


def test_json_is_strict_and_has_one_row_a_line(tmp_path: Path) -> None:
    write_report(replace(REPORT, rows=(ROW, replace(ROW, scene="another"))), tmp_path)
    text = (tmp_path / "results.json").read_text("ascii")
    body = json.loads(text, parse_constant=pytest.fail)
    assert (body["schema"], body["measurements"][0]["high"]) == (1, "Infinity")
    assert [line.count('"scene":') for line in text.splitlines() if '"status"' in line] == [1, 1]


def test_csv_columns_are_the_fields_and_numbers_stay_numbers(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path)
    rows, measurements = (
        pd.read_csv(tmp_path / f"{n}.csv", keep_default_na=False) for n in ("results", "measurements")
    )
    assert list(rows.columns) == [field.name for field in fields(Row)]
    assert list(measurements.columns) == [field.name for field in fields(Measurement)]
    assert Row(*next(rows.itertuples(index=False, name=None))) == ROW
    assert Measurement(*next(measurements.itertuples(index=False, name=None))) == MEASUREMENT


def test_tables_have_a_header_without_a_row(tmp_path: Path) -> None:
    write_report(replace(REPORT, rows=(), measurements=(), pictures=()), tmp_path)
    assert (tmp_path / "results.csv").read_text() == ",".join(field.name for field in fields(Row)) + "\n"
    assert (tmp_path / "measurements.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "  ="])
def test_a_cell_that_would_be_a_formula_is_text(start: str) -> None:
    (_, cells) = csv.reader(io.StringIO(csv_of(Row, [replace(ROW, scene=f"{start}1+1", count=-1)])))
    assert cells[2] == f"'{visible(start)}1+1"
    assert cells[8] == "-1"
    assert not any(cell.startswith("'") for cell in [*cells[:2], *cells[3:]])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_harmless_and_kept(text: str, tmp_path: Path) -> None:
    report = _hostile(text)
    write_report(report, tmp_path)
    assert _names(tmp_path) == FILES  # and nothing outside
    assert read_report(tmp_path) == report
    for name in FILES:
        assert not re.search(
            r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]",
            (tmp_path / name).read_text("utf-8"),
        )
    table = (tmp_path / "results.csv").read_text("utf-8")
    assert table.count("\n") == 2
    (_, cells) = csv.reader(io.StringIO(table))
    assert cells[0] == ("'" if text.startswith("=") else "") + visible(text)


def test_hidden_characters_become_readable() -> None:
    assert visible("a\x00b\u202ec\n\ud800") == r"a\x00b\u202ec\n\ud800"
    assert visible("größe 大きさ עברית 🙂") == "größe 大きさ עברית 🙂"
    assert (len(short("x" * 201)), short("x" * 200)) == (200, "x" * 200)


# --------------------------------------------------------------------------------------------------- what goes wrong
def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(
            InputError, match=r"expected a folder that can be written to, got \w+Error: .*Choose another"
        ):
            write_report(REPORT, folder)
    assert (tmp_path / "taken").read_text() == "mine"


def _fails(error: int) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return raises


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", _fails(error))
    with pytest.raises(InputError, match=rf"got \w+: {os.strerror(error)}\. Choose another folder, or make room"):
        write_report(REPORT, tmp_path)
    assert _names(tmp_path) == []


def test_a_disk_that_fills_up_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(REPORT, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _fails(errno.ENOSPC))
        with pytest.raises(InputError, match=r"results.json: expected a place .* No space left .* make room"):
            write_report(replace(REPORT, rows=()), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    assert _names(tmp_path) == FILES


def test_a_lock_that_cannot_be_filled_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        write = staticmethod(_fails(errno.ENOSPC))  # type: ignore[assignment]

    def full(handle: int, *_: object, **__: object) -> Full:
        os.close(handle)
        return Full()

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(InputError, match="No space left"):
        write_report(REPORT, tmp_path)
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"expected a folder with a results.json, got FileNotFoundError. 'detoracle compare --out"),
        ('{"schema": 1, "rows": [', r"results.json: expected JSON, got .*column"),
        ("[1]", r"expected schema 1, got None"),
        ('{"schema": 9}', r"expected schema 1, got 9"),
        ('{"schema": 1}', r"expected a report of schema 1, got .*title"),
        ("\udcff", r"results.json: expected JSON, got 'utf-8'"),
    ],
)
def test_what_is_no_report_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_report(tmp_path)


# ------------------------------------------------------------------------------------------------------ one at a time
@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that runs until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate(b"\n")


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    (tmp_path / ".lock").write_text(f"{other.pid}\n")
    with pytest.raises(
        InputError, match=rf"that process {other.pid} is writing to\. Wait for it, choose another folder"
    ):
        write_report(REPORT, tmp_path)
    assert _names(tmp_path) == [".lock"]


def test_the_lock_of_a_dead_run_is_taken_over(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / ".lock").write_text(f"{process.pid}\n")
    write_report(REPORT, tmp_path)
    assert _names(tmp_path) == FILES


@pytest.mark.parametrize("text", ["9" * 30, "9" * 9000])
def test_a_number_that_is_no_process_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    write_report(REPORT, tmp_path)
    assert _names(tmp_path) == FILES


@pytest.mark.parametrize("text", ["", "somebody", "-1"])
def test_a_lock_that_says_nothing_is_respected(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(InputError, match=r"or delete .*\.lock if no run is under way"):
        write_report(REPORT, tmp_path)


def test_a_run_may_hold_its_folder_from_first_to_last(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        write_report(REPORT, tmp_path)
        assert _names(tmp_path) == [".lock", *FILES]
    assert _names(tmp_path) == FILES


def test_the_lock_goes_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    assert _names(tmp_path) == []
