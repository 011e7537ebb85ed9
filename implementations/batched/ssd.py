"""SSD over the whole batch at once: padded, masked, of fixed shapes, and without waiting for the device.

Arguments, results and their meaning are those of the operations in `detoracle.reference.ssd`. No image and no ground
truth has a Python iteration of its own, no value is read back to the host and no shape depends on the data, so that
every function compiles into one graph.

What makes it fast:

- the last ground truth that claims a prior is the largest index that claims it: one scatter, in any order;
- only background priors are ranked by their confidence loss, so that no logit of another class is looked up;
- one sort ranks the negatives, and a scatter marks the first of them; a second sort would only invert the first.

What differs from the oracle: arguments are not checked; an image without ground truth is background and has no hard
negatives, and a batch without any costs 0 (the oracle raises); a class that does not exist fails in an index, on a GPU
as a device-side assertion. All logits go through the cross entropy, those of priors that take no part as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.registry import implements
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["decode", "encode", "hard_negatives", "jaccard", "log_sum_exp", "loss", "match", "priors"]

_VARIANCES = (0.1, 0.2)  # of centre offsets, of logarithms of sizes
_UNTRAINED = -100  # the class target that PyTorch's cross entropy leaves out


# ------------------------------------------------------------------------------------------------------- boxes
@implements("ssd.priors", name="batched")
def priors(
    *,
    image_size: int = 300,
    feature_maps: Sequence[int] = (38, 19, 10, 5, 3, 1),
    steps: Sequence[int] = (8, 16, 32, 64, 100, 300),
    min_sizes: Sequence[int] = (30, 60, 111, 162, 213, 264),
    max_sizes: Sequence[int] = (60, 111, 162, 213, 264, 315),
    aspect_ratios: Sequence[Sequence[float]] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    clip: bool = True,
    like: Tensor | None = None,
) -> Tensor:
    """Prior boxes (P, 4) cxcywh, made map by map where they are needed, in double precision until the end.

    Examples
    --------
    >>> priors().shape
    torch.Size([8732, 4])
    """
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)
    maps = []
    for cells, step, smallest, largest, ratios in zip(
        feature_maps, steps, min_sizes, max_sizes, aspect_ratios, strict=True
    ):
        small, large = smallest / image_size, math.sqrt(smallest * largest) / image_size
        roots = [math.sqrt(ratio) for ratio in ratios]
        elongated = [shape for root in roots for shape in ((small * root, small / root), (small / root, small * root))]
        shapes = torch.tensor([(small, small), (large, large), *elongated], dtype=torch.float64, device=device)
        centre = (torch.arange(cells, dtype=torch.float64, device=device) + 0.5) * (step / image_size)
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        places = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
        boxes = torch.cat([places.expand(-1, len(shapes), 2), shapes.expand(cells * cells, -1, 2)], dim=-1)
        maps.append(boxes.reshape(-1, 4))
    boxes = torch.cat(maps).to(dtype)
    return boxes.clamp(0, 1) if clip else boxes


@implements("ssd.jaccard", name="batched")
def jaccard(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Pairwise IoU, (G, 4) and (P, 4) to (G, P), or with the same leading dimensions before all three.

    Examples
    --------
    >>> jaccard(torch.ones(5, 2, 4), torch.ones(5, 3, 4)).shape
    torch.Size([5, 2, 3])
    """
    left_a, top_a, right_a, bottom_a = boxes_a[..., :, None, :].unbind(-1)
    left_b, top_b, right_b, bottom_b = boxes_b[..., None, :, :].unbind(-1)
    width = torch.minimum(right_a, right_b) - torch.maximum(left_a, left_b)
    height = torch.minimum(bottom_a, bottom_b) - torch.maximum(top_a, top_b)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    area_a, area_b = (right_a - left_a) * (bottom_a - top_a), (right_b - left_b) * (bottom_b - top_b)
    return intersection / (area_a + area_b - intersection)


@implements("ssd.encode", name="batched")
def encode(gt_boxes: Tensor, priors: Tensor, *, variances: Sequence[float] = _VARIANCES) -> Tensor:
    """Offsets (P, 4) from priors to boxes, or (B, P, 4) for boxes of a batch."""
    left_top, right_bottom = gt_boxes[..., :2], gt_boxes[..., 2:]
    place, size = priors[:, :2], priors[:, 2:]
    centre = ((left_top + right_bottom) / 2 - place) / (variances[0] * size)
    return torch.cat([centre, torch.log((right_bottom - left_top) / size) / variances[1]], dim=-1)


@implements("ssd.decode", name="batched")
def decode(loc: Tensor, priors: Tensor, *, variances: Sequence[float] = _VARIANCES) -> Tensor:
    """Boxes (B, P, 4) xyxy from predicted offsets; what depends on the priors alone is worked out once a batch."""
    centre = torch.addcmul(priors[:, :2], loc[..., :2], variances[0] * priors[:, 2:])
    size = priors[:, 2:] * torch.exp(loc[..., 2:] * variances[1])
    left_top = centre - size / 2
    return torch.cat([left_top, left_top + size], dim=-1)


# ------------------------------------------------------------------------------------------------------- match
@implements("ssd.match", name="batched")
@torch.no_grad()
def match(
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    variances: Sequence[float] = _VARIANCES,
) -> Assignment:
    """Which ground truth each prior is trained towards; holds all (B, G, P) overlaps to avoid a loop over images.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> gt, one = torch.tensor([[[0.0, 0, 0.5, 0.4]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> match(boxes, gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1]]
    """
    if not gt_valid.shape[1]:  # padding, so that maxima have something to be taken of
        gt_boxes, gt_labels, gt_valid = F.pad(gt_boxes, (0, 0, 0, 1)), F.pad(gt_labels, (0, 1)), F.pad(gt_valid, (0, 1))
    half = priors[:, 2:] / 2
    corners = torch.cat([priors[:, :2] - half, priors[:, :2] + half], dim=-1)
    overlap = jaccard(gt_boxes, corners).masked_fill(~gt_valid[..., None], -torch.inf)
    best, its_gt = overlap.max(1)

    claim = torch.arange(gt_valid.shape[1], device=gt_valid.device).where(gt_valid, BACKGROUND)
    nobody = torch.full_like(its_gt, BACKGROUND)
    claimed_by = nobody.scatter_reduce(1, overlap.argmax(2), claim, "amax")  # the last of those whose best prior it is
    claimed = claimed_by >= 0
    ground_truth = claimed_by.where(claimed, its_gt)

    background = (best < threshold) & ~claimed
    class_target = (gt_labels.long().gather(1, ground_truth) + 1).masked_fill(background, 0)
    positive = class_target > 0
    offsets = encode(gt_boxes.take_along_dim(ground_truth[..., None], 1), priors, variances=variances)
    return Assignment(
        ground_truth.where(positive, BACKGROUND),
        overlap.gather(1, ground_truth[:, None])[:, 0].where(positive, 0.0),
        {"loc_target": offsets.where(positive[..., None], 0.0), "class_target": class_target},
    )


# ---------------------------------------------------------------------------------------------- hard negatives
@implements("ssd.log_sum_exp", name="batched")
def log_sum_exp(conf: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials (B, P) by one maximum for the batch: cheaper than a maximum a row."""
    largest = conf.amax()
    return (conf - largest).exp().sum(-1).log() + largest


@implements("ssd.hard_negatives", name="batched")
@torch.no_grad()
def hard_negatives(conf: Tensor, gt_index: Tensor, gt_labels: Tensor, *, neg_pos: int = 3) -> Assignment:
    """Background priors that train the class, by one sort of all priors of every image.

    Examples
    --------
    >>> conf = torch.tensor([[[0.0, 9], [5, 0], [0, 5], [0, 1], [0, 2]]])
    >>> hard_negatives(conf, torch.tensor([[0, -1, -1, -1, -1]]), torch.tensor([[0]]), neg_pos=2).gt_index.tolist()
    [[0, -2, -1, -2, -1]]
    """
    label = F.pad(gt_labels.long(), (1, 0), value=BACKGROUND).gather(1, gt_index.long() + 1)
    positive = label >= 0
    mining_loss = _mining_loss(conf, positive)
    negative = _hardest(mining_loss, positive, neg_pos)
    others = torch.full_like(label, IGNORED).masked_fill(negative, BACKGROUND)
    return Assignment(gt_index.long().where(positive, others), mining_loss.where(negative, 0.0))


def _mining_loss(conf: Tensor, positive: Tensor) -> Tensor:
    """Confidence loss as background (B, P), 0 for positives."""
    return (log_sum_exp(conf) - conf[..., 0]).masked_fill(positive, 0.0)


def _hardest(mining_loss: Tensor, positive: Tensor, neg_pos: int) -> Tensor:
    """The first of each image's ranking (B, P), as many as its positives allow; ties in the order of priors."""
    number_of_priors = positive.shape[1]
    number = (neg_pos * positive.sum(1, keepdim=True)).clamp(max=number_of_priors - 1)
    ranking = mining_loss.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(number_of_priors, device=positive.device) < number
    return torch.zeros_like(positive).scatter(1, ranking, first)


# -------------------------------------------------------------------------------------------------------- loss
@implements("ssd.loss", name="batched")
def loss(
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    neg_pos: int = 3,
    variances: Sequence[float] = _VARIANCES,
) -> dict[str, Tensor]:
    """MultiBox loss: total, localisation, classification; works on all priors, for how many take part is not known.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> gt, label = torch.tensor([[[0.0, 0, 0.5, 0.5]]]), torch.tensor([[0]])
    >>> parts = loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), boxes, gt, label, torch.ones(1, 1, dtype=torch.bool))
    >>> round(float(parts["classification"]), 4)
    1.3863
    """
    matched = match(priors, gt_boxes, gt_labels, gt_valid, threshold=threshold, variances=variances)
    positive = matched.positive
    trained = positive | _hardest(_mining_loss(conf.detach(), positive), positive, neg_pos)

    # Predictions that take no part are replaced, not multiplied by 0: a NaN there stays out of the gradients.
    offsets, logits = loc.where(positive[..., None], 0.0), conf.where(trained[..., None], 0.0)
    class_target = matched.extra["class_target"].where(trained, _UNTRAINED)
    distance = F.smooth_l1_loss(offsets, matched.extra["loc_target"], reduction="none")
    entropy = F.cross_entropy(logits.flatten(0, 1), class_target.flatten(), reduction="none")

    positives = positive.sum().where(gt_valid.any(), 1)
    localisation, classification = distance.sum() / positives, entropy.sum() / positives
    return {"total": localisation + classification, "localisation": localisation, "classification": classification}
