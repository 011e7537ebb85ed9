from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from detoracle.properties.loaders import load_scenes
from detoracle.reference import yolox
from detoracle.reference.errors import InputError


def _many(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "set.npz"
    boxes = np.tile(np.array([[8.0, 8, 40, 40]]), (count, 1)) + np.arange(count)[:, None]
    one_each = np.arange(count + 1)
    sides = np.full(count, 640)
    ignore = np.arange(count) == 1
    np.savez(path, gt_ptr=one_each, gt_boxes=boxes, gt_class=one_each[:-1], width=sides, height=sides, gt_ignore=ignore)
    return path


def test_eight_images_a_scene(tmp_path: Path) -> None:
    scenes = load_scenes(_many(tmp_path, 19), seed=5)
    assert [scene.num_images for scene in scenes] == [8, 8, 3]
    assert [scene.name for scene in scenes] == ["set.npz#0", "set.npz#1", "set.npz#2"]
    assert [scene.seed for scene in scenes] == [5, 6, 7]
    assert scenes[0].note == "Images 0 to 7 of set.npz; boxes dropped because ignored: 1."
    assert scenes[1].gt_boxes[1].tolist() == [[17, 17, 49, 49]]
    assert scenes[1].gt_labels[1].tolist() == [9]
    assert all(scene.num_classes == 19 and scene.image_size == (640, 640) for scene in scenes)
    assert all("file" in scene.tags and not scene.native for scene in scenes)


def test_limit_counts_images(tmp_path: Path) -> None:
    path = _many(tmp_path, 19)
    assert [scene.num_images for scene in load_scenes(path, limit=10)] == [8, 2]
    assert [scene.num_images for scene in load_scenes(path, limit=99)] == [8, 8, 3]


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    arrays = _many(tmp_path, 1).rename(tmp_path / "a.json")
    content = {"images": [{"id": 3, "width": 640, "height": 640}], "annotations": [], "categories": []}
    text = tmp_path / "b.npz"
    text.write_text("\ufeff \n" + json.dumps(content), "utf-8")
    folder = tmp_path / "c.json"
    folder.mkdir()
    (folder / "1.xml").write_text("<annotation><size><width>9</width><height>9</height></size></annotation>")
    assert [load_scenes(path)[0].max_gts for path in (arrays, text, folder)] == [1, 0, 0]


def test_recorded_outputs_are_the_maps_of_yolox(tmp_path: Path) -> None:
    """The oracle's decoding of the maps equals one written out from the arrays."""
    rng = np.random.default_rng(0)
    cells = np.array([(s, x, y) for s in (64, 128) for y in range(640 // s) for x in range(640 // s)])
    reg = rng.normal(size=(2, len(cells), 4)).astype(np.float16)
    objectness = rng.normal(size=(2, len(cells))).astype(np.float16)
    classes = rng.integers(0, 256, (2, len(cells), 3)).astype(np.uint8)
    path = tmp_path / "raw.npz"
    np.savez(
        path,
        gt_ptr=[0, 1, 1], gt_boxes_640=[[10.0, 20, 40, 60]], gt_class=[2],
        reg=reg, obj_logit=objectness, cls_logit_u8=classes, cls_logit_step=0.0625, cls_logit_lo=-14.0,
        stride=cells[:, 0], grid=cells[:, 1:],
    )  # fmt: skip
    (scene,) = load_scenes(path)
    assert {"file", "recorded"} <= scene.tags
    native = scene.native["yolox"]
    assert native["strides"] == [64, 128]
    assert [tuple(level.shape) for level in native["raw"]] == [(2, 8, 10, 10), (2, 8, 5, 5)]
    decoded = yolox.decode(**native)
    stride = torch.from_numpy(cells[:, :1]).float()
    raw = torch.from_numpy(reg).float()
    expected = [(raw[..., :2] + torch.from_numpy(cells[:, 1:])) * stride, raw[..., 2:].exp() * stride]
    expected += [torch.from_numpy(objectness).float()[..., None], torch.from_numpy(classes).float() / 16 - 14]
    assert torch.equal(decoded, torch.cat(expected, dim=-1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an.unknown: path: expected an .npz file of arrays, a COCO instances JSON file, or a folder"),
        (b"\x93NUMPY\x01\x00", "got a file that begins with b'\\x93NUMPY\\x01\\x00'."),
        (b"PK\x03\x04 and no more", "content: expected an .npz without pickles, got BadZipFile"),
        (
            b'{"images": [], "annotations": [], "categories": []}',
            "an.unknown: images: expected at least one, got none.",
        ),
        (b"{\xff}", "content: expected JSON text, got UnicodeDecodeError"),
    ],
)
def test_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "an.unknown"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_scenes(path)
    assert message in str(caught.value)


def test_missing_and_limit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.npz: path: expected .*, got nothing there\."):
        load_scenes(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"load_scenes: limit: expected at least 1, got 0\."):
        load_scenes(tmp_path, limit=0)
