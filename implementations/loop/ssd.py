"""SSD as one would write it down from the paper: one image after the other, one ground truth after the other.

Arguments, results and their meaning are those of the operations in `detoracle.reference.ssd`. This is the plain
baseline that an optimised implementation is measured against, and a second opinion on what is right.

What differs from the oracle: arguments are not checked; an image without ground truth is background and has no hard
negatives, and a batch without any costs 0 (the oracle raises); a class that does not exist is PyTorch's own error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["decode", "encode", "hard_negatives", "jaccard", "log_sum_exp", "loss", "match", "priors"]


# ------------------------------------------------------------------------------------------------------- boxes
@implements("ssd.priors", name="loop")
def priors(
    *,
    image_size: int = 300,
    feature_maps: Sequence[int] = (38, 19, 10, 5, 3, 1),
    steps: Sequence[int] = (8, 16, 32, 64, 100, 300),
    min_sizes: Sequence[int] = (30, 60, 111, 162, 213, 264),
    max_sizes: Sequence[int] = (60, 111, 162, 213, 264, 315),
    aspect_ratios: Sequence[Sequence[float]] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    clip: bool = True,
    like: Tensor | None = None,
) -> Tensor:
    """Prior boxes (P, 4) cxcywh, one after the other: slow, and made only once."""
    boxes: list[list[float]] = []
    for level, cells in enumerate(feature_maps):
        cells_in_image = image_size / steps[level]
        small = min_sizes[level] / image_size
        large = math.sqrt(small * max_sizes[level] / image_size)
        for row in range(cells):
            for column in range(cells):
                x = (column + 0.5) / cells_in_image
                y = (row + 0.5) / cells_in_image
                boxes.append([x, y, small, small])
                boxes.append([x, y, large, large])
                for ratio in aspect_ratios[level]:
                    longer = small * math.sqrt(ratio)
                    shorter = small / math.sqrt(ratio)
                    boxes.append([x, y, longer, shorter])
                    boxes.append([x, y, shorter, longer])
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)
    result = torch.tensor(boxes, dtype=dtype, device=device)
    if clip:
        result = result.clamp(min=0, max=1)
    return result


@implements("ssd.jaccard", name="loop")
def jaccard(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """IoU of every box of the first set with every box of the second, (G, P), a row at a time."""
    overlap = boxes_a.new_zeros(len(boxes_a), len(boxes_b))
    areas_b = _area(boxes_b)
    for g, box in enumerate(boxes_a):
        left_top = torch.maximum(box[:2], boxes_b[:, :2])
        right_bottom = torch.minimum(box[2:], boxes_b[:, 2:])
        shared = (right_bottom - left_top).clamp(min=0)
        intersection = shared[:, 0] * shared[:, 1]
        union = _area(box) + areas_b - intersection
        overlap[g] = intersection / union
    return overlap


def _area(boxes: Tensor) -> Tensor:
    """Width times height of corner boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@implements("ssd.encode", name="loop")
def encode(gt_boxes: Tensor, priors: Tensor, *, variances: Sequence[float] = (0.1, 0.2)) -> Tensor:
    """Offsets from priors to their ground truths, (P, 4)."""
    gt_centre = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    gt_size = gt_boxes[:, 2:] - gt_boxes[:, :2]
    centre = (gt_centre - priors[:, :2]) / priors[:, 2:]
    log_size = torch.log(gt_size / priors[:, 2:])
    return torch.cat([centre / variances[0], log_size / variances[1]], dim=1)


@implements("ssd.decode", name="loop")
def decode(loc: Tensor, priors: Tensor, *, variances: Sequence[float] = (0.1, 0.2)) -> Tensor:
    """Boxes (B, P, 4) xyxy from predicted offsets, an image at a time."""
    images = []
    for offsets in loc:
        centre = priors[:, :2] + offsets[:, :2] * variances[0] * priors[:, 2:]
        size = priors[:, 2:] * torch.exp(offsets[:, 2:] * variances[1])
        left_top = centre - size / 2
        right_bottom = left_top + size
        images.append(torch.cat([left_top, right_bottom], dim=1))
    return torch.stack(images)


# ------------------------------------------------------------------------------------------------------- match
@implements("ssd.match", name="loop")
@torch.no_grad()
def match(
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    variances: Sequence[float] = (0.1, 0.2),
) -> Assignment:
    """Which ground truth each prior is trained towards, and the targets that follow, an image at a time."""
    gt_index = torch.full((len(gt_boxes), len(priors)), BACKGROUND, device=priors.device)
    class_target = torch.zeros_like(gt_index)
    quality = priors.new_zeros(gt_index.shape)
    loc_target = priors.new_zeros(*gt_index.shape, 4)
    corners = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], dim=1)
    for image in range(len(gt_boxes)):
        present = gt_valid[image].nonzero().flatten()
        if len(present) == 0:
            continue
        overlap = jaccard(gt_boxes[image, present], corners)

        best_overlap, best_gt = overlap.max(dim=0)
        taken = best_overlap >= threshold
        taken |= best_overlap.isnan()
        for g in range(len(present)):
            best_prior = overlap[g].argmax()
            best_gt[best_prior] = g
            taken[best_prior] = True

        label = gt_labels[image, present][best_gt]
        class_target[image, taken] = label[taken].long() + 1
        positive = class_target[image] > 0
        gt_index[image, positive] = present[best_gt[positive]]
        quality[image, positive] = overlap[best_gt[positive], positive]
        matched_boxes = gt_boxes[image, gt_index[image, positive]]
        loc_target[image, positive] = encode(matched_boxes, priors[positive], variances=variances)
    return Assignment(gt_index, quality, {"loc_target": loc_target, "class_target": class_target})


# ---------------------------------------------------------------------------------------------- hard negatives
@implements("ssd.log_sum_exp", name="loop")
def log_sum_exp(conf: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials (B, P), with one maximum for the whole batch, an image at a time."""
    largest = conf.max()
    images = []
    for logits in conf:
        exponentials = torch.exp(logits - largest)
        images.append(torch.log(exponentials.sum(dim=1)) + largest)
    return torch.stack(images)


@implements("ssd.hard_negatives", name="loop")
@torch.no_grad()
def hard_negatives(conf: Tensor, gt_index: Tensor, gt_labels: Tensor, *, neg_pos: int = 3) -> Assignment:
    """Background priors that train the class, an image at a time."""
    log_sums = log_sum_exp(conf)
    chosen = torch.full_like(gt_index, IGNORED, dtype=torch.int64)
    quality = torch.zeros_like(log_sums)
    for image in range(len(conf)):
        positive = gt_index[image] >= 0
        matched = gt_index[image, positive].long()
        positive[positive.clone()] = gt_labels[image, matched] >= 0

        mining_loss = log_sums[image] - conf[image, :, 0]
        mining_loss[positive] = 0
        ranking = mining_loss.argsort(descending=True, stable=True)
        number = neg_pos * int(positive.sum())
        number = min(number, len(ranking) - 1)
        hardest = ranking[:number]

        chosen[image, hardest] = BACKGROUND
        chosen[image, positive] = gt_index[image, positive].long()
        quality[image, hardest] = mining_loss[hardest]
    return Assignment(chosen, quality)


# -------------------------------------------------------------------------------------------------------- loss
@implements("ssd.loss", name="loop")
def loss(
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    neg_pos: int = 3,
    variances: Sequence[float] = (0.1, 0.2),
) -> dict[str, Tensor]:
    """MultiBox loss: total, localisation, classification; picks out what takes part, an image at a time."""
    matched = match(priors, gt_boxes, gt_labels, gt_valid, threshold=threshold, variances=variances)
    mined = hard_negatives(conf.detach(), matched.gt_index, gt_labels, neg_pos=neg_pos)
    localisation = loc.new_zeros(())
    classification = conf.new_zeros(())
    for image in range(len(loc)):
        positive = mined.gt_index[image] >= 0
        trained = mined.gt_index[image] != IGNORED
        loc_target = matched.extra["loc_target"][image, positive]
        class_target = matched.extra["class_target"][image, trained]
        offset_loss = F.smooth_l1_loss(loc[image, positive], loc_target, reduction="sum")
        class_loss = F.cross_entropy(conf[image, trained], class_target, reduction="sum")
        localisation = localisation + offset_loss
        classification = classification + class_loss

    positives = int(matched.positive.sum())
    if not gt_valid.any():
        positives = 1
    localisation = localisation / positives
    classification = classification / positives
    return {"total": localisation + classification, "localisation": localisation, "classification": classification}
