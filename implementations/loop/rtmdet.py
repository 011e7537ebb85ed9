"""RTMDet's assignment as one would write it down from the paper: one image, then one ground truth after the other.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet`; the losses are in
`detoracle.implementations.loop.rtmdet_loss`. This is the plain baseline that an optimised implementation is measured
against, and a second opinion on what is right.

What differs from the oracle: arguments are not checked; a class that does not exist is PyTorch's own error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "candidates", "cost", "decode", "dynamic_k_matching", "encode", "priors"]


# ------------------------------------------------------------------------------------------------------ priors, boxes
@implements("rtmdet.priors", name="loop")
def priors(
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int | Sequence[int]],
    *,
    offset: float = 0.0,
    like: Tensor | None = None,
) -> Tensor:
    """Points and strides (A, 4), one cell after the other."""
    rows: list[tuple[float, float, float, float]] = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        stride_x, stride_y = (stride, stride) if isinstance(stride, int) else stride
        for row in range(height):
            for column in range(width):
                x = (column + offset) * stride_x
                y = (row + offset) * stride_y
                rows.append((x, y, stride_x, stride_y))
    return torch.tensor(rows) if like is None else like.new_tensor(rows)


@implements("rtmdet.decode", name="loop")
def decode(points: Tensor, distances: Tensor, *, max_shape: Sequence[int] | None = None) -> Tensor:
    """Boxes (..., A, 4) at distances from points, a side at a time."""
    left = points[:, 0] - distances[..., 0]
    top = points[:, 1] - distances[..., 1]
    right = points[:, 0] + distances[..., 2]
    bottom = points[:, 1] + distances[..., 3]
    if max_shape is not None:
        height, width = max_shape
        left = left.clamp(min=0, max=width)
        top = top.clamp(min=0, max=height)
        right = right.clamp(min=0, max=width)
        bottom = bottom.clamp(min=0, max=height)
    return torch.stack([left, top, right, bottom], dim=-1)


@implements("rtmdet.encode", name="loop")
def encode(points: Tensor, boxes: Tensor, *, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    """Distances (..., A, 4) from points to the sides of boxes, a side at a time."""
    left = points[:, 0] - boxes[..., 0]
    top = points[:, 1] - boxes[..., 1]
    right = boxes[..., 2] - points[:, 0]
    bottom = boxes[..., 3] - points[:, 1]
    distances = torch.stack([left, top, right, bottom], dim=-1)
    if max_distance is not None:
        distances = distances.clamp(min=0, max=max_distance - eps)
    return distances


# --------------------------------------------------------------------------------------------------------------- cost
@implements("rtmdet.candidates", name="loop")
def candidates(priors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> Tensor:
    """Priors inside some ground truth (B, A), a ground truth at a time."""
    x, y = priors[:, 0], priors[:, 1]
    candidate = torch.zeros_like(inside)
    for image in range(len(gt_boxes)):
        for g in _present(gt_valid[image]):
            left, top, right, bottom = gt_boxes[image, g]
            candidate[image] |= (x > left) & (y > top) & (x < right) & (y < bottom)
        candidate[image] &= inside[image]
    return candidate


def _present(valid: Tensor) -> list[int]:
    """Indices of one image's real ground truths."""
    return [g for g, real in enumerate(valid.tolist()) if real]


@implements("rtmdet.cost", name="loop")
def cost(
    class_logits: Tensor,
    boxes: Tensor,
    priors: Tensor,
    candidate: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    gt_masks: Tensor | None = None,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Cost and IoU of every pair (B, G, A), a ground truth at a time, with a soft label for every class."""
    shape = (*gt_valid.shape, len(priors))
    dtype = torch.promote_types(boxes.dtype, gt_boxes.dtype)
    cost = boxes.new_full(shape, math.inf, dtype=dtype)
    iou = boxes.new_zeros(shape, dtype=dtype)
    for image in range(len(gt_boxes)):
        near = candidate[image]
        if not near.any():
            continue
        logits = class_logits[image, near]
        for g in _present(gt_valid[image]):
            pair_iou = _iou(gt_boxes[image, g], boxes[image, near])
            iou_cost = -torch.log(pair_iou + 1e-7) * iou_weight

            one_hot = F.one_hot(gt_labels[image, g].long(), logits.shape[1])
            soft_label = one_hot * pair_iou[:, None]
            entropy = F.binary_cross_entropy_with_logits(logits, soft_label, reduction="none")
            error = soft_label - torch.sigmoid(logits)
            class_cost = (entropy * error.abs() ** 2).sum(1)

            if gt_masks is None:
                centre = (gt_boxes[image, g, :2] + gt_boxes[image, g, 2:]) / 2
            else:
                centre = _centre_of_mass(gt_masks[image, g])
            offset = priors[near, :2] - centre
            distance = torch.sqrt((offset**2).sum(1)) / priors[near, 2]
            distance_cost = 10.0 ** (distance - soft_center_radius)

            cost[image, g, near] = (class_cost + iou_cost + distance_cost).to(dtype)
            iou[image, g, near] = pair_iou
    return cost, iou


def _iou(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU (N,) of one box with others."""
    left_top = torch.maximum(box[:2], boxes[:, :2])
    right_bottom = torch.minimum(box[2:], boxes[:, 2:])
    shared = (right_bottom - left_top).clamp(min=0)
    intersection = shared[:, 0] * shared[:, 1]
    area = (box[2] - box[0]) * (box[3] - box[1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    union = area + areas - intersection
    return intersection / union.clamp(min=1e-6)


def _centre_of_mass(mask: Tensor) -> Tensor:
    """Mean pixel (2,), x and y, of a mask (H, W)."""
    row, column = mask.nonzero(as_tuple=True)
    pixels = len(row) + 1e-6
    return torch.stack([column.sum() / pixels, row.sum() / pixels])


# ----------------------------------------------------------------------------------------------------------- matching
@implements("rtmdet.dynamic_k_matching", name="loop")
def dynamic_k_matching(
    cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor, *, topk: int = 13
) -> tuple[Tensor, Tensor]:
    """Ground truth of each prior (B, A), and number of claims of each ground truth (B, G), a claim at a time."""
    gt_index = torch.full(candidate.shape, BACKGROUND, device=cost.device)
    dynamic_k = torch.zeros(gt_valid.shape, dtype=torch.int64, device=cost.device)
    for image in range(len(cost)):
        anchors = candidate[image].nonzero().flatten()
        present = _present(gt_valid[image])
        if len(anchors) == 0 or not present:
            continue

        claims: dict[int, list[int]] = {}  # prior: ground truths that claim it
        for g in present:
            best = iou[image, g, anchors].sort(descending=True).values[:topk].sum()
            k = 1 if best.isnan() else max(int(best), 1)
            dynamic_k[image, g] = k
            cheapest = cost[image, g, anchors].argsort(stable=True)[:k]
            for anchor in anchors[cheapest].tolist():
                claims.setdefault(anchor, []).append(g)

        for anchor, claimants in claims.items():
            if len(claimants) == 1:
                gt_index[image, anchor] = claimants[0]
            else:
                cheapest_of_all = cost[image, present, anchor].argmin()
                gt_index[image, anchor] = present[int(cheapest_of_all)]
    return gt_index, dynamic_k


@implements("rtmdet.assign", name="loop")
@torch.no_grad()
def assign(
    class_logits: Tensor,
    boxes: Tensor,
    priors: Tensor,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    gt_masks: Tensor | None = None,
    topk: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
) -> Assignment:
    """Dynamic soft label assignment, stage after stage.

    Examples
    --------
    >>> points, one = priors([(2, 2)], [8]), torch.ones(1, 1, dtype=torch.bool)
    >>> boxes, gt = decode(points[:, :2], torch.full((1, 4, 4), 8.0)), torch.tensor([[[1.0, 1, 15, 15]]])
    >>> label = torch.zeros(1, 1, dtype=torch.int64)
    >>> assign(torch.zeros(1, 4, 2), boxes, points, one.expand(1, 4), gt, label, one).gt_index.tolist()
    [[-1, -1, -1, 0]]
    """
    candidate = candidates(priors, inside, gt_boxes, gt_valid)
    pair_cost, iou = cost(
        class_logits,
        boxes,
        priors,
        candidate,
        gt_boxes,
        gt_labels,
        gt_valid,
        gt_masks=gt_masks,
        soft_center_radius=soft_center_radius,
        iou_weight=iou_weight,
    )
    gt_index, dynamic_k = dynamic_k_matching(pair_cost, iou, candidate, gt_valid, topk=topk)
    gt_index[~inside] = IGNORED

    quality = iou.new_zeros(gt_index.shape)
    max_overlaps = iou.new_zeros(gt_index.shape)
    for image in range(len(gt_index)):
        if candidate[image].any():
            max_overlaps[image] = -1e8
        for anchor in (gt_index[image] >= 0).nonzero().flatten().tolist():
            matched_iou = iou[image, gt_index[image, anchor], anchor]
            quality[image, anchor] = matched_iou
            max_overlaps[image, anchor] = matched_iou
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k, "max_overlaps": max_overlaps})
