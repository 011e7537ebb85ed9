"""RTMDet's assignment over the whole batch at once: padded, masked, of fixed shapes, never waiting for the device.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet`; the losses are in
`detoracle.implementations.batched.rtmdet_loss`. No image and no ground truth has a Python iteration of its own, no
value is read back to the host and no shape depends on the data, so that every function compiles into one graph.

What makes it fast:

- the soft label of a pair differs from 0 in the ground truth's class alone: what all other classes cost is summed once
  for each prior, so that the class cost needs (B, C, A) + (B, G, A) logarithms and not (B, G, A, C);
- a ground truth claims at most top-k priors, so one top-k of the costs replaces sorting them.

What differs from the oracle: arguments are not checked; a ground truth of a class that does not exist takes no part
(the oracle raises); among equal costs, top-k chooses. Two infinite logits of one prior make its costs NaN (infinite).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.batched.anchor_head_terms import overlaps_mmdet
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "candidates", "cost", "decode", "dynamic_k_matching", "encode", "priors"]

_UNMATCHED_OVERLAP = -1e8


# ------------------------------------------------------------------------------------------------------ priors, boxes
@implements("rtmdet.priors", name="batched")
def priors(
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int | Sequence[int]],
    *,
    offset: float = 0.0,
    like: Tensor | None = None,
) -> Tensor:
    """Points and strides (A, 4) of all cells, made where `like` is, level by level."""
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)
    levels = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        stride_x, stride_y = (stride, stride) if isinstance(stride, int) else stride
        index = torch.arange(height * width, device=device)
        x, y = (index % width + offset) * stride_x, (index // width + offset) * stride_y
        levels.append(torch.stack([x, y, torch.full_like(x, stride_x), torch.full_like(y, stride_y)], dim=1))
    return torch.cat(levels).to(dtype)


@implements("rtmdet.decode", name="batched")
def decode(points: Tensor, distances: Tensor, *, max_shape: Sequence[int] | None = None) -> Tensor:
    """Boxes (..., A, 4) at distances from points; clips one coordinate at a time."""
    boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
    if max_shape is None:
        return boxes
    height, width = max_shape
    left, top, right, bottom = boxes.unbind(-1)
    sides = (left.clamp(0, width), top.clamp(0, height), right.clamp(0, width), bottom.clamp(0, height))
    return torch.stack(sides, dim=-1)


@implements("rtmdet.encode", name="batched")
def encode(points: Tensor, boxes: Tensor, *, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    """Distances (..., A, 4) from points to the sides of boxes."""
    distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
    return distances if max_distance is None else distances.clamp(0, max_distance - eps)


# --------------------------------------------------------------------------------------------------------------- cost
@implements("rtmdet.candidates", name="batched")
def candidates(priors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> Tensor:
    """Priors inside some ground truth (B, A), from one mask of all pairs."""
    x, y = priors[:, 0], priors[:, 1]
    left, top, right, bottom = gt_boxes[..., None, :].unbind(-1)
    in_gt = (x > left) & (y > top) & (x < right) & (y < bottom)
    return inside & (in_gt & gt_valid[..., None]).any(1)


@implements("rtmdet.cost", name="batched")
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
    """Cost and IoU of every pair, (B, G, A); inf and 0 for padding and for priors that are no candidates."""
    total, iou = _cost(
        class_logits.mT,
        boxes,
        priors,
        gt_boxes,
        gt_labels,
        _centers(gt_boxes, gt_masks),
        soft_center_radius,
        iou_weight,
    )
    excluded = ~_pairs(candidate, _with_class(gt_labels, gt_valid, class_logits.shape[-1]))
    return total.to(iou.dtype).masked_fill(excluded, torch.inf), iou.masked_fill(excluded, 0.0)


def _with_class(gt_labels: Tensor, gt_valid: Tensor, num_classes: int) -> Tensor:
    """Ground truths (B, G) whose class exists."""
    return gt_valid & (gt_labels >= 0) & (gt_labels < num_classes)


def _pairs(candidate: Tensor, gt_valid: Tensor) -> Tensor:
    """Pairs (B, G, A) of a candidate and a ground truth that is no padding."""
    return candidate[:, None] & gt_valid[..., None]


def _centers(gt_boxes: Tensor, gt_masks: Tensor | None) -> Tensor:
    """Centres (B, G, 2) of boxes, or of mass of masks, whose columns and rows are summed first."""
    if gt_masks is None:
        return (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    along_x, along_y = (gt_masks.sum(side, dtype=torch.float32) for side in (-2, -1))
    mass = along_x.sum(-1) + 1e-6
    means = [
        (along * torch.arange(along.shape[-1], device=along.device)).sum(-1) / mass for along in (along_x, along_y)
    ]
    return torch.stack(means, dim=-1)


def _cost(
    class_logits: Tensor,
    boxes: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    centers: Tensor,
    soft_center_radius: float,
    iou_weight: float,
) -> tuple[Tensor, Tensor]:
    """Cost and IoU (B, G, A) of every pair whatsoever; logits are (B, C, A)."""
    iou = overlaps_mmdet(gt_boxes, boxes)
    x, y, stride, _ = priors.unbind(-1)
    distance = torch.sqrt((x - centers[..., :1]) ** 2 + (y - centers[..., 1:]) ** 2) / stride
    iou_cost = -torch.log(iou + 1e-7) * iou_weight
    return _class_cost(class_logits, gt_labels, iou) + iou_cost + 10.0 ** (distance - soft_center_radius), iou


def _class_cost(class_logits: Tensor, gt_labels: Tensor, iou: Tensor) -> Tensor:
    """Quality focal loss over all classes of each pair, (B, G, A), from logits (B, C, A).

    What every class costs a prior as "another class" is summed once, and each ground truth takes that of its own class
    off again. Where that one is most of the sum, nothing but rounding error would be left: the largest is therefore
    kept out of the sum.
    """
    as_other = (class_logits - F.logsigmoid(class_logits)) * torch.sigmoid(class_logits) ** 2
    largest, its_class = (t[:, None] for t in as_other.max(1))
    smaller = as_other.scatter(1, its_class, 0.0).sum(1, keepdim=True)

    label = gt_labels.long().clamp(0, class_logits.shape[1] - 1)[..., None].expand_as(iou)
    others = torch.where(label == its_class, smaller, largest + (smaller - as_other.gather(1, label)))
    own = class_logits.gather(1, label)
    return others + ((1 - iou) * own - F.logsigmoid(own)) * (iou - torch.sigmoid(own)) ** 2


# ----------------------------------------------------------------------------------------------------------- matching
@implements("rtmdet.dynamic_k_matching", name="batched")
def dynamic_k_matching(
    cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor, *, topk: int = 13
) -> tuple[Tensor, Tensor]:
    """Ground truth of each prior, (B, A), and number of claims of each ground truth, (B, G)."""
    gt_index, _, dynamic_k = _match(cost, iou, _pairs(candidate, gt_valid), topk)
    return gt_index, dynamic_k


def _match(cost: Tensor, iou: Tensor, eligible: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth and IoU (B, A) of each prior, and numbers of claims (B, G); only eligible pairs (B, G, A) count."""
    images, ground_truths, anchors = cost.shape
    if not ground_truths:
        nothing = torch.full((images, anchors), BACKGROUND, device=cost.device)
        return nothing, iou.new_zeros(images, anchors), nothing[:, :0]
    most = min(topk, anchors)
    best = iou.masked_fill(~eligible, 0.0).topk(most, sorted=False).values.sum(-1)
    dynamic_k = best.nan_to_num(nan=1.0).long().clamp(min=1).where(eligible.any(-1), 0)

    # Costs of eligible pairs are often infinite and may be NaN, which is the dearest; NaN comes last in `topk`.
    dearest = torch.finfo(cost.dtype).max
    ordered = cost.nan_to_num(nan=torch.inf, posinf=dearest).masked_fill(~eligible, torch.nan)
    cheapest = ordered.topk(max(most, 1), largest=False).indices
    within = torch.arange(cheapest.shape[-1], device=cost.device) < dynamic_k[..., None]
    claims = torch.zeros_like(eligible).scatter(2, cheapest, within)

    # Among ground truths, however, NaN is the cheapest, and of those at infinity an eligible one comes before padding.
    cheapest_of_all = cost.clamp(max=dearest).masked_fill(~eligible, torch.inf).argmin(1)
    claimants = claims.sum(1)
    winner = torch.where(claimants > 1, cheapest_of_all, claims.byte().argmax(1))
    assigned = claimants > 0
    quality = iou.gather(1, winner[:, None])[:, 0].where(assigned, 0.0)
    return winner.where(assigned, BACKGROUND), quality, dynamic_k


@implements("rtmdet.assign", name="batched")
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
    """Dynamic soft label assignment of all pairs at once, which costs memory for pairs that are never candidates.

    Examples
    --------
    >>> points, one = priors([(2, 2)], [8]), torch.ones(1, 1, dtype=torch.bool)
    >>> boxes, gt = decode(points[:, :2], torch.full((1, 4, 4), 8.0)), torch.tensor([[[1.0, 1, 15, 15]]])
    >>> label = torch.zeros(1, 1, dtype=torch.int64)
    >>> assign(torch.zeros(1, 4, 2), boxes, points, one.expand(1, 4), gt, label, one).gt_index.tolist()
    [[-1, -1, -1, 0]]
    """
    counted, centers = _with_class(gt_labels, gt_valid, class_logits.shape[-1]), _centers(gt_boxes, gt_masks)
    pair_cost, iou = _cost(class_logits.mT, boxes, priors, gt_boxes, gt_labels, centers, soft_center_radius, iou_weight)
    eligible = _pairs(candidates(priors, inside, gt_boxes, counted), counted)
    gt_index, quality, dynamic_k = _match(pair_cost, iou, eligible, topk)
    unmatched = torch.where(eligible.flatten(1).any(1, keepdim=True), _UNMATCHED_OVERLAP, 0.0).to(quality.dtype)
    extra = {"dynamic_k": dynamic_k, "max_overlaps": torch.where(gt_index >= 0, quality, unmatched)}
    return Assignment(torch.where(inside, gt_index, IGNORED), quality, extra)
