"""The loop over logits that `torch.compile` turns into C++, and when it does.

An entry costs ``p**gamma * softplus(x)``, where p is the sigmoid of x: cross entropy if gamma is 0, focal and quality
focal loss otherwise. One exponential e = exp(-abs(x)) serves both factors, and log(1 + e) is twice the inverse
hyperbolic tangent of e / (2 + e), which is at most 1/3: in float32 six terms after the first suffice. Sums are in
float64, which is as fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Kernel", "Kind", "compiled_kernel", "formula_of"]

Kind = Literal["entropy", "focal", "power"]
"""Gamma: 0, 2, or what is given."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

# A usual size, for which loops are laid out; sides are unlike, so that none stands for another.
_EXAMPLE = (6, 80, 1600)
_MOST = 256  # kernels of all kinds, dtypes and numbers of threads; PyTorch refuses more than 8 unless told


def formula_of(kind: Kind) -> Kernel:
    """What a kernel computes, as PyTorch would by itself.

    Parameters
    ----------
    kind : {'entropy', 'focal', 'power'}

    Returns
    -------
    kernel : callable
        Takes logits (K, C, N), weights (K, N), gamma (), what the gradient is scaled by (), and room for it, (K, C, N)
        or None; all contiguous and of sides of at least 2. Returns the weighted sum () in float64.

    Examples
    --------
    >>> one = torch.ones(())
    >>> round(float(formula_of("entropy")(torch.zeros(2, 3, 4), torch.ones(2, 4), one, one, None)), 4)  # 24 times log 2
    16.6355
    """

    def formula(logits: Tensor, weight: Tensor, gamma: Tensor, scale: Tensor, gradient: Tensor | None) -> Tensor:
        probability, entropy = _factors(logits.to(weight.dtype))
        if kind == "entropy":
            entry, slope = entropy, probability
        else:
            # The product rule, where the slope of the entropy is p and that of the modulation gamma * (1 - p) times it.
            exponent = 2 if kind == "focal" else gamma
            modulation = probability**exponent
            entry = modulation * entropy
            slope = modulation * (probability + exponent * (1 - probability) * entropy)
        if gradient is not None:
            gradient.copy_(slope * (weight * scale)[:, None])
        return (entry * weight[:, None]).sum(dtype=torch.float64)

    return formula


@cache
def compiled_kernel(kind: Kind, dtype: torch.dtype, threads: int, *, writes: bool) -> Kernel:
    """Compile a kernel for maps of all sizes, by a call of an example.

    Parameters
    ----------
    kind : {'entropy', 'focal', 'power'}
    dtype : torch.dtype
        Of the logits; weights and gradient are in float32 at least.
    threads : int
        Of PyTorch, now: the kernel is for as many.
    writes : bool
        Whether there is a gradient to write.

    Returns
    -------
    kernel : callable
        As `formula_of` tells.

    Examples
    --------
    >>> kernel = compiled_kernel("entropy", torch.float32, torch.get_num_threads(), writes=False)
    >>> one = torch.ones(())
    >>> round(float(kernel(torch.zeros(2, 3, 4), torch.ones(2, 4), one, one, None)), 4)  # 24 times log 2
    16.6355
    """
    import torch._dynamo  # the compiler, which takes a second to import

    wide = torch.promote_types(dtype, torch.float32)
    logits, weight = torch.zeros(_EXAMPLE, dtype=dtype), torch.zeros(_EXAMPLE[::2], dtype=wide)
    gradient, one = torch.zeros(_EXAMPLE, dtype=wide) if writes else None, torch.ones((), dtype=wide)
    for tensor in (logits, weight, gradient):
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, tuple(range(tensor.ndim)))
    limit = torch._dynamo.config.patch(recompile_limit=_MOST)
    with torch.no_grad(), limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's compiler calls what PyTorch deprecates
        compiled: Kernel = torch.compile(formula_of(kind), dynamic=True)
        compiled(logits, weight, one, one, gradient)
    return compiled


def _factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid and softplus."""
    e = torch.exp(-x.abs())
    larger = torch.reciprocal(1 + e)
    probability = torch.where(x >= 0, larger, e * larger)
    if x.dtype == torch.float64:
        logarithm = torch.log1p(e)
    else:
        t = e / (2 + e)
        q = t * t
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13)))))
        logarithm = 2 * t * series
    return probability, x.clamp(min=0) + logarithm
