"""What must hold before a kernel is launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from detoracle.reference.errors import InputError

__all__ = ["check_runs"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
