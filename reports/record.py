"""What a run found, in memory: every report is made from one `Report`, and the schema below is its contract.

Schema 1. ``results.json`` holds a `Report` as nested objects; ``results.csv`` its rows, one line each, with the fields
of `Row` as columns; ``measurements.csv`` its measurements. Fields are only added, and unknown ones ignored; a change of
meaning raises `SCHEMA`. Numbers that JSON lacks are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from detoracle.reference.errors import InputError
from detoracle.reports.counters import Counters
from detoracle.reports.plain import from_plain, to_plain
from detoracle.reports.timing import Timing

__all__ = [
    "KNOWN_FAILURE",
    "SCHEMA",
    "Growth",
    "Measurement",
    "Picture",
    "Report",
    "Row",
    "Surprise",
    "Table",
    "from_json",
    "measurement",
    "to_json",
]

SCHEMA = 1

KNOWN_FAILURE = "known-failure"
"""Status of a finding that a list of known failures expects."""


@dataclass(frozen=True)
class Row:
    """One verdict: an implementation of an operation on one case of one scene.

    Attributes
    ----------
    operation, implementation, scene, setting : str
    status : str
        equal, ambiguous, different, raised, mutated-input, timeout, undefined, known-failure.
    clause, where, message : str
        Of the first finding; empty without one.
    count : int
        Wrong elements of that finding.
    findings : int
        Number of findings.
    positives, ambiguous : int
        Assigned anchors; anchors with more than one right outcome among them.
    note : str
        What an undefined or ambiguous verdict is about, or why a failure is known.
    tags : str
        The scene's tags, separated by blanks.
    scene_file : str
        Replayable scene, relative to the report's folder; only for a finding.
    law : str
        Law or trial that was judged on the case; empty for the case itself.
    ulps : float
        Largest error of the first finding, in units in the last place; 0 if it is not about numbers.
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
    law: str = ""
    ulps: float = 0.0

    @property
    def place(self) -> str:
        """Scene, and in brackets the setting and the law."""
        inside = ", ".join(text for text in (self.setting, self.law) if text)
        return f"{self.scene} ({inside})" if inside else self.scene

    @property
    def wrong(self) -> bool:
        """Is this a finding?"""
        return self.status not in ("equal", "ambiguous", "undefined", KNOWN_FAILURE)


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
    phase : str
        What was timed: ``forward``, ``forward and backward``; empty where `compare` chose.
    batch, gts, anchors, classes : int
        Size of the bench's workload; 0 for a scene.
    first_call : float
        Milliseconds of the first call, which compiles if anything does; 0 where it was not taken.
    floor_share : float
        Time that moving the call's data once would take at the speed of a copy in the same run, over its own time; 0
        where it was not measured.
    checked : int
        Calls whose outputs were checked.
    setting : str
        The operation's argument set.
    inputs : str
        Hash of the arguments: measurements of different ones are not compared.
    launches : int
        Kernels that the call launched on a GPU; 0 elsewhere, as are the next two.
    device_peak_bytes : int
        Most memory that the GPU's allocator held for the call.
    replay_milliseconds : float
        Median of the call replayed from a CUDA graph; 0 also where a graph cannot hold it.
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
    phase: str = ""
    batch: int = 0
    gts: int = 0
    anchors: int = 0
    classes: int = 0
    first_call: float = 0.0
    floor_share: float = 0.0
    checked: int = 0
    setting: str = ""
    inputs: str = ""
    launches: int = 0
    device_peak_bytes: int = 0
    replay_milliseconds: float = 0.0


@dataclass(frozen=True)
class Growth:
    """How cost grows along one axis: the slope of a straight line through the logarithms.

    Attributes
    ----------
    operation, implementation, phase : str
    axis : str
        ``batch``, ``gts``, ``anchors`` or ``classes``; the others stay as they are.
    fixed : str
        The sizes that stay.
    points : int
        Sizes measured.
    time_exponent, bytes_exponent : float
        Of the time, and of the peak live bytes: 1 grows in proportion.
    """

    operation: str
    implementation: str
    phase: str
    axis: str
    fixed: str
    points: int
    time_exponent: float
    bytes_exponent: float


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

    def __post_init__(self) -> None:
        """Check what drawing relies on."""
        anchors = [len(v) for v in (self.anchor_points, self.anchor_strides, self.expected, self.given, self.margin)]
        if len(set(anchors)) > 1 or len(self.gt_boxes) != len(self.gt_labels):
            raise InputError(
                "picture",
                expected="as many points, strides, outcomes and margins, and as many boxes as labels",
                got=f"{anchors} and {len(self.gt_boxes)}, {len(self.gt_labels)}",
                where=f"{self.operation} on {self.scene}",
            )
        widths = {len(self.size), *map(len, self.anchor_points)} - {2}, set(map(len, self.gt_boxes)) - {4}
        if any(widths):
            raise InputError("picture", expected="a size and points of two numbers, boxes of four", got=str(widths))


@dataclass(frozen=True)
class Surprise:
    """A quirk of the published code that an operation of the run keeps: an entry of the quirk ledger, as text.

    Attributes
    ----------
    id, operation, statement, upstream, safe : str
        As in `detoracle.reference.quirks`.
    defects : str
        Published reports, separated by blanks.
    """

    id: str
    operation: str
    statement: str
    upstream: str
    safe: str
    defects: str


@dataclass(frozen=True)
class Table:
    """A table of text that a run has beside its rows: laws, planted faults, drift.

    Attributes
    ----------
    title : str
    note : str
        What it shows, in a sentence or two.
    columns : tuple of str
    lines : list of list of str
        Cells, as many a line as there are columns; the first one names the line.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    lines: list[list[str]]

    def __post_init__(self) -> None:
        """Check that it is a table."""
        widths = {len(line) for line in self.lines} - {len(self.columns)}
        if widths or not self.columns:
            expected = f"lines of {len(self.columns) or 'one or more'} cells"
            raise InputError("table", expected=expected, got=f"lines of {sorted(widths)}", where=self.title)


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
    growth : tuple of Growth
    pictures : tuple of Picture
    notes : tuple of str
        Facts about the run that a reader needs: ignored boxes, skipped implementations.
    quirks : tuple of Surprise
        Ledger of the operations that were run.
    tables : tuple of Table
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
    quirks: tuple[Surprise, ...] = ()
    growth: tuple[Growth, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def findings(self) -> tuple[Row, ...]:
        """Rows that are wrong."""
        return tuple(row for row in self.rows if row.wrong)


def measurement(
    operation: str, implementation: str, timing: Timing, counters: Counters, *, baseline: str
) -> Measurement:
    """Put a timing and counters into one record; its workload is left empty.

    Examples
    --------
    >>> from detoracle.reports.timing import summarise
    >>> m = measurement("yolox.loss", "mine", summarise([2.0], [1.0]), Counters(1, 0, 4, 4, 4), baseline="oracle")
    >>> m.milliseconds, m.times_faster, m.host_syncs
    (1000.0, 2.0, 0)
    """
    return Measurement(
        operation=operation,
        implementation=implementation,
        workload="",
        milliseconds=timing.median * 1e3,
        times_faster=timing.times_faster,
        low=timing.low,
        high=timing.high,
        baseline=baseline,
        rounds=timing.rounds,
        **asdict(counters),
    )


def to_json(report: Report) -> dict[str, Any]:
    """Report as nested plain objects, with the schema's number; strict JSON can hold all of it.

    Examples
    --------
    >>> to_json(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}))["schema"]
    1
    """
    return {"schema": SCHEMA, **to_plain(report)}


def from_json(body: Any) -> Report:
    """Report from what `to_json` gave.

    Raises
    ------
    InputError
        If it is of another schema, or incomplete, or a value is of another type.

    Examples
    --------
    >>> report = Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {})
    >>> from_json(to_json(report)) == report
    True
    """
    schema = body.get("schema") if isinstance(body, Mapping) else None
    if schema != SCHEMA:
        raise InputError("results.json", expected=f"schema {SCHEMA}", got=repr(schema), fix="Run it again to make one.")
    try:
        return from_plain(Report, body)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError("results.json", expected=f"a report of schema {SCHEMA}", got=str(error)) from error
