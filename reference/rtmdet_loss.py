"""RTMDet's targets and losses: quality focal loss of the class logits, GIoU loss of the boxes.

Every prior trains its class logits towards the IoU that its prediction has with the assigned ground truth, in that
ground truth's class, and towards 0 elsewhere; positives also train their box, weighted by that same IoU. Both losses
are divided by the sum of those IoUs over all levels, averaged over the processes of a distributed run, and at least 1.

Stages, in the order data flows: `targets`, `qfl`, `giou_loss`, `mean_over_ranks`, `loss`. The second and third are in
`detoracle.reference.rtmdet_terms`, the assignment before them in `detoracle.reference.rtmdet`.
Source: OpenMMLab mmdetection 3.x (Apache-2.0), described from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from detoracle.reference.anchor_head_boxes import _stride_pairs, inside_flags, valid_flags
from detoracle.reference.assignment import IGNORED
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rtmdet import assign
from detoracle.reference.rtmdet_points import SOURCE, decode, priors
from detoracle.reference.rtmdet_terms import giou_loss, qfl

__all__ = ["giou_loss", "loss", "mean_over_ranks", "qfl", "targets"]


# --------------------------------------------------------------------------------------------------- 1. targets
@operation("rtmdet.targets", kind="values", source=SOURCE)
def targets(
    gt_index: Tensor,
    quality: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    num_classes: int,
    pos_weight: float = -1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each prior is trained towards.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        Ground truth of each prior, -1 for background, -2 for priors that do not take part (`assign`).
    quality : Tensor (B, A) float
        IoU of prediction and assigned ground truth (`assign`).
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    num_classes : int
        C, which as a label means background.
    pos_weight : float
        Weight of positives in the class loss, if above 0.

    Returns
    -------
    labels : Tensor (B, A) int
        Class of positives, C elsewhere.
    label_weights : Tensor (B, A) float
        1 for priors that take part (`pos_weight` for positives), else 0.
    box_targets : Tensor (B, A, 4) float
        Ground truth of positives in pixels, 0 elsewhere.
    assign_metrics : Tensor (B, A) float
        Quality of positives, 0 elsewhere.

    Examples
    --------
    >>> gt = torch.tensor([[[0.0, 0, 8, 8]]])
    >>> given = torch.tensor([[0, -1, -2]]), torch.tensor([[0.5, 0.0, 0.0]]), gt, torch.tensor([[6]])
    >>> labels, weights, _, metrics = targets(*given, num_classes=7, pos_weight=2.0)
    >>> labels.tolist(), weights.tolist(), metrics.tolist()
    ([[6, 7, 7]], [[2.0, 1.0, 0.0]], [[0.5, 0.0, 0.0]])
    """
    positive = gt_index >= 0
    rows = torch.where(positive, gt_index, gt_boxes.shape[1])  # the row added here is the background's
    labels = torch.cat([gt_labels, torch.full_like(gt_index[:, :1], num_classes)], dim=1).gather(1, rows)
    background = gt_boxes.new_zeros(len(gt_index), 1, 4)
    box_targets = torch.cat([gt_boxes, background], dim=1)[torch.arange(len(rows), device=rows.device)[:, None], rows]
    label_weights = (gt_index != IGNORED).to(gt_boxes.dtype)
    if pos_weight > 0:
        label_weights = torch.where(positive, pos_weight, label_weights)
    return labels, label_weights, box_targets, torch.where(positive, quality, 0.0)


# ------------------------------------------------------------------------------------------ 4. average over ranks
def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a number over the processes of the default group; the number itself where none is running.

    Parameters
    ----------
    value : Tensor () float
        This process's number. Every process of the group must call.

    Returns
    -------
    mean : Tensor () float

    Examples
    --------
    >>> mean_over_ranks(torch.tensor(3.0)).item()
    3.0
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    share = value / dist.get_world_size()
    dist.all_reduce(share)
    return share


# ------------------------------------------------------------------------------------------------------- 5. loss
@operation("rtmdet.loss", kind="loss", gradients=("class_logits", "distances"), source=SOURCE)
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
    """Training loss of a batch, per level, and its gradient to the head's outputs.

    In a distributed run (`torch.distributed`), every process must call it: the losses are divided by a mean over all.
    A level without positives has the box loss 0 times the sum of its boxes, so that gradients exist.

    Parameters
    ----------
    class_logits : list of Tensor (B, C, Hl, Wl) float
    distances : list of Tensor (B, 4, Hl, Wl) float
        To the left, top, right and bottom side, in pixels.
    strides : sequence of int or pairs of int
        Pixels a cell, one a level; a pair is horizontal, vertical, which must be equal.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    pad_shapes : Tensor (B, 2) int or None
        Height and width of each image with its padding, in pixels; without, the maps are covered.
    image_shapes : Tensor (B, 2) int or None
        Height and width of each image without padding; needed where `allowed_border` is 0 or more.
    gt_masks : Tensor (B, G, H, W) bool or None
        Instance masks, whose centres of mass then replace the boxes' centres.
    ignored_boxes : Tensor (B, I, 4) float or None
        Regions to be ignored. Accepted, and never read.
    offset : float
        Position of the prior within its cell, in cells.
    allowed_border : float
        Pixels that a prior may stick out of the image; below 0, all valid priors take part. Upstream compares the
        *strides* of a prior, not its point, with the right and bottom of the image, so that points beyond stay in.
    topk : int
        How many of the largest IoUs add up to a ground truth's number of claims.
    soft_center_radius : float
        Strides at which the distance cost is 1.
    iou_weight : float
        Weight of the IoU cost.
    pos_weight : float
        Weight of positives in the class loss, if above 0.
    beta : float
        Exponent of the quality focal loss.
    class_loss_weight : float
    box_loss_weight : float
    giou_eps : float
        Smallest area in the GIoU loss, in square pixels.

    Returns
    -------
    total : Tensor () float
        Sum of all.
    classification : Tensor (L,) float or None
        Quality focal loss, one a level.
    box : Tensor (L,) float or None
        GIoU loss, one a level.

    Raises
    ------
    UpstreamRaises
        ``rtmdet.unequal-strides``; ``rtmdet.no-valid-prior`` in any image, ``rtmdet.no-valid-prior-in-one-image``;
        ``rtmdet.label-out-of-range``; ``rtmdet.quality-dtype``.

    Examples
    --------
    >>> logits, distances = [torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss(logits, distances, [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> [round(float(part), 4) for part in parts.values()]
    [0.9277, 0.5688, 0.3589]
    """
    points, inside = _points(
        class_logits, distances, strides, gt_valid, pad_shapes, image_shapes, offset, allowed_border
    )
    boxes = decode(points[:, :2], _flatten(distances))
    logits = _flatten(class_logits)
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
    _require_valid_priors(inside)
    aims = _targets(
        assignment.gt_index,
        assignment.quality,
        gt_boxes,
        gt_labels,
        num_classes=logits.shape[-1],
        pos_weight=pos_weight,
    )
    weights = _Weights(beta, class_loss_weight, box_loss_weight, giou_eps)
    levels = _level_losses(logits, boxes, aims, [level[0, 0].numel() for level in class_logits], weights)
    return _normalised(levels, *(mean_over_ranks(factor) for factor in _average_factors(levels)))


class _Weights(NamedTuple):
    """Settings of the two losses."""

    beta: float
    classification: float
    box: float
    giou_eps: float


class _Level(NamedTuple):
    """Losses of one level before normalisation, and what it adds to the two average factors."""

    classification: Tensor
    box: Tensor
    class_part: Tensor
    box_part: Tensor


def _flatten(maps: Sequence[Tensor]) -> Tensor:
    """(B, C, H, W) maps to (B, A, C)."""
    return torch.cat([level.flatten(2).permute(0, 2, 1) for level in maps], dim=1)


def _points(
    class_logits: Sequence[Tensor],
    distances: Sequence[Tensor],
    strides: Sequence[int | Sequence[int]],
    gt_valid: Tensor,
    pad_shapes: Tensor | None,
    image_shapes: Tensor | None,
    offset: float,
    allowed_border: float,
) -> tuple[Tensor, Tensor]:
    """Check the maps; priors (A, 4), always float32 at least, and those that take part (B, A)."""
    sizes = [(level.shape[2], level.shape[3]) for level in class_logits]
    if [(level.shape[2], level.shape[3]) for level in distances] != sizes or not len(gt_valid):
        expected = f"maps of sizes {sizes}, for at least one image"
        got = f"{[tuple(level.shape) for level in distances]}"
        raise InputError("distances", expected=expected, got=got, where="rtmdet.loss")
    if any(x != y for x, y in _stride_pairs(strides, len(sizes), "rtmdet.loss")):
        raise UpstreamRaises(
            "rtmdet.unequal-strides", expected="equal strides along x and y", got=str(strides), where="rtmdet.loss"
        )
    dtype = torch.promote_types(distances[0].dtype, torch.float32)
    points = priors(sizes, strides, offset=offset, like=distances[0].new_zeros((), dtype=dtype))
    inside = gt_valid.new_ones(len(gt_valid), len(points))
    if pad_shapes is not None:
        inside = valid_flags(pad_shapes, sizes=sizes, strides=strides, base_anchors=[1] * len(sizes))
    if allowed_border >= 0:
        if image_shapes is None:
            raise InputError(
                "image_shapes", expected="image sizes with an allowed border", got="none", where="rtmdet.loss"
            )
        inside = inside_flags(points, inside, image_shapes, allowed_border=allowed_border)
    return points, inside


def _require_valid_priors(inside: Tensor) -> None:
    """Upstream gives up on an image without a valid prior in a way that its caller cannot unpack."""
    empty = ~inside.any(1)
    if empty.any():
        behaviour = "rtmdet.no-valid-prior" if empty.all() else "rtmdet.no-valid-prior-in-one-image"
        got = f"none in image {', '.join(map(str, empty.nonzero().flatten().tolist()))}"
        raise UpstreamRaises(behaviour, expected="a valid prior in every image", got=got, where="rtmdet.loss")


def _level_losses(
    logits: Tensor, boxes: Tensor, aims: Sequence[Tensor], sizes: list[int], weights: _Weights
) -> list[_Level]:
    """Losses of each level for given targets."""
    levels = []
    for maps in zip(*(torch.split(tensor, sizes, dim=1) for tensor in (logits, boxes, *aims)), strict=True):
        x, box, labels, label_weights, box_targets, metrics = (level.flatten(0, 1) for level in maps)
        classification = _qfl(
            x,
            metrics,
            labels,
            label_weights,
            beta=weights.beta,
            average_factor=1.0,
            loss_weight=weights.classification,
        )
        positive = labels < x.shape[1]
        box_loss = box.sum() * 0
        if positive.any():
            box_loss = _giou_loss(
                box[positive],
                box_targets[positive],
                metrics[positive],
                eps=weights.giou_eps,
                average_factor=1.0,
                loss_weight=weights.box,
            )
        levels.append(_Level(classification, box_loss, metrics.sum(), metrics[positive].sum()))
    return levels


def _average_factors(levels: Sequence[_Level]) -> tuple[Tensor, Tensor]:
    """What this process would divide its class and box losses by; they differ by a rounding at most."""
    return sum(level.class_part for level in levels), sum(level.box_part for level in levels)  # type: ignore[return-value]


def _normalised(levels: Sequence[_Level], class_factor: Tensor, box_factor: Tensor) -> dict[str, Tensor]:
    """Losses divided by the average factors, which are at least 1: limited after the mean over processes."""
    classification = torch.stack([level.classification for level in levels]) / class_factor.clamp(min=1)
    box = torch.stack([level.box for level in levels]) / box_factor.clamp(min=1)
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}


# The stages without the checks of their arguments, which bounded tensors do not pass.
_targets: Any = unchecked(targets)
_qfl: Any = unchecked(qfl)
_giou_loss: Any = unchecked(giou_loss)
