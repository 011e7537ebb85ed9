"""Check implementations on scenes: every argument set of an operation, one verdict each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.comparison import Expectation, Finding, Verdict, expect
from detoracle.properties.laws.catalogue import follow_up_of, laws_of
from detoracle.properties.laws.law import Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation
from detoracle.reference.explain.explanation import Explanation

__all__ = ["MOST_AMBIGUOUS", "Case", "Result", "cases", "check_scene", "judge_case", "judge_law", "smallest_of"]

MOST_AMBIGUOUS = 0.01
"""Largest share of ambiguous positives that a generic scene may have before tolerance could hide a defect."""

_GENERIC = frozenset({"random", "realistic"})  # crowds aside: tiny boxes inside the same few cells tie by nature
_FEWEST_POSITIVES = 300  # one near-tie leaves two anchors open: chance pairs in a small scene hide nothing
_ATTEMPTS = 200  # scenes that are tried at most to make a failing one smaller
_MOST_SIMPLIFIED = 4  # failing scenes that are made smaller ...
_FEW = 3  # ... until one has no more ground truths than this
_MOST_FOR_THREES = 8  # ground truths of which all threes are tried: one fewer at a time may end at four
_EXACT_TIE = 1 / 16  # margins below this are ties, but for the rounding of the inputs: SSD's priors of equal area

Call = Callable[[Mapping[str, Any]], Outcome]


@dataclass(frozen=True, eq=False)
class Case:
    """One call to make: an operation's arguments, and the scene and native input they come from."""

    scene: Scene
    native: Mapping[str, Any]
    setting: str
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Scene and setting."""
        return f"{self.scene.name} ({self.setting})" if self.setting else self.scene.name


@dataclass(frozen=True, eq=False)
class Result:
    """Verdict on one case, or on a law of it.

    Attributes
    ----------
    case : Case
    verdict : Verdict
    law : Law or None
        The law that was judged beside the case; None for the case itself.
    arguments : mapping
        Of the call that was judged: the case's own, or those that the law made of them.
    trial : str
        Id of the trial (`detoracle.properties.trials`) that it was; empty if it was none.
    """

    case: Case
    verdict: Verdict
    law: Law | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trial: str = ""

    @property
    def clause(self) -> str:
        """Clause of the first finding; of a wrong verdict."""
        return self.verdict.findings[0].clause


def cases(
    system: System, operation: Operation, scene: Scene, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Case]:
    """All argument sets that a scene gives an operation.

    Parameters
    ----------
    system : System
    operation : Operation
    scene : Scene
    device : str
        Where the tensors are put.
    dtype : torch.dtype
        Of all floating tensors.

    Yields
    ------
    Case

    Examples
    --------
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> from detoracle.properties.systems import find_operation
    >>> [case.setting for case in cases(*find_operation("yolox.assign"), edge_cases()[0])]
    ['tutorial', 'official']
    """
    native = {name: _placed(value, device, dtype) for name, value in system.native(scene).items()}
    yield from _cases(system, operation, scene, native)


def _cases(system: System, operation: Operation, scene: Scene, native: Mapping[str, Any]) -> Iterator[Case]:
    for setting, arguments in system.arguments(operation.name, dict(native)):
        yield Case(scene, native, setting, arguments)


def _placed(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_placed(v, device, dtype) for v in value]
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return value


def check_scene(
    system: System,
    operation: Operation,
    scene: Scene,
    call: Call,
    *,
    number: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Result]:
    """Judge an implementation on all cases of a scene and, beside each, on one law in rotation.

    Parameters
    ----------
    system : System
    operation : Operation
    scene : Scene
    call : callable
        Maps arguments to an `Outcome`.
    number : int
        Of the scene: where the rotation of laws begins.
    device : str
        Where the tensors are put.
    dtype : torch.dtype
        Of all floating tensors.

    Yields
    ------
    Result
        Of a case; then, if that was right, of the first law from the place in rotation that has something to say.

    Examples
    --------
    >>> from functools import partial
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> from detoracle.properties.outputs import perform
    >>> from detoracle.properties.systems import find_operation
    >>> system, operation = find_operation("yolox.assign")
    >>> call = partial(perform, operation, operation.oracle)
    >>> [result.verdict.status for result in check_scene(system, operation, edge_cases()[4], call, number=0)]
    ['equal', 'equal', 'equal', 'equal']
    """
    laws = laws_of(operation)
    for place, case in enumerate(cases(system, operation, scene, device=device, dtype=dtype), start=number):
        expectation = expect(system, operation, case.arguments)
        first = call(case.arguments)
        result = _judged(case, expectation, first)
        yield result
        if not result.verdict.wrong:
            turns = (laws[(place + turn) % len(laws)] for turn in range(len(laws)))
            found = (judge_law(system, operation, law, case, expectation, first, call) for law in turns)
            yield from itertools.islice((judged for judged in found if judged is not None), 1)


def judge_case(case: Case, expectation: Expectation, call: Call) -> Result:
    """Call an implementation on a case and judge what it did.

    Parameters
    ----------
    case : Case
    expectation : Expectation
        From `expect`, for the same arguments.
    call : callable
        Maps the arguments to an `Outcome`.

    Returns
    -------
    Result
    """
    return _judged(case, expectation, call(case.arguments))


def _judged(case: Case, expectation: Expectation, outcome: Outcome) -> Result:
    verdict = expectation.judge(outcome)
    # Regions to ignore are the ground truths moved by whole pixels here: no generic input, and their shares tie.
    made_up = case.arguments.get("ignore_boxes") is not None
    judged = case.scene.tags & _GENERIC and "crowd" not in case.scene.tags and not made_up
    if judged and expectation.explanation is not None and case.native["gt_boxes"].dtype == torch.float32:
        ambiguous, positives = _ambiguous_positives(expectation.explanation)
        if positives >= _FEWEST_POSITIVES and ambiguous > MOST_AMBIGUOUS * positives:
            message = f"{ambiguous} of {positives} positives are ambiguous in a generic scene"
            finding = Finding(f"{expectation.operation.name}[ambiguity]", "", message)
            verdict = replace(verdict, status="different", findings=(*verdict.findings, finding))
    return Result(case, verdict, arguments=case.arguments)


def _ambiguous_positives(explanation: Explanation) -> tuple[int, int]:
    """Positives that rounding leaves open, and all; what ties by design is no matter of rounding."""
    positive = explanation.gt_index >= 0
    open_ = explanation.ambiguous & positive & (explanation.margin > _EXACT_TIE)
    return int(open_.sum()), int(positive.sum())


def judge_law(
    system: System, operation: Operation, law: Law, case: Case, expectation: Expectation, first: Outcome, call: Call
) -> Result | None:
    """Judge one law of a case.

    Parameters
    ----------
    system : System
    operation : Operation
    law : Law
    case : Case
    expectation : Expectation
        From `expect`, for the case's arguments.
    first : Outcome
        What the implementation rightly did on the case.
    call : callable
        Maps arguments to an `Outcome`.

    Returns
    -------
    Result or None
        None where the law has nothing to say about the case.
    """
    if expectation.behaviour is not None or first.problem:
        return None
    question = Question(system, operation, case.arguments, expectation, first)
    follow_up = follow_up_of(law, question)
    if follow_up is None:
        return None
    return Result(case, law.judge(question, follow_up, call), law, follow_up.calls[0])


def smallest_of(system: System, operation: Operation, failures: Sequence[Result], call: Call) -> Result:
    """Drop images, ground truths and levels from failing scenes while they still fail in the same clause.

    Parameters
    ----------
    system : System
    operation : Operation
    failures : sequence of Result
        Wrong verdicts on cases or on laws, of one clause. Those of the fewest ground truths are tried, one after the
        other until one is left with three at most.
    call : callable
        Maps arguments to an `Outcome`.

    Returns
    -------
    Result
        The smallest failure found.
    """
    found = []
    for failure in sorted(failures, key=_ground_truths)[:_MOST_SIMPLIFIED]:
        found.append(_smallest(system, operation, failure, call))
        if _ground_truths(found[-1]) <= _FEW:
            break
    return min(found, key=_ground_truths)


def _ground_truths(failure: Result) -> int:
    return int(failure.case.native["gt_valid"].sum())


def _smallest(system: System, operation: Operation, failure: Result, call: Call) -> Result:
    best, attempts = failure, _ATTEMPTS
    while attempts > 0:
        for native in _simpler(best.case.native, system.shared):
            attempts -= 1
            found = _failing(system, operation, best, native, call)
            if found is not None:
                best = found
                break
            if attempts <= 0:
                return best
        else:
            return best
    return best


def _failing(
    system: System, operation: Operation, failure: Result, native: Mapping[str, Any], call: Call
) -> Result | None:
    """The same failure on simpler input, if it fails there."""
    for simpler in _cases(system, operation, failure.case.scene, native):
        if simpler.setting == failure.case.setting:
            expectation, first = expect(system, operation, simpler.arguments), call(simpler.arguments)
            verdict = expectation.judge(first)
            found: Result | None = Result(simpler, verdict, arguments=simpler.arguments)
            if failure.law is not None and not verdict.wrong:
                found = judge_law(system, operation, failure.law, simpler, expectation, first, call)
            if found is not None and found.verdict.wrong and found.clause == failure.clause:
                return found
    return None


def _simpler(native: Mapping[str, Any], shared: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Inputs with one image alone, then half of an image's ground truths, three, one fewer; then with one level."""
    valid: Tensor = native["gt_valid"]
    images, most = valid.shape
    for image in range(images) if images > 1 else ():
        yield _take(native, shared, image)
    for image in range(images):
        present = valid[image].nonzero().flatten().tolist()
        number = len(present)
        halves = (present[: number // 2], present[number // 2 :]) if number > 3 else ()
        threes = map(list, itertools.combinations(present, 3)) if 3 < number <= _MOST_FOR_THREES else ()
        fewer = [[g for g in present if g != dropped] for dropped in present] if number > 1 else []
        for kept in (*halves, *threes, *fewer):
            yield _keep(native, image, kept)
    if most > int(valid.sum(1).max()):
        yield _keep(native, 0, valid[0].nonzero().flatten().tolist())
    for level in range(len(native.get("strides", ()))) if len(native.get("strides", ())) > 1 else ():
        yield _on_level(native, level)


def _on_level(native: Mapping[str, Any], level: int) -> dict[str, Any]:
    """Keep the maps of one level, and its anchors where they are listed."""
    levels = len(native["strides"])
    maps = {name: value for name, value in native.items() if isinstance(value, list) and len(value) == levels}
    kept: dict[str, Any] = {**native, **{name: [value[level]] for name, value in maps.items()}}
    if "anchors" in native:
        lengths = [boxes.shape[1] // 4 * boxes.shape[2] * boxes.shape[3] for boxes in native["bbox_preds"]]
        kept["anchors"] = native["anchors"].split(lengths)[level]
    return kept


def _take(native: Mapping[str, Any], shared: frozenset[str], image: int) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        return value[image : image + 1].clone() if isinstance(value, Tensor) else value

    return {name: value if name in shared else one(value) for name, value in native.items()}


def _keep(native: Mapping[str, Any], image: int, kept: list[int]) -> dict[str, Any]:
    """Keep some ground truths of one image, and no more padding than is needed."""
    rows = [mask.nonzero().flatten() for mask in native["gt_valid"]]
    rows[image] = torch.tensor(kept, dtype=torch.int64, device=rows[image].device)
    most = max(len(row) for row in rows)
    smaller = dict(native)
    for name in ("gt_boxes", "gt_labels", "gt_valid"):
        full: Tensor = native[name]
        packed = full.new_zeros(len(rows), most, *full.shape[2:])
        for target, source, row in zip(packed, full, rows, strict=True):
            target[: len(row)] = source[row]
        smaller[name] = packed
    return smaller
