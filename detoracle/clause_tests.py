"""One clause as one test: what passes, what fails and how the failing scene is handed over."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from detoracle.implementations.registry import load
from detoracle.properties.battery import Battery
from detoracle.properties.checking import Result
from detoracle.properties.clauses import clauses_of
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.known_failures import KnownFailure, problems, read_known_failures
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenefile import SavedScene, write_scene
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError

__all__ = ["clauses_named", "judge_clause", "known_failures"]

_BATTERIES = pytest.StashKey[dict[str, Battery]]()
_MOST_NUMBERS = 64  # of a tensor that is shown in a report; the scene file has them all


def clauses_named(operation: str) -> tuple[str, ...]:
    """Ids of all clauses of an operation, each of which is one test.

    Raises
    ------
    InputError
        If there is no such operation.

    Examples
    --------
    >>> clauses_named("yolov8.assign")[3]
    'yolov8.assign[outcome]'
    """
    return tuple(clause.id for clause in clauses_of(*find_operation(operation)))


def known_failures(path: Path | None) -> tuple[KnownFailure, ...]:
    """Known failures, of which each must name a clause.

    Raises
    ------
    InputError
        If the file is no such list, or an entry names no clause: it would never fail.

    Examples
    --------
    >>> known_failures(None)
    ()
    """
    entries = read_known_failures(path) if path else ()
    for entry in entries:
        if entry.clause not in clauses_named(entry.clause.partition("[")[0]):
            raise InputError(
                path.name if path else "", expected="clauses such as yolox.assign[outcome]", got=entry.clause
            )
    return entries


def judge_clause(item: pytest.Item, clause: str, implementation: Callable[..., Any], target: str = "") -> None:
    """Pass if an implementation was judged by a clause, and never violated it.

    Parameters
    ----------
    item : pytest.Item
        The test. Those whose ids differ in nothing but the clause share one run of the implementation.
    clause : str
        Such as ``yolov8.assign[outcome]``.
    implementation : callable
        Takes the operation's arguments by keyword.
    target : str
        ``package.module:callable``, by which the implementation is found for a replay.
    """
    __tracebackhide__ = True
    battery = _battery(item, clause, implementation)
    item.user_properties.append(("detoracle_judged", battery.judged[clause]))
    failures = battery.failures.get(clause, [])
    entries = [entry for entry in known_failures(_option(item, "known_failures")) if entry.clause == clause]
    where = [(clause, failure.case.scene.name, failure.case.setting) for failure in failures]
    unknown = [f for f, place in zip(failures, where, strict=True) if not any(e.covers(*place) for e in entries)]
    if unknown:
        pytest.fail(_handed_over(item, clause, battery, unknown, target or _target_of(implementation)), pytrace=False)
    if stale := problems(tuple(entries), where, datetime.datetime.now(datetime.UTC).date()):
        pytest.fail("\n".join(stale), pytrace=False)
    if failures:
        pytest.xfail("; ".join(f"{entry.reason} ({entry.link})" for entry in entries))
    if battery.unreturned(clause):
        pytest.skip("an optional output, which the implementation does not return")
    if not battery.judged[clause]:
        instead = f"violated first: {', '.join(battery.failures)}" if battery.failures else "draw more examples"
        pytest.fail(f"{clause} was never judged in {battery.cases} cases; {instead}", pytrace=False)


def _option(item: pytest.Item, name: str) -> Any:
    return item.config.getoption(f"detoracle_{name}")


def _battery(item: pytest.Item, clause: str, implementation: Callable[..., Any]) -> Battery:
    batteries = item.config.stash.setdefault(_BATTERIES, {})
    key = item.nodeid.replace(clause, "")
    if key not in batteries:
        scenes = chain(edge_cases(), random_scenes(_option(item, "examples"), seed=_option(item, "seed")))
        batteries[key] = Battery.of(clause.partition("[")[0], implementation, scenes)
    return batteries[key]


def _target_of(implementation: Callable[..., Any]) -> str:
    """How a replay may import an implementation; empty if it cannot."""
    target = f"{getattr(implementation, '__module__', '')}:{getattr(implementation, '__qualname__', '')}"
    try:
        return target if load(target) is implementation else ""
    except InputError:
        return ""


def _handed_over(item: pytest.Item, clause: str, battery: Battery, failures: list[Result], target: str) -> str:
    """Write the smallest failing scene to a file, attach it to the report, and say what is wrong and how to replay."""
    smallest = battery.smallest(clause, failures)
    texts = tuple(f"{f.clause} {f.where}: {f.message}" for f in smallest.verdict.findings if f.clause == clause)
    folder: Path = item.config.rootpath / _option(item, "out")
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in clause).rstrip("-")
    path = folder / f"{plain}-{hashlib.sha256(item.nodeid.encode()).hexdigest()[:8]}.scene.json"
    arguments = smallest.case.arguments
    write_scene(path, SavedScene(battery.operation.name, smallest.case.name, arguments, target, texts))
    cwd = item.config.invocation_params.dir
    shown = path.relative_to(cwd) if path.is_relative_to(cwd) else path
    command = f"detoracle replay {shown}{'' if target else ' --implementation package.module:callable'}"
    scene = [f"{name} = {_summary(value)}" for name, value in arguments.items()]
    item.add_report_section("call", "detoracle scene", "\n".join([smallest.case.name, *scene, command]))
    laws = f", in {battery.judged[clause]} of which it was judged" if smallest.law else ""
    return "\n".join(
        [
            f"{clause} fails on {len(failures)} of {battery.cases} cases{laws}; simplified, on {smallest.case.name}:",
            *(f"  {text}" for text in texts),
            f"  replay: {command}",
        ]
    )


def _summary(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_summary, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    shape = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{shape} {value.tolist()}" if value.numel() <= _MOST_NUMBERS else shape
