"""What a right gradient is: the oracle's in float64, and how far rounding may take it from there.

The bound is measured, not guessed: by the error that the plain oracle makes in the dtype under test, and by how much
the float64 gradient moves when every input moves by one rounding. Both are taken at their largest over an anchor's
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.outputs import perform
from detoracle.reference.contract import Operation

__all__ = ["RightGradient", "right_gradients"]

_DRAWS = 2  # times the inputs are moved


@dataclass(frozen=True, eq=False)
class RightGradient:
    """Gradient to one input.

    Attributes
    ----------
    exact, bound : Tensor float64
        Gradient in float64, and its bound.
    judged : Tensor bool
        False where the plain oracle overflows or is NaN: a finite gradient is no worse there.
    """

    exact: Tensor
    bound: Tensor
    judged: Tensor

    def wrong(self, given: Tensor) -> Tensor:
        """Elements of a gradient of the same shape that are out of bounds."""
        return outside(given, self.exact, self.bound) & self.judged


def right_gradients(
    operation: Operation, call: Callable[..., Any], arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, RightGradient]:
    """Work out the gradients to all differentiable inputs of an operation.

    Parameters
    ----------
    operation : Operation
    call : callable
        The oracle, or its loss of a given assignment.
    arguments : mapping
        Keyword arguments of `call`.
    dtype : torch.dtype
        Dtype under test.

    Returns
    -------
    dict of str to RightGradient
        By input name, ``raw[0]`` for lists.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> one = torch.tensor([[4.0, 4, 4, 4]])
    >>> pair = {"predicted": one, "target": one + 1, "variant": "iou"}
    >>> right = right_gradients(boxes.iou_loss_yolox.operation, boxes.iou_loss_yolox, pair, torch.float32)
    >>> right["predicted"].wrong(right["predicted"].exact * 1.001).any().item()
    True
    """
    if not operation.gradients:
        return {}
    plain = perform(operation, call, arguments).gradients
    double = {name: _floats(value, torch.Tensor.double) for name, value in arguments.items()}
    exact = perform(operation, call, double).gradients
    moved = [perform(operation, call, _moved(double, dtype, draw)).gradients for draw in range(_DRAWS)]
    found = {}
    for name, gradient in exact.items():
        coarse = plain[name]
        if gradient is None or coarse is None:
            continue
        row = 1 if gradient.ndim == 4 else -1
        bound = gradient_bound(gradient, coarse, row=row).expand_as(gradient)
        for other in moved:
            nearby = other[name]
            assert nearby is not None, f"{operation.name}: a gradient comes and goes with rounding"
            bound = torch.maximum(bound, gradient_bound(gradient, nearby, row=row, dtype=dtype))
        found[name] = RightGradient(gradient, bound, coarse.isfinite())
    return found


def _floats(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_floats(v, change) for v in value]
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _moved(arguments: Mapping[str, Any], dtype: torch.dtype, draw: int) -> dict[str, Any]:
    """Every float up or down by one rounding, at random."""
    generator = torch.Generator().manual_seed(draw)
    unit = torch.finfo(dtype).eps / 2

    def move(tensor: Tensor) -> Tensor:
        direction = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + unit * direction)

    return {name: _floats(value, move) for name, value in arguments.items()}
