"""Margins of RTMDet's decisions, those of the assignment inside the loss included; bounds of its losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import rtmdet, rtmdet_head, rtmdet_loss
from detoracle.reference.contract import unchecked
from detoracle.reference.explain.explanation import Explanation
from detoracle.reference.explain.rtmdet_assignment import (
    _quality,
    _Scene,
    explain_assign,
    explain_candidates,
    explain_cost,
    explain_dynamic_k_matching,
)
from detoracle.reference.rounding import Bounded
from detoracle.reference.rtmdet_terms import _require_wide_logits

__all__ = [
    "explain_assign",
    "explain_candidates",
    "explain_cost",
    "explain_dynamic_k_matching",
    "explain_joint_logits",
    "explain_loss",
    "levels_given",
    "loss_given",
]

_decode: Any = unchecked(rtmdet.decode)


def explain_joint_logits(
    class_logits: Tensor, objectness_logits: Tensor, *, dtype: torch.dtype = torch.float32
) -> Bounded:
    """Explain `rtmdet.joint_logits`: its logits, with bounds.

    Returns
    -------
    Bounded
        (...).

    Examples
    --------
    >>> bool(explain_joint_logits(torch.zeros(3), torch.ones(3)).error.max() < 1e-5)
    True
    """
    inputs: Any = (Bounded.exact(class_logits, dtype), Bounded.exact(objectness_logits, dtype))
    joint: Any = rtmdet_head._inverse_sigmoid(rtmdet_head._geometric_mean(*inputs))
    bounded: Bounded = joint
    return bounded


def explain_loss(
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
    offset: float = 0.0,
    allowed_border: float = -1,
    topk: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
    dtype: torch.dtype = torch.float32,
    **_later: object,
) -> Explanation:
    """Explain the assignment inside `rtmdet.loss`, the rounding of the decoding included.

    Takes all arguments of the loss; those that come into play after the assignment are not read.

    Returns
    -------
    Explanation

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> logits, distances = [torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> explain_loss(logits, distances, [8], gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[-1, -1, -1, 0]]
    """
    points, inside = rtmdet_loss._points(
        class_logits, distances, strides, gt_valid, pad_shapes, image_shapes, offset, allowed_border
    )
    geometry = torch.promote_types(dtype, torch.float32)  # half distances from float32 points are float32 boxes
    boxes = _boxes(points, distances, geometry)
    logits = rtmdet_loss._flatten(class_logits)
    scene = _Scene(logits, boxes, points, gt_boxes, gt_labels, gt_masks, dtype, geometry)
    explanation = scene.explain(inside, gt_valid, topk, soft_center_radius, iou_weight, where="rtmdet.loss")
    rtmdet_loss._require_valid_priors(inside)
    _require_wide_logits(logits, torch.promote_types(points.dtype, gt_boxes.dtype), where="rtmdet.loss")
    return explanation


def _boxes(points: Tensor, distances: Sequence[Tensor], dtype: torch.dtype) -> Bounded:
    flat: Any = rtmdet_loss._flatten([Bounded.exact(level, dtype) for level in distances])
    boxes: Bounded = _decode(Bounded.exact(points, dtype)[:, :2], flat)
    return boxes


def loss_given(
    gt_index: Tensor,
    class_logits: Sequence[Tensor],
    distances: Sequence[Tensor],
    strides: Sequence[int | Sequence[int]],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    offset: float = 0.0,
    pos_weight: float = -1.0,
    beta: float = 2.0,
    class_loss_weight: float = 1.0,
    box_loss_weight: float = 2.0,
    giou_eps: float = 1e-6,
    average_factors: tuple[float, float] | None = None,
    dtype: torch.dtype | None = torch.float32,
    **_earlier: object,
) -> dict[str, Bounded]:
    """Loss of a given assignment, bounded; for a choice that rounding leaves open.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        The assignment; the rest as for `rtmdet.loss`, of which those that only decide the assignment are not read.
    average_factors : tuple of float, optional
        What the class and the box losses are divided by, if at least 1: the means over all processes. Without, those of
        this process alone.
    dtype : torch.dtype or None
        Dtype whose rounding is allowed for; None computes on the plain tensors, so that gradients flow.

    Returns
    -------
    dict of str to Bounded
        total, classification (L,), box (L,).

    Examples
    --------
    >>> logits, distances = [torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> label, matched = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[-1, -1, -1, 0]])
    >>> parts = loss_given(matched, logits, distances, [8], gt, label, one)
    >>> bool(parts["total"].error < 1e-5)
    True
    """
    levels = levels_given(
        gt_index,
        class_logits,
        distances,
        strides,
        gt_boxes,
        gt_labels,
        offset=offset,
        pos_weight=pos_weight,
        beta=beta,
        class_loss_weight=class_loss_weight,
        box_loss_weight=box_loss_weight,
        giou_eps=giou_eps,
        dtype=dtype,
    )
    factors: Any = rtmdet_loss._average_factors(levels)
    if average_factors is not None:
        factors = [torch.as_tensor(factor, device=gt_index.device) for factor in average_factors]
    parts: Any = rtmdet_loss._normalised(levels, *factors)
    return parts  # type: ignore[no-any-return]


def levels_given(
    gt_index: Tensor,
    class_logits: Sequence[Tensor],
    distances: Sequence[Tensor],
    strides: Sequence[int | Sequence[int]],
    gt_boxes: Any,
    gt_labels: Tensor,
    *,
    offset: float = 0.0,
    pos_weight: float = -1.0,
    beta: float = 2.0,
    class_loss_weight: float = 1.0,
    box_loss_weight: float = 2.0,
    giou_eps: float = 1e-6,
    dtype: torch.dtype | None = torch.float32,
    **_other: object,
) -> list[Any]:
    """Losses of each level before they are divided, for a given assignment.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        The assignment; the rest as for `loss_given`.

    Returns
    -------
    list of tuple of Bounded
        Per level: class loss, box loss, and what the level adds to the average factor of each.

    Examples
    --------
    >>> logits, distances = [torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]
    >>> gt, label, matched = torch.tensor([[[1.0, 1, 15, 15]]]), torch.tensor([[0]]), torch.tensor([[-1, -1, -1, 0]])
    >>> [level] = levels_given(matched, logits, distances, [8], gt, label)
    >>> level.class_part.value.item()
    0.765625
    """
    points, _ = rtmdet_loss._points(class_logits, distances, strides, gt_index >= 0, None, None, offset, -1)
    logits: Any = rtmdet_loss._flatten(class_logits)
    num_classes, sizes = logits.shape[-1], [level[0, 0].numel() for level in class_logits]
    if dtype is None:
        boxes: Any = _decode(points[:, :2], rtmdet_loss._flatten(distances))
        quality = _quality(boxes.detach(), gt_boxes, gt_index)
    else:
        geometry = torch.promote_types(dtype, torch.float32)
        logits, gt_boxes = Bounded.exact(logits, dtype), Bounded.exact(gt_boxes, geometry)
        boxes = _boxes(points, distances, geometry)
        quality = _quality(boxes, gt_boxes, gt_index)
    aims = rtmdet_loss._targets(gt_index, quality, gt_boxes, gt_labels, num_classes=num_classes, pos_weight=pos_weight)
    weights = rtmdet_loss._Weights(beta, class_loss_weight, box_loss_weight, giou_eps)
    return rtmdet_loss._level_losses(logits, boxes, aims, sizes, weights)
