"""What `explain` calls right and wrong for YOLOv8: other arithmetic is right, another rule is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import yolov8, yolov8_loss
from detoracle.reference.boxes import iou_ultralytics
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.yolov8 import explain_assign, explain_loss, loss_given

FAR = [900.0, 900.0, 908.0, 908.0]  # a prediction that overlaps nothing


# ------------------------------------------------------------------------ a second implementation, with faults to order
def _ciou(first: Tensor, second: Tensor) -> Tensor:
    """CIoU of corner boxes, every sum taken in another order than the oracle's."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = first.unbind(-1), second.unbind(-1)
    width = (torch.minimum(u2, x2) - torch.maximum(u1, x1)).clamp(min=0)
    height = (torch.minimum(v2, y2) - torch.maximum(v1, y1)).clamp(min=0)
    w1, h1, w2, h2 = x2 - x1, (y2 - y1) + 1e-7, u2 - u1, (v2 - v1) + 1e-7
    union = h2 * w2 + (h1 * w1 - height * width) + 1e-7
    iou = height * width / union
    diagonal = (torch.maximum(y2, v2) - torch.minimum(y1, v1)) ** 2 + (
        torch.maximum(x2, u2) - torch.minimum(x1, u1)
    ) ** 2
    distance = (((v1 - y1) + (v2 - y2)) ** 2 + ((u1 - x1) + (u2 - x2)) ** 2) * 0.25 / (diagonal + 1e-7)
    shape = (torch.atan(w1 / h1) - torch.atan(w2 / h2)) ** 2 * (4 / torch.pi**2)
    return iou - distance - shape * (shape / ((1 + 1e-7) - iou + shape))


def _metric(score: Tensor, overlap: Tensor) -> Tensor:
    return (overlap * overlap * overlap) ** 2 * score.sqrt()


def _port(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    topk: int = 10,
    on_edge: bool = False,
    iou: Callable[[Tensor, Tensor], Tensor] = _ciou,
    metric: Callable[[Tensor, Tensor], Tensor] = _metric,
    winner: str = "overlap",
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense batched assignment; `order` permutes the anchors, and so top-k's choice among equals."""
    order = torch.arange(len(anchor_points)) if order is None else order
    scores, boxes, anchor_points = scores[:, order], boxes[:, order], anchor_points[order]
    left_top, right_bottom = gt_boxes[:, :, None, :2], gt_boxes[:, :, None, 2:]
    nearest = torch.minimum(anchor_points - left_top, right_bottom - anchor_points).amin(-1)
    counts = ((nearest >= 0) if on_edge else (nearest > 1e-9)) & gt_valid[..., None]
    overlap = iou(gt_boxes[:, :, None], boxes[:, None]).clamp(min=0) * counts
    score = scores.transpose(1, 2).gather(1, gt_labels[..., None].expand_as(counts)) * counts
    aligned = metric(score, overlap)
    claims = torch.zeros_like(counts).scatter(2, aligned.topk(topk, dim=2).indices, True) & counts
    preference = {"overlap": overlap, "metric": aligned, "claimed": overlap + 1.0 * claims}.get(winner, overlap)
    best = preference.shape[1] - 1 - preference.flip(1).argmax(1) if winner == "last" else preference.argmax(1)
    number = claims.sum(1)
    gt_index = torch.where(number > 1, best, torch.where(number == 1, claims.int().argmax(1), -1))
    mine = aligned * (gt_index[:, None] == torch.arange(gt_boxes.shape[1])[:, None])
    top = (overlap * (mine > 0)).amax(2, keepdim=True)
    quality = (mine / (mine.amax(2, keepdim=True) + 1e-9) * top).amax(1)
    back = order.argsort()
    return gt_index[:, back], quality[:, back]


def _scene(seed: int, *, near: bool = True, num_gts: int = 6) -> dict[str, Any]:
    """Two 256 px images of overlapping ground truths; predictions around the nearest one, or anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    points, strides = yolov8.anchor_points([torch.zeros(1, 1, 256 // s, 256 // s) for s in (8, 16, 32)], [8, 16, 32])
    points = points * strides[:, None]
    centre, half = random(2, num_gts, 2) * 200 + 28, random(2, num_gts, 2) * 40 + 24
    gt_boxes = torch.cat([centre - half, centre + half], dim=-1)
    distance = torch.cdist(points.expand(2, -1, -1), centre)
    target = gt_boxes.gather(1, distance.argmin(2)[..., None].expand(-1, -1, 4))
    anywhere = torch.cat([random(2, len(points), 2) * 200, random(2, len(points), 2) * 200 + 20], dim=-1)
    boxes = target + (random(2, len(points), 4) - 0.5) * 30 if near else anywhere
    return {
        "scores": random(2, len(points), 5),
        "boxes": boxes,
        "anchor_points": points,
        "gt_boxes": gt_boxes,
        "gt_labels": torch.randint(5, (2, num_gts), generator=generator),
        "gt_valid": torch.arange(num_gts) < torch.tensor([[num_gts], [num_gts - 2]]),
    }


# --------------------------------------------------------------------------------------------------------- soundness
@pytest.mark.parametrize("near", [True, False], ids=["near", "anywhere"])
@pytest.mark.parametrize("seed", range(6))
def test_right_answers_are_right(seed: int, near: bool) -> None:
    scene = _scene(seed, near=near)
    explanation = explain_assign(**scene)
    result = yolov8.assign(**scene)
    assert not explanation.wrong(result.gt_index).any()
    generator = torch.Generator().manual_seed(seed)
    for order in (None, torch.randperm(len(scene["anchor_points"]), generator=generator)):
        gt_index, quality = _port(**scene, order=order)
        assert not explanation.wrong(gt_index).any()
        expected = explanation.quality(gt_index)
        assert not outside(quality, expected.value, expected.error).any()


def test_float64_outcome_is_the_oracle_in_float64() -> None:
    scene = _scene(0)
    in_double = {n: t.double() if t.is_floating_point() else t for n, t in scene.items()}
    assert torch.equal(explain_assign(**scene).gt_index, yolov8.assign(**in_double).gt_index)


def test_few_positives_are_ambiguous() -> None:
    explanations = [explain_assign(**_scene(seed)) for seed in range(10)]
    positives = sum(int((e.gt_index >= 0).sum()) for e in explanations)
    ambiguous = sum(int((e.ambiguous & (e.gt_index >= 0)).sum()) for e in explanations)
    assert positives > 500
    assert 100 * ambiguous < positives


# --------------------------------------------------------------------------------------------------------- sharpness
@pytest.mark.parametrize(
    "fault",
    [
        {"topk": 9},
        {"topk": 11},
        {"winner": "metric"},
        {"iou": lambda a, b: unchecked(iou_ultralytics)(a, b, mode="diou")[..., 0]},
        {"iou": lambda a, b: unchecked(iou_ultralytics)(a, b, mode="iou")[..., 0]},
        {"metric": lambda score, overlap: score * overlap**6},
        {"metric": lambda score, overlap: score**0.5 * overlap**5},
    ],
    ids=["top-9", "top-11", "conflict-by-metric", "diou", "iou", "alpha-1", "beta-5"],
)
def test_another_rule_is_wrong(fault: dict[str, Any]) -> None:
    scenes = [_scene(seed, num_gts=12) for seed in range(6)]
    assert any(explain_assign(**scene).wrong(_port(**scene, **fault)[0]).any() for scene in scenes)


def _row(
    gts: list[list[float]], boxes: list[list[float]], *, topk: int, scores: Tensor | None = None
) -> dict[str, Any]:
    """Anchor points 4, 12, 20, ... on a line, one class unless scores say otherwise."""
    count = len(boxes)
    return {
        "scores": torch.full((1, count, 1), 0.5) if scores is None else scores,
        "boxes": torch.tensor([boxes]),
        "anchor_points": torch.stack([torch.arange(count) * 8 + 4.0, torch.full((count,), 4.0)], dim=1),
        "gt_boxes": torch.tensor([gts]),
        "gt_labels": torch.zeros(1, len(gts), dtype=torch.int64),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "topk": topk,
    }


def test_a_point_on_the_edge_is_outside() -> None:
    box = [4.0, 0.0, 20.0, 8.0]
    scene = _row([box], [box] * 4, topk=1, scores=torch.tensor([[[0.9], [0.5], [0.4], [0.3]]]))
    explanation = explain_assign(**scene)
    assert explanation.gt_index.tolist() == [[-1, 0, -1, -1]]
    assert not explanation.ambiguous.any()
    assert explanation.wrong(_port(**scene, on_edge=True)[0]).tolist() == [[True, True, False, False]]


def test_a_tie_at_the_kth_place_takes_any_but_not_more() -> None:
    box = [0.0, 0.0, 32.0, 8.0]
    explanation = explain_assign(**_row([box], [box, box, box, FAR], topk=2))
    for claimed, right in (([0, 1], True), ([1, 2], True), ([0], False), ([0, 1, 2], False), ([0, 3], False)):
        gt_index = torch.full((1, 4), -1)
        gt_index[0, claimed] = 0
        assert bool(explanation.wrong(gt_index).any()) != right


def test_zero_metrics_fill_up_from_inside_and_outside() -> None:
    box = [0.0, 0.0, 24.0, 8.0]  # holds three anchors; one predicts it, and there are two anchors outside
    explanation = explain_assign(**_row([box], [box, FAR, FAR, FAR, FAR], topk=2))
    for claimed, right in (
        ([0], True),
        ([0, 1], True),
        ([0, 2], True),
        ([0, 1, 2], False),
        ([1, 2], False),
        ([0, 3], False),
    ):
        gt_index = torch.full((1, 5), -1)
        gt_index[0, claimed] = 0
        assert bool(explanation.wrong(gt_index).any()) != right


def test_fill_up_must_take_from_inside_what_outside_cannot_give() -> None:
    box = [
        0.0,
        0.0,
        24.0,
        8.0,
    ]  # three anchors inside, one outside: of three claims at least one falls on a zero inside
    explanation = explain_assign(**_row([box], [box, FAR, FAR, FAR], topk=3))
    for claimed, right in (([0], False), ([0, 1], True), ([0, 2], True), ([0, 1, 2], True)):
        gt_index = torch.full((1, 4), -1)
        gt_index[0, claimed] = 0
        assert bool(explanation.wrong(gt_index).any()) != right


def test_zero_overlaps_go_to_the_first_ground_truth_and_to_no_other() -> None:
    gts = [[0.0, 0.0, 8.0, 8.0], [16.0, 0.0, 32.0, 8.0], [24.0, 0.0, 32.0, 8.0]]
    scene = _row(gts, [FAR] * 4, topk=4)
    explanation = explain_assign(**scene)
    assert explanation.gt_index.tolist() == [[0, -1, 1, 0]]
    assert not explanation.ambiguous.any()
    assert explanation.wrong(_port(**scene, winner="last")[0]).tolist() == [[False, False, False, True]]
    assert explanation.wrong(_port(**scene, winner="claimed")[0]).tolist() == [[False, False, False, True]]


def test_identical_ground_truths_leave_a_choice_between_them_only() -> None:
    box = [0.0, 0.0, 8.0, 8.0]
    other = [1.0, 0.0, 32.0, 8.0]
    explanation = explain_assign(**_row([box, other, box], [[0.0, 0.0, 7.3, 8.1], FAR, FAR, FAR], topk=1))
    verdicts = [bool(explanation.wrong(torch.tensor([[g, -1, -1, -1]]))[0, 0]) for g in (0, 1, 2, -1)]
    assert verdicts == [False, True, False, True]


def test_a_third_ground_truth_that_did_not_claim_wins() -> None:
    gts = [[0.0, 0.0, 16.0, 8.0], [0.0, 0.0, 12.0, 8.0], [0.0, 0.0, 11.0, 8.0]]
    boxes = [[0.0, 0.0, 15.0, 8.0], [1.0, 0.0, 17.0, 8.0], FAR, FAR]
    scores = torch.tensor([[[0.0001, 0.9], [0.9, 0.0001], [0.1, 0.1], [0.1, 0.1]]])
    scene = {**_row(gts, boxes, topk=1, scores=scores), "gt_labels": torch.tensor([[0, 1, 1]])}
    explanation = explain_assign(**scene)
    assert explanation.gt_index.tolist() == [[0, 0, -1, -1]]
    assert explanation.wrong(_port(**scene, winner="claimed")[0]).tolist() == [[True, False, False, False]]


def test_a_nan_metric_is_claimed_first() -> None:
    box = [0.0, 0.0, 32.0, 8.0]
    scene = _row([box], [box] * 4, topk=1)
    scene["scores"][0, 2, 0] = torch.nan
    explanation = explain_assign(**scene)
    assert explanation.gt_index.tolist() == [[-1, -1, 0, -1]]
    assert explanation.quality(explanation.gt_index).value.isnan().all()


def test_a_speck_far_away_is_surely_zero() -> None:
    box = [0.0, 0.0, 32.0, 8.0]
    speck = [300.0, 300.0, 300.0000305, 300.0000305]  # one rounding wide: any aspect ratio will do
    explanation = explain_assign(**_row([box], [box, box, speck, speck], topk=2))
    assert not explanation.ambiguous.any()


def test_quality_is_sharp() -> None:
    scene = _scene(0)
    result = yolov8.assign(**scene)
    expected = explain_assign(**scene).quality(result.gt_index)
    unnormalised = yolov8.align(**scene)[0].gather(1, result.gt_index.clamp(min=0)[:, None])[:, 0] * result.positive
    assert outside(unnormalised, expected.value, expected.error).any()
    assert not outside(result.quality, expected.value, expected.error).any()


def test_explains_no_more_than_the_oracle_answers() -> None:
    box = [0.0, 0.0, 32.0, 8.0]
    with pytest.raises(UpstreamRaises, match="few-anchors"):
        explain_assign(**_row([box], [box] * 4, topk=5))
    none = {**_row([box], [box] * 4, topk=5), "gt_boxes": torch.zeros(1, 0, 4), "gt_labels": torch.zeros(1, 0).long()}
    explanation = explain_assign(**{**none, "gt_valid": torch.zeros(1, 0).bool()})
    assert explanation.gt_index.tolist() == [[-1] * 4]
    assert explanation.quality(explanation.gt_index).value.tolist() == [[0.0] * 4]


# -------------------------------------------------------------------------------------------------------------- loss
def _maps(seed: int, reg_max: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(2, 4 * reg_max + 3, 96 // s, 96 // s, generator=generator) for s in (8, 16, 32)]
    centre, half = torch.rand(2, 4, 2, generator=generator) * 96, torch.rand(2, 4, 2, generator=generator) * 30 + 4
    return {
        "raw": [level.abs() if reg_max == 1 else level for level in raw],
        "strides": [8, 16, 32],
        "gt_boxes": torch.cat([centre - half, centre + half], dim=-1),
        "gt_labels": torch.randint(3, (2, 4), generator=generator),
        "gt_valid": torch.tensor([[True, True, True, True], [True, True, False, False]]),
        "reg_max": reg_max,
    }


@pytest.mark.parametrize("reg_max", [1, 8, 16])
def test_float32_loss_is_within_the_bounds_of_its_assignment(reg_max: int) -> None:
    for seed in range(4):
        arguments = _maps(seed, reg_max)
        parts = yolov8_loss.loss(**arguments)
        bounded = loss_given(explain_loss(**arguments).gt_index, **arguments)
        for name, part in parts.items():
            expected = bounded[name]
            if isinstance(expected, Tensor):
                assert torch.equal(expected.float(), part)
            else:
                assert not outside(part, expected.value, expected.error)


def test_plain_loss_of_the_oracles_assignment_is_the_oracles_loss() -> None:
    arguments = _maps(0)
    arguments["raw"] = [level.requires_grad_() for level in arguments["raw"]]
    gt_index = explain_loss(**{**arguments, "raw": [level.detach() for level in arguments["raw"]]}).gt_index
    total, given = yolov8_loss.loss(**arguments)["total"], loss_given(gt_index, **arguments, dtype=None)["total"]
    assert torch.equal(total, given)
    for got, want in zip(*(torch.autograd.grad(t, arguments["raw"]) for t in (given, total)), strict=True):
        assert torch.equal(got, want)


def test_choices_without_effect_on_the_loss_are_none() -> None:
    arguments = _maps(0)
    explanation = explain_loss(**arguments)
    head = yolov8_loss._head(arguments["raw"], arguments["strides"], 16)
    full = explain_assign(
        torch.sigmoid(head.cls_logits),
        head.boxes * head.strides,
        head.points * head.strides,
        arguments["gt_boxes"],
        arguments["gt_labels"],
        yolov8.counted_ground_truths(arguments["gt_boxes"], arguments["gt_valid"]),
    )
    assert full.ambiguous.any()
    assert not explanation.ambiguous.any()
    assert len(list(explanation.alternatives(2))) == 1


def test_another_assignment_has_another_loss() -> None:
    arguments = _maps(1)
    explanation = explain_loss(**arguments)
    quality = explanation.quality(explanation.gt_index).value
    without_best = explanation.gt_index.clone()
    without_best.view(-1)[quality.flatten().argmax()] = -1
    parts = yolov8_loss.loss(**arguments)
    expected = loss_given(without_best, **arguments)["total"]
    assert outside(parts["total"], expected.value, expected.error)


@pytest.mark.parametrize(("dtype", "raises"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_a_target_that_rounding_lifts_onto_the_last_bin_raises_as_the_oracle_does(
    dtype: torch.dtype, raises: bool
) -> None:
    given: dict[str, Any] = {
        "raw": [torch.zeros(1, 65, 40, 40, dtype=dtype)],
        "strides": [8],
        "gt_boxes": torch.tensor([[[0.0, 0, 320, 320]]], dtype=dtype),
        "gt_labels": torch.zeros(1, 1, dtype=torch.int64),
        "gt_valid": torch.ones(1, 1, dtype=torch.bool),
    }
    gt_index = explain_loss(**given, dtype=dtype).gt_index
    for call in (yolov8_loss.loss, partial(loss_given, gt_index, dtype=dtype)):
        with pytest.raises(UpstreamRaises, match="dfl-target-out-of-range") if raises else nullcontext():
            call(**given)
