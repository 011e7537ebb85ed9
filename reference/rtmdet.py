"""RTMDet: point priors and dynamic soft label assignment.

Every cell of every level has one *prior*, a point at the cell's top-left corner, and predicts C class logits and the
four distances from the point to the sides of a box. Per image, the priors inside any ground truth are *candidates*, for
all of them; a cost of soft classification, IoU and distance from the centre says how well each candidate suits each
ground truth; then, as in YOLOX's SimOTA, each ground truth claims as many of its cheapest candidates as its best
thirteen IoUs add up to, and a prior that several claim goes to the cheapest.

Stages, in the order data flows: `priors`; which of them take part, by the functions `valid_flags` and `inside_flags`
of the anchor head (`detoracle.reference.anchor_head_boxes`); `decode` and its inverse `encode`; `candidates`, `cost`,
`dynamic_k_matching` (these three together `assign`). Priors and distances are in `detoracle.reference.rtmdet_points`,
targets and losses in `detoracle.reference.rtmdet_loss`, the head network in `detoracle.reference.rtmdet_head`.

Quirks: a candidate of one ground truth may go to another in which it does not lie; the distance cost grows tenfold a
stride and overflows for far or huge boxes; ignored regions are never read.
Source: OpenMMLab mmdetection 3.x (Apache-2.0), described from its observed behaviour.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rtmdet_points import SOURCE, decode, encode, priors
from detoracle.reference.yolox import _claim, _matched_iou, _resolve
from detoracle.reference.yolox_cost import _inside

__all__ = [
    "assign",
    "candidates",
    "cost",
    "decode",
    "dynamic_k_matching",
    "encode",
    "priors",
]

_UNMATCHED_OVERLAP = -1e8  # what upstream stores as the overlap of a prior that was not matched
_MASK_EPS = 1e-6


# ------------------------------------------------------------------------------------------------ 3. candidates
@operation("rtmdet.candidates", kind="values", source=SOURCE)
def candidates(priors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> Tensor:
    """Priors that may be assigned at all: those that lie strictly inside some ground truth.

    A prior inside one ground truth is a candidate for all others too.

    Parameters
    ----------
    priors : Tensor (A, 4) float
        x, y, stride along x, stride along y in pixels.
    inside : Tensor (B, A) bool
        Priors that take part.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in pixels, padded to the same G.
    gt_valid : Tensor (B, G) bool
        False for padding.

    Returns
    -------
    candidate : Tensor (B, A) bool

    Examples
    --------
    >>> on_edge_and_in = torch.tensor([[0.0, 0, 8, 8], [8.0, 8, 8, 8]])
    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> candidates(on_edge_and_in, one.expand(1, 2), torch.tensor([[[0.0, 0, 9, 9]]]), one).tolist()
    [[False, True]]
    """
    candidate = torch.zeros_like(inside)
    for image, valid in enumerate(gt_valid):
        candidate[image] = inside[image] & _near(priors, gt_boxes[image, valid])
    return candidate


def _near(priors: Tensor, gt_boxes: Tensor) -> Tensor:
    """Priors of one image that are inside some ground truth, (A,)."""
    return _inside(priors[:, :2], gt_boxes[:, None]).any(0)


# ------------------------------------------------------------------------------------------------------ 4. cost
@operation("rtmdet.cost", kind="values", source=SOURCE)
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
    """How badly each candidate suits each ground truth: classification, IoU, and distance from the centre.

    The classification cost is the binary cross entropy of the logits against the one-hot class times the IoU, weighted
    by the squared difference between the two, and summed over *all* classes. The IoU cost is -log(IoU + 1e-7) times its
    weight. The distance cost is 10 to the power of the distance from the centre, in strides, less the radius: it
    overflows where that exceeds 38 (float32).

    Parameters
    ----------
    class_logits : Tensor (B, A, C) float
    boxes : Tensor (B, A, 4) float
        Predicted left, top, right, bottom in pixels (`decode`).
    priors : Tensor (A, 4) float
        x, y, stride along x, stride along y in pixels.
    candidate : Tensor (B, A) bool
        From `candidates`.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    gt_masks : Tensor (B, G, H, W) bool or None
        Instance masks; a ground truth's centre is then its mask's centre of mass, not the box's.
    soft_center_radius : float
        Strides at which the distance cost is 1.
    iou_weight : float
        Weight of the IoU cost.

    Returns
    -------
    cost : Tensor (B, G, A) float
        inf for priors that are no candidates and for padding.
    iou : Tensor (B, G, A) float
        0 for priors that are no candidates and for padding.

    Raises
    ------
    UpstreamRaises
        ``rtmdet.label-out-of-range``, in an image that has candidates.

    Examples
    --------
    >>> logits, boxes = torch.tensor([[[9.0, -9.0]]]), torch.tensor([[[0.0, 0, 16, 16]]])
    >>> one, label = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    >>> total, iou = cost(logits, boxes, torch.tensor([[8.0, 8, 8, 8]]), one, boxes, label, one)
    >>> round(float(total), 6), iou.tolist()  # perfect but for the distance cost of 10 to the power -3
    (0.001, [[[1.0]]])
    """
    shape, dtype = (*gt_valid.shape, priors.shape[0]), torch.promote_types(boxes.dtype, gt_boxes.dtype)
    full_cost, full_iou = (boxes.new_full(shape, fill, dtype=dtype) for fill in (torch.inf, 0.0))
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        if not valid.any() or not near.any():
            continue
        _check_labels(gt_labels[image, valid], class_logits.shape[-1], where=f"rtmdet.cost, image {image}")
        pair_cost, pair_iou = _cost(
            class_logits[image, near],
            boxes[image, near],
            priors[near],
            gt_boxes[image, valid],
            gt_labels[image, valid],
            _centers(gt_boxes[image, valid], None if gt_masks is None else gt_masks[image, valid]),
            soft_center_radius,
            iou_weight,
        )
        pairs = valid[:, None] & near[None]
        full_cost[image, pairs] = pair_cost.flatten().to(full_cost.dtype)
        full_iou[image, pairs] = pair_iou.flatten()
    return full_cost, full_iou


def _check_labels(gt_labels: Tensor, num_classes: int, *, where: str) -> None:
    if not 0 <= int(gt_labels.min()) <= int(gt_labels.max()) < num_classes:
        raise UpstreamRaises(
            "rtmdet.label-out-of-range",
            expected=f"labels 0 to {num_classes - 1}",
            got=str(gt_labels.tolist()),
            where=where,
        )


def _centers(gt_boxes: Tensor, gt_masks: Tensor | None) -> Tensor:
    """Centres (G, 2) of boxes, or of mass of masks."""
    if gt_masks is None:
        return (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    masses = gt_masks.to(torch.float32)
    row, column = (torch.arange(side, device=masses.device, dtype=masses.dtype) for side in masses.shape[1:])
    mass = masses.sum((1, 2)) + _MASK_EPS
    return torch.stack([(masses * column).sum((1, 2)) / mass, (masses * row[:, None]).sum((1, 2)) / mass], dim=1)


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
    """Cost and IoU (G, N) of one image's candidates."""
    iou = unchecked(overlaps_mmdet)(gt_boxes, boxes)
    distance_cost = _distance_cost(_distance(priors, centers), soft_center_radius)
    return _class_cost(class_logits, gt_labels, iou) + _iou_cost(iou, iou_weight) + distance_cost, iou


def _iou_cost(iou: Tensor, iou_weight: float) -> Tensor:
    return -torch.log(iou + 1e-7) * iou_weight


def _distance(priors: Tensor, centers: Tensor) -> Tensor:
    """Distance of points from ground truths' centres, in strides, (G, N)."""
    return torch.sqrt(((priors[:, :2] - centers[:, None]) ** 2).sum(-1)) / priors[:, 2]


def _distance_cost(distance: Tensor, soft_center_radius: float) -> Tensor:
    return 10.0 ** (distance - soft_center_radius)


def _class_cost(class_logits: Tensor, gt_labels: Tensor, iou: Tensor) -> Tensor:
    """Quality focal loss of each candidate, towards the IoU in the ground truth's class and 0 in all others, (G, N)."""
    others = _quality_cost(class_logits, torch.zeros_like(class_logits, dtype=iou.dtype))
    own = _quality_cost(class_logits[:, gt_labels], iou.transpose(0, 1))
    classes = torch.arange(class_logits.shape[1], device=gt_labels.device)
    return torch.stack(
        [torch.where(classes == label, own[:, gt, None], others).sum(-1) for gt, label in enumerate(gt_labels)]
    )


def _quality_cost(logits: Tensor, target: Tensor) -> Tensor:
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return entropy * torch.abs(target - torch.sigmoid(logits)) ** 2


# ------------------------------------------------------------------------------------- 5. and 6. dynamic k, conflicts
@operation("rtmdet.dynamic_k_matching", kind="assignment", source=SOURCE)
def dynamic_k_matching(
    cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor, *, topk: int = 13
) -> tuple[Tensor, Tensor]:
    """Let each ground truth claim its cheapest candidates, and give contested priors to the cheapest claim.

    The same as YOLOX's, but for the number of IoUs that add up to the number of claims, and for an image without a
    candidate, which is background.

    Parameters
    ----------
    cost : Tensor (B, G, A) float
        From `cost`.
    iou : Tensor (B, G, A) float
        From `cost`.
    candidate : Tensor (B, A) bool
        From `candidates`.
    gt_valid : Tensor (B, G) bool
        False for padding.
    topk : int
        How many of the largest IoUs add up to a ground truth's number of claims, which is 1 at least.

    Returns
    -------
    gt_index : Tensor (B, A) int
        Ground truth of each prior, -1 for background.
    dynamic_k : Tensor (B, G) int or None
        Number of claims; 0 for padding and in an image without candidates.

    Examples
    --------
    >>> cost = torch.tensor([[[1.0, 2.0, 9.0], [0.5, 3.0, 9.0]]])
    >>> iou = torch.tensor([[[0.9, 0.8, 0.4], [0.9, 0.1, 0.0]]])
    >>> every = torch.ones(1, 3, dtype=torch.bool)
    >>> gt_index, dynamic_k = dynamic_k_matching(cost, iou, every, every[:, :2])
    >>> gt_index.tolist(), dynamic_k.tolist()
    ([[1, 0, -1]], [[2, 1]])
    """
    if topk < 0:
        raise InputError("topk", expected="0 or more", got=str(topk), where="rtmdet")
    gt_index = torch.full(candidate.shape, BACKGROUND, device=cost.device)
    dynamic_k = torch.zeros(gt_valid.shape, dtype=torch.int64, device=cost.device)
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        if not valid.any() or not near.any():
            continue
        image_cost = cost[image, valid][:, near]
        k = _dynamic_k(iou[image, valid][:, near], topk)
        winner = _resolve(_claim(image_cost, k), image_cost)
        ground_truths = valid.nonzero().flatten()
        gt_index[image, near] = torch.where(winner >= 0, ground_truths[winner], BACKGROUND)
        dynamic_k[image, valid] = k
    return gt_index, dynamic_k


def _dynamic_k(iou: Tensor, topk: int) -> Tensor:
    """Sum of the best IoUs, truncated, at least 1; a NaN makes it 1. (G, N) to (G,)."""
    best = iou.T.topk(min(topk, iou.shape[1]), dim=0).values.sum(0)
    return best.nan_to_num(nan=1.0).long().clamp(min=1)


# ---------------------------------------------------------------------------------------------------- 7. result
@operation("rtmdet.assign", kind="assignment", source=SOURCE)
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
    """Dynamic soft label assignment: which ground truth each prior is trained towards, and the IoU it has with it.

    Parameters
    ----------
    class_logits : Tensor (B, A, C) float
    boxes : Tensor (B, A, 4) float
        Predicted left, top, right, bottom in pixels (`decode`).
    priors : Tensor (A, 4) float
        x, y, stride along x, stride along y in pixels (`priors`).
    inside : Tensor (B, A) bool
        Priors that take part.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    gt_masks : Tensor (B, G, H, W) bool or None
        As in `cost`.
    topk : int
        As in `dynamic_k_matching`.
    soft_center_radius : float
        As in `cost`.
    iou_weight : float
        As in `cost`.

    Returns
    -------
    gt_index : Tensor (B, A) int
        Ground truth of each prior, -1 for background, -2 for priors that do not take part.
    quality : Tensor (B, A) float
        IoU of prediction and assigned ground truth, 0 elsewhere.
    dynamic_k : Tensor (B, G) int or None
        Number of claims of each ground truth; 0 for padding and in an image without candidates.
    max_overlaps : Tensor (B, A) float or None
        What upstream stores as the overlap: the quality of positives, -1e8 elsewhere, or 0 in an image without
        ground truths or candidates.

    Raises
    ------
    UpstreamRaises
        ``rtmdet.label-out-of-range``.

    Examples
    --------
    >>> points = priors([(2, 2)], [8])
    >>> boxes = decode(points[:, :2], torch.full((1, 4, 4), 8.0))
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> label = torch.zeros(1, 1, dtype=torch.int64)
    >>> assign(torch.zeros(1, 4, 2), boxes, points, one.expand(1, 4), gt, label, one).gt_index.tolist()
    [[-1, -1, -1, 0]]
    """
    candidate = candidates(priors, inside, gt_boxes, gt_valid)
    pair_cost, iou = cost(
        class_logits,
        boxes,
        priors,
        candidate,
        gt_boxes,
        gt_labels,
        gt_valid,
        gt_masks=gt_masks,
        soft_center_radius=soft_center_radius,
        iou_weight=iou_weight,
    )
    gt_index, dynamic_k = dynamic_k_matching(pair_cost, iou, candidate, gt_valid, topk=topk)
    quality = _matched_iou(gt_index, iou)
    unmatched = torch.where(candidate.any(1, keepdim=True), _UNMATCHED_OVERLAP, 0.0).to(quality.dtype)
    extra = {"dynamic_k": dynamic_k, "max_overlaps": torch.where(gt_index >= 0, quality, unmatched)}
    return Assignment(torch.where(inside, gt_index, IGNORED), quality, extra)
