"""Where a call's inputs lie: in memory of their own, in memory that the call before used, or in memory of no writer.

Each function copies a flat tensor; `laid_out` gives the copy the shape and strides of the original.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Place", "Reused", "can_protect", "fresh", "laid_out", "read_only"]

Place = Callable[[Tensor], Tensor]


def laid_out(tensor: Tensor, place: Place) -> Tensor:
    """Copy a tensor with its strides, so that an expanded or transposed one is that in the copy too.

    Parameters
    ----------
    tensor : Tensor
    place : callable
        Copies a flat tensor.

    Returns
    -------
    Tensor
        Of the same values, shape and strides, without gradient.

    Examples
    --------
    >>> laid_out(torch.ones(1, 3).expand(2, 3), fresh).stride()
    (0, 1)
    """
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    copied = place(tensor.detach().as_strided((extent,), (1,), tensor.storage_offset()))
    return copied.new_empty(0).set_(copied.untyped_storage(), 0, tensor.shape, tensor.stride())


def fresh(flat: Tensor) -> Tensor:
    """Copy to memory of its own.

    Examples
    --------
    >>> fresh(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return flat.clone()


class Reused:
    """Copies to the memory of the call before: whoever knows an input by its address takes it for the old one.

    Examples
    --------
    >>> place = Reused()
    >>> first = place(torch.ones(2)).data_ptr()
    >>> place.next_call()
    >>> place(torch.zeros(2)).data_ptr() == first
    True
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        self._taken: list[Tensor] = []

    def __call__(self, flat: Tensor) -> Tensor:
        """Copy a flat tensor."""
        free = self._free[self._kind(flat)]
        taken = free.pop(0).copy_(flat) if free else flat.clone()
        self._taken.append(taken)
        return taken

    def next_call(self) -> None:
        """Free the memory of the inputs so far."""
        for tensor in self._taken:
            self._free[self._kind(tensor)].append(tensor)
        self._taken.clear()

    @staticmethod
    def _kind(flat: Tensor) -> tuple[object, ...]:
        return flat.dtype, len(flat), flat.device


def can_protect(device: str) -> bool:
    """Can memory of a device be made read-only here?

    Examples
    --------
    >>> can_protect("cuda")
    False
    """
    return device == "cpu" and os.name == "posix"


def read_only(flat: Tensor) -> Tensor:
    """Copy to memory that ends the process when it is written to, by whatever means.

    Examples
    --------
    >>> read_only(torch.ones(2)).tolist() if can_protect("cpu") else [1.0, 1.0]
    [1.0, 1.0]
    """
    if not flat.numel():
        return flat.clone()
    pages = mmap.mmap(-1, flat.numel() * flat.element_size())
    copied = torch.frombuffer(pages, dtype=flat.dtype)
    copied.copy_(flat)
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(copied.data_ptr()), len(pages), mmap.PROT_READ):
        raise OSError(ctypes.get_errno(), "mprotect")
    return copied
