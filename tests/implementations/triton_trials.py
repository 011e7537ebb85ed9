"""What tests of all Triton kernels share: operations, judged calls, gradients, and a stand-in for launches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.registry import marked_in
from detoracle.properties.checking import Case, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import find_operation

pytest.importorskip("triton")
from detoracle.implementations.triton import anchor_head, rtmdet, ssd, yolov8, yolox

__all__ = [
    "CALLS",
    "DEVICE",
    "EDGE",
    "LOSSES",
    "Launched",
    "arguments_of",
    "gradients_of",
    "interpreted",
    "launches_of",
    "on_gpu",
    "warnings_of_numpy",
    "wrong_cases",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE = {scene.name: scene for scene in edge_cases()}
CALLS: dict[str, Callable[..., Any]] = {
    one.operation: one.load() for module in (yolox, ssd, anchor_head, rtmdet, yolov8) for one in marked_in(module)
}
LOSSES = [operation for operation in CALLS if operation.endswith(".loss")]

# Interpreted kernels compute with NumPy, which warns of what floats do on a GPU without a word.
warnings_of_numpy = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what stands for a compiled function must be one too"
)


def _cases(operation: str, scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    return cases(*find_operation(operation), scene, dtype=dtype, device=DEVICE)


@cache
def _expected(
    operation: str, scene: Scene, dtype: torch.dtype, settings: tuple[str, ...] | None
) -> list[tuple[Case, Expectation]]:
    found = (case for case in _cases(operation, scene, dtype) if settings is None or case.setting in settings)
    return [(case, expect(*find_operation(operation), case.arguments)) for case in found]


def wrong_cases(
    operation: str,
    scene: Scene | str,
    settings: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """What is wrong on a scene, or an edge case of that name, under all settings or those named."""
    scene = EDGE[scene] if isinstance(scene, str) else scene
    judged = _expected(operation, scene, dtype, None if settings is None else tuple(settings))
    assert judged
    call = partial(perform, find_operation(operation)[1], CALLS[operation])
    results = [judge_case(case, right, call) for case, right in judged]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


def arguments_of(
    operation: str, scene: str, setting: str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Fresh arguments on an edge case, under the first setting or the one named."""
    return dict(next(c for c in _cases(operation, EDGE[scene], dtype) if setting in (None, c.setting)).arguments)


def gradients_of(
    operation: str, given: dict[str, Any], part: str = "total", call: Callable[..., Any] | None = None
) -> tuple[Tensor, ...]:
    """Gradients of a part of a loss by all inputs that have one; numbers of it have different weights."""
    found = find_operation(operation)[1].gradients
    fresh = {
        name: [level.detach().requires_grad_() for level in given[name]]
        if isinstance(given[name], list)
        else given[name].detach().requires_grad_()
        for name in found
    }
    wanted = (call or CALLS[operation])(**{**given, **fresh})[part]
    weights = torch.arange(1, wanted.numel() + 1, device=wanted.device).view_as(wanted)
    leaves = [leaf for value in fresh.values() for leaf in (value if isinstance(value, list) else [value])]
    return torch.autograd.grad((wanted * weights).sum(), leaves, allow_unused=True, materialize_grads=True)


class Launched:
    """Stands for a kernel; remembers its launches, and does nothing."""

    def __init__(self) -> None:
        self.grids: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_arguments, **_settings: None


def launches_of(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> dict[str, Launched]:
    """Put stand-ins in the place of all kernels that are launched from modules of kernels."""
    kernels = {name: Launched() for module in modules for name in module.__all__ if hasattr(vars(module)[name], "run")}
    for module in modules:
        for name in set(module.__all__) & set(kernels):
            monkeypatch.setattr(module, name, kernels[name])
    return kernels
