"""What YOLOv8's kernels know of boxes: the CIoU with its derivatives, and distances from distributions over bins.

Boxes are tuples (left, top, right, bottom). The rules are those of `detoracle.implementations.batched.yolov8`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import larger, smaller
from detoracle.implementations.triton.yolox_loss_kernels import _side

__all__ = ["ciou", "ciou_slopes", "distribution", "inside"]

_EPS = tl.constexpr(1e-7)
_MARGIN = tl.constexpr(1e-9)  # a point inside a box is farther than this from every side
_SHAPE = tl.constexpr(0.4052847345693511)  # 4 / pi ** 2


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


@triton.jit
def inside(x, y, box):
    """Whether points lie strictly in a box."""
    across = (x - box[0] > _MARGIN) & (box[2] - x > _MARGIN)
    return across & (y - box[1] > _MARGIN) & (box[3] - y > _MARGIN)


@triton.jit
def _sizes(box):
    return box[2] - box[0], box[3] - box[1] + _EPS


@triton.jit
def _parts(a, b):
    """IoU and union; squares of the distance of centres and of the enclosing box's diagonal; difference of angles."""
    (width_a, height_a), (width_b, height_b) = _sizes(a), _sizes(b)
    across = larger(smaller(a[2], b[2]) - larger(a[0], b[0]), 0.0)
    shared = across * larger(smaller(a[3], b[3]) - larger(a[1], b[1]), 0.0)
    union = width_a * height_a + width_b * height_b - shared + _EPS
    width, height = larger(a[2], b[2]) - smaller(a[0], b[0]), larger(a[3], b[3]) - smaller(a[1], b[1])
    off_x, off_y = b[0] + b[2] - a[0] - a[2], b[1] + b[3] - a[1] - a[3]
    squares = (off_x * off_x + off_y * off_y) / 4, width * width + height * height + _EPS
    difference = atan(tl.div_rn(width_b, height_b)) - atan(tl.div_rn(width_a, height_a))
    return tl.div_rn(shared, union), union, squares, difference


@triton.jit
def _weight_of_shape(iou, difference):
    """Shape term, and its weight, which is a constant for the gradient."""
    shape = _SHAPE * difference * difference
    return shape, tl.div_rn(shape, shape - iou + (1.0 + _EPS))


@triton.jit
def ciou(a, b):
    """CIoU of boxes."""
    iou, _, squares, difference = _parts(a, b)
    shape, weight = _weight_of_shape(iou, difference)
    return iou - (tl.div_rn(squares[0], squares[1]) + shape * weight)


@triton.jit
def _by_ends(low, high, other_low, other_high):
    """Length shared, not below 0, and derivatives by the ends of the first: of that, and of the length enclosed."""
    length, by_low, by_high = _side(low, high, other_low, other_high)
    grows = (length >= 0.0).to(tl.float32)
    # An end that does not bound what both share bounds what encloses both.
    return larger(length, 0.0), (by_low * grows, by_high * grows), (-1.0 - by_low, 1.0 - by_high)


@triton.jit
def ciou_slopes(a, b):
    """CIoU of boxes, and its derivatives by the sides of the first."""
    iou, union, squares, difference = _parts(a, b)
    shape, weight = _weight_of_shape(iou, difference)
    distance = tl.div_rn(squares[0], squares[1])
    across, share_x, enclose_x = _by_ends(a[0], a[2], b[0], b[2])
    down, share_y, enclose_y = _by_ends(a[1], a[3], b[1], b[3])
    width, height = _sizes(a)

    by_shared, by_area = tl.div_rn(1.0 + iou, union), -tl.div_rn(iou, union)
    by_diagonal = 2.0 * tl.div_rn(distance, squares[1])
    by_wide = by_diagonal * (larger(a[2], b[2]) - smaller(a[0], b[0]))
    by_high = by_diagonal * (larger(a[3], b[3]) - smaller(a[1], b[1]))
    by_offset = tl.div_rn(0.5, squares[1])
    to_x, to_y = by_offset * (b[0] + b[2] - a[0] - a[2]), by_offset * (b[1] + b[3] - a[1] - a[3])
    by_angle = tl.div_rn(2.0 * _SHAPE * difference * weight, width * width + height * height)
    to_width, to_height = by_area * height + by_angle * height, by_area * width - by_angle * width
    left = by_shared * down * share_x[0] + by_wide * enclose_x[0] + to_x - to_width
    right = by_shared * down * share_x[1] + by_wide * enclose_x[1] + to_x + to_width
    top = by_shared * across * share_y[0] + by_high * enclose_y[0] + to_y - to_height
    bottom = by_shared * across * share_y[1] + by_high * enclose_y[1] + to_y + to_height
    return iou - (distance + shape * weight), (left, top, right, bottom)


@triton.jit
def distribution(at, step, there, reg_max, BINS: tl.constexpr):  # noqa: N803
    """Distances of which bins of logits are the distribution; and logits, probabilities and log of their sum's scale.

    The bins of a row lie `step` apart. Where there is but one, it is the distance.
    """
    bins = tl.arange(0, BINS)
    read = there[:, None] & (bins < reg_max)[None, :]
    logits = tl.load(at[:, None] + bins[None, :] * step, mask=read, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(read, logits, float("-inf")), 1)
    largest = tl.where(there, largest, 0.0)
    powers = tl.where(read, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.where(there, tl.sum(powers, 1), 1.0)
    probability = tl.div_rn(powers, total[:, None] + tl.zeros_like(powers))
    distance = tl.sum(logits, 1) if BINS == 1 else tl.sum(probability * bins[None, :].to(tl.float32), 1)
    return distance, logits, probability, largest + tl.log(total)
