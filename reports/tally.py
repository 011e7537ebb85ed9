"""A report's rows, counted: however many there are, one cell for each operation and implementation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from detoracle.reports.record import KNOWN_FAILURE, Row

__all__ = ["Cell", "Tally", "badness"]

# From good to bad.
_ORDER = ("equal", "ambiguous", "undefined", KNOWN_FAILURE, "different", "mutated-input", "raised", "timeout")


@dataclass
class Cell:
    """What one implementation of one operation did, over all its checks.

    Attributes
    ----------
    id : str
        Of its line of evidence in the page; numbers only, never a name.
    operation, implementation : str
    counts : Counter of str
        Checks by status.
    scenes : set of str
    positives, ambiguous : int
    findings : list of Row
    """

    id: str
    operation: str
    implementation: str
    counts: Counter[str] = field(default_factory=Counter)
    scenes: set[str] = field(default_factory=set)
    positives: int = 0
    ambiguous: int = 0
    findings: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Count one check."""
        self.counts[row.status] += 1
        self.scenes.add(row.scene)
        self.positives += row.positives
        self.ambiguous += row.ambiguous
        if row.wrong:
            self.findings.append(row)

    @property
    def checks(self) -> int:
        """Number of checks."""
        return self.counts.total()

    @property
    def notable(self) -> int:
        """Checks that are findings; without one, those of the worst status unless that is equal."""
        return len(self.findings) or (0 if self.worst == "equal" else self.counts[self.worst])

    @property
    def badness(self) -> int:
        """How bad the worst status is: 0 for equal."""
        return badness(self.worst)

    @property
    def worst(self) -> str:
        """The worst status among the checks."""
        return max(self.counts, key=badness)


class Tally:
    """A report's rows, counted for the page.

    Parameters
    ----------
    rows : iterable of Row

    Examples
    --------
    >>> tally = Tally(
    ...     [Row("yolox.assign", "mine", "one box", "", "equal"), Row("yolox.loss", "mine", "one box", "", "raised")]
    ... )
    >>> tally.systems["yolox"], tally.implementations, tally.cells["yolox.loss", "mine"].worst
    (['yolox.assign', 'yolox.loss'], ['mine'], 'raised')
    >>> tally.sentence
    '2 operations × 1 implementation, 2 checks: 1 equal, 0 ambiguous, 0 undefined, 0 expected to fail, 1 finding'
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.cells: dict[tuple[str, str], Cell] = {}
        self.notes: Counter[tuple[str, str, str, str]] = Counter()
        for row in rows:
            key = row.operation, row.implementation
            if key not in self.cells:
                self.cells[key] = Cell(f"c{len(self.cells)}", *key)
            self.cells[key].add(row)
            if row.note:
                self.notes[(*key, row.status, row.note)] += 1

    @cached_property
    def counts(self) -> Counter[str]:
        """Checks by status."""
        return sum((cell.counts for cell in self.cells.values()), Counter())

    @cached_property
    def statuses(self) -> list[str]:
        """Statuses that occur, from good to bad."""
        return sorted(self.counts, key=badness)

    @cached_property
    def wrong_statuses(self) -> list[str]:
        """Statuses of findings that occur."""
        return sorted({row.status for cell in self.cells.values() for row in cell.findings}, key=badness)

    def statuses_of(self, operation: str) -> list[str]:
        """Statuses that occur among an operation's checks, from good to bad."""
        cells = (self.cells.get((operation, implementation)) for implementation in self.implementations)
        return sorted({status for cell in cells if cell for status in cell.counts}, key=badness)

    @cached_property
    def findings(self) -> int:
        """Checks that went wrong."""
        return sum(len(cell.findings) for cell in self.cells.values())

    @cached_property
    def operations(self) -> list[str]:
        """Operations in the order they were run."""
        return list(dict.fromkeys(operation for operation, _ in self.cells))

    @cached_property
    def implementations(self) -> list[str]:
        """Implementations in the order they were run."""
        return list(dict.fromkeys(implementation for _, implementation in self.cells))

    @cached_property
    def systems(self) -> dict[str, list[str]]:
        """Operations by system: what stands before the dot."""
        grouped: dict[str, list[str]] = defaultdict(list)
        for operation in self.operations:
            grouped[operation.partition(".")[0]].append(operation)
        return dict(grouped)

    @cached_property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        counts = self.counts
        return (
            f"{_count(len(self.operations), 'operation')} × {_count(len(self.implementations), 'implementation')}, "
            f"{_count(counts.total(), 'check')}: {counts['equal']:,} equal, {counts['ambiguous']:,} ambiguous, "
            f"{counts['undefined']:,} undefined, {counts[KNOWN_FAILURE]:,} expected to fail, "
            f"{_count(self.findings, 'finding')}"
        )

    @cached_property
    def ambiguity(self) -> list[tuple[str, int, int]]:
        """Per operation that assigns: its name, positives, and ambiguous anchors."""
        positives, ambiguous = Counter[str](), Counter[str]()
        for cell in self.cells.values():
            positives[cell.operation] += cell.positives
            ambiguous[cell.operation] += cell.ambiguous
        assigning = [name for name in self.operations if positives[name] or ambiguous[name]]
        return [(name, positives[name], ambiguous[name]) for name in assigning]


def badness(status: str) -> int:
    """Rank of a status, from good to bad: 0 for equal.

    Examples
    --------
    >>> badness("different") > badness("ambiguous") > badness("equal")
    True
    """
    return _ORDER.index(status) if status in _ORDER else len(_ORDER)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
