"""Explanations of the assignment inside the anchor head's losses, hard negatives included, and losses of given ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import anchor_head_loss, anchor_head_ssd
from detoracle.reference.anchor_head_loss import Batch, Options
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.explain.anchor_head import explain_assign
from detoracle.reference.explain.claims import claim_decisions
from detoracle.reference.explain.explanation import Count, Explanation, World
from detoracle.reference.explain.mining import MinedWorld
from detoracle.reference.rounding import Bounded

__all__ = ["explain_loss", "explain_ssd_loss", "loss_given", "ssd_loss_given"]

_ASSIGNING = (
    "pos_iou_thr",
    "neg_iou_thr",
    "min_pos_iou",
    "gt_max_assign_all",
    "match_low_quality",
    "ignore_iof_thr",
    "ignore_wrt_candidates",
)
_AFTERWARDS = tuple(field.name for field in fields(Options))
_SSD_ASSIGNING = {"neg_iou_thr": 0.5, "gt_max_assign_all": False}
_SSD_AFTERWARDS = {"class_loss": "cross_entropy", "box_loss": "smooth_l1", "stds": (0.1, 0.1, 0.2, 0.2)}


def explain_loss(
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
    strides: Sequence[int | Sequence[int]],
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Explanation:
    """Explain the assignment inside `anchor_head.loss`, whose arguments these are; sampling comes after it.

    Returns
    -------
    Explanation
        Where the maps have less precision than the anchors, as half-precision heads have, that of the anchors counts.

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, shape = ([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 4, 1, 1)]), torch.tensor([[8, 8]])
    >>> label = torch.zeros(1, 1, dtype=torch.int64)
    >>> explain_loss(*maps, boxes, boxes[None], label, one, shape, shape, strides=[8]).gt_index.tolist()
    [[0]]
    """
    batch = Batch(cls_scores, bbox_preds, anchors, gt_boxes, gt_labels)
    border = settings.get("allowed_border", -1.0)
    inside = anchor_head_loss._taking_part(batch, image_shapes, pad_shapes, strides, border)
    assigning = {name: settings[name] for name in _ASSIGNING if name in settings}
    precise = _dtype_of(anchors, cls_scores[0], dtype)
    return explain_assign(anchors, gt_boxes, gt_valid, inside, ignore_boxes, ignore_valid, **assigning, dtype=precise)


def _dtype_of(tensor: Tensor, maps: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a tensor takes part where `dtype` is allowed for: its own, if that is only the maps' dtype."""
    return tensor.dtype if dtype == maps.dtype else dtype


def loss_given(
    gt_index: Tensor,
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
    strides: Sequence[int | Sequence[int]],
    dtype: torch.dtype | None = torch.float32,
    **settings: Any,
) -> dict[str, Bounded]:
    """Loss of a given assignment, bounded; for a choice that rounding leaves open.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        The assignment, before sampling; the rest as for `anchor_head.loss`.
    dtype : torch.dtype or None
        Dtype whose rounding is allowed for; None computes on the plain tensors, so that gradients flow.

    Returns
    -------
    dict of str to Bounded
        total, classification, box.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, shape = ([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 4, 1, 1)]), torch.tensor([[8, 8]])
    >>> given = *maps, boxes, boxes[None], torch.zeros(1, 1, dtype=torch.int64), one, shape, shape
    >>> bool(loss_given(torch.tensor([[0]]), *given, strides=[8])["total"].error < 1e-5)
    True
    """
    batch = Batch(cls_scores, bbox_preds, anchors, gt_boxes, gt_labels)
    return anchor_head_loss._loss(gt_index, _bounded(batch, dtype), _options(settings))  # type: ignore[return-value]


def _bounded(batch: Batch, dtype: torch.dtype | None) -> Batch:
    """A batch in bounded arithmetic, if there is a dtype."""
    if dtype is None:
        return batch

    def bounded(tensor: Tensor) -> Any:
        return Bounded.exact(tensor, _dtype_of(tensor, batch.cls_scores[0], dtype))

    cls_scores, bbox_preds = ([bounded(level) for level in maps] for maps in (batch.cls_scores, batch.bbox_preds))
    return Batch(cls_scores, bbox_preds, bounded(batch.anchors), bounded(batch.gt_boxes), batch.gt_labels)


def _options(settings: dict[str, Any]) -> Options:
    return Options(**{name: value for name, value in settings.items() if name in _AFTERWARDS})


# ------------------------------------------------------------------------------------------------- hard negatives
def explain_ssd_loss(
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
    strides: Sequence[int | Sequence[int]],
    neg_pos_ratio: int = 3,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Explanation:
    """Explain what `anchor_head.ssd_loss` trains: positives by their ground truth, hard negatives -1, all others -2.

    Returns
    -------
    Explanation
        The hard negatives are judged by the positives beside them, so that an open match leaves nothing else open.

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, shape = ([torch.zeros(1, 2, 1, 2)], [torch.zeros(1, 4, 1, 2)]), torch.tensor([[8, 16]])
    >>> given = *maps, boxes, boxes[None, :1], torch.zeros(1, 1, dtype=torch.int64), one, shape, shape
    >>> explain_ssd_loss(*given, strides=[8]).gt_index.tolist()
    [[0, -1]]
    """
    matching = explain_loss(
        cls_scores, bbox_preds, anchors, gt_boxes, gt_labels, gt_valid, image_shapes, pad_shapes, ignore_boxes,
        ignore_valid, strides=strides, dtype=dtype, **{**_SSD_ASSIGNING, **settings},
    )  # fmt: skip
    options = _options({**_SSD_AFTERWARDS, **settings})
    images = []
    for image, worlds in enumerate(matching.worlds):
        one = slice(image, image + 1)
        scores, deltas = ([level.detach()[one] for level in levels] for levels in (cls_scores, bbox_preds))
        batch = _bounded(Batch(scores, deltas, anchors, gt_boxes[one], gt_labels[one]), dtype)

        def negatives(matched: Tensor, batch: Batch = batch) -> World:
            rows = anchor_head_ssd._SsdRows.of(matched[None], batch, options)
            [(cost, background, number)] = rows.candidates(neg_pos_ratio)
            trained = background & (matched != IGNORED)  # the others weigh nothing: mined or not, they cost 0
            return _mined(matched, cost, trained, min(int(number), int(trained.sum())))  # type: ignore[arg-type]

        images.append(tuple(MinedWorld.of(world, negatives) for world in worlds))
    return Explanation(tuple(images), matching.quality)


def ssd_loss_given(
    gt_index: Tensor,
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
    strides: Sequence[int | Sequence[int]],
    neg_pos_ratio: int = 3,
    dtype: torch.dtype | None = torch.float32,
    **settings: Any,
) -> dict[str, Bounded]:
    """Loss of a given assignment, bounded; for a choice that rounding leaves open.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        Ground truth of each positive, -1 for hard negatives, -2 for anchors that do not train the class. The rest is
        as for `anchor_head.ssd_loss`.
    dtype : torch.dtype or None
        Dtype whose rounding is allowed for; None computes on the plain tensors, so that gradients flow.

    Returns
    -------
    dict of str to Bounded
        total, classification, box.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, shape = ([torch.zeros(1, 2, 1, 2)], [torch.zeros(1, 4, 1, 2)]), torch.tensor([[8, 16]])
    >>> given = *maps, boxes, boxes[None, :1], torch.zeros(1, 1, dtype=torch.int64), one, shape, shape
    >>> float(ssd_loss_given(torch.tensor([[0, -2]]), *given, strides=[8], dtype=None)["total"]) < 0.7
    True
    """
    batch = _bounded(Batch(cls_scores, bbox_preds, anchors, gt_boxes, gt_labels), dtype)
    rows = anchor_head_ssd._SsdRows.of(gt_index, batch, _options({**_SSD_AFTERWARDS, **settings}))
    mined = []
    for chosen, (cost, background, number) in zip(gt_index, rows.candidates(neg_pos_ratio), strict=True):
        marked = chosen == BACKGROUND
        # Positives of the class "background" are mined too, though their outcome is their ground truth.
        missing, values = int(number - marked.sum()), cost.value if isinstance(cost, Bounded) else cost
        mined.append(marked | anchor_head_ssd._hardest(values, background & (chosen >= 0), missing))
    return rows.loss(torch.stack(mined))  # type: ignore[return-value]


def _mined(matched: Tensor, cost: Bounded, background: Tensor, number: int) -> World:
    """Hard negatives of one image, given its matching (A,): the so many costliest of the background."""
    outcome = torch.where(matched >= 0, matched, IGNORED)
    margin = torch.full_like(cost.value, math.inf)
    anchors = background.nonzero().flatten()
    if not 0 < number < len(anchors):
        outcome[anchors[:number]] = torch.where(matched[anchors[:number]] >= 0, matched[anchors[:number]], BACKGROUND)
        return World(outcome, margin)
    count = anchors.new_full((1,), number)
    unlimited = margin.new_full((1,), math.inf)
    ranked = Bounded(-cost.value[anchors], cost.error[anchors], cost.precision)
    missing = ranked.value.isnan()  # ranks first
    ranked = Bounded(
        ranked.value.masked_fill(missing, -math.inf), ranked.error.masked_fill(missing, 0.0), ranked.precision
    )
    claims = claim_decisions(ranked[None], count, count, unlimited, count)
    chosen, definite, possible = (mask[0] for mask in (claims.claimed, claims.definite, claims.possible))
    margin[anchors] = claims.margin[0]
    unmatched = matched[anchors] < 0
    outcome[anchors[chosen & unmatched]] = BACKGROUND
    free = anchors[possible & ~definite & unmatched]
    most = number - int(definite.sum())
    fewest = most - int((possible & ~definite & ~unmatched).sum())
    counts = (Count(BACKGROUND, free, fewest, most, IGNORED),) if len(free) else ()
    return World(outcome, margin, dict.fromkeys(free.tolist(), frozenset([BACKGROUND, IGNORED])), counts)
