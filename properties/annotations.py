"""Annotated images as they are read from COCO instances JSON and from PASCAL VOC XML, checked and letterboxed.

An image is letterboxed as YOLOX does: scaled to fit 640 x 640 pixels and put to the top left.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detoracle.reference.errors import InputError

__all__ = ["LETTERBOX", "AnnotatedImage", "AnnotationSet", "letterboxed", "read_coco", "read_voc"]

LETTERBOX = 640
"""Side in pixels of the square that images are scaled to fit."""


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """One image's ground truths, in the letterbox.

    Attributes
    ----------
    name : str
    boxes : ndarray (G, 4) float64
        xyxy in pixels.
    labels : ndarray (G,) int64
    dropped : int
        Boxes the file says to ignore, and which are not among these.
    outputs : ndarray (A, 5 + C) float32 or None
        What a YOLOX's head put out for it, where that is recorded.
    """

    name: str
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    dropped: int = 0
    outputs: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class AnnotationSet:
    """The images of a file, their number of classes, and the strides of recorded outputs."""

    images: Sequence[AnnotatedImage]
    num_classes: int
    strides: tuple[int, ...] = ()


def letterboxed(
    size: tuple[float, float], boxes: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int, *, where: str
) -> NDArray[np.float64]:
    """Check one image's annotations and scale its boxes as the image is.

    Parameters
    ----------
    size : (float, float)
        Width and height of the image in pixels.
    boxes : ndarray (G, 4) float64
        xyxy in pixels of the image.
    labels : ndarray (G,) int64
    num_classes : int
    where : str
        File and image, for the errors.

    Returns
    -------
    boxes : ndarray (G, 4) float64
        xyxy in pixels of the letterbox.

    Raises
    ------
    InputError
        Size unknown, box not finite, class out of range.

    Examples
    --------
    >>> letterboxed((1280, 720), np.array([[2.0, 4, 6, 8]]), np.array([0]), 1, where="an example").tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """
    if not all(side > 0 and math.isfinite(side) for side in size):
        got = f"{size[0]:g} x {size[1]:g}"
        raise InputError("size", expected="width and height above 0", got=got, where=where)
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = boxes * min(LETTERBOX / size[0], LETTERBOX / size[1])
    largest = np.abs(fitted).max(axis=1, initial=0).tolist()
    for number, label in enumerate(labels.tolist()):
        if not largest[number] <= float(np.finfo(np.float32).max):
            got = str(boxes[number].tolist())
            raise InputError(f"box {number}", expected="finite coordinates", got=got, where=where)
        if not 0 <= label < num_classes:
            expected = f"0 to {num_classes - 1}"
            raise InputError(f"class of box {number}", expected=expected, got=str(label), where=where)
    return fitted


def _annotated(
    name: str, size: tuple[float, float], found: Sequence[tuple[list[float], int]], num_classes: int, *, where: str
) -> AnnotatedImage:
    boxes = np.array([box for box, _ in found], dtype=np.float64).reshape(-1, 4)
    labels = np.array([label for _, label in found], dtype=np.int64)
    return AnnotatedImage(name, letterboxed(size, boxes, labels, num_classes, where=where), labels)


# ----------------------------------------------------------------------------------------------------------- COCO
def read_coco(path: Path, limit: int | None = None) -> AnnotationSet:
    """Read COCO instances JSON: ``images``, ``annotations`` (crowds dropped), ``categories`` in the order of their ids.

    Parameters
    ----------
    path : Path
    limit : int, optional
        Return no more than so many images, the first; the whole file is checked nevertheless.

    Returns
    -------
    AnnotationSet

    Raises
    ------
    InputError
        Naming the image where one is at fault.

    Examples
    --------
    >>> import tempfile
    >>> row = {"image_id": 7, "bbox": [2, 4, 4, 4], "category_id": 90}
    >>> content = {
    ...     "images": [{"id": 7, "width": 1280, "height": 720}],
    ...     "annotations": [row],
    ...     "categories": [{"id": 90}],
    ... }
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = Path(folder, "instances.json").write_text(json.dumps(content))
    ...     found = read_coco(Path(folder, "instances.json"))
    >>> found.images[0].boxes.tolist(), found.images[0].labels.tolist(), found.num_classes
    ([[1.0, 2.0, 3.0, 4.0]], [0], 1)
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("content", expected="JSON text", got=got, where=path.name) from error
    categories = sorted({_entry(row, "id", int, path.name) for row in _entry(content, "categories", list, path.name)})
    index = {category: position for position, category in enumerate(categories)}
    num_classes = max(1, len(index))
    sizes: dict[int | str, tuple[float, float]] = {}
    for row in _entry(content, "images", list, path.name):
        name = _entry(row, "id", int | str, path.name)
        where = f"{path.name}, image {name}"
        if name in sizes:
            raise InputError("id", expected="another for each image", got=f"{name!r} twice", where=path.name)
        sizes[name] = (_real(_entry(row, "width", float, where)), _real(_entry(row, "height", float, where)))
    found: dict[int | str, list[tuple[list[float], int]]] = {name: [] for name in sizes}
    crowds = dict.fromkeys(sizes, 0)
    for row in _entry(content, "annotations", list, path.name):
        name = _entry(row, "image_id", int | str, path.name)
        where = f"{path.name}, image {name}"
        if name not in sizes:
            raise InputError("image_id", expected="an image of the file", got=repr(name), where=path.name)
        if row.get("iscrowd"):
            crowds[name] += 1
            continue
        x, y, width, height = _four(_entry(row, "bbox", list, where), where)
        category = _entry(row, "category_id", int, where)
        if category not in index:
            raise InputError("category_id", expected="a category of the file", got=str(category), where=where)
        found[name].append(([x, y, x + width, y + height], index[category]))
    images = []
    for name in list(sizes)[:limit]:
        where = f"{path.name}, image {name}"
        image = _annotated(str(name), sizes[name], found[name], num_classes, where=where)
        images.append(AnnotatedImage(image.name, image.boxes, image.labels, crowds[name]))
    return AnnotationSet(images, num_classes)


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    int | str: ((int, str), "a whole number or text"),
    list: ((list,), "a list"),
}


def _entry(row: Any, key: str, kind: Any, where: str) -> Any:
    """One value of a JSON object, of the kind it should be."""
    kinds, expected = _KINDS[kind]
    if not isinstance(row, dict):
        raise InputError(key, expected=f"an object with {expected}", got=repr(row)[:40], where=where)
    if key not in row or not isinstance(row[key], kinds) or isinstance(row[key], bool):
        got = repr(row[key])[:40] if key in row else "no such entry"
        raise InputError(key, expected=expected, got=got, where=where)
    return row[key]


def _real(number: float) -> float:
    """As a float; a whole number beyond all floats is as infinite as they get."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _four(values: list[Any], where: str) -> list[float]:
    if len(values) == 4 and all(isinstance(value, int | float) for value in values):
        numbers = [_real(value) for value in values]
        if all(map(math.isfinite, numbers)):
            return numbers
    expected = "four finite numbers: x, y, width, height"
    raise InputError("bbox", expected=expected, got=repr(values)[:80], where=where)


# ------------------------------------------------------------------------------------------------------ PASCAL VOC
def read_voc(path: Path, limit: int | None = None) -> AnnotationSet:
    """Read a folder of PASCAL VOC XML files, corners counted from 1, classes in the alphabetical order of those read.

    Parameters
    ----------
    path : Path
    limit : int, optional
        Read no more than so many files, the first by name.

    Returns
    -------
    AnnotationSet

    Raises
    ------
    InputError
        Naming the image where one is at fault.

    Examples
    --------
    >>> import tempfile
    >>> size, box = "<width>320</width>", "<xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>20</ymax>"
    >>> item = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = f"<annotation><size>{size}<height>320</height></size>{item}</annotation>"
    ...     written = Path(folder, "1.xml").write_text(text)
    ...     read_voc(Path(folder)).images[0].boxes.tolist()
    [[0.0, 0.0, 20.0, 40.0]]
    """
    files = sorted(path.glob("*.xml"))[:limit]
    if not files:
        fix = "Give the folder that holds them, often called Annotations."
        raise InputError("path", expected="a folder with .xml files", got="none", where=path.name, fix=fix)
    read = [(file.stem, *_read_xml(file)) for file in files]
    index = {name: position for position, name in enumerate(sorted({name for *_, found in read for _, name in found}))}
    num_classes = max(1, len(index))
    images = []
    for stem, size, found in read:
        rows = [(box, index[name]) for box, name in found]
        images.append(_annotated(stem, size, rows, num_classes, where=f"{path.name}, image {stem}"))
    return AnnotationSet(images, num_classes)


def _read_xml(file: Path) -> tuple[tuple[float, float], list[tuple[list[float], str]]]:
    """Size of one image, and its boxes with the names of their classes."""
    where = f"{file.parent.name}, image {file.stem}"
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("content", expected="XML text", got=got, where=where) from error
    if root.tag != "annotation":
        raise InputError("content", expected="an <annotation>", got=f"a <{root.tag}>", where=where)
    size = (_number(root, "size/width", where), _number(root, "size/height", where))
    return size, list(_objects(root, where))


def _objects(root: ElementTree.Element, where: str) -> Iterator[tuple[list[float], str]]:
    for number, item in enumerate(root.iter("object")):
        where_object = f"{where}, object {number}"
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError("name", expected="the class of the object", got="none", where=where_object)
        left, top, right, bottom = (
            _number(item, f"bndbox/{side}", where_object) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        yield [left - 1, top - 1, right, bottom], name


def _number(element: ElementTree.Element, tag: str, where: str) -> float:
    text = element.findtext(tag)
    try:
        return float(text or "")
    except ValueError as error:
        got = "no such element" if text is None else repr(text)[:40]
        raise InputError(tag, expected="a number", got=got, where=where) from error
