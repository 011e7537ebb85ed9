"""Is a timed output right? The check that the bench makes of every call, at sizes where the judge would need hours.

Assignments are judged image by image, as `check` does it. Losses and values are compared with the plain oracle in
float64 within the suite's gradient bounds (`detoracle.properties.bounds`). Where rounding leaves anchors open, as many
rows of a gradient may differ, and the normaliser may be off by their share of the positives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation, arguments_of, returns_of
from detoracle.reference.errors import InputError
from detoracle.reports.workloads import images_of

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """What is right for one input, and for the same input with its images in another order.

    Attributes
    ----------
    operation : Operation
    images : tuple of Expectation
        Of an assignment, one an image.
    exact, plain : Outcome
        Of a loss or values: by the oracle, in float64 and in the dtype under test.
    ambiguous, positives : int
        Anchors that rounding leaves open, and assigned ones, over all images of a loss.
    """

    operation: Operation
    images: tuple[Expectation, ...]
    exact: Outcome
    plain: Outcome
    ambiguous: int
    positives: int

    @cached_property
    def _per_image(self) -> frozenset[str]:
        """Inputs and outputs whose first axis is the images."""
        oracle = self.operation.oracle
        return frozenset(
            one.name
            for one in (*arguments_of(oracle), *returns_of(oracle))
            if one.tensor is not None and one.tensor[0][:1] == ("B",)
        )

    def problem(self, outcome: Outcome, shift: int) -> str:
        """What is wrong with an outcome of the input rolled by `shift` images; empty if nothing is.

        Parameters
        ----------
        outcome : Outcome
        shift : int

        Returns
        -------
        str
        """
        if outcome.problem:
            return f"{outcome.problem}: {outcome.message}"
        if self.images:
            return next(self._of_images(outcome, shift), "")
        return next(self._of_values(outcome, shift), "")

    def _of_images(self, outcome: Outcome, shift: int) -> Iterator[str]:
        for number, expectation in enumerate(self.images):
            place = (number + shift) % len(self.images)
            outputs = {name: output[place : place + 1] for name, output in outcome.outputs.items()}
            verdict = expectation.judge(Outcome(outputs))
            if verdict.wrong:
                finding = verdict.findings[0]
                yield f"{finding.clause}, image {place}: {finding.message}"

    def _of_values(self, outcome: Outcome, shift: int) -> Iterator[str]:
        for kind in ("outputs", "gradients"):
            given, exact, plain = (getattr(one, kind) for one in (outcome, self.exact, self.plain))
            for name, right in exact.items():
                if right is None or name not in given:
                    continue
                clause = f"{self.operation.name}[{'gradient ' if kind == 'gradients' else ''}{name}]"
                if given[name] is None:
                    yield f"{clause}: expected a gradient, got none"
                    continue
                turned = given[name].roll(-shift, 0) if name.partition("[")[0] in self._per_image else given[name]
                if text := self._difference(turned, right, plain[name]):
                    yield f"{clause}: {text}"

    def _difference(self, given: Tensor, exact: Tensor, plain: Tensor) -> str:
        if given.shape != exact.shape:
            return f"expected shape {tuple(exact.shape)}, got {tuple(given.shape)}"
        if not exact.is_floating_point():
            return "" if torch.equal(given, exact) else f"{int((given != exact).sum())} elements differ"
        open_rows = self.ambiguous if exact.ndim else 0
        if not exact.ndim:
            given, exact, plain = given[None], exact[None], plain[None]
        row = 1 if exact.ndim == 4 else -1
        bound = gradient_bound(exact, plain, row=row) + exact.abs() * (self.ambiguous / max(self.positives, 1))
        wrong = outside(given, exact, bound)
        if int(wrong.any(row).sum()) <= open_rows:
            return ""
        at = tuple(wrong.nonzero()[0].tolist())
        return f"expected {exact[at].item():.9g}, got {given[at].item():.9g} at {at}, {int(wrong.sum())} elements"


def agreement(system: System, operation: Operation, arguments: Mapping[str, Any]) -> Agreement:
    """Work out what is right for a large input.

    Parameters
    ----------
    system : System
    operation : Operation
    arguments : mapping
        Keyword arguments of the oracle.

    Returns
    -------
    Agreement

    Raises
    ------
    InputError
        If the published system raises there.

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> from detoracle.reports.workloads import Workload, rolled, workload_case
    >>> system, operation = find_operation("yolox.loss")
    >>> given = workload_case(system, operation, Workload(2, 3, 84, 4)).arguments
    >>> right = agreement(system, operation, given)
    >>> right.problem(perform(operation, operation.oracle, rolled(operation, given, 1)), 1)
    ''
    >>> right.problem(perform(operation, operation.oracle, {**given, "flavour": "official"}), 0)[:27]
    'yolox.loss[total]: expected'
    """
    nothing = Outcome()
    if operation.kind == "assignment":
        images = tuple(expect(system, operation, image) for image in images_of(operation, arguments))
        return Agreement(operation, images, nothing, nothing, 0, 0)
    ambiguous = positives = 0
    if operation.kind == "loss":
        for image in images_of(operation, arguments):
            explanation = system.explain[operation.name](**image, dtype=_dtype(arguments))
            ambiguous += int(explanation.ambiguous.sum())
            positives += int((explanation.gt_index >= 0).sum())
    exact = perform(operation, operation.oracle, {name: _double(value) for name, value in arguments.items()})
    plain = perform(operation, operation.oracle, arguments)
    if plain.problem:
        raise InputError(
            "the workload",
            expected="one on which the published system has an answer",
            got=f"one on which it {plain.message}",
            where=operation.name,
            fix="Choose another dtype or size.",
        )
    return Agreement(operation, (), exact, plain, ambiguous, positives)


def _dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    flat = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
    return next(v.dtype for v in flat if isinstance(v, Tensor) and v.is_floating_point())


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
