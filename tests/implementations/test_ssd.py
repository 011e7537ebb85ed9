from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.batched import ssd as batched
from detoracle.implementations.loop import ssd as loop
from detoracle.implementations.registry import marked_in
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference.contract import Operation
from detoracle.reports.counters import count

SSD = system_of("ssd")
OPERATIONS = {operation.name: operation for operation in SSD.operations}
KINDS = {"batched": batched, "loop": loop}
EDGE = {scene.name: scene for scene in edge_cases()}
CHOSEN = [
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
SCENES = [*(EDGE[name] for name in CHOSEN), *random_scenes(8, seed=3)]


def implementation(module: ModuleType, operation: str) -> Callable[..., Any]:
    [found] = [one for one in marked_in(module) if one.operation == operation]
    return found.load()


def wrong_cases(
    operation: Operation, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    results = [
        judge_case(case, expect(SSD, operation, case.arguments), partial(perform, operation, call))
        for case in cases(SSD, operation, scene, dtype=dtype)
    ]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_right(kind: str, operation: Operation) -> None:
    call = implementation(KINDS[kind], operation.name)
    assert [wrong for scene in SCENES for wrong in wrong_cases(operation, scene, call)] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_right_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    for operation in SSD.operations:
        call = implementation(KINDS[kind], operation.name)
        assert wrong_cases(operation, EDGE["ragged-full"], call, dtype) == []


# --------------------------------------------------------------------------------------------------- no oracle's answer
def native(*scenes: str) -> dict[str, Any]:
    [arguments] = [SSD.native(EDGE[scene]) for scene in scenes]
    return {name: value for name, value in arguments.items() if name != "settings"}


@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_image_without_ground_truth_is_background(module: ModuleType) -> None:
    given = native("empty-one")
    alone = {name: value if name == "priors" else value[:1] for name, value in given.items()}
    parts, without = module.loss(**given), module.loss(**alone)
    assert {name: float(part) for name, part in parts.items()} == {n: float(part) for n, part in without.items()}


@pytest.mark.parametrize("scene", ["empty-single", "empty-all"])
@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_batch_without_ground_truth_costs_nothing(module: ModuleType, scene: str) -> None:
    given = native(scene)
    leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
    total = module.loss(**given)["total"]
    gradients = torch.autograd.grad(total, leaves)
    assert float(total.detach()) == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_padding_may_come_first(module: ModuleType) -> None:
    given = native("ragged-full")
    targets = ("gt_boxes", "gt_labels", "gt_valid")
    turned = {name: value.flip(1) if name in targets else value for name, value in given.items()}
    assert bool((~turned["gt_valid"][:, 0]).any())
    operation = OPERATIONS["ssd.match"]
    matching = {name: turned[name] for name in ("priors", *targets)}
    verdict = expect(SSD, operation, matching).judge(perform(operation, module.match, matching))
    assert verdict.status == "equal"


# --------------------------------------------------------------------------------------------------------------- cost
def calls(scene: str, operation: Operation) -> list[Callable[[], Any]]:
    call = implementation(batched, operation.name)
    return [partial(call, **case.arguments) for case in cases(SSD, operation, EDGE[scene])]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("scene", ["crowd", "empty-all"])
def test_batched_never_waits_for_the_device(scene: str, operation: Operation) -> None:
    assert [count(call)[1].host_syncs for call in calls(scene, operation)] == [0] * len(calls(scene, operation))


def test_batched_loss_never_waits_backward() -> None:
    given = native("crowd")
    leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
    _, counters = count(lambda: torch.autograd.grad(batched.loss(**given)["total"], leaves))
    assert counters.host_syncs == 0


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_batched_is_one_graph(operation: Operation) -> None:
    call = implementation(batched, operation.name)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert wrong_cases(operation, EDGE["ragged-full"], compiled) == []
    torch.compiler.reset()


def test_batched_sorts_once() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        batched.loss(**native("crowd"))
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::sort") == 1


# ------------------------------------------------------------------------------------------------------ wrong variants
def first_wins(**given: Any) -> Any:
    """The first of several ground truths keeps a shared best prior."""
    turned = {n: v.flip(1) if n in ("gt_boxes", "gt_labels", "gt_valid") else v for n, v in given.items()}
    matched = batched.match(**turned)
    most = given["gt_valid"].shape[1]
    return torch.where(matched.positive, most - 1 - matched.gt_index, -1), matched.quality


def strict(**given: Any) -> Any:
    """A threshold that is too high."""
    return batched.match(**{**given, "threshold": given["threshold"] + 0.125})


def by_cross_entropy(conf: Tensor, **given: Any) -> Any:
    """Negatives are ranked by the cross entropy itself, without underflow."""
    return batched.hard_negatives(conf.log_softmax(-1), **given)


def one_negative_more(**given: Any) -> Any:
    """Four negatives a positive."""
    return batched.hard_negatives(**{**given, "neg_pos": given["neg_pos"] + 1})


def positives_twice(**given: Any) -> Any:
    """A positive costs its class loss twice, as where masks are added as numbers."""
    parts = batched.loss(**given)
    matched = batched.match(**{n: given[n] for n in ("priors", "gt_boxes", "gt_labels", "gt_valid", "threshold")})
    target = matched.extra["class_target"][matched.positive]
    again = F.cross_entropy(given["conf"][matched.positive], target, reduction="sum") / matched.positive.sum()
    return {**parts, "classification": parts["classification"] + again, "total": parts["total"] + again}


def mean_over_images(**given: Any) -> Any:
    """Each loss is divided by the number of positives times that of images."""
    return {name: part / len(given["loc"]) for name, part in batched.loss(**given).items()}


def gradient_everywhere(**given: Any) -> Any:
    """The right loss, whose gradient reaches the offsets of all priors."""
    parts = batched.loss(**given)
    return {**parts, "total": parts["total"] + given["loc"].sum() - given["loc"].sum().detach()}


@pytest.mark.parametrize(
    ("operation", "scene", "variant"),
    [
        ("ssd.match", "identical-other-class", first_wins),
        ("ssd.match", "crowd", strict),
        ("ssd.encode", "single", partial(batched.encode, variances=(0.1, 0.1))),
        ("ssd.decode", "single", partial(batched.decode, variances=(0.2, 0.2))),
        ("ssd.log_sum_exp", "extreme-logits-200", lambda conf: conf.logsumexp(-1)),
        ("ssd.hard_negatives", "ragged-full", by_cross_entropy),
        ("ssd.hard_negatives", "single", one_negative_more),
        ("ssd.loss", "ragged-full", positives_twice),
        ("ssd.loss", "ragged-full", mean_over_images),
        ("ssd.loss", "ragged-full", gradient_everywhere),
    ],
)
def test_wrong_is_judged_wrong(operation: str, scene: str, variant: Callable[..., Any]) -> None:
    assert wrong_cases(OPERATIONS[operation], EDGE[scene], variant)


def test_loss_mined_by_cross_entropy_is_judged_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "log_sum_exp", lambda conf: conf.logsumexp(-1))
    assert wrong_cases(OPERATIONS["ssd.loss"], EDGE["ragged-full"], batched.loss)
