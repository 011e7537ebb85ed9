"""The anchor head on whole batches: every image, ground truth and anchor at once.

Trades memory, (B, G, A) overlaps, for having no loop over images or ground truths and no host synchronisation. The
random sampler is the exception: its seeded draw is defined on the host, one image after the other. An image without an
anchor inside trains nothing (the oracle raises); labels are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.implementations.batched import anchor_head_terms as terms
from detoracle.implementations.batched.anchor_head_boxes import Strides, decode, encode, inside_flags, valid_flags
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = [
    "assign",
    "loss",
    "sample",
    "ssd_loss",
    "targets",
]


# ------------------------------------------------------------------------------------------------------- assignment
@implements("anchor_head.assign", name="batched")
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
    """MaxIoU: ground truth of each anchor, (B, A); the last ground truth that claims an anchor keeps it."""
    low, high = (0.0, neg_iou_thr) if isinstance(neg_iou_thr, int | float) else neg_iou_thr
    if gt_boxes.shape[1] == 0:
        gt_index = torch.where(inside, BACKGROUND, IGNORED)
        return Assignment(gt_index, anchors.new_zeros(gt_index.shape))
    overlaps = terms.overlaps_mmdet(gt_boxes, anchors.expand(len(gt_boxes), -1, -1))
    if ignore_boxes is not None and ignore_valid is not None and ignore_iof_thr > 0 and ignore_boxes.shape[1]:
        covered = _covered(anchors, ignore_boxes, ignore_valid, ignore_wrt_candidates) > ignore_iof_thr
        overlaps = overlaps.masked_fill(covered[:, None], -1.0)
    overlaps = overlaps.masked_fill(~(gt_valid[..., None] & inside[:, None]), -math.inf)
    best, gt_index = overlaps.max(1)
    background = (best >= low) & (best < high)
    chosen = torch.where(best >= pos_iou_thr, gt_index, torch.where(background, BACKGROUND, IGNORED))
    if match_low_quality:
        most, first = overlaps.max(2, keepdim=True)
        numbers = torch.arange(len(anchors), device=anchors.device)
        claimed = overlaps == most if gt_max_assign_all else numbers == first
        claimed = claimed & (most >= min_pos_iou) & gt_valid[..., None] & inside[:, None]
        rows = torch.arange(1, gt_boxes.shape[1] + 1, device=anchors.device)[:, None]
        last = (claimed * rows).amax(1)
        chosen = torch.where(last > 0, last - 1, chosen)
    chosen = torch.where(gt_valid.any(1, keepdim=True), chosen, BACKGROUND)
    chosen = torch.where(inside, chosen, IGNORED)
    quality = overlaps.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    return Assignment(chosen, torch.where(chosen >= 0, quality, 0.0))


def _covered(anchors: Tensor, regions: Tensor, valid: Tensor, of_anchors: bool) -> Tensor:
    """Largest share (B, A) of an anchor, or of a region, that both have in common."""
    every = anchors.expand(len(regions), -1, -1)
    if of_anchors:
        share = terms.overlaps_mmdet(every, regions, mode="iof").transpose(1, 2)
    else:
        share = terms.overlaps_mmdet(regions, every, mode="iof")
    return share.masked_fill(~valid[..., None], 0.0).amax(1)


@implements("anchor_head.sample", name="batched")
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
    """Anchors that are trained, positive and background; the seeded draw goes image by image, on the host."""
    positive, negative = gt_index >= 0, gt_index == BACKGROUND
    added = positive[:, :0]
    if sampler == "pseudo":
        return positive, negative, added
    if add_gt_as_proposals and gt_valid is not None:
        added = gt_valid
    count = added.shape[1]
    positive = torch.cat([added, positive], dim=1)
    generator = torch.Generator().manual_seed(seed)
    positives, negatives = [], []
    for some_positive, some_negative in zip(positive, negative, strict=True):
        kept = _drawn(some_positive, int(num * pos_fraction), generator)
        taken = int(kept.sum())
        most = num - taken if neg_pos_ub < 0 else min(num - taken, int(neg_pos_ub * max(taken, 1)))
        positives.append(kept)
        negatives.append(_drawn(some_negative, most, generator))
    kept_positive = torch.stack(positives)
    return kept_positive[:, count:], torch.stack(negatives), kept_positive[:, :count]


def _drawn(mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
    marked = mask.nonzero()[:, 0]
    if len(marked) <= most:
        return mask
    keep = marked[torch.randperm(len(marked), generator=generator)[:most].to(marked.device)]
    return torch.zeros_like(mask).index_fill(0, keep, True)


# ------------------------------------------------------------------------------------------------- targets and loss
@implements("anchor_head.targets", name="batched")
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
    """Labels, weights and box targets of all anchors; one gather for all ground truths."""
    row = gt_index.clamp(min=0)
    if gt_boxes.shape[1]:
        matched = gt_boxes.gather(1, row[..., None].expand(-1, -1, 4))
        labels = torch.where(positive, gt_labels.gather(1, row).long(), num_classes)
    else:
        matched, labels = anchors.expand(len(gt_index), -1, -1), torch.full_like(gt_index, num_classes)
    wanted = matched if reg_decoded_bbox else encode(anchors, matched, means=means, stds=stds)
    box_targets = torch.where(positive[..., None], wanted, 0.0)
    one = torch.ones_like(box_targets)
    weight = pos_weight if pos_weight > 0 else 1.0
    label_weights = torch.where(positive, weight * one[..., 0], torch.where(negative, one[..., 0], 0.0))
    box_weights = torch.where(positive[..., None], one, 0.0)
    num_positives, num_negatives = (mask.sum(1).clamp(min=1).sum() for mask in (positive, negative))
    return labels, label_weights, box_targets, box_weights, num_positives, num_negatives


_ASSIGNER = (
    "pos_iou_thr",
    "neg_iou_thr",
    "min_pos_iou",
    "gt_max_assign_all",
    "match_low_quality",
    "ignore_iof_thr",
    "ignore_wrt_candidates",
)
_SAMPLER = ("seed", "num", "pos_fraction", "neg_pos_ub", "add_gt_as_proposals")


def _flat(level: Tensor, columns: int) -> Tensor:
    """(B, K*columns, H, W) to (B, H*W*K, columns)."""
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, columns)


def _assigned(
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    shapes: tuple[Tensor, Tensor],
    ignored: tuple[Tensor | None, Tensor | None],
    strides: Strides,
    allowed_border: float,
    settings: dict[str, Any],
) -> Tensor:
    valid = valid_flags(
        shapes[1],
        sizes=[tuple(level.shape[2:]) for level in bbox_preds],
        strides=strides,
        base_anchors=[level.shape[1] // 4 for level in bbox_preds],
    )
    inside = inside_flags(anchors, valid, shapes[0], allowed_border=allowed_border)
    chosen = {name: value for name, value in settings.items() if name in _ASSIGNER}
    return assign(anchors, gt_boxes, gt_valid, inside, *ignored, **chosen).gt_index


@implements("anchor_head.loss", name="batched")
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
    """Loss per level; the settings of the assignment and of the sampler are passed on to them."""
    columns = cls_scores[0].shape[1] // (bbox_preds[0].shape[1] // 4)
    shapes, ignored = (image_shapes, pad_shapes), (ignore_boxes, ignore_valid)
    gt_index = _assigned(bbox_preds, anchors, gt_boxes, gt_valid, shapes, ignored, strides, allowed_border, settings)
    samples = sampler == "random" and class_loss != "focal"
    drawing = {name: value for name, value in settings.items() if name in _SAMPLER}
    positive, negative, _ = sample(gt_index, sampler="random" if samples else "pseudo", **drawing)
    made = targets(
        anchors,
        gt_index,
        gt_boxes,
        gt_labels,
        positive,
        negative,
        num_classes=columns - 1 if class_loss == "cross_entropy" else columns,
        reg_decoded_bbox=reg_decoded_bbox,
        pos_weight=pos_weight,
        means=means,
        stds=stds,
    )
    divisor = made[4] + made[5] if samples else made[4]
    lengths = [level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in bbox_preds]
    per_level = zip(*(torch.split(target, lengths, dim=1) for target in made[:4]), strict=True)
    classification, box = [], []
    for scores, deltas, own, target in zip(
        cls_scores, bbox_preds, torch.split(anchors, lengths), per_level, strict=True
    ):
        labels, label_weights, box_targets, box_weights = (t.flatten(0, 1) for t in target)
        rows = {"weight": label_weights, "avg_factor": divisor, "loss_weight": class_loss_weight}
        logits = _flat(scores, columns).flatten(0, 1)
        if class_loss == "focal":
            term = terms.sigmoid_focal_loss(logits, labels, **rows, gamma=gamma, alpha=alpha)
        else:
            function = terms.cross_entropy if class_loss == "cross_entropy" else terms.sigmoid_cross_entropy
            term = function(logits, labels, **rows, class_weight=class_weight, ignore_index=ignore_index)
        classification.append(term)
        predicted = _flat(deltas, 4)
        if reg_decoded_bbox:
            predicted = decode(own, predicted, means=means, stds=stds)
        pairs = {"weight": box_weights, "avg_factor": divisor, "loss_weight": box_loss_weight}
        predicted = predicted.flatten(0, 1)
        if box_loss == "smooth_l1":
            box.append(terms.smooth_l1_loss(predicted, box_targets, **pairs, beta=beta))
        elif box_loss == "giou":
            box.append(terms.giou_loss(predicted, box_targets, **pairs, eps=eps))
        else:
            box.append(terms.l1_loss(predicted, box_targets, **pairs))
    parts = torch.stack(classification), torch.stack(box)
    return {"total": parts[0].sum() + parts[1].sum(), "classification": parts[0], "box": parts[1]}


@implements("anchor_head.ssd_loss", name="batched")
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
    """Loss per image with hard negatives, found by rank in one sort a batch."""
    columns = cls_scores[0].shape[1] // (bbox_preds[0].shape[1] // 4)
    shapes, ignored = (image_shapes, pad_shapes), (ignore_boxes, ignore_valid)
    settings = {"neg_iou_thr": 0.5, "gt_max_assign_all": False, **settings}
    gt_index = _assigned(bbox_preds, anchors, gt_boxes, gt_valid, shapes, ignored, strides, allowed_border, settings)
    labels, label_weights, box_targets, box_weights, divisor, _ = targets(
        anchors,
        gt_index,
        gt_boxes,
        gt_labels,
        gt_index >= 0,
        gt_index == BACKGROUND,
        num_classes=columns - 1,
        reg_decoded_bbox=reg_decoded_bbox,
        pos_weight=pos_weight,
        means=means,
        stds=stds,
    )
    logits = torch.cat([_flat(level, columns) for level in cls_scores], dim=1)
    predicted = torch.cat([_flat(level, 4) for level in bbox_preds], dim=1)
    if reg_decoded_bbox:
        predicted = decode(anchors, predicted, means=means, stds=stds)
    costs = terms.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)
    costs = costs * label_weights
    has_class, background = (labels >= 0) & (labels < columns - 1), labels == columns - 1
    order = costs.detach().masked_fill(~background, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(len(anchors), device=order.device).expand_as(order))
    number = torch.minimum(neg_pos_ratio * has_class.sum(1), background.sum(1))
    mined = background & (rank < number[:, None])
    classification = torch.where(has_class | mined, costs, 0.0).sum(1) / divisor
    distance = terms.smooth_l1_loss(predicted, box_targets, box_weights, beta=beta, reduction="none")
    box = distance.sum((1, 2)) / (divisor.to(torch.promote_types(distance.dtype, torch.float32)) + 2.0**-23)
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}
