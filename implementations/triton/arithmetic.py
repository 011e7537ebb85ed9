"""What kernels share: logarithms and probabilities that are exact where they are small, and keys that order floats.

A kernel's arguments and values have no types for Python's type checker: Triton's compiler has its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bce_with_logits", "before", "binary_entropy", "key_value", "keys_of", "log1p", "sigmoid", "smallest"]

_EMPTY = tl.constexpr(0x7FFFFFFF)  # high half of a key that stands for nothing: above infinity's and NaN's
_NAN = tl.constexpr(0x7FFFFFFE)
_LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def log1p(x):
    """log(1 + x) for x of -1 to 1, to a few units in the last place also where x is tiny."""
    above = 1.0 + x
    kept = above - 1.0  # the part of x that the sum above has
    return tl.where(kept == 0.0, x, tl.log(above) * (x / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def sigmoid(x):
    """Probability of a logit; that of a very negative one does not drown in a denominator that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, small), 1.0 + small)


@triton.jit
def at_least(x, least):
    """The larger of both; NaN stays NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def binary_entropy(probability):
    """Cross entropies of a probability with 1 and with 0, each logarithm no less than -100."""
    return -at_least(tl.log(probability), -100.0), -at_least(log1p(-probability), -100.0)


@triton.jit
def bce_with_logits(logit, target):
    """Cross entropy of a logit with a target, and its derivative by the logit."""
    loss = at_least(logit, 0.0) - logit * target + log1p(tl.exp(-tl.abs(logit)))
    return loss, sigmoid(logit) - target


@triton.jit
def keys_of(values, index, there):
    """Integers that order as float32 values do, then by index (int32); NaN is the largest, what is not there last."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0 is no smaller than 0
    order = tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)
    return tl.where(there, (order.to(tl.int64) << 32) | index.to(tl.int64), _LAST)


@triton.jit
def key_value(keys):
    """Values behind keys, where there are any, and their index."""
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), (keys & _LOW).to(tl.int32)


@triton.jit
def nothing(lanes: tl.constexpr):
    """Keys that stand for nothing, no two alike."""
    return (tl.full([lanes], _EMPTY, tl.int64) << 32) | tl.arange(0, lanes).to(tl.int64)


@triton.jit
def smallest(best, keys):
    """Of the best keys so far and of more keys, all different, the smallest; as many as there were, in any order."""
    least, worst = tl.min(keys, 0), tl.max(best, 0)
    while least < worst:
        best = tl.where(best == worst, least, best)
        keys = tl.where(keys == least, _LAST, keys)
        least, worst = tl.min(keys, 0), tl.max(best, 0)
    return best


@triton.jit
def before(best, most):
    """Which of the best keys are among the `most` smallest, and stand for something."""
    rank = tl.sum((best[:, None] > best[None, :]).to(tl.int32), 1)
    return (rank < most) & ((best >> 32) != _EMPTY)
