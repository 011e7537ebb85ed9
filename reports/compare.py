"""The main job: implementations against oracles on scenes, and what a call of each costs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detoracle.implementations.registry import Implementation
from detoracle.properties.checking import Case, Result, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.outputs import Outcome
from detoracle.properties.scenefile import SavedScene, write_atomically, write_scene
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.properties.worker import Worker
from detoracle.reference.contract import Operation
from detoracle.reports.counters import count
from detoracle.reports.device import Gpu
from detoracle.reports.environment import source_hash
from detoracle.reports.picturing import picture_of
from detoracle.reports.record import Measurement, Picture, Row, measurement
from detoracle.reports.rows import row_of
from detoracle.reports.timing import paired, timed
from detoracle.reports.workloads import hash_of

__all__ = ["Part", "Settings", "compare_operation", "prepared", "read_part", "run_key", "write_part"]

_MOST_FILES = 20  # scene files kept for one implementation of one operation
_MOST_PICTURES = 5  # ... and pictures, which are ten times as large
_ROUNDS = 8


@dataclass(frozen=True)
class Settings:
    """How to compare.

    Attributes
    ----------
    device : str
    dtype : torch.dtype
    seed : int
    time_limit : float
        Seconds that one call of an implementation may take.
    measure : bool
        Also time and count, on the first realistic scene.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    time_limit: float = 60.0
    measure: bool = True


@dataclass(frozen=True)
class Part:
    """Results of one operation."""

    operation: str
    rows: tuple[Row, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    pictures: tuple[Picture, ...] = ()


def compare_operation(
    system: System,
    operation: Operation,
    implementations: Sequence[Implementation],
    scenes: Iterable[Scene],
    workers: Mapping[str, Worker],
    settings: Settings,
    folder: Path,
) -> Part:
    """Judge all implementations of one operation on all scenes.

    Parameters
    ----------
    system : System
    operation : Operation
    implementations : sequence of Implementation
    scenes : iterable of Scene
    workers : mapping of str to Worker
        By implementation name; each in a process of its own, so that none can harm the others.
    settings : Settings
    folder : Path
        Replayable scenes of findings are written below it.

    Returns
    -------
    Part
    """
    rows: list[Row] = []
    pictures: list[Picture] = []
    kept: Counter[str] = Counter()
    workload: Case | None = None
    for scene in scenes:
        for case in cases(system, operation, scene, device=settings.device, dtype=settings.dtype):
            if workload is None and _is_workload(scene):
                workload = case
            expectation = expect(system, operation, case.arguments)
            for one in implementations:
                worker = workers[one.name]
                outcomes: list[Outcome] = []

                def call(arguments: Mapping[str, Any], one: Implementation = one, worker: Worker = worker,
                         outcomes: list[Outcome] = outcomes) -> Outcome:  # fmt: skip
                    outcomes.append(worker.perform(operation, one.target, arguments))
                    return outcomes[-1]

                result = judge_case(case, expectation, call)
                row = row_of(operation.name, one.name, result)
                if result.verdict.wrong and kept[one.name] < _MOST_FILES:
                    kept[one.name] += 1
                    row = replace(row, scene_file=_save(operation, one, result, folder, kept[one.name]))
                    if kept[one.name] <= _MOST_PICTURES:
                        pictures += _pictures(system, expectation, row, case, outcomes[-1])
                rows.append(row)
    measurements: tuple[Measurement, ...] = ()
    right = [one for one in implementations if not any(r.wrong for r in rows if r.implementation == one.name)]
    if settings.measure and workload is not None and right:
        measurements = _measure(operation, right, workload, settings)
    return Part(operation.name, tuple(rows), measurements, tuple(pictures))


def _is_workload(scene: Scene) -> bool:
    return bool(scene.tags & {"realistic", "recorded"}) and scene.max_gts > 0


def _save(operation: Operation, one: Implementation, result: Result, folder: Path, number: int) -> str:
    name = f"scenes/{operation.name}-{_plain(one.name)}-{number}.scene.json"
    findings = tuple(f"{f.clause} {f.where}: {f.message}" for f in result.verdict.findings)
    saved = SavedScene(operation.name, result.case.name, result.case.arguments, one.target, findings)
    write_scene(folder / name, saved)
    return name


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:60]


def _pictures(system: System, expectation: Expectation, row: Row, case: Case, outcome: Outcome) -> list[Picture]:
    """The first image that differs."""
    canvas = system.canvas(row.operation, dict(case.arguments))
    given = outcome.outputs.get("gt_index")
    if canvas is None or given is None or expectation.explanation is None:
        return []
    if given.shape != expectation.explanation.gt_index.shape:
        return []
    return [picture_of(row, canvas, expectation.explanation, given)]


# --------------------------------------------------------------------------------------------------------- cost
def _measure(
    operation: Operation, implementations: Sequence[Implementation], case: Case, settings: Settings
) -> tuple[Measurement, ...]:
    """Time right implementations against the oracle, turn by turn in this process, and count what a call does."""
    calls = {"oracle": operation.oracle, **{one.name: one.load() for one in implementations}}
    counters = {name: count(prepared(operation, call, case.arguments))[1] for name, call in calls.items()}
    clock = Gpu().timed if settings.device == "cuda" else timed

    def by_round(call: Callable[..., Any]) -> Callable[[int], object]:
        fresh = [prepared(operation, call, case.arguments) for _ in range(_ROUNDS + 1)]
        return lambda number: fresh[number]()

    timings = paired(
        {name: by_round(call) for name, call in calls.items()},
        baseline="oracle",
        rounds=_ROUNDS,
        seed=settings.seed,
        clock=clock,
    )
    inputs = hash_of(case.arguments)
    return tuple(
        replace(
            measurement(operation.name, name, timing, counters[name], baseline="oracle"),
            workload=case.name,
            setting=case.setting,
            inputs=inputs,
        )
        for name, timing in timings.items()
    )


def prepared(operation: Operation, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], object]:
    """A call on its own copy of the arguments, backward pass included where the operation has a gradient.

    Parameters
    ----------
    operation : Operation
    call : callable
    arguments : mapping

    Returns
    -------
    callable
        Takes nothing; to be called once.

    Examples
    --------
    >>> from detoracle.reference.boxes import iou_yolox
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> prepared(iou_yolox.operation, iou_yolox, pair)()
    tensor([[1.]])
    """
    given = copy.deepcopy(dict(arguments))
    for name in operation.gradients:
        for tensor in given[name] if isinstance(given[name], list) else [given[name]]:
            tensor.requires_grad_()

    def run() -> object:
        returned = call(**given)
        first = next(iter(returned.values())) if isinstance(returned, dict) else returned
        if isinstance(first, Tensor) and first.requires_grad:
            torch.autograd.backward(first.sum())
        return returned

    return run


# -------------------------------------------------------------------------------------------------------- parts
def run_key(*asked: object) -> str:
    """Key of what was asked for, and of the source that answers it.

    Examples
    --------
    >>> run_key("a") == run_key("a"), run_key("a") == run_key("b")
    (True, False)
    """
    return hashlib.sha256(repr((asked, source_hash())).encode()).hexdigest()


def write_part(part: Part, key: str, folder: Path) -> None:
    """Keep one operation's results, so that an interrupted run can go on.

    Parameters
    ----------
    part : Part
    key : str
        What was asked for; a later run uses the part only if it asks for the same.
    folder : Path
    """
    body = {"key": key, **asdict(part)}
    write_atomically(folder / "parts" / f"{part.operation}.json", json.dumps(body))


def read_part(operation: str, key: str, folder: Path) -> Part | None:
    """Results of an interrupted run, if it asked for the same."""
    path = folder / "parts" / f"{operation}.json"
    if not path.is_file():
        return None
    body = json.loads(path.read_text(encoding="utf-8"))
    if body["key"] != key:
        return None
    return Part(
        body["operation"],
        tuple(Row(**row) for row in body["rows"]),
        tuple(Measurement(**m) for m in body["measurements"]),
        tuple(Picture(**{**p, "size": tuple(p["size"])}) for p in body["pictures"]),
    )
