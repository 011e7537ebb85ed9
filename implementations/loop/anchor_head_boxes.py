"""The anchor head's anchors and boxes, written down plainly: one cell, one image, one coordinate at a time.

Arguments, results and their meaning are those of the operations in `detoracle.reference`; arguments are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.implementations.registry import implements

__all__ = ["anchors", "decode", "encode", "inside_flags", "overlaps_mmdet", "ssd_anchors", "valid_flags"]

Strides = Sequence[int | Sequence[int]]


# ----------------------------------------------------------------------------------------------- anchors and flags
@implements("anchor_head.anchors", name="loop")
def anchors(
    sizes: Sequence[Sequence[int]],
    *,
    strides: Strides,
    ratios: Sequence[float],
    like: Tensor,
    scales: Sequence[float] | None = None,
    octave_base_scale: float | None = None,
    scales_per_octave: int | None = None,
    base_sizes: Sequence[float] | None = None,
    center_offset: float = 0.0,
    centers: Sequence[Sequence[float]] | None = None,
    scale_major: bool = True,
) -> Tensor:
    """Anchors of all levels (A, 4), one cell after the other: slow, and made only once."""
    if octave_base_scale is not None and scales_per_octave is not None:
        scales = []
        for step in range(scales_per_octave):
            scales.append(octave_base_scale * 2 ** (step / scales_per_octave))
    levels = []
    for level, size in enumerate(sizes):
        stride = _pair(strides[level])
        base = min(stride) if base_sizes is None else base_sizes[level]
        center = (center_offset * base, center_offset * base)
        if centers is not None:
            center = (centers[level][0], centers[level][1])
        shapes = _shapes(base, ratios, scales or (), scale_major)
        levels.append(_grid(shapes, center, size, stride, like))
    return torch.cat(levels)


@implements("anchor_head.ssd_anchors", name="loop")
def ssd_anchors(
    sizes: Sequence[Sequence[int]],
    *,
    strides: Strides,
    ratios: Sequence[Sequence[float]],
    min_sizes: Sequence[float],
    max_sizes: Sequence[float],
    like: Tensor,
    scale_major: bool = False,
) -> Tensor:
    """Anchors of all levels (A, 4) as SSD places them, one cell after the other."""
    levels = []
    for level, size in enumerate(sizes):
        stride = _pair(strides[level])
        center = (stride[0] / 2, stride[1] / 2)
        each = [1.0]
        for ratio in ratios[level]:
            each.append(1 / ratio)
            each.append(ratio)
        scales = (1.0, math.sqrt(max_sizes[level] / min_sizes[level]))
        shapes = _shapes(min_sizes[level], each, scales, scale_major)
        small_square = shapes[0]
        large_square = shapes[len(each)]
        others = shapes[1 : len(each)]
        levels.append(_grid([small_square, large_square, *others], center, size, stride, like))
    return torch.cat(levels)


def _pair(stride: int | Sequence[int]) -> tuple[int, int]:
    """Horizontal and vertical stride."""
    return (stride, stride) if isinstance(stride, int) else (stride[0], stride[1])


def _shapes(
    base: float, ratios: Sequence[float], scales: Sequence[float], scale_major: bool
) -> list[tuple[float, float]]:
    """Width and height of one cell's anchors."""
    if scale_major:
        order = [(ratio, scale) for ratio in ratios for scale in scales]
    else:
        order = [(ratio, scale) for scale in scales for ratio in ratios]
    shapes = []
    for ratio, scale in order:
        width = base * scale / math.sqrt(ratio)
        height = base * scale * math.sqrt(ratio)
        shapes.append((width, height))
    return shapes


def _grid(
    shapes: Sequence[tuple[float, float]],
    center: tuple[float, float],
    size: Sequence[int],
    stride: tuple[int, int],
    like: Tensor,
) -> Tensor:
    """Anchors of one level, cell by cell."""
    boxes: list[list[float]] = []
    for row in range(size[0]):
        for column in range(size[1]):
            x = center[0] + column * stride[0]
            y = center[1] + row * stride[1]
            for width, height in shapes:
                boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return like.new_tensor(boxes).reshape(-1, 4)


@implements("anchor_head.valid_flags", name="loop")
def valid_flags(
    pad_shapes: Tensor, *, sizes: Sequence[Sequence[int]], strides: Strides, base_anchors: Sequence[int]
) -> Tensor:
    """Anchors whose cell lies in the padded image (B, A), one cell after the other."""
    images = []
    for height, width in pad_shapes.tolist():
        flags: list[bool] = []
        for (rows, columns), stride, count in zip(sizes, strides, base_anchors, strict=True):
            stride_x, stride_y = _pair(stride)
            for row in range(rows):
                for column in range(columns):
                    valid = row * stride_y < height and column * stride_x < width
                    flags.extend([valid] * count)
        images.append(flags)
    return torch.tensor(images, dtype=torch.bool, device=pad_shapes.device)


@implements("anchor_head.inside_flags", name="loop")
def inside_flags(anchors: Tensor, valid: Tensor, image_shapes: Tensor, *, allowed_border: float = 0) -> Tensor:
    """Valid anchors that stick out of the image by at most the border (B, A), an image at a time."""
    if allowed_border < 0:
        return valid
    inside = valid.clone()
    for image in range(len(image_shapes)):
        height, width = image_shapes[image].tolist()
        inside[image] &= anchors[:, 0] >= -allowed_border
        inside[image] &= anchors[:, 1] >= -allowed_border
        inside[image] &= anchors[:, 2] < width + allowed_border
        inside[image] &= anchors[:, 3] < height + allowed_border
    return inside


# ----------------------------------------------------------------------------------------------------------- boxes
@implements("boxes.overlaps_mmdet", name="loop")
def overlaps_mmdet(
    boxes_a: Tensor, boxes_b: Tensor, *, mode: str = "iou", aligned: bool = False, eps: float = 1e-6
) -> Tensor:
    """IoU, share of the first box, or GIoU (G, N), a row at a time; (N,) if aligned."""
    if aligned:
        return _overlap(boxes_a, boxes_b, mode, eps)
    if len(boxes_a) == 0:
        return boxes_a.new_zeros(0, len(boxes_b))
    rows = []
    for box in boxes_a:
        rows.append(_overlap(box, boxes_b, mode, eps))
    return torch.stack(rows)


def _overlap(a: Tensor, b: Tensor, mode: str, eps: float) -> Tensor:
    """Overlap (N,) of one box, or of matched boxes, with others."""
    left_top = torch.maximum(a[..., :2], b[..., :2])
    right_bottom = torch.minimum(a[..., 2:], b[..., 2:])
    shared = (right_bottom - left_top).clamp(min=0)
    intersection = shared[..., 0] * shared[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    if mode == "iof":
        return intersection / area_a.clamp(min=eps)
    union = (area_a + area_b - intersection).clamp(min=eps)
    iou = intersection / union
    if mode == "iou":
        return iou
    outer_left_top = torch.minimum(a[..., :2], b[..., :2])
    outer_right_bottom = torch.maximum(a[..., 2:], b[..., 2:])
    outer = (outer_right_bottom - outer_left_top).clamp(min=0)
    enclosure = (outer[..., 0] * outer[..., 1]).clamp(min=eps)
    return iou - (enclosure - union) / enclosure


@implements("anchor_head.encode", name="loop")
def encode(
    anchors: Tensor, boxes: Tensor, *, means: Sequence[float] = (0, 0, 0, 0), stds: Sequence[float] = (1, 1, 1, 1)
) -> Tensor:
    """Deltas (N, 4) of boxes relative to anchors, a coordinate at a time."""
    deltas = []
    for axis in (0, 1):
        anchor_centre = (anchors[..., axis] + anchors[..., axis + 2]) * 0.5
        anchor_size = anchors[..., axis + 2] - anchors[..., axis]
        centre = (boxes[..., axis] + boxes[..., axis + 2]) * 0.5
        deltas.append((centre - anchor_centre) / anchor_size)
    for axis in (0, 1):
        anchor_size = anchors[..., axis + 2] - anchors[..., axis]
        size = boxes[..., axis + 2] - boxes[..., axis]
        deltas.append(torch.log(size / anchor_size))
    normalised = []
    for delta, mean, std in zip(deltas, means, stds, strict=True):
        normalised.append((delta - mean) / std)
    return torch.stack(normalised, dim=-1)


@implements("anchor_head.decode", name="loop")
def decode(
    anchors: Tensor,
    deltas: Tensor,
    *,
    means: Sequence[float] = (0, 0, 0, 0),
    stds: Sequence[float] = (1, 1, 1, 1),
    max_shape: Sequence[int] | None = None,
    ratio_clip: float = 16 / 1000,
    center_clamp: float | None = None,
) -> Tensor:
    """Boxes (N, 4*C) that deltas mean, a class and a coordinate at a time."""
    limit = abs(math.log(ratio_clip))
    columns = []
    for first in range(0, deltas.shape[-1], 4):
        lower, upper = [], []
        for axis in (0, 1):
            shift = deltas[..., first + axis] * stds[axis] + means[axis]
            ratio = deltas[..., first + axis + 2] * stds[axis + 2] + means[axis + 2]
            anchor_centre = (anchors[..., axis] + anchors[..., axis + 2]) * 0.5
            anchor_size = anchors[..., axis + 2] - anchors[..., axis]
            move = anchor_size * shift
            if center_clamp is None:
                ratio = ratio.clamp(min=-limit, max=limit)
            else:
                move = move.clamp(min=-center_clamp, max=center_clamp)
                ratio = ratio.clamp(max=limit)
            centre = anchor_centre + move
            size = anchor_size * torch.exp(ratio)
            low = centre - size * 0.5
            high = centre + size * 0.5
            if max_shape is not None:
                side = max_shape[1 - axis]
                low = low.clamp(min=0, max=side)
                high = high.clamp(min=0, max=side)
            lower.append(low)
            upper.append(high)
        columns += lower + upper
    return torch.stack(columns, dim=-1)
