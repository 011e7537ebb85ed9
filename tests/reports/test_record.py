"""The report in memory and as JSON: nothing is lost on the way, and nothing foreign gets in."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from detoracle.reference.errors import InputError
from detoracle.reports.record import Measurement, Picture, Report, Row, from_json, to_json

PICTURE = Picture(
    "yolox.assign", "mine", "two boxes", "official", 1, (64.0, 48.0),
    [[0.0, 0.0, 8.0, 8.0], [-math.inf, 1.0, 2.0, 3.0]], [3, 80],
    [[4.0, 4.0], [12.0, 4.0]], [8.0, 8.0], [0, -1], [-1, -2], [math.inf, 0.5],
)  # fmt: skip
MEASUREMENT = Measurement("yolox.assign", "mine", "coco", 1.5, 2.0, 0.0, math.inf, "oracle", 4, 20, 1, 10, 11, 12)
REPORT = Report(
    "a title",
    "detoracle compare",
    "2026-01-01T00:00:00Z",
    1.5,
    7,
    {"torch": "2.6", "threads": 2, "dirty": True},
    (Row("yolox.assign", "mine", "one box", "", "equal"), Row("yolox.loss", "mine", "one box", "", "raised", count=3)),
    (MEASUREMENT,),
    (PICTURE,),
    ("a note",),
)


def _strict(body: Any) -> Any:
    """Through JSON as other languages read it: without NaN and Infinity as bare words."""
    return json.loads(json.dumps(body, allow_nan=False), parse_constant=pytest.fail)


def test_json_gives_the_report_back() -> None:
    assert from_json(_strict(to_json(REPORT))) == REPORT


def test_nan_survives() -> None:
    slow = replace(MEASUREMENT, milliseconds=math.nan, low=-math.inf)
    (found,) = from_json(_strict(to_json(replace(REPORT, measurements=(slow,))))).measurements
    assert math.isnan(found.milliseconds)
    assert replace(found, milliseconds=0.0) == replace(slow, milliseconds=0.0)


def test_every_field_is_written_and_read() -> None:
    body = to_json(REPORT)
    assert set(body) == {"schema"} | {field.name for field in fields(Report)}
    assert set(body["rows"][0]) == {field.name for field in fields(Row)}


def test_a_later_version_may_add_fields() -> None:
    body = to_json(REPORT) | {"mood": "good"}
    body["rows"][0]["colour"] = "blue"
    assert from_json(body) == REPORT


def test_an_earlier_version_may_lack_fields_that_have_a_default() -> None:
    body = to_json(REPORT)
    del body["rows"][0]["tags"]
    assert from_json(body) == REPORT


@pytest.mark.parametrize("body", [None, [], "text", {}, {"schema": 2}, {"schema": "1"}])
def test_another_schema_is_refused(body: Any) -> None:
    with pytest.raises(InputError, match="expected schema 1, got"):
        from_json(body)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("rows", "status", 3),
        ("rows", "count", "3"),
        ("rows", "count", True),
        ("measurements", "milliseconds", "soon"),
        ("measurements", "low", True),
        ("pictures", "expected", [0.5, 1]),
        ("pictures", "gt_boxes", [[0, 0, 1, None], [0, 0, 1, 1]]),
        ("pictures", "size", [1, 2, 3]),
        ("pictures", "margin", [1.0]),
    ],
)
def test_a_value_of_another_type_is_refused(part: str, name: str, value: Any) -> None:
    body = to_json(REPORT)
    body[part][0][name] = value
    with pytest.raises(InputError, match="expected a report of schema 1, got"):
        from_json(body)


def test_a_missing_field_is_refused() -> None:
    body = to_json(REPORT)
    del body["rows"][0]["scene"]
    with pytest.raises(InputError, match=r"expected a report of schema 1, got .*'scene'"):
        from_json(body)


@pytest.mark.parametrize("part", ["rows", "measurements", "pictures", "notes"])
@pytest.mark.parametrize("value", [None, 3, {"a": 1}])
def test_a_part_that_is_no_list_is_refused(part: str, value: Any) -> None:
    with pytest.raises(InputError, match="expected a report of schema 1, got"):
        from_json(to_json(REPORT) | {part: value})


@pytest.mark.parametrize(
    "change",
    [
        {"given": [0]},
        {"margin": []},
        {"anchor_points": [[1.0, 2.0]]},
        {"gt_labels": [1]},
        {"anchor_points": [[1.0], [2.0]]},
        {"gt_boxes": [[0.0] * 4, [0.0] * 5]},
        {"size": (1.0,)},
    ],
)
def test_a_picture_is_complete(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="picture: expected"):
        replace(PICTURE, **change)


def test_findings_are_what_is_wrong() -> None:
    assert REPORT.findings == (REPORT.rows[1],)
    statuses = ("equal", "ambiguous", "undefined", "different", "raised", "mutated-input", "timeout", "odd")
    assert [status for status in statuses if Row("o", "i", "s", "", status).wrong] == list(statuses[3:])
