"""Every stage of the YOLOv8 oracle against what ultralytics returned, and the replay against planted defects."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck
from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.properties.golden.yolov8 import replay
from detoracle.reference import yolov8, yolov8_loss
from detoracle.reference.errors import UpstreamRaises

SCENES = {scene.name: scene for scene in read_vectors(Path(__file__).parents[1] / "golden" / "yolov8_doc.npz")}
TIED = {"mask_topk", "fg_mask", "target_gt_idx"}
"""Stages in which ultralytics may pick other anchors among equal metrics."""


@cache
def checks_of(name: str) -> tuple[StageCheck, ...]:
    return tuple(replay(SCENES[name]))


@pytest.mark.parametrize("name", SCENES)
def test_every_stage_equals_the_recording(name: str) -> None:
    checks = checks_of(name)
    assert [check for check in checks if check.status not in ("equal", "ambiguous")] == []
    assert {check.stage for check in checks if check.status == "ambiguous"} <= TIED
    assert {check.stage for check in checks} >= set(SCENES[name].outputs)


def test_only_ties_of_the_metric_are_ambiguous() -> None:
    for name, scene in SCENES.items():
        tied = scene.has("out/derived_topk_ambiguous") and scene.tensor("out/derived_topk_ambiguous").any()
        stages = {check.stage for check in checks_of(name) if check.status == "ambiguous"}
        if not tied:
            assert stages <= {"mask_topk"}, name  # ties outside the box, without consequence


def test_every_recorded_exception_is_a_named_behaviour() -> None:
    named = Counter(
        check.detail.partition(" for ")[0]
        for name, scene in SCENES.items()
        if scene.raises
        for check in checks_of(name)
        if check.stage == "raises"
    )
    assert set(named) == {"yolov8.few-anchors", "yolov8.label-out-of-range", "yolov8.dfl-target-out-of-range"}
    assert named.total() == sum(scene.raises is not None for scene in SCENES.values())


def different(scene: Recorded) -> set[str]:
    """Stages that differ; a replay that breaks down on what was recorded is itself one, as in the command."""
    found = set()
    try:
        for check in replay(scene):
            if check.status == "different":
                found.add(check.stage)
    except (IndexError, RuntimeError, UpstreamRaises):
        found.add("replay")
    return found


def altered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another recording that could be in its place: the opposite mask, or every number another one."""
    if array.dtype == bool:
        return ~array
    if not array.size:
        return np.zeros(1, array.dtype)
    changed: np.ndarray[Any, Any] = array * array.dtype.type(2) + array.dtype.type(1)
    return changed


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in ("overlap", "fn-iou-random", "fn-dist", "fn-dfl-16") for stage in SCENES[name].outputs],
)
def test_an_altered_recording_is_found_out(name: str, stage: str) -> None:
    scene = SCENES[name]
    changed = {**scene.arrays, f"out/{stage}": altered(scene.arrays[f"out/{stage}"])}
    assert different(replace(scene, arrays=changed)) & {stage, "replay"}


def test_a_recorded_stage_without_an_oracle_stage_is_a_finding() -> None:
    scene = SCENES["overlap"]
    more = replace(scene, arrays={**scene.arrays, "out/something_new": np.zeros(3)})
    assert different(more) == {"something_new"}


def test_what_another_flavour_does_otherwise_is_not_the_oracles_fault() -> None:
    scene = SCENES["single"]
    changed = {**scene.arrays, "out/total": altered(scene.arrays["out/total"])}
    other = replace(scene, recording="yolov8_latest", arrays=changed)
    assert {check.stage for check in replay(other) if check.status == "flavour"} == {"total"}
    assert different(other) == set()


def wrong_inside(points: Any, gt_boxes: Any) -> Any:
    left_top, right_bottom = gt_boxes[:, None, :2], gt_boxes[:, None, 2:]
    return (torch.cat([points - left_top, right_bottom - points], dim=-1) >= 0).all(-1)


def wrong_resolve(claims: Tensor, overlap: Tensor) -> Tensor:
    among = overlap.masked_fill(~claims, -1).argmax(0)
    return torch.where(claims.any(0), among, -1)


def wrong_claim(metric: Tensor, valid: Tensor, topk: int) -> Tensor:
    return (
        torch.zeros_like(metric, dtype=torch.bool).scatter(1, metric.topk(topk + 1, 1).indices, True) & valid[:, None]
    )


def wrong_quality(gt_index: Tensor, metric: Any, overlaps: Any) -> Any:
    """Divides by the best metric of all anchors, not of the positives."""
    positive = gt_index[:, None] == torch.arange(metric.shape[1])[:, None]
    best = (overlaps * positive).amax(-1, keepdim=True) / (metric.amax(-1, keepdim=True) + 1e-9)
    return (metric * positive * best).amax(1)


@pytest.mark.parametrize(
    ("module", "name", "wrong", "found"),
    [
        (yolov8, "_inside", wrong_inside, "mask_in_gts"),
        (yolov8, "_resolve", wrong_resolve, "mask_pos"),
        (yolov8, "_claim", wrong_claim, "mask_topk"),
        (yolov8, "_quality", wrong_quality, "target_scores"),
        (yolov8, "_EPS", 1e-7, "target_scores"),
        (yolov8_loss, "_LAST_BIN_MARGIN", 0.1, "target_ltrb_fg"),
        (yolov8_loss, "_expectation", lambda logits: torch.softmax(logits, -1).sum(-1) * 7.5, "pred_bboxes"),
    ],
    ids=["inside", "resolve", "claim", "quality", "epsilon", "last bin", "expectation"],
)
def test_a_planted_defect_of_the_oracle_is_found_out(
    module: Any, name: str, wrong: object, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, wrong)
    scenes = ("overlap", "nested", "edge-on-centre", "zero-metric", "dfl-clamp", "random-00")
    assert found in {stage for scene in scenes for stage in different(SCENES[scene])}
