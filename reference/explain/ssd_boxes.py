"""Rounding of SSD's box coding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.reference.rounding import Bounded
from detoracle.reference.ssd_boxes import VARIANCES, _decode, _encode

__all__ = ["explain_decode", "explain_encode"]


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
    return _encode(targets, places, variances)  # type: ignore[return-value]


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
    return _decode(offsets, places, variances)  # type: ignore[return-value]
