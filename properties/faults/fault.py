"""A planted fault: one small change to the text of a right, plain implementation.

The text changed is the system's ``loop`` implementation, in any of its modules, so that a fault is a line's difference,
as real ones are. A fault whose text is no longer found there is an error: it would test nothing.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from detoracle.implementations import loop
from detoracle.properties import faults
from detoracle.properties.systems import NAMES
from detoracle.reference.errors import DetoracleError

__all__ = ["Fault", "build", "examined", "faults_of"]


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
    sources = _sources(fault.system)
    found = sum(source.count(fault.old) for source in sources.values())
    if found != 1 or fault.old == fault.new:
        expected, got = "its text once in the loop implementation", f"{found} times"
        raise DetoracleError(fault.id, expected=expected, got=got, where="faults")
    changed = {name: source.replace(fault.old, fault.new) for name, source in sources.items()}
    loaded: dict[str, ModuleType] = {}
    for name in changed:
        for _, function in inspect.getmembers(_load(name, changed, loaded, fault.id), inspect.isfunction):
            if fault.operation in [operation for operation, _ in getattr(function, "implements", ())]:
                return function
    raise DetoracleError(fault.id, expected=f"a loop implementation of {fault.operation}", got="none", where="faults")


def _sources(system: str) -> dict[str, str]:
    """Source of each module of a system's loop implementation, by the module's full name."""
    names = [module.name for module in pkgutil.iter_modules(loop.__path__)]
    mine = [f"{loop.__name__}.{name}" for name in names if name == system or name.startswith(f"{system}_")]
    return {name: inspect.getsource(importlib.import_module(name)) for name in mine}


def _load(name: str, sources: Mapping[str, str], loaded: dict[str, ModuleType], label: str) -> ModuleType:
    """Run one of the sources, in which the others are imported in place of the modules that they were taken from."""
    if name not in loaded:

        def import_(wanted: str, *rest: Any) -> ModuleType:
            return _load(wanted, sources, loaded, label) if wanted in sources else __import__(wanted, *rest)

        loaded[name] = module = ModuleType(name)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": import_}
        exec(compile(sources[name], f"<{label}>", "exec"), vars(module))
    return loaded[name]
