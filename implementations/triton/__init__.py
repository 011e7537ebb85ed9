"""The systems in Triton kernels: nothing per pair in memory, and the host never waits.

Needs the package `triton` (``pip install detoracle[triton]``) and a GPU. With ``TRITON_INTERPRET=1`` in the environment
before `triton` is first imported, the kernels run on tensors of the CPU, slowly: that is how they are tested without a
GPU. An implementation is then named by its target, such as ``detoracle.implementations.triton.yolox:assign``;
`detoracle.implementations.registry.discover` lists the kind for a GPU alone.

Same input, same bits: what adds numbers up (matching, claims, sums of a loss, sums within a row of logits) has blocks
of fixed sizes, for the order of adding must not depend on a timing. Only the gradients of YOLOX, RTMDet and the anchor
head, in which every number stands by itself, run in tiles that the first call of a size chooses by timing them; Triton
remembers them on disk. A CUDA graph can hold a call of a size that has been called before.
"""

from __future__ import annotations

import importlib.util

__all__ = ["unavailable"]


def unavailable(device: str) -> str:
    """Why this kind cannot run on a device; empty if it can.

    Parameters
    ----------
    device : str
        Such as ``cuda``.

    Returns
    -------
    str

    Examples
    --------
    >>> unavailable("cpu")
    'needs a GPU'
    """
    if not device.startswith("cuda"):
        return "needs a GPU"
    return "" if importlib.util.find_spec("triton") else "needs the package triton: pip install detoracle[triton]"
