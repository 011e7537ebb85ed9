"""A second opinion on the oracles' gradients: how the first output changes along a direction, in float64.

Where a part of a loss is treated as a constant by design (a soft target, an assignment by score, alpha of CIoU), only
inputs that do not move it can be checked so, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.checking import cases
from detoracle.properties.outputs import cotangent, normalised
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import every_operation
from detoracle.reference.contract import Operation, returns_of

CONSTANT_PARTS = {
    "yolox.loss": "the soft class target is an overlap that gets no gradient",
    "rtmdet.loss": "the quality target is an overlap that gets no gradient",
    "yolov8.loss": "target scores are made of overlaps and scores that get no gradient, and alpha of CIoU neither",
    "boxes.iou_ultralytics": "alpha of CIoU gets no gradient",
}
SCENE = next(scene for scene in random_scenes(20, seed=1) if scene.max_gts > 2)
STEP = 2.0**-18
EPS = torch.finfo(torch.float64).eps
UNITS = 64  # roundings that a sum of some thousand terms makes at most, by and large
DIFFERENTIABLE = [(s, o) for s, o in every_operation() if o.gradients and o.name not in CONSTANT_PARTS]


def _terms(operation: Operation, arguments: Mapping[str, Any]) -> Tensor:
    output = normalised(operation, operation.oracle(**arguments))[returns_of(operation.oracle)[0].name]
    return output * cotangent(output) if output.ndim else output


def _moved(operation: Operation, arguments: Mapping[str, Any], directions: list[Tensor], step: float) -> dict[str, Any]:
    moved, left = dict(arguments), iter(directions)
    for name in operation.gradients:
        value = arguments[name]
        many = isinstance(value, list)
        found = [tensor + step * next(left) for tensor in (value if many else [value])]
        moved[name] = found if many else found[0]
    return moved


@pytest.mark.parametrize(("system", "operation"), DIFFERENTIABLE, ids=[o.name for _, o in DIFFERENTIABLE])
def test_gradients_are_slopes(system: Any, operation: Operation) -> None:
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for case in cases(system, operation, SCENE, dtype=torch.float64):
        leaves = [
            tensor.detach().clone().requires_grad_()
            for name in operation.gradients
            for tensor in (case.arguments[name] if isinstance(case.arguments[name], list) else [case.arguments[name]])
        ]
        value = _terms(operation, _moved(operation, case.arguments, [leaf - leaf.detach() for leaf in leaves], 1.0))
        if not value.isfinite().all():
            continue  # SSD without a positive divides by zero
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        directions = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
        found: list[Tensor | None] = list(gradients)
        parts = [(g * d).flatten() for g, d in zip(found, directions, strict=True) if g is not None]
        slope = torch.cat(parts).sum()

        def along(step: float, case: Any = case, directions: list[Tensor] = directions) -> Tensor:
            return _terms(operation, _moved(operation, case.arguments, directions, step)).sum()

        near, far = ((along(h) - along(-h)) / (2 * h) for h in (STEP, 2 * STEP))
        bound = (near - far).abs() + UNITS * EPS * (value.abs().sum() / STEP + torch.cat(parts).abs().sum())
        assert (near - slope).abs() <= bound, f"{case.name}: {float(slope)} is not {float(near)}"
        assert torch.cat(parts).any() or not value.requires_grad or "no-overlap" in case.name
        compared += 1
    assert compared


@pytest.mark.parametrize("name", CONSTANT_PARTS)
def test_a_reason_is_still_needed(name: str) -> None:
    assert name in {operation.name for _, operation in every_operation() if operation.gradients}
