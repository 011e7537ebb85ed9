from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detoracle.properties.annotation_arrays import read_arrays
from detoracle.reference.errors import InputError

STRIDES = (64, 128)
CELLS = [(s, x, y) for s in STRIDES for y in range(640 // s) for x in range(640 // s)]

TRUTHS: dict[str, Any] = {
    "image": np.array(["a", "b", "c"]),
    "width": np.array([320, 1280, 64]),
    "height": np.array([160, 640, 64]),
    "gt_ptr": np.array([0, 2, 2, 3]),
    "gt_boxes": np.array([[10, 20, 40.5, 60], [1, 2, 3, 4], [8, 8, 16, 24]], dtype=np.float32),
    "gt_class": np.array([4, 0, 2], dtype=np.int16),
    "gt_ignore": np.array([False, True, False]),
    "class_names": np.array(["v", "w", "x", "y", "z", "unused"]),
}


def _outputs(images: int) -> dict[str, Any]:
    count = np.arange(images * len(CELLS)).reshape(images, len(CELLS))
    return {
        "reg": (count[..., None] % 7 + np.array([0, 0.25, 0.5, 0.75])).astype(np.float16),
        "obj_logit": -(count % 11).astype(np.float16),
        "cls_logit_u8": (count[..., None] + np.arange(3)).astype(np.uint8),
        "cls_logit_step": np.float32(0.0625),
        "cls_logit_lo": np.float32(-14),
        "stride": np.array(CELLS)[:, 0].astype(np.int16),
        "grid": np.array(CELLS)[:, 1:].astype(np.int16),
    }


RAW: dict[str, Any] = {
    "gt_ptr": np.array([0, 1, 1]),
    "gt_boxes_640": np.array([[10, 20, 40, 60]], dtype=np.float32),
    "gt_class": np.array([2]),
    **_outputs(2),
}


def _write(tmp_path: Path, arrays: dict[str, Any], **changes: Any) -> Path:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def test_ground_truths(tmp_path: Path) -> None:
    found = read_arrays(_write(tmp_path, TRUTHS))
    assert found.num_classes == 6
    assert [image.name for image in found.images] == ["a", "b", "c"]
    assert [image.boxes.tolist() for image in found.images] == [[[20, 40, 81, 120]], [], [[80, 80, 160, 240]]]
    assert [image.labels.tolist() for image in found.images] == [[4], [], [2]]
    assert [image.dropped for image in found.images] == [1, 0, 0]
    assert all(image.outputs is None for image in found.images)


def test_optional_arrays(tmp_path: Path) -> None:
    found = read_arrays(_write(tmp_path, TRUTHS, image=None, gt_ignore=None, class_names=None), 2)
    assert found.num_classes == 5
    assert [image.name for image in found.images] == ["0", "1"]
    assert found.images[0].labels.tolist() == [4, 0]


def test_recorded_outputs(tmp_path: Path) -> None:
    found = read_arrays(_write(tmp_path, RAW))
    assert (found.num_classes, found.strides) == (3, STRIDES)
    assert found.images[0].boxes.tolist() == [[10, 20, 40, 60]]
    for image in (0, 1):
        outputs = found.images[image].outputs
        assert outputs is not None
        assert outputs.dtype == np.float32
        assert np.array_equal(outputs[:, :4], RAW["reg"][image])
        assert np.array_equal(outputs[:, 4], RAW["obj_logit"][image])
        assert np.array_equal(outputs[:, 5:], RAW["cls_logit_u8"][image] / 16 - 14)


NAN_BOX = TRUTHS["gt_boxes"].copy()
NAN_BOX[2, 1] = np.nan
NAN_OUTPUT = _outputs(2)["reg"]
NAN_OUTPUT[1, 6, 2] = np.nan


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        (TRUTHS, {"gt_boxes": None}, "set.npz: gt_boxes: expected numbers of shape (any, 4), got no such array."),
        (TRUTHS, {"gt_boxes": np.zeros((3, 5))}, "got float64 of shape (3, 5)"),
        (TRUTHS, {"gt_boxes": np.array([["1"] * 4] * 3)}, "gt_boxes: expected numbers of shape (any, 4), got <U1"),
        (TRUTHS, {"gt_class": np.array([1, 2])}, "gt_class: expected whole numbers of shape (3), got int64 of"),
        (TRUTHS, {"gt_class": np.array([1.0, 2, 3])}, "gt_class: expected whole numbers of shape (3), got float64"),
        (TRUTHS, {"gt_ptr": np.array([0, 2, 1, 3])}, "gt_ptr: expected rows that rise from 0 to 3, got [0 2 1 3]."),
        (TRUTHS, {"gt_ptr": np.array([0, 2])}, "gt_ptr: expected rows that rise from 0 to 3, got [0 2]."),
        (TRUTHS, {"gt_ptr": np.array([1, 3])}, "got [1 3]."),
        (TRUTHS, {"gt_ptr": np.zeros(0, int)}, "got []."),
        (TRUTHS, {"image": np.array(["a"])}, "image: expected shape (3,), got (1,)."),
        (TRUTHS, {"height": None}, "height: expected numbers of shape (3), got no such array."),
        (TRUTHS, {"width": np.array([320, 0, 64])}, "image b: size: expected width and height above 0, got 0 x 640."),
        (TRUTHS, {"gt_boxes": NAN_BOX}, "image c: box 0: expected finite coordinates, got [8.0, nan, 16.0, 24.0]."),
        (TRUTHS, {"gt_class": np.array([4, 0, 6])}, "set.npz, image c: class of box 0: expected 0 to 5, got 6."),
        (TRUTHS, {"gt_class": np.array([-1, 0, 2])}, "set.npz, image a: class of box 0: expected 0 to 5, got -1."),
        (RAW, {"obj_logit": None}, "obj_logit: expected numbers of shape (2, 125), got no such array."),
        (RAW, {"reg": _outputs(3)["reg"]}, "reg: expected numbers of shape (2, 125, 4), got float16 of shape (3,"),
        (RAW, {"stride": RAW["stride"][::-1]}, "the cells of a 640 pixel square, level by level and row by row"),
        (RAW, {"grid": RAW["grid"][:, ::-1]}, "grid and stride: expected the cells of a 640 pixel square"),
        (RAW, {"stride": RAW["stride"] * 0}, "got 125 others, of strides 0."),
        (RAW, {"reg": NAN_OUTPUT}, "image 1: outputs of anchor 6: expected finite numbers, got NaN or infinity."),
        (RAW, {"gt_class": np.array([3])}, "set.npz, image 0: class of box 0: expected 0 to 2, got 3."),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, arrays: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_arrays(_write(tmp_path, arrays, **changes))
    assert message in str(caught.value)


def test_an_ignored_box_may_be_anything(tmp_path: Path) -> None:
    boxes, labels = TRUTHS["gt_boxes"].copy(), TRUTHS["gt_class"].copy()
    boxes[1], labels[1] = np.inf, 77
    found = read_arrays(_write(tmp_path, TRUTHS, gt_boxes=boxes, gt_class=labels, class_names=None))
    assert len(found.images[0].boxes) == 1
    assert found.num_classes == 5


def test_pickles_stay_shut(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path / "sprung").touch, ()

    path = _write(tmp_path, TRUTHS, gt_boxes=np.array([Trap()], dtype=object))
    with pytest.raises(InputError, match=r"set\.npz: content: expected an \.npz without pickles, got ValueError"):
        read_arrays(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path: Path, share: float) -> None:
    path = _write(tmp_path, TRUTHS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"set\.npz: content: expected an \.npz"):
        read_arrays(path)


def test_every_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, TRUTHS)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            found = read_arrays(path)
        except InputError:
            continue
        assert len(found.images) == 3
