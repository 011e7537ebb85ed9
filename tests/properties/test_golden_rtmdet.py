from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detoracle.properties.golden.rtmdet import replay
from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.reference import rtmdet, rtmdet_loss, yolox

SCENES = {scene.name: scene for scene in read_vectors(Path(__file__).parents[1] / "golden" / "rtmdet.npz")}
TIED_AT_THE_LAST_PLACE = {"matching_before.0", "assigned_gt_inds.0"}
ALTERED = ("masks_0", "net-share1-obj1-exp1", "unit-overlaps-random", "unit-qfl-tuple", "unit-giou-weight4")
ALTERED += ("unit-coder", "unit-points", "unit-geomean")
OUTPUTS = [(name, stage) for name in ALTERED for stage in SCENES[name].outputs]


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_every_stage_equals_the_recording(scene: Recorded) -> None:
    checks = list(replay(scene))
    assert [check for check in checks if check.status == "different"] == []
    assert {check.stage for check in checks if check.status == "ambiguous"} <= TIED_AT_THE_LAST_PLACE
    in_group = {"cls_avg_factor", "bbox_avg_factor"} if "ddp" in scene.info["tags"] else set()
    assert {check.stage for check in checks if check.status == "unchecked"} == in_group
    assert {check.stage for check in checks} >= set(scene.outputs)
    if scene.raises:
        assert [check.stage for check in checks] == ["raises"]


def test_only_exact_ties_leave_claims_open() -> None:
    tied = {n for n, scene in SCENES.items() if any(check.status == "ambiguous" for check in replay(scene))}
    assert tied == {n for n, scene in SCENES.items() if "topk-tie" in scene.info["tags"]}


def test_every_recorded_exception_is_a_named_behaviour() -> None:
    named = Counter(
        check.detail.partition(" for ")[0]
        for scene in SCENES.values()
        if scene.raises
        for check in replay(scene)
        if check.stage == "raises"
    )
    assert named == {
        "rtmdet.no-valid-prior": 3,
        "rtmdet.no-valid-prior-in-one-image": 1,
        "rtmdet.label-out-of-range": 2,
        "rtmdet.box-type": 1,
        "rtmdet.quality-dtype": 5,
        "rtmdet.unequal-strides": 1,
        "rtmdet.probability-out-of-range": 1,
        "rtmdet.sum-with-average-factor": 2,
        "rtmdet.weight-shape": 1,
    }


# ------------------------------------------------------------------------------------- the replay finds differences
def altered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another recording that could be in its place: other numbers, or the same ones elsewhere."""
    if array.dtype == bool:
        return ~array
    if array.ndim and np.issubdtype(array.dtype, np.integer) and array.size > 1:
        return np.ascontiguousarray(np.flip(array, -1))
    largest = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=1)
    changed: np.ndarray[Any, Any] = array + array.dtype.type(largest)
    return changed


@pytest.mark.parametrize(("name", "stage"), OUTPUTS, ids=[f"{name}-{stage}" for name, stage in OUTPUTS])
def test_an_altered_recording_is_found_out(name: str, stage: str) -> None:
    scene = SCENES[name]
    arrays = {**scene.arrays, f"out/{stage}": altered(scene.arrays[f"out/{stage}"])}
    assert any(check.status == "different" for check in replay(replace(scene, arrays=arrays)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("topk", 12),
        ("soft_center_radius", 2.5),
        ("iou_weight", 2.9),
        ("pos_weight", 0.5),
        ("beta", 1.9),
        ("cls_weight", 1.01),
        ("bbox_weight", 2.01),
        ("offset", 0.5),
    ],
)
def test_another_setting_is_found_out(setting: str, value: float) -> None:
    scene = SCENES["random-b2_0"]
    info = {**scene.info, "cfg": {**scene.info["cfg"], setting: value}}
    assert any(check.status == "different" for check in replay(replace(scene, info=info)))


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (rtmdet, "_near", lambda priors, boxes: (_margins(priors, boxes) >= 0).all(-1).any(0)),
        (rtmdet, "_claim", lambda cost, k: yolox._claim(cost, k + 1)),
        (rtmdet, "_resolve", lambda claims, cost: yolox._resolve(claims, cost.masked_fill(~claims, torch.inf))),
        (rtmdet, "_resolve", lambda claims, cost: cost.argmin(0)),
        (rtmdet_loss, "_giou_loss", lambda *_, **__: torch.ones(())),
    ],
    ids=["edge-inside", "k-plus-one", "conflict-among-claimants", "nobody-claims", "constant-box-loss"],
)
def test_a_wrong_stage_is_found_out(
    module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, wrong)
    found = []
    for scene in ("on-edge_0", "many-gt_0", "conflicting_0"):
        try:
            found += [check.status == "different" for check in replay(SCENES[scene])]
        except RuntimeError:
            found.append(True)
    assert any(found)


def _margins(priors: Tensor, boxes: Tensor) -> Tensor:
    return torch.cat([priors[:, :2] - boxes[:, None, :2], boxes[:, None, 2:] - priors[:, :2]], dim=-1)
