"""Recorded vectors: ``X.npz`` with arrays ``<scene>/in/<name>`` and ``<scene>/out/<name>``, and ``X.json``."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detoracle.reference.errors import InputError

__all__ = ["SYSTEMS", "Recorded", "read_vectors"]

SYSTEMS = ("yolox", "ssd", "anchor_head", "rtmdet", "yolov8")


@dataclass(frozen=True, eq=False)
class Recorded:
    """One recorded scene.

    Attributes
    ----------
    name : str
    system : str
        One of the five.
    recording : str
        What the file says it was recorded from, such as ``yolox_doc``.
    config : mapping
        Hyper-parameters of the whole file.
    info : mapping
        What the JSON says of this scene: tags, note, cfg, raises, ...
    arrays : mapping of str to ndarray
        By name without the scene: ``in/raw.0``, ``out/loss``.
    """

    name: str
    system: str
    recording: str
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray[Any, Any]]

    @property
    def raises(self) -> str | None:
        """The exception that the genuine code raised, as text."""
        return self.info.get("raises")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all recorded outputs, without ``out/``."""
        return tuple(key.removeprefix("out/") for key in self.arrays if key.startswith("out/"))

    def has(self, key: str) -> bool:
        """Is there an array ``in/...`` or ``out/...`` of that name?"""
        return key in self.arrays

    def tensor(self, key: str) -> Tensor:
        """One array as a fresh tensor."""
        if key not in self.arrays:
            raise InputError(key, expected="an array of that name", got="none", where=f"recorded scene '{self.name}'")
        return torch.from_numpy(np.array(self.arrays[key]))

    def tensors(self, key: str) -> list[Tensor]:
        """Arrays ``key.0``, ``key.1``, ... as a list, ended by the first that is missing."""
        found: list[Tensor] = []
        while self.has(f"{key}.{len(found)}"):
            found.append(self.tensor(f"{key}.{len(found)}"))
        return found


def read_vectors(path: Path) -> tuple[Recorded, ...]:
    """Read a file of recorded vectors.

    Parameters
    ----------
    path : Path
        The ``.npz``; its ``.json`` lies beside it.

    Returns
    -------
    tuple of Recorded
        In the JSON's order.

    Raises
    ------
    InputError
        If a file is missing, unreadable, truncated, or of another schema.

    Examples
    --------
    >>> try:
    ...     read_vectors(Path("nowhere.npz"))
    ... except InputError as error:
    ...     print(error)
    nowhere.npz: expected a readable .npz of recorded vectors, got FileNotFoundError.
    """
    described = path.with_suffix(".json")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(path.name, expected="a readable .npz of recorded vectors", got=type(error).__name__) from error
    try:
        text = json.loads(described.read_text(encoding="utf-8"))
        scenes, config, recording = dict(text["scenes"]), dict(text.get("config", {})), str(text["system"])
        if not all(isinstance(info, Mapping) for info in scenes.values()):
            raise TypeError("each scene is described by an object")
        system = next(s for s in SYSTEMS if recording.startswith(s))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StopIteration) as error:
        raise InputError(
            described.name,
            expected=f"JSON beside the .npz with 'system' (one of {', '.join(SYSTEMS)}) and 'scenes'",
            got=f"{type(error).__name__}",
        ) from error
    by_scene: dict[str, dict[str, np.ndarray[Any, Any]]] = {name: {} for name in scenes}
    for key, array in arrays.items():
        name, _, rest = key.partition("/")
        if name not in by_scene or not rest.startswith(("in/", "out/")):
            raise InputError(
                path.name, expected="keys <scene>/in/<name> or <scene>/out/<name> of a described scene", got=key
            )
        by_scene[name][rest] = array
    return tuple(Recorded(name, system, recording, config, scenes[name], by_scene[name]) for name in scenes)
