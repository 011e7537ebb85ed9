"""Rounding of SSD's box coding, whose scales 0.1 and 0.2 no floating dtype holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.rounding import Bounded, Precision
from detoracle.reference.ssd_boxes import VARIANCES, _decode, _encode

__all__ = ["explain_decode", "explain_encode", "with_rounding"]


def with_rounding(constants: Sequence[float], dtype: torch.dtype) -> list[Any]:
    """Constants that a dtype may not hold: a result is not exact only because a rounded constant happens to give it.

    Examples
    --------
    >>> prior = Bounded.exact(torch.tensor(0.15625), torch.float32)
    >>> [tenth] = with_rounding([0.1], torch.float32)
    >>> (0.1 * prior).error.item(), (tenth * prior).error.item() > 0  # 0.015625 in both, by luck
    (0.0, True)
    """
    precision = Precision.of(dtype)
    exact = [torch.tensor(constant, dtype=torch.float64) for constant in constants]
    return [Bounded(value, precision.unit * value.abs(), precision) for value in exact]


def explain_encode(
    gt_boxes: Tensor, priors: Tensor, *, variances: Sequence[float] = VARIANCES, dtype: torch.dtype = torch.float32
) -> Bounded:
    """Explain `ssd.encode`: same arguments, and the dtype whose rounding is to be allowed for.

    Returns
    -------
    Bounded
        (P, 4).

    Examples
    --------
    >>> prior = torch.tensor([[0.5, 0.5, 0.15625, 0.15625]])
    >>> bool(explain_encode(torch.tensor([[0.5, 0.5, 0.75, 0.75]]), prior).error.max() < 1e-5)
    True
    """
    targets, places = Bounded.exact(gt_boxes, dtype), Bounded.exact(priors, dtype)
    return _encode(targets, places, with_rounding(variances, dtype))  # type: ignore[return-value]


def explain_decode(
    loc: Tensor, priors: Tensor, *, variances: Sequence[float] = VARIANCES, dtype: torch.dtype = torch.float32
) -> Bounded:
    """Explain `ssd.decode`: same arguments, and the dtype whose rounding is to be allowed for.

    Returns
    -------
    Bounded
        (B, P, 4).

    Examples
    --------
    >>> prior = torch.tensor([[0.5, 0.5, 0.15625, 0.15625]])
    >>> bool(explain_decode(torch.ones(1, 1, 4), prior).error.max() < 1e-6)
    True
    """
    offsets, places = Bounded.exact(loc, dtype), Bounded.exact(priors, dtype)
    return _decode(offsets, places, with_rounding(variances, dtype))  # type: ignore[return-value]
