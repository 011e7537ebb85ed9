"""YOLOX's candidates, and what each pair of a ground truth and a candidate costs.

Two flavours. ``tutorial`` (the tutorial "YOLOX from scratch"; official releases 0.1 to 0.3.0 assign alike): candidates
lie in a box or within 2.5 strides of its centre, and both together are preferred by 1e5. ``official`` (the main branch
of 2025): candidates lie within 1.5 strides of a centre, preferred by 1e6, and ground truths are counted by their row
sums.

Stages, in the order data flows: `candidates`, `cost`. Source: Megvii-BaseDetection/YOLOX (Apache-2.0), described from
its observed behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detoracle.reference.boxes import cxcywh_to_xyxy, iou_yolox
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.rounding import log_at_least

__all__ = ["FLAVOURS", "Flavour", "candidates", "cost"]

_SOURCE = "Megvii-BaseDetection/YOLOX (Apache-2.0)"
_IOU_COST_WEIGHT = 3.0


@dataclass(frozen=True)
class Flavour:
    """What differs between the published versions.

    Attributes
    ----------
    center_radius : float
        Half side of the square around a ground truth's centre, in strides.
    penalty : float
        Cost of a pair outside the preferred geometry.
    box_counts : bool
        Candidates may also lie in the box alone, and the preferred geometry is box *and* square.
    counts_rows : bool
        Ground truths are counted by their row sums (see `counted_ground_truths`).
    """

    center_radius: float
    penalty: float
    box_counts: bool
    counts_rows: bool


FLAVOURS = {
    "tutorial": Flavour(center_radius=2.5, penalty=1e5, box_counts=True, counts_rows=False),
    "official": Flavour(center_radius=1.5, penalty=1e6, box_counts=False, counts_rows=True),
}


# ------------------------------------------------------------------------------------------------ 2. candidates
@operation("yolox.candidates", kind="values", source=_SOURCE)
def candidates(
    anchor_points: Tensor, anchor_strides: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *, flavour: str = "tutorial"
) -> tuple[Tensor, Tensor]:
    """Anchor points that may be assigned at all, and the pairs whose geometry is preferred.

    A point exactly on an edge is outside.

    Parameters
    ----------
    anchor_points : Tensor (A, 2) float
        Cell centres in pixels.
    anchor_strides : Tensor (A,) float
        Pixels a cell.
    gt_boxes : Tensor (B, G, 4) float
        cx, cy, w, h in pixels.
    gt_valid : Tensor (B, G) bool
        False for ground truths that take no part.
    flavour : {"tutorial", "official"}
        Which published version.

    Returns
    -------
    candidate : Tensor (B, A) bool
        Near at least one ground truth of the image.
    geometry : Tensor (B, G, A) bool
        Pairs that cost no penalty; False for padding.

    Examples
    --------
    >>> points, strides = torch.tensor([[4.0, 4.0], [44.0, 4.0]]), torch.tensor([8.0, 8.0])
    >>> gt = torch.tensor([[[8.0, 8, 16, 16]]])
    >>> candidate, geometry = candidates(points, strides, gt, torch.ones(1, 1, dtype=torch.bool))
    >>> candidate.tolist(), geometry.tolist()
    ([[True, False]], [[[True, False]]])
    """
    candidate = gt_valid.new_zeros(gt_boxes.shape[0], anchor_points.shape[0])
    geometry = gt_valid.new_zeros(*gt_valid.shape, anchor_points.shape[0])
    for image, valid in enumerate(gt_valid):
        near, preferred = _candidates(anchor_points, anchor_strides, gt_boxes[image, valid], FLAVOURS[flavour])
        candidate[image] = near.any(0)
        geometry[image, valid] = preferred
    return candidate, geometry


def _candidates(points: Tensor, strides: Tensor, gt_boxes: Tensor, flavour: Flavour) -> tuple[Tensor, Tensor]:
    """For one image: which ground truth makes which point a candidate, and which pairs are preferred; both (G, A)."""
    in_box = _inside(points, cxcywh_to_xyxy(gt_boxes)[:, None])
    centre, half_side = gt_boxes[:, None, :2], (flavour.center_radius * strides)[None, :, None]
    in_center = _inside(points, torch.cat([centre - half_side, centre + half_side], dim=-1))
    return (in_box | in_center, in_box & in_center) if flavour.box_counts else (in_center, in_center)


def _inside(points: Tensor, corners: Tensor) -> Tensor:
    """Points strictly inside boxes given by corners, broadcast."""
    distances = torch.cat([points - corners[..., :2], corners[..., 2:] - points], dim=-1)
    return (distances > 0).all(-1)


# ------------------------------------------------------------------------------------------------------ 3. cost
@operation("yolox.cost", kind="values", source=_SOURCE)
def cost(
    predictions: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    candidate: Tensor,
    geometry: Tensor,
    *,
    flavour: str = "tutorial",
) -> tuple[Tensor, Tensor]:
    """How badly each candidate suits each ground truth: classification, 3 times IoU, and the geometry penalty.

    The classification cost is the binary cross entropy, summed over classes, of sqrt(class probability * objectness
    probability) against the one-hot class, each logarithm clamped at -100. The IoU cost is -log(IoU + 1e-8).

    Parameters
    ----------
    predictions : Tensor (B, A, 5+C) float
        cx, cy, w, h in pixels, objectness logit, C class logits.
    gt_boxes : Tensor (B, G, 4) float
        cx, cy, w, h in pixels.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for ground truths that take no part.
    candidate : Tensor (B, A) bool
        From `candidates`.
    geometry : Tensor (B, G, A) bool
        From `candidates`.
    flavour : {"tutorial", "official"}
        Which published version.

    Returns
    -------
    cost : Tensor (B, G, A) float
        inf for anchors that are no candidates and for padding.
    iou : Tensor (B, G, A) float
        0 for anchors that are no candidates and for padding.

    Raises
    ------
    UpstreamRaises
        ``yolox.label-out-of-range``, ``yolox.non-finite-prediction``.

    Examples
    --------
    >>> predictions = torch.tensor([[[8.0, 8, 16, 16, 20, 20]]])
    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> gt = torch.tensor([[[8.0, 8, 16, 16]]])
    >>> total, iou = cost(predictions, gt, torch.zeros(1, 1, dtype=torch.int64), one, one, one[None])
    >>> bool(abs(total) < 1e-6), iou.tolist()
    (True, [[[1.0]]])
    """
    shape = (*gt_valid.shape, predictions.shape[1])
    full_cost, full_iou = predictions.new_full(shape, torch.inf), predictions.new_zeros(shape)
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        pair_cost, pair_iou = _cost(
            predictions[image, near],
            gt_boxes[image, valid],
            gt_labels[image, valid],
            geometry[image, valid][:, near],
            FLAVOURS[flavour],
            where=f"yolox.cost, image {image}",
        )
        full_cost[image, valid] = full_cost[image, valid].masked_scatter(
            near.expand_as(geometry[image, valid]), pair_cost
        )
        full_iou[image, valid] = full_iou[image, valid].masked_scatter(near.expand_as(geometry[image, valid]), pair_iou)
    return full_cost, full_iou


def _cost(
    predictions: Tensor, gt_boxes: Tensor, gt_labels: Tensor, geometry: Tensor, flavour: Flavour, *, where: str
) -> tuple[Tensor, Tensor]:
    """Cost and IoU (G, N) of one image's candidates."""
    iou = unchecked(iou_yolox)(gt_boxes, predictions[:, :4])
    if not len(gt_labels):
        return iou, iou
    total = _class_cost(predictions, gt_labels, where=where) + _IOU_COST_WEIGHT * -torch.log(iou + 1e-8)
    return torch.where(geometry, total, total + flavour.penalty), iou


def _class_cost(predictions: Tensor, gt_labels: Tensor, *, where: str) -> Tensor:
    """Binary cross entropy of each candidate's probabilities against each ground truth's one-hot class, (G, N)."""
    num_classes = predictions.shape[1] - 5
    if not 0 <= int(gt_labels.min()) <= int(gt_labels.max()) < num_classes:
        raise UpstreamRaises(
            "yolox.label-out-of-range",
            expected=f"labels 0 to {num_classes - 1}",
            got=str(gt_labels.tolist()),
            where=where,
        )
    probability = torch.sqrt(torch.sigmoid(predictions[:, 5:]) * torch.sigmoid(predictions[:, 4:5]))
    if bool(torch.isnan(probability).any()):
        raise UpstreamRaises(
            "yolox.non-finite-prediction", expected="class probabilities in [0, 1]", got="NaN", where=where
        )
    log_is, log_is_not = log_at_least(probability, -100.0), log_at_least(-probability, -100.0, torch.log1p)
    classes = torch.arange(num_classes, device=gt_labels.device)
    present, row = torch.unique(gt_labels, return_inverse=True)
    return torch.stack([-torch.where(classes == label, log_is, log_is_not).sum(-1) for label in present])[row]
