from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from detoracle.properties.realistic import built_in, realistic
from detoracle.properties.scenes import Scene
from detoracle.reference.boxes import iou_yolox
from detoracle.reference.errors import InputError

Preset = Literal["coco", "crowd"]
PRESETS: tuple[Preset, ...] = ("coco", "crowd")

# Percentiles of real sets: boxes an image (25, 50, 75, 90, 95), root of the area at 640 px (1, 10, 50, 90, 99), the
# share of boxes that overlap another by more than half, and the share that overlaps one of its own class.
MEASURED = {
    "coco": ((3, 6, 12, 19, 24), (7, 15, 56, 246, 504), 0.038, 0.012),
    "crowd": ((40, 65, 93, 123, 158), (3, 5, 11, 28, 59), 0.050, 0.014),
}
COUNT_BAND, SIZE_BAND, OVERLAP_BAND = 1.15, 1.3, 2.0  # factors either way


@pytest.fixture(scope="module", params=PRESETS)
def sample(request: pytest.FixtureRequest) -> tuple[Preset, Scene]:
    return request.param, realistic(request.param, num_images=400, seed=4)


def _roots(scene: Scene) -> Tensor:
    boxes = torch.cat(scene.gt_boxes)
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()


def _within(got: float, measured: float, band: float) -> bool:
    return measured / band <= got <= measured * band


def test_counts_follow_the_measured(sample: tuple[Preset, Scene]) -> None:
    preset, scene = sample
    counts = torch.tensor([float(len(labels)) for labels in scene.gt_labels])
    for share, measured in zip((0.25, 0.5, 0.75, 0.9, 0.95), MEASURED[preset][0], strict=True):
        assert _within(float(counts.quantile(share)), measured, COUNT_BAND)
    assert counts.max() <= (51 if preset == "coco" else 317)
    empty = 0.006 * len(counts) if preset == "coco" else 0
    assert abs(int((counts == 0).sum()) - empty) <= 1


def test_sizes_follow_the_measured(sample: tuple[Preset, Scene]) -> None:
    preset, scene = sample
    shares = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    for got, measured in zip(_roots(scene).quantile(shares).tolist(), MEASURED[preset][1], strict=True):
        assert _within(got, measured, SIZE_BAND)


def test_overlaps_follow_the_measured(sample: tuple[Preset, Scene]) -> None:
    preset, scene = sample
    overlapping, of_one_class = [], []
    for boxes, labels in zip(scene.gt_boxes, scene.gt_labels, strict=True):
        much = iou_yolox(boxes, boxes, form="xyxy").fill_diagonal_(0) > 0.5
        overlapping.append(much.any(1))
        of_one_class.append((much & (labels[:, None] == labels)).any(1))
    for got, measured in zip((overlapping, of_one_class), MEASURED[preset][2:], strict=True):
        assert _within(float(torch.cat(got).float().mean()), measured, OVERLAP_BAND)


def test_boxes_repeat_classes_and_lie_in_the_image(sample: tuple[Preset, Scene]) -> None:
    preset, scene = sample
    boxes = torch.cat(scene.gt_boxes)
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= 640).all()
    if preset == "crowd":
        assert (boxes[:, 3] <= 360).all()  # 16:9, at the top of the square
    distinct = [len(set(labels.tolist())) for labels in scene.gt_labels if 8 <= len(labels) < 16]
    assert 3 < sum(distinct) / len(distinct) < 6
    assert "realistic" in scene.tags
    assert ("crowd" in scene.tags) == (preset == "crowd")


def test_fuller_images_have_smaller_boxes(sample: tuple[Preset, Scene]) -> None:
    _, scene = sample
    images = sorted((boxes for boxes in scene.gt_boxes if len(boxes)), key=len)
    sizes = [torch.cat([(b[:, 2:] - b[:, :2]).prod(1).sqrt() for b in half]) for half in (images[:200], images[200:])]
    assert sizes[0].median() > sizes[1].median()


@pytest.mark.parametrize("preset", PRESETS)
def test_seed_decides_everything(preset: Preset) -> None:
    once = realistic(preset, num_images=3, seed=7)
    torch.manual_seed(99)
    again, other = realistic(preset, num_images=3, seed=7), realistic(preset, num_images=3, seed=8)
    assert once.seed == again.seed != other.seed
    assert all(torch.equal(a, b) for a, b in zip(once.gt_boxes, again.gt_boxes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once.gt_labels, again.gt_labels, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once.gt_boxes, other.gt_boxes, strict=True))


def test_sizes_scale_with_the_input() -> None:
    large = realistic("coco", num_images=60, seed=1)
    small = realistic("coco", num_images=60, seed=1, image_size=(320, 320), num_classes=7)
    assert small.num_classes == 7
    assert int(torch.cat(small.gt_labels).max()) == 6
    assert math.isclose(float(_roots(large).median() / _roots(small).median()), 2, rel_tol=1 / 8)


def test_few_images_show_the_range_of_counts() -> None:
    for seed in range(5):
        counts = sorted(len(labels) for labels in realistic("coco", num_images=4, seed=seed).gt_labels)
        assert counts[0] <= 3 <= counts[1] <= 6 <= counts[2] <= 12 <= counts[3]


@pytest.mark.parametrize("kind", ["realistic", "crowd"])
def test_built_in(kind: Literal["realistic", "crowd"]) -> None:
    scenes = built_in(kind, seed=2)
    assert len({scene.name for scene in scenes}) == len(scenes) == 2
    assert all("realistic" in scene.tags and sum(map(len, scene.gt_labels)) > 0 for scene in scenes)
    assert any("non-square" in scene.tags for scene in scenes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: realistic("voc", num_images=1, seed=0), "realistic: preset: expected one of coco, crowd, got 'voc'."),  # type: ignore[arg-type]
        (lambda: realistic("coco", num_images=0, seed=0), "realistic: num_images: expected at least 1, got 0."),
        (lambda: built_in("everyday"), "built_in: kind: expected one of realistic, crowd, got 'everyday'."),  # type: ignore[arg-type]
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value) == message
