"""Margins of YOLOX's decisions: candidate geometry, dynamic k, claims, conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import yolox, yolox_cost, yolox_loss
from detoracle.reference.assignment import Assignment
from detoracle.reference.boxes import iou_yolox
from detoracle.reference.contract import unchecked
from detoracle.reference.explain.dynamic_k import dynamic_k_world
from detoracle.reference.explain.explanation import Explanation, World, background_world, worlds_of
from detoracle.reference.rounding import Bounded, Decision

__all__ = [
    "explain_assign",
    "explain_candidates",
    "explain_cost",
    "explain_dynamic_k_matching",
    "explain_loss",
    "loss_given",
]


def explain_candidates(
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    dtype: torch.dtype = torch.float32,
) -> tuple[Decision, Decision]:
    """Explain `yolox.candidates`: its two masks, with margins.

    Returns
    -------
    tuple of Decision
        candidate (B, A) and geometry (B, G, A).

    Examples
    --------
    >>> points, strides = torch.tensor([[4.0, 4.0]]), torch.tensor([8.0])
    >>> near, _ = explain_candidates(points, strides, torch.tensor([[[8.0, 8, 8, 8]]]), torch.ones(1, 1).bool())
    >>> near.value.tolist(), near.margin.tolist()
    ([[True]], [[inf]])
    """
    points, strides, boxes = (Bounded.exact(t, dtype) for t in (anchor_points, anchor_strides, gt_boxes))
    rules = yolox_cost.FLAVOURS[flavour]
    images = [yolox_cost._candidates(points, strides, boxes[image], rules) for image in range(len(gt_valid))]
    near, preferred = zip(*images, strict=True)
    candidate: Any = (torch.stack(near) & gt_valid[..., None]).any(1)
    geometry: Any = torch.stack(preferred) & gt_valid[..., None]
    return candidate, geometry


def explain_cost(
    predictions: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    candidate: Tensor,
    geometry: Tensor,
    *,
    flavour: str = "tutorial",
    dtype: torch.dtype = torch.float32,
) -> tuple[Bounded, Bounded]:
    """Explain `yolox.cost`: its costs and IoUs, with bounds.

    Returns
    -------
    tuple of Bounded
        cost and iou, both (B, G, A).

    Examples
    --------
    >>> predictions, one = torch.tensor([[[8.0, 8, 16, 16, 20, 20]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> label = torch.zeros(1, 1, dtype=torch.int64)
    >>> total, _ = explain_cost(predictions, torch.tensor([[[8.0, 8, 16, 16]]]), label, one, one, one[None])
    >>> bool(total.error.max() < 1e-5)
    True
    """
    shape = (*gt_valid.shape, predictions.shape[1])
    full = [torch.full(shape, fill, dtype=torch.float64, device=gt_valid.device) for fill in (math.inf, 0.0, 0.0, 0.0)]
    bounded, boxes = Bounded.exact(predictions, dtype), Bounded.exact(gt_boxes, dtype)
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        explained: Any = yolox_cost._cost(
            bounded[image, near],
            boxes[image, valid],
            gt_labels[image, valid],
            geometry[image, valid][:, near],
            yolox_cost.FLAVOURS[flavour],
            where=f"yolox.cost, image {image}",
        )
        (pair_cost, pair_iou), pairs = explained, valid[:, None] & near[None]
        for target, source in zip(
            full, (pair_cost.value, pair_iou.value, pair_cost.error, pair_iou.error), strict=True
        ):
            target[image, pairs] = source.flatten()
    precision = bounded.precision
    return Bounded(full[0], full[2], precision), Bounded(full[1], full[3], precision)


def explain_assign(
    predictions: Tensor | Bounded,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `yolox.assign`: same arguments, and the dtype whose rounding is to be allowed for.

    Returns
    -------
    Explanation
        Per image the admissible outcomes, with the margins of the decisions behind them.

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> _, points, strides = yolox.anchor_grid([(2, 2)], [8], like=torch.zeros(()))
    >>> predictions, one = yolox.decode([torch.zeros(1, 6, 2, 2)], [8]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt, label = torch.tensor([[[4.0, 4, 8, 8]]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> explain_assign(predictions, points, strides, gt, label, one).ambiguous.any().item()
    False
    """
    bounded = predictions if isinstance(predictions, Bounded) else Bounded.exact(predictions, dtype)
    points, strides, boxes = (Bounded.exact(t, dtype) for t in (anchor_points, anchor_strides, gt_boxes))
    rules = yolox_cost.FLAVOURS[flavour]
    counted = yolox.counted_ground_truths(gt_boxes, gt_labels, gt_valid, flavour=flavour)
    num_anchors, worlds = len(anchor_points), []
    for image, valid in enumerate(counted):
        if not valid.any():
            worlds.append((background_world(num_anchors, valid.device),))
            continue
        decided: Any = yolox_cost._candidates(points, strides, boxes[image, valid], rules)
        near, preferred = decided
        yolox._require_candidates(near.value.any(0), where=f"yolox.assign, image {image}")

        def world(candidate: Tensor, image: int = image, valid: Tensor = valid, preferred: Any = preferred) -> World:
            if not candidate.any():
                return background_world(num_anchors, candidate.device)
            cost, iou = yolox_cost._cost(
                bounded[image, candidate],
                boxes[image, valid],
                gt_labels[image, valid],
                preferred[:, candidate],
                rules,
                where=f"yolox.assign, image {image}",
            )
            return dynamic_k_world(cost, iou, candidate, valid, top=yolox._TOP_CANDIDATES)  # type: ignore[arg-type]

        worlds.append(worlds_of(near.any(0), world))  # type: ignore[arg-type]
    return Explanation(tuple(worlds), lambda gt_index: _quality(bounded, boxes, gt_index))


def explain_dynamic_k_matching(
    cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor, *, dtype: torch.dtype = torch.float32
) -> Explanation:
    """Explain `yolox.dynamic_k_matching`, whose costs and IoUs are taken as given, without error.

    Returns
    -------
    Explanation
        Only exact ties, and IoU sums next to an integer, are open.

    Examples
    --------
    >>> cost, iou = torch.tensor([[[1.0, 1.0, 9.0]]]), torch.tensor([[[0.7, 0.1, 0.1]]])
    >>> every = torch.ones(1, 3, dtype=torch.bool)
    >>> explain_dynamic_k_matching(cost, iou, every, every[:, :1]).ambiguous.tolist()
    [[True, True, False]]
    """
    worlds = []
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        if not valid.any():
            worlds.append((background_world(len(near), near.device),))
            continue
        yolox._require_candidates(near, where=f"yolox.dynamic_k_matching, image {image}")
        pair_cost, pair_iou = (Bounded.exact(t[image, valid][:, near], dtype) for t in (cost, iou))
        worlds.append((dynamic_k_world(pair_cost, pair_iou, near, valid, top=yolox._TOP_CANDIDATES),))
    exact = Bounded.exact(iou, dtype)
    return Explanation(tuple(worlds), lambda gt_index: yolox._matched_iou(gt_index, exact))  # type: ignore[arg-type,return-value]


def _quality(predictions: Bounded, gt_boxes: Bounded, gt_index: Tensor) -> Bounded:
    """IoU (B, A) that an assignment implies."""
    images = []
    for image, matched in enumerate(gt_index):
        quality = Bounded.exact(torch.zeros(len(matched), device=matched.device), torch.float32)
        quality = Bounded(quality.value, quality.error, predictions.precision)
        anchors = (matched >= 0).nonzero().flatten()
        if len(anchors):
            used, row = matched[anchors].unique(return_inverse=True)
            iou: Any = unchecked(iou_yolox)(gt_boxes[image, used], predictions[image, anchors, :4])
            column = torch.arange(len(anchors), device=row.device)
            quality.value[anchors], quality.error[anchors] = iou.value[row, column], iou.error[row, column]
        images.append(quality)
    return torch.stack(images)  # type: ignore[arg-type,return-value]


def explain_loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    use_l1: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain the assignment inside `yolox.loss`, the rounding of the decoding included.

    Returns
    -------
    Explanation

    Examples
    --------
    >>> gt, one = torch.tensor([[[4.0, 4, 8, 8]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> explain_loss([torch.zeros(1, 6, 2, 2)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1, -1, -1]]
    """
    predictions = yolox._decode([Bounded.exact(level, dtype) for level in raw], strides)
    _, points, anchor_strides = yolox.anchor_grid(
        [(level.shape[2], level.shape[3]) for level in raw], strides, like=gt_boxes
    )
    return explain_assign(
        predictions, points, anchor_strides, gt_boxes, gt_labels, gt_valid, flavour=flavour, dtype=dtype
    )


def loss_given(
    gt_index: Tensor,
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    use_l1: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> dict[str, Any]:
    """Loss of a given assignment, bounded; for a choice that rounding leaves open.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        The assignment; the rest as for `yolox.loss`.
    dtype : torch.dtype or None
        Dtype whose rounding is allowed for; None computes on the plain tensors, so that gradients flow.

    Returns
    -------
    dict of str to Bounded
        total, box, objectness, classification, and l1 if asked for.

    Examples
    --------
    >>> gt, one = torch.tensor([[[4.0, 4, 8, 8]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> label, matched = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0, -1, -1, -1]])
    >>> parts = loss_given(matched, [torch.zeros(1, 6, 2, 2)], [8], gt, label, one)
    >>> bool(parts["total"].error < 1e-5)
    True
    """
    maps = [Bounded.exact(level, dtype) for level in raw] if dtype else list(raw)
    boxes = Bounded.exact(gt_boxes, dtype) if dtype else gt_boxes
    predictions = yolox._decode(maps, strides)
    cells, _, anchor_strides = yolox.anchor_grid(
        [(level.shape[2], level.shape[3]) for level in raw], strides, like=gt_boxes
    )
    exact = predictions if dtype else Bounded.exact(predictions, torch.float64)
    quality = _quality(exact, boxes if dtype else Bounded.exact(gt_boxes, torch.float64), gt_index)  # type: ignore[arg-type]
    assignment = Assignment(gt_index, quality if dtype else quality.value.to(gt_boxes.dtype))  # type: ignore[arg-type]
    flat = yolox._flatten(maps)
    return yolox_loss._loss(flat, predictions, cells, anchor_strides, boxes, gt_labels, assignment, use_l1)
