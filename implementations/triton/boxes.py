"""What kernels share of boxes (left, top, right, bottom): IoU, GIoU and CIoU, the latter two with derivatives.

The rules are those of `detoracle.implementations.batched`: where two ends are equal, each has half of a derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import atan, larger, smaller

__all__ = ["area", "ciou", "ciou_slopes", "giou_slopes", "overlap_mmdet", "shared_area", "side"]

_EPS = tl.constexpr(1e-7)  # of the CIoU
_SHAPE = tl.constexpr(0.4052847345693511)  # 4 / pi ** 2


@triton.jit
def shared_area(a, b):
    """Area that boxes (left, top, right, bottom) share."""
    across = larger(smaller(a[2], b[2]) - larger(a[0], b[0]), 0.0)
    return across * larger(smaller(a[3], b[3]) - larger(a[1], b[1]), 0.0)


@triton.jit
def area(box):
    """Area of a box (left, top, right, bottom), of the sign that its sides give."""
    return (box[2] - box[0]) * (box[3] - box[1])


@triton.jit
def overlap_mmdet(a, b, least):
    """IoU of boxes (left, top, right, bottom), of a union no smaller than the least."""
    shared = shared_area(a, b)
    return tl.div_rn(shared, larger(area(a) + area(b) - shared, least))


# --------------------------------------------------------------------------------------------------------------- sides
@triton.jit
def side(low, high, gt_low, gt_high):
    """Length that two sides share, and its derivatives by the ends of the first; who are equal share the derivative."""
    length = tl.minimum(high, gt_high) - tl.maximum(low, gt_low)
    by_high = tl.where(high == gt_high, 0.5, (high < gt_high).to(tl.float32))
    by_low = tl.where(low == gt_low, -0.5, -((low > gt_low).to(tl.float32)))
    return length, by_low, by_high


@triton.jit
def _by_ends(low, high, other_low, other_high):
    """Length shared, not below 0, and derivatives by the ends of the first: of that, and of the length enclosed."""
    length, by_low, by_high = side(low, high, other_low, other_high)
    grows = (length >= 0.0).to(tl.float32)
    # An end that does not bound what both share bounds what encloses both.
    return larger(length, 0.0), (by_low * grows, by_high * grows), (-1.0 - by_low, 1.0 - by_high)


# ---------------------------------------------------------------------------------------------------------------- GIoU
@triton.jit
def _no_less(x, least):
    """The larger of both, and its derivative by the first, of which a tie leaves half."""
    return larger(x, least), tl.where(x == least, 0.5, (x > least).to(tl.float32))


@triton.jit
def giou_slopes(a, b, eps):
    """GIoU of boxes, of areas no smaller than eps, and its derivatives by the sides of the first."""
    across, share_x, enclose_x = _by_ends(a[0], a[2], b[0], b[2])
    down, share_y, enclose_y = _by_ends(a[1], a[3], b[1], b[3])
    shared = across * down
    union, of_union = _no_less(area(a) + area(b) - shared, eps)
    width, height = larger(a[2], b[2]) - smaller(a[0], b[0]), larger(a[3], b[3]) - smaller(a[1], b[1])
    wide, high = (width >= 0.0).to(tl.float32), (height >= 0.0).to(tl.float32)
    width, height = larger(width, 0.0), larger(height, 0.0)
    enclosure, of_enclosure = _no_less(width * height, eps)
    iou, filled = tl.div_rn(shared, union), tl.div_rn(union, enclosure)
    giou = iou - tl.div_rn(enclosure - union, enclosure)

    by_union = (tl.div_rn(1.0, enclosure) - tl.div_rn(iou, union)) * of_union
    by_shared = tl.div_rn(1.0, union) - by_union
    by_enclosure = -tl.div_rn(filled, enclosure) * of_enclosure
    by_across, by_down = by_shared * down, by_shared * across
    by_width, by_height = by_enclosure * height * wide, by_enclosure * width * high
    to_left = by_across * share_x[0] - by_union * (a[3] - a[1]) + by_width * enclose_x[0]
    to_right = by_across * share_x[1] + by_union * (a[3] - a[1]) + by_width * enclose_x[1]
    to_top = by_down * share_y[0] - by_union * (a[2] - a[0]) + by_height * enclose_y[0]
    to_bottom = by_down * share_y[1] + by_union * (a[2] - a[0]) + by_height * enclose_y[1]
    return giou, (to_left, to_top, to_right, to_bottom)


# ---------------------------------------------------------------------------------------------------------------- CIoU
@triton.jit
def _sizes(box):
    return box[2] - box[0], box[3] - box[1] + _EPS


@triton.jit
def _ciou_parts(a, b):
    """IoU and union; squares of the distance of centres and of the enclosing box's diagonal; difference of angles."""
    (width_a, height_a), (width_b, height_b) = _sizes(a), _sizes(b)
    shared = shared_area(a, b)
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
    iou, _, squares, difference = _ciou_parts(a, b)
    shape, weight = _weight_of_shape(iou, difference)
    return iou - (tl.div_rn(squares[0], squares[1]) + shape * weight)


@triton.jit
def ciou_slopes(a, b):
    """CIoU of boxes, and its derivatives by the sides of the first."""
    iou, union, squares, difference = _ciou_parts(a, b)
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
