"""Losses of a great many logits towards 0, and their gradient, by one compiled loop: the passes of `sparse`, in C++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from detoracle.implementations.compiled.kernels import Kind, compiled_kernel, formula_of

__all__ = ["background_loss", "focal_background_loss"]


def focal_background_loss(
    logits: Tensor, weight: Tensor, *, gamma: float = 2.0, gradient: Tensor | None = None
) -> Tensor:
    """Weighted sum of p**gamma * softplus over all logits; where there is room, its gradient is written.

    Parameters
    ----------
    logits : Tensor (K, C, N) float
        Of any dtype; the gradient is computed in the weights'.
    weight : Tensor (K, N) float
        Of all classes of a row. In float32 at least.
    gamma : float
    gradient : Tensor (K, C, N) float, optional
        To be filled. Of the weights' dtype.

    Returns
    -------
    loss : Tensor () float

    Examples
    --------
    >>> room = torch.empty(1, 1, 2)
    >>> logits, weight = torch.tensor([[[0.0, 100.0]]]), torch.tensor([[1.0, 2.0]])
    >>> round(float(focal_background_loss(logits, weight, gradient=room)), 4)
    200.1733
    >>> [round(slope, 4) for slope in room.flatten().tolist()]
    [0.2983, 2.0]
    """
    return _run(logits, weight, gradient, gamma=gamma)


def background_loss(logits: Tensor, *, scale: float = 1.0, gradient: Tensor | None = None) -> Tensor:
    """Sum of softplus over all logits; where there is room, `scale` times its gradient is written.

    Parameters
    ----------
    logits : Tensor (C, N) float
        Of any dtype; the gradient is in float32 at least.
    scale : float
    gradient : Tensor (C, N) float, optional
        To be filled.

    Returns
    -------
    loss : Tensor () float

    Examples
    --------
    >>> room = torch.empty(1, 2)
    >>> round(float(background_loss(torch.tensor([[0.0, 100.0]]), scale=2.0, gradient=room)), 4), room.tolist()
    (100.6931, [[1.0, 2.0]])
    """
    ones = logits.new_ones(1, logits.shape[1], dtype=torch.promote_types(logits.dtype, torch.float32))
    return _run(logits[None], ones, None if gradient is None else gradient[None], scale=scale)


@torch.no_grad()
def _run(logits: Tensor, weight: Tensor, gradient: Tensor | None, *, gamma: float = 0.0, scale: float = 1.0) -> Tensor:
    """Call a kernel on maps of any size; a side of 1, which would need a kernel of its own, is made longer."""
    if not logits.numel():
        return weight.new_zeros(())
    logits, room = logits.detach().contiguous(), gradient
    classes = logits.shape[1]
    if len(logits) == 1 and classes > 2 and classes % 2 == 0:
        halves = 2, classes // 2, logits.shape[2]
        logits, weight, room = logits.view(halves), weight.expand(2, -1), None if room is None else room.view(halves)
    rows, classes, columns = logits.shape
    if 1 in logits.shape:
        more = [0, int(columns == 1), 0, int(classes == 1), 0, int(rows == 1)]
        logits, weight = F.pad(logits, more, value=-torch.inf), F.pad(weight, more[:2] + more[4:])
        room = None if room is None else torch.empty_like(logits, dtype=room.dtype)
    watched = _get_current_dispatch_mode() is not None
    loss: Tensor = _background(logits, weight.contiguous(), gamma, scale, room, watched)
    if gradient is not None and room is not None and room.numel() != gradient.numel():
        gradient.copy_(room[:rows, :classes, :columns].reshape(gradient.shape))
    return loss.to(weight.dtype)


# An operator of its own to PyTorch, so that who watches the dispatcher, as `detoracle.reports.counters` does, sees one
# pass and not the formula's parts. The compiler gives up for good a function that it meets while there is a watcher.
@torch.library.custom_op("detoracle::background", mutates_args=("gradient",))
def _background(
    logits: Tensor, weight: Tensor, gamma: float, scale: float, gradient: Tensor | None, watched: bool
) -> Tensor:
    kind: Kind = "entropy" if gamma == 0 else "focal" if gamma == 2 else "power"
    if watched:
        kernel = formula_of(kind)
    else:
        kernel = compiled_kernel(kind, logits.dtype, torch.get_num_threads(), writes=gradient is not None)
    return kernel(logits, weight, weight.new_tensor(gamma), weight.new_tensor(scale), gradient)
