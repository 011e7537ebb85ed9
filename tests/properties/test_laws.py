"""Laws: what is right obeys them, what departs from them is shown, and wrong ones that look right are found out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.checking import Case, cases, check_scene, judge_case, judge_law, smallest_of
from detoracle.properties.comparison import Expectation, Verdict, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.laws.catalogue import LAWS, follow_up_of, laws_of
from detoracle.properties.laws.departures import DEPARTURES, Departure
from detoracle.properties.laws.law import Question
from detoracle.properties.laws.table import laws_page
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System, every_operation, find_operation
from detoracle.reference import yolox, yolox_loss
from detoracle.reference.contract import Operation

SCENES = {scene.name: scene for scene in edge_cases()}
BY_ID = {law.id: law for law in LAWS}
OPERATIONS = every_operation()
NAMES = [operation.name for _, operation in OPERATIONS]


def questions(system: System, operation: Operation, scene: Scene) -> Iterator[tuple[Case, Question]]:
    """Cases that the oracle answers."""
    for case in cases(system, operation, scene):
        expectation = expect(system, operation, case.arguments)
        answer = perform(operation, operation.oracle, case.arguments)
        if expectation.behaviour is None and not answer.problem:
            yield case, Question(system, operation, case.arguments, expectation, answer)


# ------------------------------------------------------------------------------------------------ what is right
@pytest.mark.parametrize(("system", "operation"), OPERATIONS, ids=NAMES)
def test_the_oracle_obeys_the_laws(system: System, operation: Operation) -> None:
    scenes = [SCENES["ragged-full"], SCENES["identical-other-class"]]
    call = partial(perform, operation, operation.oracle)
    spoken = set()
    for scene in scenes:
        for _, question in questions(system, operation, scene):
            for law in laws_of(operation):
                follow_up = follow_up_of(law, question)
                if follow_up is not None:
                    spoken.add(law.id)
                    assert law.judge(question, follow_up, call).findings == ()
    assert spoken == {law.id for law in laws_of(operation)}


@pytest.mark.parametrize("departure", DEPARTURES, ids=lambda d: f"{d.laws[0]} of {d.operations[0]}")
def test_a_departure_is_needed(departure: Departure) -> None:
    """A law that an operation is said to break is broken on the scene that is named."""
    for name in departure.operations:
        system, operation = find_operation(name)
        call = partial(perform, operation, operation.oracle)
        asked = [question for _, question in questions(system, operation, SCENES[departure.scene])]
        asked = [question for question in asked if departure.where is None or departure.where(question)]
        for law in (BY_ID[id_] for id_ in departure.laws if BY_ID[id_].concerns(operation)):
            follow_ups = [(question, law.follow_up(question)) for question in asked]
            verdicts = [law.judge(q, follow_up, call) for q, follow_up in follow_ups if follow_up is not None]
            assert any(_broken(departure, verdict) for verdict in verdicts), f"{name} obeys {law.id}"


def _broken(departure: Departure, verdict: Verdict) -> bool:
    messages = [finding.message for finding in verdict.findings]
    return any(not departure.outputs or any(f"[{o}]" in m for o in departure.outputs) for m in messages)


def test_departures_name_laws_operations_and_scenes_that_there_are() -> None:
    for departure in DEPARTURES:
        assert set(departure.laws) <= BY_ID.keys()
        assert set(departure.operations) <= set(NAMES)
        assert departure.scene in SCENES


def test_the_page_on_laws_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "laws.md"
    assert page.read_text("utf-8") == laws_page(), "run python -m detoracle.properties.laws > docs/laws.md"


# ------------------------------------------------------------------------------------ wrong where the base is blind
class TrustsPadding:
    """Counts every row with a positive area, padding or not: right as long as padding is zeros."""

    def __call__(self, gt_boxes: Tensor, gt_valid: Tensor, **arguments: Any) -> Any:
        there = (gt_boxes[..., 2:] > 0).all(-1)
        return yolox.assign(gt_boxes=gt_boxes, gt_valid=gt_valid | there, **arguments)


class AddsPadding:
    """Multiplies boxes by a mask of zeros and ones, which NaN survives."""

    def __call__(self, gt_boxes: Tensor, gt_valid: Tensor, **arguments: Any) -> Any:
        found = yolox.assign(gt_boxes=gt_boxes, gt_valid=gt_valid, **arguments)
        poison = (gt_boxes * gt_valid[..., None]).sum((1, 2))[:, None] * 0
        return found.gt_index, found.quality + poison


class KnowsByShape:
    """Keeps the class targets of the first call for as long as the shape stays, if the sums agree."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __call__(self, predictions: Tensor, gt_labels: Tensor, **arguments: Any) -> Any:
        key = (predictions.shape, float(gt_labels.sum()), float(predictions.double().sum().round(decimals=3)))
        if key not in self.known:
            self.known[key] = yolox.assign(predictions=predictions, gt_labels=gt_labels, **arguments)
        return self.known[key]


class ReadsStorage:
    """Takes the numbers as they lie in memory."""

    def __call__(self, predictions: Tensor, **arguments: Any) -> Any:
        stored = torch.empty(0).set_(predictions.untyped_storage(), 0, (predictions.numel(),), (1,))
        return yolox.assign(predictions=stored.reshape(predictions.shape), **arguments)


class Counts:
    """Another last bit at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, **arguments: Any) -> Any:
        self.calls += 1
        found = yolox.assign(**arguments)
        return found.gt_index, found.quality * (1 + self.calls % 2 * torch.finfo(torch.float32).eps)


class InSingle:
    """Rounds whatever it is given to float32."""

    def __call__(self, predictions: Tensor, **arguments: Any) -> Any:
        found = yolox.assign(predictions=predictions, **arguments)
        return found.gt_index, found.quality.float().to(found.quality.dtype)


BLIND: dict[str, tuple[Callable[[], Callable[..., Any]], str]] = {
    "trusts padding": (TrustsPadding, "padding"),
    "adds padding": (AddsPadding, "padding"),
    "known by shape": (KnowsByShape, "permute-gts"),
    "reads storage": (ReadsStorage, "any-layout"),
    "not deterministic": (Counts, "deterministic"),
    "in single precision": (InSingle, "float64"),
}


@cache
def judged(name: str) -> list[tuple[Case, Expectation]]:
    system, operation = find_operation(name)
    plain = [SCENES["ragged-full"], SCENES["ragged"], *random_scenes(4, seed=3)]
    return [(case, expect(system, operation, case.arguments)) for s in plain for case in cases(system, operation, s)]


@pytest.mark.parametrize("name", BLIND)
def test_a_law_finds_what_the_cases_miss_and_shrinks_it(name: str) -> None:
    make, law = BLIND[name]
    system, operation = find_operation("yolox.assign")
    found = []
    for case, expectation in judged("yolox.assign"):
        call = partial(perform, operation, make())
        assert not judge_case(case, expectation, call).verdict.wrong
        first = call(case.arguments)
        result = judge_law(system, operation, BY_ID[law], case, expectation, first, call)
        found += [result] if result is not None and result.verdict.wrong else []
    assert found
    assert found[0].clause == f"yolox.assign[{law}]"
    smallest = smallest_of(system, operation, found[:1], partial(perform, operation, make()))
    assert smallest.law is BY_ID[law]
    assert len(smallest.case.native["gt_valid"]) == 1
    assert smallest.case.native["gt_valid"].sum() <= 3
    assert len(smallest.case.native["strides"]) == 1


def test_a_loss_of_images_apart_is_found_out() -> None:
    """Each image divided by its own positives, and the mean taken: right for images with as many."""

    def apart(raw: list[Tensor], gt_valid: Tensor, **arguments: Any) -> dict[str, Tensor]:
        images = range(len(gt_valid))
        alone = [yolox_loss.loss(raw=raw, gt_valid=gt_valid & _only(gt_valid, image), **arguments) for image in images]
        return {name: torch.stack([parts[name] for parts in alone]).mean(0) for name in alone[0]}

    system, operation = find_operation("yolox.loss")
    results = list(check_scene(system, operation, SCENES["ragged-full"], partial(perform, operation, apart), number=0))
    assert {result.clause for result in results} == {"yolox.loss[total]"}


def _only(gt_valid: Tensor, image: int) -> Tensor:
    return (torch.arange(len(gt_valid)) == image)[:, None]


def test_anchors_out_of_the_image_claim_nothing_that_ground_truths_could_share() -> None:
    """Here the anchor that each overlaps most lies in the padding, so that both claim the same one further in."""
    system, operation = find_operation("anchor_head.loss")
    scene = next(itertools.islice(random_scenes(94, seed=0), 93, None))
    law = BY_ID["permute-gts"]
    [question] = [question for case, question in questions(system, operation, scene) if case.setting == "giou"]
    assert follow_up_of(law, question) is None
    broken = law.follow_up(question)
    assert broken is not None
    assert law.judge(question, broken, partial(perform, operation, operation.oracle)).findings
