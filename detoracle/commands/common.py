"""What several commands share: naming scenes, operations and dtypes, and writing JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.loaders import load_scenes
from detoracle.properties.realistic import built_in
from detoracle.properties.scenefile import write_atomically
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System, every_operation, find_operation
from detoracle.reference.contract import Operation
from detoracle.reference.errors import InputError

__all__ = ["chosen_operations", "device_named", "dtype_named", "scenes_named", "write_json", "written_command"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def scenes_named(name: str, *, seed: int) -> tuple[Scene, ...]:
    """Scenes that ``--scenes`` names: edge, realistic, crowd, or a file or folder."""
    if name == "edge":
        return edge_cases()
    if name == "realistic":
        return built_in("realistic", seed=seed)
    if name == "crowd":
        return built_in("crowd", seed=seed)
    path = Path(name)
    if not path.exists():
        raise InputError("--scenes", expected="edge, realistic, crowd, or a file or folder that exists", got=repr(name))
    return load_scenes(path, seed=seed)


def chosen_operations(names: Sequence[str]) -> tuple[tuple[System, Operation], ...]:
    """Operations by name; all of them without a name."""
    return tuple(find_operation(name) for name in names) if names else every_operation()


def dtype_named(name: str) -> torch.dtype:
    """Floating dtype by name."""
    if name not in _DTYPES:
        raise InputError("--dtype", expected=f"one of {', '.join(_DTYPES)}", got=repr(name))
    return _DTYPES[name]


def device_named(name: str) -> str:
    """Device that is there."""
    if name not in ("cpu", "cuda"):
        raise InputError("--device", expected="cpu or cuda", got=repr(name))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", expected="a CUDA device that PyTorch sees", got="none", fix="Use --device cpu.")
    return name


def write_json(path: Path | None, body: Any) -> None:
    """Write ``--json FILE``, if it was given."""
    if path is not None:
        write_atomically(path, json.dumps(body, indent=1, sort_keys=True) + "\n")


def written_command(arguments: Sequence[str]) -> str:
    """The command as a person would type it again, without the folders of this machine."""
    return " ".join(["detoracle", *(Path(a).name if a.startswith("/") else a for a in arguments[1:])])
