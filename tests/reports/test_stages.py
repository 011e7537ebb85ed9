"""The stages that a page steps through are the oracle's: they end where it ends, and add up on the way."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import cast

import pytest
import torch

from detoracle.properties.checking import Case, cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.explanation import Explanation
from detoracle.reports.stage import Run, Stage, shade
from detoracle.reports.stages import EXPLAINED, Story, story_of

SCENES = ("crowd", "ragged-full", "crowded-cell", "equal-one", "tiny-several", "single")
DYNAMIC_K = ("yolox.assign", "rtmdet.assign")


@cache
def _case(operation: str, scene: str) -> Case:
    (found,) = [one for one in edge_cases() if one.name == scene]
    return next(cases(*find_operation(operation), found))


@cache
def _story(operation: str, scene: str, image: int = 0) -> Story:
    return story_of(operation, _case(operation, scene).arguments, scene=scene, image=image)


def _stage(story: Story, name: str) -> Stage:
    (found,) = [stage for stage in story.stages if stage.name == name]
    return found


def _lines(story: Story, name: str) -> list[list[str]]:
    table = _stage(story, name).table
    assert table is not None
    return table.lines


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("operation", EXPLAINED)
def test_the_last_stage_is_what_the_oracle_returns(operation: str, scene: str) -> None:
    arguments = _case(operation, scene).arguments
    _, found = find_operation(operation)
    for image, given in enumerate(found.oracle(**arguments).gt_index):
        marks = _story(operation, scene, image).stages[-1].layers[0].values
        outcome = [marks.get(anchor, -1.0) for anchor in range(len(given))]
        assert outcome == given.tolist()


@pytest.mark.parametrize("operation", EXPLAINED)
def test_the_counts_of_the_last_stage_add_up(operation: str) -> None:
    story = _story(operation, "crowd")
    marks = story.stages[-1].layers[0].values
    counts = Counter(int(gt) for gt in marks.values() if gt >= 0)
    assert {int(line[0]): int(line[1]) for line in _lines(story, "Result") if line[1] != "0"} == dict(counts)
    assert counts.total() > 10


@pytest.mark.parametrize("operation", DYNAMIC_K)
def test_every_ground_truth_claims_as_many_as_its_k(operation: str) -> None:
    story, arguments = _story(operation, "crowd"), _case(operation, "crowd").arguments
    _, found = find_operation(operation)
    dynamic_k = found.oracle(**arguments).extra["dynamic_k"][0]
    claims = {layer.gt: len(layer.values) for layer in _stage(story, "Claims").layers if layer.gt is not None}
    assert claims == {gt: int(k) for gt, k in enumerate(dynamic_k) if k}
    assert {int(line[0]): int(line[3]) for line in _lines(story, "Dynamic k")} == claims
    for _, _, total, k, _ in _lines(story, "Dynamic k"):
        assert int(k) == max(math.floor(float(total)), 1)


@pytest.mark.parametrize("operation", [*DYNAMIC_K, "yolov8.assign"])
def test_contested_anchors_are_those_that_several_claim_and_go_to_the_one_shown(operation: str) -> None:
    story = _story(operation, "crowd")
    claims = [layer for layer in _stage(story, "Claims").layers if layer.gt is not None]
    times = Counter(anchor for layer in claims for anchor in layer.values)
    contested = {anchor for anchor, number in times.items() if number > 1}
    (rings,) = [layer for layer in _stage(story, "Claims").layers if layer.gt is None]
    assert set(rings.values) == contested
    for layer, line in zip(claims, _lines(story, "Claims"), strict=True):
        assert int(line[2]) == len(contested & set(layer.values))
    lines = _lines(story, "Conflicts")
    assert {int(line[0]) for line in lines} == contested != set()
    result = story.stages[-1].layers[0].values
    for anchor, claimants, winner, *_ in lines:
        assert int(result[int(anchor)]) == int(winner.partition(",")[0])
        named = {int(part.split(" at ")[0]) for part in claimants.split(", ")}
        assert named == {layer.gt for layer in claims if int(anchor) in layer.values}
        assert (int(winner.partition(",")[0]) in named) == ("did not claim" not in winner)
    alone = {anchor: layer.gt for layer in claims for anchor in layer.values if anchor not in contested}
    assert {anchor: result[anchor] for anchor in alone} == alone


def test_ssd_forces_a_prior_for_every_ground_truth_and_the_later_one_keeps_it() -> None:
    story = _story("ssd.match", "crowded-cell")
    lines = _lines(story, "Best priors")
    last = {line[1]: line[0] for line in lines}
    for gt, prior, _, _, keeps in lines:
        assert keeps == ("yes" if last[prior] == gt else f"no, {last[prior]} does")
    assert len(last) < len(lines)
    by_threshold, after = (_stage(story, name).layers[0].values for name in ("Threshold", "Best priors"))
    assert {prior for prior in after if after[prior] != by_threshold.get(prior)} <= {int(prior) for prior in last}


def test_anchors_between_the_thresholds_are_left_out_until_they_are_claimed() -> None:
    story = _story("anchor_head.assign", "crowd")
    before, after = (_stage(story, name).layers[0].values for name in ("Thresholds", "Claims of the ground truths"))
    assert -2 in before.values()
    claimed = {anchor for anchor in after if after[anchor] != before.get(anchor)}
    rings = {anchor for layer in _stage(story, "Claims of the ground truths").layers[1:] for anchor in layer.values}
    assert claimed <= rings
    assert after == story.stages[-1].layers[0].values


@pytest.mark.parametrize("operation", EXPLAINED)
def test_what_is_shaded_darkest_is_the_best_in_the_table(operation: str) -> None:
    story = _story(operation, "crowd")
    name = {"yolov8.assign": "Metric", "ssd.match": "Overlap", "anchor_head.assign": "Overlap"}.get(operation, "Cost")
    best = {int(line[0]): int(line[2]) for line in _lines(story, name)}
    for layer in _stage(story, name).layers:
        assert layer.gt is not None
        assert set(layer.values.values()) <= {value for value in layer.values.values() if 0 <= value <= 1}
        assert layer.values[best[layer.gt]] == 1


def test_shading_ends_at_the_sixtieth_and_leaves_out_what_is_not_finite() -> None:
    run = Run({}, 0, cast(Explanation, None), [8.0] * 100)
    costs = torch.arange(100.0)
    costs[7] = torch.inf
    values = shade(run, 0, costs, torch.ones(100, dtype=torch.bool), {}, largest=False).values
    assert 7 not in values
    assert next(anchor for anchor, value in values.items() if value == 0) == 60
    assert values[0] == 1


def test_what_has_no_stages_or_images_is_refused() -> None:
    arguments = _case("yolox.assign", "single").arguments
    with pytest.raises(InputError, match=r"operation: expected one of yolox\.assign, "):
        story_of("yolox.loss", arguments, scene="single")
    with pytest.raises(InputError, match="image: expected 0 to 0, got 1"):
        story_of("yolox.assign", arguments, scene="single", image=1)
    with pytest.raises(UpstreamRaises, match="no-ground-truth"):
        story_of("ssd.match", _case("ssd.match", "empty-all").arguments, scene="empty-all")
