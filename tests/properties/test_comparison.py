"""Verdicts: every kind of outcome gets the right one, with a message that says where and how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties import bounds, comparison
from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.comparison import Expectation, Verdict, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import find_operation, system_of
from detoracle.properties.verdicts import compare
from detoracle.properties.yolox import native
from detoracle.reference import boxes, yolox, yolox_cost, yolox_loss
from detoracle.reference.rounding import Bounded

SYSTEM = system_of("yolox")
OPERATIONS = {operation.name: operation for operation in SYSTEM.operations}
SCENES = {scene.name: scene for scene in edge_cases()}


def arguments(operation: str, scene: str, setting: str = "tutorial") -> dict[str, Any]:
    return dict(SYSTEM.arguments(operation, native(SCENES[scene])))[setting]


def judged(operation: str, call: Callable[..., Any], scene: str = "overlapping", setting: str = "tutorial") -> Verdict:
    given = arguments(operation, scene, setting)
    return expect(SYSTEM, OPERATIONS[operation], given).judge(perform(OPERATIONS[operation], call, given))


def changed_assign(change: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        found = yolox.assign(**given)
        return change(found.gt_index, found.quality, found.extra["dynamic_k"])

    return call


def assign_verdict(change: Callable[[Tensor, Tensor, Tensor], Any], scene: str = "overlapping") -> Verdict:
    return judged("yolox.assign", changed_assign(change), scene)


# --------------------------------------------------------------------------------------------------- assignments
def test_the_oracle_is_equal() -> None:
    verdict = assign_verdict(lambda gt, quality, k: (gt, quality, k))
    assert (verdict.status, verdict.findings, verdict.wrong) == ("equal", (), False)
    assert verdict.positives > 0
    assert assign_verdict(lambda gt, quality, k: (gt, quality)).status == "equal"


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda gt, quality, k: (torch.full_like(gt, -1), quality), "outcome"),
        (lambda gt, quality, k: (gt.clamp(min=0), quality), "outcome"),
        (lambda gt, quality, k: (gt.flip(1), quality), "outcome"),
        (lambda gt, quality, k: (gt + 99 * (gt >= 0), quality), "outcome"),
        (lambda gt, quality, k: (gt - (gt < 0).long(), quality), "outcome"),
        (lambda gt, quality, k: (gt[:, :-1], quality), "outcome"),
        (lambda gt, quality, k: (gt, quality * 1.0001), "quality"),
        (lambda gt, quality, k: (gt, quality * 0), "quality"),
        (lambda gt, quality, k: (gt, quality.flip(1)), "quality"),
        (lambda gt, quality, k: (gt, quality + 1e-7), "quality"),
        (lambda gt, quality, k: (gt, quality[:, :-1]), "quality"),
        (lambda gt, quality, k: (gt, quality * torch.nan), "quality"),
        (lambda gt, quality, k: (gt, quality, k + 1), "dynamic_k"),
        (lambda gt, quality, k: (gt, quality, k[:, :1]), "dynamic_k"),
        (lambda gt, quality, k: (gt, quality, k.repeat(2, 1)), "dynamic_k"),
    ],
)
def test_a_changed_assignment_is_different(change: Callable[..., Any], clause: str) -> None:
    verdict = assign_verdict(change)
    assert verdict.status == "different"
    assert [finding.clause for finding in verdict.findings] == [f"yolox.assign[{clause}]"]
    assert verdict.wrong


def test_a_finding_says_where_and_what() -> None:
    def one(gt: Tensor, quality: Tensor, k: Tensor) -> Any:
        anchor = int((gt[0] == 1).nonzero()[0])
        gt[0, anchor] = 2
        return gt, quality

    gt = yolox.assign(**arguments("yolox.assign", "overlapping")).gt_index
    anchor = int((gt[0] == 1).nonzero()[0])
    [finding] = assign_verdict(one).findings
    assert (finding.where, finding.count) == (f"image 0, anchor {anchor}", 1)
    assert finding.message.startswith("expected ground truth 1, got 2 (margin ")


def tied(*taken: int) -> Verdict:
    """One ground truth, one claim, two anchors that cost the same; which take it."""
    cost, iou = torch.tensor([[[2.0, 1.0, 1.0]]]), torch.full((1, 1, 3), 0.25)
    given = {"cost": cost, "iou": iou, "candidate": torch.ones(1, 3).bool(), "gt_valid": torch.ones(1, 1).bool()}
    expectation = expect(SYSTEM, OPERATIONS["yolox.dynamic_k_matching"], given)
    gt_index = torch.full((1, 3), -1).index_fill(1, torch.tensor(taken), 0)
    return expectation.judge(Outcome({"gt_index": gt_index}))


def test_either_side_of_a_tie_is_right_and_no_third() -> None:
    assert [tied(order).status for order in range(3)] == ["different", "equal", "ambiguous"]
    assert tied(2).ambiguous == 2


def test_what_is_right_alone_but_not_together_is_told_as_such() -> None:
    [finding] = tied(1, 2).findings
    assert finding.message.startswith("expected ground truth -1 or 0, got 0 ")
    assert finding.message.endswith("which does not go with what other anchors got")


def test_what_came_is_told_in_as_many_digits_as_the_bound_asks_for() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    [fine] = compare("x", third + 2.0**-40, Bounded.exact(third, torch.float64))
    [rough] = compare("x", torch.tensor([0.5]), Bounded.exact(third.float(), torch.float32))
    assert repr(1 / 3) in fine.message
    assert fine.message.endswith(f"got {1 / 3 + 2.0**-40!r}")
    assert rough.message.endswith("got 0.5")


# ------------------------------------------------------------------------------------------------------ problems
@pytest.mark.parametrize(
    ("outcome", "status", "clause"),
    [
        (Outcome(problem="timeout", message="m"), "timeout", "returns"),
        (Outcome(problem="mutated-input", message="m"), "mutated-input", "inputs-unmodified"),
        (Outcome(problem="raised", message="m"), "raised", "returns"),
        (Outcome(problem="contract", message="m"), "different", "contract"),
    ],
)
def test_a_problem_is_a_finding(outcome: Outcome, status: str, clause: str) -> None:
    expectation = expect(SYSTEM, OPERATIONS["yolox.assign"], arguments("yolox.assign", "single"))
    verdict = expectation.judge(outcome)
    assert (verdict.status, verdict.findings[0].clause, verdict.findings[0].message) == (
        status,
        f"yolox.assign[{clause}]",
        "m",
    )


def test_where_the_oracle_raises_nothing_is_asked() -> None:
    expectation = expect(SYSTEM, OPERATIONS["yolox.assign"], arguments("yolox.assign", "label-num-classes"))
    assert isinstance(expectation, Expectation)
    assert expectation.behaviour is not None
    for outcome in (Outcome(problem="raised", message="m"), Outcome({"gt_index": torch.zeros(1, 1)})):
        verdict = expectation.judge(outcome)
        assert (verdict.status, verdict.wrong) == ("undefined", False)
        assert "yolox.label-out-of-range" in verdict.note
    for problem in ("timeout", "mutated-input"):
        assert expectation.judge(Outcome(problem=problem)).wrong


def test_without_candidates_one_may_raise_or_train_background_but_not_invent() -> None:
    given = arguments("yolox.assign", "outside-far")
    expectation = expect(SYSTEM, OPERATIONS["yolox.assign"], given)
    shape = given["predictions"].shape[:2]
    background = {"gt_index": torch.full(shape, -1), "quality": torch.zeros(shape)}
    assert expectation.judge(Outcome(problem="raised", message="m")).status == "undefined"
    assert expectation.judge(Outcome(background)).status == "equal"
    assert expectation.judge(Outcome({**background, "gt_index": torch.zeros(shape).long()})).status == "different"


# -------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros_like,
        torch.ones_like,
        lambda x: x.flip(0),
        lambda x: x * 1.00001,
        lambda x: x + 1e-3,
        lambda x: x.roll(1, 1),
        lambda x: x * torch.nan,
        lambda x: x.T,
        lambda x: x[:1],
        lambda x: x.mean().expand_as(x),
    ],
)
def test_no_cheap_answer_passes(wrong: Callable[[Tensor], Tensor]) -> None:
    verdict = judged(
        "boxes.iou_yolox", lambda **given: wrong(boxes.iou_yolox(**given)), "overlapping", "image 0, cxcywh"
    )
    assert verdict.status == "different"


def test_zero_by_zero_is_nan_and_not_zero() -> None:
    pair = {"boxes_a": torch.zeros(1, 4), "boxes_b": torch.zeros(1, 4), "form": "xyxy"}
    expectation = expect(SYSTEM, OPERATIONS["boxes.iou_yolox"], pair)
    found = [expectation.judge(Outcome({"iou": torch.tensor([[value]])})).status for value in (torch.nan, 0.0, 1.0)]
    assert found == ["equal", "different", "different"]


def test_masks_are_compared_element_by_element() -> None:
    def flipped(**given: Any) -> tuple[Tensor, Tensor]:
        candidate, geometry = yolox_cost.candidates(**given)
        geometry[0, 1, 5] ^= True
        return candidate, geometry

    [finding] = judged("yolox.candidates", flipped).findings
    assert (finding.clause, finding.where, finding.count) == ("yolox.candidates[geometry]", "at (0, 1, 5)", 1)


# -------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("part", ["total", "box", "objectness", "classification"])
def test_each_part_of_a_loss_is_judged(part: str) -> None:
    def off(**given: Any) -> dict[str, Tensor]:
        parts = yolox_loss.loss(**given)
        return {**parts, part: parts[part] + (parts[part] * 1e-4).detach()}

    verdict = judged("yolox.loss", off)
    assert [finding.clause for finding in verdict.findings] == [f"yolox.loss[{part}]"]


def test_a_loss_of_a_tied_assignment_is_ambiguous() -> None:
    given = arguments("yolox.loss", "equal-one")
    expectation = expect(SYSTEM, OPERATIONS["yolox.loss"], given)
    assert expectation.explanation is not None
    found = set()
    for gt_index in expectation.explanation.alternatives(4):
        parts = SYSTEM.loss_given["yolox.loss"](gt_index, **given, dtype=None)
        outcome = perform(
            OPERATIONS["yolox.loss"],
            lambda gt_index=gt_index, **g: SYSTEM.loss_given["yolox.loss"](gt_index, **g, dtype=None),
            given,
        )
        assert outcome.outputs["total"] == parts["total"]
        found.add(expectation.judge(outcome).status)
        more = {name: value * 1.01 for name, value in outcome.outputs.items()}
        assert expectation.judge(replace(outcome, outputs=more)).wrong
    assert found <= {"equal", "ambiguous"}


# -------------------------------------------------------------------------------------------------------- bounds
def test_outside_knows_infinities_and_nan() -> None:
    exact = torch.tensor([1.0, torch.inf, torch.nan, 1.0, 1.0, torch.inf]).double()
    bound = torch.tensor([0.5, 0.0, 0.0, torch.inf, 0.5, 0.0]).double()
    given = torch.tensor([1.5, torch.inf, torch.nan, 7.0, torch.nan, -torch.inf])
    assert outside(given, exact, bound).tolist() == [False, False, False, False, True, True]


def test_a_gradient_bound_follows_the_row() -> None:
    exact = torch.tensor([[1.0, 1000.0], [1.0, 1.0]]).double()
    bound = gradient_bound(exact, exact.float())
    assert bound.shape == (2, 1)
    assert bound[0] > bound[1]
    assert gradient_bound(exact, exact.float() * 1.001)[1] > bound[1] * 10


# ------------------------------------------------------------------------------------------------ arrangements
def by_centres(*, boxes_a: Tensor, boxes_b: Tensor, off: float = 0.0, **options: Any) -> Tensor:
    """DIoU by the distance of the centres, each rounded before they are subtracted."""
    low, high = torch.minimum(boxes_a[:, :2], boxes_b[:, :2]), torch.maximum(boxes_a[:, 2:], boxes_b[:, 2:])
    diagonal = (high - low).square().sum(1, keepdim=True) + 1e-7
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (boxes_a, boxes_b)]
    distance = (centres[1] - centres[0]).square().sum(1, keepdim=True) / diagonal
    return boxes.iou_ultralytics(boxes_a, boxes_b, mode="iou") - distance + off


def diou_verdict(*, off: float = 0.0) -> Verdict:
    """Verdict where some of a side's distances fit in 20 bits by luck, and the sum of both sides does not."""
    generator = torch.Generator().manual_seed(0)
    first = 130 + 8 * torch.rand(2000, 4, generator=generator).sort(1).values
    second = ((8 * first).round() / 8)[:, [2, 1, 0, 3]]  # inverted: no overlap, and no error of one
    pair = {"boxes_a": first, "boxes_b": second, "mode": "diou"}
    system, operation = find_operation("boxes.iou_ultralytics")
    return expect(system, operation, pair).judge(perform(operation, partial(by_centres, off=off), pair))


def test_what_is_exact_by_luck_may_carry_an_error_if_arranged_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diou_verdict().status == "equal"
    assert diou_verdict(off=2e-6).findings[0].clause == "boxes.iou_ultralytics[iou]"
    monkeypatch.setattr(comparison, "nothing_by_luck", nullcontext)
    assert diou_verdict().status == "different"


def by_corners(*, anchors: Tensor, boxes: Tensor, means: list[float], stds: list[float]) -> Tensor:
    """Anchor deltas from how far both corners have moved."""
    size, target = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = ((boxes[:, :2] - anchors[:, :2]) + (boxes[:, 2:] - anchors[:, 2:])) / (2 * size)
    deltas = torch.cat([shift, torch.log(target) - torch.log(size)], dim=1)
    return (deltas - torch.tensor(means)) / torch.tensor(stds)


def test_right_values_may_err_by_more_than_twice_the_oracles_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pair: dict[str, Any] = {
        "anchors": torch.tensor([[-17.959392547607422, -8.979696273803711, 17.959392547607422, 8.979696273803711]]),
        "boxes": torch.tensor([[26.929889678955078, -60.39155960083008, 32.627235412597656, 64.97929382324219]]),
        "means": [0.0, 0.1, -0.1, 0.2],
        "stds": [0.1, 0.1, 0.2, 0.2],
    }
    system, operation = find_operation("anchor_head.encode")
    outcome = Outcome({"deltas": by_corners(**pair)})

    def values() -> list[str]:
        return [f.clause for f in expect(system, operation, pair).judge(outcome).findings if "[deltas]" in f.clause]

    assert values() == []
    monkeypatch.setattr(bounds, "VALUE_FACTOR", 2.0)
    assert values() == ["anchor_head.encode[deltas]"]


def test_sides_may_be_decoded_by_the_logarithm_of_the_stride() -> None:
    def decode(*, raw: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
        right, sides = yolox.decode(raw, strides), []
        for level, stride in zip(raw, strides, strict=True):
            sides.append((level[:, 2:4] + math.log(stride)).exp().flatten(2).transpose(1, 2))
        return torch.cat([right[..., :2], torch.cat(sides, 1), right[..., 4:]], dim=-1)

    given = arguments("yolox.decode", "extreme-boxes-50", setting="")
    outcome = perform(OPERATIONS["yolox.decode"], decode, given)
    assert expect(SYSTEM, OPERATIONS["yolox.decode"], given).judge(outcome).status == "equal"
