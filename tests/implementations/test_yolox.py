from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import yolox as batched
from detoracle.implementations.loop import yolox as loop
from detoracle.implementations.registry import marked_in
from detoracle.properties.bounds import outside
from detoracle.properties.checking import Case, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference import yolox as oracle
from detoracle.reference import yolox_loss as oracle_loss
from detoracle.reference.explain.yolox import explain_cost
from detoracle.reports.counters import count

YOLOX = system_of("yolox")
OPERATIONS = {operation.name: operation for operation in YOLOX.operations}
KINDS = {"batched": batched, "loop": loop}
FLAVOURS = ["tutorial", "official"]
CHOSEN = [
    "empty-one",
    "empty-all",
    "empty-single",
    "ragged",
    "crowd",
    "identical-other-class",
    "best-for-a-third",
    "crowded-cell",
    "tiny-several",
    "outside-far",
    "outside-mixed",
    "outside-batch",
    "negative-row",
    "zero-row-first",
    "degenerate-point",
    "degenerate-pair",
    "inverted-both",
    "edge-of-centre-square",
    "equal-several",
    "perfect-2",
    "one-class",
    "one-anchor",
    "four-anchors",
    "many-classes-overconfident",
    "extreme-logits-200",
    "extreme-boxes-50",
    "nan-box",
]


def sixty() -> Scene:
    generator = torch.Generator().manual_seed(60)
    centre, size = torch.rand(60, 2, generator=generator) * 160, 4 + torch.rand(60, 2, generator=generator) * 60
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    labels = torch.randint(8, (60,), generator=generator)
    return Scene("sixty", (160, 160), 8, (boxes, boxes[:0]), (labels, labels[:0]), tags=frozenset({"crowd"}))


EDGE = {scene.name: scene for scene in edge_cases()}
SCENES = [*(EDGE[name] for name in CHOSEN), sixty(), *random_scenes(8, seed=5)]


def implementation(module: ModuleType, operation: str) -> Callable[..., Any]:
    [found] = [one for one in marked_in(module) if one.operation == operation]
    return found.load()


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype) -> list[tuple[Case, Expectation]]:
    found = cases(YOLOX, OPERATIONS[operation], scene, dtype=dtype)
    return [(case, expect(YOLOX, OPERATIONS[operation], case.arguments)) for case in found]


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], call)
    results = [judge_case(case, right, perform_) for case, right in expected(operation, scene, dtype)]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right(kind: str, operation: str) -> None:
    call = implementation(KINDS[kind], operation)
    assert [wrong for scene in SCENES for wrong in wrong_cases(operation, scene, call)] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_right_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    for operation in OPERATIONS:
        call = implementation(KINDS[kind], operation)
        assert wrong_cases(operation, EDGE["ragged"], call, dtype) == []


# ------------------------------------------------------------------------------------------------- to the last anchor
@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_ties_and_nan_fall_as_in_the_oracle(module: ModuleType) -> None:
    """Costs of few values tie all the time, quarters add up exactly, and a NaN cost is the last to be claimed."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 4, (6, 7, 40), generator=generator).float()
    cost = torch.where(torch.rand(whole.shape, generator=generator) < 0.1, torch.nan, whole)
    iou = torch.randint(0, 3, cost.shape, generator=generator) / 4
    iou[:, 3, ::5] = torch.nan
    candidate = torch.rand(6, 40, generator=generator) < torch.linspace(0.05, 1, 6)[:, None]
    valid = torch.rand(6, 7, generator=generator) < 0.7
    assert bool(candidate.any(1).all())
    given, want = (m.dynamic_k_matching(cost, iou, candidate, valid) for m in (module, oracle))
    assert torch.equal(given[0], want[0])
    assert torch.equal(given[1], want[1])
    assert len(want[1].unique()) > 5  # numbers of claims of all sizes


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_padding_may_lie_anywhere_and_hold_anything(module: ModuleType, flavour: str) -> None:
    given = YOLOX.native(EDGE["crowd"])
    leaves = [level.requires_grad_() for level in given["raw"]]
    rows = torch.arange(24) * 2 + 1
    boxes, labels = torch.full((1, 49, 4), torch.nan), torch.full((1, 49), -1)
    valid = torch.zeros(1, 49, dtype=torch.bool)
    boxes[:, rows], labels[:, rows], valid[:, rows] = given["gt_boxes"], given["gt_labels"], True
    padded = {**given, "gt_boxes": boxes, "gt_labels": labels, "gt_valid": valid}
    plain, other = (module.loss(**g, flavour=flavour)["total"] for g in (given, padded))
    assert torch.equal(plain, other)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (plain, other))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_class_cost_is_as_exact_as_the_oracle_where_one_class_is_certain() -> None:
    """Taking a certain class's log(1 - p) off a sum it dominates would leave little but rounding error."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 64, 6, generator=generator) - 3
    logits[..., 2] = 20
    box = torch.tensor([32.0, 32, 40, 40])
    near = box + torch.randn(1, 64, 4, generator=generator)
    predictions = torch.cat([near, torch.full((1, 64, 1), 20.0), logits], dim=-1)
    every = torch.ones(1, 1, 64, dtype=torch.bool)
    arguments = (predictions, box[None, None], torch.tensor([[2]]), every[..., 0], every[0], every)
    exact, _ = explain_cost(*arguments)
    given, _ = batched.cost(*arguments)
    assert not outside(given, exact.value, exact.error).any()


def test_batched_keeps_gradients_finite_where_anchors_overflow() -> None:
    given = YOLOX.native(EDGE["single"])
    leaves = [level.requires_grad_() for level in given["raw"]]
    with torch.no_grad():
        leaves[0][:, 2:4, 0, 0] = 200  # far from the ground truth; exp(200) overflows
    gradients, of_oracle = (torch.autograd.grad(m.loss(**given)["total"], leaves) for m in (batched, oracle_loss))
    assert bool(of_oracle[0].isnan().any())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# --------------------------------------------------------------------------------------------------------------- cost
def calls(scene: str, operation: str) -> list[Callable[[], Any]]:
    call = implementation(batched, operation)
    return [partial(call, **case.arguments) for case in cases(YOLOX, OPERATIONS[operation], EDGE[scene])]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("scene", ["ragged", "crowd", "empty-all"])
def test_batched_never_waits_for_the_device(scene: str, operation: str) -> None:
    assert [count(call)[1].host_syncs for call in calls(scene, operation)] == [0] * len(calls(scene, operation))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_batched_loss_never_waits_backward(flavour: str) -> None:
    given = YOLOX.native(EDGE["ragged"])
    leaves = [level.requires_grad_() for level in given["raw"]]
    _, counters = count(
        lambda: torch.autograd.grad(batched.loss(**given, flavour=flavour, use_l1=True)["total"], leaves)
    )
    assert counters.host_syncs == 0


def test_batched_cost_has_no_tensor_of_pairs_and_classes() -> None:
    gt_boxes, gt_labels, every = torch.ones(1, 40, 4), torch.arange(40)[None], torch.ones(1, 40, 64, dtype=torch.bool)
    predictions = torch.ones(1, 64, 5 + 160)
    (cost, _), counters = count(
        lambda: batched.cost(predictions, gt_boxes, gt_labels, every[..., 0], every[:, 0], every)
    )
    assert counters.peak_live_bytes < cost.numel() * 160 * cost.element_size() / 2


def test_batched_launches_no_more_for_a_larger_scene() -> None:
    small, large = (count(calls(scene, "yolox.loss")[0])[1] for scene in ("single", "crowd"))
    assert small.operations == large.operations


@pytest.mark.parametrize("operation", OPERATIONS)
def test_batched_is_one_graph(operation: str) -> None:
    compiled = torch.compile(implementation(batched, operation), fullgraph=True, dynamic=False, backend="eager")
    assert wrong_cases(operation, EDGE["best-for-a-third"], compiled) == []
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------ wrong variants
def only_claimants_win(cost: Tensor, **given: Any) -> Any:
    """A contested anchor goes to the cheapest of those that claim it."""
    _, k = batched.dynamic_k_matching(cost, **given)
    claims = cost.argsort(dim=-1, stable=True).argsort(dim=-1) < k[..., None]
    winner = cost.masked_fill(~claims, torch.inf).argmin(1)
    return torch.where(claims.any(1), winner, -1), k


def all_ties_claim(cost: Tensor, **given: Any) -> Any:
    """A bare threshold at the last place, so that all who tie there claim."""
    _, k = batched.dynamic_k_matching(cost, **given)
    last = cost.sort(dim=-1).values.gather(-1, k[..., None] - 1)
    claims = cost <= last
    winner = torch.where(claims.sum(1) > 1, cost.argmin(1), claims.int().argmax(1))
    return torch.where(claims.any(1), winner, -1), k


def on_edge_is_inside(**given: Any) -> Any:
    """Anchor points on an edge count: all else lies at least an eighth of a pixel away."""
    gt_boxes = given["gt_boxes"] + torch.tensor([0, 0, 2**-6, 2**-6])
    return batched.candidates(**{**given, "gt_boxes": gt_boxes})


def without_objectness(predictions: Tensor, **given: Any) -> Any:
    """The class cost takes every anchor for an object."""
    certain = torch.full_like(predictions[..., 4:5], 100)
    return batched.cost(torch.cat([predictions[..., :4], certain, predictions[..., 5:]], dim=-1), **given)


def from_cell_centre(raw: list[Tensor], strides: list[int]) -> Any:
    """Centres are offset from the cell's centre."""
    return batched.decode([torch.cat([level[:, :2] + 0.5, level[:, 2:]], dim=1) for level in raw], strides)


def divided_by_images(**given: Any) -> Any:
    """Divided by the number of images too."""
    return {name: part / len(given["gt_boxes"]) for name, part in batched.loss(**given).items()}


def gradient_everywhere(**given: Any) -> Any:
    """The right loss, whose gradient reaches all channels of all anchors."""
    parts, extra = batched.loss(**given), torch.cat([level.flatten() for level in given["raw"]]).sum()
    return {**parts, "total": parts["total"] + (extra - extra.detach())}


@pytest.mark.parametrize(
    ("operation", "scene", "variant"),
    [
        ("yolox.decode", "single", from_cell_centre),
        ("yolox.candidates", "symmetric", on_edge_is_inside),
        ("yolox.cost", "crowd", without_objectness),
        ("yolox.dynamic_k_matching", "best-for-a-third", only_claimants_win),
        ("yolox.dynamic_k_matching", "equal-one", all_ties_claim),
        ("yolox.loss", "ragged", divided_by_images),
        ("yolox.loss", "ragged", gradient_everywhere),
        ("boxes.iou_loss_yolox", "single", lambda **given: batched.iou_loss_yolox(**{**given, "variant": "giou"})),
    ],
)
def test_wrong_is_judged_wrong(operation: str, scene: str, variant: Callable[..., Any]) -> None:
    assert wrong_cases(operation, EDGE[scene], variant)


@pytest.mark.parametrize(
    ("name", "wrong", "operation", "scene"),
    [
        ("_MOST_CLAIMS", 9, "yolox.assign", "crowd"),
        ("_CENTER_RADIUS", {"tutorial": 2.5, "official": 2.5}, "yolox.assign", "crowd"),
        ("_PENALTY", {"tutorial": 1e5, "official": 1e5}, "yolox.cost", "crowd"),
        ("_counted", lambda _boxes, _labels, valid, _flavour: valid, "yolox.assign", "negative-row"),
        ("_class_cost", lambda predictions, _labels: predictions[:, None, :, 4] * 0, "yolox.assign", "crowd"),
    ],
)
def test_wrong_part_is_judged_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, operation: str, scene: str
) -> None:
    monkeypatch.setattr(batched, name, wrong)
    assert wrong_cases(operation, EDGE[scene], implementation(batched, operation))
