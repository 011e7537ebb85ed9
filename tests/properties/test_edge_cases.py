from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.predictors import Predicted, predict
from detoracle.properties.scenes import TAGS, Scene
from detoracle.reference import yolox, yolox_cost
from detoracle.reference.boxes import iou_yolox, xyxy_to_cxcywh

SCENES = {scene.name: scene for scene in edge_cases()}
FROM_FILES = {"drawn", "file", "random", "realistic", "recorded"}


def _grid(scene: Scene) -> tuple[Tensor, Tensor]:
    _, points, strides = yolox.anchor_grid(scene.level_sizes, scene.strides, like=torch.zeros(()))
    return points, strides


def _predict(scene: Scene) -> Predicted:
    return predict(scene, *_grid(scene))


def _assign_arguments(scene: Scene) -> dict[str, Any]:
    points, strides = _grid(scene)
    predicted = _predict(scene)
    boxes, labels, valid = scene.padded()
    parts = [xyxy_to_cxcywh(predicted.boxes), predicted.objectness_logits[..., None], predicted.class_logits]
    return {
        "predictions": torch.cat(parts, dim=-1),
        "anchor_points": points,
        "anchor_strides": strides,
        "gt_boxes": xyxy_to_cxcywh(boxes),
        "gt_labels": labels,
        "gt_valid": valid,
    }


def test_the_same_every_time() -> None:
    names = [scene.name for scene in edge_cases()]
    assert len(names) == len(set(names))
    for once, again in zip(SCENES.values(), edge_cases(), strict=True):
        assert (once.name, once.seed, once.predictor) == (again.name, again.seed, again.predictor)
        assert all(torch.equal(a, b) for a, b in zip(once.gt_boxes, again.gt_boxes, strict=True))


def test_every_tag_has_a_scene() -> None:
    assert set().union(*(scene.tags for scene in SCENES.values())) == TAGS.keys() - FROM_FILES


def test_every_scene_is_explained() -> None:
    assert [scene.name for scene in SCENES.values() if not scene.note.endswith(".")] == []


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_scene_is_small_and_on_the_grid(scene: Scene) -> None:
    steps = torch.cat(scene.gt_boxes) * (2**15 if scene.name == "nearly-equal" else 8)
    assert torch.equal(steps, steps.round())
    assert len(_grid(scene)[0]) < 4000
    labels = torch.cat(scene.gt_labels)
    assert bool(((labels < 0) | (labels >= scene.num_classes)).any()) == scene.name.startswith("label-")


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_predictions_are_finite_unless_they_say_otherwise(scene: Scene) -> None:
    predicted = _predict(scene)
    finite = all(tensor.isfinite().all() for tensor in vars(predicted).values())
    assert finite == ("non-finite" not in scene.tags)
    assert not (predicted.boxes[..., 2:] <= predicted.boxes[..., :2]).any()


@pytest.mark.parametrize("flavour", yolox_cost.FLAVOURS)
def test_best_for_a_third(flavour: str) -> None:
    """An anchor that the second and third claim, and not the first, is cheapest for the first."""
    arguments = _assign_arguments(SCENES["best-for-a-third"])
    given = {name: arguments[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    points, strides, boxes, valid = (
        arguments[name] for name in ("anchor_points", "anchor_strides", "gt_boxes", "gt_valid")
    )
    candidate, geometry = yolox_cost.candidates(points, strides, boxes, valid, flavour=flavour)
    cost, iou = yolox_cost.cost(
        arguments["predictions"], **given, candidate=candidate, geometry=geometry, flavour=flavour
    )
    gt_index, dynamic_k = yolox.dynamic_k_matching(cost, iou, candidate, valid)
    claims = cost.argsort(dim=2, stable=True).argsort(dim=2) < dynamic_k[..., None]
    contested_by_others = claims[:, 1] & claims[:, 2] & ~claims[:, 0]
    assert (gt_index[contested_by_others] == 0).any()


@pytest.mark.parametrize("matches", [1, 2, 3])
def test_perfect_predictions_decide_dynamic_k(matches: int) -> None:
    dynamic_k = yolox.assign(**_assign_arguments(SCENES[f"perfect-{matches}"])).extra["dynamic_k"]
    assert dynamic_k.tolist() == [[matches, matches]]


@pytest.mark.parametrize("flavour", yolox_cost.FLAVOURS)
def test_overconfidence_decides_the_penalty(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _assign_arguments(SCENES["many-classes-overconfident"])
    right = yolox.assign(**arguments, flavour=flavour).gt_index
    lighter = replace(yolox_cost.FLAVOURS[flavour], penalty=1e4)
    monkeypatch.setitem(yolox_cost.FLAVOURS, flavour, lighter)
    assert not torch.equal(yolox.assign(**arguments, flavour=flavour).gt_index, right)


def test_identical_boxes_claim_the_same_anchor() -> None:
    assigned = yolox.assign(**_assign_arguments(SCENES["identical-one-claim"]))
    assert assigned.extra["dynamic_k"].tolist() == [[1, 1]]
    assert int(assigned.positive.sum()) == 1


@pytest.mark.parametrize(
    ("name", "gt", "inside"),
    [
        ("tiny-between-points", 0, []),
        ("tiny-on-centre", 0, [[20.0, 36.0]]),
        ("outside-near", 0, []),
        ("thin", 0, []),
    ],
)
def test_anchors_inside(name: str, gt: int, inside: list[list[float]]) -> None:
    points, _ = _grid(SCENES[name])
    box = SCENES[name].gt_boxes[0][gt]
    assert points[((points > box[:2]) & (points < box[2:])).all(1)].tolist() == inside


def test_edges_run_through_points() -> None:
    fine, coarse = SCENES["edge-through-centres"].gt_boxes[0]
    points, strides = _grid(SCENES["edge-through-centres"])
    for box, stride in ((fine, 8), (coarse, 16)):
        assert all((points[strides == stride] == edge).any() for edge in box)
    assert not (SCENES["edge-through-corners"].gt_boxes[0] % 8).any()
    scene = SCENES["edge-of-centre-square"]
    centre = xyxy_to_cxcywh(scene.gt_boxes[0])[0, :2]
    points, strides = _grid(scene)
    for radius in (1.5, 2.5):
        assert ((points[strides == 8] - centre).abs() == radius * 8).any(0).all()


def test_no_prediction_overlaps() -> None:
    scene = SCENES["no-overlap"]
    iou = iou_yolox(scene.gt_boxes[0], _predict(scene).boxes[0], form="xyxy")
    assert (iou < torch.finfo(torch.float32).eps).all()


def test_half_overflows() -> None:
    boxes = SCENES["half-overflow"].gt_boxes[0].half()
    assert ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).isinf().all()


def test_boxes_reach_beyond_the_bins() -> None:
    scene = SCENES["beyond-bins"]
    points, strides = _grid(scene)
    box = scene.gt_boxes[0][0]
    fine = points[strides == 8]
    inside = fine[((fine > box[:2]) & (fine < box[2:])).all(1)]
    reach = torch.cat([inside - box[:2], box[2:] - inside], dim=1).amax(1) / 8
    assert (reach > 15).all()
