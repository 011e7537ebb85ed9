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
from detoracle.properties.golden.rtmdet import replay
from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.reference import rtmdet, rtmdet_loss, yolox
from detoracle.reference.errors import InputError
from detoracle.reference.rtmdet_loss import _average_factors

SCENES = {scene.name: scene for scene in read_vectors(Path(__file__).parents[1] / "golden" / "rtmdet.npz")}
TIED_AT_THE_LAST_PLACE = {"matching_before.0", "assigned_gt_inds.0"}
INDEPENDENT = [  # no output of these is another stage's input
    "net-share1-obj1-exp1",
    "unit-overlaps-random",
    "unit-qfl-tuple",
    "unit-giou-weight4",
    "unit-coder",
    "unit-points",
    "unit-geomean",
]


@cache
def replayed(name: str) -> tuple[StageCheck, ...]:
    return tuple(replay(SCENES[name]))


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_every_stage_equals_the_recording(scene: Recorded) -> None:
    checks = replayed(scene.name)
    assert [check for check in checks if check.status in ("different", "unchecked")] == []
    assert {check.stage for check in checks if check.status == "ambiguous"} <= TIED_AT_THE_LAST_PLACE
    assert {check.stage for check in checks} >= set(scene.outputs)
    if scene.raises:
        assert [check.stage for check in checks] == ["raises"]


def test_only_exact_ties_leave_claims_open() -> None:
    tied = {name for name in SCENES if any(check.status == "ambiguous" for check in replayed(name))}
    assert tied == {n for n, scene in SCENES.items() if "topk-tie" in scene.info["tags"]}


def test_every_recorded_exception_is_a_named_behaviour() -> None:
    named = Counter(
        check.detail.partition(" for ")[0]
        for scene in SCENES.values()
        if scene.raises
        for check in replayed(scene.name)
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
    flipped = np.ascontiguousarray(np.flip(array, -1)) if array.ndim else array
    if np.issubdtype(array.dtype, np.integer) and not np.array_equal(flipped, array):
        return flipped
    largest = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=1)
    changed: np.ndarray[Any, Any] = array + array.dtype.type(largest)
    return changed


@pytest.mark.parametrize("stage", SCENES["masks_0"].outputs)
def test_an_altered_recording_is_found_out(stage: str) -> None:
    scene = SCENES["masks_0"]
    arrays = {**scene.arrays, f"out/{stage}": altered(scene.arrays[f"out/{stage}"])}
    assert any(check.status == "different" for check in replay(replace(scene, arrays=arrays)))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_every_altered_output_is_found_out(name: str) -> None:
    scene = SCENES[name]
    arrays = {key: altered(array) if key.startswith("out/") else array for key, array in scene.arrays.items()}
    found = {check.stage for check in replay(replace(scene, arrays=arrays)) if check.status == "different"}
    assert found == set(scene.outputs)


def test_another_mean_over_the_group_is_found_out() -> None:
    for scene in (scene for scene in SCENES.values() if "ddp" in scene.info["tags"]):
        for factor in ("out/cls_avg_factor", "out/bbox_avg_factor"):
            arrays = {**scene.arrays, factor: altered(scene.arrays[factor])}
            assert any(check.status == "different" for check in replay(replace(scene, arrays=arrays)))


def test_an_unknown_kind_is_refused() -> None:
    scene = replace(SCENES["masks_0"], info={**SCENES["masks_0"].info, "kind": "nms"})
    with pytest.raises(InputError, match=r"scene 'masks_0': kind: expected one of loss, net, .*, got 'nms'"):
        list(replay(scene))


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
        (rtmdet_loss, "_average_factors", lambda levels: [factor * 2 for factor in _average_factors(levels)]),
    ],
    ids=["edge-inside", "k-plus-one", "conflict-among-claimants", "nobody-claims", "factors-of-two-images"],
)
def test_a_wrong_stage_is_found_out(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, wrong)
    statuses = {c.status for name in ("on-edge_0", "outside-mix_0", "degenerate_0") for c in replay(SCENES[name])}
    assert "different" in statuses


def _margins(priors: Tensor, boxes: Tensor) -> Tensor:
    return torch.cat([priors[:, :2] - boxes[:, None, :2], boxes[:, None, 2:] - priors[:, :2]], dim=-1)
