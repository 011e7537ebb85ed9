"""The judge on trial: wrong YOLOX assigners and losses are found out and shrunk, right but different ones never."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.properties.checking import Case, Result, cases, judge_case, smallest_of
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import system_of
from detoracle.reference import yolox, yolox_loss
from detoracle.reference.contract import Operation

SYSTEM = system_of("yolox")
OPERATIONS = {operation.name: operation for operation in SYSTEM.operations}
SCENES = sorted(
    (scene for scene in (*edge_cases(), *random_scenes(25, seed=11)) if scene.max_gts < 100),
    key=lambda scene: sum(len(labels) for labels in scene.gt_labels),
)
Judged = list[tuple[Case, Expectation]]


@pytest.fixture(scope="module")
def expected() -> Callable[[str], Judged]:
    found: dict[str, Judged] = {}

    def of(name: str) -> Judged:
        if name not in found:
            operation = OPERATIONS[name]
            made = [case for scene in SCENES for case in cases(SYSTEM, operation, scene)]
            found[name] = [(case, expect(SYSTEM, operation, case.arguments)) for case in made]
        return found[name]

    return of


# ------------------------------------------------------------------------------------------ a second implementation
class Assigner:
    """SimOTA once more, by whole matrices; every step may be overridden."""

    keep_last_gt = True

    def __call__(
        self,
        predictions: Tensor,
        anchor_points: Tensor,
        anchor_strides: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        gt_valid: Tensor,
        flavour: str,
    ) -> dict[str, Tensor]:
        gt_index = torch.full(predictions.shape[:2], -1)
        quality, k = predictions.new_zeros(predictions.shape[:2]), torch.zeros_like(gt_labels)
        counted = yolox.counted_ground_truths(gt_boxes, gt_labels, gt_valid, flavour=flavour)
        for image, valid in enumerate(counted):
            rows = valid.nonzero().flatten()
            rows = rows if self.keep_last_gt else rows[:-1]
            boxes, labels, predicted = gt_boxes[image, rows], gt_labels[image, rows], predictions[image]
            box, square = self.geometry(anchor_points, anchor_strides, boxes, 2.5 if flavour == "tutorial" else 1.5)
            near, preferred = (box | square, box & square) if flavour == "tutorial" else (square, square)
            anchors = near.any(0).nonzero().flatten()
            if not len(anchors):
                continue
            iou = self.iou(boxes, predicted[anchors, :4])
            cost = self.class_cost(predicted[anchors], labels) + self.iou_cost(iou)
            cost = cost + self.penalty(flavour) * ~preferred[:, anchors]
            number = self.k(iou, near[:, anchors])
            claims = cost.argsort(dim=1, stable=True).argsort(dim=1) < number[:, None]
            winner = self.conflict(claims, cost, iou)
            gt_index[image, anchors] = torch.where(claims.any(0), rows[winner], -1)
            matched = iou.gather(0, winner[None])[0]
            quality[image, anchors] = torch.where(claims.any(0), matched, 0.0)
            k[image, rows] = number
        return {"gt_index": gt_index, "quality": quality, "dynamic_k": k}

    def geometry(self, points: Tensor, strides: Tensor, boxes: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        away = (points - boxes[:, None, :2]).abs()
        return (away < boxes[:, None, 2:] / 2).all(-1), (away < radius * strides[None, :, None]).all(-1)

    def iou(self, boxes: Tensor, predicted: Tensor) -> Tensor:
        half_sum = (boxes[:, None, 2:] + predicted[:, 2:]) / 2
        side = half_sum - (boxes[:, None, :2] - predicted[:, :2]).abs()
        side = torch.minimum(side, torch.minimum(boxes[:, None, 2:], predicted[:, 2:].expand_as(side)))
        shared = side.clamp(min=0).prod(-1)
        return shared / (boxes[:, 2:].prod(1)[:, None] + predicted[:, 2:].prod(1) - shared)

    def iou_cost(self, iou: Tensor) -> Tensor:
        return -3 * (iou + 1e-8).log()

    def class_cost(self, predicted: Tensor, labels: Tensor) -> Tensor:
        probability = (predicted[:, 5:].sigmoid() * predicted[:, 4:5].sigmoid()).sqrt()
        target = F.one_hot(labels, predicted.shape[1] - 5).to(probability)
        pairs = (len(labels), *probability.shape)
        return F.binary_cross_entropy(probability.expand(pairs), target[:, None].expand(pairs), reduction="none").sum(
            -1
        )

    def penalty(self, flavour: str) -> float:
        return 1e5 if flavour == "tutorial" else 1e6

    def k(self, iou: Tensor, near: Tensor) -> Tensor:
        return iou.topk(min(10, iou.shape[1])).values.sum(1).nan_to_num(nan=1.0).int().clamp(min=1).long()

    def conflict(self, claims: Tensor, cost: Tensor, iou: Tensor) -> Tensor:
        return torch.where(claims.sum(0) > 1, cost.argmin(0), claims.int().argmax(0))


# ---------------------------------------------------------------------------------------- right, written differently
class LogSpace(Assigner):
    """Class cost factorised: what all classes cost, plus the difference for the right one."""

    def class_cost(self, predicted: Tensor, labels: Tensor) -> Tensor:
        log_p = (F.logsigmoid(predicted[:, 5:]) + F.logsigmoid(predicted[:, 4:5])) / 2
        absent = torch.log1p(-log_p.exp()).clamp(min=-100)
        return -(absent.sum(1) + (log_p.clamp(min=-100) - absent)[:, labels].T)


class Corners(Assigner):
    """Everything on xyxy boxes, as libraries have it."""

    def geometry(self, points: Tensor, strides: Tensor, boxes: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        centre, half = boxes[:, None, :2], boxes[:, None, 2:] / 2
        reach = radius * strides[None, :, None]
        inside = [
            ((points > centre - side) & (points < centre + side)).all(-1)
            for side in (half, reach.expand(len(boxes), -1, 2))
        ]
        return inside[0], inside[1]

    def iou(self, boxes: Tensor, predicted: Tensor) -> Tensor:
        a, b = (torch.cat([x[:, :2] - x[:, 2:] / 2, x[:, :2] + x[:, 2:] / 2], dim=1) for x in (boxes, predicted))
        side = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
        shared = side.clamp(min=0).prod(-1)
        return shared / ((a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1) - shared)


class Permuted(Assigner):
    """Sums taken in another order."""

    def class_cost(self, predicted: Tensor, labels: Tensor) -> Tensor:
        classes = torch.arange(predicted.shape[1] - 5).flip(0)
        return super().class_cost(predicted[:, [0, 1, 2, 3, 4, *(classes + 5)]], len(classes) - 1 - labels)

    def k(self, iou: Tensor, near: Tensor) -> Tensor:
        best = iou.sort(dim=1).values[:, -10:]
        total = best[:, 0]
        for column in best.T[1:]:
            total = total + column
        return total.nan_to_num(nan=1.0).int().clamp(min=1).long()


def inside_double(**arguments: Any) -> dict[str, Tensor]:
    fine: dict[str, Any] = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()
    }
    found = Assigner()(**fine)
    return {**found, "quality": found["quality"].float()}


RIGHT: dict[str, Callable[..., Any]] = {
    "matrices": Assigner(),
    "log-space": LogSpace(),
    "corners": Corners(),
    "permuted": Permuted(),
    "double": inside_double,
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_assigner_is_never_judged_wrong(name: str, expected: Callable[[str], Judged]) -> None:
    operation = OPERATIONS["yolox.assign"]
    results = [judge_case(c, e, partial(perform, operation, RIGHT[name])) for c, e in expected("yolox.assign")]
    assert [(r.case.name, r.verdict.findings) for r in results if r.verdict.wrong] == []
    assert sum(r.verdict.status == "equal" for r in results) > len(results) * 3 // 4


# -------------------------------------------------------------------------------------------------------- planted
class AmongClaimants(Assigner):
    def conflict(self, claims: Tensor, cost: Tensor, iou: Tensor) -> Tensor:
        return cost.masked_fill(~claims, torch.inf).argmin(0)


class FirstClaimant(Assigner):
    def conflict(self, claims: Tensor, cost: Tensor, iou: Tensor) -> Tensor:
        return claims.int().argmax(0)


class ConflictByIou(Assigner):
    def conflict(self, claims: Tensor, cost: Tensor, iou: Tensor) -> Tensor:
        return torch.where(claims.sum(0) > 1, iou.argmax(0), claims.int().argmax(0))


class RoundedK(Assigner):
    def k(self, iou: Tensor, near: Tensor) -> Tensor:
        return iou.topk(min(10, iou.shape[1])).values.sum(1).nan_to_num(nan=1.0).round().clamp(min=1).long()


class NoMinimumK(Assigner):
    def k(self, iou: Tensor, near: Tensor) -> Tensor:
        return iou.topk(min(10, iou.shape[1])).values.sum(1).nan_to_num(nan=1.0).long()


class OwnCandidatesK(Assigner):
    def k(self, iou: Tensor, near: Tensor) -> Tensor:
        return super().k(iou * near, near)


class InclusiveEdge(Assigner):
    def geometry(self, points: Tensor, strides: Tensor, boxes: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        away = (points - boxes[:, None, :2]).abs()
        return (away <= boxes[:, None, 2:] / 2).all(-1), (away <= radius * strides[None, :, None]).all(-1)


class WeakPenalty(Assigner):
    def penalty(self, flavour: str) -> float:
        return super().penalty(flavour) / 10


class LargeEpsilon(Assigner):
    def iou_cost(self, iou: Tensor) -> Tensor:
        return -3 * (iou + 1e-3).log()


class LastGtDropped(Assigner):
    keep_last_gt = False


WRONG: dict[str, Assigner] = {
    kind.__name__: kind()
    for kind in (
        AmongClaimants,
        FirstClaimant,
        ConflictByIou,
        RoundedK,
        NoMinimumK,
        OwnCandidatesK,
        InclusiveEdge,
        WeakPenalty,
        LargeEpsilon,
        LastGtDropped,
    )
}


def found_out(operation: Operation, judged: Judged, wrong: Callable[..., Any]) -> Result:
    call = partial(perform, operation, wrong)
    failure = next(r for c, e in judged if (r := judge_case(c, e, call)).verdict.wrong)
    smallest = smallest_of(SYSTEM, operation, [failure], call)
    assert smallest.verdict.findings[0].clause == failure.verdict.findings[0].clause
    return smallest


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_assigner_is_found_out_and_shrunk(name: str, expected: Callable[[str], Judged]) -> None:
    smallest = found_out(OPERATIONS["yolox.assign"], expected("yolox.assign"), WRONG[name])
    assert smallest.case.native["gt_valid"].sum() <= 3


def test_of_several_failures_the_one_that_becomes_smallest_is_shown(expected: Callable[[str], Judged]) -> None:
    operation = OPERATIONS["yolox.assign"]
    call = partial(perform, operation, WRONG["AmongClaimants"])
    judged = [
        judge_case(c, e, call) for c, e in expected("yolox.assign") if c.scene.name in ("crowd", "best-for-a-third")
    ]
    small, crowded = (
        next(r for r in judged if r.verdict.wrong and r.case.scene.name == n) for n in ("best-for-a-third", "crowd")
    )
    alone, both = (
        int(smallest_of(SYSTEM, operation, failures, call).case.native["gt_valid"].sum())
        for failures in ([crowded], [crowded, small])
    )
    assert both <= 3 < alone


# --------------------------------------------------------------------------------------------------------- losses
def detached(**arguments: Any) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in yolox_loss.loss(**arguments).items()}


def leaking(**arguments: Any) -> dict[str, Tensor]:
    parts = yolox_loss.loss(**arguments)
    return {**parts, "total": parts["total"] + (parts["classification"] - parts["classification"].detach())}


def parts_only_detached(**arguments: Any) -> Tensor:
    parts = yolox_loss.loss(**arguments)
    return parts["total"] - parts["box"] + parts["box"].detach()


def not_normalised(**arguments: Any) -> dict[str, Tensor]:
    return {name: part * 2 for name, part in yolox_loss.loss(**arguments).items()}


def rescaled_box(**arguments: Any) -> dict[str, Tensor]:
    parts = yolox_loss.loss(**arguments)
    return {**parts, "total": parts["total"] + parts["box"] * 1e-4}


def constant(**arguments: Any) -> Tensor:
    return torch.tensor(1.0)


@pytest.mark.parametrize("wrong", [detached, leaking, parts_only_detached, not_normalised, rescaled_box, constant])
def test_a_wrong_loss_is_found_out_and_shrunk(wrong: Callable[..., Any], expected: Callable[[str], Judged]) -> None:
    smallest = found_out(OPERATIONS["yolox.loss"], expected("yolox.loss"), wrong)
    assert smallest.case.native["gt_valid"].sum() <= 3


def right_loss(**arguments: Any) -> dict[str, Tensor]:
    """Total alone, and summed the other way round."""
    parts = yolox_loss.loss(**arguments)
    return {"total": sum((part for name, part in reversed(parts.items()) if name != "total"), torch.zeros(()))}


def test_a_right_loss_is_never_judged_wrong(expected: Callable[[str], Judged]) -> None:
    operation = OPERATIONS["yolox.loss"]
    results = [judge_case(c, e, partial(perform, operation, right_loss)) for c, e in expected("yolox.loss")]
    assert [(r.case.name, r.verdict.findings) for r in results if r.verdict.wrong] == []
