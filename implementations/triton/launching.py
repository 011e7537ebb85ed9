"""What must hold before a kernel is launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from detoracle.reference.errors import InputError

__all__ = ["check_runs", "check_size"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_IMAGES, _MOST_ROWS = 2**16 - 1, 2**29 - 1  # of a grid's other axes, and of four columns that int32 can address


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
