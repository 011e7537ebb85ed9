"""The anchor head's losses, written down plainly: one level after the other, SSD's one image after the other.

Arguments, results and their meaning are those of the operations in `detoracle.reference`; what comes before is in
`detoracle.implementations.loop.anchor_head`.

What differs from the oracle: arguments are not checked; an image without an anchor inside trains nothing (the oracle
raises); a class that does not exist is PyTorch's own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.implementations.loop.anchor_head import assign, sample, targets
from detoracle.implementations.loop.anchor_head_boxes import decode, inside_flags, valid_flags
from detoracle.implementations.loop.anchor_head_terms import (
    cross_entropy,
    giou_loss,
    l1_loss,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND

__all__ = ["loss", "ssd_loss"]

Strides = Sequence[int | Sequence[int]]

_EPS = 2.0**-23  # beside an average factor
_SAMPLER = ("seed", "num", "pos_fraction", "neg_pos_ub", "add_gt_as_proposals")


def _flat(level: Tensor, columns: int) -> Tensor:
    """(B, K*columns, H, W) to (B, H*W*K, columns)."""
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, columns)


def _inside(
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    image_shapes: Tensor,
    pad_shapes: Tensor,
    strides: Strides,
    allowed_border: float,
) -> Tensor:
    """Anchors (B, A) that take part."""
    sizes = [(level.shape[2], level.shape[3]) for level in bbox_preds]
    base_anchors = [level.shape[1] // 4 for level in bbox_preds]
    valid = valid_flags(pad_shapes, sizes=sizes, strides=strides, base_anchors=base_anchors)
    return inside_flags(anchors, valid, image_shapes, allowed_border=allowed_border)


@implements("anchor_head.loss", name="loop")
def loss(
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_shapes: Tensor,
    pad_shapes: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    strides: Strides,
    allowed_border: float = -1.0,
    class_loss: str = "focal",
    box_loss: str = "l1",
    sampler: str = "pseudo",
    pos_weight: float = -1.0,
    reg_decoded_bbox: bool = False,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    class_loss_weight: float = 1.0,
    box_loss_weight: float = 1.0,
    class_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    gamma: float = 2.0,
    alpha: float = 0.25,
    beta: float = 1.0,
    eps: float = 1e-6,
    **settings: Any,
) -> dict[str, Tensor]:
    """Loss per level, a level at a time; the settings of the assignment and the sampler are passed on to them."""
    columns = cls_scores[0].shape[1] // (bbox_preds[0].shape[1] // 4)
    num_classes = columns - 1 if class_loss == "cross_entropy" else columns
    drawing = {name: settings.pop(name) for name in _SAMPLER if name in settings}
    inside = _inside(bbox_preds, anchors, image_shapes, pad_shapes, strides, allowed_border)
    gt_index = assign(anchors, gt_boxes, gt_valid, inside, ignore_boxes, ignore_valid, **settings).gt_index
    samples = sampler == "random" and class_loss != "focal"
    positive, negative, _ = sample(gt_index, sampler="random" if samples else "pseudo", **drawing)
    labels, label_weights, box_targets, box_weights, num_positives, num_negatives = targets(
        anchors,
        gt_index,
        gt_boxes,
        gt_labels,
        positive,
        negative,
        num_classes=num_classes,
        reg_decoded_bbox=reg_decoded_bbox,
        pos_weight=pos_weight,
        means=means,
        stds=stds,
    )
    divisor = num_positives
    if samples:
        divisor = num_positives + num_negatives

    classification, box = [], []
    start = 0
    for scores, deltas in zip(cls_scores, bbox_preds, strict=True):
        logits = _flat(scores, columns)
        predicted = _flat(deltas, 4)
        level = slice(start, start + logits.shape[1])
        start += logits.shape[1]
        if reg_decoded_bbox:
            predicted = decode(anchors[level], predicted, means=means, stds=stds)

        class_rows = (logits.flatten(0, 1), labels[:, level].flatten(), label_weights[:, level].flatten())
        if class_loss == "focal":
            class_term = sigmoid_focal_loss(
                *class_rows, gamma=gamma, alpha=alpha, avg_factor=divisor, loss_weight=class_loss_weight
            )
        else:
            entropy = cross_entropy if class_loss == "cross_entropy" else sigmoid_cross_entropy
            class_term = entropy(
                *class_rows,
                class_weight=class_weight,
                ignore_index=ignore_index,
                avg_factor=divisor,
                loss_weight=class_loss_weight,
            )

        box_rows = (predicted.flatten(0, 1), box_targets[:, level].flatten(0, 1), box_weights[:, level].flatten(0, 1))
        if box_loss == "smooth_l1":
            box_term = smooth_l1_loss(*box_rows, beta=beta, avg_factor=divisor, loss_weight=box_loss_weight)
        elif box_loss == "giou":
            box_term = giou_loss(*box_rows, eps=eps, avg_factor=divisor, loss_weight=box_loss_weight)
        else:
            box_term = l1_loss(*box_rows, avg_factor=divisor, loss_weight=box_loss_weight)
        classification.append(class_term)
        box.append(box_term)

    class_losses = torch.stack(classification)
    box_losses = torch.stack(box)
    return {"total": class_losses.sum() + box_losses.sum(), "classification": class_losses, "box": box_losses}


@implements("anchor_head.ssd_loss", name="loop")
def ssd_loss(
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_shapes: Tensor,
    pad_shapes: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    strides: Strides,
    allowed_border: float = -1.0,
    neg_pos_ratio: int = 3,
    pos_weight: float = -1.0,
    reg_decoded_bbox: bool = False,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    beta: float = 1.0,
    **settings: Any,
) -> dict[str, Tensor]:
    """Loss per image with hard negatives, an image at a time; other settings are those of the assignment."""
    columns = cls_scores[0].shape[1] // (bbox_preds[0].shape[1] // 4)
    num_classes = columns - 1
    settings = {"neg_iou_thr": 0.5, "gt_max_assign_all": False, **settings}
    inside = _inside(bbox_preds, anchors, image_shapes, pad_shapes, strides, allowed_border)
    gt_index = assign(anchors, gt_boxes, gt_valid, inside, ignore_boxes, ignore_valid, **settings).gt_index
    labels, label_weights, box_targets, box_weights, num_positives, _ = targets(
        anchors,
        gt_index,
        gt_boxes,
        gt_labels,
        gt_index >= 0,
        gt_index == BACKGROUND,
        num_classes=num_classes,
        reg_decoded_bbox=reg_decoded_bbox,
        pos_weight=pos_weight,
        means=means,
        stds=stds,
    )
    logits = torch.cat([_flat(level, columns) for level in cls_scores], dim=1)
    predicted = torch.cat([_flat(level, 4) for level in bbox_preds], dim=1)
    if reg_decoded_bbox:
        predicted = decode(anchors, predicted, means=means, stds=stds)

    classification, box = [], []
    for image in range(len(labels)):
        cost = cross_entropy(logits[image], labels[image], reduction="none")
        cost = cost * label_weights[image]
        positive = (labels[image] >= 0) & (labels[image] < num_classes)
        background = (labels[image] == num_classes).nonzero().flatten()
        number = min(neg_pos_ratio * int(positive.sum()), len(background))
        hardest = cost.detach()[background].argsort(descending=True, stable=True)
        mined = background[hardest[:number]]
        class_sum = cost[positive].sum() + cost[mined].sum()
        classification.append(class_sum / num_positives)

        distance = smooth_l1_loss(predicted[image], box_targets[image], box_weights[image], beta=beta, reduction="none")
        box.append(distance.sum() / (int(num_positives) + _EPS))

    class_losses = torch.stack(classification)
    box_losses = torch.stack(box)
    return {"total": class_losses.sum() + box_losses.sum(), "classification": class_losses, "box": box_losses}
