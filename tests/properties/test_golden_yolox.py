"""Every stage of the YOLOX oracle against what the published code returned, and the replay against planted defects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.properties.golden.yolox import replay
from detoracle.reference import yolox, yolox_cost, yolox_loss

GOLDEN = Path(__file__).parents[1] / "golden"
SCENES = {
    f"{recording}/{scene.name}": scene
    for recording in ("yolox_doc", "yolox_main")
    for scene in read_vectors(GOLDEN / f"{recording}.npz")
}
TIED = ("yolox_doc/extreme-logits-200", {"match_before.1", "fg.1", "matched_gt.1"})
"""Costs of the k-th and the next candidate are equal to the bit there, and the recording broke the tie otherwise."""


@pytest.mark.parametrize("name", SCENES)
def test_every_stage_equals_the_recording(name: str) -> None:
    checks = list(replay(SCENES[name]))
    assert [check for check in checks if check.status in ("different", "unchecked")] == []
    ambiguous = {check.stage for check in checks if check.status == "ambiguous"}
    assert ambiguous == (TIED[1] if name == TIED[0] else set())
    assert {check.stage for check in checks} >= set(SCENES[name].outputs) | {"raises"}


def test_every_recorded_exception_is_a_named_behaviour() -> None:
    named = Counter(
        check.detail.partition(" for ")[0]
        for scene in SCENES.values()
        if scene.raises
        for check in replay(scene)
        if check.stage == "raises"
    )
    assert set(named) == {"yolox.no-candidate", "yolox.label-out-of-range", "yolox.non-finite-prediction"}
    assert named.total() == sum(scene.raises is not None for scene in SCENES.values())


def different(scene: Recorded) -> set[str]:
    """Stages that differ; a replay that breaks down on what was recorded is itself one, as in the command."""
    found = set()
    try:
        for check in replay(scene):
            if check.status == "different":
                found.add(check.stage)
    except (IndexError, RuntimeError):
        found.add("replay")
    return found


def altered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another recording that could be in its place: the opposite mask, or every number a little larger."""
    if array.dtype == bool:
        return ~array
    changed: np.ndarray[Any, Any] = array * array.dtype.type(2) + array.dtype.type(1)
    return changed


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in ("yolox_doc/many", "yolox_main/many") for stage in SCENES[name].outputs],
)
def test_an_altered_recording_is_found_out(name: str, stage: str) -> None:
    scene = SCENES[name]
    changed = {**scene.arrays, f"out/{stage}": altered(scene.arrays[f"out/{stage}"])}
    assert different(replace(scene, arrays=changed)) & {stage, "replay"}


def test_a_recorded_stage_without_an_oracle_stage_is_a_finding() -> None:
    scene = SCENES["yolox_doc/many"]
    more = replace(scene, arrays={**scene.arrays, "out/something_new": np.zeros(3)})
    assert different(more) == {"something_new"}


def wrong_dynamic_k(iou: Tensor) -> Tensor:
    best = iou.topk(min(10, iou.shape[1]), dim=1).values.sum(1)
    return best.nan_to_num(nan=1.0).round().long().clamp(min=1)


def wrong_resolve(claims: Tensor, cost: Tensor) -> Tensor:
    among = cost.masked_fill(~claims, torch.inf).argmin(0)
    return torch.where(claims.any(0), among, -1)


def wrong_inside(points: Any, corners: Any) -> Any:
    return (torch.cat([points - corners[..., :2], corners[..., 2:] - points], dim=-1) >= 0).all(-1)


def wrong_l1_target(
    gt_boxes: Any, cells: Tensor, anchor_strides: Tensor, right: Callable[..., Any] = yolox_loss._l1_target
) -> Any:
    return right(gt_boxes, cells + 0.5, anchor_strides)


@pytest.mark.parametrize(
    ("stage", "wrong", "found"),
    [
        ("_dynamic_k", wrong_dynamic_k, "k"),
        ("_resolve", wrong_resolve, "matched_gt"),
        ("_inside", wrong_inside, "cand_mask"),
        ("_l1_target", wrong_l1_target, "sum_l1"),
        ("_IOU_COST_WEIGHT", 3.001, "cost"),
        ("_BOX_LOSS_WEIGHT", 5.001, "loss"),
    ],
)
def test_a_planted_defect_of_the_oracle_is_found_out(
    stage: str, wrong: object, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = next(module for module in (yolox, yolox_cost, yolox_loss) if hasattr(module, stage))
    monkeypatch.setattr(module, stage, wrong)
    names = ("many", "edge-on-centre", "edge-centre-radius", "overlap", "overlap-l1")
    scenes = [scene for scene in SCENES.values() if scene.name in names]
    assert found in {stage.partition(".")[0] for scene in scenes for stage in different(scene)}
