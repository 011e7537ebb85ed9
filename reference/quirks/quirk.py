"""What a quirk is: something surprising that the published code does, that its oracle keeps, and that has a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Quirk"]


@dataclass(frozen=True, eq=False)
class Quirk:
    """One entry of the quirk ledger.

    Attributes
    ----------
    id : str
        Such as ``yolox.conflict-over-all-gts``.
    operation : str
        Operation that shows it.
    statement : str
        The quirk in one sentence.
    upstream : str
        What the genuine code does.
    safe : str
        What a safe implementation may do instead.
    defects : tuple of str
        Identifiers of published defect reports.
    scene : callable
        Builds the smallest keyword arguments of the operation that show it.
    check : callable
        Runs the oracle on them; True if the quirk shows.
    """

    id: str
    operation: str
    statement: str
    upstream: str
    safe: str
    defects: tuple[str, ...]
    scene: Callable[[], dict[str, Any]]
    check: Callable[[], bool]

    @property
    def system(self) -> str:
        """System whose quirk it is."""
        return self.id.partition(".")[0]
