"""Explanations of the anchor head: right outcomes are never wrong, wrong ones are, and little is left open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.reference import anchor_head
from detoracle.reference.anchor_head import Thresholds, assign
from detoracle.reference.anchor_head_boxes import anchors as make_anchors
from detoracle.reference.anchor_head_loss import loss
from detoracle.reference.anchor_head_ssd import ssd_loss
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.explain.anchor_head import explain_assign
from detoracle.reference.explain.anchor_head_loss import explain_loss, explain_ssd_loss, loss_given, ssd_loss_given

SIZES, STRIDES = [(12, 12), (6, 6), (3, 3)], [8, 16, 32]
Overlap = Callable[[Tensor, Tensor], Tensor]
RETINA: dict[str, Any] = {}
RPN: dict[str, Any] = {"pos_iou_thr": 0.7, "neg_iou_thr": 0.3, "min_pos_iou": 0.3}
SSD: dict[str, Any] = {"neg_iou_thr": 0.5, "gt_max_assign_all": False}


def grid(ratios: tuple[float, ...], scales: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return make_anchors(SIZES, strides=STRIDES, ratios=ratios, scales=scales, like=torch.zeros((), dtype=dtype))


EXACT = grid((0.25, 1.0, 4.0), (2.0, 3.0))  # sides are whole numbers
IRRATIONAL = grid((0.5, 1.0, 2.0), (2.0, 2 * 2 ** (1 / 3)))


def scene(generator: torch.Generator, anchors: Tensor, *, smallest: float, gts: int = 6) -> dict[str, Any]:
    """Two images of 96 pixels with random boxes; the second has a gap in its padding."""
    centre = 96 * torch.rand(2, gts, 2, generator=generator)
    size = smallest * (90 / smallest) ** torch.rand(2, gts, 2, generator=generator)
    valid = torch.ones(2, gts, dtype=torch.bool)
    valid[1, 1] = False
    return {
        "anchors": anchors,
        "gt_boxes": torch.cat([centre - size / 2, centre + size / 2], dim=-1),
        "gt_valid": valid,
        "inside": torch.rand(2, len(anchors), generator=generator) < 0.9,
    }


def one_image(gts: list[list[float]], anchors: list[list[float]], **more: Any) -> dict[str, Any]:
    return {
        "anchors": torch.tensor(anchors),
        "gt_boxes": torch.tensor([gts]),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "inside": torch.ones(1, len(anchors), dtype=torch.bool),
        **more,
    }


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}


# ------------------------------------------------------------------------------------ other right ways to compute
def in_other_order(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """Sides apart, the union summed from its parts outside the intersection."""
    a, b = gt_boxes[:, None], boxes[None]
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp(min=0)
    intersection = height * width
    rest = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) - intersection
    union = rest + (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    return intersection / union.clamp(min=1e-6)


def in_double(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    return overlaps_mmdet(gt_boxes.double(), boxes.double()).to(boxes.dtype)


def by_reciprocal(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """Division as some accelerators do it: times the rounded reciprocal."""
    a, b = gt_boxes[:, None], boxes[None]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    areas = (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(1)
    intersection = sides.prod(-1)
    return intersection * (areas - intersection).clamp(min=1e-6).reciprocal()


def assign_by(overlap: Overlap, given: dict[str, Any], **rules: Any) -> Tensor:
    settings = {"pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0.0, "gt_max_assign_all": True, **rules}
    thresholds = Thresholds.of(**settings, match_low_quality=True)
    images = []
    for boxes, valid, inside in zip(given["gt_boxes"], given["gt_valid"], given["inside"], strict=True):
        outcome = torch.full_like(inside, -2, dtype=torch.int64)
        chosen = anchor_head._assign(overlap(boxes[valid], given["anchors"][inside]), thresholds)
        outcome[inside] = anchor_head._named(chosen, valid)
        images.append(outcome)
    return torch.stack(images)


# ---------------------------------------------------------------------------------------------------- soundness
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rules", [RETINA, RPN, SSD], ids=["retina", "rpn", "ssd"])
@pytest.mark.parametrize("anchors", [EXACT, IRRATIONAL], ids=["exact", "irrational"])
@pytest.mark.parametrize("overlap", [overlaps_mmdet, in_other_order, in_double, by_reciprocal])
def test_a_right_assignment_is_never_wrong(
    overlap: Overlap, anchors: Tensor, rules: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        given = in_dtype(scene(generator, anchors, smallest=3), dtype)
        assert not explain_assign(**given, **rules, dtype=dtype).wrong(assign_by(overlap, given, **rules)).any()


def test_whole_numbers_tie_in_every_right_way() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        given = scene(generator, EXACT, smallest=3)
        given["gt_boxes"] = given["gt_boxes"].round()
        given["gt_boxes"][..., 2:] += 1
        explanation = explain_assign(**given)
        for overlap in (overlaps_mmdet, in_other_order, in_double, by_reciprocal):
            assert not explanation.wrong(assign_by(overlap, given)).any()


def test_a_right_assignment_of_anchors_that_may_tie_is_the_nearest_to_itself() -> None:
    # One size, and one ground truth inside them all: they overlap it alike but for rounding, more than can be listed.
    given = one_image([[3.0, 3, 9, 9]], [[0.1 * number, 0.0, 0.1 * number + 16, 16.0] for number in range(12)])
    explanation = explain_assign(**given)
    right = [assign_by(overlap, given) for overlap in (overlaps_mmdet, in_other_order, in_double, by_reciprocal)]
    for taken in (torch.zeros(1, 12, dtype=torch.int64), *right):
        assert not explanation.wrong(taken).any()
        assert torch.equal(explanation.nearest(taken, torch.ones(1, 12, dtype=torch.float64)), taken)


@pytest.mark.parametrize("rules", [RETINA, RPN, SSD], ids=["retina", "rpn", "ssd"])
def test_the_float64_oracle_is_the_first_outcome(rules: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    for anchors in (EXACT, IRRATIONAL):
        given = scene(generator, anchors, smallest=3)
        explanation, expected = explain_assign(**given, **rules), assign(**in_dtype(given, torch.float64), **rules)
        assert torch.equal(explanation.gt_index, expected.gt_index)
        assert torch.equal(next(explanation.alternatives(1)), expected.gt_index)
        assert not explanation.wrong(expected.gt_index).any()


@pytest.mark.parametrize("rules", [RETINA, RPN, SSD], ids=["retina", "rpn", "ssd"])
def test_every_alternative_is_right(rules: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        given = scene(generator, IRRATIONAL, smallest=3)
        explanation = explain_assign(**given, **rules)
        found = list(explanation.alternatives(40))
        assert not any(explanation.wrong(outcome).any() for outcome in found)
        closed = ~explanation.ambiguous
        assert all(torch.equal(outcome[closed], explanation.gt_index[closed]) for outcome in found)


@pytest.mark.parametrize(
    ("anchors", "smallest", "rules"),
    [(EXACT, 3, RETINA), (EXACT, 3, RPN), (IRRATIONAL, 24, RETINA)],
    ids=["exact retina", "exact rpn", "irrational retina"],
)
def test_a_generic_scene_leaves_next_to_nothing_open(anchors: Tensor, smallest: float, rules: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    positives = open_ = 0
    for _ in range(20):
        explanation = explain_assign(**scene(generator, anchors, smallest=smallest), **rules)
        positives += int((explanation.gt_index >= 0).sum())
        open_ += int((explanation.ambiguous & (explanation.gt_index >= 0)).sum())
    assert positives > 150
    assert open_ < positives / 100


def test_the_quality_is_the_overlap_of_any_right_assignment() -> None:
    given = scene(torch.Generator().manual_seed(6), IRRATIONAL, smallest=3)
    explanation = explain_assign(**given)
    for outcome in explanation.alternatives(5):
        quality = explanation.quality(outcome)
        for image, anchor in (outcome >= 0).nonzero()[::7].tolist():
            pair = given["gt_boxes"][image, outcome[image, anchor]][None], given["anchors"][anchor][None]
            assert abs(overlaps_mmdet(*pair).double() - quality.value[image, anchor]) <= quality.error[image, anchor]
        assert (quality.value[outcome < 0] == 0).all()


def test_without_ground_truths_nothing_is_open() -> None:
    given = scene(torch.Generator().manual_seed(7), EXACT, smallest=3)
    given["gt_valid"][1] = False
    explanation = explain_assign(**given)
    assert torch.equal(explanation.gt_index[1], torch.where(given["inside"][1], -1, -2))
    assert not explanation.ambiguous[1].any()
    assert explanation.margin[1].isinf().all()
    empty = {**given, "gt_boxes": given["gt_boxes"][:, :0], "gt_valid": given["gt_valid"][:, :0]}
    assert torch.equal(explain_assign(**empty).quality(explanation.gt_index).value, torch.zeros(2, len(EXACT)).double())


def test_a_nan_ground_truth_leaves_everything_out_for_certain() -> None:
    given = scene(torch.Generator().manual_seed(8), EXACT, smallest=3)
    given["gt_boxes"][0, 0, 2] = torch.nan
    explanation = explain_assign(**given)
    assert not explanation.wrong(assign(**given).gt_index).any()
    assert not explanation.ambiguous[0].any()


def test_overflowing_areas_leave_everything_open_or_are_right() -> None:
    given = in_dtype(scene(torch.Generator().manual_seed(9), EXACT * 40, smallest=3), torch.float16)
    given["gt_boxes"] = given["gt_boxes"] * 8
    explanation = explain_assign(**given, dtype=torch.float16)
    assert not explanation.wrong(assign(**given).gt_index).any()


def test_a_share_at_the_edge_of_being_ignored_may_be_so_or_not() -> None:
    third = [0.0, 0.0, 8.0, 8 / 3]  # a third of the first anchor, but for rounding
    given = one_image([[0.0, 0, 8, 8]], [[0.0, 0, 8, 8], [8.0, 0, 16, 8]], ignore_iof_thr=1 / 3)
    given |= {"ignore_boxes": torch.tensor([[third]]), "ignore_valid": torch.ones(1, 1, dtype=torch.bool)}
    explanation = explain_assign(**given)
    # If it is ignored, the ground truth overlaps the other anchor most.
    for outcome, right in (([0, -1], True), ([-2, 0], True), ([-2, -1], False), ([-1, -1], False)):
        assert explanation.wrong(torch.tensor([outcome])).any() != right
    for overlap in (1.0, -1.0):
        quality = explanation.quality(torch.tensor([[0, -1]]))
        assert abs(overlap - quality.value[0, 0]) <= quality.error[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_shares_at_the_edge_are_never_wrong(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    for least in (0.0, -1.0):
        given = in_dtype(scene(generator, EXACT, smallest=3), dtype)
        given |= {"ignore_boxes": given["gt_boxes"] + 6, "ignore_valid": given["gt_valid"], "ignore_iof_thr": 0.5}
        explanation = explain_assign(**given, min_pos_iou=least, dtype=dtype)
        for exact in (given, in_dtype(given, torch.float64)):
            result = assign(**exact, min_pos_iou=least)
            assert not explanation.wrong(result.gt_index).any()
            quality = explanation.quality(result.gt_index)
            assert ((result.quality.double() - quality.value).abs() <= quality.error).all()


# ---------------------------------------------------------------------------------------------------- sharpness
HALF = one_image([[0.0, 0, 8, 4]], [[0.0, 0, 8, 8], [8.0, 0, 16, 8]], match_low_quality=False)


@pytest.mark.parametrize(
    ("given", "right", "wrong"),
    [
        ({**HALF, "pos_iou_thr": 0.5}, [0, -1], [-2, -1]),  # > for >=
        ({**HALF, "pos_iou_thr": 0.5}, [0, -1], [0, -2]),  # an overlap of 0 is background
        ({**HALF, "pos_iou_thr": 0.6, "neg_iou_thr": 0.5}, [-2, -1], [-1, -1]),  # <= for <
        ({**HALF, "pos_iou_thr": 0.6, "neg_iou_thr": (0.5, 0.6)}, [-1, -2], [-2, -2]),  # > for >= at the lower end
        ({**HALF, "pos_iou_thr": 0.6, "min_pos_iou": 0.5, "match_low_quality": True}, [0, -1], [-2, -1]),
    ],
)
def test_an_exactly_hit_threshold_is_decided(given: dict[str, Any], right: list[int], wrong: list[int]) -> None:
    explanation = explain_assign(**given)
    assert not explanation.ambiguous.any()
    assert not explanation.wrong(torch.tensor([right])).any()
    assert explanation.wrong(torch.tensor([wrong])).any()


@pytest.mark.parametrize("coordinate", [9.0, 9.1])
def test_anchors_that_tie_are_claimed_together(coordinate: float) -> None:
    # The ground truth lies in three anchors alike; its coordinates need not be exact for them to tie.
    gt = [coordinate, 9.0, 11.3, 11.0]
    given = one_image([gt], [[0.0, 0, 16, 16], [4.0, 0, 20, 16], [8.0, 8, 24, 24], [16.0, 0, 32, 16]])
    explanation = explain_assign(**given)
    assert explanation.gt_index.tolist() == [[0, 0, 0, -1]]
    assert not explanation.ambiguous.any()
    for outcome in ([0, -1, -1, -1], [0, 0, -1, -1], [-1, -1, -1, -1], [0, 0, 0, 0]):
        assert explanation.wrong(torch.tensor([outcome])).any()


def test_of_anchors_that_tie_one_is_claimed_where_one_is() -> None:
    given = one_image([[6.0, 6, 10, 10]], [[0.0, 0, 8, 8], [8.0, 0, 16, 8], [0.0, 8, 8, 16]], gt_max_assign_all=False)
    explanation = explain_assign(**given)
    for outcome, right in (([0, -1, -1], True), ([-1, 0, -1], True), ([0, 0, -1], False), ([-1, -1, -1], False)):
        assert explanation.wrong(torch.tensor([outcome])).any() != right
    assert sorted(o[0].tolist() for o in explanation.alternatives(9)) == [[-1, -1, 0], [-1, 0, -1], [0, -1, -1]]


def test_anchors_that_may_tie_are_claimed_alone_or_together() -> None:
    # Equal but for the last bit of the anchor's side.
    given = one_image([[0.0, 0, 3, 3]], [[0.0, 0, 7.1, 7.1], [-0.1, -0.1, 7, 7], [40.0, 40, 48, 48]])
    explanation = explain_assign(**given)
    for outcome, right in (([0, 0, -1], True), ([0, -1, -1], True), ([-1, 0, -1], True), ([-1, -1, -1], False)):
        assert explanation.wrong(torch.tensor([outcome])).any() != right
    assert explanation.wrong(torch.tensor([[0, 0, 0]])).tolist() == [[False, False, True]]


def test_an_anchor_a_hundred_thousandth_below_the_best_is_not_claimed() -> None:
    # Its side is longer by 5e-6 of itself: some implementations take whatever is within 1e-5 of the best.
    explanation = explain_assign(**one_image([[0.0, 0, 4, 4]], [[0.0, 0, 8, 8], [0.0, 0, 8, 8.00004]]))
    assert explanation.gt_index.tolist() == [[0, -1]]
    assert not explanation.ambiguous.any()
    assert explanation.wrong(torch.tensor([[0, 0]])).tolist() == [[False, True]]


def test_a_certain_claim_closes_what_the_thresholds_leave_open() -> None:
    # Equal ground truths over the threshold, and a later one that overlaps this anchor alone.
    gts = [[0.0, 0, 8, 6], [0.0, 0, 8, 6], [0.0, 0, 8, 4]]
    explanation = explain_assign(**one_image(gts, [[0.0, 0, 8, 8], [8.0, 0, 16, 8]]))
    assert explanation.gt_index.tolist() == [[2, -1]]
    assert not explanation.ambiguous.any()


def test_a_best_overlap_at_the_least_may_or_may_not_claim() -> None:
    third = one_image([[0.0, 0, 8, 8 / 3]], [[0.0, 0, 8, 8], [8.0, 0, 16, 8]], min_pos_iou=1 / 3)
    explanation = explain_assign(**third)
    for outcome, right in (([0, -1], True), ([-1, -1], True), ([-2, -1], False), ([0, 0], False)):
        assert explanation.wrong(torch.tensor([outcome])).any() != right


def test_an_area_that_overflows_leaves_its_anchor_out() -> None:
    # 256 squared is beyond the largest float16: the IoU is NaN.
    box = [[0.0, 0, 256, 256]]
    given = in_dtype(one_image(box, [*box, [0.0, 0, 8, 8]], **SSD), torch.float16)
    explanation = explain_assign(**given, dtype=torch.float16)
    assert assign(**given).gt_index.tolist() == [[-2, -1]]
    assert not explanation.wrong(torch.tensor([[-2, -1]])).any()


def test_a_claim_may_be_overwritten_by_a_later_one() -> None:
    # Both ground truths overlap the first two anchors most, which may tie; the second one's claim stands.
    anchors = [[0.0, 0, 7.1, 7.1], [-0.1, -0.1, 7, 7], [40.0, 40, 48, 48]]
    explanation = explain_assign(**one_image([[0.0, 0, 3, 3], [0.0, 0, 3, 2]], anchors))
    for outcome in ([1, 1, -1], [0, 1, -1], [1, 0, -1], [1, -1, -1], [-1, 1, -1]):
        assert not explanation.wrong(torch.tensor([outcome])).any()
    for outcome in ([0, 0, -1], [0, -1, -1], [-1, -1, -1]):
        assert explanation.wrong(torch.tensor([outcome])).any()


def test_a_tie_of_two_is_no_licence_for_a_third() -> None:
    # Two equal ground truths over the threshold, and a third beside them.
    gts = [[0.0, 0, 8, 8], [0.0, 0, 8, 8], [8.0, 0, 16, 8]]
    explanation = explain_assign(**one_image(gts, [[0.0, 0, 8, 8], [8.0, 0, 16, 8]], match_low_quality=False))
    for first, right in ((0, True), (1, True), (2, False), (-1, False)):
        assert explanation.wrong(torch.tensor([[first, 2]])).any() != right


WRONG_RULES: dict[str, Callable[[Tensor, Thresholds], Tensor]] = {
    "no claims": anchor_head._by_threshold,
    "claims in reverse order": lambda overlaps, rules: _claimed_in(reversed(range(len(overlaps))), overlaps, rules),
    "claims only what is free": lambda overlaps, rules: _claimed_in(range(len(overlaps)), overlaps, rules, free=True),
    "claims an overlap of 0 never": lambda overlaps, rules: _claimed_in(
        (row for row in range(len(overlaps)) if overlaps[row].max() > 0), overlaps, rules
    ),
}


def _claimed_in(order: Any, overlaps: Tensor, rules: Thresholds, *, free: bool = False) -> Tensor:
    chosen = anchor_head._by_threshold(overlaps, rules)
    for row in order:
        claimed = overlaps[row] == overlaps[row].max()
        chosen[claimed & (chosen < 0) if free else claimed] = row
    return chosen


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(10)
    found = 0
    for _ in range(10):
        given = scene(generator, EXACT, smallest=3)
        given["gt_boxes"][0, 0] += 400  # overlaps nothing
        given["gt_boxes"][1, 2] = given["gt_boxes"][1, 0] + 0.01  # two overlap the same anchors most
        given["gt_boxes"][1, 3] = EXACT[37] + 1e-5
        explanation = explain_assign(**given)
        with monkeypatch.context() as patched:
            patched.setattr(anchor_head, "_assign", WRONG_RULES[name])
            outcome = assign(**given).gt_index
        found += bool(explanation.wrong(outcome).any())
    assert found


# --------------------------------------------------------------------------------------------- inside the losses
def head(seed: int, *, columns: int, smallest: float = 6, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given = scene(generator, EXACT, smallest=smallest)
    del given["inside"]
    shapes = torch.tensor([[96, 96], [80, 96]])
    return {
        **given,
        "cls_scores": [torch.randn(2, 6 * columns, *s, generator=generator).to(dtype) for s in SIZES],
        "bbox_preds": [torch.randn(2, 24, *s, generator=generator).to(dtype) for s in SIZES],
        "gt_labels": torch.randint(3, (2, 6), generator=generator),
        "image_shapes": shapes,
        "pad_shapes": shapes,
        "strides": STRIDES,
    }


def test_half_precision_maps_leave_no_more_open() -> None:
    single, half = (explain_loss(**head(1, columns=3, dtype=d), dtype=d) for d in (torch.float32, torch.float16))
    assert torch.equal(single.gt_index, half.gt_index)
    assert torch.equal(single.ambiguous, half.ambiguous)


def test_the_loss_of_the_float64_assignment_is_the_loss() -> None:
    given = in_dtype(head(2, columns=3), torch.float64)
    given |= {n: [level.double() for level in given[n]] for n in ("cls_scores", "bbox_preds")}
    explanation = explain_loss(**given, dtype=torch.float64)
    assert torch.equal(loss_given(explanation.gt_index, **given, dtype=None)["total"], loss(**given)["total"])  # type: ignore[arg-type]
    given |= {"cls_scores": [torch.cat([level, level[:, :6]], dim=1) for level in given["cls_scores"]]}
    mined = explain_ssd_loss(**given, dtype=torch.float64)
    assert torch.equal(ssd_loss_given(mined.gt_index, **given, dtype=None)["total"], ssd_loss(**given)["total"])  # type: ignore[arg-type]


def test_hard_negatives_are_counted_and_ranked() -> None:
    given = head(3, columns=4, smallest=30)
    given["gt_max_assign_all"] = True
    explanation = explain_ssd_loss(**given)
    outcome = explanation.gt_index
    assert not explanation.ambiguous.any()
    positives = (outcome >= 0).sum(1)
    assert (outcome == -1).sum(1).tolist() == (3 * positives).tolist()
    one_fewer, easier = outcome.clone(), outcome.clone()
    negatives, others = ((outcome[0] == value).nonzero().flatten() for value in (-1, -2))
    one_fewer[0, negatives[0]] = -2
    easier[0, negatives[0]], easier[0, others[0]] = -2, -1
    for wrong in (one_fewer, easier, outcome.clamp(min=-1)):
        assert explanation.wrong(wrong).any()
    assert explanation.wrong(explain_ssd_loss(**given, neg_pos_ratio=2).gt_index).any()


def test_equal_logits_leave_the_choice_of_negatives_open_but_not_their_number() -> None:
    given = head(4, columns=4)
    given["cls_scores"] = [torch.zeros_like(level) for level in given["cls_scores"]]
    explanation = explain_ssd_loss(**given)
    moved = explanation.gt_index.clone()
    free = (moved[0] < 0).nonzero().flatten()
    moved[0, free] = moved[0, free.flip(0)]
    assert not explanation.wrong(moved).any()
    moved[0, free[-1]] = -2 if moved[0, free[-1]] == -1 else -1
    assert explanation.wrong(moved).any()
    for outcome in explanation.alternatives(5):
        assert not explanation.wrong(outcome).any()


def test_a_positive_of_the_background_class_may_be_mined() -> None:
    cells = [[0.0, 0, 8, 8], [8.0, 0, 16, 8], [0.0, 8, 8, 16], [8.0, 8, 16, 16]]
    shape, scores = torch.tensor([[16, 16]]), torch.zeros(1, 2, 2, 2).double()
    scores[0, 0] = torch.tensor([[0.0, 3.0], [1.0, 2.0]])  # the second cell is the costliest as background
    given = {
        **one_image(cells[:2], cells),
        "cls_scores": [scores],
        "bbox_preds": [torch.zeros(1, 4, 2, 2).double()],
        "gt_labels": torch.tensor([[0, 1]]),
        "image_shapes": shape,
        "pad_shapes": shape,
        "strides": [8],
        "min_pos_iou": 0.3,
        "neg_pos_ratio": 2,
    }
    del given["inside"]
    given = in_dtype(given, torch.float64)
    explanation = explain_ssd_loss(**given, dtype=torch.float64)
    assert explanation.gt_index.tolist() == [[0, 1, -2, -1]]
    parts = ssd_loss_given(explanation.gt_index, **given, dtype=None)
    for name, value in ssd_loss(**given).items():
        assert torch.equal(parts[name], value)  # type: ignore[arg-type]
