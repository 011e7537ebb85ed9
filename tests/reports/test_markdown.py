"""The summary: right, small, and whatever strangers wrote neither acts nor leaves its cell."""

from __future__ import annotations

import html
import re
from dataclasses import fields, replace
from typing import Any

import pytest

from detoracle.reports.markdown import MOST_BYTES, summary_of
from detoracle.reports.record import Measurement, Report, Row

EMPTY = Report("a title", "detoracle compare --seed 7", "2026-01-01T00:00:00Z", 1.0, 7, {})
EQUAL = Row("yolox.assign", "loop", "one box", "official", "equal")
WRONG = Row(
    "yolox.assign", "mine", "crowd", "", "different", "yolox.assign[outcome]", "image 0, anchor 3",
    "expected 0, got -1", 2, 1, scene_file="scenes/yolox assign-1.scene.json",
)  # fmt: skip
MEASURED = Measurement("yolox.assign", "batched", "coco", 12.345, 2.0, 1.5, 2.5, "oracle", 8, 1234, 5, 6, 7, 8)
HOSTILE = [
    "<script>alert('1')</script>",
    "<!-- </code></table> -->",
    "\"'`&amp;```",
    "![x](http://example.org/x.png) [y](javascript:z)",
    "@somebody #1 www.example.org HTTPS://example.org a@example.org :smile: $x$",
    "# a\n- b\n\n| c | d |",
    "*a* _b_ ~~c~~ \\",
    "n" * 4000,
    "abc\u202efed\u2067",
    "a\x00b\x1b\x7f\ud83d",
    "one\r\ntwo\u2028three",
]


def _cells(line: str) -> list[str]:
    """Cells of a table's line, as they are read."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [html.unescape(re.sub("</?code>", "", cell)).strip() for cell in line[1:-1].split("|")]


def _tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [[_cells(line) for line in block] for block in blocks if block[0].startswith("|")]


def test_it_has_verdict_matrix_findings_and_timings() -> None:
    baseline = replace(MEASURED, implementation="oracle")
    text = summary_of(
        replace(EMPTY, rows=(EQUAL, WRONG, replace(WRONG, status="equal")), measurements=(baseline, MEASURED))
    )
    assert text.startswith("### ✗ detoracle: 1 finding\n\n1 operation × 2 implementations, 3 checks: 2 equal")
    matrix, findings, timings = _tables(text)
    assert matrix == [["operation", "loop", "mine"], ["---"] * 3, ["yolox.assign", "✓ 1", "✗ 1 of 2"]]
    assert findings[2] == [
        "yolox.assign[outcome]",
        "mine",
        "crowd",
        "image 0, anchor 3 expected 0, got -1",
        "detoracle replay 'scenes/yolox assign-1.scene.json'",
    ]
    assert [line[3:] for line in timings[2:]] == [["12.3", "baseline", "1,234"], ["12.3", "2 (1.5 to 2.5)", "1,234"]]
    assert text.endswith("Seed 7: <code>detoracle compare --seed 7</code>\n")


@pytest.mark.parametrize(
    ("statuses", "verdict", "cell"),
    [
        (["equal", "equal"], "✓ detoracle: no findings", "✓ 2"),
        (["equal", "ambiguous"], "✓ detoracle: no findings", "≈ 2"),
        (["undefined"], "○ detoracle: nothing was judged", "○ 1"),
        (["equal", "raised", "timeout"], "✗ detoracle: 2 findings", "✗ 2 of 3"),
    ],
)
def test_the_verdict(statuses: list[str], verdict: str, cell: str) -> None:
    text = summary_of(replace(EMPTY, rows=tuple(replace(EQUAL, status=status) for status in statuses)))
    assert text.splitlines()[0] == f"### {verdict}"
    assert _tables(text)[0][2][1] == cell


def test_an_empty_run_says_so() -> None:
    text = summary_of(EMPTY)
    assert text.startswith("### ○ detoracle: nothing was judged\n")
    assert _tables(text) == []


def _everywhere(name: str) -> str:
    strings: dict[str, Any] = {field.name: name for field in fields(Row) if field.type == "str"}
    row, measured = Row(**strings), replace(MEASURED, operation=name, implementation=name, workload=name)
    return summary_of(Report(name, name, name, 1.0, 0, {name: name}, (row,), (measured,), (), (name,)))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_neither_acts_nor_leaves_its_cell(text: str) -> None:
    found, plain = _everywhere(text), _everywhere("plain")
    assert [[len(line) for line in table] for table in _tables(found)] == [[2] * 3, [5] * 3, [6] * 3]
    assert len(found.splitlines()) == len(plain.splitlines())
    assert found.count("<code>") == found.count("</code>") == plain.count("<code>")
    inside = re.findall("<code>(.*?)</code>", found)
    outside = re.sub("<code>.*?</code>", "", found)
    assert outside == re.sub("<code>.*?</code>", "", plain)
    for code in inside:
        assert not re.search(r"[<>`*_\[\]!#@:$|\\~\"']|www\.|&(?!#\d+;)", re.sub(r"&#\d+;", "", code), re.IGNORECASE)
        assert code.isprintable()
        assert len(html.unescape(code)) <= 100


def test_it_stays_small_however_much_there_is() -> None:
    names = [f"{'<@|`' * 1000}{number}" for number in range(60)]
    rows = tuple(
        replace(WRONG, operation=f"{number}{name}", implementation=f"{number % 20}{name}", message=name, scene=name)
        for number, name in enumerate(names * 200)
    )
    measurements = tuple(replace(MEASURED, operation=name, workload=name) for name in names * 10)
    text = summary_of(replace(EMPTY, rows=rows, measurements=measurements))
    assert len(text.encode()) <= MOST_BYTES <= 60_000  # what a pull request's comment may hold
    assert "more are in the report." in text
    assert "more implementations are in the report." in text


def test_what_is_left_out_is_counted() -> None:
    rows = tuple(replace(WRONG, scene=f"scene {number}", implementation=f"i{number % 15}") for number in range(50))
    text = summary_of(replace(EMPTY, rows=rows))
    matrix, findings = _tables(text)
    assert (len(matrix[0]), len(findings)) == (13, 42)
    assert "\n\n3 more implementations are in the report.\n" in text
    assert "\n\n10 more are in the report.\n" in text
