"""A failing scene in one file: the operation, its exact arguments, and what went wrong.

Floats are written as hexadecimal, so that the file replays bit for bit and reads the same on any machine; keys are
sorted, so that the same scene gives the same bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.errors import InputError

__all__ = ["FORMAT", "UNFINISHED", "SavedScene", "read_scene", "write_atomically", "write_scene"]

FORMAT = "detoracle-scene/1"
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool
)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SavedScene:
    """One replayable call.

    Attributes
    ----------
    operation : str
    name : str
        Where the scene came from.
    arguments : mapping
        Keyword arguments of the operation.
    implementation : str
        Target or name of what failed; may be empty.
    findings : tuple of str
        What was wrong, as text.
    """

    operation: str
    name: str
    arguments: Mapping[str, Any]
    implementation: str = ""
    findings: tuple[str, ...] = field(default_factory=tuple)


def write_scene(path: Path, scene: SavedScene) -> None:
    """Write a scene file, completely or not at all.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "one.scene.json"
    >>> write_scene(file, SavedScene("boxes.iou_yolox", "mine", {"boxes_a": torch.tensor([[0.1, 0, 1, 1]])}))
    >>> read_scene(file).arguments["boxes_a"].tolist() == torch.tensor([[0.1, 0, 1, 1]]).tolist()
    True
    """
    body = {
        "format": FORMAT,
        "operation": scene.operation,
        "name": scene.name,
        "implementation": scene.implementation,
        "findings": list(scene.findings),
        "arguments": {name: _encode(value) for name, value in scene.arguments.items()},
    }
    write_atomically(path, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True) + "\n")


UNFINISHED = ".part"
"""What the names of files end in that are being written; a killed run leaves one behind."""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one, never half.

    Parameters
    ----------
    path : Path
        Its folder is made if need be.
    text : str

    Raises
    ------
    InputError
        If the folder cannot be written to or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=UNFINISHED)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        raise InputError(
            path.name,
            expected="a place that can be written to",
            got=f"{type(error).__name__}: {error.strerror}",
            fix="Choose another folder, or make room and allow writing there.",
        ) from error


def read_scene(path: Path) -> SavedScene:
    """Read a scene file.

    Raises
    ------
    InputError
        If it is unreadable, truncated, or of another format.

    Examples
    --------
    >>> try:
    ...     read_scene(Path("nowhere.scene.json"))
    ... except InputError as error:
    ...     print(error)
    nowhere.scene.json: expected a scene file (detoracle-scene/1), got FileNotFoundError.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}")
        arguments = {name: _decode(value) for name, value in body["arguments"].items()}
        texts = [body[name] for name in ("operation", "name", "implementation")]
        if not all(isinstance(text, str) for text in (*texts, *body["findings"])):
            raise TypeError("operation, name, implementation and findings are texts")
        return SavedScene(texts[0], texts[1], arguments, texts[2], tuple(body["findings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        got = type(error).__name__ if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(path.name, expected=f"a scene file ({FORMAT})", got=got) from error


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().flatten()
        numbers = [float(x).hex() for x in flat.tolist()] if value.is_floating_point() else flat.int().tolist()
        if value.dtype == torch.int64:
            numbers = flat.tolist()
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": numbers}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float):
        return {"float": value.hex()}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float.fromhex(value["float"])
    dtype = _DTYPES[value["tensor"]]
    numbers = [float.fromhex(x) if isinstance(x, str) else x for x in value["values"]]
    return (
        torch.tensor(numbers, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
        .to(dtype)
        .reshape(value["shape"])
    )
