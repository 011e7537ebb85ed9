"""RTMDet's targets and losses as one would write them down from the paper: one image, one prior, one level at a time.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet_loss` and
`detoracle.reference.rtmdet_head`; the assignment before them is in `detoracle.implementations.loop.rtmdet`.

What differs from the oracle: arguments are not checked; half-precision logits are computed with as they are, and an
image without a valid prior trains nothing (the oracle raises in both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.loop.rtmdet import assign, decode, priors
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import IGNORED

__all__ = ["giou_loss", "joint_logits", "loss", "qfl", "targets"]

_AVERAGE_EPS = 2.0**-23  # beside an average factor


# -------------------------------------------------------------------------------------------------------- logits
@implements("rtmdet.joint_logits", name="loop")
def joint_logits(class_logits: Tensor, objectness_logits: Tensor) -> Tensor:
    """Logit of the geometric mean of two probabilities, (...)."""
    product = torch.sigmoid(class_logits) * torch.sigmoid(objectness_logits)
    underflow = product == 0  # where the square root has no slope
    mean = torch.sqrt(product.masked_fill(underflow, 1))
    mean = mean.masked_fill(underflow, 0)
    yes = mean.clamp(min=1e-5)
    no = (1 - mean).clamp(min=1e-5)
    return torch.log(yes / no)


# ------------------------------------------------------------------------------------------------------- targets
@implements("rtmdet.targets", name="loop")
def targets(
    gt_index: Tensor,
    quality: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    num_classes: int,
    pos_weight: float = -1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, label weights, boxes and qualities that priors are trained towards, a positive at a time."""
    labels = torch.full_like(gt_index, num_classes)
    label_weights = gt_boxes.new_zeros(gt_index.shape)
    box_targets = gt_boxes.new_zeros(*gt_index.shape, 4)
    metrics = torch.zeros_like(quality)
    for image in range(len(gt_index)):
        label_weights[image, gt_index[image] != IGNORED] = 1
        for anchor in (gt_index[image] >= 0).nonzero().flatten().tolist():
            g = gt_index[image, anchor]
            labels[image, anchor] = gt_labels[image, g]
            box_targets[image, anchor] = gt_boxes[image, g]
            metrics[image, anchor] = quality[image, anchor]
            if pos_weight > 0:
                label_weights[image, anchor] = pos_weight
    return labels, label_weights, box_targets, metrics


# --------------------------------------------------------------------------------------------------------- terms
@implements("rtmdet.qfl", name="loop")
def qfl(
    predicted: Tensor,
    quality: Tensor,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    activated: bool = False,
    beta: float = 2.0,
    reduction: str = "mean",
    average_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Quality focal loss (N,) or (), a class at a time."""
    rows = torch.zeros_like(predicted[:, 0])
    for label in range(predicted.shape[1]):
        column = predicted[:, label]
        target = quality[:, label] if labels is None else torch.where(labels == label, quality, 0)
        if activated:
            probability = column
            entropy = F.binary_cross_entropy(column, target, reduction="none")
        else:
            probability = torch.sigmoid(column)
            entropy = F.binary_cross_entropy_with_logits(column, target, reduction="none")
        error = torch.abs(target - probability)
        rows = rows + entropy * error**beta
    return loss_weight * _reduced(rows, weight, reduction, average_factor)


def _reduced(rows: Tensor, weight: Tensor | None, reduction: str, average_factor: float | None) -> Tensor:
    """Weighted rows, or their sum, mean, or sum over a factor."""
    if weight is not None:
        rows = rows * weight
    if reduction == "none":
        return rows
    if average_factor is not None:
        return rows.sum() / (average_factor + _AVERAGE_EPS)
    if reduction == "sum":
        return rows.sum()
    return rows.mean()


@implements("rtmdet.giou_loss", name="loop")
def giou_loss(
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    reduction: str = "mean",
    average_factor: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """1 - GIoU of matched boxes, (N,) or ()."""
    if weight is not None and reduction != "none" and not (weight > 0).any():
        per_side = weight if weight.ndim == 2 else weight[:, None]
        return (predicted * per_side).sum()
    if weight is not None and weight.ndim == 2:
        weight = weight.mean(1)

    left_top = torch.maximum(predicted[:, :2], target[:, :2])
    right_bottom = torch.minimum(predicted[:, 2:], target[:, 2:])
    shared = (right_bottom - left_top).clamp(min=0)
    intersection = shared[:, 0] * shared[:, 1]
    union = (_area(predicted) + _area(target) - intersection).clamp(min=eps)
    iou = intersection / union

    outer_left_top = torch.minimum(predicted[:, :2], target[:, :2])
    outer_right_bottom = torch.maximum(predicted[:, 2:], target[:, 2:])
    outer = (outer_right_bottom - outer_left_top).clamp(min=0)
    enclosure = (outer[:, 0] * outer[:, 1]).clamp(min=eps)
    giou = iou - (enclosure - union) / enclosure
    return loss_weight * _reduced(1 - giou, weight, reduction, average_factor)


def _area(boxes: Tensor) -> Tensor:
    """Areas (N,); negative if one pair of sides is inverted."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


# ---------------------------------------------------------------------------------------------------------- loss
@implements("rtmdet.loss", name="loop")
def loss(
    class_logits: Sequence[Tensor],
    distances: Sequence[Tensor],
    strides: Sequence[int | Sequence[int]],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    pad_shapes: Tensor | None = None,
    image_shapes: Tensor | None = None,
    gt_masks: Tensor | None = None,
    ignored_boxes: Tensor | None = None,
    offset: float = 0.0,
    allowed_border: float = -1,
    topk: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
    pos_weight: float = -1.0,
    beta: float = 2.0,
    class_loss_weight: float = 1.0,
    box_loss_weight: float = 2.0,
    giou_eps: float = 1e-6,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, and classification and box of each level, a level at a time."""
    sizes = [(level.shape[2], level.shape[3]) for level in class_logits]
    dtype = torch.promote_types(distances[0].dtype, torch.float32)
    points = priors(sizes, strides, offset=offset, like=distances[0].new_zeros((), dtype=dtype))
    inside = gt_valid.new_ones(len(gt_valid), len(points))
    if pad_shapes is not None:
        inside = _in_padded_image(pad_shapes, sizes, strides)
    if image_shapes is not None and allowed_border >= 0:
        inside &= _in_image(points, image_shapes, allowed_border)

    logits = torch.cat([level.flatten(2).transpose(1, 2) for level in class_logits], dim=1)
    flat_distances = torch.cat([level.flatten(2).transpose(1, 2) for level in distances], dim=1)
    boxes = decode(points[:, :2], flat_distances)
    num_classes = logits.shape[2]
    assignment = assign(
        logits.detach(),
        boxes.detach(),
        points,
        inside,
        gt_boxes,
        gt_labels,
        gt_valid,
        gt_masks=gt_masks,
        topk=topk,
        soft_center_radius=soft_center_radius,
        iou_weight=iou_weight,
    )
    labels, label_weights, box_targets, metrics = targets(
        assignment.gt_index,
        assignment.quality,
        gt_boxes,
        gt_labels,
        num_classes=num_classes,
        pos_weight=pos_weight,
    )

    classification, box = [], []
    start = 0
    for height, width in sizes:
        level = slice(start, start + height * width)
        start += height * width
        level_logits = logits[:, level].flatten(0, 1)
        level_boxes = boxes[:, level].flatten(0, 1)
        level_labels = labels[:, level].flatten()
        level_metrics = metrics[:, level].flatten()
        level_weights = label_weights[:, level].flatten()
        level_targets = box_targets[:, level].flatten(0, 1)
        class_loss = qfl(
            level_logits,
            level_metrics,
            level_labels,
            level_weights,
            beta=beta,
            average_factor=1.0,
            loss_weight=class_loss_weight,
        )
        positive = level_labels < num_classes
        if positive.any():
            box_loss = giou_loss(
                level_boxes[positive],
                level_targets[positive],
                level_metrics[positive],
                eps=giou_eps,
                average_factor=1.0,
                loss_weight=box_loss_weight,
            )
        else:
            box_loss = level_boxes.sum() * 0
        classification.append(class_loss)
        box.append(box_loss)

    average_factor = _mean_over_ranks(metrics.sum()).clamp(min=1)
    class_losses = torch.stack(classification) / average_factor
    box_losses = torch.stack(box) / average_factor
    return {"total": class_losses.sum() + box_losses.sum(), "classification": class_losses, "box": box_losses}


def _in_padded_image(
    pad_shapes: Tensor, sizes: Sequence[tuple[int, int]], strides: Sequence[int | Sequence[int]]
) -> Tensor:
    """Priors (B, A) whose cell begins inside the padded image."""
    images = []
    for pad_height, pad_width in pad_shapes.tolist():
        flags = []
        for (height, width), stride in zip(sizes, strides, strict=True):
            stride_x, stride_y = (stride, stride) if isinstance(stride, int) else stride
            rows = math.ceil(pad_height / stride_y)
            columns = math.ceil(pad_width / stride_x)
            for row in range(height):
                for column in range(width):
                    flags.append(row < rows and column < columns)
        images.append(flags)
    return torch.tensor(images, device=pad_shapes.device)


def _in_image(points: Tensor, image_shapes: Tensor, border: float) -> Tensor:
    """Priors (B, A) inside the image; as published, right and bottom limit their strides, not the points."""
    images = []
    for height, width in image_shapes:
        near = (points[:, 0] >= -border) & (points[:, 1] >= -border)
        far = (points[:, 2] < width + border) & (points[:, 3] < height + border)
        images.append(near & far)
    return torch.stack(images)


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over the processes of a distributed run, of which every one must call."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    share = value / dist.get_world_size()
    dist.all_reduce(share)
    return share
