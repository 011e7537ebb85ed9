"""A planted fault: one small change to the text of a right, plain implementation.

The text changed is the system's ``loop`` implementation, so that a fault is a line's difference, as real ones are. A
fault whose text is no longer found there is an error: it would test nothing.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

from detoracle.properties import faults
from detoracle.properties.checking import cases
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import NAMES, find_operation
from detoracle.reference.errors import DetoracleError

__all__ = ["Fault", "Kill", "build", "exam", "exam_scenes", "examined", "faults_of"]


@dataclass(frozen=True)
class Fault:
    """One wrong variant.

    Attributes
    ----------
    id : str
        Such as ``yolox.k-rounded``.
    operation : str
        Operation through which it is caught.
    old, new : str
        Text of the ``loop`` implementation, found there exactly once, and what stands there instead.
    origin : str
        Published defect (``N1``, ``T8``, ...) or the clause of the specification that it breaks.
    """

    id: str
    operation: str
    old: str
    new: str
    origin: str

    @property
    def system(self) -> str:
        """System whose implementation is changed."""
        return self.id.partition(".")[0]


@dataclass(frozen=True)
class Kill:
    """How a fault was caught.

    Attributes
    ----------
    fault : Fault
    clause, scene : str
        First violated clause, and where; both empty if it survived.
    examples : int
        Scenes that were needed; of a survivor, all that were tried.
    """

    fault: Fault
    clause: str
    scene: str
    examples: int

    @property
    def caught(self) -> bool:
        """Was it found wrong?"""
        return bool(self.clause)


def examined() -> tuple[str, ...]:
    """Systems that have planted faults, in the suite's order.

    Examples
    --------
    >>> "yolox" in examined()
    True
    """
    modules = {module.name for module in pkgutil.iter_modules(faults.__path__)}
    return tuple(name for name in NAMES if name in modules)


def faults_of(system: str) -> tuple[Fault, ...]:
    """Faults of one system.

    Examples
    --------
    >>> "yolox.k-rounded" in [fault.id for fault in faults_of("yolox")]
    True
    """
    found: tuple[Fault, ...] = importlib.import_module(f"detoracle.properties.faults.{system}").FAULTS
    return found


def build(fault: Fault) -> Callable[..., Any]:
    """Make the wrong implementation.

    Raises
    ------
    DetoracleError
        If the text to change is not there exactly once, or nothing there implements the operation.

    Examples
    --------
    >>> wrong = build(next(f for f in faults_of("yolox") if f.id == "yolox.decode-cell-centre"))
    >>> import torch
    >>> wrong([torch.zeros(1, 6, 1, 1)], [8])[0, 0, :2].tolist()
    [4.0, 4.0]
    """
    original = importlib.import_module(f"detoracle.implementations.loop.{fault.system}")
    source = inspect.getsource(original)
    if source.count(fault.old) != 1 or fault.old == fault.new:
        got = f"{source.count(fault.old)} times"
        raise DetoracleError(fault.id, expected="its text once in the loop implementation", got=got, where="faults")
    changed = ModuleType(original.__name__)
    exec(compile(source.replace(fault.old, fault.new), f"<{fault.id}>", "exec"), changed.__dict__)
    for found in vars(changed).values():
        if fault.operation in [operation for operation, _ in getattr(found, "implements", ())]:
            return found  # type: ignore[no-any-return]
    raise DetoracleError(fault.id, expected=f"a loop implementation of {fault.operation}", got="none", where="faults")


def exam_scenes(examples: int, seed: int) -> Iterator[Scene]:
    """Scenes of an exam, and of `check`: random ones, then the catalogue."""
    return chain(random_scenes(examples, seed=seed), edge_cases())


def exam(faults: Sequence[Fault], *, examples: int = 20, seed: int = 0) -> tuple[Kill, ...]:
    """Let the suite find faults.

    Parameters
    ----------
    faults : sequence of Fault
    examples : int
        Random scenes before the catalogue.
    seed : int
        Decides the random scenes.

    Returns
    -------
    tuple of Kill
        One for each fault, in order.

    Examples
    --------
    >>> [kill.caught for kill in exam(faults_of("yolox")[:2])]
    [True, True]
    """
    kills: dict[str, Kill] = {}
    for operation in dict.fromkeys(fault.operation for fault in faults):
        mine = [fault for fault in faults if fault.operation == operation]
        kills |= {kill.fault.id: kill for kill in _sit(operation, mine, exam_scenes(examples, seed))}
    return tuple(kills[fault.id] for fault in faults)


def _sit(name: str, faults: list[Fault], scenes: Iterable[Scene]) -> Iterator[Kill]:
    system, operation = find_operation(name)
    alive = {fault.id: (fault, build(fault)) for fault in faults}
    number = 0
    for number, scene in enumerate(scenes, start=1):
        for case in cases(system, operation, scene):
            expectation = expect(system, operation, case.arguments)
            for fault, call in list(alive.values()):
                verdict = expectation.judge(perform(operation, call, case.arguments))
                if verdict.wrong:
                    del alive[fault.id]
                    yield Kill(fault, verdict.findings[0].clause, case.name, number)
        if not alive:
            return
    for fault, _ in alive.values():
        yield Kill(fault, "", "", number)
