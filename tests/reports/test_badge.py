"""The badge: what it says, that the text fits, and that no stranger's name is in it."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from detoracle.reports.badge import badge_of
from detoracle.reports.record import Report, Row

NAME = "<script>name</script>"
ROW = Row(NAME, NAME, NAME, NAME, "equal", message=NAME)
SVG = "{http://www.w3.org/2000/svg}"


def _badge(**counts: int) -> ET.Element:
    statuses = {"mutated_input": "mutated-input"}
    rows = [replace(ROW, status=statuses.get(name, name)) for name, number in counts.items() for _ in range(number)]
    return ET.fromstring(badge_of(Report(NAME, NAME, NAME, 1.0, 0, {NAME: NAME}, tuple(rows))))


@pytest.mark.parametrize(
    ("counts", "verdict", "colour"),
    [
        ({"equal": 1812}, "1,812 checks equal", "#2e7d32"),
        ({"equal": 1, "undefined": 3}, "1 check equal", "#2e7d32"),
        ({"equal": 5, "ambiguous": 2}, "5 checks equal, 2 ambiguous", "#2e7d32"),
        ({"equal": 5, "raised": 1}, "1 finding", "#c62828"),
        ({"timeout": 2, "mutated_input": 1}, "3 findings", "#c62828"),
        ({"undefined": 3}, "nothing judged", "#616161"),
        ({}, "nothing judged", "#616161"),
    ],
)
def test_it_says_the_verdict_and_nothing_else(counts: dict[str, int], verdict: str, colour: str) -> None:
    badge = _badge(**counts)
    assert badge.get("aria-label") == f"detoracle: {verdict}"
    assert [node.text for node in badge.iter() if (node.text or "").strip()] == [
        f"detoracle: {verdict}",
        "detoracle",
        verdict,
    ]
    assert badge.findall(f"{SVG}rect")[1].get("fill") == colour


@pytest.mark.parametrize("number", [1, 1000])
def test_the_text_fits(number: int) -> None:
    report = Report("t", "c", "s", 1.0, 0, {}, (ROW,) * number)
    badge = ET.fromstring(badge_of(report))
    left, right = badge.findall(f"{SVG}rect")
    for half, text in zip((left, right), badge.iter(f"{SVG}text"), strict=True):
        start, width = float(half.get("x", "0")), float(half.get("width", ""))
        assert start < float(text.get("x", ""))
        assert 5 < float(text.get("textLength", "")) / len(text.text or "") < 8  # pixels a character of 11 px
        assert float(text.get("x", "")) + float(text.get("textLength", "")) < start + width
    assert float(badge.get("width", "")) == float(right.get("x", "")) + float(right.get("width", ""))
