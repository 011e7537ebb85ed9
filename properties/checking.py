"""Check implementations on scenes: every argument set of an operation, one verdict each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.comparison import Expectation, Finding, Verdict, expect
from detoracle.properties.outputs import Outcome
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation
from detoracle.reference.explain.explanation import Explanation

__all__ = ["MOST_AMBIGUOUS", "Case", "Result", "cases", "judge_case", "smallest_failure"]

MOST_AMBIGUOUS = 0.01
"""Largest share of ambiguous positives that a generic scene may have before tolerance could hide a defect."""

_GENERIC = frozenset({"random", "realistic"})  # crowds aside: tiny boxes inside the same few cells tie by nature
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
    """Verdict on one case."""

    case: Case
    verdict: Verdict


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
    verdict = expectation.judge(call(case.arguments))
    if expectation.explanation is not None and case.scene.tags & _GENERIC and "crowd" not in case.scene.tags:
        share, positives = _ambiguous_share(expectation.explanation)
        if share > MOST_AMBIGUOUS and positives >= 1 / MOST_AMBIGUOUS:
            message = f"{share:.1%} of {positives} positives are ambiguous in a generic scene"
            finding = Finding(f"{expectation.operation.name}[ambiguity]", "", message)
            verdict = replace(verdict, status="different", findings=(*verdict.findings, finding))
    return Result(case, verdict)


def _ambiguous_share(explanation: Explanation) -> tuple[float, int]:
    """Share of positives that rounding leaves open, and their number; what ties by design is no matter of rounding."""
    positive = explanation.gt_index >= 0
    open_ = explanation.ambiguous & positive & (explanation.margin > _EXACT_TIE)
    positives = int(positive.sum())
    return int(open_.sum()) / max(positives, 1), positives


def smallest_failure(
    system: System, operation: Operation, failure: Result, call: Call, *, attempts: int = 200
) -> Result:
    """Drop images and ground truths from a failing scene while it still fails in the same clause.

    Parameters
    ----------
    system : System
    operation : Operation
    failure : Result
        A wrong verdict.
    call : callable
        Maps arguments to an `Outcome`.
    attempts : int
        Scenes to try at most.

    Returns
    -------
    Result
        The smallest failure found; `failure` itself if nothing smaller fails.
    """
    clause = failure.verdict.findings[0].clause
    best = failure
    while attempts > 0:
        for native in _simpler(best.case.native, system.shared):
            attempts -= 1
            found = _failing(system, operation, best.case, native, call, clause)
            if found is not None:
                best = found
                break
            if attempts <= 0:
                return best
        else:
            return best
    return best


def _failing(
    system: System, operation: Operation, case: Case, native: Mapping[str, Any], call: Call, clause: str
) -> Result | None:
    for simpler in _cases(system, operation, case.scene, native):
        if simpler.setting == case.setting:
            verdict = expect(system, operation, simpler.arguments).judge(call(simpler.arguments))
            if verdict.wrong and verdict.findings[0].clause == clause:
                return Result(simpler, verdict)
    return None


def _simpler(native: Mapping[str, Any], shared: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Inputs with one image alone, then with half of an image's ground truths, then with one fewer."""
    valid: Tensor = native["gt_valid"]
    images, most = valid.shape
    for image in range(images) if images > 1 else ():
        yield _take(native, shared, image)
    for image in range(images):
        present = valid[image].nonzero().flatten().tolist()
        number = len(present)
        halves = (present[: number // 2], present[number // 2 :]) if number > 3 else ()
        fewer = [[g for g in present if g != dropped] for dropped in present] if number > 1 else []
        for kept in (*halves, *fewer):
            yield _keep(native, image, kept)
    if most > int(valid.sum(1).max()):
        yield _keep(native, 0, valid[0].nonzero().flatten().tolist())


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
