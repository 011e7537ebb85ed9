"""Running error analysis: run an oracle in float64 and know what float32 may do instead.

A `Bounded` is a float64 tensor with, beside every element, a bound on the rounding error that a float32 (or half)
evaluation of the same formula can make there. A `Decision` is a boolean tensor with the *margin* of every element:
the distance from the point where it flips, in units of that bound. Both go through the ordinary torch functions, so
that the oracles' own stage functions explain themselves unmodified:

>>> import torch
>>> x = Bounded.exact(torch.tensor([1.0, 2.0]), torch.float32)
>>> bool((torch.log(x * 3).error < 1e-6).all())
True
>>> (x > 1.0).value.tolist(), (x > 1.0).margin.tolist()
([False, True], [inf, inf])

A value known without error decides with an infinite margin, also when it sits exactly on the edge; a value that
carries an error decides with margin |distance| / error, and below 1 either outcome is right.

The model is the standard one: every operation commits a relative error of at most one unit roundoff ``u`` (two for
transcendental functions), a sum of n terms n * u of the sum of magnitudes, in whatever order it is taken. Results
that fit in a few bits (grid coordinates, halves, small integers) are exact in any order and commit none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detoracle.reference.bounded import Bounded, Decision, Precision, known, nothing_by_luck, value_of
from detoracle.reference.rounding_arithmetic import log_at_least, log_ratio

__all__ = [
    "Bounded",
    "Decision",
    "Precision",
    "known",
    "known_range",
    "log_at_least",
    "log_ratio",
    "nothing_by_luck",
    "value_of",
]


def known_range(x: Any, low: float, high: float | Tensor) -> Any:
    """State that a result lies in a range, however it is rounded. Tightens a bound; a tensor stays as it is.

    Examples
    --------
    >>> import torch
    >>> ratio = Bounded(torch.tensor(0.25), torch.tensor(9.0), Precision.of(torch.float32))
    >>> known_range(ratio, 0.0, 1.0).error.item()
    0.75
    """
    if not isinstance(x, Bounded):
        return x
    farthest = torch.maximum(high - x.value, x.value - low)
    holds = (x.value >= low) & (x.value <= high)
    return Bounded(x.value, torch.where(holds, torch.minimum(x.error, farthest), x.error), x.precision)
