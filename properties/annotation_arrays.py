"""Annotated images, and recorded outputs of a YOLOX for them, as they are read from arrays in an ``.npz`` file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detoracle.properties.annotations import LETTERBOX, AnnotatedImage, AnnotationSet, letterboxed
from detoracle.reference.errors import InputError

__all__ = ["read_arrays"]

_READ = (
    *("image", "width", "height", "gt_ptr", "gt_boxes", "gt_boxes_640", "gt_class", "gt_ignore", "class_names"),
    *("reg", "obj_logit", "cls_logit_u8", "cls_logit_step", "cls_logit_lo", "grid", "stride"),
)


def read_arrays(path: Path, limit: int | None = None) -> AnnotationSet:
    """Read ground truths, and recorded raw outputs if there are any.

    Ground truths: ``gt_ptr`` (N + 1,), the row at which each image's boxes begin, and where the last end; ``gt_class``
    (M,); ``gt_boxes`` (M, 4) xyxy in pixels with the images' ``width`` and ``height`` (N,), or letterboxed
    ``gt_boxes_640`` (M, 4). Optionally ``image`` (N,), ``gt_ignore`` (M,) and ``class_names``, without which the
    largest class is taken for the last.

    Outputs: ``reg`` (N, A, 4), ``obj_logit`` (N, A), ``cls_logit_u8`` (N, A, C) in steps of ``cls_logit_step`` from
    ``cls_logit_lo``, all before any activation; ``grid`` (A, 2), column and row, and ``stride`` (A,) of each anchor.

    Parameters
    ----------
    path : Path
    limit : int, optional
        Return no more than so many images, the first.

    Returns
    -------
    AnnotationSet

    Raises
    ------
    InputError
        Naming the array, or the image where one is at fault.

    Examples
    --------
    >>> import tempfile
    >>> arrays = {"gt_ptr": [0, 1], "gt_boxes": [[2, 4, 6, 8]], "gt_class": [3], "width": [1280], "height": [720]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(Path(folder, "set.npz"), **arrays)
    ...     found = read_arrays(Path(folder, "set.npz"))
    >>> found.images[0].boxes.tolist(), found.num_classes
    ([[1.0, 2.0, 3.0, 4.0]], 4)
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files if name in _READ}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("content", expected="an .npz without pickles", got=got, where=path.name) from error
    return _annotation_set(_Arrays(arrays, path.name), limit)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Arrays of a file; asking for one that is missing or of another form says so."""

    arrays: Mapping[str, NDArray[Any]]
    file: str

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def get(self, name: str, *shape: int | None, kinds: str = "iuf") -> NDArray[Any]:
        """One array of numbers; None stands for any length."""
        array = self.arrays.get(name)
        what = "numbers" if "f" in kinds else "whole numbers"
        expected = f"{what} of shape ({', '.join('any' if side is None else str(side) for side in shape)})"
        if array is None:
            raise InputError(name, expected=expected, got="no such array", where=self.file)
        fits = len(array.shape) == len(shape) and all(
            side in (None, given) for side, given in zip(shape, array.shape, strict=True)
        )
        if not fits or array.dtype.kind not in kinds:
            raise InputError(name, expected=expected, got=f"{array.dtype} of shape {array.shape}", where=self.file)
        return array

    def integers(self, name: str, *shape: int | None) -> NDArray[np.int64]:
        """One array of whole numbers."""
        return self.get(name, *shape, kinds="biu").astype(np.int64)


def _annotation_set(arrays: _Arrays, limit: int | None) -> AnnotationSet:
    scaled = "gt_boxes_640" in arrays
    boxes = arrays.get("gt_boxes_640" if scaled else "gt_boxes", None, 4).astype(np.float64)
    labels = arrays.integers("gt_class", len(boxes))
    kept = arrays.integers("gt_ignore", len(boxes)) == 0 if "gt_ignore" in arrays else np.full(len(boxes), True)
    rows = arrays.integers("gt_ptr", None)
    if not (len(rows) and rows[0] == 0 and rows[-1] == len(boxes) and (np.diff(rows) >= 0).all()):
        got = np.array2string(rows, threshold=8, edgeitems=3)
        raise InputError("gt_ptr", expected=f"rows that rise from 0 to {len(boxes)}", got=got, where=arrays.file)
    count = len(rows) - 1
    names = arrays.arrays.get("image", np.arange(count))
    if names.shape != (count,):
        raise InputError("image", expected=f"shape ({count},)", got=str(names.shape), where=arrays.file)
    if scaled:
        sizes = np.full((count, 2), float(LETTERBOX))
    else:
        sizes = np.stack([arrays.get(side, count).astype(np.float64) for side in ("width", "height")], axis=1)
    recorded = _Recorded.read(arrays, count) if "reg" in arrays else None
    num_classes = _num_classes(arrays, labels[kept])
    images = []
    for image in range(count if limit is None else min(limit, count)):
        row = slice(rows[image], rows[image + 1])
        own, where = kept[row], f"{arrays.file}, image {names[image]}"
        fitted = letterboxed(tuple(sizes[image].tolist()), boxes[row][own], labels[row][own], num_classes, where=where)
        outputs = None if recorded is None else recorded.outputs(image, where=where)
        images.append(AnnotatedImage(str(names[image]), fitted, labels[row][own], int((~own).sum()), outputs))
    return AnnotationSet(images, num_classes, () if recorded is None else recorded.strides)


def _num_classes(arrays: _Arrays, labels: NDArray[np.int64]) -> int:
    """By the outputs, or the names, or else the largest label."""
    if "reg" in arrays:
        return int(arrays.get("cls_logit_u8", None, None, None).shape[2])
    if "class_names" in arrays:
        return max(1, arrays.arrays["class_names"].size)
    return int(labels.max(initial=0)) + 1


@dataclass(frozen=True, eq=False)
class _Recorded:
    """Outputs of all images as they lie in the file."""

    boxes: NDArray[Any]
    objectness: NDArray[Any]
    classes: NDArray[Any]
    step: np.float32
    lowest: np.float32
    strides: tuple[int, ...]

    @classmethod
    def read(cls, arrays: _Arrays, count: int) -> _Recorded:
        """Check that the anchors are all cells of a letterbox, in YOLOX's order."""
        stride = arrays.integers("stride", None)
        anchors = len(stride)
        strides = tuple(dict.fromkeys(stride.tolist()))
        cells = [
            (level, column, row)
            for level in strides
            if level > 0
            for row in range(LETTERBOX // level)
            for column in range(LETTERBOX // level)
        ]
        if not np.array_equal(np.column_stack([stride, arrays.get("grid", anchors, 2)]), np.reshape(cells, (-1, 3))):
            expected = f"the cells of a {LETTERBOX} pixel square, level by level and row by row"
            got = f"{anchors} others, of strides {', '.join(map(str, strides))}"
            raise InputError("grid and stride", expected=expected, got=got, where=arrays.file)
        return cls(
            arrays.get("reg", count, anchors, 4),
            arrays.get("obj_logit", count, anchors),
            arrays.get("cls_logit_u8", count, anchors, None),
            np.float32(arrays.get("cls_logit_step")),
            np.float32(arrays.get("cls_logit_lo")),
            strides,
        )

    def outputs(self, image: int, *, where: str) -> NDArray[np.float32]:
        """Raw channels (A, 5 + C) of one image."""
        classes = self.classes[image].astype(np.float32) * self.step + self.lowest
        channels = [self.boxes[image], self.objectness[image, :, None], classes]
        outputs = np.concatenate(channels, axis=1, dtype=np.float32)
        wrong = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
        if len(wrong):
            what = f"outputs of anchor {wrong[0]}"
            raise InputError(what, expected="finite numbers", got="NaN or infinity", where=where)
        return outputs
