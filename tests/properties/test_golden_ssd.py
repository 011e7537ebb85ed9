from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detoracle.properties.golden.ssd import replay
from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.reference.errors import UpstreamRaises

SCENES = {scene.name: scene for scene in read_vectors(Path(__file__).parents[1] / "golden" / "ssd.npz")}
TIES_ARE_SORTED_ARBITRARILY = {"mining_order", "neg", "hard_negatives"}
OUTPUTS = SCENES["many"].outputs


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_every_stage_equals_the_recording(scene: Recorded) -> None:
    checks = list(replay(scene))
    assert [check for check in checks if check.status in ("different", "unchecked")] == []
    ambiguous = {check.stage for check in checks if check.status == "ambiguous"}
    assert ambiguous <= TIES_ARE_SORTED_ARBITRARILY
    assert {check.stage for check in checks} >= set(scene.outputs) | {"raises"}


def test_only_exact_ties_leave_negatives_open() -> None:
    tied = {
        n
        for n, scene in SCENES.items()
        for check in replay(scene)
        if (check.stage, check.status) == ("neg", "ambiguous")
    }
    assert tied == {"extreme-logits-50", "extreme-logits-200", "nan-pred", "all-equal-one", "all-equal-several"}


def test_every_recorded_exception_is_a_named_behaviour() -> None:
    named = Counter(
        check.detail.partition(" for ")[0]
        for scene in SCENES.values()
        if scene.raises
        for check in replay(scene)
        if check.stage == "raises"
    )
    assert named == {"ssd.no-ground-truth": 4, "ssd.label-out-of-range": 1}


def altered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another recording that could be in its place: other numbers, or the same ones elsewhere."""
    if array.dtype == bool or (array.ndim and np.issubdtype(array.dtype, np.integer) and array.size > 1):
        return np.ascontiguousarray(np.flip(array, -1))
    changed: np.ndarray[Any, Any] = array + array.dtype.type(1)
    return changed


@pytest.mark.parametrize("stage", OUTPUTS)
def test_an_altered_recording_is_found_out(stage: str) -> None:
    scene = SCENES["many"]
    arrays = {**scene.arrays, f"out/{stage}": altered(scene.arrays[f"out/{stage}"])}
    found = {check.stage for check in replay(replace(scene, arrays=arrays)) if check.status == "different"}
    assert stage in found


def test_an_altered_size_of_priors_is_found_out() -> None:
    scene = SCENES["priors-mini"]
    arrays = {**scene.arrays, "in/min_sizes": scene.arrays["in/min_sizes"] + 1}
    assert [check.stage for check in replay(replace(scene, arrays=arrays)) if check.status == "different"] == ["priors"]


def test_an_unknown_output_is_found_out() -> None:
    scene = SCENES["single"]
    arrays = {**scene.arrays, "out/new": scene.arrays["out/loss_l"], "out/derived_ties": scene.arrays["out/loss_l"]}
    status = {check.stage: check.status for check in replay(replace(scene, arrays=arrays))}
    assert (status["new"], status["derived_ties"]) == ("different", "unchecked")


@pytest.mark.parametrize(("name", "raises"), [("single", "IndexError: x"), ("empty-one", None)])
def test_another_exception_is_found_out(name: str, raises: str | None) -> None:
    scene = SCENES[name]
    changed = replace(scene, info={**scene.info, "raises": raises})
    assert "raises" in {check.stage for check in replay(changed) if check.status == "different"}


def test_a_wrong_assignment_is_found_out_though_its_stages_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from detoracle.reference import ssd

    scene, right = SCENES["many"], ssd._overlap
    monkeypatch.setattr(ssd, "_overlap", lambda priors, gt_boxes: right(priors + 0.01, gt_boxes))
    assert "match" in {check.stage for check in replay(scene) if check.status == "different"}


def test_a_raising_oracle_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from detoracle.reference import ssd

    def refuse(*_: object, **__: object) -> None:
        raise UpstreamRaises("ssd.anything", expected="x", got="y", where="here")

    monkeypatch.setattr(ssd, "loss", refuse)
    [check] = [check for check in replay(SCENES["single"]) if check.stage == "raises"]
    assert check.status == "different"
