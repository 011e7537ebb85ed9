"""Import a genuine package without the compiled operators that no adapter calls."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any, NoReturn

import torch

from detoracle.reference.errors import InputError

__all__ = ["genuine", "release"]

_UNDECLARED = ("nms", "qnms")  # operators whose Python kernels torchvision registers without looking for the library


def genuine(*names: str) -> Any:
    """Import the first of some modules that the installed release has.

    Parameters
    ----------
    *names : str
        Where releases keep, or kept, the same thing: newest first.

    Returns
    -------
    module

    Raises
    ------
    InputError
        If the release has none of them.

    Examples
    --------
    >>> genuine("no_such_module", "math").sqrt(4.0)
    2.0
    """
    _stand_in_for_compiled_operators()
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, but something that it needs is not
    raise InputError("package", expected=f"a release with {' or '.join(names)}", got="none of them")


def release(package: str) -> tuple[int, ...]:
    """Version of an installed package, as numbers.

    Examples
    --------
    >>> release("torch") >= (2, 6)
    True
    """
    version = importlib.metadata.version(package).partition("+")[0]
    return tuple(int(part) for part in version.split(".") if part.isdigit())


class _Absent(ModuleType):
    """Stands in for a compiled module: whatever is taken from it can be named, not called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"{self.__name__}.{name} is compiled, and not installed")

        return absent


@cache
def _stand_in_for_compiled_operators() -> tuple[Any, ...]:
    """Make mmcv and torchvision importable where their compiled halves are missing or built for another torch.

    Returns what must stay alive for that.
    """
    if importlib.util.find_spec("mmcv") and not importlib.util.find_spec("mmcv._ext"):
        sys.modules["mmcv._ext"] = _Absent("mmcv._ext")
    if not importlib.util.find_spec("torchvision"):
        return ()
    try:
        importlib.import_module("torchvision")
        return ()
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _UNDECLARED:
        library.define(f"{name}() -> ()")  # type: ignore[no-untyped-call]
    importlib.import_module("torchvision")
    return (library,)
