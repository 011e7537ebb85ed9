"""The exam: the suite looks for planted faults, seed by seed, and says which clause found each after how many scenes.

A fault sits a few random scenes, which the seed decides, and then the catalogue of edge cases, which it does not: so
the catalogue is sat once, whatever the number of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from detoracle.properties.checking import cases
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.faults.fault import Fault, build
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import find_operation

__all__ = ["Kill", "Sitter", "exam", "sit_operation"]


class Sitter(Protocol):
    """What sits an exam: a fault or a cheat."""

    @property
    def id(self) -> str: ...  # noqa: D102 - the class says it
    @property
    def operation(self) -> str: ...  # noqa: D102
    @property
    def origin(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Kill:
    """How a fault was caught.

    Attributes
    ----------
    fault : Sitter
    seed : int
        Of the random scenes.
    clause, scene : str
        First violated clause, and where; both empty if it survived.
    examples : int
        Scenes that were needed; of a survivor, all that were tried.
    """

    fault: Sitter
    seed: int
    clause: str
    scene: str
    examples: int

    @property
    def caught(self) -> bool:
        """Was it found wrong?"""
        return bool(self.clause)


def exam(faults: Sequence[Fault], *, examples: int = 20, seeds: Sequence[int] = (0,)) -> tuple[Kill, ...]:
    """Let the suite find faults.

    Parameters
    ----------
    faults : sequence of Fault
    examples : int
        Random scenes before the catalogue.
    seeds : sequence of int
        Each decides other random scenes.

    Returns
    -------
    tuple of Kill
        One for each fault and seed, fault by fault in order.

    Examples
    --------
    >>> from detoracle.properties.faults.fault import faults_of
    >>> [kill.caught for kill in exam(faults_of("yolox")[:2])]
    [True, True]
    """
    kills: dict[tuple[str, int], Kill] = {}
    for operation in dict.fromkeys(fault.operation for fault in faults):
        mine = [fault for fault in faults if fault.operation == operation]
        for kill in sit_operation(mine, dict.fromkeys(seeds, mine), examples=examples):
            kills[kill.fault.id, kill.seed] = kill
    return tuple(kills[fault.id, seed] for fault in faults for seed in seeds)


def sit_operation(faults: Sequence[Fault], sitting: Mapping[int, Sequence[Fault]], *, examples: int) -> Iterator[Kill]:
    """Let the faults of one operation sit, all on the same cases, so that each case is explained once.

    Parameters
    ----------
    faults : sequence of Fault
        Of one operation.
    sitting : mapping of int to sequence of Fault
        By seed, those of them that sit.
    examples : int

    Yields
    ------
    Kill
        In the order in which they are caught; survivors last.
    """
    built = {fault: build(fault) for fault in faults}
    left: dict[int, list[Fault]] = {}
    for seed, mine in sitting.items():
        here = {fault: built[fault] for fault in mine}
        kills = {kill.fault: kill for kill in _sit(here, random_scenes(examples, seed=seed), seed, 0)}
        yield from kills.values()
        left[seed] = [fault for fault in mine if fault not in kills]
    slow = {fault: call for fault, call in built.items() if any(fault in remaining for remaining in left.values())}
    catalogue = sorted(edge_cases(), key=lambda scene: scene.max_gts)  # crowds, which take longest, last
    late = {kill.fault: kill for kill in _sit(slow, catalogue, 0, examples)}
    for seed, remaining in left.items():
        for fault in remaining:
            kill = late.get(fault)
            if kill is None:
                yield Kill(fault, seed, "", "", examples + len(edge_cases()))
            else:
                yield Kill(fault, seed, kill.clause, kill.scene, kill.examples)


def _sit(faults: Mapping[Fault, Callable[..., Any]], scenes: Iterable[Scene], seed: int, before: int) -> Iterator[Kill]:
    """Kills of faults of one operation, built, on scenes, of which so many went before."""
    if not faults:
        return
    system, operation = find_operation(next(iter(faults)).operation)
    alive = dict(faults)
    for number, scene in enumerate(scenes, start=before + 1):
        for case in cases(system, operation, scene):
            expectation = expect(system, operation, case.arguments)
            for fault, call in list(alive.items()):
                verdict = expectation.judge(perform(operation, call, case.arguments))
                if verdict.wrong:
                    del alive[fault]
                    yield Kill(fault, seed, verdict.findings[0].clause, case.name, number)
            if not alive:
                return
