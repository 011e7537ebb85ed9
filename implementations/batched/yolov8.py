"""YOLOv8 over the whole batch at once: padded, masked, of fixed shapes, and without waiting for the device.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolov8`,
`detoracle.reference.yolov8_loss` and `detoracle.reference.boxes`. No image and no ground truth has a Python iteration
of its own, and but for `pad_targets`, whose result is as wide as the data say, no value is read back to the host and
no shape depends on the data, so that every function compiles into one graph.

What makes it fast:

- channels stay before anchors: head maps are joined without transposing them, and a ground truth's scores are one row;
- an anchor's quality needs its own pair alone, so the best of each ground truth come from a scatter over anchors;
- a batch has at most k positives a ground truth, so the loss gathers a list of that fixed length;
- only one class of a positive has a target above 0, so the class loss needs no (B, A, C) targets; written so, it also
  keeps the small losses of background that PyTorch's cross entropy with logits rounds to 0 in bfloat16.

What differs from the oracle: arguments are not checked; with fewer anchors than top-k asks for, all are claimed; a
ground truth of a class that does not exist takes no part; a DFL target without a bin counts as the nearest that has one
(the oracle raises in all three). Among equal metrics, top-k chooses. Class logits of minus infinity cost nothing (NaN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, Assignment

__all__ = [
    "align",
    "anchor_points",
    "assign",
    "bbox2dist",
    "dfl_decode",
    "dfl_loss",
    "iou_ultralytics",
    "loss",
    "pad_targets",
]

_EPS = 1e-9
_LAST_BIN_MARGIN = 0.01
_LINEAR = 40.0  # from here on softplus(x) is x, in float64 too


# ------------------------------------------------------------------------------------------------------- boxes
@implements("boxes.iou_ultralytics", name="batched")
def iou_ultralytics(
    boxes_a: Tensor, boxes_b: Tensor, *, form: str = "xyxy", mode: str = "iou", eps: float = 1e-7
) -> Tensor:
    """IoU, GIoU, DIoU or CIoU (..., 1) of boxes (..., 4) that broadcast; one coordinate at a time, without copies."""
    return _iou(_sides(boxes_a.unbind(-1), form, eps), _sides(boxes_b.unbind(-1), form, eps), mode, eps)[..., None]


def _sides(box: Sequence[Tensor], form: str = "xyxy", eps: float = 1e-7) -> tuple[Tensor, ...]:
    """Left, top, right, bottom, width and height of boxes, each (...)."""
    if form == "xyxy":
        left, top, right, bottom = box
        return left, top, right, bottom, right - left, bottom - top + eps
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2, width, height


def _iou(a: tuple[Tensor, ...], b: tuple[Tensor, ...], mode: str = "ciou", eps: float = 1e-7) -> Tensor:
    """IoU of boxes given by their sides, broadcast; the CIoU's weight of the shape is a constant for the gradient."""
    left_a, top_a, right_a, bottom_a, width_a, height_a = a
    left_b, top_b, right_b, bottom_b, width_b, height_b = b
    width = (torch.minimum(right_a, right_b) - torch.maximum(left_a, left_b)).clamp(min=0)
    height = (torch.minimum(bottom_a, bottom_b) - torch.maximum(top_a, top_b)).clamp(min=0)
    intersection = width * height
    union = width_a * height_a + width_b * height_b - intersection + eps
    iou = intersection / union
    if mode == "iou":
        return iou
    width = torch.maximum(right_a, right_b) - torch.minimum(left_a, left_b)
    height = torch.maximum(bottom_a, bottom_b) - torch.minimum(top_a, top_b)
    if mode == "giou":
        enclosure = width * height + eps
        return iou - (enclosure - union) / enclosure
    offset_x, offset_y = left_b + right_b - left_a - right_a, top_b + bottom_b - top_a - bottom_a
    distance = (offset_x**2 + offset_y**2) / 4 / (width**2 + height**2 + eps)
    if mode == "diou":
        return iou - distance
    shape = 4 / math.pi**2 * (torch.atan(width_b / height_b) - torch.atan(width_a / height_a)) ** 2
    alpha = shape.detach() / (shape.detach() - iou.detach() + (1 + eps))
    return iou - (distance + shape * alpha)


# --------------------------------------------------------------------------------- anchor points, ground truths
@implements("yolov8.anchor_points", name="batched")
def anchor_points(raw: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cell centres (A, 2) in cells, and strides (A,), made where the maps are, level by level."""
    cells, anchor_strides = [], []
    for level, stride in zip(raw, strides, strict=True):
        height, width = level.shape[2:]
        index = torch.arange(height * width, device=level.device)
        cells.append(torch.stack([index % width, index // width], dim=-1))
        anchor_strides.append(torch.full_like(index, stride))
    return torch.cat(cells).to(raw[0].dtype) + 0.5, torch.cat(anchor_strides).to(raw[0].dtype)


@implements("yolov8.pad_targets", name="batched")
def pad_targets(
    batch_index: Tensor, labels: Tensor, boxes: Tensor, *, batch_size: int, image_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, G, 4), labels and mask (B, G) of flat ground truths, by one sort; waits once, for the largest count G.

    Examples
    --------
    >>> image, label, box = torch.tensor([1, 0, 1]), torch.tensor([7, 8, 9]), torch.full((3, 4), 0.5)
    >>> pad_targets(image, label, box, batch_size=2, image_size=(64, 64))[1].tolist()
    [[8, 0], [7, 9]]
    """
    image, order = batch_index.sort(stable=True)
    place = torch.arange(len(image), device=image.device) - torch.searchsorted(image, image)
    most = int(place.max()) + 1 if len(image) else 0
    rows = batch_size * most
    row = (image.long() * most + place).where((image >= 0) & (image < batch_size), rows)  # the last row is thrown away

    height, width = image_size
    x, y, w, h = boxes[order].unbind(-1)
    corners = torch.stack(_sides((x * width, y * height, w * width, h * height), "cxcywh")[:4], dim=-1)
    gt_boxes = boxes.new_zeros(rows + 1, 4).index_copy(0, row, corners)[:rows].view(batch_size, most, 4)
    gt_labels = labels.new_zeros(rows + 1).index_copy(0, row, labels[order])[:rows].view(batch_size, most)
    return gt_boxes, gt_labels, gt_boxes.sum(-1) > 0  # padding sums to 0


# -------------------------------------------------------------------------------------------------- assignment
@implements("yolov8.align", name="batched")
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
    """Alignment metric, overlap and "inside" of every pair, (B, G, A) each; works out all pairs, then masks them."""
    own = _of_class(scores.mT, gt_labels)
    counted = _with_class(gt_labels, gt_valid, scores.shape[-1])
    return _align(own, boxes.unbind(-1), anchor_points, gt_boxes, counted, alpha, beta)


def _with_class(gt_labels: Tensor, gt_valid: Tensor, num_classes: int) -> Tensor:
    """Ground truths (B, G) whose class exists."""
    return gt_valid & (gt_labels >= -num_classes) & (gt_labels < num_classes)


def _of_class(class_values: Tensor, gt_labels: Tensor) -> Tensor:
    """Row of each ground truth's class, (B, C, A) to (B, G, A); classes below 0 count from the last."""
    row = gt_labels.long().remainder(class_values.shape[1])[..., None]
    return class_values.gather(1, row.expand(-1, -1, class_values.shape[2]))


def _align(
    score: Tensor,
    box: Sequence[Tensor],
    anchor_points: Tensor,
    gt_boxes: Tensor,
    counted: Tensor,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Metric, overlap and "inside" (B, G, A) from scores (B, G, A) and the coordinates of boxes, (B, A) each."""
    x, y = anchor_points.unbind(-1)
    left, top, right, bottom = gt_boxes[..., None, :].unbind(-1)
    in_gt = (x - left > _EPS) & (y - top > _EPS) & (right - x > _EPS) & (bottom - y > _EPS)
    excluded = ~(in_gt & counted[..., None])
    ciou = _iou(_sides((left, top, right, bottom)), _sides([side[:, None] for side in box]))
    overlap = ciou.clamp(min=0).masked_fill(excluded, 0.0)
    return score.masked_fill(excluded, 0.0) ** alpha * overlap**beta, overlap, in_gt


@implements("yolov8.assign", name="batched")
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
    """Task-aligned assignment and its targets; keeps metric and overlap of all pairs, and no other (B, G, A) floats.

    Examples
    --------
    >>> points, one = torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt = torch.tensor([[[0.0, 0, 8, 8]]])
    >>> assign(torch.ones(1, 2, 3), gt.expand(1, 2, 4), points, gt, torch.tensor([[2]]), one).gt_index.tolist()
    [[0, -1]]
    """
    num_classes = scores.shape[-1]
    metric, overlap, in_gt = align(scores, boxes, anchor_points, gt_boxes, gt_labels, gt_valid, alpha=alpha, beta=beta)
    counted = _with_class(gt_labels, gt_valid, num_classes)
    gt_index, quality = _match(metric, overlap, in_gt & counted[..., None], topk)
    if not gt_boxes.shape[1]:
        labels = torch.full_like(gt_index, num_classes)
        target_boxes = gt_boxes.new_zeros(*gt_index.shape, 4)
    else:
        matched = gt_index.clamp(min=0)
        labels = gt_labels.gather(1, matched).clamp(min=0)
        target_boxes = gt_boxes.take_along_dim(matched[..., None], 1)
    classes = torch.arange(num_classes, device=labels.device)
    one_hot = (labels[..., None] == classes) & (gt_index >= 0)[..., None]
    return Assignment(
        gt_index, quality, {"labels": labels, "boxes": target_boxes, "scores": quality[..., None] * one_hot}
    )


def _match(metric: Tensor, overlap: Tensor, counts: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Ground truth and quality (B, A) of each anchor, from all pairs (B, G, A) and which of them count."""
    images, ground_truths, anchors = metric.shape
    if not ground_truths:
        return torch.full((images, anchors), BACKGROUND, device=metric.device), metric.new_zeros(images, anchors)
    picked = metric.topk(min(topk, anchors), sorted=False).indices
    claims = torch.zeros_like(counts).scatter(2, picked, True) & counts
    claimants = claims.sum(1)
    winner = torch.where(claimants > 1, overlap.argmax(1), claims.byte().argmax(1))
    assigned = claimants > 0

    own, own_overlap = (pairs.gather(1, winner[:, None])[:, 0].where(assigned, 0.0) for pairs in (metric, overlap))
    none = metric.new_zeros(images, ground_truths)
    best = none.scatter_reduce(1, winner, own, "amax").gather(1, winner)
    best_overlap = none.to(overlap.dtype).scatter_reduce(1, winner, own_overlap, "amax").gather(1, winner)
    spoilt = metric.amax((1, 2)).isnan()[:, None]  # one NaN is enough for the whole image
    quality = (own * best_overlap / (best + _EPS)).masked_fill(spoilt, torch.nan)
    return winner.where(assigned, BACKGROUND), quality


# --------------------------------------------------------------------------------------------------- distances
@implements("yolov8.dfl_decode", name="batched")
def dfl_decode(box_logits: Tensor) -> Tensor:
    """Distances (B, A, 4) from logits (B, A, 4*R); a sum of products, for a matrix product may round to TF32."""
    bins = box_logits.shape[-1] // 4
    if bins == 1:
        return box_logits
    probability = torch.unflatten(box_logits, -1, (4, bins)).softmax(-1)
    return (probability * torch.arange(bins, dtype=box_logits.dtype, device=box_logits.device)).sum(-1)


@implements("yolov8.bbox2dist", name="batched")
def bbox2dist(anchor_points: Tensor, boxes: Tensor, *, reg_max: int = 16) -> Tensor:
    """Distances (N, 4) from points to the sides of boxes, clamped to the bins; takes leading dimensions too."""
    x, y = anchor_points.unbind(-1)
    left, top, right, bottom = boxes.unbind(-1)
    distances = torch.stack([x - left, y - top, right - x, bottom - y], dim=-1)
    return distances.clamp(0, reg_max - 1 - _LAST_BIN_MARGIN)


@implements("yolov8.dfl_loss", name="batched")
def dfl_loss(box_logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (N,); looks up two log-probabilities instead of building soft targets.

    Examples
    --------
    >>> dfl_loss(torch.zeros(5, 4 * 16), torch.full((5, 4), 99.0)).shape
    torch.Size([5])
    """
    return _dfl(torch.unflatten(box_logits, -1, (4, -1)), distances)


def _dfl(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (...) of logits (..., 4, R)."""
    last = logits.shape[-1] - 1
    distances = distances.clamp(0, last)
    left = distances.floor().clamp(max=last - 1)
    neighbours = left.long().clamp(0, last - 1)[..., None] + torch.arange(2, device=left.device)
    on_left, on_right = logits.log_softmax(-1).gather(-1, neighbours).unbind(-1)
    return -(on_left * (left + 1 - distances) + on_right * (distances - left)).mean(-1)


# -------------------------------------------------------------------------------------------------------- loss
@implements("yolov8.loss", name="batched")
def loss(
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
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, cls, dfl; decodes all boxes to assign, and the positives again to train.

    Examples
    --------
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss([torch.zeros(1, 65, 4, 4)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> {name: round(float(part), 4) for name, part in parts.items()}
    {'total': 5.5567, 'box': 0.0073, 'cls': 5.5452, 'dfl': 0.0041}
    """
    flat = torch.cat([level.flatten(2) for level in raw], dim=2)
    channels, num_classes = 4 * reg_max, flat.shape[1] - 4 * reg_max
    points, stride = anchor_points(raw, strides)
    gt_index, quality = _assigned(
        flat.detach(), reg_max, points, stride, gt_boxes, gt_labels, gt_valid, topk, alpha, beta
    )
    anchor, listed = _listed(gt_index >= 0, topk * gt_boxes.shape[1])
    matched = gt_index.gather(1, anchor).clamp(min=0)
    weight = quality.gather(1, anchor).where(listed, 0.0)
    chosen = flat.take_along_dim(anchor[:, None], 2).where(listed[:, None], 0.0)
    point, per_stride = points[anchor], stride[anchor][..., None]
    target = (gt_boxes.take_along_dim(matched[..., None], 1) / per_stride).where(listed[..., None], 1.0)

    ciou = _iou(_sides(_decoded(chosen[:, :channels], point)), _sides(target.unbind(-1)))
    dtype = torch.promote_types(flat.dtype, torch.float32)
    normaliser = quality.sum(dtype=dtype).clamp(min=1)
    box = ((1 - ciou) * weight).sum(dtype=dtype) / normaliser
    box = box.where(listed.any(), 0.0)  # without a positive it is 0, whatever it would be divided by
    dfl = torch.zeros_like(box)
    if reg_max > 1:
        logits = torch.unflatten(chosen[:, :channels].mT, -1, (4, reg_max))
        dfl = (_dfl(logits, bbox2dist(point, target, reg_max=reg_max)) * weight).sum(dtype=dtype) / normaliser
        dfl = dfl.where(listed.any(), 0.0)
    # Cross entropy with target t is softplus(x) - x t, and t is above 0 for one class of each positive.
    label = gt_labels.long().gather(1, matched).clamp(0, num_classes - 1)
    own = chosen[:, channels:].gather(1, label[:, None])[:, 0]
    background = F.softplus(flat[:, channels:], threshold=_LINEAR).sum(dtype=dtype)
    cls = (background - (own * weight).sum(dtype=dtype)) / normaliser

    gains = (box_gain, cls_gain, dfl_gain)
    box, cls, dfl = (part * gain for part, gain in zip((box, cls, dfl), gains, strict=True))
    return {"total": (box + cls + dfl) * len(flat), "box": box.detach(), "cls": cls.detach(), "dfl": dfl.detach()}


def _assigned(
    flat: Tensor,
    reg_max: int,
    points: Tensor,
    stride: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    topk: int,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Ground truth and quality (B, A) of each anchor, from detached predictions (B, 4*R+C, A)."""
    box_logits, class_logits = flat[:, : 4 * reg_max], flat[:, 4 * reg_max :]
    box = [(side * stride).to(gt_boxes.dtype) for side in _decoded(box_logits, points)]
    counted = _with_class(gt_labels, gt_valid & (gt_boxes.sum(-1) > 0), class_logits.shape[1])
    score = _of_class(class_logits, gt_labels).sigmoid()
    metric, overlap, in_gt = _align(score, box, points * stride[:, None], gt_boxes, counted, alpha, beta)
    return _match(metric, overlap, in_gt & counted[..., None], topk)


def _decoded(box_logits: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    """Left, top, right and bottom in cells, (B, N) each, from logits (B, 4*R, N) and points (..., N, 2)."""
    x, y = points.unbind(-1)
    left, top, right, bottom = dfl_decode(box_logits.mT).unbind(-1)
    return x - left, y - top, x + right, y + bottom


def _listed(positive: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Anchors (B, P) of a mask (B, A), in order, filled up with the first to a fixed P; and which are of it, (B, P)."""
    images, anchors = positive.shape
    length = min(most, anchors)
    every = torch.arange(anchors, device=positive.device)
    place = (positive.cumsum(1) - 1).where(positive, length)  # the last place is thrown away
    listed = every[:length] < positive.sum(1, keepdim=True)
    spread = torch.zeros(images, length + 1, dtype=torch.int64, device=positive.device)
    return spread.scatter(1, place, every.expand(images, -1))[:, :length], listed
