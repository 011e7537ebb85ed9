from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from detoracle.implementations.batched import rtmdet as batched
from detoracle.implementations.batched import rtmdet_loss as batched_loss
from detoracle.implementations.registry import marked_in
from detoracle.implementations.sparse import rtmdet as sparse
from detoracle.implementations.sparse import rtmdet_matching as matching
from detoracle.implementations.sparse.focal import focal_background_loss
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reports.counters import count

RTMDET = system_of("rtmdet")
OPERATIONS = {operation.name: operation for operation in RTMDET.operations}
MARKED = {one.operation: one.load() for one in marked_in(sparse)}
EDGE = {scene.name: scene for scene in edge_cases()}
LOSS = OPERATIONS["rtmdet.loss"]
CROWD = realistic("crowd", num_images=1, seed=3, image_size=(256, 256), num_gts=40)


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    found = cases(RTMDET, OPERATIONS[operation], scene, dtype=dtype)
    results = [
        judge_case(
            case,
            expect(RTMDET, OPERATIONS[operation], case.arguments),
            partial(perform, OPERATIONS[operation], call),
        )
        for case in found
    ]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_edge_cases(operation: str) -> None:
    scenes = list(EDGE.values())[operation == "rtmdet.loss" :: 2]  # half each: explaining takes long
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("operation", MARKED)
def test_right_on_random_and_crowded_scenes(operation: str) -> None:
    scenes = [CROWD, *random_scenes(4, seed=3)]
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, MARKED[operation])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", MARKED)
def test_right_in_other_dtypes(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["ragged-full"], MARKED[operation], dtype) == []


# --------------------------------------------------------------------------------------- arguments of users, not scenes
def native(scene: Scene) -> dict[str, Any]:
    return dict(RTMDET.native(scene))


SIZES = torch.tensor([[64, 40], [20, 64], [31, 33]])
MASKS = torch.rand(3, 12, 64, 64, generator=torch.Generator().manual_seed(1)) > 0.7
SETTINGS: dict[str, dict[str, Any]] = {
    "masks": {"gt_masks": MASKS},
    "padded": {"pad_shapes": SIZES},
    "border": {"pad_shapes": SIZES, "image_shapes": SIZES - 3, "allowed_border": 0},
    "weights": {"pos_weight": 2.0, "beta": 1.5, "class_loss_weight": 0.5, "box_loss_weight": 3.0, "giou_eps": 1e-3},
    "centres": {"offset": 0.5, "iou_weight": 1.0},
    "negative": {"iou_weight": -1.0},
    "radius": {"soft_center_radius": -2.0},
    "no sum": {"topk": 0},
    "one claim": {"topk": 1},
    "all IoUs": {"topk": 99},
    "pairs": {"strides": [(8, 8), (16, 16), (32, 32)]},
    "equal strides": {"strides": [8, 8, 8]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_takes_all_settings(setting: str) -> None:
    given = native(EDGE["ragged-full"])
    arguments = {**given, **SETTINGS[setting]}
    if "gt_masks" in arguments:
        arguments["gt_masks"] = MASKS[:, : given["gt_valid"].shape[1]]
    verdict = expect(RTMDET, LOSS, arguments).judge(perform(LOSS, sparse.loss, arguments))
    assert verdict.status == "equal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_of_half_maps_under_autocast(dtype: torch.dtype) -> None:
    given = native(EDGE["ragged-full"])
    given |= {name: [level.to(dtype) for level in given[name]] for name in ("class_logits", "distances")}
    with torch.autocast("cpu", dtype):
        assert not expect(RTMDET, LOSS, given).judge(perform(LOSS, sparse.loss, given)).wrong


def test_small_losses_of_positives_survive_large_ones_of_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of what background costs, from which a positive's own class is taken off, would be its rounding error."""
    points = batched.priors([(8, 8)], [8])[:, :2]
    gt, one = torch.tensor([[[8.0, 8, 56, 56]]]), torch.ones(1, 1, dtype=torch.bool)
    distances = batched.encode(points, gt[0].expand(len(points), 4)).mT.reshape(1, 4, 8, 8)  # IoUs are 1
    logits = torch.full((1, 2, 8, 8), -30.0)
    label = torch.zeros(1, 1, dtype=torch.int64)
    given = {"class_logits": [logits], "distances": [distances], "strides": [8]}
    given |= {"gt_boxes": gt, "gt_labels": label, "gt_valid": one}
    boxes = batched.decode(points, distances.flatten(2).mT)
    positive = batched.assign(
        logits.flatten(2).mT,
        boxes,
        batched.priors([(8, 8)], [8]),
        torch.ones(1, 64, dtype=torch.bool),
        gt,
        label,
        one,
    ).positive
    logits[:, 0].masked_fill_(positive.view(1, 8, 8), 70.0)
    expected, others = expect(RTMDET, LOSS, given), sparse._others
    assert not expected.judge(perform(LOSS, sparse.loss, given)).wrong
    error = torch.finfo(torch.float32).eps * float(logits.amax())
    monkeypatch.setattr(sparse, "_others", lambda *rest: others(*rest) + error)
    assert expected.judge(perform(LOSS, sparse.loss, given)).wrong


def test_all_logits_are_treated_by_the_given_pass() -> None:
    given = native(EDGE["ragged-full"])
    shapes = []

    def background(logits: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return focal_background_loss(logits, *rest, **settings)

    assert torch.equal(sparse.loss(**given, background=background)["total"], sparse.loss(**given)["total"])
    assert {tuple(level.flatten(2).shape) for level in given["class_logits"]} <= set(shapes)


# ------------------------------------------------------------------------------------------------- to the last anchor
def predictions(scene: Scene) -> dict[str, Any]:
    return dict(next(cases(RTMDET, OPERATIONS["rtmdet.assign"], scene)).arguments)


@pytest.mark.parametrize("style", ["trained", "untrained", "poor", "far"])
def test_assigns_as_batched_does(style: str) -> None:
    """With poor boxes or centres far from their boxes, costs are high and bounds let much through."""
    given = predictions(CROWD)
    if style == "untrained":
        given["class_logits"] = torch.zeros_like(given["class_logits"])
    elif style == "poor":
        given["boxes"] = given["boxes"] / 8
    elif style == "far":
        given["soft_center_radius"] = -30.0
    found, want = sparse.assign(**given), batched.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)
    assert all(torch.equal(found.extra[name], want.extra[name]) for name in want.extra)


def test_a_bound_that_is_too_low_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_near(self: Any, bound: torch.Tensor) -> Any:
        return near(self, bound / 1e4)

    near = matching.RTMDetMatcher._near
    monkeypatch.setattr(matching.RTMDetMatcher, "_near", too_near)
    given = predictions(CROWD)
    assert not torch.equal(sparse.assign(**given).gt_index, batched.assign(**given).gt_index)


def test_priors_in_another_order_are_assigned_alike() -> None:
    given = predictions(EDGE["crowd"])
    order = torch.randperm(len(given["priors"]), generator=torch.Generator().manual_seed(0))
    other = given | {name: given[name][:, order] for name in ("class_logits", "boxes", "inside")}
    other["priors"] = given["priors"][order]
    assert torch.equal(sparse.assign(**other).gt_index, sparse.assign(**given).gt_index[:, order])


def test_image_without_a_valid_prior_trains_nothing() -> None:
    given = native(EDGE["ragged-full"]) | {"pad_shapes": torch.tensor([[64, 64], [0, 0], [64, 64]])}
    leaves = [level.requires_grad_() for name in ("class_logits", "distances") for level in given[name]]
    gradients = torch.autograd.grad(sparse.loss(**given)["total"], leaves)
    trained = torch.stack([gradient.flatten(1).any(1) for gradient in gradients]).any(0)
    assert trained.tolist() == [True, False, True]


# ----------------------------------------------------------------------------------------------------------- gradients
def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    given = native(EDGE["ragged-full"]) | {"pos_weight": 2.0}
    leaves = [level.requires_grad_() for name in ("class_logits", "distances") for level in given[name]]
    parts = sparse.loss(**given)
    halves = (parts["classification"] * torch.tensor([1.0, 2.0, 3.0])).sum(), parts["box"].sum()
    first, again = (torch.autograd.grad((halves[0] + halves[1]) / 2, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = torch.autograd.grad(halves[0] / 2, leaves[:3])
    assert all(torch.equal(a, b) for a, b in zip(first, alone, strict=False))


def test_the_class_gradient_cannot_be_differentiated() -> None:
    given = native(EDGE["ragged-full"])
    leaves = [level.requires_grad_() for level in given["class_logits"]]
    weight = torch.ones((), requires_grad=True)
    gradients = torch.autograd.grad(sparse.loss(**given)["total"] * weight, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradients[0].sum())


# ---------------------------------------------------------------------------------------------------------------- cost
def test_waits_as_often_for_more_ground_truths() -> None:
    scenes = realistic("crowd", num_images=1, seed=3, image_size=(256, 256), num_gts=15), CROWD
    few, many = (count(partial(sparse.loss, **native(scene)))[1].host_syncs for scene in scenes)
    assert few == many


def test_memory_is_that_of_the_candidates() -> None:
    given = native(realistic("crowd", num_images=1, seed=3, num_gts=300))
    found, dense = (count(partial(loss, **given))[1].peak_live_bytes for loss in (sparse.loss, batched_loss.loss))
    assert found < dense / 6
