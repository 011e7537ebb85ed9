from __future__ import annotations

from typing import Any

import pytest
import torch

from detoracle.implementations.batched import rtmdet as batched
from tests.implementations.triton_trials import DEVICE, arguments_of, interpreted, warnings_of_numpy, wrong_cases

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, boxes, matching, rtmdet, rtmdet_kernels, rtmdet_loss_kernels

pytestmark = warnings_of_numpy
FEW = [
    "empty-one",
    "identical-other-class",
    "crowded-cell",
    "many-claims-few-anchors",
    "outside-mixed",
    "degenerate-pair",
    "perfect-2",
    "one-anchor",
    "nan-box",
    "label-beyond",
]


@pytest.mark.parametrize("name", FEW)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("rtmdet.assign", name) == []


@pytest.mark.parametrize("name", ["empty-single", "degenerate-point", "perfect-2", "four-anchors"])
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("rtmdet.loss", name) == []


def test_points_in_another_order_are_assigned_alike() -> None:
    given = arguments_of("rtmdet.assign", "identical-other-class")
    order = torch.randperm(len(given["priors"]), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    other = given | {name: given[name][:, order] for name in ("class_logits", "boxes", "inside")}
    other["priors"] = given["priors"][order]
    assert torch.equal(rtmdet.assign(**other).positive, rtmdet.assign(**given).positive[:, order])


@pytest.mark.parametrize("topk", [0, 40])
def test_any_top_k_counts_claims(topk: int) -> None:
    given = arguments_of("rtmdet.assign", "many-claims-few-anchors")
    found, want = rtmdet.assign(**given, topk=topk), batched.assign(**given, topk=topk)
    assert torch.equal(found.extra["dynamic_k"], want.extra["dynamic_k"])


# ------------------------------------------------------------------------------------------------------ wrong variants
def _one_claim_too_few(best: Any, most: Any) -> Any:
    return BEFORE(best, most - 1)


def _dearest_of_all(contested: Any, winner: Any, lowest: Any, ground_truth: Any, cost: Any) -> Any:
    return CHEAPER(contested, winner, lowest, ground_truth, -cost)


def _as_far_everywhere(x: Any) -> Any:
    return POWER_OF_TEN(x * 0.0)


def _other_classes_are_free(costs: Any, channel: Any, others: Any, largest: Any, largest_class: Any) -> Any:
    return others, largest, largest_class


BEFORE, CHEAPER, POWER_OF_TEN = arithmetic.before, matching.cheaper, arithmetic.power_of_ten


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [
        ("before", _one_claim_too_few, "many-claims-few-anchors"),
        ("cheaper", _dearest_of_all, "identical-other-class"),
        ("power_of_ten", _as_far_everywhere, "single"),
        ("apart", _other_classes_are_free, "best-for-a-third"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(rtmdet_kernels, name, wrong)
    assert wrong_cases("rtmdet.assign", scene, [""])


def _slope_of_the_entropy_alone(logit: Any, target: Any, beta: Any, square: Any) -> Any:
    loss, _ = FOCAL(logit, target, beta, square)
    entropy, away = arithmetic.bce_with_logits(logit, target)
    return loss, away * (away * away) + 0.0 * entropy


def _enclosure_is_a_constant(a: Any, b: Any, eps: Any) -> Any:
    giou, slopes = GIOU(a, b, eps)
    return giou, tuple(slope * (slope > 0.0) for slope in slopes)


FOCAL, GIOU = rtmdet_loss_kernels._focal, boxes.giou_slopes


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong"), [("_focal", _slope_of_the_entropy_alone), ("giou_slopes", _enclosure_is_a_constant)]
)
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(rtmdet_loss_kernels, name, wrong)
    assert wrong_cases("rtmdet.loss", "single", [""])
