"""JUnit XML: whatever a row says, it parses, counts right, and one case is one row."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from detoracle.reports.junit import junit_of
from detoracle.reports.record import Report, Row

EMPTY = Report("a title", "detoracle compare", "2026-01-01T00:00:00Z", 1.0, 0, {})
EQUAL = Row("yolox.assign", "mine", "one box", "official", "equal")
WRONG = Row(
    "yolox.assign", "mine", "crowd", "", "different", "yolox.assign[outcome]", "image 0, anchor 3",
    "expected 0, got -1", 2, 1, scene_file="scenes/yolox.assign-mine-1.scene.json",
)  # fmt: skip
HOSTILE = [
    "<script>alert('1')</script>",
    "\"'`&amp;]]>",
    "n" * 4000,
    "abc\u202efed\u2067",
    "a\x00b\x1b\x7f\ufffe\uffff\ud83d",
    "one\r\ntwo\u2028three",
    "a|b",
]


def _parsed(*rows: Row) -> ET.Element:
    return ET.fromstring(junit_of(replace(EMPTY, rows=rows)))


def test_one_case_a_row_and_a_suite_an_implementation() -> None:
    rows = (EQUAL, WRONG, replace(EQUAL, implementation="other", status="undefined", note="no candidate"))
    root = _parsed(*rows)
    assert [suite.get("name") for suite in root] == ["mine", "other"]
    assert [(root.get(name), root[0].get(name), root[1].get(name)) for name in ("tests", "failures", "skipped")] == [
        ("3", "2", "1"),
        ("1", "1", "0"),
        ("1", "0", "1"),
    ]
    assert [(case.get("classname"), case.get("name")) for case in root.iter("testcase")] == [
        ("yolox.assign", "one box (official)"),
        ("yolox.assign", "yolox.assign[outcome]/crowd"),
        ("yolox.assign", "one box (official)"),
    ]


@pytest.mark.parametrize("status", ["different", "raised", "mutated-input", "timeout", "a status of later"])
def test_a_finding_is_a_failure_that_says_what_and_how_to_replay(status: str) -> None:
    (case,) = _parsed(replace(WRONG, status=status)).iter("testcase")
    (failure,) = case
    assert (failure.tag, failure.get("type"), failure.get("message")) == ("failure", status, "expected 0, got -1")
    assert (failure.text or "").splitlines() == [
        "yolox.assign[outcome]",
        "image 0, anchor 3",
        "expected 0, got -1",
        "2 wrong elements",
        "detoracle replay scenes/yolox.assign-mine-1.scene.json",
    ]


def test_what_is_no_plain_pass_is_noted() -> None:
    ambiguous = replace(EQUAL, status="ambiguous", ambiguous=2, positives=9, note="ties")
    undefined = replace(EQUAL, status="undefined", note="raises")
    equal, open_, skipped = _parsed(EQUAL, ambiguous, undefined).iter("testcase")
    assert list(equal) == []
    assert [(note.tag, note.text) for note in open_] == [("system-out", "ambiguous: 2 of 9 positives ties")]
    assert [(note.tag, note.get("message")) for note in skipped] == [("skipped", "raises")]


def test_an_empty_run_has_no_case() -> None:
    assert (list(_parsed()), _parsed().get("tests")) == ([], "0")


@pytest.mark.parametrize("status", ["raised", "undefined", "ambiguous"])
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_is_text(text: str, status: str) -> None:
    strings: dict[str, Any] = {field.name: text for field in fields(Row) if field.type == "str"}
    row = Row(**{**strings, "status": status})
    root = ET.fromstring(junit_of(Report(text, text, text, 1.0, 0, {text: text}, (row,))))
    plain = ET.fromstring(junit_of(replace(EMPTY, rows=(replace(WRONG, status=status),))))
    assert [node.tag for node in root.iter()] == [node.tag for node in plain.iter()]
    (case,) = root.iter("testcase")
    assert len(case.get("name", "")) <= 200
    if len(text) < 100:
        assert text.encode("ascii", "ignore").decode().split("\x00")[0][:3].strip() in case.get("classname", "")
    for node in root.iter():
        for value in [*node.attrib.values(), (node.text or "").replace("\n", "")]:
            assert value.isprintable()


def test_a_hundred_thousand_rows_are_soon_written() -> None:
    start = time.process_time()
    text = junit_of(replace(EMPTY, rows=(EQUAL, WRONG) * 50_000))
    assert time.process_time() - start < 20
    assert text.count("<testcase") == 100_000
