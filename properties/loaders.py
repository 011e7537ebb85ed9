"""Scenes from files: the ground truths of real images, and recorded outputs of a YOLOX where a file has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detoracle.properties.annotation_arrays import read_arrays
from detoracle.properties.annotations import LETTERBOX, AnnotatedImage, AnnotationSet, read_coco, read_voc
from detoracle.properties.scenes import Scene
from detoracle.reference.errors import InputError

__all__ = ["load_scenes"]

_BATCH = 8
_FORMS = "an .npz file of arrays, a COCO instances JSON file, or a folder of PASCAL VOC XML files"


def load_scenes(path: Path, *, limit: int | None = None, seed: int = 0) -> tuple[Scene, ...]:
    """Read real images' ground truths, eight images a scene, with a trained detector's predictions.

    The content tells what a file is: arrays (see `read_arrays`), COCO JSON (`read_coco`), a folder of XML (`read_voc`).
    Images are letterboxed to 640 pixels. Boxes that are to be ignored are dropped, and the scene's note counts them.
    Recorded raw outputs become the scene's native input of YOLOX.

    Parameters
    ----------
    path : Path
        The file or folder. Nothing in it is ever executed.
    limit : int, optional
        Read no more than so many images, the first.
    seed : int
        Decides the predictions.

    Raises
    ------
    InputError
        Unreadable, truncated or none of these forms; no image; a size unknown; a box not finite; a class out of range.

    Examples
    --------
    >>> load_scenes(Path("nowhere.json"))
    Traceback (most recent call last):
    ...
    detoracle.reference.errors.InputError: nowhere.json: path: expected an .npz file of arrays, ..., got nothing there.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError("limit", expected="at least 1", got=str(limit), where="load_scenes")
    found = _read(path, limit)
    if not found.images:
        raise InputError("images", expected="at least one", got="none", where=path.name)
    batches = [found.images[start : start + _BATCH] for start in range(0, len(found.images), _BATCH)]
    return tuple(_scene(found, batch, path.name, number, seed) for number, batch in enumerate(batches))


def _read(path: Path, limit: int | None) -> AnnotationSet:
    if path.is_dir():
        return read_voc(path, limit)
    if not path.exists():
        raise InputError("path", expected=_FORMS, got="nothing there", where=path.name)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("path", expected=_FORMS, got=got, where=path.name) from error
    if start.startswith(b"PK"):
        return read_arrays(path, limit)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return read_coco(path, limit)
    raise InputError("path", expected=_FORMS, got=f"a file that begins with {start[:8]!r}", where=path.name)


def _scene(found: AnnotationSet, images: Sequence[AnnotatedImage], file: str, number: int, seed: int) -> Scene:
    dropped = sum(image.dropped for image in images)
    outputs = [image.outputs for image in images if image.outputs is not None]
    return Scene(
        name=f"{file}#{number}",
        image_size=(LETTERBOX, LETTERBOX),
        num_classes=found.num_classes,
        gt_boxes=tuple(torch.from_numpy(image.boxes.astype(np.float32)) for image in images),
        gt_labels=tuple(torch.from_numpy(image.labels) for image in images),
        tags=frozenset({"file", "recorded"} if outputs else {"file"}),
        note=f"Images {images[0].name} to {images[-1].name} of {file}; boxes dropped because ignored: {dropped}.",
        seed=seed + number,
        native={"yolox": _yolox_maps(np.stack(outputs), found.strides)} if outputs else {},
    )


def _yolox_maps(outputs: np.ndarray[Any, Any], strides: Sequence[int]) -> dict[str, Any]:
    """Level maps (B, 5 + C, H, W) of outputs (B, A, 5 + C), and their strides: the native input of YOLOX."""
    sides = [LETTERBOX // stride for stride in strides]
    levels = torch.split(torch.from_numpy(outputs), [side * side for side in sides], dim=1)
    maps = [
        level.permute(0, 2, 1).reshape(len(outputs), -1, side, side).contiguous()
        for level, side in zip(levels, sides, strict=True)
    ]
    return {"raw": maps, "strides": list(strides)}
