"""YOLOX over the whole batch at once: padded, masked, of fixed shapes, and without waiting for the device.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolox` and
`detoracle.reference.boxes`. No image and no ground truth has a Python iteration of its own, no value is read back to
the host and no shape depends on the data, so that every function compiles into one graph.

What makes it fast:

- one class differs between a ground truth's target and "no class at all", so the class cost needs (B, A, C) + (B, G, A)
  logarithms and not (B, G, A, C);
- a ground truth claims at most ten anchors, so ten smallest costs and a threshold replace sorting;
- a batch has at most ten positives a ground truth, so the loss gathers a list of that fixed length.

What differs from the oracle: arguments are not checked; an image with ground truths but no candidate is background
(the oracle raises); a class that does not exist fails in an index, on a GPU as a device-side assertion; a NaN among
the predictions spoils only what depends on it. Overflow at anchors that are not positive leaves no NaN in gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, Assignment

__all__ = [
    "assign",
    "candidates",
    "cost",
    "decode",
    "dynamic_k_matching",
    "iou_loss_yolox",
    "iou_yolox",
    "loss",
]

_CENTER_RADIUS = {"tutorial": 2.5, "official": 1.5}  # half side of the square about a centre, in strides
_PENALTY = {"tutorial": 1e5, "official": 1e6}
_MOST_CLAIMS = 10


# ------------------------------------------------------------------------------------------------------- boxes
@implements("boxes.iou_yolox", name="batched")
def iou_yolox(boxes_a: Tensor, boxes_b: Tensor, *, form: str = "cxcywh") -> Tensor:
    """Pairwise IoU, (G, 4) and (N, 4) to (G, N), or with the same leading dimensions before all three.

    Examples
    --------
    >>> iou_yolox(torch.ones(5, 2, 4), torch.ones(5, 3, 4)).shape
    torch.Size([5, 2, 3])
    """
    corners_a, area_a = _corners_and_area(boxes_a[..., :, None, :], form)
    corners_b, area_b = _corners_and_area(boxes_b[..., None, :, :], form)
    intersection = _intersection(corners_a, corners_b)
    return intersection / (area_a + area_b - intersection)


@implements("boxes.iou_loss_yolox", name="batched")
def iou_loss_yolox(predicted: Tensor, target: Tensor, *, variant: str = "iou") -> Tensor:
    """Box loss of matched pairs, (N, 4) and (N, 4) to (N,), or with more leading dimensions.

    Examples
    --------
    >>> iou_loss_yolox(torch.ones(5, 3, 4), torch.ones(5, 3, 4)).shape
    torch.Size([5, 3])
    """
    (left_p, top_p, right_p, bottom_p), area_p = corners_p, _ = _corners_and_area(predicted, "cxcywh")
    (left_t, top_t, right_t, bottom_t), area_t = corners_t, _ = _corners_and_area(target, "cxcywh")
    intersection = _intersection(corners_p, corners_t)
    union = area_p + area_t - intersection
    iou = intersection / (union + 1e-16)
    if variant == "iou":
        return 1 - iou**2
    width = torch.maximum(right_p, right_t) - torch.minimum(left_p, left_t)
    height = torch.maximum(bottom_p, bottom_t) - torch.minimum(top_p, top_t)
    enclosure = width * height
    covered = intersection if variant == "giou_tutorial" else union
    giou = iou - (enclosure - covered) / enclosure.clamp(min=1e-16)
    return 1 - giou.clamp(-1.0, 1.0)


def _corners_and_area(boxes: Tensor, form: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Left, top, right, bottom, each (...), and areas (...), of boxes (..., 4)."""
    if form == "xyxy":
        left, top, right, bottom = boxes.unbind(-1)
        return (left, top, right, bottom), (right - left) * (bottom - top)
    x, y, width, height = boxes.unbind(-1)
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2), width * height


def _intersection(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """Area that two sets of boxes share, broadcast; 0 unless they overlap strictly on both axes."""
    width = torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])
    height = torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])
    return width * height * ((width > 0) & (height > 0))


# ------------------------------------------------------------------------------------------------------ decode
@implements("yolox.decode", name="batched")
def decode(raw: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Turn raw head maps into boxes in pixels and logits, (B, A, 5+C)."""
    return _decode(_flatten(raw), *_grid(raw, strides))


def _flatten(raw: Sequence[Tensor]) -> Tensor:
    """(B, 5+C, H, W) maps to (B, A, 5+C)."""
    return torch.cat([level.flatten(2).mT for level in raw], dim=1)


def _grid(raw: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Column and row (A, 2), and stride (A,), of every cell, made where the maps are."""
    cells, anchor_strides = [], []
    for level, stride in zip(raw, strides, strict=True):
        height, width = level.shape[2:]
        index = torch.arange(height * width, device=level.device)
        cells.append(torch.stack([index % width, index // width], dim=-1))
        anchor_strides.append(torch.full_like(index, stride))
    return torch.cat(cells).to(raw[0].dtype), torch.cat(anchor_strides).to(raw[0].dtype)


def _decode(flat: Tensor, cells: Tensor, strides: Tensor) -> Tensor:
    """Decode flat predictions (..., 5+C) of given cells (..., 2) and strides (...)."""
    centre = (flat[..., :2] + cells) * strides[..., None]
    size = flat[..., 2:4].exp() * strides[..., None]
    return torch.cat([centre, size, flat[..., 4:]], dim=-1)


# -------------------------------------------------------------------------------------------------- assignment
def _counted(gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, flavour: str) -> Tensor:
    """Ground truths (B, G) that take part: official code counts positive row sums, and takes the first so many."""
    if flavour == "tutorial":
        return gt_valid
    row_sum = torch.cat([gt_labels[..., None].to(gt_boxes.dtype), gt_boxes], dim=-1).sum(-1)
    number = ((row_sum > 0) & gt_valid).sum(1, keepdim=True)
    return gt_valid & (gt_valid.cumsum(1) <= number)


@implements("yolox.candidates", name="batched")
def candidates(
    anchor_points: Tensor, anchor_strides: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *, flavour: str = "tutorial"
) -> tuple[Tensor, Tensor]:
    """Anchor points near a ground truth, (B, A), and the pairs that cost no penalty, (B, G, A)."""
    x, y = anchor_points.unbind(-1)
    centre_x, centre_y = gt_boxes[..., None, 0], gt_boxes[..., None, 1]
    reach = _CENTER_RADIUS[flavour] * anchor_strides
    geometry = (x > centre_x - reach) & (x < centre_x + reach) & (y > centre_y - reach) & (y < centre_y + reach)
    near = geometry
    if flavour == "tutorial":
        (left, top, right, bottom), _ = _corners_and_area(gt_boxes[..., None, :], "cxcywh")
        in_box = (x > left) & (x < right) & (y > top) & (y < bottom)
        near, geometry = in_box | geometry, in_box & geometry
    return (near & gt_valid[..., None]).any(1), geometry & gt_valid[..., None]


@implements("yolox.cost", name="batched")
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
    """Cost and IoU of every pair, (B, G, A); inf and 0 for padding and for anchors that are no candidates."""
    iou = iou_yolox(gt_boxes, predictions[..., :4])
    total = _class_cost(predictions, gt_labels.where(gt_valid, 0)) + 3.0 * -torch.log(iou + 1e-8)
    total = total.where(geometry, total + _PENALTY[flavour])
    excluded = ~(candidate[:, None] & gt_valid[..., None])
    return total.masked_fill(excluded, torch.inf), iou.masked_fill(excluded, 0.0)


def _class_cost(predictions: Tensor, gt_labels: Tensor) -> Tensor:
    """Sum over classes of the cross entropies with each ground truth's one-hot class, (B, G, A).

    All classes' log(1 - p) are summed once, and each ground truth takes that of its own class off again. Where that one
    is most of the sum, nothing but rounding error would be left: the largest is therefore kept out of the sum.
    """
    probability = torch.sqrt(predictions[..., 5:].sigmoid() * predictions[..., 4:5].sigmoid())
    log_is_not = torch.log1p(-probability).clamp(min=-100)
    largest, its_class = log_is_not.min(-1)
    classes = torch.arange(probability.shape[-1], device=gt_labels.device)
    smaller = log_is_not.masked_fill(classes == its_class[..., None], 0.0).sum(-1)

    label = gt_labels[..., None].expand(-1, -1, predictions.shape[1])
    own = probability.mT.gather(1, label)
    others = largest[:, None] + (smaller[:, None] - torch.log1p(-own).clamp(min=-100))
    others = torch.where(label == its_class[:, None], smaller[:, None], others)
    return -(others + own.log().clamp(min=-100))


@implements("yolox.dynamic_k_matching", name="batched")
def dynamic_k_matching(cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Ground truth of each anchor, (B, A), and number of claims of each ground truth, (B, G)."""
    eligible = candidate[:, None] & gt_valid[..., None]
    gt_index, _, dynamic_k = _match(cost.masked_fill(~eligible, torch.inf), iou.masked_fill(~eligible, 0.0), eligible)
    return gt_index, dynamic_k


def _match(cost: Tensor, iou: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth and IoU of each anchor, and claims; costs must be inf, and IoUs 0, but for eligible pairs."""
    images, ground_truths, anchors = cost.shape
    if not ground_truths:
        nothing = torch.full((images, anchors), BACKGROUND, device=cost.device)
        return nothing, cost.new_zeros(images, anchors), nothing[:, :0]
    most = min(_MOST_CLAIMS, anchors)
    dynamic_k = iou.topk(most).values.sum(-1).nan_to_num(nan=1.0).long().clamp(1, most)

    # The k-th smallest cost decides; who ties with it claims in the order of anchors, which `topk` does not promise.
    ordered = cost.nan_to_num(nan=torch.finfo(cost.dtype).max, posinf=torch.inf)  # NaN after all other candidates
    last = ordered.topk(most, largest=False).values.gather(-1, dynamic_k[..., None] - 1)
    below, tied = ordered < last, (ordered == last) & eligible
    vacant = dynamic_k[..., None] - below.sum(-1, keepdim=True)
    claims = below | (tied & (tied.cumsum(-1, dtype=torch.int32) <= vacant))

    claimants = claims.sum(1)
    winner = torch.where(claimants > 1, cost.min(1).indices, claims.byte().max(1).indices)
    matched_iou = iou.gather(1, winner[:, None])[:, 0]
    assigned = claimants > 0
    return (
        winner.where(assigned, BACKGROUND),
        matched_iou.where(assigned, 0.0),
        dynamic_k.where(eligible.any(-1), 0),
    )


@implements("yolox.assign", name="batched")
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

    Examples
    --------
    >>> points, strides = torch.tensor([[4.0, 4.0], [44.0, 4.0]]), torch.tensor([8.0, 8.0])
    >>> predictions = torch.tensor([[[8.0, 8, 16, 16, 0, 0], [44.0, 4, 16, 16, 0, 0]]])
    >>> gt, one = torch.tensor([[[8.0, 8, 16, 16]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> assign(predictions, points, strides, gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1]]
    """
    counted = _counted(gt_boxes, gt_labels, gt_valid, flavour)
    candidate, geometry = candidates(anchor_points, anchor_strides, gt_boxes, counted, flavour=flavour)
    pair_cost, iou = cost(predictions, gt_boxes, gt_labels, counted, candidate, geometry, flavour=flavour)
    gt_index, quality, dynamic_k = _match(pair_cost, iou, candidate[:, None] & counted[..., None])
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k})


# -------------------------------------------------------------------------------------------------------- loss
@implements("yolox.loss", name="batched")
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
    """Training loss of a batch: total, box, objectness, classification, and l1 if asked for.

    Examples
    --------
    >>> gt, one = torch.tensor([[[4.0, 4, 8, 8]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss([torch.zeros(1, 6, 2, 2)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> round(float(parts["objectness"]), 4)
    2.7726
    """
    flat, (cells, anchor_strides) = _flatten(raw), _grid(raw, strides)
    points, predictions = (cells + 0.5) * anchor_strides[:, None], _decode(flat.detach(), cells, anchor_strides)
    assignment = assign(predictions, points, anchor_strides, gt_boxes, gt_labels, gt_valid, flavour=flavour)
    positive = assignment.positive

    anchor, listed = _listed(positive, _MOST_CLAIMS * gt_boxes.shape[1])
    ground_truth = assignment.gt_index.gather(1, anchor).clamp(min=0)[..., None]
    gt_box = gt_boxes.take_along_dim(ground_truth, 1).where(listed, 1.0)
    chosen = flat.take_along_dim(anchor[..., None], 1).where(listed, 0.0)
    cell, stride = cells[anchor], anchor_strides[anchor]
    classes = torch.arange(flat.shape[-1] - 5, device=gt_labels.device)
    one_hot = gt_labels[..., None].take_along_dim(ground_truth, 1) == classes
    class_target = one_hot * assignment.quality.gather(1, anchor)[..., None]

    box = iou_loss_yolox(_decode(chosen, cell, stride)[..., :4], gt_box)
    entropy = F.binary_cross_entropy_with_logits(chosen[..., 5:], class_target, reduction="none")
    objectness = F.binary_cross_entropy_with_logits(flat[..., 4], positive.to(flat.dtype), reduction="none")
    parts = {
        "box": 5.0 * box[..., None].where(listed, 0.0).sum(),
        "objectness": objectness.sum(),
        "classification": entropy.where(listed, 0.0).sum(),
    }
    if use_l1:
        in_cells = gt_box / stride[..., None]
        target = torch.cat([in_cells[..., :2] - cell, torch.log(in_cells[..., 2:] + 1e-8)], dim=-1)
        parts["l1"] = (chosen[..., :4] - target).abs().where(listed, 0.0).sum()
    positives = positive.sum().clamp(min=1)
    parts = {name: part / positives for name, part in parts.items()}
    total = parts["box"] + parts["objectness"] + parts["classification"]
    return {"total": total + parts["l1"] if use_l1 else total, **parts}


def _listed(positive: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Anchors (B, P) of a mask (B, A), in order, filled up with others to a fixed P; and which are of it, (B, P, 1)."""
    anchors = positive.shape[1]
    early_first = torch.arange(anchors, 0, -1, device=positive.device)
    anchor = early_first.where(positive, 0).topk(min(most, anchors)).indices
    return anchor, positive.gather(1, anchor)[..., None]
