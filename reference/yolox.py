"""YOLOX: SimOTA label assignment and loss.

An anchor point per grid cell predicts one box, one objectness and C class logits. Per image, anchor points near a
ground truth become *candidates*; a cost of classification and IoU says how well each candidate suits each ground truth;
each ground truth claims as many of its cheapest candidates as its best ten IoUs add up to (*dynamic k*); an anchor
that several claim goes to the cheapest. Positives then train box, class and objectness, all others objectness only.

Two flavours. ``tutorial`` (the tutorial "YOLOX from scratch"; official releases 0.1 to 0.3.0 assign alike): candidates
lie in a box or within 2.5 strides of its centre, and both together are preferred by 1e5. ``official`` (the main branch
of 2025): candidates lie within 1.5 strides of a centre, preferred by 1e6, and ground truths are counted by their row
sums.

Stages, in the order data flows: `decode`, `candidates`, `cost`, `dynamic_k_matching` (together `assign`), `loss`.
Source: Megvii-BaseDetection/YOLOX (Apache-2.0), described from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND, Assignment
from detoracle.reference.boxes import cxcywh_to_xyxy, iou_loss_yolox, iou_yolox
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rounding import log_at_least

__all__ = [
    "FLAVOURS",
    "Flavour",
    "anchor_grid",
    "assign",
    "candidates",
    "cost",
    "counted_ground_truths",
    "decode",
    "dynamic_k_matching",
    "loss",
]

_SOURCE = "Megvii-BaseDetection/YOLOX (Apache-2.0)"
_TOP_CANDIDATES = 10  # IoUs that add up to dynamic k
_IOU_COST_WEIGHT = 3.0
_BOX_LOSS_WEIGHT = 5.0


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


# ---------------------------------------------------------------------------------------------------- 1. decode
def anchor_grid(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, anchor points and strides of all levels, level-major, row-major within a level.

    Parameters
    ----------
    sizes : sequence of (int, int)
        Height and width of each level, in cells.
    strides : sequence of int
        Pixels a cell, one a level.
    like : Tensor
        Gives dtype and device.

    Returns
    -------
    cells : Tensor (A, 2) float
        Column and row.
    anchor_points : Tensor (A, 2) float
        Cell centres in pixels.
    anchor_strides : Tensor (A,) float

    Examples
    --------
    >>> cells, points, strides = anchor_grid([(1, 2)], [8], like=torch.zeros(()))
    >>> cells.tolist(), points.tolist(), strides.tolist()
    ([[0.0, 0.0], [1.0, 0.0]], [[4.0, 4.0], [12.0, 4.0]], [8.0, 8.0])
    """
    cells, anchor_strides = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cells.append(torch.stack([column.flatten(), row.flatten()], dim=1))
        anchor_strides.append(torch.full((height * width,), stride))
    cell = torch.cat(cells).to(device=like.device, dtype=like.dtype)
    anchor_stride = torch.cat(anchor_strides).to(cell)
    return cell, (cell + 0.5) * anchor_stride[:, None], anchor_stride


@operation("yolox.decode", kind="values", gradients=("raw",), source=_SOURCE)
def decode(raw: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Turn raw head maps into boxes in pixels; logits stay as they are.

    The centre is offset from the cell's *corner*, though the anchor point of the assignment is the cell's centre.
    Upstream's tutorial code overwrites the caller's maps here; the oracle does not.

    Parameters
    ----------
    raw : list of Tensor (B, 5+C, Hl, Wl) float
        Per level: x, y, w, h (cells, log scale), objectness logit, C class logits.
    strides : sequence of int
        Pixels a cell, one a level.

    Returns
    -------
    predictions : Tensor (B, A, 5+C) float
        cx, cy, w, h in pixels, objectness logit, C class logits.

    Examples
    --------
    >>> decode([torch.zeros(1, 6, 1, 2)], [8])[0, :, :4].tolist()
    [[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 8.0, 8.0]]
    """
    _check_strides(raw, strides)
    return _decode(raw, strides)


def _check_strides(raw: Sequence[Tensor], strides: Sequence[int]) -> None:
    if len(strides) != len(raw) or any(s <= 0 for s in strides):
        raise InputError(
            "strides", expected=f"{len(raw)} positive numbers, one a level", got=str(list(strides)), where="yolox"
        )
    if raw[0].shape[0] == 0:
        raise InputError("raw", expected="at least one image", got="an empty batch", where="yolox")


def _flatten(raw: Sequence[Tensor]) -> Tensor:
    """(B, 5+C, H, W) maps to (B, A, 5+C)."""
    return torch.cat([level.flatten(2).permute(0, 2, 1) for level in raw], dim=1)


def _decode(raw: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    flat = _flatten(raw)
    cell, _, stride = anchor_grid([(level.shape[2], level.shape[3]) for level in raw], strides, like=flat)
    centre = (flat[..., :2] + cell) * stride[:, None]
    size = torch.exp(flat[..., 2:4]) * stride[:, None]
    return torch.cat([centre, size, flat[..., 4:]], dim=-1)


# ------------------------------------------------------------------------------------------------ ground truths
def counted_ground_truths(
    gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, *, flavour: str = "tutorial"
) -> Tensor:
    """Ground truths that take part in training.

    The official code counts the label rows (class, cx, cy, w, h) whose sum is positive and then uses the *first* that
    many rows: one row with a sum of zero or less makes the last one drop out. The tutorial keeps all.

    Parameters
    ----------
    gt_boxes : Tensor (B, G, 4) float
        cx, cy, w, h in pixels.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    flavour : {"tutorial", "official"}

    Returns
    -------
    counted : Tensor (B, G) bool

    Examples
    --------
    >>> boxes = torch.tensor([[[-40.0, -30, 50, 10], [32, 32, 20, 20]]])
    >>> labels, valid = torch.tensor([[1, 0]]), torch.tensor([[True, True]])
    >>> counted_ground_truths(boxes, labels, valid, flavour="official").tolist()
    [[True, False]]
    """
    if not FLAVOURS[flavour].counts_rows:
        return gt_valid
    row_sum = torch.cat([gt_labels[..., None].to(gt_boxes.dtype), gt_boxes], dim=-1).sum(-1)
    counted = ((row_sum > 0) & gt_valid).sum(1, keepdim=True)
    return gt_valid & (gt_valid.cumsum(1) <= counted)


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


# ------------------------------------------------------------------------------------- 4. and 5. dynamic k, conflicts
@operation("yolox.dynamic_k_matching", kind="assignment", source=_SOURCE)
def dynamic_k_matching(cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Let each ground truth claim its cheapest candidates, and give contested anchors to the cheapest claim.

    The number of claims is the sum of the ground truth's ten largest IoUs over *all* candidates, truncated, at least 1.
    A contested anchor goes to the ground truth with the smallest cost over **all** of the image, also one that did not
    claim it; a ground truth can so end with no anchor. Ties: lowest anchor index claims, lowest ground-truth index
    wins.

    Parameters
    ----------
    cost : Tensor (B, G, A) float
        From `cost`.
    iou : Tensor (B, G, A) float
        From `cost`.
    candidate : Tensor (B, A) bool
        From `candidates`.
    gt_valid : Tensor (B, G) bool
        False for ground truths that take no part.

    Returns
    -------
    gt_index : Tensor (B, A) int
        Ground truth of each anchor, -1 for background.
    dynamic_k : Tensor (B, G) int or None
        Number of claims; 0 for padding.

    Raises
    ------
    UpstreamRaises
        ``yolox.no-candidate``: an image has ground truths but no candidate.

    Examples
    --------
    >>> cost = torch.tensor([[[1.0, 2.0, 9.0], [0.5, 3.0, 9.0]]])
    >>> iou = torch.tensor([[[0.9, 0.8, 0.4], [0.9, 0.1, 0.0]]])
    >>> every = torch.ones(1, 3, dtype=torch.bool)
    >>> gt_index, dynamic_k = dynamic_k_matching(cost, iou, every, every[:, :2])
    >>> gt_index.tolist(), dynamic_k.tolist()
    ([[1, 0, -1]], [[2, 1]])
    """
    gt_index = torch.full(candidate.shape, BACKGROUND, device=cost.device)
    dynamic_k = torch.zeros(gt_valid.shape, dtype=torch.int64, device=cost.device)
    for image, valid in enumerate(gt_valid):
        near = candidate[image]
        if not valid.any():
            continue
        _require_candidates(near, where=f"yolox.dynamic_k_matching, image {image}")
        image_cost, image_iou = cost[image, valid][:, near], iou[image, valid][:, near]
        k = _dynamic_k(image_iou)
        winner = _resolve(_claim(image_cost, k), image_cost)
        ground_truths = valid.nonzero().flatten()
        gt_index[image, near] = torch.where(winner >= 0, ground_truths[winner], BACKGROUND)
        dynamic_k[image, valid] = k
    return gt_index, dynamic_k


def _require_candidates(near: Tensor, *, where: str) -> None:
    if not near.any():
        raise UpstreamRaises("yolox.no-candidate", expected="an anchor near some ground truth", got="none", where=where)


def _dynamic_k(iou: Tensor) -> Tensor:
    """Sum of the best IoUs, truncated, at least 1; a NaN makes it 1. (G, N) to (G,)."""
    best = iou.topk(min(_TOP_CANDIDATES, iou.shape[1]), dim=1).values.sum(1)
    return best.nan_to_num(nan=1.0).long().clamp(min=1)


def _claim(cost: Tensor, k: Tensor) -> Tensor:
    """Mark each ground truth's k cheapest candidates, (G, N) bool."""
    claims = torch.zeros_like(cost, dtype=torch.bool)
    for row, (gt_cost, count) in enumerate(zip(cost, k.tolist(), strict=True)):
        claims[row, gt_cost.argsort(stable=True)[:count]] = True
    return claims


def _resolve(claims: Tensor, cost: Tensor) -> Tensor:
    """Winning ground truth of each candidate, (N,), -1 where nobody claims."""
    claimants = claims.sum(0)
    only_claimant, cheapest_of_all = claims.int().argmax(0), cost.argmin(0)
    return torch.where(claimants > 1, cheapest_of_all, torch.where(claimants == 1, only_claimant, BACKGROUND))


# ---------------------------------------------------------------------------------------------------- 6. result
@operation("yolox.assign", kind="assignment", source=_SOURCE)
@torch.no_grad()
def assign(
    predictions: Tensor,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
) -> Assignment:
    """SimOTA: which ground truth each anchor is trained towards, and the IoU it has with it.

    Parameters
    ----------
    predictions : Tensor (B, A, 5+C) float
        cx, cy, w, h in pixels, objectness logit, C class logits (`decode`).
    anchor_points : Tensor (A, 2) float
        Cell centres in pixels.
    anchor_strides : Tensor (A,) float
        Pixels a cell.
    gt_boxes : Tensor (B, G, 4) float
        cx, cy, w, h in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    flavour : {"tutorial", "official"}
        Which published version.

    Returns
    -------
    gt_index : Tensor (B, A) int
        Ground truth of each anchor, -1 for background.
    quality : Tensor (B, A) float
        IoU of prediction and assigned ground truth, 0 for background.
    dynamic_k : Tensor (B, G) int or None
        Number of claims of each ground truth, 0 for padding and where nothing is assigned.

    Raises
    ------
    UpstreamRaises
        ``yolox.no-candidate``, ``yolox.label-out-of-range``, ``yolox.non-finite-prediction``.

    Examples
    --------
    >>> cells, points, strides = anchor_grid([(2, 2)], [8], like=torch.zeros(()))
    >>> predictions = decode([torch.zeros(1, 6, 2, 2)], [8])
    >>> gt = torch.tensor([[[4.0, 4, 8, 8]]])
    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> assign(predictions, points, strides, gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1, -1, -1]]
    """
    counted = counted_ground_truths(gt_boxes, gt_labels, gt_valid, flavour=flavour)
    candidate, geometry = candidates(anchor_points, anchor_strides, gt_boxes, counted, flavour=flavour)
    for image in range(len(candidate)):
        if counted[image].any():
            _require_candidates(candidate[image], where=f"yolox.assign, image {image}")
    pair_cost, iou = cost(predictions, gt_boxes, gt_labels, counted, candidate, geometry, flavour=flavour)
    gt_index, dynamic_k = dynamic_k_matching(pair_cost, iou, candidate, counted)
    return Assignment(gt_index, _matched_iou(gt_index, iou), {"dynamic_k": dynamic_k})


def _matched_iou(gt_index: Tensor, iou: Tensor) -> Tensor:
    """IoU of each anchor with its ground truth, (B, A), 0 for background."""
    if iou.shape[1] == 0:
        return iou.new_zeros(gt_index.shape)
    matched = iou.gather(1, gt_index.clamp(min=0)[:, None])[:, 0]
    return torch.where(gt_index >= 0, matched, 0.0)


# ------------------------------------------------------------------------------------------- 7. and 8. targets, loss
@operation("yolox.loss", kind="loss", gradients=("raw",), source=_SOURCE)
def loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    use_l1: bool = False,
) -> dict[str, Tensor]:
    """Training loss of a batch, and its gradient to the raw head maps.

    total = box + objectness + classification (+ l1), each summed over the batch and divided by the number of positives
    (at least 1); box carries its weight of 5. Class targets are one-hot times matched IoU. No gradient flows through
    the assignment or the matched IoU.

    Parameters
    ----------
    raw : list of Tensor (B, 5+C, Hl, Wl) float
        Raw head maps, one a level.
    strides : sequence of int
        Pixels a cell, one a level.
    gt_boxes : Tensor (B, G, 4) float
        cx, cy, w, h in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding.
    flavour : {"tutorial", "official"}
        Which published version.
    use_l1 : bool
        Add the L1 term of the last epochs, on undecoded boxes.

    Returns
    -------
    total : Tensor () float
    box : Tensor () float or None
    objectness : Tensor () float or None
    classification : Tensor () float or None
    l1 : Tensor () float or None

    Raises
    ------
    UpstreamRaises
        As `assign`.

    Examples
    --------
    >>> raw = [torch.zeros(1, 6, 2, 2)]
    >>> gt, one = torch.tensor([[[4.0, 4, 8, 8]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss(raw, [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> round(float(parts["objectness"]), 4)
    2.7726
    """
    _check_strides(raw, strides)
    predictions = _decode(raw, strides)
    cells, points, anchor_strides = anchor_grid(
        [(level.shape[2], level.shape[3]) for level in raw], strides, like=predictions
    )
    assignment = assign(predictions.detach(), points, anchor_strides, gt_boxes, gt_labels, gt_valid, flavour=flavour)
    return _loss(_flatten(raw), predictions, cells, anchor_strides, gt_boxes, gt_labels, assignment, use_l1)


def _loss(
    flat: Tensor,
    predictions: Tensor,
    cells: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    assignment: Assignment,
    use_l1: bool,
) -> dict[str, Tensor]:
    """Loss of a given assignment."""
    positive = assignment.positive
    image, anchor = positive.nonzero(as_tuple=True)
    ground_truth = assignment.gt_index[positive]
    normaliser = max(len(image), 1)

    box_target = gt_boxes[image, ground_truth]
    predicted = predictions[image, anchor]
    classes = torch.arange(predictions.shape[-1] - 5, device=gt_labels.device)
    one_hot = gt_labels[image, ground_truth][:, None] == classes
    class_target = one_hot * assignment.quality[image, anchor][:, None]
    objectness_target = positive.to(gt_boxes.dtype)

    box = unchecked(iou_loss_yolox)(predicted[:, :4], box_target).sum() * _BOX_LOSS_WEIGHT
    objectness = F.binary_cross_entropy_with_logits(predictions[..., 4], objectness_target, reduction="none").sum()
    classification = F.binary_cross_entropy_with_logits(predicted[:, 5:], class_target, reduction="none").sum()
    parts = {"box": box, "objectness": objectness, "classification": classification}
    if use_l1:
        target = _l1_target(box_target, cells[anchor], anchor_strides[anchor])
        parts["l1"] = torch.abs(flat[image, anchor][:, :4] - target).sum()
    parts = {name: part / normaliser for name, part in parts.items()}
    total = parts["box"] + parts["objectness"] + parts["classification"]
    return {"total": total + parts["l1"] if use_l1 else total, **parts}


def _l1_target(gt_boxes: Tensor, cells: Tensor, anchor_strides: Tensor) -> Tensor:
    """Undecoded box (P, 4) that a positive should have predicted."""
    stride = anchor_strides[:, None]
    return torch.cat([gt_boxes[:, :2] / stride - cells, torch.log(gt_boxes[:, 2:] / stride + 1e-8)], dim=1)
