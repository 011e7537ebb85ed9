"""What host code of all kernels shares: what must hold before a launch, where things lie, and the choice of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from detoracle.reference.errors import InputError

__all__ = ["AS_WRITTEN", "check_runs", "check_size", "lanes_for", "listed", "size_class", "starts_of", "tiles", "tuned"]

AS_WRITTEN = {"enable_fp_fusion": False}
"""Setting of every launch: products and sums are rounded one by one, as PyTorch rounds them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_IMAGES, _MOST_ROWS = 2**16 - 1, 2**29 - 1  # of a grid's other axes, and of four columns that int32 can address
_MOST_CLAIMS = 128
_TILES = ((128, 16, 4), (64, 16, 4), (256, 8, 4), (512, 4, 4), (128, 16, 8), (1024, 4, 8))  # cells, classes, warps


# ------------------------------------------------------------------------------------------------------- what must hold
def check_runs(tensor: Tensor, name: str, *, where: str) -> None:
    """Refuse tensors that kernels cannot run on.

    Parameters
    ----------
    tensor : Tensor (...)
    name : str
        Of the argument.
    where : str
        Operation named in the error.

    Raises
    ------
    InputError
        If it is of float64, or on a CPU and kernels are not interpreted.

    Examples
    --------
    >>> check_runs(torch.zeros(1).double(), "raw", where="here")
    Traceback (most recent call last):
    detoracle.reference.errors.InputError: here: raw: expected float32, bfloat16 or float16, got torch.float64.
    """
    if tensor.dtype not in _DTYPES:
        raise InputError(name, expected="float32, bfloat16 or float16", got=str(tensor.dtype), where=where)
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        fix = "Set TRITON_INTERPRET=1 before anything imports triton, or use another implementation."
        raise InputError(name, expected="to be on a GPU", got=str(tensor.device), where=where, fix=fix)


def check_size(tensor: Tensor, name: str, *, images: int, rows: int, where: str) -> None:
    """Refuse batches whose programs or numbers cannot be counted.

    Parameters
    ----------
    tensor : Tensor (...)
        Shown in the error.
    name : str
        Of the argument.
    images, rows : int
        Images of the batch, and rows of four numbers that kernels address together.
    where : str
        Operation named in the error.

    Raises
    ------
    InputError
        If there are more of either than a launch can have.

    Examples
    --------
    >>> check_size(torch.zeros(1, 4), "priors", images=2**16, rows=1, where="here")
    Traceback (most recent call last):
    detoracle.reference.errors.InputError: here: priors: expected at most 65535 images, and 536870911 rows in all, got \
    65536 images, (1, 4).
    """
    if images > _MOST_IMAGES or rows > _MOST_ROWS:
        most = f"at most {_MOST_IMAGES} images, and {_MOST_ROWS} rows in all"
        raise InputError(name, expected=most, got=f"{images} images, {tuple(tensor.shape)}", where=where)


def lanes_for(topk: int, *, where: str) -> int:
    """Lanes in which a program holds the best `topk` of a ground truth: the next power of two.

    Parameters
    ----------
    topk : int
    where : str
        Operation named in the error.

    Returns
    -------
    int

    Raises
    ------
    InputError
        If there are more than a program holds.

    Examples
    --------
    >>> lanes_for(13, where="here")
    16
    """
    if not 0 <= topk <= _MOST_CLAIMS:
        raise InputError("topk", expected=f"0 to {_MOST_CLAIMS}", got=str(topk), where=where)
    return int(triton.next_power_of_2(max(topk, 1)))


# ----------------------------------------------------------------------------------------------------- where things lie
def starts_of(lengths: Iterable[int]) -> tuple[int, ...]:
    """First anchor of each level, and the number of all, of levels that follow one another.

    Parameters
    ----------
    lengths : iterable of int
        Anchors of each level.

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> starts_of([64, 16, 4])
    (0, 64, 80, 84)
    """
    return tuple(accumulate(lengths, initial=0))


def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """List the marked columns of each row, in order, without asking the device how many there are.

    Parameters
    ----------
    mask : Tensor (B, A) bool

    Returns
    -------
    columns : Tensor (B, A) int32
    numbers : Tensor (B,) int64
        How many columns of each row count.

    Examples
    --------
    >>> columns, numbers = listed(torch.tensor([[False, True, True]]))
    >>> columns[0, : numbers[0]].tolist()
    [1, 2]
    """
    place = mask.cumsum(1)
    columns = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32).expand_as(mask)
    found = columns.new_empty(len(mask), mask.shape[1] + 1)
    found.scatter_(1, torch.where(mask, place - 1, mask.shape[1]), columns)  # the others go to the last place
    return found[:, :-1].contiguous(), place[:, -1].contiguous()


# ---------------------------------------------------------------------------------------------------------------- tiles
def tuned(*by: str) -> Callable[[Any], Any]:
    """Decorate a kernel whose tile, `CELLS` by `CLASSES`, is to be the one that is fastest on the GPU at hand.

    The first call of a size times them all, which a CUDA graph cannot hold; Triton remembers the answer on disk. Only
    for a kernel that writes each number by itself, from arguments that it does not write to: of one that adds numbers
    up, the result would depend on what was timed.

    Parameters
    ----------
    *by : str
        Arguments of the kernel on which the choice depends beside the dtypes; one of them is to be a `size_class`.

    Returns
    -------
    callable
        Makes a kernel of a kernel. Interpreted, it has one tile.

    Examples
    --------
    >>> @tuned("size")
    ... @triton.jit
    ... def kernel(out, size, CELLS, CLASSES):
    ...     pass
    >>> kernel.configs[0].kwargs
    {'CELLS': 128, 'CLASSES': 16}
    """
    tried = _TILES[:1] if triton.knobs.runtime.interpret else _TILES
    configs = [triton.Config({"CELLS": cells, "CLASSES": classes}, num_warps=warps) for cells, classes, warps in tried]
    decorate: Callable[[Any], Any] = triton.autotune(configs=configs, key=list(by), cache_results=True)
    return decorate


def tiles(cells: int, *others: int) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """Grid of a tuned kernel: as many programs as it takes tiles to cover the cells, along the other axes as given.

    Parameters
    ----------
    cells : int
    *others : int

    Returns
    -------
    callable
        Of the chosen tile.

    Examples
    --------
    >>> tiles(300, 2)({"CELLS": 128})
    (3, 2)
    """
    return lambda tile: (int(triton.cdiv(cells, tile["CELLS"])), *others)


def size_class(*maps: Tensor) -> int:
    """Numbers in all maps, rounded up to a power of two: what a tile is chosen by.

    Parameters
    ----------
    *maps : Tensor (...)

    Returns
    -------
    int

    Examples
    --------
    >>> size_class(torch.zeros(5, 5), torch.zeros(3))
    32
    """
    return int(triton.next_power_of_2(max(sum(level.numel() for level in maps), 1)))
