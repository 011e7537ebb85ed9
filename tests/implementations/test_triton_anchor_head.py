from __future__ import annotations

from typing import Any

import pytest
import torch

from detoracle.implementations.batched import anchor_head as batched
from detoracle.properties.anchor_head_settings import HEADS
from tests.implementations.triton_trials import (
    DEVICE,
    arguments_of,
    gradients_of,
    interpreted,
    warnings_of_numpy,
    wrong_cases,
)

pytest.importorskip("triton")
from detoracle.implementations.triton import (
    anchor_head,
    anchor_head_kernels,
    anchor_head_loss_kernels,
    arithmetic,
    boxes,
)

pytestmark = warnings_of_numpy
FOCAL = [name for name, head in HEADS.items() if head["class_loss"] == "focal"]
ASSIGNED = [
    "empty-all",
    "identical-other-class",
    "outside-mixed",
    "zero-row-first",
    "degenerate-pair",
    "inverted-only",
    "symmetric",
    "tiny-and-huge",
    "four-anchors",
    "one-anchor",
]


@pytest.mark.parametrize("name", ASSIGNED)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("anchor_head.assign", name) == []


@pytest.mark.parametrize("head", FOCAL)
@pytest.mark.parametrize("name", ["one-anchor", "four-anchors"])
def test_loss_is_right(name: str, head: str) -> None:
    assert wrong_cases("anchor_head.loss", name, [head]) == []


# --------------------------------------------------------------------------------------------------- to the last anchor
RULES: dict[str, dict[str, Any]] = {
    "published": {},
    "first anchor": {"gt_max_assign_all": False},
    "zeros claimed": {"min_pos_iou": -0.5},
    "high": {"pos_iou_thr": 0.7, "neg_iou_thr": (0.1, 0.3), "min_pos_iou": 0.3},
    "thresholds": {"match_low_quality": False},
}


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_assigns_as_batched_does(rules: str, partly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image has several blocks, the last of which is not full."""
    monkeypatch.setattr(anchor_head, "_ANCHORS", 256)
    given = arguments_of("anchor_head.assign", "ragged-full")
    given |= RULES[rules]
    given["anchors"], given["inside"] = given["anchors"][:700], given["inside"][:, :700]
    given["gt_boxes"] = given["gt_boxes"].clone()
    given["gt_boxes"][1, 2] += 1000  # overlaps nothing
    if partly:
        given["inside"] = given["inside"] & (torch.arange(700, device=DEVICE) % 5 > 0)
        regions = {"ignore_boxes": given["gt_boxes"][:, :2], "ignore_valid": given["gt_valid"][:, :2]}
        given |= {**regions, "ignore_iof_thr": 0.5, "ignore_wrt_candidates": rules != "high"}
    found, want = anchor_head.assign(**given), batched.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)


@pytest.mark.parametrize(("decoded", "finite"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
def test_every_box_loss_is_that_of_batched(box_loss: str, decoded: bool, finite: bool) -> None:
    """A number that is not finite is NaN in the loss wherever it stands, but not in each gradient."""
    coder = {"means": (0.0, 0.1, -0.1, 0.2), "stds": (0.1, 0.1, 0.2, 0.2), "beta": 1 / 9, "reg_decoded_bbox": decoded}
    given = arguments_of("anchor_head.loss", "four-anchors")
    given |= {"box_loss": box_loss, **coder, "gamma": 1.5, "alpha": 0.4, "pos_weight": 2.0}
    if not finite:
        given["bbox_preds"] = [level.clone() for level in given["bbox_preds"]]
        given["bbox_preds"][0][0, :2, 0, 0] = torch.tensor([torch.nan, torch.inf])
    found, want = (call(**given) for call in (anchor_head.loss, batched.loss))
    torch.testing.assert_close(found, want, equal_nan=True)
    torch.testing.assert_close(
        *(gradients_of("anchor_head.loss", given, call=call) for call in (anchor_head.loss, batched.loss)),
        equal_nan=True,
        check_dtype=True,
    )


@pytest.mark.parametrize("part", ["classification", "box"])
def test_every_part_of_every_level_trains(part: str) -> None:
    given = arguments_of("anchor_head.loss", "single") | {"class_loss_weight": 0.5, "box_loss_weight": 3.0}
    calls = anchor_head.loss, batched.loss
    torch.testing.assert_close(*(gradients_of("anchor_head.loss", given, part, call) for call in calls))


@pytest.mark.parametrize("name", [name for name in HEADS if name not in FOCAL])
def test_heads_of_other_class_losses_are_left_to_batched(name: str) -> None:
    given = arguments_of("anchor_head.loss", "single", name)
    torch.testing.assert_close(anchor_head.loss(**given), batched.loss(**given))


# ------------------------------------------------------------------------------------------------------- wrong variants
def _larger_overlap(keys: Any) -> Any:
    """No anchor has the overlap that a ground truth's best one is said to have."""
    value, index = KEY_VALUE(keys)
    return value * 2.0, index


def _smaller_overlaps(a: Any, b: Any, least: Any) -> Any:
    """Overlaps of boxes that share less."""
    return OVERLAP(a, b, least) * 0.75


KEY_VALUE, OVERLAP = arithmetic.key_value, boxes.overlap_mmdet


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [("key_value", _larger_overlap, "tiny-and-huge"), ("overlap_mmdet", _smaller_overlaps, "identical-other-class")],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(anchor_head_kernels, name, wrong)
    assert wrong_cases("anchor_head.assign", scene, ["retina"])


def _half_a_slope(logit: Any, present: Any, settings: Any, square: Any) -> Any:
    """Half of the slope is missing."""
    loss, slope = FOCAL_TERM(logit, present, settings, square)
    return loss, slope * 0.5


def _sides_fixed(slope: Any, by_delta: Any) -> Any:
    """Sides do not depend on deltas."""
    return THROUGH(slope, by_delta * 0.0)


FOCAL_TERM, THROUGH = anchor_head_loss_kernels._focal, anchor_head_loss_kernels._through


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "head"), [("_focal", _half_a_slope, "retina"), ("_through", _sides_fixed, "giou")]
)
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, head: str) -> None:
    monkeypatch.setattr(anchor_head_loss_kernels, name, wrong)
    assert wrong_cases("anchor_head.loss", "one-anchor", [head])
