from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from detoracle.implementations.batched import yolov8 as batched
from detoracle.implementations.registry import marked_in
from detoracle.implementations.sparse import yolov8 as sparse
from detoracle.implementations.sparse import yolov8_matching as matching
from detoracle.implementations.sparse.background import background_loss
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference import yolov8 as oracle
from detoracle.reports.counters import count

YOLOV8 = system_of("yolov8")
OPERATIONS = {operation.name: operation for operation in YOLOV8.operations}
MARKED = {one.operation: one.load() for one in marked_in(sparse)}
EDGE = {scene.name: scene for scene in edge_cases()}
LOSS = OPERATIONS["yolov8.loss"]
CROWD = realistic("crowd", num_images=2, seed=3, image_size=(320, 320), num_gts=60)


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    found = cases(YOLOV8, OPERATIONS[operation], scene, dtype=dtype)
    results = [
        judge_case(
            case,
            expect(YOLOV8, OPERATIONS[operation], case.arguments),
            partial(perform, OPERATIONS[operation], call),
        )
        for case in found
    ]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


def native(scene: Scene) -> dict[str, Any]:
    return {name: value for name, value in YOLOV8.native(scene).items() if name != "image_size"}


def predictions(scene: Scene) -> dict[str, Any]:
    return dict(next(cases(YOLOV8, OPERATIONS["yolov8.assign"], scene)).arguments)


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_edge_cases(operation: str) -> None:
    scenes = list(EDGE.values())[:: 3 if operation == "yolov8.loss" else 1]
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_random_and_crowded_scenes(operation: str) -> None:
    scenes = [realistic("crowd", num_images=1, seed=3, image_size=(192, 192), num_gts=40), *random_scenes(3, seed=5)]
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", MARKED)
def test_right_in_other_dtypes(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["whole-image"], MARKED[operation], dtype) == []


# ------------------------------------------------------------------------------------------------- to the last anchor
@pytest.mark.parametrize("style", ["trained", "untrained", "tied", "far", "spoilt"])
def test_assigns_as_the_oracle_does(style: str) -> None:
    """Where overlaps are 0, the first anchors of all are claimed; the oracle decides ties by index, as this does."""
    given = predictions(CROWD)
    if style == "untrained":
        given["scores"] = torch.full_like(given["scores"], 0.01)
    elif style == "tied":
        given["scores"], given["boxes"] = torch.ones_like(given["scores"]), given["boxes"].round(decimals=-1)
    elif style == "far":
        given["boxes"] = given["boxes"] + 300 * (torch.arange(len(given["anchor_points"])) % 3 > 0)[:, None]
    elif style == "spoilt":
        given["boxes"][0, 200:1200:200] = torch.nan
    found, want = sparse.assign(**given), oracle.assign(**given)
    same = found.gt_index == want.gt_index
    assert bool(same.all()) if style != "tied" else float(same.float().mean()) > 0.9
    if style != "tied":
        torch.testing.assert_close(found.quality, want.quality, equal_nan=True)


def test_wrong_rules_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(matching, "_claims", lambda metric, row, anchor, counts, topk: torch.arange(len(metric)))
        assert wrong_cases("yolov8.assign", EDGE["crowd"], sparse.assign)
    owners = matching._owners
    with monkeypatch.context() as patch:
        patch.setattr(matching, "_owners", lambda place, overlap, *rest: owners(place, -overlap, *rest))
        assert wrong_cases("yolov8.assign", EDGE["crowd"], sparse.assign)


def test_points_in_another_order_are_assigned_alike() -> None:
    given = predictions(EDGE["ragged-full"])
    order = torch.randperm(len(given["anchor_points"]), generator=torch.Generator().manual_seed(0))
    other = given | {name: given[name][:, order] for name in ("scores", "boxes")}
    other["anchor_points"] = given["anchor_points"][order]
    assert torch.equal(sparse.assign(**other).positive, sparse.assign(**given).positive[:, order])


# ----------------------------------------------------------------------------------------------------------- gradients
def gradients_of(call: Callable[..., Any], given: dict[str, Any], scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    leaves = [level.detach().requires_grad_() for level in given["raw"]]
    return torch.autograd.grad(call(**{**given, "raw": leaves})["total"] * scale, leaves)


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    given = native(EDGE["ragged-full"])
    leaves = [level.requires_grad_() for level in given["raw"]]
    total = sparse.loss(**given)["total"]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, leaves), strict=True))


def test_the_gradient_cannot_be_differentiated() -> None:
    given = native(EDGE["ragged-full"])
    leaves, weight = [level.requires_grad_() for level in given["raw"]], torch.ones((), requires_grad=True)
    gradients = torch.autograd.grad(sparse.loss(**given)["total"] * weight, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradients[0].sum())


def test_gradients_are_scaled() -> None:
    given = native(EDGE["ragged-full"])
    plain, doubled = gradients_of(sparse.loss, given), gradients_of(sparse.loss, given, scale=2.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(plain, doubled, strict=True))
    assert all(bool(level.any()) for level in plain)


def test_parts_train_nothing() -> None:
    given = native(EDGE["ragged-full"])
    parts = sparse.loss(**{**given, "raw": [level.requires_grad_() for level in given["raw"]]})
    assert [name for name, part in parts.items() if part.requires_grad] == ["total"]


def test_maps_of_channels_last_are_taken() -> None:
    given = native(EDGE["ragged-full"])
    other = {**given, "raw": [level.contiguous(memory_format=torch.channels_last) for level in given["raw"]]}
    torch.testing.assert_close(sparse.loss(**given), sparse.loss(**other))
    torch.testing.assert_close(*(gradients_of(sparse.loss, g) for g in (given, other)))


def test_half_precision_maps_go_with_single_precision_boxes() -> None:
    given = native(EDGE["ragged-full"])
    given["raw"] = [level.bfloat16().requires_grad_() for level in given["raw"]]
    parts = sparse.loss(**given)
    assert {part.dtype for part in parts.values()} == {torch.float32}
    assert {level.dtype for level in torch.autograd.grad(parts["total"], given["raw"])} == {torch.bfloat16}
    assert not expect(YOLOV8, LOSS, given).judge(perform(LOSS, sparse.loss, given)).wrong


def test_all_class_logits_are_treated_by_the_given_pass() -> None:
    given = native(EDGE["ragged-full"])
    treated = []

    def background(logits: torch.Tensor, **settings: Any) -> torch.Tensor:
        treated.append(logits.numel())
        return background_loss(logits, **settings)

    assert torch.equal(sparse.loss(**given, background=background)["total"], sparse.loss(**given)["total"])
    assert sum(treated) == sum(level[:, 64:].numel() for level in given["raw"])


# ---------------------------------------------------------------------------------------------------------------- cost
def test_waits_as_often_for_more_ground_truths() -> None:
    scenes = realistic("crowd", num_images=2, seed=3, image_size=(320, 320), num_gts=15), CROWD
    few, many = (count(partial(sparse.loss, **native(scene)))[1].host_syncs for scene in scenes)
    assert few == many


def test_memory_is_that_of_the_pairs_inside() -> None:
    given = native(realistic("crowd", num_images=1, seed=3, num_gts=300))
    found, dense = (count(partial(module.loss, **given))[1].peak_live_bytes for module in (sparse, batched))
    assert found < dense / 6
