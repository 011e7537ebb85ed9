"""What an examination was about: for each clause, how often it was judged and how often it failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from detoracle.properties.checking import Result
from detoracle.properties.clauses import Clause, clauses_of
from detoracle.properties.known_failures import KnownFailure
from detoracle.properties.laws.catalogue import laws_of
from detoracle.properties.memory import can_protect
from detoracle.properties.outputs import Outcome
from detoracle.properties.systems import System
from detoracle.properties.trials import TRIALS
from detoracle.properties.worker import Manner, Worker
from detoracle.reference.contract import Operation, returns_of

__all__ = ["ClauseEvidence", "Evidence", "WatchedWorker"]


@dataclass(frozen=True)
class ClauseEvidence:
    """What is known about one clause.

    Attributes
    ----------
    id, statement : str
    verdict : str
        passed, expected to fail, skipped, failed, never judged.
    judged, failures : int
        How often it was judged, and how often it failed.
    reason : str
        Why it was skipped, or is expected to fail.
    """

    id: str
    statement: str
    verdict: str
    judged: int = 0
    failures: int = 0
    reason: str = ""


class WatchedWorker(Worker):
    """A worker that remembers what its last call returned."""

    last = Outcome()

    def perform(
        self, operation: Operation, target: str, arguments: Mapping[str, Any], *, manner: Manner = "plain"
    ) -> Outcome:
        """Make one call, as `Worker.perform`."""
        self.last = super().perform(operation, target, arguments, manner=manner)
        return self.last


@dataclass(eq=False)
class Evidence:
    """Results of an examination, counted by clause.

    Attributes
    ----------
    system : System
    operation : Operation
    device : str
        Where the tensors were put.
    entries : tuple of KnownFailure
        Failures to expect.
    cases : int
        Calls judged for themselves: neither laws nor trials.
    verdicts : Counter of str
        Results by status.
    dtypes : Counter of str
        Results by the dtype of the call's floating tensors.
    refused : Counter of str
        Of these, those on which the callable raised as it may.
    positives, ambiguous : int
        Assigned anchors of all cases, and anchors of more than one right outcome.
    wrong : list of Result

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> {clause.verdict for clause in Evidence(*find_operation("yolox.assign"), "cpu").clauses()}
    {'never judged'}
    """

    system: System
    operation: Operation
    device: str
    entries: tuple[KnownFailure, ...] = ()
    cases: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    positives: int = 0
    ambiguous: int = 0
    wrong: list[Result] = field(default_factory=list)
    _judged: Counter[str] = field(default_factory=Counter)
    _returned: set[str] = field(default_factory=set)

    def add(self, result: Result, outcome: Outcome) -> None:
        """Count one result.

        Parameters
        ----------
        result : Result
        outcome : Outcome
            What the call did that was judged; of a law or a trial it does not matter.
        """
        verdict, dtype = result.verdict, str(result.case.native["gt_boxes"].dtype).removeprefix("torch.")
        is_case = result.law is None and not result.trial
        refuses = result.trial == "other-dtype" and verdict.status == "undefined" and verdict.note.startswith("refuses")
        self.verdicts[verdict.status] += 1
        self.dtypes[dtype] += 1
        self.refused[dtype] += refuses
        if is_case:
            self.cases += 1
            self.positives += verdict.positives
            self.ambiguous += verdict.ambiguous
            self._returned |= {name.partition("[")[0] for name in outcome.outputs}
        if verdict.wrong:
            self.wrong.append(result)
            self._judged.update(_violated(result))
        elif result.law is not None or result.trial:
            judged = verdict.status != "undefined" or refuses
            self._judged[f"{self.operation.name}[{result.law.id if result.law else result.trial}]"] += judged
        elif verdict.status == "equal" or (verdict.status == "ambiguous" and not verdict.note):
            generic = "random" in result.case.scene.tags
            self._judged.update(self._judged_by(outcome, generic))

    def unexpected(self) -> list[Result]:
        """Failures that no entry covers."""
        return [
            result
            for result, failure in zip(self.wrong, self.failures(), strict=True)
            if not any(entry.covers(*failure) for entry in self.entries)
        ]

    def failures(self) -> list[tuple[str, str, str]]:
        """Clause, scene and setting of all that is wrong."""
        return [(result.clause, result.case.scene.name, result.case.setting) for result in self.wrong]

    def clauses(self) -> tuple[ClauseEvidence, ...]:
        """All clauses of the operation, and those of the trials."""
        failures = Counter(clause for result in self.wrong for clause in _violated(result))
        unexpected = {clause for result in self.unexpected() for clause in _violated(result)}
        return tuple(self._about(clause, failures[clause.id], clause.id in unexpected) for clause in self._all())

    def _about(self, clause: Clause, failures: int, unexpected: bool) -> ClauseEvidence:
        judged = self._judged[clause.id]
        if unexpected:
            return ClauseEvidence(clause.id, clause.statement, "failed", judged, failures)
        if failures:
            reasons = sorted({f"{e.reason} ({e.link})" for e in self.entries if e.clause == clause.id})
            reason = "; ".join(reasons) or "comes with a failure that is known"
            return ClauseEvidence(clause.id, clause.statement, "expected to fail", judged, failures, reason)
        if judged:
            return ClauseEvidence(clause.id, clause.statement, "passed", judged)
        if reason := self._not_applicable(clause.id):
            return ClauseEvidence(clause.id, clause.statement, "skipped", reason=reason)
        return ClauseEvidence(clause.id, clause.statement, "never judged")

    def _not_applicable(self, clause: str) -> str:
        if self.cases and clause in self._named(self._optional() - self._returned):
            return "the output is optional, and was never returned"
        if clause in self._named(["read-only"]) and not can_protect(self.device):
            return "memory cannot be made read-only here"
        return ""

    def _all(self) -> list[Clause]:
        trials = (Clause(f"{self.operation.name}[{id_}]", statement) for id_, statement in TRIALS.items())
        return [*clauses_of(self.system, self.operation), *trials]

    def _judged_by(self, outcome: Outcome, generic: bool) -> set[str]:
        """Clauses that a right verdict on a case speaks for."""
        laws, missing = (law.id for law in laws_of(self.operation)), self._optional() - {*outcome.outputs}
        others = self._named([*laws, *missing, *(() if generic else ("ambiguity",))])
        return {clause.id for clause in clauses_of(self.system, self.operation)} - others

    def _optional(self) -> set[str]:
        return {output.name for output in returns_of(self.operation.oracle) if output.optional}

    def _named(self, ids: Iterable[str]) -> set[str]:
        return {f"{self.operation.name}[{id_}]" for id_ in ids}


def _violated(result: Result) -> set[str]:
    """Clauses that a wrong result names; lists have one for all their items."""
    return {re.sub(r"\[\d+\]\]$", "]", finding.clause) for finding in result.verdict.findings}
