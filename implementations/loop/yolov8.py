"""YOLOv8 as one would write it down from the paper: one image after the other, one ground truth after the other.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolov8`,
`detoracle.reference.yolov8_loss` and `detoracle.reference.boxes`. This is the plain baseline that an optimised
implementation is measured against, and a second opinion on what is right.

What differs from the oracle: arguments are not checked; with fewer anchors than top-k asks for, all are claimed (the
oracle raises); a class, or a bin, that does not exist is PyTorch's own error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, Assignment

__all__ = [
    "align",
    "anchor_points",
    "assign",
    "bbox2dist",
    "dfl_decode",
    "dfl_loss",
    "iou_ultralytics",
    "loss",
    "pad_targets",
]


# ------------------------------------------------------------------------------------------------------- boxes
@implements("boxes.iou_ultralytics", name="loop")
def iou_ultralytics(
    boxes_a: Tensor, boxes_b: Tensor, *, form: str = "xyxy", mode: str = "iou", eps: float = 1e-7
) -> Tensor:
    """IoU, GIoU, DIoU or CIoU (..., 1) of boxes (..., 4) that broadcast."""
    corners_a, corners_b = _corners(boxes_a, form), _corners(boxes_b, form)
    (width_a, height_a), (width_b, height_b) = _size(boxes_a, form, eps), _size(boxes_b, form, eps)

    left_top = torch.maximum(corners_a[..., :2], corners_b[..., :2])
    right_bottom = torch.minimum(corners_a[..., 2:], corners_b[..., 2:])
    shared = (right_bottom - left_top).clamp(min=0)
    intersection = shared[..., :1] * shared[..., 1:]
    union = width_a * height_a + width_b * height_b - intersection + eps
    iou = intersection / union
    if mode == "iou":
        return iou

    outer_left_top = torch.minimum(corners_a[..., :2], corners_b[..., :2])
    outer_right_bottom = torch.maximum(corners_a[..., 2:], corners_b[..., 2:])
    outer = outer_right_bottom - outer_left_top
    if mode == "giou":
        enclosure = outer[..., :1] * outer[..., 1:] + eps
        return iou - (enclosure - union) / enclosure

    diagonal = (outer**2).sum(-1, keepdim=True) + eps
    offset = corners_b[..., :2] + corners_b[..., 2:] - corners_a[..., :2] - corners_a[..., 2:]
    distance = (offset**2).sum(-1, keepdim=True) / 4
    diou = iou - distance / diagonal
    if mode == "diou":
        return diou

    angle = torch.atan(width_b / height_b) - torch.atan(width_a / height_a)
    shape = 4 / math.pi**2 * angle**2
    with torch.no_grad():
        alpha = shape / (shape - iou + (1 + eps))
    return diou - alpha * shape


def _corners(boxes: Tensor, form: str) -> Tensor:
    """Left, top, right, bottom of boxes (..., 4)."""
    if form == "xyxy":
        return boxes
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def _size(boxes: Tensor, form: str, eps: float) -> tuple[Tensor, Tensor]:
    """Width and height, each (..., 1), of boxes (..., 4)."""
    if form == "cxcywh":
        return boxes[..., 2:3], boxes[..., 3:]
    width = boxes[..., 2:3] - boxes[..., :1]
    height = boxes[..., 3:] - boxes[..., 1:2] + eps
    return width, height


# --------------------------------------------------------------------------------- anchor points, ground truths
@implements("yolov8.anchor_points", name="loop")
def anchor_points(raw: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cell centres (A, 2) in cells, and strides (A,), one cell after the other."""
    points: list[tuple[float, float]] = []
    anchor_strides: list[int] = []
    for level, stride in zip(raw, strides, strict=True):
        height, width = level.shape[2:]
        for row in range(height):
            for column in range(width):
                points.append((column + 0.5, row + 0.5))
                anchor_strides.append(stride)
    return raw[0].new_tensor(points), raw[0].new_tensor(anchor_strides)


@implements("yolov8.pad_targets", name="loop")
def pad_targets(
    batch_index: Tensor, labels: Tensor, boxes: Tensor, *, batch_size: int, image_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, G, 4), labels (B, G) and mask (B, G) of flat ground truths, an image at a time."""
    height, width = image_size
    largest = max(Counter(batch_index.tolist()).values(), default=0)
    gt_boxes = boxes.new_zeros(batch_size, largest, 4)
    gt_labels = labels.new_zeros(batch_size, largest)
    for image in range(batch_size):
        mine = batch_index == image
        count = int(mine.sum())
        in_pixels = boxes[mine] * boxes.new_tensor([width, height, width, height])
        gt_boxes[image, :count] = _corners(in_pixels, "cxcywh")
        gt_labels[image, :count] = labels[mine]
    gt_valid = gt_boxes.sum(-1) > 0
    return gt_boxes, gt_labels, gt_valid


# -------------------------------------------------------------------------------------------------- assignment
@implements("yolov8.align", name="loop")
@torch.no_grad()
def align(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Alignment metric, overlap and "inside" of every pair, (B, G, A) each, a ground truth at a time."""
    in_gt = gt_valid.new_zeros(*gt_valid.shape, len(anchor_points))
    overlap = boxes.new_zeros(in_gt.shape)
    metric = boxes.new_zeros(in_gt.shape)
    for image in range(len(gt_boxes)):
        for g, box in enumerate(gt_boxes[image]):
            to_left_top = anchor_points - box[:2]
            to_right_bottom = box[2:] - anchor_points
            inside = (torch.cat([to_left_top, to_right_bottom], dim=1) > 1e-9).all(1)
            in_gt[image, g] = inside
            if not gt_valid[image, g]:
                continue
            ciou = iou_ultralytics(box, boxes[image, inside], mode="ciou")[:, 0]
            pair_overlap = ciou.clamp(min=0)
            score = scores[image, inside, int(gt_labels[image, g])]
            overlap[image, g, inside] = pair_overlap
            metric[image, g, inside] = score**alpha * pair_overlap**beta
    return metric, overlap, in_gt


@implements("yolov8.assign", name="loop")
@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Task-aligned assignment: which ground truth each anchor is trained towards, and how strongly, and the targets.

    Examples
    --------
    >>> points, one = torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt = torch.tensor([[[0.0, 0, 8, 8]]])
    >>> assign(torch.ones(1, 2, 3), gt.expand(1, 2, 4), points, gt, torch.tensor([[2]]), one).gt_index.tolist()
    [[0, -1]]
    """
    num_images, num_anchors, num_classes = scores.shape
    metric, overlap, in_gt = align(scores, boxes, anchor_points, gt_boxes, gt_labels, gt_valid, alpha=alpha, beta=beta)
    gt_index = torch.full((num_images, num_anchors), BACKGROUND, device=scores.device)
    quality = metric.new_zeros(num_images, num_anchors)
    labels = torch.full_like(gt_index, num_classes)
    target_boxes = gt_boxes.new_zeros(num_images, num_anchors, 4)
    target_scores = metric.new_zeros(scores.shape)
    for image in range(num_images):
        if gt_boxes.shape[1] == 0:
            continue
        claims: dict[int, list[int]] = {}  # anchor: ground truths that claim it
        for g, real in enumerate(gt_valid[image].tolist()):
            if not real:
                continue
            ranking = metric[image, g].argsort(descending=True, stable=True)
            best = ranking[:topk]
            best = best[in_gt[image, g, best]]
            for anchor in best.tolist():
                claims.setdefault(anchor, []).append(g)
        for anchor, claimants in claims.items():
            winner = claimants[0]
            if len(claimants) > 1:
                winner = int(overlap[image, :, anchor].argmax())
            gt_index[image, anchor] = winner

        quality[image] = _quality(gt_index[image], metric[image], overlap[image])

        matched = gt_index[image].clamp(min=0)
        labels[image] = gt_labels[image, matched].clamp(min=0)
        target_boxes[image] = gt_boxes[image, matched]
        positive = gt_index[image] >= 0
        one_hot = F.one_hot(labels[image], num_classes) * positive[:, None]
        target_scores[image] = one_hot * quality[image, :, None]
    return Assignment(gt_index, quality, {"labels": labels, "boxes": target_boxes, "scores": target_scores})


def _quality(gt_index: Tensor, metric: Tensor, overlap: Tensor) -> Tensor:
    """Metric (A,) of one image's positives, scaled so that each ground truth's best one gets its best overlap."""
    quality = metric.new_zeros(gt_index.shape)
    for g in range(len(metric)):
        mine = gt_index == g
        if not mine.any():
            continue
        best_metric = metric[g, mine].max()
        best_overlap = overlap[g, mine].max()
        quality[mine] = metric[g, mine] * best_overlap / (best_metric + 1e-9)
    if metric.isnan().any():
        quality[:] = torch.nan
    return quality


# --------------------------------------------------------------------------------------------------- distances
@implements("yolov8.dfl_decode", name="loop")
def dfl_decode(box_logits: Tensor) -> Tensor:
    """Distances (B, A, 4) in cells: the mean of each predicted distribution, a side at a time."""
    bins = box_logits.shape[-1] // 4
    if bins == 1:
        return box_logits
    distance = torch.arange(bins, dtype=box_logits.dtype, device=box_logits.device)
    sides = []
    for logits in box_logits.chunk(4, dim=-1):
        probability = torch.softmax(logits, dim=-1)
        sides.append((probability * distance).sum(-1))
    return torch.stack(sides, dim=-1)


@implements("yolov8.bbox2dist", name="loop")
def bbox2dist(anchor_points: Tensor, boxes: Tensor, *, reg_max: int = 16) -> Tensor:
    """Distances (N, 4) in cells from points to the sides of boxes, clamped to what the bins can hold."""
    to_left_top = anchor_points - boxes[:, :2]
    to_right_bottom = boxes[:, 2:] - anchor_points
    distances = torch.cat([to_left_top, to_right_bottom], dim=1)
    return distances.clamp(min=0, max=reg_max - 1 - 0.01)


@implements("yolov8.dfl_loss", name="loop")
def dfl_loss(box_logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (N,): cross entropy to the two bins next to each distance, a side at a time."""
    total = box_logits.new_zeros(len(box_logits))
    for side, logits in enumerate(box_logits.chunk(4, dim=1)):
        target = distances[:, side]
        left = target.floor()
        right = left + 1
        to_left = F.cross_entropy(logits, left.long(), reduction="none")
        to_right = F.cross_entropy(logits, right.long(), reduction="none")
        total = total + to_left * (right - target) + to_right * (target - left)
    return total / 4


# -------------------------------------------------------------------------------------------------------- loss
@implements("yolov8.loss", name="loop")
def loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    reg_max: int = 16,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, cls and dfl, summed an image at a time.

    Examples
    --------
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss([torch.zeros(1, 65, 4, 4)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> round(float(parts["cls"]), 4)
    5.5452
    """
    points, stride = anchor_points(raw, strides)
    flat = torch.cat([level.flatten(2).transpose(1, 2) for level in raw], dim=1)
    box_logits, class_logits = flat[..., : 4 * reg_max], flat[..., 4 * reg_max :]
    distances = dfl_decode(box_logits)
    boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)

    scores = class_logits.detach().sigmoid()
    in_pixels = (boxes.detach() * stride[:, None]).to(gt_boxes.dtype)
    counted = gt_valid & (gt_boxes.sum(-1) > 0)
    assignment = assign(
        scores, in_pixels, points * stride[:, None], gt_boxes, gt_labels, counted, topk=topk, alpha=alpha, beta=beta
    )

    dtype = torch.promote_types(flat.dtype, torch.float32)
    normaliser = assignment.quality.sum().clamp(min=1)
    box = cls = dfl = flat.new_zeros((), dtype=dtype)
    for image in range(len(flat)):
        target_scores = assignment.extra["scores"][image].to(flat.dtype)
        cls = cls + F.binary_cross_entropy_with_logits(class_logits[image], target_scores, reduction="sum")

        if not assignment.positive.any():
            continue  # boxes that nobody is trained towards get no gradient, not even 0 times NaN
        positive = assignment.positive[image]
        weight = assignment.quality[image, positive]
        target = assignment.extra["boxes"][image, positive] / stride[positive, None]
        ciou = iou_ultralytics(boxes[image, positive], target, mode="ciou")[:, 0]
        box = box + ((1 - ciou) * weight).sum() / normaliser

        if reg_max > 1:
            wanted = bbox2dist(points[positive], target, reg_max=reg_max)
            focal = dfl_loss(box_logits[image, positive], wanted)
            dfl = dfl + (focal * weight).sum() / normaliser

    box = box_gain * box
    cls = cls_gain * cls / normaliser
    dfl = dfl_gain * dfl
    total = (box + cls + dfl) * len(flat)
    return {"total": total, "box": box.detach(), "cls": cls.detach(), "dfl": dfl.detach()}
