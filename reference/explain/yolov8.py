"""Margins of YOLOv8's decisions: anchors inside boxes, the k-th metric and its ties at zero, conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detoracle.reference import yolov8, yolov8_loss
from detoracle.reference.boxes import iou_ultralytics
from detoracle.reference.contract import unchecked
from detoracle.reference.explain.claims import Claims, claim_decisions, claims_world
from detoracle.reference.explain.explanation import Count, Explanation, World, background_world, worlds_of
from detoracle.reference.rounding import Bounded, Decision, known, known_range

__all__ = ["explain_assign", "explain_loss", "loss_given"]

_TINY = 1e-300  # far below any overlap: orders exact zeros without changing them


def explain_assign(
    scores: Tensor | Bounded,
    boxes: Tensor | Bounded,
    anchor_points: Tensor | Bounded,
    gt_boxes: Tensor | Bounded,
    gt_labels: Tensor,
    gt_valid: Tensor | Decision,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `yolov8.assign`: same arguments, and the dtype whose rounding is to be allowed for.

    A ground truth with fewer than k anchors of positive metric fills up with anchors of metric zero, inside it or
    outside, in top-k's unspecified order; only those inside count. So of its zero-metric anchors inside, any are
    right, as many as fit.

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
    >>> points, one = torch.tensor([[4.0, 4.0], [6.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt, label = torch.tensor([[[0.0, 0, 8, 8]]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> apart = torch.tensor([[[90.0, 90, 98, 98]]]).expand(1, 2, 4)
    >>> explain_assign(torch.ones(1, 2, 1), apart, points, gt, label, one, topk=1).ambiguous.tolist()
    [[True, True]]
    """
    predicted, given, points, targets = (
        Bounded.exact(t, dtype) if isinstance(t, Tensor) else t for t in (scores, boxes, anchor_points, gt_boxes)
    )
    where = "yolov8.assign"
    pairs = _pairs(predicted, given, points, targets, gt_labels, gt_valid, topk, alpha, beta, where=where)
    explanation = _explanation(pairs, topk, dtype)

    def trained(gt_index: Tensor) -> dict[str, Any]:
        quality: Any = explanation.quality(gt_index)
        parts = yolov8._targets(gt_index, quality, targets, gt_labels, scores.shape[-1])  # type: ignore[arg-type]
        return dict(zip(("labels", "boxes", "scores"), parts, strict=True))

    return replace(explanation, targets=trained)


def _explanation(pairs: Sequence[_Pairs], topk: int, dtype: torch.dtype) -> Explanation:
    return Explanation(
        tuple(_worlds(image, topk) for image in pairs), lambda gt_index: _quality(gt_index, pairs, dtype)
    )


class _Pairs(NamedTuple):
    """One image's ground truths and anchors, (G, A): metric and overlap if the pair counts, and when it does."""

    metric: Any
    overlap: Any
    valid: Any
    inside: Any

    @property
    def counts(self) -> Any:
        return self.inside & self.valid

    def settled(self, counts: Any) -> tuple[Any, Any]:
        """Metric and overlap, 0 where the pair does not count."""
        return torch.where(counts, self.metric, 0.0), torch.where(counts, self.overlap, 0.0)


def _pairs(
    scores: Any,
    boxes: Any,
    points: Any,
    gt_boxes: Any,
    gt_labels: Tensor,
    gt_valid: Any,
    topk: int,
    alpha: float,
    beta: float,
    *,
    where: str,
) -> list[_Pairs]:
    """Pairs of every image, on bounded or on plain tensors; raises as the oracle does."""
    yolov8._require_images(scores, where=where)
    yolov8._require_anchors(scores.shape[1], topk, gt_boxes, where=where)
    found = []
    for image, labels in enumerate(gt_labels):
        yolov8._require_labels(labels[known(gt_valid[image])], scores.shape[-1], where=f"{where}, image {image}")
        every = torch.ones(len(labels), len(points), dtype=torch.bool, device=labels.device)
        overlap = _overlap(boxes[image], gt_boxes[image], every)
        metric = yolov8._metric(scores[image], overlap, labels, every, alpha, beta)
        found.append(_Pairs(metric, overlap, gt_valid[image][:, None], yolov8._inside(points, gt_boxes[image])))
    return found


def _overlap(boxes: Any, gt_boxes: Any, every: Tensor) -> Any:
    """Overlap, known not to exceed the DIoU: a speck whose aspect ratio rounding decides still has none from afar."""
    overlap = yolov8._overlap(boxes, gt_boxes, every)
    if not isinstance(overlap, Bounded):
        return overlap
    diou: Any = unchecked(iou_ultralytics)(gt_boxes[:, None], boxes, mode="diou")[..., 0]
    return known_range(overlap, 0.0, diou.clamp(min=0).upper)


def _worlds(pairs: _Pairs, topk: int) -> tuple[World, ...]:
    """Worlds of one image, one for every way in which ambiguous edges, and coordinate sums near zero, can fall."""
    num_gts, num_anchors = pairs.inside.shape
    if not num_gts:
        return (background_world(num_anchors, pairs.inside.device),)
    relations: Any = torch.cat([_decision(pairs.valid), pairs.inside], dim=1)  # type: ignore[list-item]
    return worlds_of(relations, lambda settled: _world(pairs, settled[:, 1:] & settled[:, :1], topk))


def _decision(x: Tensor | Decision) -> Decision:
    return x if isinstance(x, Decision) else Decision(x, torch.full_like(x, math.inf, dtype=torch.float64))


def _world(pairs: _Pairs, counts: Tensor, topk: int) -> World:
    metric, overlap = pairs.settled(counts)
    num_gts, num_anchors = counts.shape
    missing = metric.value.isnan()  # NaN is the largest to top-k
    cost = Bounded(
        (-metric.value).masked_fill(missing, -math.inf), metric.error.masked_fill(missing, 0), metric.precision
    )
    k = torch.full((num_gts,), topk, device=counts.device)
    claims = claim_decisions(cost, k, k, torch.full((num_gts,), math.inf, device=counts.device), k)

    # The claims that are open are shared out among tied anchors inside and outside the box; only those inside count.
    maybe = claims.possible & ~claims.definite
    certain, left = (claims.definite & counts).sum(1), topk - claims.definite.sum(1)
    fewest = certain + (left - (maybe & ~counts).sum(1)).clamp(min=0)
    most = certain + torch.minimum(left, (maybe & counts).sum(1))
    margin = claims.margin.masked_fill(~counts, math.inf)
    inside = Claims(claims.claimed & counts, claims.definite & counts, claims.possible & counts, margin, fewest, most)

    # Overlaps that are exactly zero tie in every evaluation, and the first ground truth wins.
    order = torch.arange(num_gts, device=counts.device)
    exact_zero = (overlap.value == 0) & (overlap.error == 0)
    preference = Bounded(
        torch.where(exact_zero, _TINY * order[:, None].double(), -overlap.value), overlap.error, overlap.precision
    )
    world = claims_world(inside, preference, torch.arange(num_anchors, device=counts.device), num_anchors, order)
    edges = _decision(pairs.counts).margin.amin(0)
    return replace(world, margin=torch.minimum(world.margin, edges))


def _quality(gt_index: Tensor, pairs: Sequence[_Pairs], dtype: torch.dtype | None) -> Any:
    """Quality (B, A) of an assignment, bounded if there is a dtype whose rounding is allowed for."""
    settled = [image.settled(image.counts) for image in pairs]
    metric, overlaps = (torch.stack(parts) for parts in zip(*settled, strict=True))
    quality = yolov8._quality(gt_index, metric, overlaps)
    return Bounded.exact(quality, dtype) if dtype and isinstance(quality, Tensor) else quality


def explain_loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    reg_max: int = 16,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain the assignment inside `yolov8.loss`, the rounding of the decoding included.

    Which anchors of metric and overlap zero fill up a ground truth's claims has no effect on the loss, so it is no
    choice here.

    Returns
    -------
    Explanation
        With the outcomes that can change the loss.

    Examples
    --------
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> explain_loss(
    ...     [torch.zeros(1, 65, 4, 4)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one
    ... ).gt_index.sum().item()
    -12
    """
    *_, pairs = _decoded(raw, strides, gt_boxes, gt_labels, gt_valid, reg_max, topk, alpha, beta, dtype)
    explanation = _explanation(pairs, topk, dtype)
    worlds = (tuple(_with_effect(w, image) for w in ws) for ws, image in zip(explanation.worlds, pairs, strict=True))
    return replace(explanation, worlds=tuple(worlds))


def _with_effect(world: World, pairs: _Pairs) -> World:
    """Take the float64 outcome of anchors whose every admissible outcome has exactly no metric and no overlap."""
    nothing = torch.ones_like(pairs.inside.value)
    for part in pairs.settled(pairs.counts):
        nothing &= (part.value == 0) & (part.error == 0)
    idle = {a for a, outcomes in world.choices.items() if all(g < 0 or nothing[g, a] for g in outcomes)}
    counts = []
    for count in world.counts:
        kept = [a for a in count.anchors.tolist() if a not in idle]
        settled = len(count.anchors) - len(kept)
        counts.append(Count(count.gt, count.anchors.new_tensor(kept), count.low - settled, count.high))
    return replace(world, choices={a: c for a, c in world.choices.items() if a not in idle}, counts=tuple(counts))


def _decoded(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    reg_max: int,
    topk: int,
    alpha: float,
    beta: float,
    dtype: torch.dtype | None,
) -> tuple[Any, Any, list[_Pairs]]:
    """Head, ground-truth boxes and pairs of a loss, bounded if there is a dtype whose rounding is allowed for."""
    maps = [Bounded.exact(level, dtype) for level in raw] if dtype else list(raw)
    boxes: Any = Bounded.exact(gt_boxes, dtype) if dtype else gt_boxes
    head = yolov8_loss._head(maps, strides, reg_max)
    for image, valid in enumerate(gt_valid):
        num_classes = head.cls_logits.shape[-1]
        yolov8._require_labels(gt_labels[image, valid], num_classes, where=f"yolov8.loss, image {image}")
    counted = yolov8.counted_ground_truths(boxes, gt_valid)
    scores, predicted = torch.sigmoid(head.cls_logits.detach()), head.boxes.detach() * head.strides
    points = head.points * head.strides
    pairs = _pairs(
        scores, predicted.to(boxes.dtype), points, boxes, gt_labels, counted, topk, alpha, beta, where="yolov8.loss"
    )
    return head, boxes, pairs


def loss_given(
    gt_index: Tensor,
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    reg_max: int = 16,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
    dtype: torch.dtype | None = torch.float32,
) -> dict[str, Any]:
    """Loss of a given assignment, bounded; for a choice that rounding leaves open.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        The assignment; the rest as for `yolov8.loss`.
    dtype : torch.dtype or None
        Dtype whose rounding is allowed for; None computes on the plain tensors, so that gradients flow.

    Returns
    -------
    dict of str to Bounded
        total, box, cls and dfl; plain zeros where a part is exactly zero.

    Raises
    ------
    UpstreamRaises
        As the oracle, in the dtype of the arguments.

    Examples
    --------
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> label, matched = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 16), -1)
    >>> matched[0, 5] = 0
    >>> parts = loss_given(matched, [torch.zeros(1, 65, 4, 4)], [8], gt, label, one)
    >>> bool(parts["total"].error < 1e-4)
    True
    """

    def computed(dtype: torch.dtype | None) -> dict[str, Any]:
        head, boxes, pairs = _decoded(raw, strides, gt_boxes, gt_labels, gt_valid, reg_max, topk, alpha, beta, dtype)
        quality = _quality(gt_index, pairs, dtype)
        return yolov8_loss._loss(head, boxes, gt_labels, gt_index, quality, (box_gain, cls_gain, dfl_gain))

    if dtype is not None:
        computed(None)  # raises where the oracle does: bfloat16 rounds R - 1.01 up to the last bin
    return computed(dtype)
