"""The documented schema of results.json: it is what the dataclasses say, it is shipped, and a run keeps to it.

Where this fails because a field was added: ``python tests/reports/test_schema.py`` writes the schema again.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]

from detoracle.reports import record
from detoracle.reports.record import (
    SCHEMA,
    Growth,
    Measurement,
    Picture,
    Report,
    Row,
    Surprise,
    Table,
    from_json,
    to_json,
)
from detoracle.reports.writing import write_report

SHIPPED = json.loads((files("detoracle.reports") / "schema" / f"report-{SCHEMA}.json").read_text("utf-8"))
KINDS: list[type[Any]] = [
    kind
    for kind in vars(record).values()
    if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == record.__name__ and kind is not Report
]
TEXTS = {"type": "array", "items": {"type": "string"}}
NUMBERS = {"type": "array", "items": {"$ref": "#/$defs/number"}}
TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"$ref": "#/$defs/number"},
    "list[int]": {"type": "array", "items": {"type": "integer"}},
    "list[float]": NUMBERS,
    "list[list[float]]": {"type": "array", "items": NUMBERS},
    "tuple[float, float]": {**NUMBERS, "minItems": 2, "maxItems": 2},
    "tuple[str, ...]": TEXTS,
    "list[list[str]]": {"type": "array", "items": TEXTS},
    "Mapping[str, str | int | bool]": {
        "type": "object",
        "additionalProperties": {"type": ["string", "integer", "boolean"]},
    },
    **{f"tuple[{n}, ...]": {"type": "array", "items": {"$ref": f"#/$defs/{n}"}} for n in (k.__name__ for k in KINDS)},
}


def generated() -> dict[str, Any]:
    """The schema, from the dataclasses and what their docstrings say about each field."""
    number = {
        "description": "A number; those that JSON lacks are written as strings.",
        "anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}],
    }
    report = _object(Report)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:detoracle:report:{SCHEMA}",
        "title": "results.json of detoracle",
        **report,
        "properties": {"schema": {"const": SCHEMA}, **report["properties"]},
        "required": ["schema", *report["required"]],
        "$defs": {"number": number, **{kind.__name__: _object(kind) for kind in KINDS}},
    }


def _object(kind: type[Any]) -> dict[str, Any]:
    """A dataclass: unknown fields are allowed, for they are only added; those with a default may lack."""
    summary, told = _documentation(kind)
    return {
        "description": summary,
        "type": "object",
        "properties": {f.name: {**_described(told, f), **TYPES[str(f.type)]} for f in fields(kind)},
        "required": [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING],
    }


def _described(told: dict[str, str], field: Field[Any]) -> dict[str, str]:
    return {"description": told[field.name]} if told.get(field.name) else {}


def _documentation(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """Summary of a numpydoc docstring, and what it says about each attribute."""
    text = inspect.getdoc(kind) or ""
    _, _, attributes = text.partition("Attributes\n----------\n")
    told: dict[str, str] = {}
    names: list[str] = []
    for line in attributes.splitlines():
        if found := re.match(r"(\w[\w, ]*) : ", line):
            names = found[1].split(", ")
        elif line.startswith("    "):
            told |= {name: f"{told.get(name, '')} {line.strip()}".strip() for name in names}
    return text.partition("\n\n")[0], told


def _report() -> Report:
    """One of everything."""
    infinite = float("inf")
    return Report(
        "t", "c", "2026-01-01T00:00:00Z", 1.0, 7, {"torch": "2.6", "threads": 2, "dirty": False},
        (Row("yolox.assign", "mine", "one box", "", "equal"),),
        (Measurement("yolox.assign", "mine", "coco", 1.0, 2.0, 0.0, infinite, "oracle", 8, 1, 1, 1, 1, 1),),
        (Picture("yolox.assign", "mine", "one box", "", 0, (8.0, 8.0), [], [], [], [], [], [], []),),
        ("a note",),
        (Surprise("yolox.x", "yolox.assign", "a", "b", "c", ""),),
        (Growth("yolox.assign", "mine", "forward", "gts", "batch 1", 3, 1.0, float("nan")),),
        (Table("laws", "which hold", ("law", "holds"), [["permute-images", "yes"]]),),
    )  # fmt: skip


def _valid(body: object) -> bool:
    try:
        Draft202012Validator(SHIPPED).validate(body)
    except ValidationError:
        return False
    return True


def test_it_is_what_the_dataclasses_say() -> None:
    Draft202012Validator.check_schema(SHIPPED)
    assert generated() == SHIPPED


def test_every_field_that_needs_a_word_has_one() -> None:
    told = SHIPPED["$defs"]["Row"]["properties"]
    assert told["scene_file"]["description"] == "Replayable scene, relative to the report's folder; only for a finding."
    assert "95 % bootstrap" in SHIPPED["$defs"]["Measurement"]["properties"]["low"]["description"]


def test_what_is_written_keeps_to_it(tmp_path: Path) -> None:
    report = _report()
    assert all(vars(report).values()), "one of everything"
    write_report(report, tmp_path)
    body = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert _valid(body)
    assert _valid({**body, "a field of later": 1})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), SCHEMA + 1),
        (("seed",), "0"),
        (("rows", 0, "status"), None),
        (("rows", 0, "count"), 1.5),
        (("measurements", 0, "high"), "inf"),
        (("measurements", 0, "rounds"), True),
        (("pictures", 0, "size"), [8.0]),
        (("growth", 0, "points"), "3"),
        (("notes",), "a note"),
        (("environment", "torch"), [2, 6]),
    ],
    ids=str,
)
def test_what_breaks_it_is_refused(path: tuple[str | int, ...], value: object) -> None:
    body = json.loads(json.dumps(to_json(_report())))
    place = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert not _valid(body)


def test_what_a_reader_may_miss_the_schema_does_not_ask_for() -> None:
    body = to_json(replace(_report(), growth=()))
    del body["growth"], body["rows"][0]["note"]
    assert _valid(body)
    assert from_json(body) == replace(_report(), growth=())
    del body["rows"][0]["status"]
    assert not _valid(body)


if __name__ == "__main__":
    place = Path(__file__).parents[2] / "reports" / "schema" / f"report-{SCHEMA}.json"
    place.write_text(json.dumps(generated(), indent=1) + "\n", "utf-8")
