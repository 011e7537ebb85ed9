"""The anchor head's assignment, sampling and targets, written down plainly: one image, one ground truth at a time.

Arguments, results and their meaning are those of the operations in `detoracle.reference.anchor_head`; the boxes are in
`detoracle.implementations.loop.anchor_head_boxes`, the losses in `detoracle.implementations.loop.anchor_head_loss`.
This is the plain baseline that an optimised implementation is measured against, and a second opinion on what is right.

What differs from the oracle: arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.implementations.loop.anchor_head_boxes import encode, overlaps_mmdet
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "sample", "targets"]


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
                    share = overlaps_mmdet(boxes, region.expand_as(boxes), mode="iof", aligned=True)
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
