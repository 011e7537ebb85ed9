"""MaxIoU assignment, sampling and targets: worked examples, plain loops, ties, limits, errors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.reference.anchor_head import assign, sample, targets
from detoracle.reference.anchor_head_coder import encode
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.errors import InputError, UpstreamRaises

CELLS = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]])


def one_image(gts: list[list[float]], anchors: Tensor = CELLS) -> dict[str, Any]:
    return {
        "anchors": anchors,
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "inside": torch.ones(1, len(anchors), dtype=torch.bool),
    }


def assigned(gts: list[list[float]], anchors: Tensor = CELLS, **rules: Any) -> list[int]:
    outcome: list[int] = assign(**one_image(gts, anchors), **rules).gt_index[0].tolist()
    return outcome


def batch(seed: int, *, images: int = 3, gts: int = 5, anchors: int = 40) -> dict[str, Any]:
    """Integer boxes, so that many IoUs tie; padding and anchors outside at random places."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        corner = torch.randint(0, 12, (*shape, 2), generator=generator)
        return torch.cat([corner, corner + torch.randint(1, 9, (*shape, 2), generator=generator)], dim=-1).double()

    return {
        "anchors": boxes(anchors),
        "gt_boxes": boxes(images, gts),
        "gt_valid": torch.rand(images, gts, generator=generator) < 0.8,
        "inside": torch.rand(images, anchors, generator=generator) < 0.8,
        "ignore_boxes": boxes(images, 2),
        "ignore_valid": torch.rand(images, 2, generator=generator) < 0.7,
    }


# --------------------------------------------------------------------------------------------------------- assign
def slow_assign(
    overlap: list[list[float]],
    background: tuple[float, float],
    positive: float,
    least: float,
    every: bool,
    claims: bool,
) -> list[int]:
    """Assignment of one image by plain loops: row of the ground truth, -1, or -2."""
    outcome = []
    for column in zip(*overlap, strict=True):
        best = max(column)
        low, high = background
        outcome.append(column.index(best) if best >= positive else -1 if low <= best < high else -2)
    for row, overlaps in enumerate(overlap):
        best = max(overlaps)
        if claims and best >= least:
            ties = [n for n, value in enumerate(overlaps) if value == best]
            for n in ties if every else ties[:1]:
                outcome[n] = row
    return outcome


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("least", [0.0, 0.3])
@pytest.mark.parametrize(("every", "claims"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("negative", [0.4, (0.1, 0.4), (0.0, 0.7)])
def test_assign_equals_plain_loops(
    negative: float | tuple[float, float], every: bool, claims: bool, least: float, seed: int
) -> None:
    given = batch(seed)
    result = assign(
        **given,
        pos_iou_thr=0.5,
        neg_iou_thr=negative,
        min_pos_iou=least,
        gt_max_assign_all=every,
        match_low_quality=claims,
        ignore_iof_thr=0.6,
    )
    pair = (0.0, negative) if isinstance(negative, float) else negative
    for image, (valid, inside) in enumerate(zip(given["gt_valid"], given["inside"], strict=True)):
        boxes, rows = given["anchors"][inside], valid.nonzero().flatten().tolist()
        overlap = overlaps_mmdet(given["gt_boxes"][image, valid], boxes)
        regions = given["ignore_boxes"][image, given["ignore_valid"][image]]
        for n, m in itertools.product(range(len(boxes)), range(len(regions))):
            if overlaps_mmdet(boxes[n : n + 1], regions[m : m + 1], mode="iof").item() > 0.6:
                overlap[:, n] = -1
        expected = slow_assign(overlap.tolist(), pair, 0.5, least, every, claims)
        assert result.gt_index[image, inside].tolist() == [rows[g] if g >= 0 else g for g in expected]
        quality = [overlap[g, n].item() if g >= 0 else 0.0 for n, g in enumerate(expected)]
        assert result.quality[image, inside].tolist() == quality
        assert (result.gt_index[image, ~inside] == -2).all()
        assert (result.quality[image, ~inside] == 0).all()


def test_the_thresholds_include_their_lower_ends() -> None:
    half, quarter = [0.0, 0, 8, 4], [8.0, 0, 12, 4]  # IoUs 1/2 and 1/4 exactly
    for claims in (True, False):
        rules: dict[str, Any] = {"neg_iou_thr": 0.25, "match_low_quality": claims, "min_pos_iou": 0.3}
        assert assigned([half, quarter], pos_iou_thr=0.5, **rules) == [0, -2, -1, -1]
    assert assigned([half], pos_iou_thr=0.5 + 2**-20, match_low_quality=False) == [-2, -1, -1, -1]
    assert assigned([quarter], neg_iou_thr=0.25 + 2**-20, match_low_quality=False) == [-1, -1, -1, -1]
    assert assigned([quarter], neg_iou_thr=(0.25, 0.5), match_low_quality=False) == [-2, -1, -2, -2]


def test_the_least_overlap_is_included() -> None:
    quarter = [8.0, 0, 12, 4]
    assert assigned([quarter], min_pos_iou=0.25) == [-1, 0, -1, -1]
    assert assigned([quarter], min_pos_iou=0.25 + 2**-20) == [-1, -1, -1, -1]


def test_all_that_tie_are_claimed_or_the_first() -> None:
    across = [6.0, 6, 10, 10]  # overlaps all four cells alike
    assert assigned([across]) == [0, 0, 0, 0]
    assert assigned([across], gt_max_assign_all=False) == [0, -1, -1, -1]


def test_an_anchor_between_the_thresholds_is_left_out() -> None:
    assert assigned([[0.0, 0, 8, 3.5]], match_low_quality=False) == [-2, -1, -1, -1]


def test_without_ground_truths_everything_inside_is_background() -> None:
    given = one_image([])
    given["inside"][0, 2] = False
    assert assign(**given).gt_index.tolist() == [[-1, -1, -2, -1]]


def test_without_anchors_nothing_is_assigned() -> None:
    given = one_image([[0.0, 0, 8, 8]], torch.zeros(0, 4))
    assert assign(
        **given, ignore_boxes=CELLS[None, :1], ignore_valid=given["gt_valid"], ignore_iof_thr=0.5
    ).gt_index.shape == (1, 0)
    given = one_image([[0.0, 0, 8, 8]])
    given["inside"][:] = False
    assert assign(**given).gt_index.tolist() == [[-2] * 4]


def test_padding_changes_nothing_but_the_names() -> None:
    given = batch(9)
    result = assign(**given)
    for image, valid in enumerate(given["gt_valid"]):
        alone = {
            "anchors": given["anchors"],
            "gt_boxes": given["gt_boxes"][image : image + 1, valid],
            "gt_valid": valid[valid][None],
            "inside": given["inside"][image : image + 1],
        }
        expected = assign(**alone).gt_index[0]
        rows = valid.nonzero().flatten()
        assert torch.equal(result.gt_index[image], torch.where(expected >= 0, rows[expected.clamp(min=0)], expected))


def test_ignored_regions_are_off_by_default_and_at_zero() -> None:
    given = {**one_image([[0.0, 0, 8, 8]]), "ignore_boxes": CELLS[None], "ignore_valid": torch.ones(1, 4).bool()}
    for threshold in (-1.0, 0.0):
        assert assign(**given, ignore_iof_thr=threshold).gt_index.tolist() == [[0, -1, -1, -1]]
    assert assign(**given, ignore_iof_thr=0.5).gt_index.tolist() == [[-2] * 4]


def test_a_share_at_the_threshold_is_not_ignored() -> None:
    half_of_last = torch.tensor([[[8.0, 8, 16, 12]]])
    given = {**one_image([[0.0, 0, 8, 8]]), "ignore_boxes": half_of_last, "ignore_valid": torch.ones(1, 1).bool()}
    assert assign(**given, ignore_iof_thr=0.5).gt_index.tolist() == [[0, -1, -1, -1]]
    assert assign(**given, ignore_iof_thr=0.5 - 2**-20).gt_index.tolist() == [[0, -1, -1, -2]]


def test_float64_decides_in_float64() -> None:
    # 1 part in 2^40 above half the cell: float32 cannot tell.
    given = one_image([[0.0, 0, 8, 4]])
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    given["gt_boxes"][0, 0, 3] -= 2**-40
    assert assign(**given, match_low_quality=False, neg_iou_thr=0.5).gt_index.tolist() == [[-1] * 4]


def test_no_gradient_flows() -> None:
    given = one_image([[0.0, 0, 8, 8]])
    given["anchors"] = given["anchors"].clone().requires_grad_()
    assert not assign(**given).quality.requires_grad


@pytest.mark.parametrize("value", [1, "0.4", (0.1, 0.2, 0.3), {"low": 0.1}])
def test_another_kind_of_threshold_is_refused(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        assign(**one_image([[0.0, 0, 8, 8]]), neg_iou_thr=value)
    assert str(caught.value).startswith("anchor_head.assign: neg_iou_thr: expected a float or a pair of them, got ")
    assert str(caught.value).endswith("say (0.0, 0.0) for that.")


def test_inputs_stay_as_they_are() -> None:
    given = batch(1)
    before = copy.deepcopy(given)
    result = assign(**given, ignore_iof_thr=0.5)
    positive, negative, _ = sample(result.gt_index, num=4)
    labels = torch.zeros(given["gt_valid"].shape, dtype=torch.int64)
    targets(given["anchors"], result.gt_index, given["gt_boxes"], labels, positive, negative, num_classes=1)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_shapes_are_checked() -> None:
    given = one_image([[0.0, 0, 8, 8]])
    with pytest.raises(InputError, match=r"anchor_head.assign: inside: expected a bool Tensor of shape \(B, A\) with"):
        assign(**{**given, "inside": torch.ones(1, 5, dtype=torch.bool)})


# --------------------------------------------------------------------------------------------------------- sample
def test_pseudo_takes_all() -> None:
    gt_index = torch.tensor([[1, -1, -2, 0, -1]])
    positive, negative, added = sample(gt_index, sampler="pseudo")
    assert positive.tolist() == [[True, False, False, True, False]]
    assert negative.tolist() == [[False, True, False, False, True]]
    assert added.shape == (1, 0)


@pytest.mark.parametrize(
    ("positives", "background", "settings", "expected"),
    [
        (10, 50, {"num": 16}, (8, 8)),
        (3, 50, {"num": 16}, (3, 13)),
        (3, 5, {"num": 16}, (3, 5)),
        (10, 50, {"num": 16, "pos_fraction": 0.25}, (4, 12)),
        (10, 50, {"num": 16, "pos_fraction": 0.3}, (4, 12)),  # truncated, not rounded
        (3, 50, {"num": 16, "neg_pos_ub": 2.0}, (3, 6)),
        (3, 50, {"num": 16, "neg_pos_ub": 0.0}, (3, 0)),
        (0, 50, {"num": 16, "neg_pos_ub": 5.0}, (0, 5)),
        (0, 50, {"num": 16}, (0, 16)),
    ],
)
def test_numbers_of_a_random_sample(
    positives: int, background: int, settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    gt_index = torch.tensor([[0] * positives + [-2] * 7 + [-1] * background])
    positive, negative, _ = sample(gt_index, **settings)
    assert (int(positive.sum()), int(negative.sum())) == expected
    assert (gt_index[positive] >= 0).all()
    assert (gt_index[negative] == -1).all()


def test_one_generator_serves_the_batch_positives_first() -> None:
    gt_index = torch.tensor([[0] * 6 + [-1] * 6] * 2)
    positive, negative, _ = sample(gt_index, num=4, seed=5)
    generator = torch.Generator().manual_seed(5)
    for image in range(2):
        for mask, start in ((positive, 0), (negative, 6)):
            drawn = torch.randperm(6, generator=generator)[:2] + start
            assert mask[image].nonzero().flatten().tolist() == sorted(drawn.tolist())


def test_a_sample_that_takes_all_draws_nothing() -> None:
    few, many = [0] * 2 + [-2] * 4 + [-1] * 6, [0] * 6 + [-1] * 6
    after = sample(torch.tensor([few, many]), num=4, seed=1)
    generator = torch.Generator().manual_seed(1)
    torch.randperm(6, generator=generator)  # the first image's background
    drawn = torch.randperm(6, generator=generator)[:2]
    assert after[0][1].nonzero().flatten().tolist() == sorted(drawn.tolist())


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    sample(torch.tensor([[0] * 50]), num=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_added_ground_truths_are_drawn_before_the_anchors() -> None:
    gt_index, labels = torch.tensor([[-1, 1, 0, -1]]), torch.tensor([[0, 0, 0]])
    valid = torch.tensor([[True, False, True]])
    positive, negative, added = sample(gt_index, labels, valid, num=6, seed=2, add_gt_as_proposals=True)
    generator = torch.Generator().manual_seed(2)
    pool = ["gt 0", "gt 2", "anchor 1", "anchor 2"]
    drawn = {pool[i] for i in torch.randperm(4, generator=generator)[:3].tolist()}
    found = {f"gt {g}" for g in added[0].nonzero().flatten().tolist()}
    found |= {f"anchor {n}" for n in positive[0].nonzero().flatten().tolist()}
    assert found == drawn
    assert negative.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("missing", ["gt_labels", "gt_valid"])
def test_added_ground_truths_need_labels(missing: str) -> None:
    given: dict[str, Any] = {"gt_labels": torch.zeros(1, 1, dtype=torch.int64), "gt_valid": torch.ones(1, 1) > 0}
    with pytest.raises(UpstreamRaises, match=r"anchor_head\.added-gt-needs-labels: expected gt_labels and gt_valid"):
        sample(torch.tensor([[0]]), **{**given, missing: None}, add_gt_as_proposals=True)
    assert sample(torch.tensor([[0]]), sampler="pseudo", add_gt_as_proposals=True)[0].tolist() == [[True]]


# -------------------------------------------------------------------------------------------------------- targets
def made(**settings: Any) -> tuple[Tensor, ...]:
    """Targets of one image: a positive of each of two ground truths, background, left out, positive but not sampled."""
    return targets(
        torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16], [0, 0, 4, 4]]),
        torch.tensor([[1, 0, -1, -2, 0]]),
        torch.tensor([[[8.0, 4, 16, 8], [4.0, 0, 12, 8]]]),
        torch.tensor([[2, 0]]),
        torch.tensor([[True, True, False, False, False]]),
        torch.tensor([[False, False, True, False, False]]),
        num_classes=3,
        **settings,
    )


def test_targets_by_hand() -> None:
    labels, label_weights, box_targets, box_weights, num_positives, num_negatives = made()
    assert labels.tolist() == [[0, 2, 3, 3, 3]]
    assert label_weights.tolist() == [[1, 1, 1, 0, 0]]
    half = torch.log(torch.tensor(0.5)).item()
    assert box_targets.tolist() == [[[0.5, 0, 0, 0], [0, 0.25, 0, half], [0] * 4, [0] * 4, [0] * 4]]
    assert box_weights.tolist() == [[[1] * 4, [1] * 4, [0] * 4, [0] * 4, [0] * 4]]
    assert (int(num_positives), int(num_negatives)) == (2, 1)


def test_decoded_targets_are_the_ground_truths() -> None:
    box_targets = made(reg_decoded_bbox=True)[2]
    assert box_targets.tolist() == [[[4, 0, 12, 8], [8, 4, 16, 8], [0] * 4, [0] * 4, [0] * 4]]


@pytest.mark.parametrize(("pos_weight", "expected"), [(2.5, 2.5), (0.0, 1.0), (-1.0, 1.0)])
def test_positives_weigh_what_is_set_if_above_zero(pos_weight: float, expected: float) -> None:
    assert made(pos_weight=pos_weight)[1].tolist() == [[expected, expected, 1, 0, 0]]


def test_targets_are_encoded_with_means_and_deviations() -> None:
    settings: dict[str, Any] = {"means": (0.1, 0.2, 0.3, 0.4), "stds": (0.1, 0.1, 0.2, 0.2)}
    pair = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[4.0, 0, 12, 8]])
    assert torch.equal(made(**settings)[2][0, :1], encode(*pair, **settings))


def test_images_without_ground_truths_have_targets_too() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    labels, weights, box_targets, _, num_positives, num_negatives = targets(
        CELLS,
        torch.full((2, 4), -1),
        torch.zeros(2, 0, 4),
        torch.zeros(2, 0, dtype=torch.int64),
        nothing,
        ~nothing,
        num_classes=7,
    )
    assert (labels == 7).all()
    assert (weights == 1).all()
    assert (box_targets == 0).all()
    assert (int(num_positives), int(num_negatives)) == (2, 8)


def test_what_is_not_positive_has_finite_targets() -> None:
    # The unsampled anchors' matched boxes are not encoded into the result: no NaN from boxes without area.
    point = torch.tensor([[[5.0, 5, 5, 5]]])
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    result = targets(
        CELLS,
        torch.zeros(1, 4, dtype=torch.int64),
        point,
        torch.zeros(1, 1, dtype=torch.int64),
        nothing,
        nothing,
        num_classes=1,
    )
    assert (result[2] == 0).all()
