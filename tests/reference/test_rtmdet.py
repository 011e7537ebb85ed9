from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import VALUE_FACTOR, outside
from detoracle.reference import rtmdet
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.rtmdet import explain_cost

SIZES, STRIDES = [(8, 8), (4, 4)], [8, 16]


def ground_truths(gts: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    return {
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_labels": torch.tensor([labels or [0] * len(gts)], dtype=torch.int64),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
    }


def scene(gts: list[list[float]], labels: list[int] | None = None, *, reach: float = 8.0) -> dict[str, Any]:
    """A 64 px image, one level of stride 8, two classes of logit 0, every prediction a square around its prior."""
    points = rtmdet.priors([(8, 8)], [8])
    return {
        "class_logits": torch.zeros(1, 64, 2),
        "boxes": rtmdet.decode(points[:, :2], torch.full((1, 64, 4), reach)),
        "priors": points,
        "inside": torch.ones(1, 64, dtype=torch.bool),
        **ground_truths(gts, labels),
    }


def random_scene(generator: torch.Generator, *, gts: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two images of 64 px on two levels; the second has one ground truth fewer, with a gap in the padding."""
    points = rtmdet.priors(SIZES, STRIDES)
    centre, size = 64 * torch.rand(2, gts, 2, generator=generator), 8 + 40 * torch.rand(2, gts, 2, generator=generator)
    distances = points[:, 2:3] * torch.randn(2, len(points), 4, generator=generator).exp()
    valid = torch.ones(2, gts, dtype=torch.bool)
    valid[1, 0] = False
    given = {
        "class_logits": 2 * torch.randn(2, len(points), 3, generator=generator),
        "boxes": rtmdet.decode(points[:, :2], distances),
        "priors": points,
        "inside": torch.rand(2, len(points), generator=generator) < 0.9,
        "gt_boxes": torch.cat([centre - size / 2, centre + size / 2], dim=-1),
        "gt_labels": torch.randint(3, (2, gts), generator=generator),
        "gt_valid": valid,
    }
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def of_stage(given: dict[str, Any], stage: str) -> dict[str, Any]:
    """Arguments of `candidates`, or of `cost`, from those of `assign`."""
    if stage == "candidates":
        return {name: given[name] for name in ("priors", "inside", "gt_boxes", "gt_valid")}
    candidate = rtmdet.candidates(**of_stage(given, "candidates"))
    return {name: value for name, value in given.items() if name != "inside"} | {"candidate": candidate}


# -------------------------------------------------------------------------------------------------------- priors
def test_priors_are_corners_level_by_level_and_row_by_row() -> None:
    points = rtmdet.priors([(2, 3), (1, 1)], [8, 16])
    corners = [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8]]
    assert points.tolist() == [[*corner, 8, 8] for corner in corners] + [[0, 0, 16, 16]]


def test_offset_and_unequal_strides() -> None:
    points = rtmdet.priors([(2, 1)], [(16, 8)], offset=0.5, like=torch.zeros((), dtype=torch.float64))
    assert points.tolist() == [[8.0, 4.0, 16.0, 8.0], [8.0, 12.0, 16.0, 8.0]]
    assert points.dtype == torch.float64


def test_strides_must_be_one_a_level() -> None:
    with pytest.raises(InputError, match=r"rtmdet\.priors: strides: expected one for each of 2 levels, got 1\."):
        rtmdet.priors(SIZES, [8])


# ----------------------------------------------------------------------------------------------- boxes, distances
def test_encode_is_the_inverse_of_decode() -> None:
    points = 8 * torch.arange(20.0).reshape(10, 2)
    distances = torch.arange(-20.0, 20.0).reshape(10, 4)
    assert torch.equal(rtmdet.encode(points, rtmdet.decode(points, distances)), distances)


def test_decode_clips_to_height_and_width() -> None:
    box = rtmdet.decode(torch.tensor([[8.0, 8.0]]), torch.tensor([[9.0, 1.0, 99.0, 99.0]]), max_shape=(48, 64))
    assert box.tolist() == [[0.0, 7.0, 64.0, 48.0]]


def test_encode_limits_to_less_than_the_maximum() -> None:
    point, box = torch.tensor([[8.0, 8.0]]), torch.tensor([[-92.0, 9.0, 16.0, 8.0]])
    assert rtmdet.encode(point, box, max_distance=16, eps=0.5).tolist() == [[15.5, 0.0, 8.0, 0.0]]


# ---------------------------------------------------------------------------------------------------- candidates
def test_a_prior_on_any_edge_is_no_candidate() -> None:
    given = scene([[8.0, 8.0, 24.0, 32.0]])
    candidate = rtmdet.candidates(**of_stage(given, "candidates"))
    assert given["priors"][candidate[0], :2].tolist() == [[16.0, 16.0], [16.0, 24.0]]


def test_padding_and_priors_that_take_no_part_are_left_out() -> None:
    given = scene([[7.0, 7.0, 17.0, 17.0], [39.0, 39.0, 57.0, 57.0]])
    given["gt_valid"][0, 1] = False
    given["inside"][0, 9] = False
    candidate = rtmdet.candidates(**of_stage(given, "candidates"))
    assert candidate[0].nonzero().flatten().tolist() == [10, 17, 18]


# ---------------------------------------------------------------------------------------------------------- cost
def test_cost_by_hand() -> None:
    """One candidate at (24, 24) of a ground truth centred at (24, 25), IoU 7/8, in the first of two classes."""
    given = of_stage(scene([[16.0, 18.0, 32.0, 32.0]]), "cost")
    logits = torch.tensor([1.0, -2.0])
    given["class_logits"] = logits.expand(1, 64, 2)
    # Of the candidates (24, 24) only: its prediction is (16, 16, 32, 32).
    cost, iou = rtmdet.cost(**given)
    at = 3 * 8 + 3
    assert iou[0, 0, at] == 7 / 8
    expected = 0.0
    for logit, target in ((1.0, 7 / 8), (-2.0, 0.0)):
        probability = 1 / (1 + math.exp(-logit))
        entropy = -target * math.log(probability) - (1 - target) * math.log(1 - probability)
        expected += entropy * (target - probability) ** 2
    expected += -3 * math.log(7 / 8 + 1e-7) + 10 ** (1 / 8 - 3)
    bounded, _ = explain_cost(**given)
    assert not outside(cost[0, 0, at], torch.tensor(expected).double(), bounded.error[0, 0, at])
    assert bounded.error[0, 0, at] < expected / 1e5


def test_cost_is_infinite_and_iou_zero_but_for_candidates_and_ground_truths() -> None:
    given = of_stage(random_scene(torch.Generator().manual_seed(0)), "cost")
    cost, iou = rtmdet.cost(**given)
    pairs = given["gt_valid"][..., None] & given["candidate"][:, None]
    assert torch.equal(cost.isfinite(), pairs)
    assert not iou[~pairs].any()


def test_radius_and_iou_weight_move_their_own_terms() -> None:
    given = of_stage(scene([[17.0, 17.0, 47.0, 47.0]]), "cost")
    exact = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    candidate = given["candidate"][0]
    usual, iou = (t[0, 0, candidate] for t in rtmdet.cost(**exact))
    heavier = rtmdet.cost(**exact, iou_weight=4.0)[0][0, 0, candidate]
    bounded = explain_cost(**exact, iou_weight=4.0, dtype=torch.float64)[0]
    error = VALUE_FACTOR * bounded.error[0, 0, candidate]
    assert not outside(heavier - usual, -torch.log(iou + 1e-7), error).any()
    nearer = rtmdet.cost(**exact, soft_center_radius=2.0)[0][0, 0, candidate]
    distance = (exact["priors"][candidate, :2] - 32).norm(dim=1) / 8
    assert not outside(nearer - usual, 9 * 10 ** (distance - 3), error).any()


def test_far_centres_cost_infinity() -> None:
    given = of_stage(scene([[17.0, 17.0, 31.0, 31.0], [400.0, 24.0, 416.0, 40.0]]), "cost")
    candidate = given["candidate"][0]
    cost, _ = rtmdet.cost(**given)
    assert cost[0, 1, candidate].isposinf().all()
    double = rtmdet.cost(**{**given, "gt_boxes": given["gt_boxes"].double(), "priors": given["priors"].double()})[0]
    assert double[0, 1, candidate].isfinite().all()


def test_masks_replace_the_centre_and_nothing_else() -> None:
    given = of_stage(scene([[15.0, 15.0, 49.0, 33.0]]), "cost")
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[..., 16:33, 24:41] = True  # centred at (32, 24)
    by_mask, iou = rtmdet.cost(**given, gt_masks=masks)
    by_box, same_iou = rtmdet.cost(**given)
    assert torch.equal(iou, same_iou)
    assert torch.equal(by_mask, by_box)  # the same centre either way
    masks[..., 16:33, 33:] = False  # centred at (28, 24)
    assert rtmdet.cost(**given, gt_masks=masks)[0][0, 0, 27] < by_box[0, 0, 27]


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_named_where_there_are_candidates(label: int) -> None:
    with pytest.raises(
        UpstreamRaises, match=r"rtmdet\.cost, image 0: rtmdet\.label-out-of-range: expected labels 0 to 1"
    ):
        rtmdet.assign(**scene([[17.0, 17.0, 31.0, 31.0]], [label]))
    assert not rtmdet.assign(**scene([[900.0, 900.0, 916.0, 916.0]], [label])).positive.any()


# ----------------------------------------------------------------------------------------------------- dynamic k
def matched_by_hand(cost: list[list[float]], iou: list[list[float]], topk: int) -> list[int]:
    """Dynamic k and conflicts of distinct costs, in plain Python."""
    claims: dict[int, list[int]] = {}
    for gt, (costs, ious) in enumerate(zip(cost, iou, strict=True)):
        k = max(int(sum(sorted(ious, reverse=True)[:topk])), 1)
        for prior in sorted(range(len(costs)), key=costs.__getitem__)[:k]:
            claims.setdefault(prior, []).append(gt)
    everybody = range(len(cost))
    return [
        -1 if n not in claims else claims[n][0] if len(claims[n]) == 1 else min(everybody, key=lambda g: cost[g][n])
        for n in range(len(cost[0]))
    ]


@pytest.mark.parametrize("topk", [0, 1, 2, 13])
def test_matching_by_brute_force(topk: int) -> None:
    generator = torch.Generator().manual_seed(topk)
    for gts, priors in itertools.product((1, 2, 4), (1, 3, 20)):
        cost = torch.randperm(gts * priors, generator=generator).reshape(1, gts, priors).float()
        iou = torch.randint(64, (1, gts, priors), generator=generator) / 64
        every = torch.ones(1, max(gts, priors), dtype=torch.bool)
        gt_index, _ = rtmdet.dynamic_k_matching(cost, iou, every[:, :priors], every[:, :gts], topk=topk)
        assert gt_index[0].tolist() == matched_by_hand(cost[0].tolist(), iou[0].tolist(), topk)


def test_perfect_predictions_all_count() -> None:
    generator = torch.Generator().manual_seed(3)
    for number in (1, 2, 3, 7, 13):
        given = scene([[17.0, 17.0, 47.0, 47.0]])
        corner, size = 17 + torch.rand(2, generator=generator), 20 + torch.rand(2, generator=generator)
        given["gt_boxes"] = torch.cat([corner, corner + size]).reshape(1, 1, 4)
        given["boxes"] = given["boxes"] - 1000
        candidate = rtmdet.candidates(**of_stage(given, "candidates"))[0].nonzero().flatten()
        given["boxes"][0, candidate[:number]] = given["gt_boxes"][0]
        assert rtmdet.assign(**given).extra["dynamic_k"].tolist() == [[min(number, len(candidate))]]


def test_only_so_many_of_the_best_ious_count() -> None:
    iou, every = torch.full((1, 1, 20), 0.75), torch.ones(1, 20, dtype=torch.bool)
    cost = torch.arange(20.0).reshape(1, 1, 20)
    for topk, k in ((13, 9), (4, 3), (1, 1), (100, 15)):
        gt_index, dynamic_k = rtmdet.dynamic_k_matching(cost, iou, every, every[:, :1], topk=topk)
        assert dynamic_k.tolist() == [[k]]
        assert gt_index[0].tolist() == [0] * k + [-1] * (20 - k)


def test_topk_below_zero_is_refused() -> None:
    one = torch.ones(1, 1, 1)
    with pytest.raises(InputError, match=r"rtmdet: topk: expected 0 or more, got -1\."):
        rtmdet.dynamic_k_matching(one, one, one[0] > 0, one[0] > 0, topk=-1)


# --------------------------------------------------------------------------------------------------------- assign
def test_priors_that_take_no_part_are_ignored() -> None:
    given = scene([[17.0, 17.0, 31.0, 31.0]])
    given["inside"][0, :8] = False
    result = rtmdet.assign(**given)
    assert result.gt_index[0].tolist() == [-2] * 8 + [-1] * 19 + [0] + [-1] * 36
    assert result.quality[0, 27] == 14**2 / 16**2
    assert result.quality.count_nonzero() == 1


@pytest.mark.parametrize("gts", [[], [[900.0, 900.0, 916.0, 916.0]], [[8.0, 8.0, 16.0, 16.0]]])
def test_without_a_candidate_all_is_background(gts: list[list[float]]) -> None:
    result = rtmdet.assign(**scene(gts))
    assert torch.equal(result.gt_index, torch.full((1, 64), -1))
    assert not result.quality.any()
    assert not result.extra["max_overlaps"].any()
    assert not result.extra["dynamic_k"].any()


def test_stored_overlaps_of_unmatched_priors() -> None:
    result = rtmdet.assign(**scene([[17.0, 17.0, 31.0, 31.0]]))
    unmatched = result.gt_index != 0
    assert set(result.extra["max_overlaps"][unmatched].tolist()) == {-1e8}
    assert torch.equal(result.extra["max_overlaps"][~unmatched], result.quality[~unmatched])


def test_padding_and_order_of_images_change_nothing() -> None:
    given = random_scene(torch.Generator().manual_seed(5))
    whole = rtmdet.assign(**given)
    for image in (0, 1):
        valid = given["gt_valid"][image]
        alone = {name: t if name == "priors" else t[image : image + 1] for name, t in given.items()}
        for name in ("gt_boxes", "gt_labels", "gt_valid"):
            alone[name] = alone[name][:, valid]
        result = rtmdet.assign(**alone)
        index = torch.where(result.gt_index >= 0, valid.nonzero().flatten()[result.gt_index], result.gt_index)
        assert torch.equal(whole.gt_index[image], index[0])
        assert torch.equal(whole.quality[image], result.quality[0])


def test_permuted_ground_truths_permute_the_result() -> None:
    given = random_scene(torch.Generator().manual_seed(6))
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {n: t[:, order] if n.startswith("gt_") else t for n, t in given.items()}
    index = rtmdet.assign(**permuted).gt_index
    assert torch.equal(torch.where(index >= 0, order[index], index), rtmdet.assign(**given).gt_index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    given = random_scene(torch.Generator().manual_seed(7), dtype=dtype)
    result = rtmdet.assign(**given)
    assert result.quality.dtype == dtype
    assert result.positive.any()


def test_nothing_flows_back_and_nothing_is_written_to() -> None:
    given = random_scene(torch.Generator().manual_seed(8))
    before, versions = copy.deepcopy(given), {name: tensor._version for name, tensor in given.items()}
    for name in ("class_logits", "boxes"):
        given[name].requires_grad_()
    result = rtmdet.assign(**given)
    assert not result.quality.requires_grad
    for name, tensor in given.items():
        assert tensor._version == versions[name]
        assert torch.equal(tensor, before[name])


def test_boxes_without_a_batch_are_refused() -> None:
    given = scene([[17.0, 17.0, 31.0, 31.0]])
    with pytest.raises(InputError, match=r"rtmdet\.assign: boxes: expected a float Tensor of shape \(B, A, 4\)"):
        rtmdet.assign(**{**given, "boxes": given["boxes"][0]})


def positives(index: Tensor) -> dict[int, int]:
    return {int(n): int(index[n]) for n in (index >= 0).nonzero()}


def test_conflict_goes_to_the_cheapest_of_all() -> None:
    cost = torch.tensor([[[2.0, 9.0], [3.0, 9.0], [1.0, 0.5]]])
    iou = torch.tensor([[[0.5, 0.0], [0.5, 0.0], [0.9, 0.5]]])
    every = torch.ones(1, 3, dtype=torch.bool)
    gt_index, _ = rtmdet.dynamic_k_matching(cost, iou, every[:, :2], every)
    assert positives(gt_index[0]) == {0: 2, 1: 2}
