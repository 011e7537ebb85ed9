from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from detoracle.properties.scenes import TAGS, Scene
from detoracle.reference.errors import InputError


def _scene(*images: list[tuple[float, float, float, float, int]], **changes: Any) -> Scene:
    given: dict[str, Any] = {
        "name": "a scene",
        "image_size": (64, 64),
        "num_classes": 4,
        "gt_boxes": tuple(
            torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4) for rows in images
        ),
        "gt_labels": tuple(torch.tensor([row[4] for row in rows], dtype=torch.int64) for rows in images),
    }
    return Scene(**{**given, **changes})


PLAIN = (8.0, 8.0, 40.0, 40.0, 1)
OTHER = (20.0, 20.0, 60.0, 50.0, 2)
TWO = ([PLAIN, OTHER], [OTHER, PLAIN])


def test_padded_keeps_every_ground_truth_and_marks_the_rest() -> None:
    scene = _scene([], [PLAIN, OTHER], [OTHER])
    boxes, labels, valid = scene.padded()
    assert boxes.shape == (3, 2, 4)
    assert valid.tolist() == [[False, False], [True, True], [True, False]]
    assert torch.equal(boxes[valid], torch.cat(scene.gt_boxes))
    assert torch.equal(labels[valid], torch.cat(scene.gt_labels))
    assert not boxes[~valid].any()
    assert not labels[~valid].any()


def test_padded_without_any_ground_truth() -> None:
    boxes, labels, valid = _scene([], []).padded()
    assert (boxes.shape, labels.shape, valid.shape) == ((2, 0, 4), (2, 0), (2, 0))


def test_levels_cover_the_image() -> None:
    scene = _scene(*TWO, image_size=(100, 64))
    assert scene.level_sizes == ((13, 8), (7, 4), (4, 2))
    assert (scene.num_images, scene.max_gts) == (2, 2)


def test_plain_scene_has_no_tag() -> None:
    assert _scene(*TWO).tags == frozenset()


@pytest.mark.parametrize(
    ("tag", "scene"),
    [
        ("bad-label", _scene([PLAIN, (*OTHER[:4], -1)])),
        ("bad-label", _scene([PLAIN, (*OTHER[:4], 4)])),
        ("border", _scene([PLAIN, (0, 4, 20, 20, 0)])),
        ("degenerate", _scene([PLAIN, (30, 4, 30, 20, 0)])),
        ("degenerate", _scene([PLAIN, (30, 4, 20, 20, 0)])),
        ("empty", _scene([], [])),
        ("few-anchors", _scene(*TWO, strides=(16, 64), image_size=(32, 64))),
        ("half-overflow", _scene([PLAIN, (8, 8, 300, 300, 0)], image_size=(320, 320))),
        ("huge", _scene([PLAIN, (0, 0, 64, 64, 0)])),
        ("identical", _scene([PLAIN, (*PLAIN[:4], 3)])),
        ("many-classes", _scene(*TWO, num_classes=128)),
        ("many-gts", _scene([(8 + i / 8, 8, 40, 40, 0) for i in range(129)])),
        ("negative-sum", _scene([PLAIN, (-60, -60, 30, 20, 0)])),
        ("negative-sum", _scene([PLAIN, (30, 30, 2, 2, 0)])),
        ("non-square", _scene(*TWO, image_size=(64, 96))),
        ("odd-size", _scene(*TWO, image_size=(72, 72))),
        ("off-grid", _scene([PLAIN, (50, 4, 80, 20, 0)])),
        ("one-class", _scene([(*PLAIN[:4], 0), (*OTHER[:4], 0)], num_classes=1)),
        ("one-level", _scene(*TWO, strides=(8,))),
        ("outside", _scene([PLAIN, (70, 4, 80, 20, 0)])),
        ("ragged", _scene([PLAIN], TWO[0])),
        ("single", _scene([PLAIN])),
        ("tiny", _scene([PLAIN, (4, 4, 9, 11, 0)])),
        ("zero-row", _scene([PLAIN, (0, 0, 0, 0, 0)])),
    ],
)
def test_tag_follows(tag: str, scene: Scene) -> None:
    assert tag in TAGS
    assert tag in scene.tags


@pytest.mark.parametrize(
    ("tag", "scene"),
    [
        ("border", _scene([PLAIN, (0.125, 4, 63.875, 20, 0)])),
        ("half-overflow", _scene([PLAIN, (8, 8, 263, 264, 0)], image_size=(320, 320))),
        ("huge", _scene([PLAIN, (0, 0.125, 64, 64, 0)])),
        ("identical", _scene([PLAIN], [PLAIN])),
        ("many-gts", _scene([(8 + i / 8, 8, 40, 40, 0) for i in range(128)])),
        ("off-grid", _scene([PLAIN, (50, 4, 78, 20, 0)])),
        ("outside", _scene([PLAIN, (63.875, 4, 80, 20, 0)])),
        ("tiny", _scene([PLAIN, (4, 4, 5, 12, 0)])),
        ("zero-row", _scene([PLAIN, (0, 0, 0, 0, 1)])),
    ],
)
def test_tag_stops_at_its_limit(tag: str, scene: Scene) -> None:
    assert tag not in scene.tags


def test_given_tags_stay() -> None:
    assert replace(_scene(*TWO), tags=frozenset({"drawn"})).tags == {"drawn"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (0, 64)}, "scene 'a scene': image_size: expected whole numbers above 0, got (0, 64)."),
        ({"strides": ()}, "strides: expected whole numbers above 0, got ()"),
        ({"gt_labels": (torch.tensor([1, 2]),)}, "expected as many, one an image, at least one, got 2 and 1"),
        ({"gt_boxes": (), "gt_labels": ()}, "got 0 and 0"),
        (
            {"gt_boxes": (torch.zeros(2, 4).double(),) * 2},
            "expected shape (G, 4), torch.float32, finite, got (2, 4) torch.float64",
        ),
        ({"gt_boxes": (torch.zeros(2, 5),) * 2}, "gt_boxes of image 0: expected shape (G, 4)"),
        (
            {"gt_boxes": (torch.zeros(2, 4), torch.full((2, 4), torch.nan))},
            "gt_boxes of image 1: expected shape (G, 4), torch.float32, finite, got (2, 4) torch.float32, not finite",
        ),
        (
            {"gt_labels": (torch.tensor([1, 2]), torch.tensor([1]))},
            "gt_labels of image 1: expected shape (2,), torch.int64",
        ),
        ({"gt_labels": (torch.tensor([1.0, 2.0]),) * 2}, "got (2,) torch.float32"),
        ({"tags": frozenset({"empty", "nonsense"})}, "tags: expected words of TAGS, got nonsense."),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(_scene(*TWO), **changes)
    assert message in str(caught.value)
