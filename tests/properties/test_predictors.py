from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from detoracle.properties.predictors import SPECK, Predicted, Predictor, Style, predict
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.reference import yolox
from detoracle.reference.boxes import iou_yolox
from detoracle.reference.errors import InputError

SCENE = Scene(
    "two images",
    (64, 96),
    5,
    (torch.tensor([[8.0, 8, 40, 40], [44.0, 20, 88, 60]]), torch.zeros(0, 4)),
    (torch.tensor([2, 4]), torch.zeros(0, dtype=torch.int64)),
    seed=11,
)
DEGENERATE = torch.tensor([[20.0, 20, 20, 44], [30.0, 30, 30, 30], [60.0, 50, 40, 20], [500.0, 500, 520, 520]])
FINITE = [style for style in get_args(Style) if style[:4] not in ("nan-", "inf-")]


def _grid(scene: Scene) -> tuple[Tensor, Tensor]:
    _, points, strides = yolox.anchor_grid(scene.level_sizes, scene.strides, like=torch.zeros(()))
    return points, strides


def _predict(scene: Scene, style: Style = "trained", magnitude: float = 0.0, matches: int = 0) -> Predicted:
    return predict(replace(scene, predictor=Predictor(style, magnitude, matches)), *_grid(scene))


def _tensors(predicted: Predicted) -> tuple[Tensor, Tensor, Tensor]:
    return predicted.boxes, predicted.class_logits, predicted.objectness_logits


@pytest.mark.parametrize("style", get_args(Style))
def test_scene_and_seed_decide_everything(style: Style) -> None:
    first = _tensors(_predict(SCENE, style, 3.0, 2))
    torch.manual_seed(99)
    torch.set_num_threads(2)
    try:
        again = _tensors(_predict(SCENE, style, 3.0, 2))
    finally:
        torch.set_num_threads(1)
    other = _tensors(_predict(replace(SCENE, seed=12), style, 3.0, 2))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, again, strict=True))
    if style != "equal":
        assert any(not torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, other, strict=True))


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    _predict(SCENE)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("style", FINITE)
def test_shapes_and_sides(style: Style) -> None:
    scene = replace(
        SCENE, gt_boxes=(DEGENERATE, DEGENERATE[:0]), gt_labels=(torch.tensor([0, -1, 5, 6]), SCENE.gt_labels[1])
    )
    for case in (SCENE, scene):
        predicted = _predict(case, style, 3.0, 2)
        anchors = len(_grid(case)[0])
        assert predicted.boxes.shape == (2, anchors, 4)
        assert predicted.class_logits.shape == (2, anchors, 5)
        assert predicted.objectness_logits.shape == (2, anchors)
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in _tensors(predicted))
        assert (predicted.boxes[..., 2:] > predicted.boxes[..., :2]).all()


def test_default_dtype_does_not_matter() -> None:
    expected = _tensors(_predict(SCENE))
    torch.set_default_dtype(torch.float64)
    try:
        got = _tensors(_predict(SCENE))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_trained_looks_like_a_trained_detector() -> None:
    """Bands about the percentiles of a YOLOX-nano on 256 photographs, for likeness: nothing is judged by it."""
    scene = realistic("coco", num_images=40, seed=1, num_classes=20)
    predicted = predict(scene, *_grid(scene))
    best = torch.cat(
        [iou_yolox(boxes, own, form="xyxy").amax(1) for boxes, own in zip(scene.gt_boxes, predicted.boxes, strict=True)]
    )
    for share, measured in ((0.1, 0.54), (0.25, 0.72), (0.5, 0.85), (0.75, 0.92), (0.9, 0.96)):
        assert abs(float(best.quantile(share)) - measured) < 0.06
    shares = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    objectness = predicted.objectness_logits.flatten()[::3].quantile(shares)
    classes = predicted.class_logits.flatten()[::50].quantile(shares)
    assert ((objectness - torch.tensor([-28.8, -25.4, -19.6, -12.7, -6.4, -1.8, 2.4])).abs() < 2).all()
    assert ((classes - torch.tensor([-19.4, -14.9, -10.5, -6.7, -4.2, -2.0, -0.2])).abs() < 1).all()


def test_trained_is_sure_where_the_box_is_right() -> None:
    scene = realistic("coco", num_images=20, seed=2)
    predicted = predict(scene, *_grid(scene))
    sure, right = [], []
    for boxes, labels, own, objectness, classes in zip(
        scene.gt_boxes,
        scene.gt_labels,
        predicted.boxes,
        predicted.objectness_logits,
        predicted.class_logits,
        strict=True,
    ):
        anchor = iou_yolox(boxes, own, form="xyxy").argmax(1)
        sure.append(objectness[anchor])
        right.append(classes[anchor, labels])
    background = predicted.objectness_logits.median()
    assert torch.cat(sure).median() > background + 8
    assert torch.cat(right).median() > predicted.class_logits[0].median() + 5


def test_perfect_predicts_the_box_and_nothing_else() -> None:
    predicted = _predict(SCENE, "perfect", matches=3)
    iou = iou_yolox(SCENE.gt_boxes[0], predicted.boxes[0], form="xyxy")
    assert (iou == 1).sum(1).tolist() == [3, 3]
    rest = iou[iou < 1]
    speck = SPECK**2 / 1024
    assert (rest <= speck).all()
    assert torch.equal(torch.cat([torch.ones(3), rest.topk(7).values]).sum(), torch.tensor(3.0))


def test_an_inverted_box_is_predicted_upright() -> None:
    scene = replace(SCENE, gt_boxes=(torch.tensor([[60.0, 50, 40, 20], [40.0, 8, 8, 40]]), SCENE.gt_boxes[1]))
    predicted = _predict(scene, "perfect", matches=1).boxes[0]
    for upright in ([40.0, 20, 60, 50], [8.0, 8, 40, 40]):
        assert (predicted == torch.tensor(upright)).all(1).sum() == 1


def test_equal_predicts_the_same_about_every_anchor() -> None:
    predicted = _predict(SCENE, "equal")
    points, strides = _grid(SCENE)
    about = (predicted.boxes - points.repeat(1, 2)) / strides[:, None]
    assert (about == torch.tensor([-1.0, -1, 1, 1])).all()
    assert not predicted.class_logits.any()
    assert not predicted.objectness_logits.any()


def test_first_only_predicts_the_first() -> None:
    iou = iou_yolox(SCENE.gt_boxes[0], _predict(SCENE, "first-only").boxes[0], form="xyxy")
    assert (iou[0] > 0.39).all()
    assert (iou[0] > iou[1]).all()


def test_extreme_logits_are_both_ways() -> None:
    for logits in _tensors(_predict(SCENE, "extreme-logits", 50))[1:]:
        assert set(logits.flatten().tolist()) == {-50, 50}
        assert 0.3 < (logits > 0).float().mean() < 0.7


def test_overconfident_near_the_first_only() -> None:
    predicted = _predict(SCENE, "overconfident", 200)
    points, strides = _grid(SCENE)
    near = ((points - 24).abs() < 2.5 * strides[:, None]).all(1)
    assert torch.equal(predicted.objectness_logits[0], torch.where(near, 200.0, -200.0))
    assert torch.equal(predicted.class_logits[0], torch.where(near, 200.0, -200.0)[:, None].expand(-1, 5))
    assert (predicted.class_logits[1] == -200).all()


def test_extreme_boxes_are_huge_and_specks() -> None:
    trained, extreme = (_predict(SCENE, style, 10).boxes for style in ("trained", "extreme-boxes"))
    sides = [boxes[..., 2] - boxes[..., 0] for boxes in (trained, extreme)]
    assert 0.1 < (sides[1] > sides[0] * math.exp(9)).float().mean() < 0.4
    assert 0.1 < (sides[1] <= 2 * SPECK).float().mean() < 0.4


@pytest.mark.parametrize(
    ("style", "part"), [("nan-box", 0), ("inf-box", 0), ("nan-class", 1), ("inf-class", 1), ("nan-objectness", 2)]
)
def test_one_anchor_is_not_finite(style: Style, part: int) -> None:
    tensors = _tensors(_predict(SCENE, style))
    points, _ = _grid(SCENE)
    nearest = int((points - 24).square().sum(1).argmin())
    for index, tensor in enumerate(tensors):
        anchors = (~tensor.isfinite()).reshape(2, len(points), -1).any(-1).nonzero().tolist()
        assert anchors == ([[0, nearest]] if index == part else [])
    if part == 1:
        assert (~tensors[1][0, nearest].isfinite()).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "pretrained"}, "style: expected one of trained, random, "),
        ({"magnitude": -1.0}, "magnitude and matches: expected 0 or more, got -1.0, 0."),
        ({"matches": -1}, "got 0.0, -1."),
    ],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Predictor(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
