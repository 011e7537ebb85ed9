"""YOLOX: SimOTA label assignment.

An anchor point per grid cell predicts one box, one objectness and C class logits. Per image, anchor points near a
ground truth become *candidates*; a cost of classification and IoU says how well each candidate suits each ground truth;
each ground truth claims as many of its cheapest candidates as its best ten IoUs add up to (*dynamic k*); an anchor
that several claim goes to the cheapest. Positives then train box, class and objectness, all others objectness only.

Stages, in the order data flows: `decode`, then `candidates` and `cost` (`detoracle.reference.yolox_cost`),
`dynamic_k_matching` (together `assign`), and `loss` (`detoracle.reference.yolox_loss`).
Source: Megvii-BaseDetection/YOLOX (Apache-2.0), described from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.reference import yolox_cost
from detoracle.reference.assignment import BACKGROUND, Assignment
from detoracle.reference.contract import operation
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["anchor_grid", "assign", "counted_ground_truths", "decode", "dynamic_k_matching"]

_SOURCE = "Megvii-BaseDetection/YOLOX (Apache-2.0)"
_TOP_CANDIDATES = 10  # IoUs that add up to dynamic k


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
    if not yolox_cost.FLAVOURS[flavour].counts_rows:
        return gt_valid
    row_sum = torch.cat([gt_labels[..., None].to(gt_boxes.dtype), gt_boxes], dim=-1).sum(-1)
    counted = ((row_sum > 0) & gt_valid).sum(1, keepdim=True)
    return gt_valid & (gt_valid.cumsum(1) <= counted)


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
    candidate, geometry = yolox_cost.candidates(anchor_points, anchor_strides, gt_boxes, counted, flavour=flavour)
    for image in range(len(candidate)):
        if counted[image].any():
            _require_candidates(candidate[image], where=f"yolox.assign, image {image}")
    pair_cost, iou = yolox_cost.cost(predictions, gt_boxes, gt_labels, counted, candidate, geometry, flavour=flavour)
    gt_index, dynamic_k = dynamic_k_matching(pair_cost, iou, candidate, counted)
    return Assignment(gt_index, _matched_iou(gt_index, iou), {"dynamic_k": dynamic_k})


def _matched_iou(gt_index: Tensor, iou: Tensor) -> Tensor:
    """IoU of each anchor with its ground truth, (B, A), 0 for background."""
    if iou.shape[1] == 0:
        return iou.new_zeros(gt_index.shape)
    matched = iou.gather(1, gt_index.clamp(min=0)[:, None])[:, 0]
    return torch.where(gt_index >= 0, matched, 0.0)
