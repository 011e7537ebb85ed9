from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from detoracle.implementations.batched import yolox as batched
from detoracle.implementations.registry import marked_in
from detoracle.implementations.sparse import yolox as sparse
from detoracle.implementations.sparse import yolox_matching as matching
from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.checking import Case, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference import yolox_loss as oracle
from detoracle.reference.errors import InputError
from detoracle.reports.counters import count

YOLOX = system_of("yolox")
OPERATIONS = {operation.name: operation for operation in YOLOX.operations}
MARKED = {one.operation: one.load() for one in marked_in(sparse)}
FLAVOURS = ["tutorial", "official"]
EDGE = {scene.name: scene for scene in edge_cases()}
CROWD = realistic("crowd", num_images=2, seed=3, image_size=(320, 320), num_gts=60)


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype = torch.float32) -> list[tuple[Case, Expectation]]:
    found = cases(YOLOX, OPERATIONS[operation], scene, dtype=dtype)
    return [(case, expect(YOLOX, OPERATIONS[operation], case.arguments)) for case in found]


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], call)
    results = [judge_case(case, right, perform_) for case, right in expected(operation, scene, dtype)]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_edge_cases(operation: str) -> None:
    assert [wrong for scene in EDGE.values() for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_random_and_crowded_scenes(operation: str) -> None:
    scenes = [CROWD, *random_scenes(8, seed=5)]
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", MARKED)
def test_right_in_other_dtypes(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["ragged"], MARKED[operation], dtype) == []


# ------------------------------------------------------------------------------------------------- to the last anchor
def arguments(scene: Scene, flavour: str) -> dict[str, Any]:
    return next(dict(c.arguments) for c in cases(YOLOX, OPERATIONS["yolox.assign"], scene) if flavour in c.name)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_assigns_as_batched_does(flavour: str) -> None:
    """Crowded scenes have ground truths with too small a geometry, and contested anchors."""
    given = arguments(CROWD, flavour)
    found, want = sparse.assign(**given), batched.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)
    assert torch.equal(found.extra["dynamic_k"], want.extra["dynamic_k"])


@pytest.mark.parametrize("style", ["untrained", "poor"])
def test_bounds_hold_where_costs_are_high(style: str) -> None:
    """Where all classes are as likely, or boxes meet nothing, the bound lets all candidates through."""
    given = arguments(CROWD, "tutorial")
    predictions = given["predictions"].clone()
    if style == "untrained":
        predictions[..., 4:] = 0
    else:
        predictions[..., 2:4] = 1
    given = {**given, "predictions": predictions}
    assert torch.equal(sparse.assign(**given).gt_index, batched.assign(**given).gt_index)


def test_a_bound_that_is_too_low_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, rows: torch.Tensor, bound: torch.Tensor, least: Any) -> Any:
        return within(self, rows, bound * 0, least)

    within = matching._Matcher.within
    monkeypatch.setattr(matching._Matcher, "within", nothing)
    given = arguments(CROWD, "tutorial")
    assert not torch.equal(sparse.assign(**given).gt_index, batched.assign(**given).gt_index)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_anchors_in_another_order_are_assigned_alike(flavour: str) -> None:
    given = arguments(EDGE["crowd"], flavour)
    order = torch.randperm(len(given["anchor_strides"]), generator=torch.Generator().manual_seed(0))
    other = {
        **given,
        "predictions": given["predictions"][:, order],
        "anchor_points": given["anchor_points"][order],
        "anchor_strides": given["anchor_strides"][order],
    }
    assert torch.equal(sparse.assign(**other).gt_index, sparse.assign(**given).gt_index[:, order])


def test_padding_may_lie_anywhere_and_hold_anything() -> None:
    given = YOLOX.native(EDGE["crowd"])
    leaves = [level.requires_grad_() for level in given["raw"]]
    rows = torch.arange(24) * 2 + 1
    boxes, labels = torch.full((1, 49, 4), torch.nan), torch.full((1, 49), -1)
    valid = torch.zeros(1, 49, dtype=torch.bool)
    boxes[:, rows], labels[:, rows], valid[:, rows] = given["gt_boxes"], given["gt_labels"], True
    padded = {**given, "gt_boxes": boxes, "gt_labels": labels, "gt_valid": valid}
    plain, other = (sparse.loss(**g)["total"] for g in (given, padded))
    assert torch.equal(plain, other)
    gradients = (torch.autograd.grad(total, leaves) for total in (plain, other))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_class_that_does_not_exist_is_refused() -> None:
    given = YOLOX.native(EDGE["crowd"])
    with pytest.raises(InputError, match="gt_labels: expected 0 to"):
        sparse.loss(**{**given, "gt_labels": given["gt_labels"] + 1000})


# ----------------------------------------------------------------------------------------------------------- gradients
def gradient_of(part: str, call: Callable[..., Any], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    given = YOLOX.native(EDGE["crowd"])
    leaves = [level.to(dtype).requires_grad_() for level in given["raw"]]
    losses = call(**{**given, "raw": leaves, "gt_boxes": given["gt_boxes"].to(dtype)}, use_l1=True)
    return torch.autograd.grad(losses[part], leaves)


@pytest.mark.parametrize("part", ["box", "objectness", "classification", "l1"])
def test_each_part_has_its_own_gradient(part: str) -> None:
    exact, plain = (gradient_of(part, oracle.loss, dtype) for dtype in (torch.float64, torch.float32))
    found = gradient_of(part, sparse.loss, torch.float32)
    for level in zip(found, exact, plain, strict=True):
        assert not outside(level[0], level[1], gradient_bound(level[1], level[2], row=1)).any()
    assert any(bool(level.any()) for level in found)


def test_gradients_are_there_again_and_not_twice() -> None:
    given = YOLOX.native(EDGE["single"])
    leaves = [level.requires_grad_() for level in given["raw"]]
    total = sparse.loss(**given)["total"]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(again[0].sum())


# ---------------------------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_waits_as_often_for_more_ground_truths(flavour: str) -> None:
    few, many = (
        count(partial(sparse.loss, **YOLOX.native(scene), flavour=flavour))[1].host_syncs
        for scene in (realistic("crowd", num_images=2, seed=3, image_size=(320, 320), num_gts=15), CROWD)
    )
    assert few == many


def test_memory_is_that_of_the_candidates() -> None:
    given = YOLOX.native(realistic("crowd", num_images=1, seed=3, num_gts=300))
    found, dense = (count(partial(module.loss, **given))[1].peak_live_bytes for module in (sparse, batched))
    assert found < dense / 6
