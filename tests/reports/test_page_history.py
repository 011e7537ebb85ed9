"""The page of a history, and tables that are added to a report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from detoracle.cli import app
from detoracle.properties.systems import every_operation
from detoracle.reference.errors import InputError
from detoracle.reports.history import append, read
from detoracle.reports.history_page import render_history
from detoracle.reports.record import Measurement, Report, Row
from detoracle.reports.sheets import drift_tables, law_table, read_tables
from detoracle.reports.writing import read_report, write_report

MINE = Measurement("yolox.assign", "mine", "16x20", 2.0, 2.0, 1.5, 2.5, "loop", 8, 100, 0, 7, 7, 4096)
LOOP = replace(MINE, implementation="loop", times_faster=1.0, low=1.0, high=1.0, operations=300)
REPORT = Report("bench", "detoracle bench", "2026-01-01T00:00:00Z", 1.0, 0, {"commit": "abc"}, (), (MINE, LOOP))


def _history(path: Path, *runs: Report) -> str:
    for run in runs:
        append(run, path)
    return render_history(read(path), path.name)


def test_every_run_is_plotted_with_its_interval(tmp_path: Path) -> None:
    later = replace(REPORT, measurements=(replace(MINE, times_faster=3.0, low=2.5, high=3.5), LOOP))
    page = _history(tmp_path / "h.jsonl", REPORT, later, later)
    drawings = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert [re.findall(r"<title>(.*?)</title>", one)[0] for one in drawings] == [
        "Times faster than the baseline", "Operations dispatched", "Peak live bytes",
    ]  # fmt: skip
    ratio = drawings[0]
    assert "mine: run 2: 3 times (2.5 to 3.5)" in ratio
    assert ratio.count('class="bar"') == 3 + 1  # the intervals, and the line at 1
    assert "loop" not in ratio
    assert page.count('<tr id="run-') == 3
    assert "There are none." in page


def test_a_counter_that_changed_is_listed_once(tmp_path: Path) -> None:
    worse = replace(REPORT, measurements=(replace(MINE, operations=101), LOOP))
    page = _history(tmp_path / "h.jsonl", REPORT, worse, worse)
    (line,) = re.findall(r'<tr data-status="">.*?</tr>', page)
    assert re.sub(r"<.*?>", " ", line).split() == ["2", "yolox.assign", "mine", "16x20", "operations", "100", "101"]


def test_hostile_names_change_no_structure(tmp_path: Path) -> None:
    def tags(name: str, file: str) -> list[str]:
        measured = replace(MINE, operation=name, implementation=name, workload=name, phase=name, baseline="loop")
        rows = (Row(name, name, name, name, "equal"),)
        page = _history(
            tmp_path / file, replace(REPORT, rows=rows, measurements=(measured,), environment={"commit": name})
        )
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)
        return re.findall(r"<[a-z]+", page)

    plain = tags("plain", "0")
    for number, name in enumerate(("<script>alert(1)</script>", '" onload="x', "a\x00\u202eb", "n" * 4000), start=1):
        assert tags(name, str(number)) == plain


def test_the_command_writes_the_page_beside_the_history(tmp_path: Path) -> None:
    append(REPORT, tmp_path / "h.jsonl")
    done = CliRunner().invoke(app, ["report", "--history", str(tmp_path / "h.jsonl")])
    assert done.exit_code == 0
    assert "Operations dispatched" in (tmp_path / "h.html").read_text("utf-8")
    error = CliRunner().invoke(app, ["report"]).exception
    assert isinstance(error, InputError)


# ---------------------------------------------------------------------------------------------------------- tables
FAULT = {"id": "wrong-k", "operation": "yolox.assign", "origin": "made up", "seeds": 3, "killed": 2,
         "clauses": {"yolox.assign[outcome]": 2}, "median": 1.0, "most": 9}  # fmt: skip


def test_tables_are_added_and_replaced_by_title(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path)
    kills, alarms = tmp_path / "kills.json", tmp_path / "alarms.json"
    kills.write_text(json.dumps({"schema": 1, "faults": [FAULT]}))
    alarms.write_text(
        json.dumps({"totals": [{"implementation": "a", "arithmetic": "b", "calls": 9, "false_alarms": 1}]})
    )
    for _ in range(2):
        arguments = ["report", str(tmp_path), "--add", str(kills), "--add", str(alarms)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    tables = read_report(tmp_path).tables
    assert [table.title for table in tables] == ["Planted faults", "False alarms"]
    assert tables[0].lines == [["wrong-k", "yolox.assign", "2 of 3", "yolox.assign[outcome] (2)", "1", "9", "made up"]]
    assert "0 of 1 were caught with every seed" in tables[0].note
    assert tables[1].note == "Right code in other arithmetic: 1 false alarms in 9 calls."


def test_the_atlas_tells_changes_and_releases() -> None:
    check = {"package": "p", "release": "1.1", "operation": "a", "counts": {"equal": 3, "different": 1},
             "failures": [{"clause": "a[b]", "times": 1}]}  # fmt: skip
    change = {"package": "p", "operation": "a", "before": "1.0", "after": "1.1", "began": ["a[b]"], "ceased": []}
    changes, releases = drift_tables({"checks": [check], "changes": [change]})
    assert changes.lines == [["p", "1.0 → 1.1", "a", "a[b]", ""]]
    assert releases.lines == [["p", "1.1", "a", "4", "a[b] (1)"]]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"faults": [{}]}', '{"changes": 3}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="expected JSON of 'detoracle faults' or a drift atlas"):
        read_tables(tmp_path / "x.json")


def test_the_laws_of_all_operations_count_every_operation_once() -> None:
    operations = [operation for _, operation in every_operation()]
    table = law_table(operations)
    assert len(table.lines) > 15
    for _, _, obeying, part, none in table.lines:
        obey, concerned = map(int, obeying.split(" of "))
        departing = [name for names in (part, none) for name in names.split(", ") if name]
        assert obey + len(departing) == concerned <= len(operations)
        assert len(departing) == len(set(departing))
