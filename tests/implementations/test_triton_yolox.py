from __future__ import annotations

from typing import Any

import pytest

from tests.implementations.triton_trials import interpreted, warnings_of_numpy, wrong_cases

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, boxes, yolox_kernels, yolox_loss_kernels

pytestmark = warnings_of_numpy
FEW = [
    "empty-one",
    "empty-all",
    "identical-other-class",
    "crowded-cell",
    "outside-mixed",
    "negative-row",
    "zero-row-first",
    "degenerate-pair",
    "edge-of-centre-square",
    "perfect-2",
    "one-anchor",
    "nan-box",
]


@pytest.mark.parametrize("name", FEW)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("yolox.assign", name) == []


@pytest.mark.parametrize("name", ["empty-all", "degenerate-point", "perfect-2", "four-anchors"])
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("yolox.loss", name) == []


def test_contested_anchors_go_to_the_cheapest_of_all() -> None:
    assert wrong_cases("yolox.assign", "best-for-a-third", ["tutorial"]) == []


# ------------------------------------------------------------------------------------------------------ wrong variants
def _only_a_threshold(best: Any, most: Any) -> Any:
    """One claim too few."""
    return BEFORE(best, most - 1)


def _own_class_not_taken_off(logit: Any) -> Any:
    """All are as likely."""
    return SIGMOID(logit * 0.0)


def _as_if_alone(keys: Any) -> Any:
    """Keys name the anchor before."""
    value, index = KEY_VALUE(keys)
    return value, index ^ 1


BEFORE, SIGMOID, KEY_VALUE = arithmetic.before, arithmetic.sigmoid, arithmetic.key_value


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [
        ("before", _only_a_threshold, "many-claims-few-anchors"),
        ("sigmoid", _own_class_not_taken_off, "best-for-a-third"),
        ("key_value", _as_if_alone, "identical-other-class"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(yolox_kernels, name, wrong)
    assert wrong_cases("yolox.assign", scene, ["tutorial"])


def _no_difference(logit: Any, target: Any) -> Any:
    """The gradient of an entropy towards 0."""
    loss, derivative = arithmetic.bce_with_logits(logit, target)
    return loss, derivative + target


def _whole_at_ties(low: Any, high: Any, gt_low: Any, gt_high: Any) -> Any:
    """Sides that ends of the ground truth bound have a gradient too."""
    length, by_low, by_high = SIDE(low, high, gt_low, gt_high)
    return length, by_low - 0.5, by_high + 0.5


SIDE = boxes.side


@interpreted
@pytest.mark.parametrize(("name", "wrong"), [("bce_with_logits", _no_difference), ("side", _whole_at_ties)])
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(yolox_loss_kernels, name, wrong)
    assert wrong_cases("yolox.loss", "single", ["tutorial"])
