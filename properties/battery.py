"""All clauses of an operation, judged on one callable: what the pytest plugin reports, test by test.

The callable is called in this process, so that debuggers, coverage and monkeypatches see it; ``detoracle check`` judges
it from outside, and survives one that hangs or dies.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from detoracle.properties.checking import Result, cases, judge_case, judge_law, smallest_of
from detoracle.properties.clauses import clauses_of
from detoracle.properties.comparison import Finding, expect
from detoracle.properties.laws.catalogue import laws_of
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System, find_operation
from detoracle.reference.contract import Operation, returns_of
from detoracle.reference.errors import DetoracleError

__all__ = ["Battery"]

_STEPS = ("returns", "contract", "inputs-unmodified")  # what must be right before anything else is judged


@dataclass(eq=False)
class Battery:
    """What a callable did, clause by clause.

    Attributes
    ----------
    system : System
    operation : Operation
    implementation : callable
        Takes the operation's arguments by keyword.
    cases : int
        Argument sets that it was called with.
    judged : Counter
        By clause, how often it was judged: a right verdict judges all it can, a wrong one what it names and what comes
        before.
    failures : mapping of str to list of Result
        By clause, everything that violates it.
    returned : set of str
        Outputs that came at least once.
    """

    system: System
    operation: Operation
    implementation: Callable[..., Any]
    cases: int = 0
    judged: Counter[str] = field(default_factory=Counter)
    failures: defaultdict[str, list[Result]] = field(default_factory=lambda: defaultdict(list))
    returned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, operation: str, implementation: Callable[..., Any], scenes: Iterable[Scene]) -> Battery:
        """Judge a callable on every case of some scenes and, beside each right one, on the law that it met least.

        Parameters
        ----------
        operation : str
            Such as ``yolox.assign``.
        implementation : callable
            Takes the operation's arguments by keyword.
        scenes : iterable of Scene

        Returns
        -------
        Battery

        Raises
        ------
        InputError
            If there is no such operation.

        Examples
        --------
        >>> from detoracle.properties.edge_cases import edge_cases
        >>> from detoracle.reference import yolox
        >>> battery = Battery.of("yolox.decode", lambda raw, strides: 2 * yolox.decode(raw, strides), edge_cases()[:2])
        >>> battery.judged["yolox.decode[returns]"], len(battery.failures["yolox.decode[returns]"])
        (2, 0)
        >>> battery.judged["yolox.decode[predictions]"], len(battery.failures["yolox.decode[predictions]"])
        (2, 2)
        """
        battery = cls(*find_operation(operation), implementation)
        for scene in scenes:
            battery._judge(scene)
        return battery

    def unreturned(self, clause: str) -> bool:
        """Is the clause about an output that need not come, and never did?

        Examples
        --------
        >>> from detoracle.properties.edge_cases import edge_cases
        >>> from detoracle.reference import yolox
        >>> def mine(**arguments):
        ...     found = yolox.assign(**arguments)
        ...     return found.gt_index, found.quality
        >>> Battery.of("yolox.assign", mine, edge_cases()[:1]).unreturned("yolox.assign[dynamic_k]")
        True
        """
        return clause in self._optional() and clause not in self._named(self.returned)

    def smallest(self, clause: str, failures: list[Result]) -> Result:
        """The simplest violation of a clause that is found by dropping images and ground truths.

        Parameters
        ----------
        clause : str
        failures : list of Result
            Violations of the clause.

        Returns
        -------
        Result
        """
        first = [failure for failure in failures if _clause_of(failure.verdict.findings[0]) == clause]
        if not first:  # each breaks another clause before, and made simpler might break only that one
            return failures[0]
        return smallest_of(self.system, self.operation, first, self._call)

    def _call(self, arguments: Mapping[str, Any]) -> Outcome:
        return perform(self.operation, self.implementation, arguments)

    def _judge(self, scene: Scene) -> None:
        laws = laws_of(self.operation)
        for case in cases(self.system, self.operation, scene):
            expectation, outcome = expect(self.system, self.operation, case.arguments), self._call(case.arguments)
            result = judge_case(case, expectation, partial(_given, outcome))
            self._enter(result, outcome)
            if result.verdict.wrong:
                continue
            for law in sorted(laws, key=lambda law: self.judged[f"{self.operation.name}[{law.id}]"]):
                found = judge_law(self.system, self.operation, law, case, expectation, outcome, self._call)
                if found is not None:
                    self.judged[f"{self.operation.name}[{law.id}]"] += 1
                    self._fail(found)
                    break

    def _enter(self, result: Result, outcome: Outcome) -> None:
        verdict = result.verdict
        self.cases += 1
        self.returned |= {name.partition("[")[0] for name in outcome.outputs}
        if verdict.wrong:
            violated = self._fail(result)
            self.judged.update({*violated, *takewhile(lambda step: step not in violated, self._named(_STEPS))})
        elif verdict.status == "equal" or (verdict.status == "ambiguous" and not verdict.note):
            missing = self._optional() - set(self._named(name.partition("[")[0] for name in outcome.outputs))
            specific = () if "random" in result.case.scene.tags else self._named(["ambiguity"])
            self.judged.update(self._of_every_case - missing - set(specific))

    def _fail(self, result: Result) -> list[str]:
        violated = list(dict.fromkeys(map(_clause_of, result.verdict.findings)))
        for clause in violated:
            if clause not in self._clauses:
                raise DetoracleError(clause, expected=f"a clause of {self.operation.name}", got="another one")
            self.failures[clause].append(result)
        return violated

    @cached_property
    def _clauses(self) -> frozenset[str]:
        return frozenset(clause.id for clause in clauses_of(self.system, self.operation))

    @cached_property
    def _of_every_case(self) -> frozenset[str]:
        return self._clauses - set(self._named(law.id for law in laws_of(self.operation)))

    def _optional(self) -> set[str]:
        return set(self._named(output.name for output in returns_of(self.operation.oracle) if output.optional))

    def _named(self, ids: Iterable[str]) -> list[str]:
        return [f"{self.operation.name}[{id_}]" for id_ in ids]


def _clause_of(finding: Finding) -> str:
    """The clause, of which lists have one for all their items."""
    return re.sub(r"\[\d+\]\]$", "]", finding.clause)


def _given(outcome: Outcome, _: Mapping[str, Any]) -> Outcome:
    return outcome
