"""Trials: what an implementation must also withstand, beyond being right on one call after the other.

Most wrong code is wrong by value. These calls are for code that is right by luck or by design: that remembers answers,
notices that it is watched, or was only ever run in one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch

from detoracle.properties.bare import perform_bare
from detoracle.properties.checking import Case, Result, cases
from detoracle.properties.comparison import Expectation, Finding, Verdict, expect
from detoracle.properties.laws.law import same_bits
from detoracle.properties.memory import can_protect
from detoracle.properties.outputs import Outcome
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.properties.worker import Manner, Worker
from detoracle.reference.contract import Operation

__all__ = ["TRIALS", "Subject", "trials"]

TRIALS: Mapping[str, str] = {
    "other-numbers": "Other numbers of the same shapes, in the same memory, get their own answer.",
    "keeps-results": "A result stays what it was when the next call is made.",
    "repeatable": "The same call, later and after others, gives the same bits.",
    "no-grad": "Without gradients the answer is as right as with them.",
    "read-only": "Inputs in memory that nothing can write to are no obstacle.",
    "other-dtype": "In float64 and bfloat16 it is right as well, or refuses.",
    "any-process": "In a process that holds nothing of this suite it is right as well.",
}
"""Clause and statement of each trial."""

_SCENES = 4
_MOST_CASES = 8
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Subject:
    """Who is tried.

    Attributes
    ----------
    system : System
    operation : Operation
    target : str
        ``package.module:callable``.
    worker : Worker
        Process that makes the calls.
    time_limit : float
        Seconds one call may take in the process that holds nothing of the suite.
    """

    system: System
    operation: Operation
    target: str
    worker: Worker
    time_limit: float

    def call(self, case: Case, manner: Manner = "plain") -> Outcome:
        """Call it on a case."""
        return self.worker.perform(self.operation, self.target, case.arguments, manner=manner)

    def expect(self, case: Case) -> Expectation:
        """What is right on a case."""
        return expect(self.system, self.operation, case.arguments)


def trials(
    subject: Subject, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Result]:
    """Try an implementation on a few random scenes.

    Parameters
    ----------
    subject : Subject
    seed : int
        Decides the scenes.
    device : str
        Where the tensors are put.
    dtype : torch.dtype
        Of all floating tensors.

    Yields
    ------
    Result
        One of each trial of each case; a case on which the implementation is plainly wrong ends the trials.

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> with Worker(time_limit=60) as worker:
    ...     target = "detoracle.implementations.loop.yolox:iou_yolox"
    ...     subject = Subject(*find_operation("boxes.iou_yolox"), target, worker, time_limit=60)
    ...     statuses = {result.verdict.status for result in trials(subject)}
    >>> statuses
    {'equal'}
    """
    taken = list(islice(_pairs(subject, seed, device, dtype), _MOST_CASES))
    firsts: list[tuple[Case, Expectation, Outcome]] = []
    for case, twin in taken:
        expectation, first = subject.expect(case), subject.call(case)
        firsts.append((case, expectation, first))
        if (verdict := expectation.judge(first)).wrong:
            yield Result(case, verdict, arguments=case.arguments)
            return
        other = subject.expect(twin).judge(subject.call(twin))
        yield _result("other-numbers", subject, twin, other)
        yield _result("keeps-results", subject, case, _same(subject, first, subject.worker.held(), device))
    for case, expectation, first in reversed(firsts):
        yield _result("repeatable", subject, case, _same(subject, first, subject.call(case), device))
        yield _result("no-grad", subject, case, _without_gradients(expectation, subject.call(case, "no-grad"), first))
        if can_protect(device):
            yield _result("read-only", subject, case, expectation.judge(subject.call(case, "read-only")))
    for other_dtype in (d for d in _DTYPES if d != dtype):
        for case, _ in islice(_pairs(subject, seed, device, other_dtype), _MOST_CASES):
            verdict = subject.expect(case).judge(subject.call(case))
            yield _result("other-dtype", subject, case, _refusal(verdict, other_dtype))
    calls = [case.arguments for case, _, _ in firsts]
    outcomes = perform_bare(subject.operation, subject.target, calls, time_limit=subject.time_limit)
    for (case, expectation, first), outcome in zip(firsts, outcomes, strict=True):
        yield _result("any-process", subject, case, _without_gradients(expectation, outcome, first))


def _pairs(subject: Subject, seed: int, device: str, dtype: torch.dtype) -> Iterator[tuple[Case, Case]]:
    """Cases of random scenes, each with one of the same shapes and other numbers."""
    for scene in random_scenes(_SCENES, seed=seed):
        mine, theirs = (
            cases(subject.system, subject.operation, s, device=device, dtype=dtype) for s in (scene, _mirrored(scene))
        )
        # Not as many where the number of cases depends on the numbers; those that there are still pair by place.
        yield from islice(zip(mine, theirs, strict=False), _MOST_CASES // _SCENES)


def _mirrored(scene: Scene) -> Scene:
    """The scene from right to left, its classes in reverse and its predictions drawn anew."""
    width = scene.image_size[1]
    swap = torch.tensor([2, 1, 0, 3])
    sign, shift = torch.tensor([-1.0, 1, -1, 1]), torch.tensor([width, 0.0, width, 0])
    return replace(
        scene,
        name=f"{scene.name} mirrored",
        gt_boxes=tuple((boxes * sign + shift)[:, swap] for boxes in scene.gt_boxes),
        gt_labels=tuple(scene.num_classes - 1 - labels for labels in scene.gt_labels),
        seed=scene.seed + 1,
    )


def _same(subject: Subject, first: Outcome, later: Outcome, device: str) -> Verdict:
    """Judge a later outcome by the bits of the first; on an accelerator, where sums may race, by its choices alone."""
    if first.problem or later.problem:
        agree = first.problem == later.problem
        finding = Finding("", "", f"first {first.problem or 'returned'}, then {later.problem or 'returned'}")
        return Verdict("undefined") if agree else Verdict("different", (finding,))
    if device != "cpu":
        first, later = (
            Outcome({n: t for n, t in o.outputs.items() if not t.is_floating_point()}) for o in (first, later)
        )
    return same_bits(subject.operation, first, later)


def _without_gradients(expectation: Expectation, outcome: Outcome, first: Outcome) -> Verdict:
    """Judge outputs that came without gradients; those of the first call tell which way a tie was broken."""
    judged = expectation.judge(replace(outcome, gradients=first.gradients))
    return _only(judged, lambda finding: "[gradient" not in finding.clause)


def _only(verdict: Verdict, kept: Callable[[Finding], bool]) -> Verdict:
    findings = tuple(finding for finding in verdict.findings if kept(finding))
    return verdict if findings or not verdict.wrong else replace(verdict, status="equal", findings=())


def _refusal(verdict: Verdict, dtype: torch.dtype) -> Verdict:
    """What raises on a dtype is not wrong on it: nobody is misled."""
    if verdict.status != "raised":
        return verdict
    return Verdict("undefined", note=f"refuses {dtype}: {verdict.findings[0].message}")


def _result(trial: str, subject: Subject, case: Case, verdict: Verdict) -> Result:
    name = subject.operation.name
    findings = tuple(
        replace(f, clause=f"{name}[{trial}]", message=f"{f.clause.removeprefix(name)} {f.message}".strip())
        for f in verdict.findings
    )
    return Result(case, replace(verdict, findings=findings), arguments=case.arguments, trial=trial)
