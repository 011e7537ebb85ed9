from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from detoracle.implementations.batched import anchor_head as batched
from detoracle.implementations.registry import marked_in
from detoracle.implementations.sparse import anchor_head as sparse
from detoracle.implementations.sparse import anchor_head_overlaps as overlaps
from detoracle.implementations.sparse import focal
from detoracle.properties.anchor_head_settings import HEADS
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reports.counters import count

SYSTEM = system_of("anchor_head")
OPERATIONS = {operation.name: operation for operation in SYSTEM.operations}
MARKED = {one.operation: one.load() for one in marked_in(sparse)}
EDGE = {scene.name: scene for scene in edge_cases()}
LOSSES = ["ragged", "empty-one", "one-class", "nan-box", "inf-box", "nan-class", "inf-class", "label-minus-one"]
CROWD = realistic("crowd", num_images=2, seed=3, image_size=(128, 128), num_gts=60)


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    found = cases(SYSTEM, OPERATIONS[operation], scene, dtype=dtype)
    results = [
        judge_case(
            case,
            expect(SYSTEM, OPERATIONS[operation], case.arguments),
            partial(perform, OPERATIONS[operation], call),
        )
        for case in found
        if case.arguments.get("class_loss", "focal") == "focal"
    ]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


def test_assignment_right_on_edge_and_random_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are small, so that every scene has several."""
    monkeypatch.setattr(overlaps, "_CHUNK", 1 << 11)
    scenes = [*list(EDGE.values())[::4], *random_scenes(2, seed=3)]
    assert [wrong for scene in scenes for wrong in wrong_cases("anchor_head.assign", scene, sparse.assign)] == []


@pytest.mark.parametrize("scene", LOSSES)
def test_loss_right_on_edge_cases(scene: str) -> None:
    assert wrong_cases("anchor_head.loss", EDGE[scene], sparse.loss) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", MARKED)
def test_right_in_other_dtypes(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["ragged"], MARKED[operation], dtype) == []


# ------------------------------------------------------------------------------------------------- to the last anchor
def assignment(scene: Scene) -> dict[str, Any]:
    return dict(next(cases(SYSTEM, OPERATIONS["anchor_head.assign"], scene)).arguments)


RULES: dict[str, dict[str, Any]] = {
    "published": {},
    "first anchor": {"gt_max_assign_all": False},
    "zeros claimed": {"min_pos_iou": -0.5},
    "high": {"pos_iou_thr": 0.7, "neg_iou_thr": (0.1, 0.3), "min_pos_iou": 0.3},
    "thresholds": {"match_low_quality": False},
}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_assigns_as_batched_does(rules: str, outside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlaps, "_CHUNK", 1 << 14)
    given = assignment(CROWD) | RULES[rules]
    given["gt_boxes"] = given["gt_boxes"].clone()
    given["gt_boxes"][0, 3] += 1000  # overlaps nothing
    if outside:
        given["inside"] = given["inside"] & (torch.arange(len(given["anchors"])) % 5 > 0)
        regions = {"ignore_boxes": given["gt_boxes"][:, :4], "ignore_valid": given["gt_valid"][:, :4]}
        given |= {**regions, "ignore_iof_thr": 0.5}
    found, want = sparse.assign(**given), batched.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)


def test_a_forgotten_claim_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def but_one(self: Any, *given: Any) -> Any:
        row, anchor = claims(self, *given)
        return row[1:], anchor[1:]

    claims = overlaps.Overlaps._claims
    monkeypatch.setattr(overlaps.Overlaps, "_claims", but_one)
    assert not torch.equal(sparse.assign(**assignment(CROWD)).gt_index, batched.assign(**assignment(CROWD)).gt_index)


# ---------------------------------------------------------------------------------------------------------------- loss
def native(scene: str, **settings: Any) -> dict[str, Any]:
    return {**SYSTEM.native(EDGE[scene]), **settings}


def gradients_of(call: Callable[..., Any], given: dict[str, Any], part: str = "total") -> tuple[torch.Tensor, ...]:
    leaves = {name: [level.detach().requires_grad_() for level in given[name]] for name in ("cls_scores", "bbox_preds")}
    parts = call(**{**given, **leaves})
    scale = torch.arange(1, len(given["strides"]) + 1) if part != "total" else torch.ones(1)
    return torch.autograd.grad(
        (parts[part] * scale).sum(), [*leaves["cls_scores"], *leaves["bbox_preds"]], allow_unused=True
    )


@pytest.mark.parametrize("part", ["total", "classification", "box"])
def test_every_part_of_every_level_trains(part: str) -> None:
    given = native("ragged", gamma=1.5, alpha=0.4, pos_weight=2.0, class_loss_weight=0.5)
    torch.testing.assert_close(*(gradients_of(call, given, part) for call in (sparse.loss, batched.loss)))


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_other_class_losses_are_left_to_batched(name: str) -> None:
    found = cases(SYSTEM, OPERATIONS["anchor_head.loss"], EDGE["ragged"])
    [given] = [case.arguments for case in found if case.setting == name]
    torch.testing.assert_close(sparse.loss(**given), batched.loss(**given))


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    given = native("ragged")
    leaves = [level.requires_grad_() for level in given["cls_scores"]]
    total = sparse.loss(**given)["total"] * 3
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, leaves), strict=True))


def test_the_class_gradient_cannot_be_differentiated() -> None:
    given, weight = native("ragged"), torch.ones((), requires_grad=True)
    leaves = [level.requires_grad_() for level in given["cls_scores"]]
    gradients = torch.autograd.grad(sparse.loss(**given)["total"] * weight, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradients[0].sum())


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_background_in_pieces(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 3, 11, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    weight = torch.rand(5, 11, generator=generator, dtype=torch.float64)
    plain = (logits.sigmoid() ** gamma * F.softplus(logits) * weight[:, None]).sum()
    for size in (1, 40, 70, 1000):
        monkeypatch.setattr(focal, "_CHUNK", size)
        room = torch.empty_like(logits)
        found = focal.focal_background_loss(logits.detach(), weight, gamma=gamma, gradient=room)
        torch.testing.assert_close(found, plain.detach())
        torch.testing.assert_close(room, torch.autograd.grad(plain, logits, retain_graph=True)[0])


# ---------------------------------------------------------------------------------------------------------------- cost
def test_waits_as_often_for_more_ground_truths() -> None:
    few = realistic("crowd", num_images=2, seed=3, image_size=(128, 128), num_gts=15)
    syncs = [count(partial(sparse.loss, **SYSTEM.native(scene)))[1].host_syncs for scene in (few, CROWD)]
    assert syncs[0] == syncs[1]


def test_memory_is_little_more_than_the_gradients() -> None:
    given = SYSTEM.native(realistic("crowd", num_images=1, seed=3, image_size=(512, 512), num_gts=150))
    maps = sum(4 * level.numel() for name in ("cls_scores", "bbox_preds") for level in given[name])
    found, dense = (count(partial(gradients_of, module.loss, given))[1].peak_live_bytes for module in (sparse, batched))
    assert found < 2 * maps + (1 << 23)
    assert found < dense / 6
