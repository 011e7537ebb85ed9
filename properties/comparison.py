"""Verdicts: is what an implementation returned right, up to what rounding leaves open?

`expect` runs the oracle once for an operation's arguments; the `Expectation` it returns then judges any number of
outcomes. Choices are judged by the explanation's worlds, floats by bounds from running error analysis, gradients by
the error that the plain oracle makes in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.gradients import RightGradient, right_gradients, tensors_of
from detoracle.properties.losses import LossJudge
from detoracle.properties.outputs import Outcome, listed
from detoracle.properties.systems import System
from detoracle.properties.verdicts import Finding, Status, Verdict, compare, compare_gradients
from detoracle.reference.contract import Operation, returns_of, unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.explanation import Explanation
from detoracle.reference.rounding import Bounded, Decision, nothing_by_luck

__all__ = ["Expectation", "Finding", "Status", "Verdict", "expect"]

_MOST_NAMED = 8  # ground truths that a message lists


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
    'expected 1 +- 5.72e-06, got 0'
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
            judge = LossJudge(operation, explanation, system.loss_given[operation.name], arguments, dtype)
            return Expectation(operation, behaviour, judge, explanation)
        return Expectation(operation, behaviour, lambda o: _judge_assignment(operation, explanation, o), explanation)

    def work_out() -> dict[str, Any]:
        return _as_dict(
            operation, explain(**arguments, dtype=dtype) if explain else _bounded_call(operation, arguments, dtype)
        )

    @cache
    def arranged_otherwise() -> dict[str, Any]:
        with nothing_by_luck():
            return work_out()

    outputs, gradients = work_out(), right_gradients(operation, operation.oracle, arguments, dtype)
    return Expectation(
        operation, behaviour, lambda outcome: _judge_values(operation, outputs, arranged_otherwise, gradients, outcome)
    )


def _dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    """Floating dtype of the arguments."""
    return next((tensor.dtype for tensor in tensors_of(arguments) if tensor.is_floating_point()), torch.float32)


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
    operation: Operation,
    expected: Mapping[str, Any],
    arranged_otherwise: Callable[[], Mapping[str, Any]],
    gradients: Mapping[str, RightGradient],
    outcome: Outcome,
) -> Verdict:
    """Judge by what is expected; a number that is exact as published may carry an error if arranged otherwise."""
    findings: list[Finding] = []
    ambiguous = 0
    if any("[" in name for name in expected) and expected.keys() != outcome.outputs.keys():
        message = f"expected {len(expected)} tensors, got {len(outcome.outputs)}"
        findings.append(Finding(f"{operation.name}[contract]", "output", message))
    for name, want in expected.items():
        if name in outcome.outputs:
            found = compare(f"{operation.name}[{name}]", outcome.outputs[name], want)
            if found and isinstance(want, Bounded):
                found = compare(f"{operation.name}[{name}]", outcome.outputs[name], arranged_otherwise()[name])
            findings += found
            ambiguous += int(want.ambiguous.sum()) if isinstance(want, Decision) else 0
    findings += compare_gradients(operation.name, outcome, gradients)
    return Verdict("different" if findings else "equal", tuple(findings), ambiguous=ambiguous)


# --------------------------------------------------------------------------------------------------- assignments
def _judge_assignment(operation: Operation, explanation: Explanation, outcome: Outcome) -> Verdict:
    given, want = outcome.outputs["gt_index"].long(), explanation.gt_index
    if given.shape != want.shape or given.device != want.device:
        return Verdict("different", tuple(compare(f"{operation.name}[outcome]", given, want)))
    findings = []
    wrong = explanation.wrong(given)
    if wrong.any():
        findings.append(_outcome_finding(operation, explanation, given, wrong))
    else:
        for name, implied in {"quality": explanation.quality(given), **explanation.targets(given)}.items():
            if name in outcome.outputs:
                findings += compare(f"{operation.name}[{name}]", outcome.outputs[name], implied)
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
    margin, got = float(explanation.margin[image, anchor]), int(given[image, anchor])
    expected = " or ".join(map(str, sorted(right))) if len(right) <= _MOST_NAMED else f"one of {len(right)}"
    message = f"expected ground truth {expected}, got {got} (margin {margin:.3g})"
    if got in right:
        message += ", which does not go with what other anchors got"
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
