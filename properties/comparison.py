"""Verdicts: is what an implementation returned right, up to what rounding leaves open?

`expect` runs the oracle once for an operation's arguments; the `Expectation` it returns then judges any number of
outcomes. Choices are judged by the explanation's worlds, floats by bounds from running error analysis, gradients by
the error that the plain oracle makes in the same dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from detoracle.properties.bounds import VALUE_FACTOR, outside
from detoracle.properties.gradients import RightGradient, right_gradients
from detoracle.properties.outputs import Outcome, listed
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation, returns_of, unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.explanation import Explanation
from detoracle.reference.rounding import Bounded, Decision

__all__ = ["Expectation", "Finding", "Status", "Verdict", "expect"]

Status = Literal["equal", "ambiguous", "different", "raised", "mutated-input", "timeout", "undefined"]

_MOST_ALTERNATIVES = 64  # right assignments that a loss is compared with before it is left unjudged ...
_MOST_OF_LARGE = 12  # ... and of inputs with more numbers than this
_LARGE = 1_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes
    ----------
    clause : str
        Such as ``yolox.assign[outcome]``.
    where : str
        Position of the first wrong element.
    message : str
        What was expected, what came.
    count : int
        Number of wrong elements.
    """

    clause: str
    where: str
    message: str
    count: int = 1


@dataclass(frozen=True)
class Verdict:
    """Judgement of one call.

    Attributes
    ----------
    status : str
        ``equal``; ``ambiguous`` (right, but not the float64 oracle's choice); ``different``; ``raised``;
        ``mutated-input``; ``timeout``; ``undefined`` (the oracle itself raises a named behaviour here, and nothing is
        asked).
    findings : tuple of Finding
        What is wrong; empty unless the status is a finding.
    note : str
        What an ``undefined`` or ``ambiguous`` is about.
    positives, ambiguous : int
        Assigned anchors, and how many of all anchors had more than one right outcome.
    """

    status: Status
    findings: tuple[Finding, ...] = ()
    note: str = ""
    positives: int = 0
    ambiguous: int = 0

    @property
    def wrong(self) -> bool:
        """Is this a finding?"""
        return self.status not in ("equal", "ambiguous", "undefined")


@dataclass(frozen=True, eq=False)
class Expectation:
    """The right answer for one set of arguments.

    Attributes
    ----------
    operation : Operation
    behaviour : UpstreamRaises or None
        What the oracle raised.
    judge_outputs : callable
        Maps outputs and gradients to a verdict.
    explanation : Explanation or None
        Of an assignment or a loss: what could rightly be assigned, with margins.
    """

    operation: Operation
    behaviour: UpstreamRaises | None
    judge_outputs: Callable[[Outcome], Verdict] | None
    explanation: Explanation | None = None

    def judge(self, outcome: Outcome) -> Verdict:
        """Judge one outcome.

        Parameters
        ----------
        outcome : Outcome

        Returns
        -------
        Verdict
        """
        name = self.operation.name
        if outcome.problem in ("timeout", "mutated-input"):
            clause = "inputs-unmodified" if outcome.problem == "mutated-input" else "returns"
            return Verdict(outcome.problem, (Finding(f"{name}[{clause}]", "", outcome.message),))  # type: ignore[arg-type]
        if self.behaviour is not None and (self.judge_outputs is None or outcome.problem == "raised"):
            did = f"raised {outcome.message}" if outcome.problem == "raised" else "returned"
            return Verdict("undefined", note=f"the oracle raises {self.behaviour.behaviour}; the implementation {did}")
        if outcome.problem == "contract":
            return Verdict("different", (Finding(f"{name}[contract]", "output", outcome.message),))
        if outcome.problem or self.judge_outputs is None:
            return Verdict("raised", (Finding(f"{name}[returns]", "", outcome.message),))
        return self.judge_outputs(outcome)


def expect(system: System, operation: Operation, arguments: Mapping[str, Any]) -> Expectation:
    """Work out what is right.

    Parameters
    ----------
    system : System
    operation : Operation
    arguments : mapping
        Keyword arguments of the oracle.

    Returns
    -------
    Expectation

    Examples
    --------
    >>> from detoracle.properties.outputs import perform
    >>> from detoracle.properties.systems import find_operation
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> expectation = expect(*find_operation("boxes.iou_yolox"), pair)
    >>> expectation.judge(perform(expectation.operation, boxes.iou_yolox, pair)).status
    'equal'
    >>> expectation.judge(perform(expectation.operation, lambda **_: torch.zeros(1, 1), pair)).findings[0].message
    'expected 1 +- 0, got 0'
    """
    try:
        return _expectation(system, operation, arguments, None)
    except UpstreamRaises as behaviour:
        instead = system.safe(behaviour, dict(arguments))
        if instead is None:
            return Expectation(operation, behaviour, None)
        return _expectation(system, operation, instead, behaviour)


def _expectation(
    system: System, operation: Operation, arguments: Mapping[str, Any], behaviour: UpstreamRaises | None
) -> Expectation:
    dtype = _dtype(arguments)
    explain = system.explain.get(operation.name)
    if operation.kind != "values":
        assert explain is not None, f"{operation.name} is no plain value, and has no explanation"
        explanation: Explanation = explain(**arguments, dtype=dtype)
        if operation.kind == "loss":
            judge = _LossJudge(operation, explanation, system.loss_given[operation.name], arguments, dtype)
            return Expectation(operation, behaviour, judge, explanation)
        return Expectation(operation, behaviour, lambda o: _judge_assignment(operation, explanation, o), explanation)
    expected = explain(**arguments, dtype=dtype) if explain else _bounded_call(operation, arguments, dtype)
    outputs = _as_dict(operation, expected)
    gradients = right_gradients(operation, operation.oracle, arguments, dtype)
    return Expectation(operation, behaviour, lambda outcome: _judge_values(operation, outputs, gradients, outcome))


def _dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    """Floating dtype of the arguments."""
    for value in arguments.values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def _bounded_call(operation: Operation, arguments: Mapping[str, Any], dtype: torch.dtype) -> Any:
    def bounded(value: Any) -> Any:
        if isinstance(value, list):
            return [bounded(v) for v in value]
        return Bounded.exact(value, dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    private = unchecked(operation.oracle)
    return private(**{name: bounded(value) for name, value in arguments.items()})


def _as_dict(operation: Operation, outputs: Any) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if (items := listed(operation, outputs)) is not None:
        return items
    names = [output.name for output in returns_of(operation.oracle)]
    return dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))


# ------------------------------------------------------------------------------------------------------- values
def _judge_values(
    operation: Operation, expected: Mapping[str, Any], gradients: Mapping[str, RightGradient], outcome: Outcome
) -> Verdict:
    findings: list[Finding] = []
    ambiguous = 0
    if any("[" in name for name in expected) and expected.keys() != outcome.outputs.keys():
        message = f"expected {len(expected)} tensors, got {len(outcome.outputs)}"
        findings.append(Finding(f"{operation.name}[contract]", "output", message))
    for name, want in expected.items():
        if name in outcome.outputs:
            findings += _compare(f"{operation.name}[{name}]", outcome.outputs[name], want)
            ambiguous += int(want.ambiguous.sum()) if isinstance(want, Decision) else 0
    findings += _compare_gradients(operation, outcome, gradients)
    return Verdict("different" if findings else "equal", tuple(findings), ambiguous=ambiguous)


def _compare(clause: str, given: Tensor, want: Any) -> list[Finding]:
    """Compare one output with a `Bounded`, a `Decision` or an exact tensor."""
    exact = want.value if isinstance(want, Bounded | Decision) else want
    if given.shape != exact.shape or given.device != exact.device:
        expected, got = (f"shape {tuple(t.shape)} on {t.device}" for t in (exact, given))
        return [Finding(clause, "", f"expected {expected}, got {got}")]
    if isinstance(want, Bounded):
        wrong = outside(given, exact, VALUE_FACTOR * want.error)
    elif isinstance(want, Decision):
        wrong = (given != exact) & ~want.ambiguous
    else:
        wrong = given.double() != exact.double()
    if not wrong.any():
        return []
    position = tuple(wrong.nonzero()[0].tolist())
    bound = f" +- {float((VALUE_FACTOR * want.error)[position]):.3g}" if isinstance(want, Bounded) else ""
    message = f"expected {exact[position].item():.9g}{bound}, got {given[position].item():.9g}"
    return [Finding(clause, f"at {position}" if position else "", message, int(wrong.sum()))]


def _compare_gradients(operation: Operation, outcome: Outcome, expected: Mapping[str, RightGradient]) -> list[Finding]:
    findings = []
    for name, right in expected.items():
        clause, given = f"{operation.name}[gradient {name}]", outcome.gradients.get(name)
        if given is None:
            if right.exact.nan_to_num().any():
                findings.append(Finding(clause, "", "expected a gradient, got none"))
            continue
        if given.shape != right.exact.shape:
            findings.append(Finding(clause, "", f"expected shape {tuple(right.exact.shape)}, got {tuple(given.shape)}"))
            continue
        wrong = right.wrong(given)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            expectation = f"{right.exact[at].item():.9g} +- {right.bound[at].item():.3g}"
            message = f"expected {expectation}, got {given[at].item():.9g}"
            findings.append(Finding(clause, f"at {at}", message, int(wrong.sum())))
    return findings


# --------------------------------------------------------------------------------------------------- assignments
def _judge_assignment(operation: Operation, explanation: Explanation, outcome: Outcome) -> Verdict:
    given, want = outcome.outputs["gt_index"].long(), explanation.gt_index
    if given.shape != want.shape or given.device != want.device:
        return Verdict("different", tuple(_compare(f"{operation.name}[outcome]", given, want)))
    findings = []
    wrong = explanation.wrong(given)
    if wrong.any():
        findings.append(_outcome_finding(operation, explanation, given, wrong))
    else:
        for name, implied in {"quality": explanation.quality(given), **explanation.targets(given)}.items():
            if name in outcome.outputs:
                findings += _compare(f"{operation.name}[{name}]", outcome.outputs[name], implied)
    if "dynamic_k" in outcome.outputs:
        findings += _k_finding(operation, explanation, outcome.outputs["dynamic_k"])
    chosen = "ambiguous" if bool((given != want).any()) else "equal"
    return Verdict(
        "different" if findings else chosen,  # type: ignore[arg-type]
        tuple(findings),
        positives=int((want >= 0).sum()),
        ambiguous=int((explanation.ambiguous & ((want >= 0) | (given >= 0))).sum()),
    )


def _outcome_finding(operation: Operation, explanation: Explanation, given: Tensor, wrong: Tensor) -> Finding:
    image, anchor = wrong.nonzero()[0].tolist()
    right = {int(w.gt_index[anchor]) for w in explanation.worlds[image]}
    right |= set().union(*(w.choices.get(anchor, frozenset()) for w in explanation.worlds[image]))
    margin = float(explanation.margin[image, anchor])
    expected = " or ".join(map(str, sorted(right)))
    message = f"expected ground truth {expected}, got {int(given[image, anchor])} (margin {margin:.3g})"
    return Finding(f"{operation.name}[outcome]", f"image {image}, anchor {anchor}", message, int(wrong.sum()))


def _k_finding(operation: Operation, explanation: Explanation, given: Tensor) -> list[Finding]:
    clause, want = f"{operation.name}[dynamic_k]", [worlds[0].k_range for worlds in explanation.worlds]
    counted = next((k_range[0] for k_range in want if k_range is not None), given[:1].flatten())
    if given.shape != (len(want), len(counted)) or given.device != counted.device:
        expected, got = (
            f"shape {(len(want), len(counted))} on {counted.device}",
            f"{tuple(given.shape)} on {given.device}",
        )
        return [Finding(clause, "", f"expected {expected}, got {got}")]
    wrong = explanation.wrong_k(given)
    if not wrong.any():
        return []
    image, gt = wrong.nonzero()[0].tolist()
    ranges = [world.k_range for world in explanation.worlds[image] if world.k_range is not None]
    low, high = min(int(r[0][gt]) for r in ranges), max(int(r[1][gt]) for r in ranges)
    expected = str(low) if low == high else f"{low} to {high}"
    message = f"expected {expected}, got {int(given[image, gt])}"
    return [Finding(clause, f"image {image}, ground truth {gt}", message, int(wrong.sum()))]


# -------------------------------------------------------------------------------------------------------- losses
def _numbers(arguments: Mapping[str, Any]) -> int:
    """Elements of all tensors among the arguments."""
    values = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
    return sum(value.numel() for value in values if isinstance(value, Tensor))


class _LossJudge:
    """Judge a loss by the right assignments: the float64 one first, then the others that rounding leaves open."""

    def __init__(
        self,
        operation: Operation,
        explanation: Explanation,
        loss_given: Callable[..., Any],
        arguments: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self._operation, self._explanation, self._dtype = operation, explanation, dtype
        self._loss_given, self._arguments = loss_given, arguments
        self._most = _MOST_OF_LARGE if _numbers(arguments) > _LARGE else _MOST_ALTERNATIVES
        self._remaining = explanation.alternatives(self._most)
        self._right: list[_RightLoss] = []
        self._nth(0)  # a behaviour that the oracle raises is known before anything is judged

    def __call__(self, outcome: Outcome) -> Verdict:
        facts: dict[str, Any] = {
            "positives": int((self._explanation.gt_index >= 0).sum()),
            "ambiguous": int(self._explanation.ambiguous.sum()),
        }
        first: tuple[Finding, ...] = ()
        for number in itertools.count():
            right = self._nth(number)
            if right is None:
                break
            findings = self._findings(right, outcome)
            if not findings:
                return Verdict("equal" if number == 0 else "ambiguous", **facts)
            first = first or findings
        if number >= self._most:
            return Verdict("ambiguous", note="more assignments are right than can be compared; not judged", **facts)
        return Verdict("different", first, **facts)

    def _nth(self, number: int) -> _RightLoss | None:
        """The n-th right assignment's loss, worked out when first asked for."""
        while len(self._right) <= number:
            gt_index = next(self._remaining, None)
            if gt_index is None:
                return None
            parts = self._loss_given(gt_index, **self._arguments, dtype=self._dtype)
            plain = partial(self._loss_given, gt_index, dtype=None)
            gradients = partial(right_gradients, self._operation, plain, self._arguments, self._dtype)
            self._right.append(_RightLoss(parts, gradients))
        return self._right[number]

    def _findings(self, right: _RightLoss, outcome: Outcome) -> tuple[Finding, ...]:
        found: list[Finding] = []
        for name, given in outcome.outputs.items():
            if name in right.parts:
                found += _compare(f"{self._operation.name}[{name}]", given, right.parts[name])
        return tuple(found) or tuple(_compare_gradients(self._operation, outcome, right.gradients))


@dataclass(eq=False)
class _RightLoss:
    """Values of one right assignment, and its gradients, which cost more and are worked out when the values agree."""

    parts: dict[str, Any]
    work_out: Callable[[], dict[str, RightGradient]]

    @cached_property
    def gradients(self) -> dict[str, RightGradient]:
        return self.work_out()
