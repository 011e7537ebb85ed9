"""The assignment that a loss has trained is found among more than could be tried, and a wrong loss is still wrong."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties import losses
from detoracle.properties.checking import cases
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.gradients import in_float64
from detoracle.properties.losses import LossJudge
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import find_operation
from detoracle.properties.trained import trained_assignment
from detoracle.reference.explain.explanation import Count, Explanation, World

SCENES = {scene.name: scene for scene in edge_cases()}
EITHER = frozenset([0, 1])


def tie(anchors: int, *counts: Count) -> Explanation:
    """Every anchor but the last may be either ground truth."""
    world = World(torch.zeros(anchors).long(), torch.zeros(anchors), dict.fromkeys(range(anchors - 1), EITHER), counts)
    return Explanation(((world,),), lambda gt_index: gt_index)  # type: ignore[arg-type,return-value]


def first(explanation: Explanation, given: Tensor, loss: Any) -> list[int] | None:
    found = next(trained_assignment(explanation, loss(given), loss), None)
    return None if found is None else found[0].tolist()


def test_every_row_tells_on_its_own_whatever_the_loss_is_divided_by() -> None:
    def loss(gt_index: Tensor) -> Outcome:
        rows = (gt_index + 1).double()
        return Outcome(gradients={"raw": (rows / rows.sum())[..., None]})

    given = torch.tensor([[1, 0] * 40])
    assert first(tie(80), given, loss) == given[0].tolist()


def test_outcomes_of_the_same_gradient_are_told_by_the_value() -> None:
    def loss(gt_index: Tensor) -> Outcome:
        weights = torch.linspace(1, 2, gt_index.numel()).double().sqrt()
        return Outcome({"total": (weights * gt_index).sum()}, {"raw": torch.ones(*gt_index.shape, 1).double()})

    given = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 0]])
    assert first(tie(8), given, loss) == given[0].tolist()


def test_what_joint_constraints_rule_out_is_not_found() -> None:
    def loss(gt_index: Tensor) -> Outcome:
        return Outcome(gradients={"raw": gt_index[..., None].double()})

    explanation = tie(4, Count(1, torch.arange(3), 1, 1, otherwise=0))
    assert first(explanation, torch.tensor([[0, 0, 1, 0]]), loss) == [0, 0, 1, 0]
    found = first(explanation, torch.tensor([[1, 1, 1, 0]]), loss)
    assert found is None or sum(found) == 1


def test_without_a_gradient_nothing_is_found() -> None:
    loss = lambda gt_index: Outcome(gradients={"raw": None})  # noqa: E731  a loss of one line
    assert first(tie(2), torch.tensor([[0, 1]]), loss) is None


@pytest.mark.parametrize(
    ("operation", "scene", "setting"),
    [
        ("ssd.loss", "crowd-150", "threshold 0.5, 3:1"),
        ("anchor_head.ssd_loss", "crowd-150", "3:1"),
        ("anchor_head.ssd_loss", "crowd-520", "1:1"),  # ground truths overwrite each other's claims
    ],
)
def test_the_loss_of_a_crowd_is_judged(operation: str, scene: str, setting: str) -> None:
    system, loss = find_operation(operation)
    [case] = [case for case in cases(system, loss, SCENES[scene]) if case.setting == setting]
    expectation = expect(system, loss, case.arguments)
    assert expectation.explanation is not None
    outcome = perform(loss, loss.oracle, case.arguments)
    assert expectation.judge(outcome).status in ("equal", "ambiguous")
    for name, part in outcome.outputs.items():
        wrong = Outcome({**outcome.outputs, name: part * 1.01}, outcome.gradients)
        assert expectation.judge(wrong).status == "different"
    found = expectation.explanation.gt_index.clone()
    [image, anchor] = (found >= 0).nonzero()[0].tolist()
    found[image, anchor] = -1
    if expectation.explanation.wrong(found).any():
        missing = partial(system.loss_given[operation], found, dtype=None)
        assert expectation.judge(perform(loss, missing, in_float64(case.arguments))).wrong


def test_what_cannot_be_told_is_not_called_wrong() -> None:
    """RPN samples positives by their number in a row, so that every gradient hangs on 16 anchors that are open here."""
    system, operation = find_operation("anchor_head.loss")
    [case] = [case for case in cases(system, operation, SCENES["crowd-150"]) if case.setting == "rpn"]
    expectation = expect(system, operation, case.arguments)
    verdict = expectation.judge(perform(operation, operation.oracle, case.arguments))
    assert (verdict.status, verdict.note.partition(":")[0]) == ("undefined", "not judged")


def backwards(*, loc: Tensor, conf: Tensor, priors: Tensor, **rest: Any) -> Any:
    """The published loss of the anchors in reverse: of negatives alike, it takes the last."""
    return find_operation("ssd.loss")[1].oracle(loc=loc.flip(1), conf=conf.flip(1), priors=priors.flip(0), **rest)


@pytest.mark.parametrize("setting", ["threshold 0.5, 3:1", "threshold 0.35, 1:1, other variances", "logits far apart"])
def test_where_all_negatives_tie_the_last_are_as_right_as_the_first(setting: str) -> None:
    system, operation = find_operation("ssd.loss")
    [case] = [case for case in cases(system, operation, SCENES["equal-one"]) if case.setting == setting]
    outcome = perform(operation, backwards, case.arguments)
    assert expect(system, operation, case.arguments).judge(outcome).status == "ambiguous"


def test_what_was_tried_for_one_outcome_is_not_worked_out_again_for_the_next() -> None:
    system, operation = find_operation("ssd.loss")
    case = next(cases(system, operation, SCENES["equal-one"]))
    tried = []

    def loss_given(gt_index: Tensor, **given: Any) -> Any:
        tried.append(gt_index)
        return system.loss_given["ssd.loss"](gt_index, **given)

    explanation = system.explain["ssd.loss"](**case.arguments)
    judge = LossJudge(operation, explanation, loss_given, case.arguments, torch.float32)
    outcome = perform(operation, backwards, case.arguments)
    assert judge(outcome).status == "ambiguous"
    before = len(tried)
    assert (judge(outcome).status, len(tried)) == ("ambiguous", before)


def test_what_is_mined_though_it_weighs_nothing_costs_nothing() -> None:
    """With few negatives the published loss mines anchors between the thresholds too, which weigh 0."""
    system, operation = find_operation("anchor_head.ssd_loss")
    [case] = [c for c in cases(system, operation, SCENES["empty-one"]) if c.setting == "thresholds alone"]
    outcome = perform(operation, operation.oracle, case.arguments)
    assert expect(system, operation, case.arguments).judge(outcome).status == "equal"


def of_random_scene(operation: str, seed: int, number: int, setting: str) -> tuple[Expectation, Outcome]:
    """What is right, and what the oracle returns."""
    system, loss = find_operation(operation)
    scene = list(random_scenes(number + 1, seed=seed))[number]
    [case] = [case for case in cases(system, loss, scene) if case.setting == setting]
    return expect(system, loss, case.arguments), perform(loss, loss.oracle, case.arguments)


@pytest.mark.parametrize(
    ("operation", "seed", "number", "setting"),
    [
        ("ssd.loss", 10, 11, "all negatives"),  # rows told what is right, one change at a time led away from it
        ("anchor_head.loss", 13, 3, "other softmax"),  # claims of tied anchors lead to the same assignments many times
    ],
)
def test_right_losses_once_called_wrong(operation: str, seed: int, number: int, setting: str) -> None:
    expectation, outcome = of_random_scene(operation, seed, number, setting)
    assert expectation.judge(outcome).status == "ambiguous"


@pytest.mark.parametrize(("tried", "status"), [(64, "different"), (29, "undefined")])
def test_a_sampling_loss_is_wrong_only_where_all_thirty_right_ones_were_tried(
    tried: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expectation, outcome = of_random_scene("anchor_head.loss", 13, 3, "other softmax")
    monkeypatch.setattr(losses, "_MOST_ALTERNATIVES", tried)
    wrong = {name: part * 1.01 for name, part in outcome.outputs.items()}
    assert expectation.judge(Outcome(wrong, outcome.gradients)).status == status
