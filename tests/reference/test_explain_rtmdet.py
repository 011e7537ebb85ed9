from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import rtmdet, rtmdet_loss, yolox
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.dynamic_k import k_range
from detoracle.reference.explain.rtmdet import (
    explain_assign,
    explain_candidates,
    explain_cost,
    explain_dynamic_k_matching,
    explain_joint_logits,
    explain_loss,
    loss_given,
)
from detoracle.reference.rounding import Bounded
from detoracle.reference.rtmdet_head import joint_logits

STRIDES = [8, 16, 32]
Pairs = tuple[Tensor, Tensor]
CostFunction = Callable[..., Pairs]


def scene(generator: torch.Generator, *, side: int = 128, gts: int = 6, classes: int = 4) -> dict[str, Any]:
    """Two images, predictions about as good as in training: boxes near some ground truth, the rest anywhere."""
    points = rtmdet.priors([(side // s, side // s) for s in STRIDES], STRIDES)
    centre = side * torch.rand(2, gts, 2, generator=generator)
    size = 10 + (side / 2) * torch.rand(2, gts, 2, generator=generator) ** 2
    gt_boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
    matched = torch.randint(gts, (2, len(points)), generator=generator)
    near = gt_boxes[torch.arange(2)[:, None], matched] + 6 * torch.randn(2, len(points), 4, generator=generator)
    own = rtmdet.decode(points[:, :2], points[:, 2:3] * torch.randn(2, len(points), 4, generator=generator).exp())
    return {
        "class_logits": 2 * torch.randn(2, len(points), classes, generator=generator) - 2,
        "boxes": torch.where(torch.rand(2, len(points), 1, generator=generator) < 0.5, near, own),
        "priors": points,
        "inside": torch.rand(2, len(points), generator=generator) < 0.95,
        "gt_boxes": gt_boxes,
        "gt_labels": torch.randint(classes, (2, gts), generator=generator),
        "gt_valid": torch.ones(2, gts, dtype=torch.bool),
    }


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in arguments.items()}


def small(gts: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    """A 64 px image, one level of stride 8, two classes of logit 0, every prediction a 16 px square on its prior."""
    points = rtmdet.priors([(8, 8)], [8])
    return {
        "class_logits": torch.zeros(1, 64, 2),
        "boxes": rtmdet.decode(points[:, :2], torch.full((1, 64, 4), 8.0)),
        "priors": points,
        "inside": torch.ones(1, 64, dtype=torch.bool),
        "gt_boxes": torch.tensor([gts]),
        "gt_labels": torch.tensor([labels or [0] * len(gts)]),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
    }


# ------------------------------------------------------------------------------------ other right ways to compute
def iou_from_sizes(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """Sides one by one, areas as products of all, the union's terms in another order."""
    sides = [
        (torch.minimum(gt_boxes[:, None, i + 2], boxes[:, i + 2]) - torch.maximum(gt_boxes[:, None, i], boxes[:, i]))
        for i in (0, 1)
    ]
    intersection = F.relu(sides[0]) * F.relu(sides[1])
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (gt_boxes, boxes)]
    return intersection / ((areas[1] - intersection) + areas[0][:, None]).clamp(min=1e-6)


def class_cost_in_parts(class_logits: Tensor, gt_labels: Tensor, iou: Tensor) -> Tensor:
    """Costs of all classes as background, corrected in the ground truth's class."""
    probability, background = torch.sigmoid(class_logits), F.softplus(class_logits)
    as_background = background * probability * probability
    own = class_logits[:, gt_labels].T
    right = (iou - torch.sigmoid(own)) ** 2 * (F.softplus(own) - own * iou)
    return (as_background.sum(1) - as_background[:, gt_labels].T) + right


def cost_by(
    logits: Tensor, boxes: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, radius: float = 3.0
) -> Pairs:
    iou = iou_from_sizes(gt_boxes, boxes)
    centers = gt_boxes[:, :2] + (gt_boxes[:, 2:] - gt_boxes[:, :2]) * 0.5
    far = (centers[:, None] - priors[:, :2]).norm(dim=-1) / priors[:, 2]
    distance_cost = torch.exp2((far - radius) * torch.log2(torch.tensor(10.0)))
    return (distance_cost - 3 * torch.log(iou + 1e-7)) + class_cost_in_parts(logits, gt_labels, iou), iou


def cost_in_double(logits: Tensor, boxes: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Pairs:
    cost, iou = cost_of_the_oracle(logits.double(), boxes.double(), priors.double(), gt_boxes.double(), gt_labels)
    return cost.to(boxes.dtype), iou.to(boxes.dtype)


def cost_of_the_oracle(
    logits: Tensor, boxes: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, radius: float = 3.0
) -> Pairs:
    return rtmdet._cost(logits, boxes, priors, gt_boxes, gt_labels, rtmdet._centers(gt_boxes, None), radius, 3.0)


def assign_by(
    given: dict[str, Any],
    cost_function: CostFunction = cost_of_the_oracle,
    *,
    inside_box: Callable[[Tensor], Tensor] = lambda distances: distances > 0,
    number: Callable[[Tensor], Tensor] = lambda iou: rtmdet._dynamic_k(iou, 13),
    resolve: Callable[[Tensor, Tensor], Tensor] = yolox._resolve,
) -> Tensor:
    """The whole assignment, some stages replaced."""
    images = []
    for image, took_part in enumerate(given["inside"]):
        gt_boxes, points = given["gt_boxes"][image], given["priors"][:, :2]
        distances = torch.cat([points - gt_boxes[:, None, :2], gt_boxes[:, None, 2:] - points], dim=-1)
        near = inside_box(distances).all(-1).any(0) & took_part
        index = torch.where(took_part, -1, -2)
        if near.any():
            predicted = (given[name][image, near] for name in ("class_logits", "boxes"))
            cost, iou = cost_function(*predicted, given["priors"][near], gt_boxes, given["gt_labels"][image])
            k = number(iou).clamp(max=int(near.sum()))
            index[near] = resolve(yolox._claim(cost, k), cost)
        images.append(index)
    return torch.stack(images)


# ---------------------------------------------------------------------------------------------------- soundness
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cost_function", [cost_of_the_oracle, cost_by, cost_in_double])
def test_a_right_assignment_is_never_wrong(cost_function: CostFunction, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        given = in_dtype(scene(generator), dtype)
        assert not explain_assign(**given, dtype=dtype).wrong(assign_by(given, cost_function)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_oracle_is_within_the_bounds_of_its_own_stages(dtype: torch.dtype) -> None:
    given = in_dtype(scene(torch.Generator().manual_seed(2)), dtype)
    stage = {name: given[name] for name in ("priors", "inside", "gt_boxes", "gt_valid")}
    candidate = explain_candidates(**stage, dtype=dtype)
    assert torch.equal(candidate.value, rtmdet.candidates(**stage))
    assert not candidate.ambiguous.any()
    given.pop("inside")
    results = rtmdet.cost(**given, candidate=candidate.value)
    for plain, bounded in zip(results, explain_cost(**given, candidate=candidate.value, dtype=dtype), strict=True):
        assert not outside(plain, bounded.value, bounded.error).any()
    logits = [given["class_logits"][..., i] for i in (0, 1)]
    joint = explain_joint_logits(*logits, dtype=dtype)
    assert not outside(joint_logits(*logits), joint.value, joint.error).any()


def test_the_float64_oracle_is_the_first_outcome() -> None:
    given = scene(torch.Generator().manual_seed(3))
    explanation = explain_assign(**given)
    exact = rtmdet.assign(**in_dtype(given, torch.float64))
    assert torch.equal(explanation.gt_index, exact.gt_index)
    assert torch.equal(next(explanation.alternatives(1)), exact.gt_index)
    assert not explanation.wrong_k(exact.extra["dynamic_k"]).any()
    quality = explanation.quality(exact.gt_index)
    plain = rtmdet.assign(**given)
    assert torch.equal(plain.gt_index, exact.gt_index)
    assert not outside(plain.quality, quality.value, quality.error).any()


def test_a_generic_scene_leaves_next_to_nothing_open() -> None:
    generator, positives, ambiguous = torch.Generator().manual_seed(4), 0, 0
    for _ in range(12):
        explanation = explain_assign(**scene(generator, side=256, gts=10, classes=20))
        positives += int((explanation.gt_index >= 0).sum())
        ambiguous += int(explanation.ambiguous.sum())
    assert positives > 1000
    assert ambiguous < positives / 100


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_within_its_bounds(seed: int) -> None:
    given = loss_arguments(scene(torch.Generator().manual_seed(seed)))
    explanation, parts = explain_loss(**given), rtmdet_loss.loss(**given)
    assert not explanation.ambiguous.any()
    bounded = loss_given(explanation.gt_index, **given)
    assert list(bounded) == list(parts)
    for name, part in parts.items():
        assert not outside(part, bounded[name].value, bounded[name].error).any()
        assert bool((bounded[name].error <= bounded[name].value / 1e3).all())
    plain = loss_given(explanation.gt_index, **given, dtype=None)
    assert all(torch.equal(plain[name], part) for name, part in parts.items())  # type: ignore[arg-type]


def loss_arguments(given: dict[str, Any]) -> dict[str, Any]:
    sizes = [(128 // s, 128 // s) for s in STRIDES]
    distances = rtmdet.encode(given["priors"][:, :2], given["boxes"][0])[None].abs()
    maps = {}
    for name, flat in (("class_logits", given["class_logits"][:1]), ("distances", distances)):
        levels = torch.split(flat, [h * w for h, w in sizes], dim=1)
        maps[name] = [level.permute(0, 2, 1).reshape(1, -1, h, w) for level, (h, w) in zip(levels, sizes, strict=True)]
    return {**maps, "strides": STRIDES, **{name: given[name][:1] for name in ("gt_boxes", "gt_labels", "gt_valid")}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_under_autocast(dtype: torch.dtype) -> None:
    given = loss_arguments(scene(torch.Generator().manual_seed(5)))
    half = {**given, **{name: [t.to(dtype) for t in given[name]] for name in ("class_logits", "distances")}}
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.quality-dtype"):
        explain_loss(**half, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        total, explanation = rtmdet_loss.loss(**half)["total"], explain_loss(**half, dtype=dtype)
    logits, boxes = (rtmdet_loss._flatten(half[name]) for name in ("class_logits", "distances"))
    points = rtmdet.priors([(128 // s, 128 // s) for s in STRIDES], STRIDES)
    with torch.autocast("cpu", dtype=dtype):
        index = rtmdet.assign(
            logits,
            rtmdet.decode(points[:, :2], boxes),
            points,
            torch.ones(1, len(points), dtype=torch.bool),
            *(given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")),
        ).gt_index
    assert not explanation.wrong(index).any()
    bounded = loss_given(index, **half, dtype=dtype)["total"]
    assert not outside(total, bounded.value, bounded.error).any()


# ---------------------------------------------------------------------------------------------------- sharpness
def conflict_among_claimants(claims: Tensor, cost: Tensor) -> Tensor:
    return yolox._resolve(claims, cost.masked_fill(~claims, torch.inf))


def last_claimant(claims: Tensor, _cost: Tensor) -> Tensor:
    rows = torch.arange(len(claims))[:, None]
    return torch.where(claims, rows, -1).amax(0)


def cost_of_own_class(logits: Tensor, boxes: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Pairs:
    cost, iou = cost_of_the_oracle(logits, boxes, priors, gt_boxes, gt_labels)
    others = F.softplus(logits) * torch.sigmoid(logits) ** 2
    return cost - (others.sum(1) - others[:, gt_labels].T), iou


def cost_from_cell_centres(logits: Tensor, boxes: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Pairs:
    moved = torch.cat([priors[:, :2] + priors[:, 2:] / 2, priors[:, 2:]], dim=1)
    return cost_of_the_oracle(logits, boxes, moved, gt_boxes, gt_labels)


def cost_of_a_wider_radius(logits: Tensor, boxes: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Pairs:
    return cost_of_the_oracle(logits, boxes, priors, gt_boxes, gt_labels, radius=2.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": lambda iou: rtmdet._dynamic_k(iou, 10)},
        {"number": lambda iou: rtmdet._dynamic_k(iou, 13) + 1},
        {"number": lambda iou: iou.topk(min(13, iou.shape[1])).values.sum(1).round().long().clamp(min=1)},
        {"resolve": conflict_among_claimants},
        {"resolve": last_claimant},
        {"cost_function": cost_of_own_class},
        {"cost_function": cost_from_cell_centres},
        {"cost_function": cost_of_a_wider_radius},
    ],
    ids=[
        "k-of-ten",
        "one-more",
        "k-rounded",
        "conflict-among-claimants",
        "last-claimant",
        "own-class-only",
        "cell-centres",
        "radius",
    ],
)
def test_a_wrong_rule_is_wrong(wrong: dict[str, Any]) -> None:
    generator, found = torch.Generator().manual_seed(6), 0
    for _ in range(12):
        given = scene(generator, side=64, gts=12)
        explanation = explain_assign(**given)
        right, other = assign_by(given), assign_by(given, **wrong)
        clear = ~explanation.ambiguous
        assert not explanation.wrong(right).any()
        assert torch.equal(explanation.wrong(other)[clear], (other != right)[clear])
        found += int((other != right)[clear].any())
    assert found >= 3


def test_a_prior_on_the_edge_is_outside_for_certain() -> None:
    given = small([[16.0, 16.0, 33.0, 33.0]])
    given["boxes"] = given["gt_boxes"].expand(1, 64, 4)
    explanation = explain_assign(**given)
    inclusive = assign_by(given, inside_box=lambda distances: distances >= 0)
    assert not explanation.ambiguous.any()
    assert int((explanation.gt_index == 0).sum()) == 4
    assert int(explanation.wrong(inclusive).sum()) == 5


def test_an_ignored_prior_is_not_background() -> None:
    given = small([[17.0, 17.0, 31.0, 31.0]])
    given["inside"][0, 0] = False
    explanation = explain_assign(**given)
    index = rtmdet.assign(**given).gt_index
    assert not explanation.wrong(index).any()
    assert explanation.wrong(index.clamp(min=-1)).nonzero().tolist() == [[0, 0]]


def test_an_iou_sum_of_exactly_an_integer_is_certain() -> None:
    three = torch.tensor([[0.75, 0.75, 0.75, 0.75]])
    k, fewest, most, _ = k_range(Bounded.exact(three, torch.float32), 13)
    assert (k.tolist(), fewest.tolist(), most.tolist()) == ([3], [3], [3])
    cost, every = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.ones(1, 4, dtype=torch.bool)
    explanation = explain_dynamic_k_matching(cost, three[None], every, every[:, :1])
    assert explanation.wrong(torch.tensor([[0, 0, -1, -1]])).tolist() == [[False, False, True, False]]
    assert explanation.wrong_k(torch.tensor([[2]])).all()


def test_an_iou_sum_next_to_an_integer_is_open() -> None:
    thirds = Bounded.exact(torch.tensor([[1.0, 2.0, 3.0]]), torch.float32) / 3
    _, fewest, most, margin = k_range(thirds, 13)
    assert (fewest.tolist(), most.tolist()) == ([1], [2])
    assert bool((margin <= 1).all())


def test_ties_at_the_last_place_are_interchangeable_but_counted() -> None:
    cost, every = torch.tensor([[[1.0, 2.0, 2.0, 2.0]]]), torch.ones(1, 4, dtype=torch.bool)
    iou = torch.full((1, 1, 4), 0.5)
    explanation = explain_dynamic_k_matching(cost, iou, every, every[:, :1])
    right = {(0, 0, -1, -1), (0, -1, 0, -1), (0, -1, -1, 0)}
    for outcome in itertools.product([0, -1], repeat=4):
        assert bool(explanation.wrong(torch.tensor([outcome])).any()) == (outcome not in right)
    assert {tuple(outcome[0].tolist()) for outcome in explanation.alternatives(99)} == right


def test_infinite_costs_tie_but_one_is_taken() -> None:
    given = small([[900.0, 900.0, 916.0, 916.0], [17.0, 17.0, 38.0, 39.5]])
    explanation = explain_assign(**given)
    index = rtmdet.assign(**given).gt_index
    takes_none = torch.where(index == 0, -1, index)
    assert not explanation.wrong(index).any()
    inside = given["gt_boxes"][0, 1]
    near = ((given["priors"][:, :2] > inside[:2]) & (given["priors"][:, :2] < inside[2:])).all(1)
    assert int(near.sum()) == 4
    taken = (index[0] == 1).nonzero().flatten().tolist()
    assert len(taken) == 1
    # The far one's only claim may be on any candidate; where it meets the other's claim, the finite cost wins.
    for prior in near.nonzero().flatten().tolist():
        other = takes_none.clone()
        if prior not in taken:
            other[0, prior] = 0
        assert not explanation.wrong(other).any()
    twice = takes_none.clone()
    twice[0, [n for n in near.nonzero().flatten().tolist() if n not in taken]] = 0
    assert explanation.wrong(twice).any()


def test_a_tie_of_two_is_no_licence_for_a_third() -> None:
    cost = torch.tensor([[[1.0, 9.0], [1.0, 9.0], [2.0, 3.0]]])
    iou, every = torch.full((1, 3, 2), 0.5), torch.ones(1, 3, dtype=torch.bool)
    explanation = explain_dynamic_k_matching(cost, iou, every[:, :2], every)
    verdicts = [bool(explanation.wrong(torch.tensor([[gt, -1]])).any()) for gt in (0, 1, 2, -1)]
    assert verdicts == [False, False, True, True]


def test_masks_move_the_explanation_too() -> None:
    given = small([[17.0, 17.0, 47.0, 31.0]])
    given["boxes"][:] = torch.tensor([17.0, 17.0, 25.0, 31.0])  # the distance alone decides
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[..., 20:29, 20:29] = True
    by_mask, by_box = rtmdet.assign(**given, gt_masks=masks).gt_index, rtmdet.assign(**given).gt_index
    explanation = explain_assign(**given, gt_masks=masks)
    assert not explanation.wrong(by_mask).any()
    assert explanation.wrong(by_box).any()


def test_named_behaviours_are_raised_as_by_the_oracle() -> None:
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.assign, image 0: rtmdet\.label-out-of-range"):
        explain_assign(**small([[17.0, 17.0, 31.0, 31.0]], [5]))
    given = loss_arguments(scene(torch.Generator().manual_seed(7)))
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.no-valid-prior"):
        explain_loss(**given, pad_shapes=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UpstreamRaises, match=r"rtmdet\.unequal-strides"):
        explain_loss(**{**given, "strides": [8, 16, (32, 16)]})


def test_bounds_of_the_iou_cover_another_way_to_compute_it() -> None:
    given = scene(torch.Generator().manual_seed(8))
    boxes, gt_boxes = given["boxes"][0], given["gt_boxes"][0]
    private: Any = unchecked(overlaps_mmdet)
    bounded = private(Bounded.exact(gt_boxes, torch.float32), Bounded.exact(boxes, torch.float32))
    assert not outside(iou_from_sizes(gt_boxes, boxes), bounded.value, bounded.error).any()
