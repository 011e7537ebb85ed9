"""The IoU family: one formula a system, since they answer differently for degenerate boxes.

Systems share a formula here only where they truly agree. ``xyxy`` is left, top, right, bottom; ``cxcywh`` is centre and
size. Everything is in pixels unless a caller says otherwise; IoUs have no unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detoracle.reference.contract import operation
from detoracle.reference.errors import InputError
from detoracle.reference.rounding import known_range

__all__ = ["cxcywh_to_xyxy", "iou_loss_yolox", "iou_ultralytics", "iou_yolox", "overlaps_mmdet", "xyxy_to_cxcywh"]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn centre and size into corners.

    Parameters
    ----------
    boxes : Tensor (..., 4) float
        cx, cy, w, h in any unit.

    Returns
    -------
    corners : Tensor (..., 4) float
        Left, top, right, bottom in the same unit.

    Examples
    --------
    >>> cxcywh_to_xyxy(torch.tensor([5.0, 5.0, 4.0, 2.0])).tolist()
    [3.0, 4.0, 7.0, 6.0]
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn corners into centre and size.

    Parameters
    ----------
    boxes : Tensor (..., 4) float
        Left, top, right, bottom in any unit.

    Returns
    -------
    boxes : Tensor (..., 4) float
        cx, cy, w, h in the same unit.

    Examples
    --------
    >>> xyxy_to_cxcywh(torch.tensor([3.0, 4.0, 7.0, 6.0])).tolist()
    [5.0, 5.0, 4.0, 2.0]
    """
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


@operation("boxes.iou_yolox", kind="values", source="Megvii-BaseDetection/YOLOX, pairwise IoU")
def iou_yolox(boxes_a: Tensor, boxes_b: Tensor, *, form: str = "cxcywh") -> Tensor:
    """Pairwise IoU as YOLOX computes it: no epsilon, and no overlap unless the boxes overlap strictly on both axes.

    Two boxes of area zero give 0/0 = NaN; a negative width with a negative height has a positive area.

    Parameters
    ----------
    boxes_a : Tensor (G, 4) float
        Boxes in pixels.
    boxes_b : Tensor (N, 4) float
        Boxes in pixels.
    form : {"cxcywh", "xyxy"}
        Meaning of the four coordinates, of both sets.

    Returns
    -------
    iou : Tensor (G, N) float

    Examples
    --------
    >>> iou_yolox(torch.tensor([[1.0, 1, 2, 2]]), torch.tensor([[2.0, 1, 2, 2], [9.0, 9, 2, 2]])).tolist()
    [[0.3333333432674408, 0.0]]
    """
    if form == "cxcywh":
        corners_a, corners_b = cxcywh_to_xyxy(boxes_a), cxcywh_to_xyxy(boxes_b)
        size_a, size_b = boxes_a[:, 2:], boxes_b[:, 2:]
    else:
        corners_a, corners_b = boxes_a, boxes_b
        size_a, size_b = boxes_a[:, 2:] - boxes_a[:, :2], boxes_b[:, 2:] - boxes_b[:, :2]
    intersection = _strict_intersection(corners_a[:, None], corners_b[None])
    area_a, area_b = torch.prod(size_a, 1), torch.prod(size_b, 1)
    return intersection / (area_a[:, None] + area_b[None] - intersection)


@operation(
    "boxes.iou_loss_yolox", kind="values", gradients=("predicted",), source="Megvii-BaseDetection/YOLOX, IOUloss"
)
def iou_loss_yolox(predicted: Tensor, target: Tensor, *, variant: str = "iou") -> Tensor:
    """YOLOX box loss of matched pairs: 1 - IoU squared, or a generalised IoU.

    Parameters
    ----------
    predicted : Tensor (N, 4) float
        cx, cy, w, h in pixels.
    target : Tensor (N, 4) float
        cx, cy, w, h in pixels.
    variant : {"iou", "giou_tutorial", "giou"}
        ``giou_tutorial`` (and official 0.1) penalises by enclosure minus *intersection*, a published bug that makes
        two shifted boxes cost twice as much; ``giou`` (official 0.2 on) by enclosure minus union.

    Returns
    -------
    loss : Tensor (N,) float
        One loss a pair, unreduced.

    Examples
    --------
    >>> pair = torch.tensor([[1.0, 1, 2, 2]]), torch.tensor([[2.0, 1, 2, 2]])
    >>> [round(float(iou_loss_yolox(*pair, variant=v)), 4) for v in ("giou_tutorial", "giou")]
    [1.3333, 0.6667]
    >>> round(float(iou_loss_yolox(torch.tensor([[150.0, 150, 200, 120]]), torch.tensor([[300.0, 170, 300, 400]]))), 4)
    0.9917
    """
    corners_p, corners_t = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target)
    intersection = _strict_intersection(corners_p, corners_t)
    union = torch.prod(predicted[:, 2:], 1) + torch.prod(target[:, 2:], 1) - intersection
    iou = intersection / (union + 1e-16)
    if variant == "iou":
        return 1 - iou**2
    enclosure = torch.prod(
        torch.maximum(corners_p[:, 2:], corners_t[:, 2:]) - torch.minimum(corners_p[:, :2], corners_t[:, :2]), 1
    )
    covered = intersection if variant == "giou_tutorial" else union
    giou = iou - (enclosure - covered) / torch.clamp(enclosure, min=1e-16)
    return 1 - torch.clamp(giou, min=-1.0, max=1.0)


def _strict_intersection(corners_a: Tensor, corners_b: Tensor) -> Tensor:
    """Area of overlap of xyxy boxes, broadcast; 0 unless left-top is strictly before right-bottom on both axes."""
    left_top = torch.maximum(corners_a[..., :2], corners_b[..., :2])
    right_bottom = torch.minimum(corners_a[..., 2:], corners_b[..., 2:])
    overlap = (left_top < right_bottom).all(-1)
    return torch.prod(right_bottom - left_top, -1) * overlap.to(right_bottom.dtype)


@operation(
    "boxes.iou_ultralytics",
    kind="values",
    gradients=("boxes_a", "boxes_b"),
    source="ultralytics 8.2.0 (AGPL-3.0), box IoU",
)
def iou_ultralytics(
    boxes_a: Tensor, boxes_b: Tensor, *, form: str = "xyxy", mode: str = "iou", eps: float = 1e-7
) -> Tensor:
    """IoU, GIoU, DIoU or CIoU as ultralytics computes them: epsilon in denominators, and in the heights of xyxy boxes.

    Boxes broadcast on all but the last dimension, and the result keeps a last dimension of 1: a caller who drops it on
    one side only turns N pairs into (N, N). The CIoU's weight *alpha* is a constant for the gradient. With ``cxcywh``,
    identical boxes can give NaN, when rounding lifts their IoU above 1, and boxes of size zero do.

    Parameters
    ----------
    boxes_a : Tensor (..., 4) float
        Boxes in any unit.
    boxes_b : Tensor (..., 4) float
        Boxes in the same unit.
    form : {"xyxy", "cxcywh"}
        Meaning of the four coordinates, of both sets. Only xyxy heights (not widths) are enlarged by `eps`.
    mode : {"iou", "giou", "diou", "ciou"}
        Penalty: none; empty part of the enclosing box; distance of centres; that and difference of aspect ratios.
    eps : float
        Keeps denominators from zero; decides degenerate boxes.

    Returns
    -------
    iou : Tensor (..., 1) float

    Raises
    ------
    InputError
        If the leading dimensions do not broadcast.

    Examples
    --------
    >>> a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    >>> [round(float(iou_ultralytics(a, b, mode=m)), 4) for m in ("iou", "giou", "diou", "ciou")]
    [0.3333, 0.3333, 0.2564, 0.2564]
    >>> iou_ultralytics(torch.zeros(5, 4), torch.zeros(1, 4)).shape
    torch.Size([5, 1])
    """
    leading_a, leading_b = tuple(boxes_a.shape[:-1]), tuple(boxes_b.shape[:-1])
    if any(a != b and 1 not in (a, b) for a, b in zip(leading_a[::-1], leading_b[::-1], strict=False)):
        expected = f"leading dimensions that broadcast with {leading_a}"
        raise InputError("boxes_b", expected=expected, got=str(leading_b), where="boxes.iou_ultralytics")
    left_top_a, right_bottom_a, width_a, height_a = _ultralytics_sides(boxes_a, form, eps)
    left_top_b, right_bottom_b, width_b, height_b = _ultralytics_sides(boxes_b, form, eps)
    sides = torch.minimum(right_bottom_a, right_bottom_b) - torch.maximum(left_top_a, left_top_b)
    intersection = _product_of_sides(torch.clamp(sides, min=0))
    union = width_a * height_a + width_b * height_b - intersection + eps
    iou = intersection / union
    if mode == "iou":
        return iou
    enclosure = torch.maximum(right_bottom_a, right_bottom_b) - torch.minimum(left_top_a, left_top_b)
    if mode == "giou":
        area = _product_of_sides(enclosure) + eps
        return iou - (area - union) / area
    diagonal = (enclosure**2).sum(-1, keepdim=True) + eps
    offset = left_top_b + right_bottom_b - left_top_a - right_bottom_a  # twice that of the centres
    distance = (offset**2).sum(-1, keepdim=True) / 4 / diagonal
    if mode == "diou":
        return iou - distance
    shape = 4 / math.pi**2 * (torch.atan(width_b / height_b) - torch.atan(width_a / height_a)) ** 2
    constant_shape, constant_iou = shape.detach(), iou.detach()
    alpha = constant_shape / (constant_shape - constant_iou + (1 + eps))
    if form == "xyxy":
        alpha = known_range(alpha, 0.0, 1.0)  # no intersection exceeds the union here
    return iou - (distance + shape * alpha)


def _ultralytics_sides(boxes: Tensor, form: str, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left-top and right-bottom corners (..., 2), widths and heights (..., 1)."""
    corners = cxcywh_to_xyxy(boxes) if form == "cxcywh" else boxes
    left_top, right_bottom = corners[..., :2], corners[..., 2:]
    if form == "cxcywh":
        return left_top, right_bottom, boxes[..., 2:3], boxes[..., 3:]
    size = right_bottom - left_top
    return left_top, right_bottom, size[..., :1], size[..., 1:] + eps


def _product_of_sides(sides: Tensor) -> Tensor:
    """(..., 2) to (..., 1)."""
    return sides[..., :1] * sides[..., 1:]


@operation(
    "boxes.overlaps_mmdet",
    kind="values",
    gradients=("boxes_a", "boxes_b"),
    source="mmdetection 2.28 and 3.x, box overlaps",
)
def overlaps_mmdet(
    boxes_a: Tensor, boxes_b: Tensor, *, mode: str = "iou", aligned: bool = False, eps: float = 1e-6
) -> Tensor:
    """IoU, intersection over foreground, or GIoU as mmdetection computes them: denominators are at least `eps`.

    Boxes without area overlap nothing (0, never NaN); inverted boxes have areas with the sign of their sides' product.
    In half precision everything is computed in half, `eps` included.

    Parameters
    ----------
    boxes_a : Tensor (..., G, 4) float
        xyxy in pixels.
    boxes_b : Tensor (..., N, 4) float
        xyxy in pixels; the same leading dimensions, and with `aligned` the same number of boxes.
    mode : {"iou", "iof", "giou"}
        Denominator of the intersection: the union, or for ``iof`` the area of the *first* box. ``giou`` subtracts from
        the IoU the share of the enclosing box that neither covers.
    aligned : bool
        Row by row instead of every pair.
    eps : float
        Smallest denominator in square pixels.

    Returns
    -------
    overlap : Tensor (...) float
        Every pair (..., G, N), or row by row (..., G).

    Raises
    ------
    InputError
        If leading dimensions differ, or aligned boxes are not equally many.

    Examples
    --------
    >>> a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [8.0, 0, 10, 2]])
    >>> overlaps_mmdet(a, b, mode="iof").tolist()
    [[0.5, 0.0]]
    >>> [round(v, 4) for v in overlaps_mmdet(a, b, mode="giou").tolist()[0]]
    [0.3333, -0.6]
    >>> overlaps_mmdet(torch.zeros(0, 4), b).shape, overlaps_mmdet(b, b, aligned=True).shape
    (torch.Size([0, 2]), torch.Size([2]))
    """
    alike = slice(None, -1 if aligned else -2)
    if boxes_a.shape[alike] != boxes_b.shape[alike]:
        expected = f"{'as many boxes' if aligned else 'leading dimensions'} as boxes_a, {tuple(boxes_a.shape[alike])}"
        raise InputError(
            "boxes_b", expected=expected, got=str(tuple(boxes_b.shape[alike])), where="boxes.overlaps_mmdet"
        )
    return _overlaps_mmdet(boxes_a, boxes_b, mode, aligned, eps)


def _overlaps_mmdet(boxes_a: Tensor, boxes_b: Tensor, mode: str, aligned: bool, eps: float) -> Tensor:
    first, second = (boxes_a, boxes_b) if aligned else (boxes_a[..., :, None, :], boxes_b[..., None, :, :])
    intersection, area, union = _shared_areas(first, second)
    least = area.new_tensor(eps)
    if mode == "iof":
        return intersection / torch.maximum(area, least)
    union = torch.maximum(union, least)
    iou = intersection / union
    if mode == "iou":
        return iou
    left_top = torch.minimum(first[..., :2], second[..., :2])
    right_bottom = torch.maximum(first[..., 2:], second[..., 2:])
    enclosure = torch.maximum(_area(torch.clamp(right_bottom - left_top, min=0)), least)
    return iou - (enclosure - union) / enclosure


def _shared_areas(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, area of the first and union of xyxy boxes, broadcast."""
    left_top = torch.maximum(first[..., :2], second[..., :2])
    right_bottom = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = _area(torch.clamp(right_bottom - left_top, min=0))
    area = _area(first[..., 2:] - first[..., :2])
    return intersection, area, area + _area(second[..., 2:] - second[..., :2]) - intersection


def _area(sides: Tensor) -> Tensor:
    """(..., 2) to (...)."""
    return sides[..., 0] * sides[..., 1]
