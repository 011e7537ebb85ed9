"""What a law is: how the arguments of a call are changed, and how the changed outcome is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.comparison import Expectation, Finding, Verdict, expect
from detoracle.properties.outputs import Outcome
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation

__all__ = ["FollowUp", "Law", "Question", "same_bits"]

Arguments = Mapping[str, Any]
Back = Callable[[Sequence[Outcome]], Outcome]


@dataclass(frozen=True, eq=False)
class Question:
    """What an implementation was asked, and rightly answered.

    Attributes
    ----------
    system : System
    operation : Operation
    arguments : mapping
    expectation : Expectation
        From `expect`, for these arguments.
    answer : Outcome
    """

    system: System
    operation: Operation
    arguments: Arguments
    expectation: Expectation
    answer: Outcome


@dataclass(frozen=True, eq=False)
class FollowUp:
    """Further calls that a law makes of one case.

    Attributes
    ----------
    calls : tuple of mapping
        Changed arguments, one mapping a call.
    back : callable or None
        Maps the outcomes of all calls to the outcome that the original arguments should have had. Outputs it leaves out
        are not judged, and gradients are those of the first answer. None if the only call has its own expectation.
    """

    calls: tuple[Arguments, ...]
    back: Back | None


@dataclass(frozen=True)
class Law:
    """A statement on an operation and any implementation of it.

    Attributes
    ----------
    id : str
        The clause: ``permute-gts`` is judged as ``yolox.assign[permute-gts]``.
    statement : str
        One sentence.
    concerns : callable
        Does the law say anything about an operation?
    follow_up : callable
        `Question` to `FollowUp`, or None where the law has nothing to say about these arguments.
    bitwise : bool
        The mapped outcome is the first one to the bit, not only one that its expectation admits.
    """

    id: str
    statement: str
    concerns: Callable[[Operation], bool]
    follow_up: Callable[[Question], FollowUp | None]
    bitwise: bool = False

    def judge(self, question: Question, follow_up: FollowUp, call: Callable[[Arguments], Outcome]) -> Verdict:
        """Make the changed calls and judge them.

        Parameters
        ----------
        question : Question
        follow_up : FollowUp
            That the law makes of the question.
        call : callable
            Maps arguments to an `Outcome`.

        Returns
        -------
        Verdict
            Its findings have the law's clause.
        """
        operation, outcomes = question.operation, [call(arguments) for arguments in follow_up.calls]
        failed = next((outcome for outcome in outcomes if outcome.problem), None)
        if follow_up.back is None:
            verdict = expect(question.system, operation, follow_up.calls[0]).judge(outcomes[0])
        elif failed is not None:
            verdict = question.expectation.judge(failed)
        else:
            first, back = question.answer, follow_up.back(outcomes)
            mapped = Outcome(back.outputs, {**first.gradients, **back.gradients})
            verdict = same_bits(operation, first, mapped) if self.bitwise else question.expectation.judge(mapped)
        return self._in_its_clause(operation, verdict)

    def _in_its_clause(self, operation: Operation, verdict: Verdict) -> Verdict:
        clause = f"{operation.name}[{self.id}]"
        findings = tuple(
            replace(finding, clause=clause, message=f"{finding.clause.removeprefix(operation.name)} {finding.message}")
            for finding in verdict.findings
        )
        return replace(verdict, findings=findings)


def same_bits(operation: Operation, first: Outcome, second: Outcome) -> Verdict:
    """Judge a second outcome by the bits of the first one.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> one, other = Outcome({"iou": torch.zeros(1)}), Outcome({"iou": -torch.zeros(1)})
    >>> same_bits(boxes.iou_yolox.operation, one, one).status
    'equal'
    >>> same_bits(boxes.iou_yolox.operation, one, other).findings[0].message
    'the same call gave other bits'
    """
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = [
        (name, value, second.outputs.get(name)) for name, value in first.outputs.items()
    ]
    pairs += [(f"gradient {name}", value, second.gradients.get(name)) for name, value in first.gradients.items()]
    findings = tuple(
        Finding(f"{operation.name}[{name}]", "", "the same call gave other bits")
        for name, one, other in pairs
        if not _same(one, other)
    )
    return Verdict("different" if findings else "equal", findings)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    # A copy: a single element counts as contiguous whatever its stride, but cannot be viewed as bytes.
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
