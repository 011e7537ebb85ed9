"""Boxes of the anchor head on whole batches: anchors, flags and the delta coder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.implementations.registry import implements

__all__ = ["Strides", "anchors", "decode", "encode", "inside_flags", "ssd_anchors", "valid_flags"]

Strides = Sequence[int | Sequence[int]]


# ----------------------------------------------------------------------------------------------- anchors and flags
@implements("anchor_head.anchors", name="batched")
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
    """Anchors of all levels, (A, 4)."""
    if scales is None:
        assert octave_base_scale is not None
        assert scales_per_octave is not None
        scales = [octave_base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
    levels = []
    for level, (size, stride) in enumerate(zip(sizes, map(_pair, strides), strict=True)):
        base = min(stride) if base_sizes is None else base_sizes[level]
        center = (center_offset * base, center_offset * base) if centers is None else centers[level]
        levels.append(_grid(_shapes(base, ratios, scales, scale_major, like), center, size, stride))
    return torch.cat(levels)


@implements("anchor_head.ssd_anchors", name="batched")
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
    """Anchors of all levels as SSD places them, (A, 4): small square, large square, then the ratios."""
    levels = []
    for size, stride, others, small, large in zip(
        sizes, map(_pair, strides), ratios, min_sizes, max_sizes, strict=True
    ):
        each = [1.0, *(r for ratio in others for r in (1 / ratio, ratio))]
        shapes = _shapes(small, each, (1.0, math.sqrt(large / small)), scale_major, like)
        order = torch.tensor([0, len(each), *range(1, len(each))], device=like.device)
        levels.append(_grid(shapes[order], (stride[0] / 2, stride[1] / 2), size, stride))
    return torch.cat(levels)


def _pair(stride: int | Sequence[int]) -> tuple[int, int]:
    return (stride, stride) if isinstance(stride, int) else (stride[0], stride[1])


def _shapes(base: float, ratios: Sequence[float], scales: Sequence[float], scale_major: bool, like: Tensor) -> Tensor:
    """Width and height (K, 2) of one cell's anchors."""
    root, scale = like.new_tensor(list(ratios)).sqrt(), like.new_tensor(list(scales))
    if scale_major:
        width, height = base * (1 / root)[:, None] * scale, base * root[:, None] * scale
    else:
        width, height = base * scale[:, None] * (1 / root), base * scale[:, None] * root
    return torch.stack([width.flatten(), height.flatten()], dim=1)


def _grid(shapes: Tensor, center: Sequence[float], size: Sequence[int], stride: tuple[int, int]) -> Tensor:
    """Anchors of one level, row-major."""
    middle = shapes.new_tensor(list(center))
    cell = torch.cat([middle - 0.5 * shapes, middle + 0.5 * shapes], dim=1)
    x = (torch.arange(size[1], device=shapes.device) * stride[0]).to(shapes)
    y = (torch.arange(size[0], device=shapes.device) * stride[1]).to(shapes)
    shift = torch.stack([x.expand(size[0], -1), y[:, None].expand(-1, size[1])], dim=-1).reshape(-1, 1, 2)
    return (cell + shift.repeat(1, 1, 2)).reshape(-1, 4)


@implements("anchor_head.valid_flags", name="batched")
def valid_flags(
    pad_shapes: Tensor, *, sizes: Sequence[Sequence[int]], strides: Strides, base_anchors: Sequence[int]
) -> Tensor:
    """Anchors whose cell lies in the padded image, (B, A)."""
    height, width = pad_shapes[:, 0, None], pad_shapes[:, 1, None]
    levels = []
    for (rows, columns), (stride_x, stride_y), count in zip(sizes, map(_pair, strides), base_anchors, strict=True):
        row = torch.arange(rows, device=pad_shapes.device) * stride_y < height
        column = torch.arange(columns, device=pad_shapes.device) * stride_x < width
        cells = (row[:, :, None] & column[:, None]).flatten(1)
        levels.append(cells[..., None].expand(*cells.shape, count).flatten(1))
    return torch.cat(levels, dim=1)


@implements("anchor_head.inside_flags", name="batched")
def inside_flags(anchors: Tensor, valid: Tensor, image_shapes: Tensor, *, allowed_border: float = 0) -> Tensor:
    """Valid anchors that stick out of the image by at most the border, (B, A)."""
    if allowed_border < 0:
        return valid
    near = (anchors[:, :2] >= -allowed_border).all(1)
    far = (anchors[:, 2:] < image_shapes.flip(1)[:, None] + allowed_border).all(2)
    return valid & near & far


# ------------------------------------------------------------------------------------------------------ delta coder
@implements("anchor_head.encode", name="batched")
def encode(
    anchors: Tensor, boxes: Tensor, *, means: Sequence[float] = (0, 0, 0, 0), stds: Sequence[float] = (1, 1, 1, 1)
) -> Tensor:
    """Deltas of boxes (..., N, 4) relative to anchors (N, 4)."""
    size, wanted = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., 2:] + boxes[..., :2]) * 0.5 - (anchors[..., 2:] + anchors[..., :2]) * 0.5
    deltas = torch.cat([shift / size, torch.log(wanted / size)], dim=-1)
    return (deltas - deltas.new_tensor(list(means))) / deltas.new_tensor(list(stds))


@implements("anchor_head.decode", name="batched")
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
    """Boxes that deltas (..., N, 4*C) mean."""
    limit = abs(math.log(ratio_clip))
    each = torch.unflatten(deltas, -1, (-1, 4)) * deltas.new_tensor(list(stds)) + deltas.new_tensor(list(means))
    size = (anchors[..., 2:] - anchors[..., :2])[..., None, :]
    shift, ratio = size * each[..., :2], each[..., 2:]
    if center_clamp is None:
        ratio = ratio.clamp(min=-limit, max=limit)
    else:
        shift, ratio = shift.clamp(min=-center_clamp, max=center_clamp), ratio.clamp(max=limit)
    center = ((anchors[..., 2:] + anchors[..., :2]) * 0.5)[..., None, :] + shift
    half = size * ratio.exp() * 0.5
    boxes = torch.cat([center - half, center + half], dim=-1)
    if max_shape is not None:
        x, y = boxes[..., ::2].clamp(0, max_shape[1]), boxes[..., 1::2].clamp(0, max_shape[0])
        boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
    return boxes.reshape(deltas.shape)
