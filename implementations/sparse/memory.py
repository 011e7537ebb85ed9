"""Memory for large results that are written once."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["zeros"]

_LARGE = 1 << 22  # bytes from which NumPy asks for huge pages


def zeros(shape: Sequence[int], *, like: Tensor) -> Tensor:
    """As ``like.new_zeros(shape)``; on a CPU under Linux from huge pages.

    The system hands out fresh memory page by page, which takes several times as long as writing it. NumPy asks for
    pages of 2 MiB, PyTorch for those of 4 KiB.

    Parameters
    ----------
    shape : sequence of int
    like : Tensor (...)
        Gives dtype and device.

    Returns
    -------
    zeros : Tensor (...)

    Examples
    --------
    >>> zeros((2, 3), like=torch.ones((), dtype=torch.bfloat16)).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    size = math.prod(shape) * like.element_size()
    if not like.is_cpu or size < _LARGE or not sys.platform.startswith("linux"):
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(like.dtype).view(*shape)
