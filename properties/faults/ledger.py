"""Long exams: their sittings, spread over processes, and the results that a later run need not work out again.

A result is kept with a fingerprint of the suite's sources: it is taken up again only by the suite that found it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

import detoracle.implementations
import detoracle.properties
import detoracle.reference
from detoracle.implementations.registry import discover
from detoracle.properties.arithmetic import false_alarms
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.faults.cheats import Cheat, sit
from detoracle.properties.faults.exam import Kill, sit_operation
from detoracle.properties.faults.fault import Fault
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import find_operation, system_of

__all__ = ["Ledger", "Sitting", "alarm_sittings", "cheat_sittings", "fault_sittings", "work"]

Entry = dict[str, Any]
Sitting = Callable[[], list[Entry]]
"""One piece of work for one process: its results, as plain data."""


class Ledger:
    """Results on disk, one line of JSON each.

    Parameters
    ----------
    folder : Path or None
        Nothing is kept without one.

    Attributes
    ----------
    kept : list of dict
        Results of earlier runs that were asked for again.

    Examples
    --------
    >>> Ledger(None).take(fault="yolox.k-rounded", seed=0)
    False
    """

    def __init__(self, folder: Path | None) -> None:
        self.kept: list[Entry] = []
        self._path = folder / "results.jsonl" if folder else None
        self._source = _fingerprint()
        lines = self._path.read_text("utf-8").splitlines() if self._path and self._path.exists() else []
        self._old = [entry for entry in map(_entry, lines) if entry.get("source") == self._source]

    def take(self, **facts: Any) -> bool:
        """Keep the earlier results with these facts, if there are any."""
        found = [entry for entry in self._old if facts.items() <= entry.items()]
        self.kept += found
        return bool(found)

    def add(self, entries: Sequence[Entry]) -> None:
        """Write results down."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                # A line break comes first too: a stopped run may have left half a line.
                file.write("\n")
                file.writelines(json.dumps({**entry, "source": self._source}) + "\n" for entry in entries)


def _entry(line: str) -> Entry:
    """A line's result; none of a line that a stopped run left unfinished."""
    try:
        found: Entry = json.loads(line)
    except ValueError:
        return {}
    return found


def _fingerprint() -> str:
    """Of all sources that decide a verdict."""
    digest = hashlib.sha256()
    for room in (detoracle.reference, detoracle.implementations, detoracle.properties):
        for path in sorted(Path(room.__path__[0]).resolve().rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fault_sittings(faults: Sequence[Fault], seeds: Sequence[int], examples: int, ledger: Ledger) -> list[Sitting]:
    """Sittings of faults, one an operation.

    Parameters
    ----------
    faults : sequence of Fault
    seeds : sequence of int
    examples : int
        Random scenes before the catalogue.
    ledger : Ledger
        What it holds need not sit again.

    Returns
    -------
    list of callable

    Examples
    --------
    >>> from detoracle.properties.faults.fault import faults_of
    >>> [sitting] = fault_sittings(faults_of("yolox")[:2], [0], 1, Ledger(None))
    >>> [entry["clause"] for entry in sitting()]
    ['yolox.decode[predictions]', 'yolox.decode[predictions]']
    """
    sittings: list[Sitting] = []
    for operation in dict.fromkeys(fault.operation for fault in faults):
        mine = [fault for fault in faults if fault.operation == operation]
        sitting = {
            seed: [fault for fault in mine if not ledger.take(fault=fault.id, seed=seed, random=examples)]
            for seed in seeds
        }
        if any(sitting.values()):
            sittings.append(partial(_faults_sit, mine, sitting, examples))
    return sittings


def _faults_sit(faults: Sequence[Fault], sitting: dict[int, list[Fault]], examples: int) -> list[Entry]:
    return [_written(kill, random=examples) for kill in sit_operation(faults, sitting, examples=examples)]


def cheat_sittings(cheats: Sequence[Cheat], seeds: Sequence[int], ledger: Ledger) -> list[Sitting]:
    """Sittings of cheats, one each."""
    return [
        partial(_cheat_sits, cheat, seed)
        for cheat in cheats
        for seed in seeds
        if not ledger.take(fault=cheat.id, seed=seed)
    ]


def _cheat_sits(cheat: Cheat, seed: int) -> list[Entry]:
    return [_written(sit(cheat, seed=seed))]


def _written(kill: Kill, **facts: int) -> Entry:
    return {
        "fault": kill.fault.id,
        "seed": kill.seed,
        "clause": kill.clause,
        "scene": kill.scene,
        "examples": kill.examples,
        **facts,
    }


def alarm_sittings(systems: Sequence[str], seeds: Sequence[int], examples: int, ledger: Ledger) -> list[Sitting]:
    """Sittings of right implementations, one an operation and seed, then one an operation on the catalogue.

    Parameters
    ----------
    systems : sequence of str
    seeds : sequence of int
    examples : int
        Random scenes a seed.
    ledger : Ledger
        What it holds need not sit again.

    Returns
    -------
    list of callable
    """
    operations = [operation.name for name in systems for operation in system_of(name).operations]
    return [
        partial(_right_sit, operation, seed, examples)
        for seed in (*seeds, None)
        for operation in operations
        if not ledger.take(operation=operation, right=seed, random=examples)
    ]


def _right_sit(name: str, seed: int | None, examples: int) -> list[Entry]:
    system, operation = find_operation(name)
    implementations = [one for one in discover() if one.operation == name]
    scenes = iter(edge_cases()) if seed is None else random_scenes(examples, seed=seed)
    return [
        {"operation": name, "right": seed, "random": examples, **vars(alarms)}
        for alarms in false_alarms(system, operation, implementations, scenes)
    ]


def work(sittings: Sequence[Sitting], ledger: Ledger, jobs: int) -> Iterator[list[Entry]]:
    """Let all sit.

    Parameters
    ----------
    sittings : sequence of callable
    ledger : Ledger
        Results are written there as they come.
    jobs : int
        Processes, of one thread each if there are several.

    Yields
    ------
    list of dict
        Results of each sitting, as they come.

    Examples
    --------
    >>> from detoracle.properties.faults.fault import faults_of
    >>> ledger = Ledger(None)
    >>> sittings = fault_sittings(faults_of("yolox")[:2], [0], 1, ledger)
    >>> [[entry["examples"] for entry in entries] for entries in work(sittings, ledger, jobs=1)]
    [[1, 1]]
    """
    if jobs == 1:
        for sitting in sittings:
            entries = sitting()
            ledger.add(entries)
            yield entries
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(sitting) for sitting in sittings]):
            ledger.add(future.result())
            yield future.result()
