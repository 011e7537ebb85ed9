"""The one table of tolerances: how far a right result may be from the float64 oracle.

Values come with bounds from running error analysis (`detoracle.reference.rounding`). Gradients are judged as
low-precision kernels are: by the error that the plain oracle itself makes in the same dtype, times a factor, plus a
few roundings of the largest gradient of the same anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "DOUBLE_UNITS",
    "GRADIENT_FACTOR",
    "GRADIENT_FLOOR",
    "GRADIENT_UNITS",
    "VALUE_FACTOR",
    "gradient_bound",
    "outside",
    "ulps_between",
    "value_bound",
]

VALUE_FACTOR = 4.0
"""A right implementation may arrange the formula differently: its error is within four times the oracle's bound.

Two are not enough for anchor deltas from the shifts of both corners, whose sum cancels."""

DOUBLE_UNITS = 8.0
"""In float64 the oracle itself rounds, unseen: a right value may be so many unit roundoffs from it."""

GRADIENT_FACTOR = 8.0
"""A right gradient errs at most so many times as much as the plain oracle's, row by row."""

GRADIENT_UNITS = 64.0
"""... plus so many unit roundoffs of the row's largest gradient, for where the plain oracle is exact by luck."""


GRADIENT_FLOOR = 8.0
"""... plus so many of the tensor's largest gradient, for where large terms cancel to nothing."""


def value_bound(exact: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound on a right value's distance from the float64 one.

    Parameters
    ----------
    exact, error : Tensor float64
        Value, and the bound that running error analysis puts on one way to compute it.
    dtype : torch.dtype
        Of the value to judge.

    Returns
    -------
    bound : Tensor float64

    Examples
    --------
    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> 0 < float(value_bound(zero, zero, torch.float32)) < 1e-37  # what underflows may be flushed to zero or not
    True
    """
    info = torch.finfo(dtype)
    underflow = info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)  # half keeps its subnormals
    own = DOUBLE_UNITS * info.eps / 2 * exact.abs().nan_to_num(posinf=0.0) if dtype == torch.float64 else 0.0
    return VALUE_FACTOR * error + own + underflow


def gradient_bound(exact: Tensor, plain: Tensor, *, row: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Bound on a right gradient's distance from the float64 one.

    Parameters
    ----------
    exact : Tensor float64
        Gradient by the oracle in float64.
    plain : Tensor
        Gradient by the oracle in the dtype under test, or another that rounding could make of the exact one.
    row : int
        Dimension along which one anchor's channels lie.
    dtype : torch.dtype, optional
        Dtype under test, if it is not that of `plain`.

    Returns
    -------
    bound : Tensor float64
        Broadcastable to `exact`.

    Examples
    --------
    >>> float(gradient_bound(torch.ones(1, 2).double(), torch.ones(1, 2))) < 1e-5
    True
    """
    if exact.ndim == 0:
        exact, plain = exact[None], plain[None]
    made = (plain.double() - exact).abs().nan_to_num(nan=0.0, posinf=0.0).amax(row, keepdim=True)
    largest = exact.abs().nan_to_num(nan=0.0, posinf=0.0).amax(row, keepdim=True)
    info = torch.finfo(dtype or plain.dtype)
    overall = largest.amax() if largest.numel() else 0.0
    scale = GRADIENT_UNITS * largest + GRADIENT_FLOOR * overall
    return GRADIENT_FACTOR * made + info.eps / 2 * scale + info.smallest_normal


def outside(given: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """Elements of a result that are farther from the exact one than the bound, or not finite in another way.

    Parameters
    ----------
    given : Tensor
        The result to judge.
    exact, bound : Tensor float64
        The float64 result and its bound; an infinite bound accepts anything.

    Returns
    -------
    wrong : Tensor bool

    Examples
    --------
    >>> outside(
    ...     torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]).double(), torch.zeros(2).double()
    ... ).tolist()
    [False, False]
    """
    given = given.detach().double()
    same = (given == exact) | (given.isnan() & exact.isnan())
    near = (given - exact).abs() <= bound
    return ~(same | near | bound.isinf())


def ulps_between(given: Tensor, exact: Tensor) -> Tensor:
    """Distance of a result from the exact one, in units in the last place of the larger of the two.

    Parameters
    ----------
    given : Tensor float
        Its dtype is the one that the units are of.
    exact : Tensor float64

    Returns
    -------
    ulps : Tensor float64
        Infinite where one is not finite and the other is not the same.

    Examples
    --------
    >>> ulps_between(torch.tensor([1.5, torch.nan]), torch.tensor([1.5 + 2**-22, 0.0]).double()).tolist()
    [2.0, inf]
    """
    info, wide = torch.finfo(given.dtype), given.detach().double()
    largest = torch.maximum(wide.abs(), exact.double().abs())
    power = torch.frexp(largest.clamp(min=info.smallest_normal))[1] - 1
    distance = (wide - exact).abs() / torch.ldexp(torch.full_like(largest, info.eps), power)
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0.0)
