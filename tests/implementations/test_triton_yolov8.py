from __future__ import annotations

from typing import Any

import pytest
import torch

from detoracle.implementations.batched import yolov8 as batched
from detoracle.reference import yolov8 as oracle
from detoracle.reference.errors import InputError
from tests.implementations.triton_trials import DEVICE, arguments_of, interpreted, warnings_of_numpy, wrong_cases

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, boxes, matching, yolov8, yolov8_kernels, yolov8_loss_kernels

pytestmark = warnings_of_numpy
FEW = [
    "empty-one",
    "identical-other-class",
    "many-claims-few-anchors",
    "outside-mixed",
    "no-overlap",
    "degenerate-pair",
    "perfect-2",
    "four-anchors",
    "nan-box",
    "nan-class",
    "label-minus-one",
]


@pytest.mark.parametrize("name", FEW)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("yolov8.assign", name) == []


@pytest.mark.parametrize("name", ["empty-single", "degenerate-point", "perfect-2", "one-anchor"])
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("yolov8.loss", name) == []


def test_points_in_another_order_are_assigned_alike() -> None:
    given = arguments_of("yolov8.assign", "identical-other-class")
    order = torch.randperm(len(given["anchor_points"]), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    other = given | {name: given[name][:, order] for name in ("scores", "boxes")}
    other["anchor_points"] = given["anchor_points"][order]
    assert torch.equal(yolov8.assign(**other).positive, yolov8.assign(**given).positive[:, order])


def far(given: dict[str, Any]) -> dict[str, Any]:
    """Most predictions overlap nothing: fewer do than a ground truth claims."""
    away = torch.arange(len(given["anchor_points"]), device=DEVICE) % 20 > 0
    return {**given, "boxes": given["boxes"] + 300 * away[:, None]}


@pytest.mark.parametrize("style", ["tied", "far", "spoilt"])
def test_assigns_as_the_oracle_does(style: str) -> None:
    """Where overlaps are 0, the first anchors of all are claimed; the oracle decides ties by index, as this does."""
    given = arguments_of("yolov8.assign", "whole-image" if style == "far" else "best-for-a-third")
    if style == "tied":
        given["scores"], given["boxes"] = torch.ones_like(given["scores"]), given["boxes"].round(decimals=-1)
    elif style == "far":
        given = far(given)
    else:
        given["boxes"][0, ::5] = torch.nan
    found, want = yolov8.assign(**given), oracle.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    torch.testing.assert_close(found.quality, want.quality, equal_nan=True)


@pytest.mark.parametrize("topk", [0, 40])
def test_any_top_k_claims_as_many(topk: int) -> None:
    given = far(arguments_of("yolov8.assign", "whole-image"))
    assert torch.equal(yolov8.assign(**given, topk=topk).gt_index, oracle.assign(**given, topk=topk).gt_index)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (7, 9)], ids=str)
def test_cells_are_walked_as_points_without_a_grid(size: tuple[int, int]) -> None:
    """Boxes of all kinds, far off and without a number too, on maps of all shapes."""
    draw = torch.Generator().manual_seed(sum(size))
    raw = [torch.randn(1, 4 * 16 + 3, *shape, generator=draw).to(DEVICE) for shape in (size, (2, 2))]
    corners = torch.rand(1, 12, 2, generator=draw) * 400 - 50
    gt_boxes = torch.cat([corners, corners + torch.rand(1, 12, 2, generator=draw) * 200 - 20], dim=-1)
    gt_boxes[0, 0], gt_boxes[0, 1, 0] = torch.tensor([-1e5, -1e5, 2e5, 2e5]), torch.nan
    labels = torch.zeros(1, 12, dtype=torch.int64, device=DEVICE)
    given: dict[str, Any] = {"raw": raw, "strides": [8, 16], "gt_boxes": gt_boxes.to(DEVICE), "gt_labels": labels}
    found, want = (call(**given, gt_valid=labels == 0) for call in (yolov8.loss, batched.loss))
    torch.testing.assert_close(found, want)


# -------------------------------------------------------------------------------------------------------------- refused
def test_exponents_that_make_pairs_outside_count_are_refused() -> None:
    given = arguments_of("yolov8.assign", "single")
    with pytest.raises(InputError, match=r"alpha and beta: expected exponents of 0 or more, not both 0, got al"):
        yolov8.assign(**given, alpha=0, beta=0)


# ------------------------------------------------------------------------------------------------------ wrong variants
def _one_claim_too_few(best: Any, most: Any) -> Any:
    return BEFORE(best, most - 1)


def _first_of_all(contested: Any, winner: Any, lowest: Any, ground_truth: Any, cost: Any) -> Any:
    return CHEAPER(contested, winner, lowest, ground_truth, cost * 0.0)


def _no_zero_is_claimed(batch: Any, foremost: Any, left: Any, gt: Any, image: Any, lanes: Any) -> Any:
    return ZEROS(batch, foremost, left * 0, gt, image, lanes)


def _edges_count(x: Any, y: Any, box: Any) -> Any:
    return (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])


def _without_the_shape(a: Any, b: Any) -> Any:
    iou, _, squares, _ = boxes._ciou_parts(a, b)
    return iou - squares[0] / squares[1]


BEFORE, CHEAPER, ZEROS = arithmetic.before, matching.cheaper, yolov8_kernels._zeros


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [
        ("before", _one_claim_too_few, "single"),
        ("cheaper", _first_of_all, "overlapping"),
        ("inside", _edges_count, "edge-through-centres"),
        ("ciou", _without_the_shape, "nearly-equal"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(yolov8_kernels, name, wrong)
    assert wrong_cases("yolov8.assign", scene, [""])


@interpreted
def test_zeros_that_nobody_claims_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolov8_kernels, "_zeros", _no_zero_is_claimed)
    given = far(arguments_of("yolov8.assign", "whole-image"))
    assert not torch.equal(yolov8.assign(**given).gt_index, oracle.assign(**given).gt_index)


def _one_side_too_steep(a: Any, b: Any) -> Any:
    overlap, (left, top, right, bottom) = SLOPES(a, b)
    return overlap, (left, top * 1.01, right, bottom)


def _no_bin_is_wanted(logits: Any, log_sum: Any, wanted: Any, reg_max: Any, bins: Any) -> Any:
    loss, weights = DFL(logits, log_sum, wanted, reg_max, bins)
    return loss, weights * 0.0


def _as_background(logit: Any, target: Any) -> Any:
    loss, derivative = BCE(logit, target)
    return loss, derivative + target


SLOPES, DFL, BCE = boxes.ciou_slopes, yolov8_loss_kernels._dfl, arithmetic.bce_with_logits


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("ciou_slopes", _one_side_too_steep), ("_dfl", _no_bin_is_wanted), ("bce_with_logits", _as_background)],
)
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(yolov8_loss_kernels, name, wrong)
    assert wrong_cases("yolov8.loss", "single", [""])
