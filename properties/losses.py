"""Losses are judged by the right assignments: the float64 one first, then the others that rounding leaves open.

There may be too many of those to try. So the one that the implementation has taken is read off its gradients; only
where that fails are others tried, up to a limit. Where a loss samples at random, every row hangs on all outcomes and
may show none: beyond that limit it is not judged rather than called wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.gradients import RightGradient, in_float64, right_gradients, tensors_of
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.trained import trained_assignment
from detoracle.properties.verdicts import Finding, Verdict, compare, compare_gradients
from detoracle.reference.contract import Operation
from detoracle.reference.explain.explanation import Explanation

__all__ = ["LossJudge"]

_MOST_ALTERNATIVES = 64  # right assignments that are tried ...
_MOST_OF_LARGE = 12  # ... and for inputs with more numbers than this
_LARGE = 1_000_000
_MOST_KEPT = 2**24  # numbers in the gradients of all trials that are kept
_MOST_OPEN = 6  # ambiguous anchors whose right outcomes are all among the alternatives


class LossJudge:
    """Judge the outcomes of a loss on one set of arguments.

    Parameters
    ----------
    operation : Operation
    explanation : Explanation
        Of the assignment inside the loss.
    loss_given : callable
        The loss of a given assignment, bounded or plain.
    arguments : mapping
    dtype : torch.dtype
        Dtype under test.

    Raises
    ------
    UpstreamRaises
        Where the oracle raises one after the assignment.

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> system, operation = find_operation("yolox.loss")
    >>> raw, one = [torch.zeros(1, 6, 2, 2)], torch.ones(1, 1, dtype=torch.bool)
    >>> given = {"raw": raw, "strides": [8], "gt_boxes": torch.tensor([[[4.0, 4, 8, 8]]]), "gt_valid": one}
    >>> given["gt_labels"] = torch.zeros(1, 1, dtype=torch.int64)
    >>> explanation = system.explain["yolox.loss"](**given)
    >>> judge = LossJudge(operation, explanation, system.loss_given["yolox.loss"], given, torch.float32)
    >>> judge(perform(operation, operation.oracle, given)).status
    'equal'
    """

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
        self._right: dict[bytes, _RightLoss] = {}
        self._numbers = sum(value.numel() for value in tensors_of(arguments))
        self._trials: dict[bytes, Outcome] = {}
        self._right_loss(explanation.gt_index)  # a behaviour that the oracle raises is known before anything is judged

    def __call__(self, outcome: Outcome) -> Verdict:
        """Judge one outcome."""
        explanation = self._explanation
        facts: dict[str, Any] = {
            "positives": int((explanation.gt_index >= 0).sum()),
            "ambiguous": int(explanation.ambiguous.sum()),
        }
        findings = self._findings(explanation.gt_index, outcome)
        if not findings:
            return Verdict("equal", **facts)
        for number, gt_index in enumerate(self._others(outcome)):
            instead = self._findings(gt_index, outcome)
            if not instead:
                return Verdict("ambiguous", **facts)
            findings = instead if number == 0 else findings
        if self._arguments.get("sampler") == "random" and self._some_untried(facts["ambiguous"]):
            note = f"not judged: rounding leaves {facts['ambiguous']} anchors open, and what is sampled hangs on all"
            return Verdict("undefined", note=note, **facts)
        return Verdict("different", findings, **facts)

    def _others(self, outcome: Outcome) -> Iterator[Tensor]:
        """Right assignments but the float64 one: first the one that the gradients show, if they do."""
        if not bool(self._explanation.ambiguous.any()):
            return
        yield from trained_assignment(self._explanation, outcome, self._trial)
        yield from self._explanation.alternatives(self._most_alternatives)

    @property
    def _most_alternatives(self) -> int:
        return _MOST_OF_LARGE if self._numbers > _LARGE else _MOST_ALTERNATIVES

    def _some_untried(self, ambiguous: int) -> bool:
        """May there be right assignments beside all those that are tried?"""
        most = self._most_alternatives
        return ambiguous > _MOST_OPEN or len(list(self._explanation.alternatives(most + 1))) > most

    def _trial(self, gt_index: Tensor) -> Outcome:
        """What a right loss makes of an assignment, in float64; kept, for the next outcome asks for much the same."""
        key = _key(gt_index)
        if key in self._trials:
            return self._trials[key]
        call = partial(self._loss_given, gt_index, dtype=None)
        tried = perform(self._operation, call, in_float64(self._arguments))
        if len(self._trials) * self._numbers < _MOST_KEPT:
            self._trials[key] = tried
        return tried

    def _findings(self, gt_index: Tensor, outcome: Outcome) -> tuple[Finding, ...]:
        right, name = self._right_loss(gt_index), self._operation.name
        found: list[Finding] = []
        for part, given in outcome.outputs.items():
            if part in right.parts:
                found += compare(f"{name}[{part}]", given, right.parts[part])
        return tuple(found) or tuple(compare_gradients(name, outcome, right.gradients))

    def _right_loss(self, gt_index: Tensor) -> _RightLoss:
        """The loss of a right assignment, worked out when first asked for."""
        key = _key(gt_index)
        if key not in self._right:
            parts = self._loss_given(gt_index, **self._arguments, dtype=self._dtype)
            plain = partial(self._loss_given, gt_index, dtype=None)
            gradients = partial(right_gradients, self._operation, plain, self._arguments, self._dtype)
            self._right[key] = _RightLoss(parts, gradients)
        return self._right[key]


def _key(gt_index: Tensor) -> bytes:
    return gt_index.cpu().numpy().tobytes()


@dataclass(eq=False)
class _RightLoss:
    """Values of one right assignment, and its gradients, which cost more and are worked out when the values agree."""

    parts: dict[str, Any]
    work_out: Callable[[], dict[str, RightGradient]]

    @cached_property
    def gradients(self) -> dict[str, RightGradient]:
        return self.work_out()
