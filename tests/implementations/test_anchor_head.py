from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from detoracle.implementations.batched import anchor_head as batched
from detoracle.implementations.batched.anchor_head_boxes import inside_flags
from detoracle.implementations.registry import discover
from detoracle.properties.anchor_head_settings import HEADS
from detoracle.properties.checking import Case, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reports.counters import count

SYSTEM = system_of("anchor_head")
OPERATIONS = {operation.name: operation for operation in SYSTEM.operations}
EDGE = {scene.name: scene for scene in edge_cases()}
CHOSEN = [
    "single",
    "ragged",
    "empty-one",
    "empty-all",
    "crowded-cell",
    "identical-other-class",
    "nested-concentric",
    "outside-mixed",
    "zero-row-first",
    "degenerate-pair",
    "equal-several",
    "nan-box",
]
SCENES = [*(EDGE[name] for name in CHOSEN), *random_scenes(8, seed=1)]
HEAVY = {"anchor_head.loss", "anchor_head.ssd_loss"}
FEW = [EDGE["ragged"], EDGE["empty-one"], EDGE["one-class"]]
CALLS = {(one.operation, one.name): one.load() for one in discover() if one.operation in OPERATIONS}


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype) -> list[tuple[Case, Expectation]]:
    found = cases(SYSTEM, OPERATIONS[operation], scene, dtype=dtype)
    return [(case, expect(SYSTEM, OPERATIONS[operation], case.arguments)) for case in found]


def wrong_cases(
    operation: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], call)
    results = [judge_case(case, right, perform_) for case, right in expected(operation, scene, dtype)]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


def test_every_operation_is_there() -> None:
    for kind in ("batched", "loop"):
        assert {name for name, of in CALLS if of == kind} == set(OPERATIONS)


@pytest.mark.parametrize(("operation", "kind"), CALLS)
def test_right(kind: str, operation: str) -> None:
    scenes = FEW if operation in HEAVY else SCENES
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene, CALLS[operation, kind])] == []


@pytest.mark.parametrize(("operation", "kind"), [key for key in CALLS if key[0] not in HEAVY])
def test_right_in_double_precision(kind: str, operation: str) -> None:
    assert wrong_cases(operation, EDGE["ragged"], CALLS[operation, kind], torch.float64) == []


# -------------------------------------------------------------------------------------------- beyond the suite's cases
def regions() -> dict[str, Any]:
    given = SYSTEM.native(EDGE["ragged"])
    arguments = {name: given[name] for name in ("anchors", "gt_boxes", "gt_valid")}
    inside = torch.ones(len(given["gt_valid"]), len(given["anchors"]), dtype=torch.bool)
    inside[:, ::3] = False
    return {
        **arguments,
        "inside": inside,
        "ignore_boxes": given["gt_boxes"] + 6,
        "ignore_valid": given["gt_valid"],
        "ignore_iof_thr": 0.3,
    }


@pytest.mark.parametrize("kind", ["batched", "loop"])
@pytest.mark.parametrize("settings", [{}, {"ignore_wrt_candidates": False}, {"match_low_quality": False}], ids=str)
def test_settings_of_the_assignment(kind: str, settings: dict[str, Any]) -> None:
    operation, arguments = OPERATIONS["anchor_head.assign"], {**regions(), **settings}
    given = perform(operation, CALLS["anchor_head.assign", kind], arguments)
    assert not expect(SYSTEM, operation, arguments).judge(given).wrong


@pytest.mark.parametrize("kind", ["batched", "loop"])
def test_added_ground_truths_are_drawn_with_the_anchors(kind: str) -> None:
    gt_index = torch.randint(-2, 4, (3, 90), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
    arguments = (gt_index, torch.zeros(3, 4, dtype=torch.int64), valid)
    settings: dict[str, Any] = {"num": 40, "seed": 5, "add_gt_as_proposals": True}
    given = CALLS["anchor_head.sample", kind](*arguments, **settings)
    right = OPERATIONS["anchor_head.sample"].oracle(*arguments, **settings)
    assert all(torch.equal(a, b) for a, b in zip(given, right, strict=True))


# --------------------------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize("operation", ["anchor_head.assign", "anchor_head.targets"])
@pytest.mark.parametrize("scene", ["ragged", "crowd", "empty-all"])
def test_batched_never_waits_for_the_device(scene: str, operation: str) -> None:
    for case in cases(SYSTEM, OPERATIONS[operation], EDGE[scene]):
        _, counters = count(partial(CALLS[operation, "batched"], **case.arguments))
        assert counters.host_syncs == 0


def arguments_of(operation: str, scene: str) -> dict[str, dict[str, Any]]:
    """Arguments by the name in brackets of each case."""
    found = cases(SYSTEM, OPERATIONS[operation], EDGE[scene])
    return {case.name.partition("(")[2].rstrip(")"): dict(case.arguments) for case in found}


@pytest.mark.parametrize("name", [name for name in HEADS if "sampler" not in HEADS[name]])
def test_batched_loss_never_waits_forward_or_backward(name: str) -> None:
    given = arguments_of("anchor_head.loss", "ragged")[name]
    leaves = [level.requires_grad_() for level in (*given["cls_scores"], *given["bbox_preds"])]
    _, counters = count(lambda: torch.autograd.grad(batched.loss(**given)["total"], leaves))
    assert counters.host_syncs == 0


def test_batched_launches_no_more_for_more_ground_truths() -> None:
    small, large = (
        count(partial(batched.assign, **arguments_of("anchor_head.assign", scene)["retina"]))[1]
        for scene in ("single", "crowd")
    )
    assert small.operations == large.operations


def test_batched_assign_is_one_graph() -> None:
    compiled = torch.compile(batched.assign, fullgraph=True, dynamic=False, backend="eager")
    assert wrong_cases("anchor_head.assign", EDGE["ragged"], compiled) == []
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------ wrong variants
def first_claims(gt_boxes: torch.Tensor, gt_valid: torch.Tensor, **given: Any) -> Any:
    """Ground truths claim in reverse order, so that the first of those that tie keeps the anchor."""
    turned = batched.assign(gt_boxes=gt_boxes.flip(1), gt_valid=gt_valid.flip(1), **given)
    last = gt_valid.shape[1] - 1
    return dataclasses.replace(
        turned, gt_index=torch.where(turned.gt_index >= 0, last - turned.gt_index, turned.gt_index)
    )


def without_claims(**given: Any) -> Any:
    """Thresholds alone."""
    return batched.assign(**{**given, "match_low_quality": False})


def right_limit_counts(allowed_border: float, **given: Any) -> Any:
    """Anchors may touch the right and bottom limit."""
    return inside_flags(**given, allowed_border=allowed_border + 2**-6 if allowed_border >= 0 else -1)


def background_is_last_class(num_classes: int, **given: Any) -> Any:
    """Background has the last class's label."""
    return batched.targets(**given, num_classes=num_classes - 1)


def divided_by_images(**given: Any) -> Any:
    """Divided by the number of images too."""
    return {name: part / len(given["gt_boxes"]) for name, part in batched.loss(**given).items()}


def twice_as_many_negatives(neg_pos_ratio: int, **given: Any) -> Any:
    """Twice the hard negatives."""
    return batched.ssd_loss(**given, neg_pos_ratio=2 * neg_pos_ratio)


@pytest.mark.parametrize(
    ("operation", "scene", "variant"),
    [
        ("anchor_head.assign", "identical-other-class", first_claims),
        ("anchor_head.assign", "ragged", without_claims),
        ("anchor_head.inside_flags", "ragged", right_limit_counts),
        ("anchor_head.targets", "ragged", background_is_last_class),
        ("anchor_head.loss", "ragged", divided_by_images),
        ("anchor_head.ssd_loss", "ragged", twice_as_many_negatives),
    ],
)
def test_wrong_is_judged_wrong(operation: str, scene: str, variant: Callable[..., Any]) -> None:
    assert wrong_cases(operation, EDGE[scene], variant)
