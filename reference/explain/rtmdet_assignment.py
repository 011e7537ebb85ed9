"""Margins of RTMDet's assignment: candidates, cost, dynamic k, claims, conflicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import rtmdet
from detoracle.reference.assignment import IGNORED
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reference.explain.dynamic_k import dynamic_k_world
from detoracle.reference.explain.explanation import Explanation, World, background_world, worlds_of
from detoracle.reference.rounding import Bounded, Decision
from detoracle.reference.yolox import _matched_iou

__all__ = ["explain_assign", "explain_candidates", "explain_cost", "explain_dynamic_k_matching"]

# The oracle's stages run on bounded tensors as they are, but are typed for plain ones.
_near: Any = rtmdet._near
_cost: Any = rtmdet._cost
_centers: Any = rtmdet._centers
_overlaps: Any = unchecked(overlaps_mmdet)


def explain_candidates(
    priors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *, dtype: torch.dtype = torch.float32
) -> Decision:
    """Explain `rtmdet.candidates`: its mask, with margins.

    Returns
    -------
    Decision
        candidate (B, A).

    Examples
    --------
    >>> one, prior = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[8.0, 8.0, 8.0, 8.0]])
    >>> near = explain_candidates(prior, one, torch.tensor([[[8.0, 0, 16, 16]]]), one)
    >>> near.value.tolist(), near.margin.tolist()
    ([[False]], [[inf]])
    """
    points, boxes = Bounded.exact(priors, dtype), Bounded.exact(gt_boxes, dtype)
    near: Any = torch.stack([_near(points, boxes[image, valid]) for image, valid in enumerate(gt_valid)])
    candidate: Decision = near & inside
    return candidate


def explain_cost(
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
    dtype: torch.dtype = torch.float32,
) -> tuple[Bounded, Bounded]:
    """Explain `rtmdet.cost`: its costs and IoUs, with bounds.

    Returns
    -------
    tuple of Bounded
        cost and iou, both (B, G, A).

    Examples
    --------
    >>> logits, boxes = torch.tensor([[[9.0, -9.0]]]), torch.tensor([[[0.0, 0, 16, 16]]])
    >>> one, label = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    >>> total, _ = explain_cost(logits, boxes, torch.tensor([[8.0, 8, 8, 8]]), one, boxes, label, one)
    >>> bool(total.error.max() < 1e-6)
    True
    """
    scene = _Scene(class_logits, boxes, priors, gt_boxes, gt_labels, gt_masks, dtype, dtype)
    shape = (*gt_valid.shape, len(priors))
    cost, iou = (Bounded.exact(torch.full(shape, fill, device=boxes.device), dtype) for fill in (torch.inf, 0.0))
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        if not valid.any() or not near.any():
            continue
        pairs = valid[:, None] & near[None]
        found = scene.cost(image, near, valid, soft_center_radius, iou_weight, where="rtmdet.cost")
        for target, source in zip((cost, iou), found, strict=True):
            stored = source.precision.unit < target.precision.unit  # centres of mass are single precision
            rounding = target.precision.unit * source.value.abs() if stored else 0.0
            target.value[image, pairs] = source.value.flatten()
            target.error[image, pairs] = (source.error + rounding).flatten()
    return cost, iou


class _Scene:
    """Predictions and ground truths of a batch, bounded: logits in one precision, geometry in another or the same."""

    def __init__(
        self,
        class_logits: Tensor,
        boxes: Tensor | Bounded,
        priors: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        gt_masks: Tensor | None,
        dtype: torch.dtype,
        geometry: torch.dtype,
    ) -> None:
        self.logits, self.labels = Bounded.exact(class_logits, dtype), gt_labels
        self.boxes = boxes if isinstance(boxes, Bounded) else Bounded.exact(boxes, geometry)
        self.priors, self.gt_boxes = Bounded.exact(priors, geometry), Bounded.exact(gt_boxes, geometry)
        self.masks = None if gt_masks is None else Bounded.exact(gt_masks, torch.float32)

    def cost(
        self, image: int, near: Tensor, valid: Tensor, radius: float, iou_weight: float, *, where: str
    ) -> tuple[Bounded, Bounded]:
        """Costs and IoUs (G, N) of an image's candidates and valid ground truths."""
        labels, masks = self.labels[image, valid], None if self.masks is None else self.masks[image, valid]
        rtmdet._check_labels(labels, self.logits.shape[-1], where=f"{where}, image {image}")
        gt_boxes = self.gt_boxes[image, valid]
        found: tuple[Bounded, Bounded] = _cost(
            self.logits[image, near],
            self.boxes[image, near],
            self.priors[near],
            gt_boxes,
            labels,
            _centers(gt_boxes, masks),
            radius,
            iou_weight,
        )
        return found

    def explain(
        self, inside: Tensor, gt_valid: Tensor, topk: int, radius: float, iou_weight: float, *, where: str
    ) -> Explanation:
        """What is open in the assignment of all images."""
        worlds = []
        for image, valid in enumerate(gt_valid):
            near = _near(self.priors, self.gt_boxes[image, valid]) & inside[image]

            def world(candidate: Tensor, image: int = image, valid: Tensor = valid) -> World:
                found = background_world(len(candidate), candidate.device)
                if valid.any() and candidate.any():
                    cost, iou = self.cost(image, candidate, valid, radius, iou_weight, where=where)
                    found = dynamic_k_world(cost, iou, candidate, valid, top=topk)
                return replace(found, gt_index=torch.where(inside[image], found.gt_index, IGNORED))

            worlds.append(worlds_of(near, world))
        return Explanation(tuple(worlds), lambda gt_index: _quality(self.boxes, self.gt_boxes, gt_index))


def explain_assign(
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
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `rtmdet.assign`: same arguments, and the dtype whose rounding is to be allowed for.

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
    >>> points = rtmdet.priors([(2, 2)], [8])
    >>> boxes = rtmdet.decode(points[:, :2], torch.full((1, 4, 4), 8.0))
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> label = torch.zeros(1, 1, dtype=torch.int64)
    >>> explain_assign(torch.zeros(1, 4, 2), boxes, points, one.expand(1, 4), gt, label, one).ambiguous.any().item()
    False
    """
    scene = _Scene(class_logits, boxes, priors, gt_boxes, gt_labels, gt_masks, dtype, dtype)
    explanation = scene.explain(inside, gt_valid, topk, soft_center_radius, iou_weight, where="rtmdet.assign")
    return replace(explanation, targets=lambda gt_index: _stored(gt_index, explanation.quality(gt_index), dtype))


def _stored(gt_index: Tensor, quality: Bounded, dtype: torch.dtype) -> dict[str, Bounded]:
    """What is stored as overlaps (B, A): an image with candidates has a positive, for each ground truth claims one."""
    positive = gt_index >= 0
    unmatched = torch.where(positive.any(1, keepdim=True), rtmdet._UNMATCHED_OVERLAP, 0.0).to(dtype)
    stored: Any = torch.where(positive, quality, Bounded.exact(unmatched, dtype))  # type: ignore[call-overload]
    return {"max_overlaps": stored}


def explain_dynamic_k_matching(
    cost: Tensor,
    iou: Tensor,
    candidate: Tensor,
    gt_valid: Tensor,
    *,
    topk: int = 13,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `rtmdet.dynamic_k_matching`, whose costs and IoUs are taken as given, without error.

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
    for near, valid, image_cost, image_iou in zip(candidate, gt_valid, cost, iou, strict=True):
        world = background_world(len(near), near.device)
        if valid.any() and near.any():
            pair_cost, pair_iou = (Bounded.exact(t[valid][:, near], dtype) for t in (image_cost, image_iou))
            world = dynamic_k_world(pair_cost, pair_iou, near, valid, top=topk)
        worlds.append((world,))
    exact: Any = Bounded.exact(iou, dtype)
    return Explanation(tuple(worlds), lambda gt_index: _matched_iou(gt_index, exact))  # type: ignore[arg-type,return-value]


def _quality(boxes: Any, gt_boxes: Any, gt_index: Tensor) -> Any:
    """IoU (B, A) that an assignment implies, plain or bounded."""
    image, prior = (gt_index >= 0).nonzero(as_tuple=True)
    iou = _overlaps(gt_boxes[image, gt_index[image, prior]], boxes[image, prior], aligned=True)

    def spread(matched: Tensor) -> Tensor:
        return matched.new_zeros(gt_index.shape).index_put((image, prior), matched)

    return Bounded(spread(iou.value), spread(iou.error), iou.precision) if isinstance(iou, Bounded) else spread(iou)
