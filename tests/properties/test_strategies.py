from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from detoracle.properties import strategies
from detoracle.properties.faults.fault import build, faults_of
from detoracle.properties.outputs import perform
from detoracle.properties.scenes import Scene
from detoracle.properties.strategies import (
    anchors_on_edges,
    batches,
    conflicting_anchors,
    degenerate_boxes,
    ground_truths,
    integer_k_boundary,
    overlapping_gts,
    scenes,
)
from detoracle.properties.systems import NAMES, find_operation, system_of
from detoracle.properties.yolox import native
from detoracle.reference import yolox, yolox_cost
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain import yolox as explain

OF_BOXES = (ground_truths, overlapping_gts, conflicting_anchors, anchors_on_edges, degenerate_boxes)
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", strategies.__all__)
def test_every_argument_is_by_keyword_and_has_a_default(name: str) -> None:
    for parameter in inspect.signature(getattr(strategies, name)).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


@quick
@given(st.one_of(*(make() for make in OF_BOXES)))
def test_coordinates_lie_on_an_eighth_of_a_pixel(boxes: Any) -> None:
    assert all(len(box) == 4 and all(c * 8 == int(c * 8) for c in box) for box in boxes)


@quick
@given(ground_truths(size=32, max_gts=3))
def test_ground_truths_have_area_and_their_centre_in_the_image(boxes: Any) -> None:
    assert len(boxes) <= 3
    for left, top, right, bottom in boxes:
        assert left < right
        assert top < bottom
        assert 0 <= (left + right) / 2 <= 32
        assert 0 <= (top + bottom) / 2 <= 32


@quick
@given(anchors_on_edges(stride=16))
def test_edges_run_through_points_or_corners(boxes: Any) -> None:
    assert boxes
    assert all(c % 8 == 0 for box in boxes for c in box)
    assert all(box[0] < box[2] and box[1] < box[3] for box in boxes)


@quick
@given(degenerate_boxes())
def test_one_is_degenerate_or_outside(boxes: Any) -> None:
    assert any(x1 >= x2 or y1 >= y2 or (x2 <= 0 and y2 <= 0) for x1, y1, x2, y2 in boxes)


@quick
@given(overlapping_gts(max_gts=3), conflicting_anchors(max_gts=4))
def test_several_share_a_place(near: Any, about_a_point: Any) -> None:
    assert 2 <= len(near) <= 3
    assert 2 <= len(about_a_point) <= 4
    assert len({((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in about_a_point}) == 1


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(scenes(max_images=2), st.sampled_from(sorted(yolox_cost.FLAVOURS)))
def test_the_oracle_in_float32_is_admitted_by_its_own_explanation(scene: Scene, flavour: str) -> None:
    """The suite's own strategies look for a choice that rounding may make, and that no world admits."""
    arguments = dict(system_of("yolox").arguments("yolox.assign", native(scene)))[flavour]
    try:
        explanation = explain.explain_assign(**arguments)
    except UpstreamRaises:
        return
    found = yolox.assign(**arguments)
    assert not explanation.wrong(found.gt_index).any()
    assert not explanation.wrong_k(found.extra["dynamic_k"]).any()


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("empty image", lambda s: s.num_images > 1 and min(map(len, s.gt_labels)) == 0 < s.max_gts),
        ("several classes", lambda s: len({int(x) for row in s.gt_labels for x in row}) > 1),
        ("degenerate", lambda s: "degenerate" in s.tags),
        ("wide", lambda s: s.image_size[1] > s.image_size[0]),
        ("perfect", lambda s: s.predictor.style == "perfect"),
        ("identical", lambda s: "identical" in s.tags),
    ],
)
def test_every_kind_of_scene_is_found(what: str, wanted: Any) -> None:
    limits = settings(quick, max_examples=2000, phases=[Phase.generate])  # found is enough, it need not be small
    assert find(scenes(), wanted, settings=limits).num_images >= 1


def test_a_failure_shrinks_to_one_small_box() -> None:
    found = find(batches(), lambda scene: scene.max_gts >= 1)
    assert (found.num_images, found.max_gts, found.predictor.style) == (1, 1, "trained")
    assert found.gt_boxes[0].abs().max() <= 1


@pytest.mark.parametrize("fault_id", ["yolox.no-penalty", "ssd.match-nothing-forced"])
def test_a_planted_fault_shrinks_to_one_image_and_at_most_two_ground_truths(fault_id: str) -> None:
    fault = next(fault for fault in faults_of(fault_id.partition(".")[0]) if fault.id == fault_id)
    system, operation = find_operation(fault.operation)
    wrong = build(fault)

    def differs(scene: Scene) -> bool:
        for _, arguments in system.arguments(operation.name, system.native(scene)):
            expected, given = (perform(operation, call, arguments) for call in (operation.oracle, wrong))
            if not expected.problem:
                assert not given.problem
                if not torch.equal(expected.outputs["gt_index"], given.outputs["gt_index"]):
                    return True
        return False

    found = find(scenes(system=system.name), differs, settings=settings(quick, max_examples=200))
    assert found.num_images == 1
    assert found.max_gts <= 2
    assert found.image_size == (64, 64)  # the smallest there is: 84 anchors at strides 8, 16 and 32
    assert found.predictor.style == "trained"


@pytest.mark.parametrize("name", NAMES)
def test_only_ssd_gets_no_image_without_ground_truths(name: str) -> None:
    """Its published matching raises there; the others must be tried with one."""
    without = []

    @settings(quick, max_examples=50)
    @given(scenes(system=name))
    def draw(scene: Scene) -> None:
        without.append("empty" in scene.tags)

    draw()
    assert len(without) > 30
    assert any(without) == (name != "ssd")


def test_an_unknown_system_is_an_error_when_something_is_drawn() -> None:
    strategy = scenes(system="yolo")
    with pytest.raises(InputError, match="one of yolox"):
        find(strategy, lambda _: True)


def test_errors_come_when_something_is_drawn() -> None:
    strategy = batches(tags=("no such tag",))
    with pytest.raises(Exception, match="words of TAGS"):
        find(strategy, lambda _: True)


@quick
@given(integer_k_boundary(max_images=1))
def test_perfect_recipes_can_be_carried_out(scene: Scene) -> None:
    assert scene.predictor.style == "perfect"
    assert native(scene)["raw"][0].isfinite().all()
