"""The anchor head's anchors, boxes, assignment and targets, plainly: one image, one ground truth at a time.

Arguments, results and their meaning are those of the operations in `detoracle.reference`; the losses are in
`detoracle.implementations.loop.anchor_head_loss`. This is the plain baseline that an optimised implementation is
measured against, and a second opinion on what is right. What differs from the oracle: arguments are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = [
    "anchors",
    "assign",
    "decode",
    "encode",
    "inside_flags",
    "overlaps_mmdet",
    "sample",
    "ssd_anchors",
    "targets",
    "valid_flags",
]

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


# ------------------------------------------------------------------------------------------------------ assignment
@implements("anchor_head.assign", name="loop")
@torch.no_grad()
def assign(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    inside: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    pos_iou_thr: float = 0.5,
    neg_iou_thr: float | Sequence[float] = 0.4,
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
    match_low_quality: bool = True,
    ignore_iof_thr: float = -1.0,
    ignore_wrt_candidates: bool = True,
) -> Assignment:
    """MaxIoU: ground truth of each anchor (B, A), an image, then a claiming ground truth at a time."""
    low, high = neg_iou_thr if isinstance(neg_iou_thr, Sequence) else (0.0, neg_iou_thr)
    gt_index = torch.full(inside.shape, IGNORED, device=anchors.device)
    quality = anchors.new_zeros(inside.shape)
    for image in range(len(gt_boxes)):
        taking_part = inside[image].nonzero().flatten()
        present = gt_valid[image].nonzero().flatten()
        if len(taking_part) == 0:
            continue
        if len(present) == 0:
            gt_index[image, taking_part] = BACKGROUND
            continue
        boxes = anchors[taking_part]
        overlaps = overlaps_mmdet(gt_boxes[image, present], boxes)
        if ignore_boxes is not None and ignore_valid is not None and ignore_iof_thr > 0:
            for region in ignore_boxes[image, ignore_valid[image]]:
                if ignore_wrt_candidates:
                    share = overlaps_mmdet(boxes, region[None], mode="iof")[:, 0]
                else:
                    share = overlaps_mmdet(region[None], boxes, mode="iof")[0]
                overlaps[:, share > ignore_iof_thr] = -1

        best, best_gt = overlaps.max(dim=0)
        chosen = torch.full_like(best_gt, IGNORED)
        background = (best >= low) & (best < high)
        chosen[background] = BACKGROUND
        positive = best >= pos_iou_thr
        chosen[positive] = best_gt[positive]
        if match_low_quality:
            for g in range(len(present)):
                most = overlaps[g].max()
                if most < min_pos_iou or most.isnan():
                    continue
                if gt_max_assign_all:
                    chosen[overlaps[g] == most] = g
                else:
                    chosen[overlaps[g].argmax()] = g

        for g in range(len(present)):
            mine = chosen == g
            gt_index[image, taking_part[mine]] = present[g]
            quality[image, taking_part[mine]] = overlaps[g, mine]
        gt_index[image, taking_part[chosen == BACKGROUND]] = BACKGROUND
    return Assignment(gt_index, quality)


# --------------------------------------------------------------------------------------------- sampling and targets
@implements("anchor_head.sample", name="loop")
def sample(
    gt_index: Tensor,
    gt_labels: Tensor | None = None,
    gt_valid: Tensor | None = None,
    *,
    sampler: str = "random",
    seed: int = 0,
    num: int = 256,
    pos_fraction: float = 0.5,
    neg_pos_ub: float = -1.0,
    add_gt_as_proposals: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors that are trained, positive and background, drawn an image at a time."""
    positive = gt_index >= 0
    negative = gt_index == BACKGROUND
    gt_positive = positive[:, :0]
    if sampler == "pseudo":
        return positive, negative, gt_positive
    if add_gt_as_proposals and gt_valid is not None:
        gt_positive = gt_valid.clone()
    count = gt_positive.shape[1]
    generator = torch.Generator().manual_seed(seed)
    for image in range(len(gt_index)):
        candidates = torch.cat([gt_positive[image], positive[image]])
        drawn = _drawn(candidates, int(num * pos_fraction), generator)
        gt_positive[image] = drawn[:count]
        positive[image] = drawn[count:]
        taken = int(drawn.sum())
        most = num - taken
        if neg_pos_ub >= 0:
            most = min(most, int(neg_pos_ub * max(taken, 1)))
        negative[image] = _drawn(negative[image], most, generator)
    return positive, negative, gt_positive


def _drawn(mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of the marked anchors."""
    marked = mask.nonzero().flatten()
    if len(marked) <= most:
        return mask
    order = torch.randperm(len(marked), generator=generator)
    drawn = torch.zeros_like(mask)
    drawn[marked[order[:most].to(marked.device)]] = True
    return drawn


@implements("anchor_head.targets", name="loop")
def targets(
    anchors: Tensor,
    gt_index: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    num_classes: int,
    reg_decoded_bbox: bool = False,
    pos_weight: float = -1.0,
    means: Sequence[float] = (0, 0, 0, 0),
    stds: Sequence[float] = (1, 1, 1, 1),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Labels, weights and box targets of all anchors, a positive at a time."""
    labels = torch.full_like(gt_index, num_classes)
    label_weights = anchors.new_zeros(gt_index.shape)
    box_targets = anchors.new_zeros(*gt_index.shape, 4)
    box_weights = anchors.new_zeros(*gt_index.shape, 4)
    num_positives, num_negatives = 0, 0
    for image in range(len(gt_index)):
        label_weights[image, negative[image]] = 1
        for anchor in positive[image].nonzero().flatten().tolist():
            g = gt_index[image, anchor]
            labels[image, anchor] = gt_labels[image, g]
            label_weights[image, anchor] = pos_weight if pos_weight > 0 else 1
            target = gt_boxes[image, g]
            if not reg_decoded_bbox:
                target = encode(anchors[anchor], target, means=means, stds=stds)
            box_targets[image, anchor] = target
            box_weights[image, anchor] = 1
        num_positives += max(int(positive[image].sum()), 1)
        num_negatives += max(int(negative[image].sum()), 1)
    counts = torch.tensor([num_positives, num_negatives], device=gt_index.device)
    return labels, label_weights, box_targets, box_weights, counts[0], counts[1]
