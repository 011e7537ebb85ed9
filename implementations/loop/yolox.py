"""YOLOX as one would write it down from the paper: one image after the other, one ground truth after the other.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolox` and
`detoracle.reference.boxes`. This is the plain baseline that an optimised implementation is measured against, and a
second opinion on what is right.

What differs from the oracle: arguments are not checked; an image with ground truths but no candidate is background
(the oracle raises); a class that does not exist, or a NaN among class probabilities, is PyTorch's own error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, Assignment

__all__ = [
    "assign",
    "candidates",
    "cost",
    "decode",
    "dynamic_k_matching",
    "iou_loss_yolox",
    "iou_yolox",
    "loss",
]


# ------------------------------------------------------------------------------------------------------- boxes
@implements("boxes.iou_yolox", name="loop")
def iou_yolox(boxes_a: Tensor, boxes_b: Tensor, *, form: str = "cxcywh") -> Tensor:
    """IoU of every box of the first set with every box of the second, (G, N)."""
    iou = boxes_a.new_zeros(len(boxes_a), len(boxes_b))
    for g, box in enumerate(boxes_a):
        area, box_area = _area(boxes_b, form), _area(box, form)
        intersection = _intersection(_corners(box, form), _corners(boxes_b, form))
        iou[g] = intersection / (box_area + area - intersection)
    return iou


@implements("boxes.iou_loss_yolox", name="loop")
def iou_loss_yolox(predicted: Tensor, target: Tensor, *, variant: str = "iou") -> Tensor:
    """Box loss of matched pairs, (N,)."""
    corners_p, corners_t = _corners(predicted, "cxcywh"), _corners(target, "cxcywh")
    intersection = _intersection(corners_p, corners_t)
    union = _area(predicted, "cxcywh") + _area(target, "cxcywh") - intersection
    iou = intersection / (union + 1e-16)
    if variant == "iou":
        return 1 - iou**2
    left_top = torch.minimum(corners_p[:, :2], corners_t[:, :2])
    right_bottom = torch.maximum(corners_p[:, 2:], corners_t[:, 2:])
    enclosure = (right_bottom - left_top).prod(-1)
    empty = enclosure - (intersection if variant == "giou_tutorial" else union)
    return 1 - (iou - empty / enclosure.clamp(min=1e-16)).clamp(min=-1, max=1)


def _corners(boxes: Tensor, form: str) -> Tensor:
    """Left, top, right, bottom of boxes (..., 4)."""
    if form == "xyxy":
        return boxes
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def _area(boxes: Tensor, form: str) -> Tensor:
    """Width times height of boxes (..., 4)."""
    size = boxes[..., 2:] if form == "cxcywh" else boxes[..., 2:] - boxes[..., :2]
    return size.prod(-1)


def _intersection(corners_a: Tensor, corners_b: Tensor) -> Tensor:
    """Area of overlap; 0 unless the boxes overlap on both axes."""
    left_top = torch.maximum(corners_a[..., :2], corners_b[..., :2])
    right_bottom = torch.minimum(corners_a[..., 2:], corners_b[..., 2:])
    overlap = (left_top < right_bottom).all(-1)
    return (right_bottom - left_top).prod(-1) * overlap


# ------------------------------------------------------------------------------------------------------ decode
@implements("yolox.decode", name="loop")
def decode(raw: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Turn raw head maps into boxes in pixels and logits, (B, A, 5+C)."""
    levels = []
    for level, stride in zip(raw, strides, strict=True):
        cells = _cells(level)
        flat = level.flatten(2).transpose(1, 2)
        centre = (flat[..., :2] + cells) * stride
        size = torch.exp(flat[..., 2:4]) * stride
        levels.append(torch.cat([centre, size, flat[..., 4:]], dim=-1))
    return torch.cat(levels, dim=1)


def _cells(level: Tensor) -> Tensor:
    """Column and row of every cell of a map, (H*W, 2)."""
    height, width = level.shape[2:]
    cells = [(column, row) for row in range(height) for column in range(width)]
    return torch.tensor(cells, dtype=level.dtype, device=level.device).reshape(-1, 2)


# -------------------------------------------------------------------------------------------------- assignment
@implements("yolox.candidates", name="loop")
def candidates(
    anchor_points: Tensor, anchor_strides: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *, flavour: str = "tutorial"
) -> tuple[Tensor, Tensor]:
    """Anchor points near a ground truth, (B, A), and the pairs that cost no penalty, (B, G, A)."""
    x, y = anchor_points[:, 0], anchor_points[:, 1]
    candidate = gt_valid.new_zeros(len(gt_boxes), len(anchor_points))
    geometry = gt_valid.new_zeros(*gt_valid.shape, len(anchor_points))
    for image in range(len(gt_boxes)):
        for g in _present(gt_valid[image]):
            centre_x, centre_y, width, height = gt_boxes[image, g]
            radius = (2.5 if flavour == "tutorial" else 1.5) * anchor_strides
            in_box = _within(x, centre_x, width / 2) & _within(y, centre_y, height / 2)
            in_center = _within(x, centre_x, radius) & _within(y, centre_y, radius)
            if flavour == "tutorial":
                candidate[image] |= in_box | in_center
                geometry[image, g] = in_box & in_center
            else:
                candidate[image] |= in_center
                geometry[image, g] = in_center
    return candidate, geometry


def _present(valid: Tensor) -> list[int]:
    """Indices of one image's real ground truths."""
    return [g for g, real in enumerate(valid.tolist()) if real]


def _within(position: Tensor, centre: Tensor, reach: Tensor) -> Tensor:
    """Is a position strictly between centre - reach and centre + reach?"""
    return (position > centre - reach) & (position < centre + reach)


@implements("yolox.cost", name="loop")
def cost(
    predictions: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    candidate: Tensor,
    geometry: Tensor,
    *,
    flavour: str = "tutorial",
) -> tuple[Tensor, Tensor]:
    """Cost and IoU of every pair, (B, G, A); inf and 0 for padding and for anchors that are no candidates."""
    cost = predictions.new_full(geometry.shape, math.inf)
    iou = predictions.new_zeros(geometry.shape)
    penalty = 1e5 if flavour == "tutorial" else 1e6
    for image in range(len(predictions)):
        near = candidate[image]
        boxes, objectness, classes = torch.split(predictions[image, near], [4, 1, predictions.shape[-1] - 5], dim=-1)
        probability = torch.sqrt(torch.sigmoid(classes) * torch.sigmoid(objectness))
        for g in _present(gt_valid[image]):
            target = F.one_hot(gt_labels[image, g], classes.shape[-1]).to(probability).expand_as(probability)
            class_cost = F.binary_cross_entropy(probability, target, reduction="none").sum(-1)
            pair_iou = iou_yolox(gt_boxes[image, g : g + 1], boxes)[0]
            pair_cost = class_cost + 3 * -torch.log(pair_iou + 1e-8)
            pair_cost[~geometry[image, g, near]] += penalty
            cost[image, g, near], iou[image, g, near] = pair_cost, pair_iou
    return cost, iou


@implements("yolox.dynamic_k_matching", name="loop")
def dynamic_k_matching(cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Ground truth of each anchor, (B, A), and number of claims of each ground truth, (B, G)."""
    gt_index = torch.full(candidate.shape, BACKGROUND, device=cost.device)
    dynamic_k = torch.zeros(gt_valid.shape, dtype=torch.int64, device=cost.device)
    for image in range(len(cost)):
        anchors, present = candidate[image].nonzero().flatten(), _present(gt_valid[image])
        if len(anchors) == 0 or not present:
            continue
        claims: dict[int, list[int]] = {}  # anchor: ground truths that claim it
        for g in present:
            best = iou[image, g, anchors].sort(descending=True).values[:10].sum()
            k = 1 if best.isnan() else max(int(best), 1)
            dynamic_k[image, g] = k
            cheapest = cost[image, g, anchors].argsort(stable=True)[:k]
            for anchor in anchors[cheapest].tolist():
                claims.setdefault(anchor, []).append(g)
        for anchor, claimants in claims.items():
            if len(claimants) == 1:
                gt_index[image, anchor] = claimants[0]
            else:
                gt_index[image, anchor] = present[int(cost[image, present, anchor].argmin())]
    return gt_index, dynamic_k


@implements("yolox.assign", name="loop")
@torch.no_grad()
def assign(
    predictions: Tensor,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
) -> Assignment:
    """SimOTA: which ground truth each anchor is trained towards, and the IoU it has with it.

    Examples
    --------
    >>> points, strides = torch.tensor([[4.0, 4.0], [44.0, 4.0]]), torch.tensor([8.0, 8.0])
    >>> predictions = torch.tensor([[[8.0, 8, 16, 16, 0, 0], [44.0, 4, 16, 16, 0, 0]]])
    >>> gt, one = torch.tensor([[[8.0, 8, 16, 16]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> assign(predictions, points, strides, gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1]]
    """
    if flavour == "official":
        gt_valid = _first_rows(gt_boxes, gt_labels, gt_valid)
    candidate, geometry = candidates(anchor_points, anchor_strides, gt_boxes, gt_valid, flavour=flavour)
    pair_cost, iou = cost(predictions, gt_boxes, gt_labels, gt_valid, candidate, geometry, flavour=flavour)
    gt_index, dynamic_k = dynamic_k_matching(pair_cost, iou, candidate, gt_valid)
    quality = predictions.new_zeros(gt_index.shape)
    for image, anchor in (gt_index >= 0).nonzero().tolist():
        quality[image, anchor] = iou[image, gt_index[image, anchor], anchor]
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k})


def _first_rows(gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor) -> Tensor:
    """Ground truths as official code counts them: as many as have a positive row sum, but the first so many."""
    counted = torch.zeros_like(gt_valid)
    for image in range(len(gt_valid)):
        present = _present(gt_valid[image])
        rows = [torch.cat([gt_labels[image, g : g + 1].to(gt_boxes), gt_boxes[image, g]]) for g in present]
        number = sum(bool(row.sum() > 0) for row in rows)
        counted[image, present[:number]] = True
    return counted


# -------------------------------------------------------------------------------------------------------- loss
@implements("yolox.loss", name="loop")
def loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    use_l1: bool = False,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, objectness, classification, and l1 if asked for."""
    predictions = decode(raw, strides)
    flat = torch.cat([level.flatten(2).transpose(1, 2) for level in raw], dim=1)
    cells = torch.cat([_cells(level) for level in raw])
    stride = torch.cat([torch.full_like(_cells(level)[:, 0], s) for level, s in zip(raw, strides, strict=True)])
    points = (cells + 0.5) * stride[:, None]
    assignment = assign(predictions.detach(), points, stride, gt_boxes, gt_labels, gt_valid, flavour=flavour)

    box = objectness = classification = l1 = predictions.new_zeros(())
    for image, gt_index in enumerate(assignment.gt_index):
        positive = gt_index >= 0
        objectness = objectness + F.binary_cross_entropy_with_logits(
            predictions[image, :, 4], positive.to(predictions), reduction="sum"
        )
        gt_box, label = gt_boxes[image, gt_index[positive]], gt_labels[image, gt_index[positive]]
        predicted, quality = predictions[image, positive], assignment.quality[image, positive]
        box = box + 5 * iou_loss_yolox(predicted[:, :4], gt_box).sum()
        target = F.one_hot(label, predicted.shape[1] - 5) * quality[:, None]
        classification = classification + F.binary_cross_entropy_with_logits(predicted[:, 5:], target, reduction="sum")
        in_cells = gt_box / stride[positive, None]
        offset, log_size = in_cells[:, :2] - cells[positive], torch.log(in_cells[:, 2:] + 1e-8)
        l1 = l1 + (flat[image, positive, :4] - torch.cat([offset, log_size], dim=1)).abs().sum()

    parts = {"box": box, "objectness": objectness, "classification": classification}
    if use_l1:
        parts["l1"] = l1
    positives = max(int(assignment.positive.sum()), 1)
    parts = {name: part / positives for name, part in parts.items()}
    return {"total": torch.stack(list(parts.values())).sum(), **parts}
