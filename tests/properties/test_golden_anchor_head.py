from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detoracle.properties.golden.anchor_head import replay
from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.reference import anchor_head, anchor_head_loss, anchor_head_ssd
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.errors import InputError, UpstreamRaises

SCENES = {scene.name: scene for scene in read_vectors(Path(__file__).parents[1] / "golden" / "anchor_head.npz")}
TIED_NEGATIVES = {"equal_0", "ssd-logit50_0", "ssd-logit200_0"}
ALTERED = [("ignore_0", stage) for stage in SCENES["ignore_0"].outputs if not stage.endswith(".1")] + [
    ("giou-random_0", "decoded.0"),
    ("rpn-random_0", "pos_inds.1"),
    ("rpn-random_0", "neg_inds.1"),
    ("rpn-random_0", "num_total_samples"),
    ("ssd-random_0", "loss_cls.1"),
    ("ssd-random_0", "loss_bbox.1"),
    ("ssd-random_0", "loss_total"),
    ("ssd-random_0", "grad_cls.0"),
    ("ssd-random_0", "grad_bbox.0"),
]
INDICES = ("assigned_gt_inds", "gt_inds_step3", "argmax_overlaps", "gt_argmax_overlaps")
UNITS = (
    "unit-gen-offset",
    "unit-gen-ssd-minmax",
    "unit-coder-meanstd",
    "unit-assign-base",
    "unit-sampler-rand",
    "unit-ce-weight",
    "unit-giou",
)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_every_stage_equals_the_recording(scene: Recorded) -> None:
    checks = list(replay(scene))
    assert [check for check in checks if check.status in ("different", "unchecked")] == []
    ambiguous = {check.stage for check in checks if check.status == "ambiguous"}
    assert ambiguous == ({"hard_negatives"} if scene.name in TIED_NEGATIVES else set())
    assert {check.stage for check in checks} >= set(scene.outputs) | {"raises"}


def test_every_recorded_exception_is_a_named_behaviour() -> None:
    named = Counter(
        check.detail.partition(" for ")[0]
        for scene in SCENES.values()
        if scene.raises or (scene.has("out/returned_none") and scene.tensor("out/returned_none"))
        for check in replay(scene)
        if check.stage == "raises"
    )
    assert named == {
        "anchor_head.no-anchor-inside": 2,
        "anchor_head.added-gt-needs-labels": 2,
        "anchor_head.label-out-of-range": 3,
        "anchor_head.fewer-labels-than-boxes": 1,
        "anchor_head.scales-and-octaves": 1,
        "anchor_head.center-offset-out-of-range": 1,
        "anchor_head.sum-with-average-factor": 1,
    }


# ------------------------------------------------------------------------------------- the replay finds differences
def altered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another recording that could be in its place."""
    if array.dtype == bool:
        return ~array
    largest = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=1)
    changed: np.ndarray[Any, Any] = array + array.dtype.type(largest)
    return changed


@pytest.mark.parametrize("name", UNITS)
def test_every_altered_output_of_a_function_is_found_out(name: str) -> None:
    scene = SCENES[name]
    for stage in scene.outputs:
        array = scene.arrays[f"out/{stage}"]
        changed = np.roll(array, 1) if stage in (*INDICES, "pos_inds", "neg_inds") else altered(array)
        arrays = {**scene.arrays, f"out/{stage}": changed}
        found = {check.stage for check in replay(replace(scene, arrays=arrays)) if check.status == "different"}
        assert found, stage


@pytest.mark.parametrize(("name", "stage"), ALTERED)
def test_an_altered_recording_is_found_out(name: str, stage: str) -> None:
    scene, array = SCENES[name], SCENES[name].arrays[f"out/{stage}"]
    changed = np.roll(array, 1) if stage.startswith((*INDICES, "pos_inds", "neg_inds")) else altered(array)
    arrays = {**scene.arrays, f"out/{stage}": changed}
    assert any(check.status == "different" for check in replay(replace(scene, arrays=arrays)))


def test_an_unknown_output_is_found_out() -> None:
    scene = SCENES["single-gt_0"]
    extra = {"out/new": scene.arrays["out/loss_total"], "out/derived_ties": scene.arrays["out/loss_total"]}
    status = {check.stage: check.status for check in replay(replace(scene, arrays={**scene.arrays, **extra}))}
    assert (status["new"], status["derived_ties"]) == ("different", "unchecked")


def test_an_unknown_kind_is_refused() -> None:
    scene = replace(SCENES["unit-bce"], info={**SCENES["unit-bce"].info, "kind": "nms"})
    with pytest.raises(InputError, match=r"scene 'unit-bce': kind: expected one of loss, gen, .*, got 'nms'"):
        list(replay(scene))


@pytest.mark.parametrize(
    ("name", "raises"), [("single-gt_0", "IndexError: x"), ("label-big-ce_0", None), ("unit-bce", "ValueError: x")]
)
def test_another_exception_is_found_out(name: str, raises: str | None) -> None:
    scene = SCENES[name]
    changed = replace(scene, info={**scene.info, "raises": raises})
    assert "raises" in {check.stage for check in replay(changed) if check.status == "different"}


@pytest.mark.parametrize(("name", "stage"), [("single-gt_0", "returned_none"), ("border0-none_0", "raises")])
def test_a_loss_instead_of_none_is_found_out(name: str, stage: str) -> None:
    scene = SCENES[name]
    arrays = {**scene.arrays, "out/returned_none": ~scene.arrays["out/returned_none"]}
    assert stage in {check.stage for check in replay(replace(scene, arrays=arrays)) if check.status == "different"}


@pytest.mark.parametrize(
    ("name", "path", "value", "stage"),
    [
        ("retina-random_0", ("assigner", "pos_iou_thr"), 0.55, "assign"),
        ("retina-random_0", ("assigner", "neg_iou_thr"), 0.35, "assign"),
        ("retina-overlapping_0", ("assigner", "match_low_quality"), False, "assign"),
        ("ignore_0", ("assigner", "ignore_wrt_candidates"), False, "assign"),
        ("rpn-random_0", ("sampler", "num"), 47, "neg_inds.0"),
        ("means-stds_0", ("bbox_coder", "target_means"), [0.0, 0.0, 0.0, 0.0], "bbox_targets.0"),
        ("pos-weight_0", ("pos_weight",), 2.0, "label_weights.0"),
        ("border8_0", ("allowed_border",), 0, "inside_flags.0"),
        ("focal-g15_0", ("loss_cls", "gamma"), 2.0, "loss_cls.0"),
        ("ce-class-weight_0", ("loss_cls", "class_weight"), [1.0, 2.0, 0.5, 0.4], "grad_cls.0"),
        ("rpn-smooth1_0", ("loss_bbox", "beta"), 0.5, "loss_bbox.0"),
        ("giou-random_0", ("loss_bbox", "loss_weight"), 1.0, "loss_bbox.0"),
        ("ssd-random_0", ("neg_pos_ratio",), 2, "loss_cls.0"),
        ("center-offset_0", ("anchor_generator", "center_offset"), 0.0, "anchors.0"),
    ],
)
def test_another_setting_is_found_out(name: str, path: tuple[str, ...], value: object, stage: str) -> None:
    scene, cfg = SCENES[name], dict(SCENES[name].info["cfg"])
    within = cfg
    for key in path[:-1]:
        within[key] = dict(within[key])
        within = within[key]
    within[path[-1]] = value
    changed = replace(scene, info={**scene.info, "cfg": cfg})
    assert stage in {check.stage for check in replay(changed) if check.status == "different"}


def test_a_wrong_assignment_is_found_out_though_its_stages_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    right = overlaps_mmdet

    def shifted(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        return right(gt_boxes, boxes + 1)

    monkeypatch.setattr(anchor_head, "overlaps_mmdet", shifted)
    assert "assign" in {check.stage for check in replay(SCENES["rpn-many_0"]) if check.status == "different"}


def test_wrong_hard_negatives_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(cost: Tensor, background: Tensor, number: int) -> Tensor:
        return torch.zeros_like(background).index_fill(0, background.nonzero().flatten()[:number], True)

    monkeypatch.setattr(anchor_head_ssd, "_hardest", first)
    assert "hard_negatives" in {check.stage for check in replay(SCENES["ssd-random_0"]) if check.status == "different"}


def test_a_raising_oracle_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UpstreamRaises("anchor_head.anything", expected="x", got="y", where="here")

    monkeypatch.setattr(anchor_head_loss, "loss", refuse)
    [check] = [check for check in replay(SCENES["single-gt_0"]) if check.stage == "raises"]
    assert check.status == "different"
