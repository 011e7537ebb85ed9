from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import ssd as batched
from detoracle.implementations.registry import marked_in
from detoracle.implementations.sparse import ssd as sparse
from detoracle.implementations.sparse import ssd_matching as matching
from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.checking import Case, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference import ssd as oracle
from detoracle.reference.assignment import Assignment
from detoracle.reports.counters import count

SSD = system_of("ssd")
OPERATIONS = {operation.name: operation for operation in SSD.operations}
MARKED = {one.operation: one.load() for one in marked_in(sparse)}
EDGE = {scene.name: scene for scene in edge_cases()}
COCO = realistic("coco", num_images=1, seed=3, image_size=(300, 300), num_classes=20, num_gts=20)
CROWD = realistic("crowd", num_images=1, seed=3, image_size=(300, 300), num_classes=20, num_gts=40)


CHOSEN = [  # explaining a loss takes long
    "single",
    "ragged-full",
    "empty-one",
    "crowd",
    "identical-other-class",
    "tiny-several",
    "outside-mixed",
    "degenerate-point",
    "inverted-only",
    "extreme-logits-200",
    "nan-class",
    "nan-box",
    "label-minus-one",
    "untrained",
]


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype = torch.float32) -> list[tuple[Case, Expectation]]:
    found = cases(SSD, OPERATIONS[operation], scene, dtype=dtype)
    return [(case, expect(SSD, OPERATIONS[operation], case.arguments)) for case in found]


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], call)
    results = [judge_case(case, right, perform_) for case, right in expected(operation, scene, dtype)]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_edge_cases(operation: str) -> None:
    scenes = [EDGE[name] for name in (CHOSEN if operation == "ssd.loss" else EDGE)]
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_random_and_realistic_scenes(operation: str) -> None:
    scenes = [COCO, CROWD, *random_scenes(2 if operation == "ssd.loss" else 8, seed=5)]
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", MARKED)
def test_right_in_other_dtypes(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["ragged-full"], MARKED[operation], dtype) == []


# -------------------------------------------------------------------------------------------------- to the last prior
def native(scene: Scene) -> dict[str, Any]:
    return {name: value for name, value in SSD.native(scene).items() if name != "settings"}


def matching_of(scene: Scene) -> dict[str, Any]:
    given = native(scene)
    return {name: given[name] for name in ("priors", "gt_boxes", "gt_labels", "gt_valid")}


def same(found: Assignment, want: Assignment) -> bool:
    pairs = [(found.gt_index, want.gt_index), (found.quality, want.quality)]
    pairs += [(found.extra[name], want.extra[name]) for name in want.extra]
    return all(torch.equal(a, b) for a, b in pairs)


def random_priors(number: int) -> Tensor:
    return torch.rand(number, 4, generator=torch.Generator().manual_seed(0)) + 1e-3


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scene", [COCO, CROWD], ids=lambda scene: scene.name)
def test_matches_as_batched_does(scene: Scene, threshold: float) -> None:
    given = {**matching_of(scene), "threshold": threshold}
    assert same(sparse.match(**given), batched.match(**given))


@pytest.mark.parametrize("number", [1, 2, 31, 1000])
def test_priors_may_be_any_boxes(number: int) -> None:
    given = {**matching_of(CROWD), "priors": random_priors(number)}
    assert same(sparse.match(**given), batched.match(**given))


def test_of_priors_that_fit_alike_the_first_is_the_best() -> None:
    """Every ground truth is inside many priors of one size, in blocks whose order is not that of the priors."""
    given = matching_of(CROWD)
    small = {**given, "gt_boxes": torch.cat([given["gt_boxes"][..., :2], given["gt_boxes"][..., :2] + 2**-10], dim=-1)}
    for priors in (given["priors"], given["priors"].flip(0)):
        assert same(sparse.match(**{**small, "priors": priors}), batched.match(**{**small, "priors": priors}))


def test_a_bound_that_is_too_low_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def smaller(truths: Any, priors: Any, members: Tensor, threshold: float) -> Tensor:
        return worth_it(truths, priors, members[:, :4], threshold)

    worth_it = matching._worth_it
    monkeypatch.setattr(matching, "_worth_it", smaller)
    given = matching_of(CROWD)
    assert not same(sparse.match(**given), batched.match(**given))


@pytest.mark.parametrize(
    "box",
    [(0.5, 0.5, 0.5, 0.5), (0.7, 0.7, 0.3, 0.3), (0.1, 0.1, 1e-30, 1e-30), (torch.nan,) * 4, (0, 0, torch.inf, 1)],
)
def test_boxes_without_area_are_left_to_batched(box: tuple[float, ...]) -> None:
    given = matching_of(COCO)
    given["gt_boxes"][0, 1] = torch.tensor(box)
    assert matching.matches(given["priors"], given["gt_boxes"], given["gt_valid"], 0.5) is None


def test_a_threshold_of_0_is_left_to_batched() -> None:
    given = {**matching_of(COCO), "threshold": 0.0}
    assert same(sparse.match(**given), batched.match(**given))


# ----------------------------------------------------------------------------------------------------- hard negatives
@pytest.mark.parametrize("neg_pos", [0, 1, 3, 50])
def test_ranks_as_a_stable_sort_does(neg_pos: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ranked_by = torch.randint(-2, 5, (9, 40), generator=generator).float()
    ranked_by[3:, ::5] = torch.inf
    ranked_by[6:, ::3] = torch.nan
    positive = torch.rand(9, 40, generator=generator) < 0.2
    positive[0] = False
    ranked_by.masked_fill_(positive, 0.0)
    found = sparse._hardest(ranked_by, positive, neg_pos)
    assert torch.equal(found, batched._hardest(ranked_by, positive, neg_pos))


def test_ties_in_another_order_are_seen() -> None:
    ranked_by, positive = torch.zeros(1, 40), torch.zeros(1, 40, dtype=torch.bool)
    positive[0, 20] = True
    found, other = sparse._hardest(ranked_by, positive, 3), sparse._hardest(ranked_by.flip(1), positive.flip(1), 3)
    assert found.nonzero()[:, 1].tolist() == [0, 1, 2]
    assert not torch.equal(other.flip(1), found)


# --------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("part", ["localisation", "classification"])
def test_each_part_has_its_own_gradient(part: str) -> None:
    def gradients(call: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in native(EDGE["ragged-full"]).items()}
        leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
        return torch.autograd.grad(call(**given)[part], leaves, materialize_grads=True)

    exact, plain = (gradients(oracle.loss, dtype) for dtype in (torch.float64, torch.float32))
    found = gradients(sparse.loss, torch.float32)
    for rows in zip(found, exact, plain, strict=True):
        assert not outside(rows[0], rows[1], gradient_bound(rows[1], rows[2], row=1)).any()
    assert [bool(gradient.any()) for gradient in found] == [part == "localisation", part == "classification"]


def test_gradients_are_there_again_and_not_twice() -> None:
    given = native(EDGE["single"])
    leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
    total = sparse.loss(**given)["total"]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(again[0].sum())


def test_gradient_of_rows_left_out_is_judged_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sparse._rows
    monkeypatch.setattr(sparse, "_rows", lambda values, which: rows(values, which).detach() + 0 * values.sum())
    assert wrong_cases("ssd.loss", EDGE["single"], sparse.loss)


def test_padding_may_lie_anywhere_and_hold_anything() -> None:
    given = native(EDGE["crowd"])
    count_of = given["gt_valid"].shape[1]
    rows = torch.arange(count_of) * 2 + 1
    boxes, labels = torch.full((1, 2 * count_of + 1, 4), torch.nan), torch.full((1, 2 * count_of + 1), 1000)
    valid = torch.zeros_like(labels, dtype=torch.bool)
    boxes[:, rows], labels[:, rows], valid[:, rows] = given["gt_boxes"], given["gt_labels"], given["gt_valid"]
    padded = {**given, "gt_boxes": boxes, "gt_labels": labels, "gt_valid": valid}
    assert torch.equal(sparse.loss(**given)["total"], sparse.loss(**padded)["total"])


@pytest.mark.parametrize("scene", ["empty-single", "empty-all"])
def test_batch_without_ground_truth_costs_nothing(scene: str) -> None:
    given = native(EDGE[scene])
    leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
    total = sparse.loss(**given)["total"]
    gradients = torch.autograd.grad(total, leaves)
    assert float(total.detach()) == 0
    assert not any(gradient.any() for gradient in gradients)


# --------------------------------------------------------------------------------------------------------------- cost
def test_waits_as_often_for_more_images_and_ground_truths() -> None:
    few = realistic("crowd", num_images=1, seed=3, image_size=(300, 300), num_gts=5)
    many = realistic("crowd", num_images=3, seed=3, image_size=(300, 300), num_gts=60)
    assert [count(partial(sparse.loss, **native(scene)))[1].host_syncs for scene in (few, many)] == [9, 9]


def test_memory_is_that_of_the_pairs_that_may_match() -> None:
    given = native(realistic("crowd", num_images=1, seed=3, image_size=(300, 300), num_gts=300))
    found, dense = (count(partial(module.loss, **given))[1].peak_live_bytes for module in (sparse, batched))
    assert found < dense / 10
