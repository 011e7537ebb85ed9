"""Scenes from files of annotations: arrays, COCO JSON, PASCAL VOC XML, and recorded raw outputs of a YOLOX.

Images are letterboxed to 640 pixels as YOLOX does, scaled to fit and put to the top left, and come eight to a scene.
What the files say is checked while it is read; nothing in them is ever executed.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from detoracle.properties.scenes import Scene
from detoracle.reference.errors import InputError

__all__ = ["load_scenes"]

_SIDE = 640
_BATCH = 8
_FORMATS = "an .npz of ground truths, a COCO instances JSON file, or a folder of PASCAL VOC XML files"
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Image:
    """One annotated image, its boxes already letterboxed."""

    name: str
    boxes: Array  # (G, 4) xyxy
    labels: Array  # (G,)
    dropped: int  # ignored boxes
    native: Mapping[str, Array] | None = None  # a recorded YOLOX output, by what it holds


def load_scenes(path: Path, *, limit: int | None = None, seed: int = 0) -> tuple[Scene, ...]:
    """Read the ground truths of real images, eight images a scene, with a trained detector's predictions.

    What a file is, its content tells:

    - ``.npz`` with arrays ``image`` (N,), ``width`` and ``height`` (N,) in pixels, ``gt_ptr`` (N + 1,), the rows at which
      each image's boxes begin and the last end, ``gt_boxes`` (M, 4) xyxy in pixels, ``gt_class`` (M,), and optionally
      ``gt_ignore`` (M,) and ``class_names``; or with ``gt_boxes_640``, letterboxed before, in place of the boxes and sizes.
      If there are ``reg`` (N, A, 4), ``obj_logit`` (N, A), ``cls_logit_u8`` (N, A, C) with its ``cls_logit_step`` and
      ``cls_logit_lo``, ``grid`` (A, 2) and ``stride`` (A,) too, these are YOLOX's raw outputs and used instead of predictions.
    - COCO instances JSON: ``images``, ``annotations`` and ``categories``; classes in the order of their ids.
    - A folder of PASCAL VOC XML files, their corners counted from 1; classes in alphabetical order of those read.

    Ignored and crowd boxes are dropped, and the scene's note says how many.

    Parameters
    ----------
    path : Path
        The file or folder.
    limit : int, optional
        Read no more than so many images, the first.
    seed : int
        Decides the predictions.

    Raises
    ------
    InputError
        Unreadable, truncated or of none of these forms; no image; a size unknown; a box not finite; a class out of range.

    Examples
    --------
    >>> load_scenes(Path("nowhere.json"))
    Traceback (most recent call last):
    ...
    detoracle.reference.errors.InputError: nowhere.json: path: expected an .npz of ground truths, ..., got nothing there.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError("limit", expected="at least 1", got=str(limit), where="load_scenes")
    images, num_classes = _read(path, limit)
    if not images:
        _fail("images", expected="at least one", got="none", where=path.name)
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    return tuple(
        _scene(batch, f"{path.name}#{number}", path.name, num_classes, seed + number)
        for number, batch in enumerate(batches)
    )


def _read(path: Path, limit: int | None) -> tuple[list[_Image], int]:
    if path.is_dir():
        return _read_voc(path, limit)
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except FileNotFoundError:
        _fail("path", expected=_FORMATS, got="nothing there", where=path.name)
    except OSError as error:
        _fail("path", expected=_FORMATS, got=f"{type(error).__name__}: {error}", where=path.name)
    if start.startswith(b"PK"):
        return _read_npz(path, limit)
    if start.startswith(b"{"):
        return _read_coco(path, limit)
    _fail("path", expected=_FORMATS, got=f"a file that begins with {start[:8]!r}", where=path.name)


def _fail(what: str, *, expected: str, got: str, where: str, fix: str = "") -> NoReturn:
    raise InputError(what, expected=expected, got=got, where=where, fix=fix)


def _image(
    name: str,
    size: tuple[float, float] | None,
    boxes: Array,
    labels: Array,
    num_classes: int,
    dropped: int,
    where: str,
    native: Mapping[str, Array] | None = None,
) -> _Image:
    """Check one image's annotations and letterbox them, unless they have no size because they already are."""
    where = f"{where}, image {name}"
    if not np.isfinite(boxes).all():
        bad = int(np.argmin(np.isfinite(boxes).all(axis=1)))
        _fail(f"box {bad}", expected="finite coordinates", got=str(boxes[bad].tolist()), where=where)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        got = str(int(labels[wrong[0]]))
        _fail(f"class of box {wrong[0]}", expected=f"0 to {num_classes - 1}", got=got, where=where)
    if size is not None:
        if not min(size) > 0:
            _fail("size", expected="width and height above 0", got=f"{size[0]:g} x {size[1]:g}", where=where)
        boxes = boxes * min(_SIDE / size[0], _SIDE / size[1])
    return _Image(name, boxes, labels, dropped, native)


def _scene(images: Sequence[_Image], name: str, file: str, num_classes: int, seed: int) -> Scene:
    dropped = sum(image.dropped for image in images)
    recorded = [image.native for image in images if image.native is not None]
    return Scene(
        name=name,
        image_size=(_SIDE, _SIDE),
        num_classes=num_classes,
        gt_boxes=tuple(torch.from_numpy(image.boxes.astype(np.float32)) for image in images),
        gt_labels=tuple(torch.from_numpy(image.labels.astype(np.int64)) for image in images),
        tags=frozenset({"file", "recorded"} if recorded else {"file"}),
        note=f"Images {images[0].name} to {images[-1].name} of {file}, without {dropped} ignored boxes.",
        seed=seed,
        native={"yolox": _yolox_maps(recorded)} if recorded else {},
    )


# --------------------------------------------------------------------------------------------------------- arrays
def _read_npz(path: Path, limit: int | None) -> tuple[list[_Image], int]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in _AXES}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        _fail(
            "arrays",
            expected="a readable .npz without pickles",
            got=f"{type(error).__name__}: {error}",
            where=path.name,
        )
    return _from_arrays(_Arrays(arrays, path.name), limit)


_AXES = {
    **dict.fromkeys(("cls_logit_step", "cls_logit_lo"), 0),
    **dict.fromkeys(("image", "width", "height", "gt_ptr", "gt_class", "gt_ignore", "class_names", "stride"), 1),
    **dict.fromkeys(("gt_boxes", "gt_boxes_640", "obj_logit", "grid"), 2),
    **dict.fromkeys(("reg", "cls_logit_u8"), 3),
}
"""The arrays that are read, and how many axes each has."""


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Arrays of a file; asking for one that is missing or of another shape says so."""

    arrays: Mapping[str, Array]
    file: str

    def has(self, name: str) -> bool:
        return name in self.arrays

    def numbers(self, name: str, *shape: int | None) -> Array:
        """One array of numbers; None stands for any length."""
        array = self.arrays.get(name)
        expected = f"numbers of shape ({', '.join('any' if side is None else str(side) for side in shape)})"
        if array is None:
            _fail(name, expected=expected, got="no such array", where=self.file)
        fits = array.ndim == len(shape) and all(
            side in (None, got) for side, got in zip(shape, array.shape, strict=True)
        )
        if not fits or array.dtype.kind not in "biuf":
            _fail(name, expected=expected, got=f"{array.dtype} of shape {array.shape}", where=self.file)
        return array


def _from_arrays(arrays: _Arrays, limit: int | None) -> tuple[list[_Image], int]:
    letterboxed = arrays.has("gt_boxes_640")
    boxes = arrays.numbers("gt_boxes_640" if letterboxed else "gt_boxes", None, 4).astype(np.float64)
    labels = arrays.numbers("gt_class", len(boxes)).astype(np.int64)
    ignored = (
        arrays.numbers("gt_ignore", len(boxes)).astype(bool) if arrays.has("gt_ignore") else np.zeros(len(boxes), bool)
    )
    rows = arrays.numbers("gt_ptr", None).astype(np.int64)
    if not (len(rows) and rows[0] == 0 and rows[-1] == len(boxes) and (np.diff(rows) >= 0).all()):
        _fail("gt_ptr", expected=f"rows that rise from 0 to {len(boxes)}", got=_shown(rows), where=arrays.file)
    count = len(rows) - 1
    names = arrays.arrays.get("image", np.arange(count))
    if names.shape != (count,):
        _fail("image", expected=f"shape ({count},)", got=str(names.shape), where=arrays.file)
    sizes = None if letterboxed else np.stack([arrays.numbers(side, count) for side in ("width", "height")], axis=1)
    recorded = _recorded(arrays, count) if arrays.has("reg") else None
    num_classes = _num_classes(arrays, labels[~ignored])
    images = []
    for index in range(count if limit is None else min(limit, count)):
        row = slice(rows[index], rows[index + 1])
        kept = ~ignored[row]
        images.append(
            _image(
                str(names[index]),
                None if sizes is None else (float(sizes[index, 0]), float(sizes[index, 1])),
                boxes[row][kept],
                labels[row][kept],
                num_classes,
                int((~kept).sum()),
                arrays.file,
                None if recorded is None else _finite_outputs(recorded, index, f"{arrays.file}, image {names[index]}"),
            )
        )
    return images, num_classes


def _shown(rows: Array) -> str:
    return np.array2string(rows, threshold=8, edgeitems=3)


def _num_classes(arrays: _Arrays, labels: Array) -> int:
    """By the outputs, or the names, or else the largest label."""
    if arrays.has("cls_logit_u8"):
        return arrays.numbers("cls_logit_u8", None, None, None).shape[2]
    if arrays.has("class_names"):
        return max(1, arrays.arrays["class_names"].size)
    return int(labels.max(initial=0)) + 1


def _recorded(arrays: _Arrays, count: int) -> dict[str, Array]:
    """Raw outputs as they lie in the file: per image, anchor and channel, the class logits in steps."""
    stride = arrays.numbers("stride", None).astype(np.int64)
    anchors = len(stride)
    grid = arrays.numbers("grid", anchors, 2)
    cells = [(stride_, _SIDE // stride_) for stride_ in dict.fromkeys(stride.tolist()) if stride_ > 0]
    expected = [(stride_, x, y) for stride_, side in cells for y in range(side) for x in range(side)]
    if not np.array_equal(np.column_stack([stride, grid]), np.array(expected).reshape(-1, 3)):
        _fail(
            "grid and stride",
            expected=f"every cell of a {_SIDE} pixel image, level after level, row after row",
            got=f"{anchors} cells of strides {list(dict.fromkeys(stride.tolist()))} in another order or number",
            where=arrays.file,
        )
    return {
        "reg": arrays.numbers("reg", count, anchors, 4),
        "obj_logit": arrays.numbers("obj_logit", count, anchors),
        "cls_logit": arrays.numbers("cls_logit_u8", count, anchors, None),
        "step": arrays.numbers("cls_logit_step"),
        "lowest": arrays.numbers("cls_logit_lo"),
        "stride": stride,
    }


def _finite_outputs(recorded: Mapping[str, Array], index: int, where: str) -> dict[str, Array]:
    """Outputs (A, 5 + C) of one image."""
    classes = recorded["cls_logit"][index].astype(np.float32) * recorded["step"] + recorded["lowest"]
    parts = [recorded["reg"][index], recorded["obj_logit"][index, :, None], classes]
    outputs = np.concatenate(parts, axis=1, dtype=np.float32)
    if not np.isfinite(outputs).all():
        anchor = int(np.argmin(np.isfinite(outputs).all(axis=1)))
        _fail(f"outputs of anchor {anchor}", expected="finite numbers", got="NaN or infinity", where=where)
    return {"outputs": outputs, "stride": recorded["stride"]}


def _yolox_maps(recorded: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """Level maps (B, 5 + C, H, W) and their strides: the native input of YOLOX."""
    outputs = torch.from_numpy(np.stack([image["outputs"] for image in recorded]))
    strides = list(dict.fromkeys(recorded[0]["stride"].tolist()))
    sides = [_SIDE // stride for stride in strides]
    levels = outputs.split([side * side for side in sides], dim=1)
    maps = [
        level.permute(0, 2, 1).reshape(len(outputs), -1, side, side).contiguous()
        for level, side in zip(levels, sides, strict=True)
    ]
    return {"raw": maps, "strides": strides}


# ----------------------------------------------------------------------------------------------------------- COCO
def _read_coco(path: Path, limit: int | None) -> tuple[list[_Image], int]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        _fail("content", expected="JSON text", got=f"{type(error).__name__}: {error}", where=path.name)
    categories = {_entry(row, "id", int, path.name): None for row in _entry(content, "categories", list, path.name)}
    index = {category: position for position, category in enumerate(sorted(categories))}
    sizes: dict[Any, tuple[float, float]] = {}
    for row in _entry(content, "images", list, path.name):
        name = _entry(row, "id", (int, str), path.name)
        where = f"{path.name}, image {name}"
        sizes[name] = (_entry(row, "width", (int, float), where), _entry(row, "height", (int, float), where))
    found: dict[Any, list[tuple[list[float], int]]] = {name: [] for name in sizes}
    crowds = dict.fromkeys(sizes, 0)
    for row in _entry(content, "annotations", list, path.name):
        name = _entry(row, "image_id", (int, str), path.name)
        where = f"{path.name}, image {name}"
        if name not in sizes:
            _fail("image_id", expected="the id of an image in the file", got=repr(name), where=path.name)
        if row.get("iscrowd"):
            crowds[name] += 1
            continue
        x, y, width, height = _numbers(_entry(row, "bbox", list, where), where)
        category = _entry(row, "category_id", int, where)
        if category not in index:
            _fail("category_id", expected="the id of a category in the file", got=str(category), where=where)
        found[name].append(([x, y, x + width, y + height], index[category]))
    return [
        _annotated(str(name), sizes[name], found[name], max(1, len(index)), crowds[name], path.name)
        for name in list(sizes)[:limit]
    ], max(1, len(index))


def _annotated(
    name: str,
    size: tuple[float, float],
    found: Sequence[tuple[list[float], int]],
    num_classes: int,
    dropped: int,
    where: str,
) -> _Image:
    boxes = np.array([box for box, _ in found], dtype=np.float64).reshape(-1, 4)
    labels = np.array([label for _, label in found], dtype=np.int64)
    return _image(name, size, boxes, labels, num_classes, dropped, where)


def _entry(row: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """One value of a JSON object, of the kind it should be."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(each.__name__ for each in kinds)
    if not isinstance(row, dict) or key not in row:
        _fail(key, expected=expected, got="no such entry" if isinstance(row, dict) else repr(row)[:40], where=where)
    if not isinstance(row[key], kinds) or isinstance(row[key], bool):
        _fail(key, expected=expected, got=repr(row[key])[:40], where=where)
    return row[key]


def _numbers(values: list[Any], where: str) -> list[float]:
    if len(values) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        _fail("bbox", expected="four finite numbers: x, y, width, height", got=repr(values)[:80], where=where)
    return values


# ------------------------------------------------------------------------------------------------------ PASCAL VOC
def _read_voc(path: Path, limit: int | None) -> tuple[list[_Image], int]:
    files = sorted(path.glob("*.xml"))[:limit]
    if not files:
        fix = "Give the folder that holds them, often called Annotations."
        _fail("path", expected="a folder with .xml files", got="none", where=path.name, fix=fix)
    read = [(file.stem, *_read_xml(file)) for file in files]
    index = {name: position for position, name in enumerate(sorted({name for *_, found in read for _, name in found}))}
    num_classes = max(1, len(index))
    return [
        _annotated(stem, size, [(box, index[name]) for box, name in found], num_classes, 0, path.name)
        for stem, size, found in read
    ], num_classes


def _read_xml(file: Path) -> tuple[tuple[float, float], list[tuple[list[float], str]]]:
    """Size of one image, and its boxes with the names of their classes."""
    where = f"{file.parent.name}, image {file.stem}"
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ValueError, ElementTree.ParseError) as error:
        _fail("content", expected="XML text", got=f"{type(error).__name__}: {error}", where=where)
    if root.tag != "annotation":
        _fail("content", expected="an <annotation>", got=f"a <{root.tag}>", where=where)
    size = (_number(root, "size/width", where), _number(root, "size/height", where))
    return size, list(_objects(root, where))


def _objects(root: ElementTree.Element, where: str) -> Iterator[tuple[list[float], str]]:
    for number, item in enumerate(root.iter("object")):
        name = (item.findtext("name") or "").strip()
        if not name:
            _fail("name", expected="the class of the object", got="none", where=f"{where}, object {number}")
        corners = [_number(item, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
        yield [corners[0] - 1, corners[1] - 1, *corners[2:]], name


def _number(element: ElementTree.Element, tag: str, where: str) -> float:
    text = element.findtext(tag)
    try:
        return float(text or "")
    except ValueError:
        got = "no such element" if text is None else repr(text)[:40]
    _fail(tag, expected="a number", got=got, where=where)
