"""RTMDet's targets and losses over the whole batch at once: of fixed shapes, and without waiting for the device.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet_loss` and
`detoracle.reference.rtmdet_head`; the assignment before them is in `detoracle.implementations.batched.rtmdet`.

What makes it fast:

- a batch has at most top-k positives a ground truth, so the box loss is computed for a list of that fixed length;
- every class of every prior costs what background costs, but for one class of each positive, which overwrites it: the
  class loss needs no (B, A, C) targets;
- channels stay before priors: head maps are joined without transposing them.

What differs from the oracle: arguments are not checked; half-precision logits are computed with in float32, and an
image without a valid prior trains nothing (the oracle raises in both).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.batched.anchor_head_boxes import inside_flags, valid_flags
from detoracle.implementations.batched.anchor_head_terms import overlaps_mmdet
from detoracle.implementations.batched.rtmdet import assign, decode, priors
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import IGNORED

__all__ = ["giou_loss", "joint_logits", "loss", "qfl", "targets"]

_AVERAGE_EPS = 2.0**-23  # beside an average factor
_LOGIT_EPS = 1e-5


# -------------------------------------------------------------------------------------------------------- logits
@implements("rtmdet.joint_logits", name="batched")
def joint_logits(class_logits: Tensor, objectness_logits: Tensor) -> Tensor:
    """Logit of the geometric mean of two probabilities (...); masks where it is 0: a square root has no slope there."""
    product = torch.sigmoid(class_logits) * torch.sigmoid(objectness_logits)
    nothing = product == 0
    mean = product.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)
    return torch.log(mean.clamp(min=_LOGIT_EPS) / (1 - mean).clamp(min=_LOGIT_EPS))


# ------------------------------------------------------------------------------------------------------- targets
@implements("rtmdet.targets", name="batched")
def targets(
    gt_index: Tensor,
    quality: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    num_classes: int,
    pos_weight: float = -1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, label weights, boxes and qualities of all priors; those without ground truth look up a row of padding."""
    positive = gt_index >= 0
    row = gt_index.long().where(positive, gt_boxes.shape[1])
    labels = F.pad(gt_labels, (0, 1), value=num_classes).gather(1, row)
    box_targets = F.pad(gt_boxes, (0, 0, 0, 1)).take_along_dim(row[..., None], 1)
    return labels, _label_weights(gt_index, pos_weight, gt_boxes), box_targets, quality.where(positive, 0.0)


def _label_weights(gt_index: Tensor, pos_weight: float, like: Tensor) -> Tensor:
    """Weights (B, A) of priors in the class loss."""
    weights = (gt_index != IGNORED).to(like.dtype)
    return weights.masked_fill(gt_index >= 0, pos_weight) if pos_weight > 0 else weights


# --------------------------------------------------------------------------------------------------------- terms
@implements("rtmdet.qfl", name="batched")
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
    """Quality focal loss (N,) or (); with labels, one entry a row is overwritten, and no targets are written out."""
    if labels is None:
        entries = _focal(predicted, quality, activated, beta)
    else:
        label = labels.long().clamp(0, predicted.shape[1] - 1)
        own_quality = quality.where(label == labels, 0.0)[:, None]
        own = _focal(predicted.gather(1, label[:, None]), own_quality, activated, beta)
        entries = _focal(predicted, _zeros(predicted), activated, beta).scatter(1, label[:, None], own)
    return _reduced(entries.sum(1), weight, reduction, average_factor, loss_weight)


def _focal(predicted: Tensor, target: Tensor, activated: bool, beta: float) -> Tensor:
    """Quality focal loss of every entry."""
    if activated:
        entropy, probability = F.binary_cross_entropy(predicted, target, reduction="none"), predicted
    else:
        entropy = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        probability = torch.sigmoid(predicted)
    return entropy * torch.abs(target - probability) ** beta


def _zeros(like: Tensor) -> Tensor:
    """As many zeros, which take no memory."""
    return like.new_zeros(()).expand_as(like)


def _reduced(
    rows: Tensor, weight: Tensor | None, reduction: str, average_factor: float | None, loss_weight: float
) -> Tensor:
    rows = rows if weight is None else rows * weight
    if reduction == "none":
        return loss_weight * rows
    if average_factor is not None:
        return loss_weight * (rows.sum() / (average_factor + _AVERAGE_EPS))
    return loss_weight * (rows.mean() if reduction == "mean" else rows.sum())


@implements("rtmdet.giou_loss", name="batched")
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
    """1 - GIoU (N,) or (); computes what is returned if no weight is above 0 as well, and chooses without waiting."""
    if weight is None or reduction == "none":
        return _reduced(_giou_rows(predicted, target, eps), _one_a_row(weight), reduction, average_factor, loss_weight)
    weighted = (weight > 0).any()
    rows = _giou_rows(predicted.where(weighted, target), target, eps)
    value = _reduced(rows, _one_a_row(weight), reduction, average_factor, loss_weight)
    return value.where(weighted, (predicted * (weight[:, None] if weight.ndim == 1 else weight)).sum())


def _giou_rows(predicted: Tensor, target: Tensor, eps: float) -> Tensor:
    return 1 - overlaps_mmdet(predicted, target, mode="giou", aligned=True, eps=eps)


def _one_a_row(weight: Tensor | None) -> Tensor | None:
    return weight.mean(-1) if weight is not None and weight.ndim == 2 else weight


# ---------------------------------------------------------------------------------------------------------- loss
@implements("rtmdet.loss", name="batched")
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
    """Training loss of a batch: total, and classification and box of each level; lists positives to train boxes.

    Examples
    --------
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, label = ([torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]), torch.zeros(1, 1, dtype=torch.int64)
    >>> [round(float(part), 4) for part in loss(*maps, [8], gt, label, one).values()]
    [0.9277, 0.5688, 0.3589]
    """
    sizes = [tuple(level.shape[2:]) for level in class_logits]
    lengths = [height * width for height, width in sizes]
    dtype = torch.promote_types(distances[0].dtype, torch.float32)
    points = priors(sizes, strides, offset=offset, like=distances[0].new_zeros((), dtype=dtype))
    inside = gt_valid.new_ones(len(gt_valid), len(points))
    if pad_shapes is not None:
        inside = valid_flags(pad_shapes, sizes=sizes, strides=strides, base_anchors=[1] * len(sizes))
    if image_shapes is not None:
        inside = inside_flags(points, inside, image_shapes, allowed_border=allowed_border)

    logits = torch.cat([level.flatten(2) for level in class_logits], dim=2).to(dtype)
    boxes = decode(points[:, :2], torch.cat([level.flatten(2) for level in distances], dim=2).mT)
    assignment = assign(
        logits.mT,
        boxes,
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

    anchor, listed = _listed(assignment.positive, max(topk, 1) * gt_boxes.shape[1])
    matched = assignment.gt_index.gather(1, anchor).clamp(min=0)
    quality = assignment.quality.gather(1, anchor)
    label = gt_labels.long().gather(1, matched).clamp(0, logits.shape[1] - 1)
    entries = _focal(logits, _zeros(logits), False, beta).flatten(1)
    place = label * len(points) + anchor
    own = _focal(logits.flatten(1).gather(1, place), quality, False, beta)
    rows = entries.scatter_(1, place, own).view_as(logits).sum(1)
    rows = rows * _label_weights(assignment.gt_index, pos_weight, gt_boxes)
    classification = torch.stack([level.sum() for level in torch.split(rows, lengths, dim=1)]) / (1 + _AVERAGE_EPS)

    gt_box = gt_boxes.take_along_dim(matched[..., None], 1)
    box = _box_losses(boxes, lengths, anchor, listed, gt_box, quality, box_loss_weight, giou_eps)
    average_factor = _mean_over_ranks(assignment.quality.sum()).clamp(min=1)
    classification, box = class_loss_weight * classification / average_factor, box / average_factor
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}


def _listed(positive: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Anchors (B, P) of a mask (B, A), in order, filled up with others to a fixed P; and which are of it, (B, P)."""
    images, anchors = positive.shape
    after_positives = positive.sum(1, keepdim=True) + (~positive).cumsum(1)
    place = torch.where(positive, positive.cumsum(1), after_positives) - 1
    every = torch.arange(anchors, device=positive.device).expand(images, -1)
    anchor = torch.empty_like(place).scatter(1, place, every)[:, :most]
    return anchor, positive.gather(1, anchor)


def _box_losses(
    boxes: Tensor,
    lengths: list[int],
    anchor: Tensor,
    listed: Tensor,
    gt_box: Tensor,
    quality: Tensor,
    loss_weight: float,
    eps: float,
) -> Tensor:
    """GIoU loss of each level (L,), not yet averaged, from all boxes (B, A, 4) and the listed anchors (B, P)."""
    ends = torch.arange(len(lengths), device=boxes.device)
    level_of = torch.cat([end.expand(length) for end, length in zip(ends, lengths, strict=True)])[anchor]
    in_level = listed & (level_of == ends[:, None, None])
    populated, weighted = in_level.flatten(1).any(1), (in_level & (quality > 0)).flatten(1).any(1)

    chosen = boxes.take_along_dim(anchor[..., None], 1)
    trained = (listed & weighted[level_of])[..., None]
    rows = _giou_rows(chosen.where(trained, 1.0), gt_box.where(trained, 1.0), eps) * quality
    value = loss_weight * rows.where(in_level, 0.0).sum((1, 2)) / (1 + _AVERAGE_EPS)
    unweighted = (chosen * quality[..., None]).sum(-1).where(in_level, 0.0).sum((1, 2))
    nothing = torch.stack([level.sum() for level in torch.split(boxes, lengths, dim=1)]) * 0
    return value.where(weighted, unweighted.where(populated, nothing))


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over the processes of a distributed run, of which every one must call."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    share = value / dist.get_world_size()
    dist.all_reduce(share)
    return share
