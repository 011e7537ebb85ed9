"""Where implementations come from: ours, entry points, a pyproject.toml, or a name on the command line.

An implementation is any callable that takes an operation's documented arguments by keyword. `implements` marks one;
`discover` finds the marked ones. Nothing is registered at import time: a mark is an attribute of the function.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from detoracle.reference.errors import InputError

__all__ = [
    "BUILT_IN",
    "ENTRY_POINTS",
    "Implementation",
    "discover",
    "implements",
    "load",
    "marked_in",
    "preferred",
    "unavailable",
]

F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINTS = "detoracle.implementations"
BUILT_IN = ("batched", "compiled", "loop", "sparse", "triton")
_FASTEST = {"cpu": ("sparse", "batched"), "cuda": ("triton", "batched")}


@dataclass(frozen=True)
class Implementation:
    """A callable that claims to do an operation.

    Attributes
    ----------
    operation : str
        Such as ``yolox.assign``.
    name : str
        Short name in reports, such as ``batched``.
    target : str
        ``package.module:callable``, by which another process finds it.
    """

    operation: str
    name: str
    target: str

    def load(self) -> Callable[..., Any]:
        """Import the callable."""
        return load(self.target)


def implements(operation: str, *, name: str) -> Callable[[F], F]:
    """Mark a function as an implementation of an operation.

    Examples
    --------
    >>> @implements("yolox.decode", name="mine")
    ... def decode(**arguments):
    ...     return None
    >>> decode.implements
    (('yolox.decode', 'mine'),)
    """

    def mark(function: F) -> F:
        marks = (*getattr(function, "implements", ()), (operation, name))
        function.implements = marks  # type: ignore[attr-defined]
        return function

    return mark


def load(target: str) -> Callable[..., Any]:
    """Import ``package.module:callable``.

    Parameters
    ----------
    target : str
        The part after the colon may have dots.

    Returns
    -------
    callable

    Raises
    ------
    InputError
        If the module cannot be imported, or the name is missing or not callable.

    Examples
    --------
    >>> load("math:sqrt")(4.0)
    2.0
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise InputError("implementation", expected="package.module:callable", got=repr(target))
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise InputError(
            "implementation",
            expected=f"'{target}' to be importable",
            got=f"{type(error).__name__}: {error}",
            fix="Check the spelling, and that its folder is on PYTHONPATH.",
        ) from error
    if not callable(found):
        raise InputError("implementation", expected=f"'{target}' to be callable", got=type(found).__name__)
    return found  # type: ignore[no-any-return]


def marked_in(module: ModuleType) -> tuple[Implementation, ...]:
    """Implementations that a module defines.

    Examples
    --------
    >>> from detoracle.implementations.batched import yolox
    >>> {one.name for one in marked_in(yolox)}
    {'batched'}
    """
    return tuple(
        Implementation(operation, name, f"{module.__name__}:{attribute}")
        for attribute, function in vars(module).items()
        if getattr(function, "__module__", None) == module.__name__
        for operation, name in getattr(function, "implements", ())
    )


def unavailable(device: str = "cpu") -> dict[str, str]:
    """Kinds of ours that cannot run on a device here, and why; their modules are not imported.

    Parameters
    ----------
    device : str
        Such as ``cuda``.

    Returns
    -------
    dict of str to str
        Reason by kind.

    Examples
    --------
    >>> unavailable("cpu")
    {'triton': 'needs a GPU'}
    """
    reasons = {kind: _reason(_import(f"detoracle.implementations.{kind}"), device) for kind in BUILT_IN}
    return {kind: reason for kind, reason in reasons.items() if reason}


def _reason(package: ModuleType, device: str) -> str:
    """What a kind says in its function `unavailable`, if it has one."""
    return str(package.unavailable(device)) if hasattr(package, "unavailable") else ""


def preferred(operation: str, *, device: str) -> Implementation:
    """The implementation of ours that is meant for a device, or the next best that can run there.

    Parameters
    ----------
    operation : str
        Such as ``yolox.loss``.
    device : str
        ``cpu`` or ``cuda``, whose kernels give way to plain PyTorch where Triton is missing.

    Returns
    -------
    Implementation

    Raises
    ------
    InputError
        If there is none.

    Examples
    --------
    >>> preferred("yolox.loss", device="cpu").name, preferred("yolox.decode", device="cpu").name
    ('sparse', 'batched')
    """
    found = {one.name: one for one in discover(device=device) if one.operation == operation}
    for name in _FASTEST[device]:
        if name in found:
            return found[name]
    raise InputError("operation", expected="one that is implemented", got=repr(operation), fix="See 'detoracle list'.")


def discover(pyproject: Path | None = None, *, device: str = "cpu") -> tuple[Implementation, ...]:
    """All implementations: ours, those of installed entry points, and those a pyproject.toml names.

    Parameters
    ----------
    pyproject : Path, optional
        Its ``[tool.detoracle] implementations`` lists modules whose marked functions count.
    device : str
        Ours that cannot run there are left out; see `unavailable`.

    Returns
    -------
    tuple of Implementation

    Raises
    ------
    InputError
        If a named module cannot be imported, or two implementations of an operation share a name.

    Examples
    --------
    >>> "batched" in {one.name for one in discover() if one.operation == "yolox.assign"}
    True
    """
    missing = unavailable(device)
    modules = [
        f"{package.__name__}.{module.name}"
        for package in (_import(f"detoracle.implementations.{kind}") for kind in BUILT_IN if kind not in missing)
        for module in pkgutil.iter_modules(package.__path__)
    ]
    modules += [point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    if pyproject is not None and pyproject.is_file():
        modules += _named_in(pyproject)
    found = [one for module in modules for one in marked_in(_import(module))]
    _refuse_doubles(found)
    return tuple(found)


def _named_in(pyproject: Path) -> list[str]:
    try:
        tables = tomllib.loads(pyproject.read_text(encoding="utf-8"))
        named = tables.get("tool", {}).get("detoracle", {}).get("implementations", [])
        if not isinstance(named, list) or not all(isinstance(module, str) for module in named):
            raise TypeError(f"implementations = {named!r}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            pyproject.name,
            expected="TOML whose [tool.detoracle] implementations, if any, is a list of modules",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return named


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise InputError(
            "implementations", expected=f"module '{module}' to be importable", got=f"{type(error).__name__}: {error}"
        ) from error


def _refuse_doubles(found: Iterable[Implementation]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for one in found:
        first = seen.setdefault((one.operation, one.name), one.target)
        if first != one.target:
            raise InputError(
                "implementations",
                expected=f"one implementation named '{one.name}' of {one.operation}",
                got=f"two, {first} and {one.target}",
            )
