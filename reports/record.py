"""What a run found, in memory: every report is made from one `Report`, and the schema below is its contract.

Schema 1. ``results.json`` holds a `Report` as nested objects; ``results.csv`` its rows, one line each, with the fields of
`Row` as columns; ``measurements.csv`` its measurements. Fields are only added; a change of meaning raises `SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from detoracle.reference.errors import InputError

__all__ = ["SCHEMA", "Measurement", "Picture", "Report", "Row", "from_json", "to_json"]

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One verdict: an implementation of an operation on one case of one scene.

    Attributes
    ----------
    operation, implementation, scene, setting : str
    status : str
        equal, ambiguous, different, raised, mutated-input, timeout, undefined.
    clause, where, message : str
        Of the first finding; empty without one.
    count : int
        Wrong elements of that finding.
    findings : int
        Number of findings.
    positives, ambiguous : int
        Assigned anchors; anchors with more than one right outcome among them.
    note : str
        What an undefined or ambiguous verdict is about.
    tags : str
        The scene's tags, separated by blanks.
    scene_file : str
        Replayable scene, relative to the report's folder; only for a finding.
    """

    operation: str
    implementation: str
    scene: str
    setting: str
    status: str
    clause: str = ""
    where: str = ""
    message: str = ""
    count: int = 0
    findings: int = 0
    positives: int = 0
    ambiguous: int = 0
    note: str = ""
    tags: str = ""
    scene_file: str = ""

    @property
    def wrong(self) -> bool:
        """Is this a finding?"""
        return self.status not in ("equal", "ambiguous", "undefined")


@dataclass(frozen=True)
class Measurement:
    """Cost of one implementation on one workload.

    Attributes
    ----------
    operation, implementation, workload : str
    milliseconds : float
        Median of one call, forward and backward where there is a gradient.
    times_faster, low, high : float
        Than the baseline in the same process, with its 95 % bootstrap interval.
    baseline : str
    rounds : int
    operations, host_syncs, bytes_read, bytes_written, peak_live_bytes : int
        Exact counters of one call.
    """

    operation: str
    implementation: str
    workload: str
    milliseconds: float
    times_faster: float
    low: float
    high: float
    baseline: str
    rounds: int
    operations: int
    host_syncs: int
    bytes_read: int
    bytes_written: int
    peak_live_bytes: int


@dataclass(frozen=True)
class Picture:
    """What to draw of one finding's image: plain numbers, so that it survives JSON.

    Attributes
    ----------
    operation, implementation, scene : str
        The row it belongs to.
    image : int
    size : tuple of float
        Height and width in pixels.
    gt_boxes : list of list of float
        (G, 4) xyxy pixels.
    gt_labels : list of int
    anchor_points : list of list of float
        (A, 2) pixels.
    anchor_strides : list of float
    expected, given : list of int
        Ground truth of each anchor, -1 background, -2 ignored; by the oracle and by the implementation.
    margin : list of float
        Of each anchor's outcome, in units of rounding error.
    """

    operation: str
    implementation: str
    scene: str
    setting: str
    image: int
    size: tuple[float, float]
    gt_boxes: list[list[float]]
    gt_labels: list[int]
    anchor_points: list[list[float]]
    anchor_strides: list[float]
    expected: list[int]
    given: list[int]
    margin: list[float]


@dataclass(frozen=True)
class Report:
    """Everything one run found.

    Attributes
    ----------
    title, command : str
        What was run, as a person would type it again.
    started : str
        UTC, ISO 8601.
    seconds : float
    seed : int
    environment : mapping
        From `environment()`.
    rows : tuple of Row
    measurements : tuple of Measurement
    pictures : tuple of Picture
    notes : tuple of str
        Facts about the run that a reader needs: ignored boxes, skipped implementations.
    """

    title: str
    command: str
    started: str
    seconds: float
    seed: int
    environment: Mapping[str, str | int | bool]
    rows: tuple[Row, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def findings(self) -> tuple[Row, ...]:
        """Rows that are wrong."""
        return tuple(row for row in self.rows if row.wrong)


def to_json(report: Report) -> dict[str, Any]:
    """Report as nested plain objects, with the schema's number.

    Examples
    --------
    >>> to_json(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}))["schema"]
    1
    """
    return {"schema": SCHEMA, **asdict(report)}


def from_json(body: Mapping[str, Any]) -> Report:
    """Report from what `to_json` gave.

    Raises
    ------
    InputError
        If it is of another schema, or incomplete.

    Examples
    --------
    >>> report = Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {})
    >>> from_json(to_json(report)) == report
    True
    """
    if body.get("schema") != SCHEMA:
        raise InputError("results.json", expected=f"schema {SCHEMA}", got=repr(body.get("schema")))
    try:
        fields = {name: value for name, value in body.items() if name != "schema"}
        for name, kind in (("rows", Row), ("measurements", Measurement), ("pictures", Picture)):
            fields[name] = tuple(kind(**item) for item in fields[name])
        fields["pictures"] = tuple(Picture(**{**asdict(p), "size": tuple(p.size)}) for p in fields["pictures"])
        return Report(**{**fields, "notes": tuple(fields["notes"])})
    except (TypeError, KeyError) as error:
        raise InputError("results.json", expected=f"a report of schema {SCHEMA}", got=str(error)) from error
