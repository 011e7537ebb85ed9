"""What kernels share: logarithms and probabilities that are exact where they are small, and keys that order floats.

A kernel's arguments and values have no types for Python's type checker: Triton's compiler has its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "at_least",
    "atan",
    "bce_with_logits",
    "before",
    "binary_entropy",
    "key_value",
    "keys_of",
    "larger",
    "log1p",
    "nothing",
    "power",
    "power_of_ten",
    "sigmoid",
    "sign",
    "smaller",
    "smallest",
]

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
def smaller(a, b):
    """The smaller of both; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """The larger of both; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """1, 0 or -1."""
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


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


# --------------------------------------------------------------------------------------------------- powers and angles
@triton.jit
def _times_two_to(x, exponent):
    """Product with 2 ** exponent, an integer as float, in two steps: the power alone may be out of range."""
    half = tl.floor(exponent * 0.5)
    return x * tl.exp2(half) * tl.exp2(exponent - half)


@triton.jit
def power_of_ten(x):
    """10 ** x to a few units in the last place, where the exponential alone would lose as many as x has."""
    whole = tl.floor(tl.minimum(tl.maximum(x * 3.321928, -200.0), 200.0) + 0.5)
    rest = (x - whole * 0.301025390625) - whole * 4.6050389811952136e-06  # log10(2), whose first part has few bits
    small = tl.exp2(rest * 3.321928)
    return tl.where(x < -60.0, 0.0, tl.where(x > 60.0, float("inf"), _times_two_to(small, whole)))


@triton.jit
def power(x, exponent):
    """The power x ** exponent to a few units in the last place, for finite x of 0 or more; NaN below."""
    scaled = tl.where(x < 1.2e-38, x * 16777216.0, x)
    bits = scaled.to(tl.int32, bitcast=True)
    whole = ((bits - 0x3F3504F3) >> 23).to(tl.float32)  # such that what is left is from sqrt(1/2) to sqrt(2)
    left = (bits - (whole.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    whole = tl.where(x < 1.2e-38, whole - 24.0, whole)
    high = tl.floor(whole * exponent + 0.5)
    found = _times_two_to(tl.exp2((whole * exponent - high) + exponent * tl.log2(left)), high)
    at_zero = tl.where(exponent > 0.0, 0.0, tl.where(exponent == 0.0, 1.0, float("inf")))
    found = tl.where(x == 0.0, at_zero, found)
    return tl.where(x >= 0.0, found, float("nan"))


@triton.jit
def atan(x):
    """Arc tangent to a few units in the last place, from a polynomial up to pi / 8."""
    size = tl.abs(x)
    steep, middling = size > 2.414213562, size > 0.4142135624
    part = tl.where(middling, (size - 1.0) / (size + 1.0), size)
    part = tl.where(steep, -1.0 / tl.where(steep, size, 1.0), part)
    square = part * part
    series = (((-0.0608342 * square + 0.10595989) * square - 0.14243847) * square + 0.19998489) * square - 0.33333316
    start = tl.where(steep, 1.5707963267948966, tl.where(middling, 0.7853981633974483, 0.0))
    found = start + (part + part * (square * series))
    return tl.where(x < 0.0, -found, found)
