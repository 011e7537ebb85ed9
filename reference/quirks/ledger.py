"""The whole ledger: the ``QUIRKS`` of every module beside this one."""

from __future__ import annotations

import importlib
import pkgutil

from detoracle.reference import quirks
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["ledger"]


def ledger() -> tuple[Quirk, ...]:
    """All quirks, module by module.

    Examples
    --------
    >>> "yolox.no-candidate" in [quirk.id for quirk in ledger()]
    True
    """
    names = sorted(module.name for module in pkgutil.iter_modules(quirks.__path__))
    found = [getattr(importlib.import_module(f"{quirks.__name__}.{name}"), "QUIRKS", ()) for name in names]
    return tuple({quirk.id: quirk for some in found for quirk in some}.values())
