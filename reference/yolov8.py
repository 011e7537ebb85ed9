"""YOLOv8: anchor points, padded ground truths and task-aligned assignment (TAL).

An anchor point per grid cell predicts one box and C class scores. Per image, every ground truth claims the k anchors
with the best *alignment metric*, class score ** alpha times CIoU ** beta; a claim counts only where the anchor lies
inside the box; an anchor that several claim goes to the largest CIoU. Positives then train towards the metric, scaled
so that each ground truth's best anchor gets its best CIoU.

Quirks, all faithful: a ground truth with fewer than k anchors of positive metric also claims anchors of metric zero,
in top-k's unspecified order; a contested anchor goes to the best of *all* ground truths, and so to the first one of
the image where every CIoU is 0; a class of -1 reads the last class's score and trains class 0; boxes of coordinate
sum <= 0 pass for padding.

Stages, in the order data flows: `anchor_points`, `pad_targets`, `align`, `assign`. `yolov8_loss` decodes boxes and
computes the loss.
Source: ultralytics 8.2.0 (AGPL-3.0; 8.1.30 to 8.2.42 behave alike), described from its observed behaviour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND, Assignment
from detoracle.reference.boxes import cxcywh_to_xyxy, iou_ultralytics
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.yolox import anchor_grid

__all__ = ["align", "anchor_points", "assign", "counted_ground_truths", "pad_targets"]

_SOURCE = "ultralytics 8.2.0 (AGPL-3.0)"
_EPS = 1e-9  # an anchor inside a box is farther than this from every side; also keeps the best metric from zero


# --------------------------------------------------------------------------------------------- 1. anchor points
@operation("yolov8.anchor_points", kind="values", source=_SOURCE)
def anchor_points(raw: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centres of all cells, level-major, row-major within a level.

    Parameters
    ----------
    raw : list of Tensor (B, N, Hl, Wl) float
        Head maps, one a level; only their sizes, dtype and device matter.
    strides : sequence of int
        Pixels a cell, one a level.

    Returns
    -------
    anchor_points : Tensor (A, 2) float
        x and y in cells of the point's own level.
    anchor_strides : Tensor (A,) float
        Pixels a cell.

    Raises
    ------
    InputError
        If there is not one positive stride a level.

    Examples
    --------
    >>> points, strides = anchor_points([torch.zeros(1, 65, 1, 2)], [8])
    >>> points.tolist(), strides.tolist()
    ([[0.5, 0.5], [1.5, 0.5]], [8.0, 8.0])
    """
    if len(strides) != len(raw) or any(s <= 0 for s in strides):
        expected = f"{len(raw)} positive numbers, one a level"
        raise InputError("strides", expected=expected, got=str(list(strides)), where="yolov8.anchor_points")
    cells, _, anchor_strides = anchor_grid([(level.shape[2], level.shape[3]) for level in raw], strides, like=raw[0])
    return cells + 0.5, anchor_strides


# ----------------------------------------------------------------------------------------------- 2. ground truths
@operation("yolov8.pad_targets", kind="values", source=_SOURCE)
def pad_targets(
    batch_index: Tensor, labels: Tensor, boxes: Tensor, *, batch_size: int, image_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Group flat ground truths by image, padded to the batch's largest count, in pixels.

    Rows of images outside the batch are dropped. The order within an image is kept.

    Parameters
    ----------
    batch_index : Tensor (N,) int
        Image of each ground truth.
    labels : Tensor (N,) int
        Class.
    boxes : Tensor (N, 4) float
        cx, cy, w, h as shares of the image's width and height.
    batch_size : int
        B.
    image_size : sequence of int
        Height and width of the network's input in pixels.

    Returns
    -------
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels; zeros for padding.
    gt_labels : Tensor (B, G) int
        0 for padding.
    gt_valid : Tensor (B, G) bool
        False for padding, and for what upstream takes for padding (`counted_ground_truths`).

    Examples
    --------
    >>> rows = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.5, 0.5]])
    >>> boxes, labels, valid = pad_targets(
    ...     torch.tensor([1, 1]), torch.tensor([7, 3]), rows, batch_size=2, image_size=(32, 64)
    ... )
    >>> boxes[1].tolist(), labels.tolist(), valid.tolist()
    ([[16.0, 12.0, 48.0, 20.0], [0.0, 0.0, 32.0, 16.0]], [[0, 0], [7, 3]], [[False, False], [True, True]])
    """
    rows = [(batch_index == image).nonzero().flatten().tolist() for image in range(batch_size)]
    largest = max(Counter(batch_index.tolist()).values(), default=0)
    padding = len(batch_index)  # index of a row of zeros after the last ground truth
    slots = [image + [padding] * (largest - len(image)) for image in rows]
    slot = torch.tensor(slots, dtype=torch.int64, device=labels.device).reshape(batch_size, largest)
    height, width = image_size
    corners = cxcywh_to_xyxy(boxes * boxes.new_tensor([width, height, width, height]))
    gt_boxes = torch.cat([corners, boxes.new_zeros(1, 4)])[slot]
    gt_labels = torch.cat([labels, labels.new_zeros(1)])[slot]
    return gt_boxes, gt_labels, counted_ground_truths(gt_boxes, slot < padding)


def counted_ground_truths(gt_boxes: Tensor, gt_valid: Tensor) -> Tensor:
    """Ground truths that take part: those whose four coordinates sum to more than zero, as all others pass for padding.

    One that reaches far over the image's top left corner is so lost, even if it covers anchors.

    Parameters
    ----------
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels.
    gt_valid : Tensor (B, G) bool
        False for padding.

    Returns
    -------
    counted : Tensor (B, G) bool

    Examples
    --------
    >>> gt_boxes = torch.tensor([[[-60.0, -50, 14, 12], [20, 20, 44, 50]]])
    >>> counted_ground_truths(gt_boxes, torch.ones(1, 2, dtype=torch.bool)).tolist()
    [[False, True]]
    """
    return (gt_boxes.sum(-1) > 0) & gt_valid


# ------------------------------------------------------------------------------------------------- 3. alignment
@operation("yolov8.align", kind="values", source=_SOURCE)
@torch.no_grad()
def align(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """How well each anchor's prediction suits each ground truth: score ** alpha * overlap ** beta.

    The overlap is the CIoU, not below 0; the score is the probability of the ground truth's class, counted from the
    last class if negative. Both are 0 for anchors outside the box, and for padding.

    Parameters
    ----------
    scores : Tensor (B, A, C) float
        Class probabilities.
    boxes : Tensor (B, A, 4) float
        Predicted boxes, xyxy in pixels.
    anchor_points : Tensor (A, 2) float
        Anchor points in pixels.
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels.
    gt_labels : Tensor (B, G) int
        Class, -C to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    alpha : float
        Exponent of the score.
    beta : float
        Exponent of the overlap.

    Returns
    -------
    metric : Tensor (B, G, A) float
    overlaps : Tensor (B, G, A) float
    in_gt : Tensor (B, G, A) bool
        Anchor points inside the box (of padding, too), more than 1e-9 from each side.

    Raises
    ------
    UpstreamRaises
        ``yolov8.label-out-of-range``.

    Examples
    --------
    >>> points, one = torch.tensor([[4.0, 4.0], [8.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt = torch.tensor([[[0.0, 0, 8, 8]]])
    >>> metric, overlaps, in_gt = align(
    ...     torch.full((1, 2, 1), 0.25), gt.expand(1, 2, 4), points, gt, torch.zeros(1, 1, dtype=torch.int64), one
    ... )
    >>> metric.tolist(), overlaps.tolist(), in_gt.tolist()
    ([[[0.5, 0.0]]], [[[1.0, 0.0]]], [[[True, False]]])
    """
    _require_images(scores, where="yolov8.align")
    metrics, overlaps, insides = [], [], []
    for image, valid in enumerate(gt_valid):
        labels = gt_labels[image]
        _require_labels(labels[valid], scores.shape[-1], where=f"yolov8.align, image {image}")
        in_gt = _inside(anchor_points, gt_boxes[image])
        overlap = _overlap(boxes[image], gt_boxes[image], in_gt & valid[:, None])
        metrics.append(_metric(scores[image], overlap, labels, in_gt & valid[:, None], alpha, beta))
        overlaps.append(overlap)
        insides.append(in_gt)
    return torch.stack(metrics), torch.stack(overlaps), torch.stack(insides)


def _require_images(batch: Tensor, *, where: str) -> None:
    if batch.shape[0] == 0:
        raise InputError("batch", expected="at least one image", got="none", where=where)


def _require_labels(labels: Tensor, num_classes: int, *, where: str) -> None:
    """Raise where indexing the scores by class would."""
    if bool(((labels < -num_classes) | (labels >= num_classes)).any()):
        expected = f"labels {-num_classes} to {num_classes - 1}"
        raise UpstreamRaises("yolov8.label-out-of-range", expected=expected, got=str(labels.tolist()), where=where)


def _inside(anchor_points: Tensor, gt_boxes: Tensor) -> Tensor:
    """Points (A, 2) strictly inside boxes (G, 4): (G, A) bool."""
    left_top, right_bottom = gt_boxes[:, None, :2], gt_boxes[:, None, 2:]
    return (torch.cat([anchor_points - left_top, right_bottom - anchor_points], dim=-1) > _EPS).all(-1)


def _overlap(boxes: Tensor, gt_boxes: Tensor, counts: Tensor) -> Tensor:
    """CIoU of ground truths (G, 4) with predictions (A, 4), not below 0; 0 where the pair does not count. (G, A)."""
    ciou = unchecked(iou_ultralytics)(gt_boxes[:, None], boxes, mode="ciou")
    return torch.where(counts, ciou[..., 0].clamp(min=0), 0.0)


def _metric(scores: Tensor, overlap: Tensor, gt_labels: Tensor, counts: Tensor, alpha: float, beta: float) -> Tensor:
    """Alignment metric (G, A) of one image."""
    of_class = scores[:, gt_labels % scores.shape[1]].transpose(0, 1)  # class -1 reads the last one's score
    return torch.where(counts, of_class, 0.0) ** alpha * overlap**beta


# ------------------------------------------------------------------------------------------------ 4. assignment
@operation("yolov8.assign", kind="assignment", source=_SOURCE)
@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Task-aligned assignment: which ground truth each anchor is trained towards, and how strongly.

    Ties: the lowest anchor index claims (upstream leaves that to top-k), the first ground truth wins.

    Parameters
    ----------
    scores : Tensor (B, A, C) float
        Class probabilities.
    boxes : Tensor (B, A, 4) float
        Predicted boxes, xyxy in pixels.
    anchor_points : Tensor (A, 2) float
        Anchor points in pixels.
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, -C to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    topk : int
        Anchors that a ground truth claims.
    alpha : float
        Exponent of the score.
    beta : float
        Exponent of the overlap.

    Returns
    -------
    gt_index : Tensor (B, A) int
        Ground truth of each anchor, -1 for background.
    quality : Tensor (B, A) float
        Normalised metric: metric * best overlap / best metric of the ground truth's positives; 0 for background.
    labels : Tensor (B, A) int or None
        Class trained, not below 0; of the first ground truth for background; C where the batch has no ground truth.
    boxes : Tensor (B, A, 4) float or None
        Box trained, xyxy in pixels; of the first ground truth for background.
    scores : Tensor (B, A, C) float or None
        Scores trained: one-hot class times quality.

    Raises
    ------
    UpstreamRaises
        ``yolov8.few-anchors``: fewer anchors than `topk`; ``yolov8.label-out-of-range``.

    Examples
    --------
    >>> points, one = torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt = torch.tensor([[[0.0, 0, 8, 8]]])
    >>> result = assign(torch.ones(1, 2, 3), gt.expand(1, 2, 4), points, gt, torch.tensor([[2]]), one, topk=1)
    >>> result.gt_index.tolist(), result.quality.tolist(), result.extra["scores"].tolist()
    ([[0, -1]], [[1.0, 0.0]], [[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    """
    _require_images(scores, where="yolov8.assign")
    _require_anchors(scores.shape[1], topk, gt_boxes, where="yolov8.assign")
    metric, overlaps, in_gt = align(scores, boxes, anchor_points, gt_boxes, gt_labels, gt_valid, alpha=alpha, beta=beta)
    gt_index = torch.stack(
        [
            _resolve(_claim(image_metric, valid, topk) & inside, overlap)
            for image_metric, overlap, inside, valid in zip(metric, overlaps, in_gt, gt_valid, strict=True)
        ]
    )
    quality = _quality(gt_index, metric, overlaps)
    labels, target_boxes, target_scores = _targets(gt_index, quality, gt_boxes, gt_labels, scores.shape[-1])
    return Assignment(gt_index, quality, {"labels": labels, "boxes": target_boxes, "scores": target_scores})


def _require_anchors(num_anchors: int, topk: int, gt_boxes: Tensor, *, where: str) -> None:
    """Raise where top-k would, which also runs for padding."""
    if gt_boxes.shape[1] and num_anchors < topk:
        raise UpstreamRaises(
            "yolov8.few-anchors", expected=f"{topk} anchors or more", got=str(num_anchors), where=where
        )


def _claim(metric: Tensor, valid: Tensor, topk: int) -> Tensor:
    """Mark each valid ground truth's k anchors of largest metric, inside it or not, NaN first. (G, A) bool."""
    claims = torch.zeros_like(metric, dtype=torch.bool)
    for ground_truth in valid.nonzero().flatten().tolist():
        claims[ground_truth, metric[ground_truth].argsort(descending=True, stable=True)[:topk]] = True
    return claims


def _resolve(claims: Tensor, overlap: Tensor) -> Tensor:
    """Ground truth of each anchor, (A,), -1 where nobody claims; contested ones go to the largest overlap of all."""
    if not len(claims):
        return torch.full(claims.shape[1:], BACKGROUND, device=claims.device)
    claimants = claims.sum(0)
    only_claimant, largest_of_all = claims.int().argmax(0), overlap.argmax(0)
    return torch.where(claimants > 1, largest_of_all, torch.where(claimants == 1, only_claimant, BACKGROUND))


def _quality(gt_index: Tensor, metric: Tensor, overlaps: Tensor) -> Tensor:
    """Normalised metric (B, A) of an assignment. One NaN among an image's metrics makes the whole image NaN."""
    if not metric.shape[1]:
        return metric.new_zeros(gt_index.shape)
    positive = gt_index[:, None] == torch.arange(metric.shape[1], device=gt_index.device)[:, None]
    assigned = metric * positive
    best_metric, best_overlap = assigned.amax(-1, keepdim=True), (overlaps * positive).amax(-1, keepdim=True)
    return (assigned * best_overlap / (best_metric + _EPS)).amax(1)


def _targets(
    gt_index: Tensor, quality: Tensor, gt_boxes: Tensor, gt_labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, A), boxes (B, A, 4) and scores (B, A, C) that an assignment trains."""
    if not gt_boxes.shape[1]:
        boxes, scores = (quality.new_zeros(*gt_index.shape, size) for size in (4, num_classes))
        return torch.full_like(gt_index, num_classes), boxes, scores
    first_if_none = gt_index.clamp(min=0)
    labels = gt_labels.gather(1, first_if_none).clamp(min=0)
    boxes = gt_boxes[torch.arange(len(gt_index), device=gt_index.device)[:, None], first_if_none]
    one_hot = (labels[..., None] == torch.arange(num_classes, device=labels.device)) & (gt_index >= 0)[..., None]
    return labels, boxes, quality[..., None] * one_hot
