from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.reference import ssd
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.ssd import (
    explain_hard_negatives,
    explain_log_sum_exp,
    explain_loss,
    explain_match,
    explain_priors,
    loss_given,
)

QUADRANTS = torch.tensor(
    [[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]
)
MINI = ssd.priors(
    image_size=64,
    feature_maps=[8, 4, 2, 1],
    steps=[8, 16, 32, 64],
    min_sizes=[10, 22, 36, 50],
    max_sizes=[22, 36, 50, 64],
    aspect_ratios=[[2], [2, 3], [2], [2]],
)
Overlap = Callable[[Tensor, Tensor], Tensor]


def scene(
    generator: torch.Generator, priors: Tensor, *, smallest: float, gts: int = 6, spread: float = 3.0
) -> dict[str, Any]:
    """Two images of random boxes, none with sides below a size, and random predictions."""
    centre = torch.rand(2, gts, 2, generator=generator)
    size = smallest * (0.9 / smallest) ** torch.rand(2, gts, 2, generator=generator)
    return {
        "loc": torch.randn(2, len(priors), 4, generator=generator),
        "conf": spread * torch.randn(2, len(priors), 4, generator=generator),
        "priors": priors,
        "gt_boxes": torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1),
        "gt_labels": torch.randint(3, (2, gts), generator=generator),
        "gt_valid": torch.ones(2, gts, dtype=torch.bool),
    }


def matching(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("priors", "gt_boxes", "gt_labels", "gt_valid")}


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in arguments.items()}


def ground_truths(gts: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    return {
        "gt_boxes": torch.tensor([gts]),
        "gt_labels": torch.tensor([labels or [0] * len(gts)]),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
    }


# ------------------------------------------------------------------------------------ other right ways to compute
def overlap_from_sizes(priors: Tensor, gt_boxes: Tensor) -> Tensor:
    """Areas from widths and heights, the right bottom corner from the left top one, the terms in another order."""
    left_top = priors[:, :2] - 0.5 * priors[:, 2:]
    right_bottom = left_top + priors[:, 2:]
    sides = torch.minimum(right_bottom, gt_boxes[:, None, 2:]) - torch.maximum(left_top, gt_boxes[:, None, :2])
    intersection = sides.clamp(min=0).prod(-1)
    rest = (priors[:, 2] * priors[:, 3] - intersection) + (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(-1)[:, None]
    return intersection / rest


def overlap_in_double(priors: Tensor, gt_boxes: Tensor) -> Tensor:
    return ssd._overlap(priors.double(), gt_boxes.double()).to(priors.dtype)


def match_by(overlap: Overlap, given: dict[str, Any]) -> Tensor:
    images = []
    for boxes, labels in zip(given["gt_boxes"], given["gt_labels"], strict=True):
        pairs = overlap(given["priors"], boxes)
        best, matched = ssd._force(*ssd._best_ground_truth(pairs), ssd._best_prior(pairs))
        images.append(torch.where(ssd._class_target(best, matched, labels, 0.5) > 0, matched, -1))
    return torch.stack(images)


def mine(mining_loss: Tensor, matched: Tensor) -> Tensor:
    positive = matched >= 0
    negative = ssd._hardest(mining_loss.masked_fill(positive, 0), ssd._num_negatives(positive, 3))
    return torch.where(positive, matched, torch.where(negative, -1, -2))


# ---------------------------------------------------------------------------------------------------- soundness
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("overlap", [ssd._overlap, overlap_from_sizes, overlap_in_double])
def test_a_right_match_is_never_wrong(overlap: Overlap, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(15):
        given = in_dtype(matching(scene(generator, MINI, smallest=0.03)), dtype)
        assert not explain_match(**given, dtype=dtype).wrong(match_by(overlap, given)).any()


@pytest.mark.parametrize("spread", [3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_right_ranking_is_never_wrong(spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        given = in_dtype(scene(generator, MINI, smallest=0.1, spread=spread), dtype)
        conf, matched = given["conf"], ssd.match(**matching(given)).gt_index
        explanation = explain_loss(**given, dtype=dtype)
        assert not explanation.wrong(mine(ssd.log_sum_exp(conf) - conf[..., 0], matched)).any()
        summed_backwards = torch.log(torch.exp(conf - conf.max()).flip(-1).cumsum(-1)[..., -1])
        assert not explanation.wrong(mine(summed_backwards + (conf.max() - conf[..., 0]), matched)).any()
        if spread < 10:
            own_maximum = torch.logsumexp(conf, -1) - conf[..., 0]
            assert not explanation.wrong(mine(own_maximum, matched)).any()


def test_a_generic_scene_leaves_next_to_nothing_open() -> None:
    generator, priors = torch.Generator().manual_seed(3), ssd.priors()
    positives = ambiguous = 0
    for _ in range(6):
        explanation = explain_match(**matching(scene(generator, priors, smallest=0.12)))
        positives += int((explanation.gt_index >= 0).sum())
        ambiguous += int(explanation.ambiguous.sum())
    assert positives > 200
    assert ambiguous < positives / 100


def test_the_float64_oracle_is_the_first_outcome() -> None:
    given = scene(torch.Generator().manual_seed(4), MINI, smallest=0.03)
    exact = in_dtype(given, torch.float64)
    matched = ssd.match(**matching(exact)).gt_index
    assert torch.equal(explain_match(**matching(given)).gt_index, matched)
    mined = ssd.hard_negatives(exact["conf"], matched, given["gt_labels"]).gt_index
    assert torch.equal(explain_loss(**given).gt_index, mined)
    assert torch.equal(explain_hard_negatives(given["conf"], matched, given["gt_labels"]).gt_index, mined)


def test_a_nan_overlap_is_no_lesser_one() -> None:
    priors = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]])
    given: dict[str, Any] = {"priors": priors, **ground_truths([[0.5, 0.5, 0.5, 0.5]])}
    explanation, matched = explain_match(**given), ssd.match(**given).gt_index
    assert torch.equal(explanation.gt_index, matched)
    assert not explanation.wrong(matched).any()


def test_quality_is_the_overlap_of_what_is_assigned() -> None:
    given = matching(scene(torch.Generator().manual_seed(5), MINI, smallest=0.1))
    result = ssd.match(**given)
    bounded = explain_match(**given).quality(result.gt_index)
    assert ((result.quality.double() - bounded.value).abs() <= bounded.error).all()


def test_targets_are_those_of_what_is_assigned() -> None:
    given = matching(scene(torch.Generator().manual_seed(12), MINI, smallest=0.1))
    result = ssd.match(**given)
    targets: Any = explain_match(**given).targets(result.gt_index)
    assert torch.equal(targets["class_target"], result.extra["class_target"])
    assert (
        (result.extra["loc_target"].double() - targets["loc_target"].value).abs() <= targets["loc_target"].error
    ).all()
    assert not targets["loc_target"].value[result.gt_index < 0].any()
    given["gt_labels"][0, 0] = -2
    assert set(explain_match(**given).targets(result.gt_index)) == {"loc_target"}


# ---------------------------------------------------------------------------------------------------- sharpness
def test_overlap_at_the_threshold_is_no_background() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 1.0]])
    explanation = explain_match(QUADRANTS, **gts)
    # Either of the second ground truth's quadrants may be its best prior; the other one is at 0.5 exactly.
    assert not explanation.ambiguous.any()
    assert explanation.wrong(torch.tensor([[0, 1, -1, -1]])).tolist() == [[False, False, False, True]]


def test_twins_share_the_prior_at_the_threshold_either_way() -> None:
    priors = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.125, 0.25, 0.25, 0.5]])
    explanation = explain_match(priors, **ground_truths([[0.0, 0.0, 0.5, 0.5]] * 2))
    right = {
        pair for pair in itertools.product([0, 1, -1], repeat=2) if not explanation.wrong(torch.tensor([pair])).any()
    }
    assert right == {(1, 0), (1, 1)}


def test_the_first_of_two_does_not_keep_a_shared_best_prior() -> None:
    gts = ground_truths([[0.0, 0.0, 0.5, 0.5]] * 2, [0, 1])
    explanation = explain_match(QUADRANTS, **gts)
    assert not explanation.wrong(torch.tensor([[1, -1, -1, -1]])).any()
    assert explanation.wrong(torch.tensor([[0, -1, -1, -1]])).any()


def test_every_ground_truth_gets_a_best_prior_and_only_one() -> None:
    # A small box in the middle of four priors that all contain it.
    priors = torch.tensor(
        [[0.46, 0.46, 0.3, 0.3], [0.54, 0.46, 0.3, 0.3], [0.46, 0.54, 0.3, 0.3], [0.1, 0.1, 0.2, 0.2]]
    )
    gts = ground_truths([[0.475, 0.475, 0.525, 0.525]])
    explanation = explain_match(priors, **gts)
    right = {
        outcome
        for outcome in itertools.product([0, -1], repeat=4)
        if not explanation.wrong(torch.tensor([outcome])).any()
    }
    assert right == {(0, -1, -1, -1), (-1, 0, -1, -1), (-1, -1, 0, -1)}
    assert {tuple(outcome[0].tolist()) for outcome in explanation.alternatives(99)} == right


def test_a_ground_truth_outside_may_take_any_prior_but_takes_one() -> None:
    gts = ground_truths([[5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 0.5, 0.5]])
    explanation = explain_match(QUADRANTS, **gts)
    right = {
        outcome
        for outcome in itertools.product([0, 1, -1], repeat=4)
        if not explanation.wrong(torch.tensor([outcome])).any()
    }
    # The second ground truth may also have taken the first one's prior away.
    assert right == {(1, -1, -1, -1), (1, 0, -1, -1), (1, -1, 0, -1), (1, -1, -1, 0)}
    assert {tuple(outcome[0].tolist()) for outcome in explanation.alternatives(99)} == right


@pytest.mark.parametrize("kept_by_the_first", [True, False], ids=["first-gt-keeps", "nothing-is-forced"])
def test_a_wrong_conflict_rule_is_wrong(kept_by_the_first: bool) -> None:
    generator, differing = torch.Generator().manual_seed(6), 0
    for _ in range(20):
        given = matching(scene(generator, MINI, smallest=0.3, gts=10))
        images = []
        for boxes in given["gt_boxes"]:
            pairs = ssd._overlap(MINI, boxes)
            best, matched = ssd._best_ground_truth(pairs)
            outcome = torch.where(best < 0.5, -1, matched)
            if kept_by_the_first:
                for gt, prior in reversed(list(enumerate(ssd._best_prior(pairs).tolist()))):
                    outcome[prior] = gt
            images.append(outcome)
        explanation, differs = explain_match(**given), torch.stack(images) != ssd.match(**given).gt_index
        clear = ~explanation.ambiguous
        assert torch.equal(explanation.wrong(torch.stack(images))[clear], differs[clear])
        differing += int(differs[clear].any())
    assert differing > 10


@pytest.mark.parametrize("threshold", [0.45, 0.55])
def test_another_threshold_is_wrong(threshold: float) -> None:
    given = matching(scene(torch.Generator().manual_seed(7), MINI, smallest=0.3))
    assert explain_match(**given).wrong(ssd.match(**given, threshold=threshold).gt_index).any()
    assert not explain_match(**given, threshold=threshold).wrong(ssd.match(**given, threshold=threshold).gt_index).any()


def test_a_wrong_number_of_negatives_is_wrong() -> None:
    given = scene(torch.Generator().manual_seed(8), MINI, smallest=0.2)
    explanation = explain_loss(**given)
    matched = ssd.match(**matching(given)).gt_index
    right = ssd.hard_negatives(given["conf"], matched, given["gt_labels"]).gt_index
    assert not explanation.wrong(right).any()
    for image, prior in ((right == -1).nonzero()[0].tolist(), (right == -2).nonzero()[0].tolist()):
        changed = right.clone()
        changed[image, prior] = -3 - right[image, prior]
        assert explanation.wrong(changed).nonzero().tolist() == [[image, prior]]
    assert not explain_hard_negatives(given["conf"], matched, given["gt_labels"]).ambiguous.any()
    fewer = ssd.hard_negatives(given["conf"], matched, given["gt_labels"], neg_pos=2).gt_index
    assert explanation.wrong(fewer).any()


def test_tied_negatives_are_interchangeable_but_counted() -> None:
    conf, matched, label = torch.zeros(1, 5, 2), torch.tensor([[0, -1, -1, -1, -1]]), torch.tensor([[0]])
    explanation = explain_hard_negatives(conf, matched, label, neg_pos=2)
    right = {
        outcome
        for outcome in itertools.product([0], *[[-1, -2]] * 4)
        if not explanation.wrong(torch.tensor([outcome])).any()
    }
    assert right == {outcome for outcome in itertools.product([0], *[[-1, -2]] * 4) if outcome.count(-1) == 2}
    assert {tuple(outcome[0].tolist()) for outcome in explanation.alternatives(99)} == right


def test_a_positive_can_take_a_place_only_among_losses_of_zero() -> None:
    # Background logits so sure that the loss is 0 exactly tie with the positive's 0.
    conf = torch.tensor([[[0.0, 0.0], [200.0, 0.0], [200.0, 0.0], [0.0, 200.0]]])
    matched, label = torch.tensor([[0, -1, -1, -1]]), torch.tensor([[0]])
    explanation = explain_hard_negatives(conf, matched, label, neg_pos=2)
    admissible = {(0, -1, -2, -1), (0, -2, -1, -1), (0, -2, -2, -1)}
    for outcome in itertools.product([0], *[[-1, -2]] * 3):
        assert bool(explanation.wrong(torch.tensor([outcome])).any()) == (outcome not in admissible)


def test_rows_that_underflow_for_certain_rank_last() -> None:
    conf = torch.tensor([[[300.0, 0.0], [0.0, 50.0], [300.0, 300.0]]])
    matched, label = torch.tensor([[0, -1, -1]]), torch.tensor([[0]])
    explanation = explain_hard_negatives(conf, matched, label, neg_pos=1)
    assert explanation.gt_index.tolist() == [[0, -2, -1]]
    assert not explanation.ambiguous.any()
    by_own_maximum = mine(torch.logsumexp(conf, -1) - conf[..., 0], matched)
    assert explanation.wrong(by_own_maximum).any()


def test_rows_that_may_underflow_rank_no_higher_than_they_would_without() -> None:
    conf = torch.tensor([[[0.0, 0.0], [0.0, 5.0], [-97.0, -95.0], [0.0, 0.0]]])
    matched, label = torch.tensor([[0, -1, -1, -1]]), torch.tensor([[0]])
    one, two = (explain_hard_negatives(conf, matched, label, neg_pos=number) for number in (1, 2))
    assert one.ambiguous.tolist() == [[False] * 4]
    assert two.ambiguous.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_log_sum_exp_is_bounded_down_to_the_underflow(dtype: torch.dtype) -> None:
    gaps = torch.arange(0, 800, 0.25, dtype=torch.float64)
    conf = torch.stack([-gaps, -gaps - 1, -gaps], dim=-1)[None].to(dtype)
    recorded, bounded = ssd.log_sum_exp(conf).double(), explain_log_sum_exp(conf, dtype=dtype)
    same = recorded == bounded.value
    assert (same | ((recorded - bounded.value).abs() <= bounded.error)).all()
    assert bounded.value[0, -1].item() == -torch.inf
    assert bounded.error[0, -1].item() == 0


def test_negatives_are_judged_by_the_positives_beside_them() -> None:
    # One ground truth fits two priors alike, so either is positive, and then the other one is the hardest negative.
    priors = torch.tensor([[0.45, 0.5, 0.3, 0.3], [0.55, 0.5, 0.3, 0.3], [0.1, 0.1, 0.2, 0.2], [0.9, 0.9, 0.2, 0.2]])
    gts = ground_truths([[0.475, 0.475, 0.525, 0.525]])
    conf = torch.tensor([[[0.0, 9.0], [0.0, 8.0], [0.0, 1.0], [0.0, 0.0]]])
    explanation = explain_loss(torch.zeros(1, 4, 4), conf, priors, **gts, neg_pos=1)
    right = {
        outcome
        for outcome in itertools.product([0, -1, -2], repeat=4)
        if not explanation.wrong(torch.tensor([outcome])).any()
    }
    assert right == {(0, -1, -2, -2), (-1, 0, -2, -2)}
    assert {tuple(outcome[0].tolist()) for outcome in explanation.alternatives(99)} == right


# ------------------------------------------------------------------------------------------------ loss and priors
def test_loss_given_bounds_the_float32_loss() -> None:
    generator = torch.Generator().manual_seed(9)
    for _ in range(5):
        given = scene(generator, MINI, smallest=0.1, spread=20.0)
        chosen = ssd.hard_negatives(given["conf"], ssd.match(**matching(given)).gt_index, given["gt_labels"]).gt_index
        bounded, parts = loss_given(chosen, **given), ssd.loss(**given)
        for name, part in parts.items():
            assert abs(float(part) - float(bounded[name].value)) <= float(bounded[name].error)
            # One unit in the last place for each prior whose loss is added up.
            assert float(bounded[name].error) < int((chosen > -2).sum()) * torch.finfo(torch.float32).eps * float(part)


def test_loss_given_of_the_oracles_choice_is_its_loss() -> None:
    given = scene(torch.Generator().manual_seed(10), MINI, smallest=0.1)
    chosen = ssd.hard_negatives(given["conf"], ssd.match(**matching(given)).gt_index, given["gt_labels"]).gt_index
    parts, again = ssd.loss(**given), loss_given(chosen, **given, dtype=None)
    assert {name: float(part) for name, part in parts.items()} == {name: float(part) for name, part in again.items()}


def test_priors_are_bounded() -> None:
    bounded = explain_priors(**ssd.COCO_SSD300)
    assert ((ssd.priors(**ssd.COCO_SSD300).double() - bounded.value).abs() <= bounded.error).all()
    assert (ssd.priors(**ssd.VOC_SSD300).double() - bounded.value).abs().gt(bounded.error).any()


def test_explanations_raise_what_the_oracle_raises() -> None:
    given = scene(torch.Generator().manual_seed(11), MINI, smallest=0.2)
    with pytest.raises(UpstreamRaises, match=r"image 0: ssd\.label-out-of-range"):
        explain_loss(**{**given, "gt_labels": given["gt_labels"] + 3})
    with pytest.raises(UpstreamRaises, match=r"image 1: ssd\.no-ground-truth"):
        explain_match(**{**matching(given), "gt_valid": torch.tensor([[True], [False]]).expand(2, 6)})
