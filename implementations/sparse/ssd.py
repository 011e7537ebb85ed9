"""SSD by way of what can matter: pairs that may match, negatives by one threshold, rows that train.

Arguments, results and their meaning are those of the operations in `detoracle.reference.ssd`. The matching is in
`detoracle.implementations.sparse.ssd_matching`. All logits are read for the ranking of negatives, image by image; the
negatives are what exceeds the last loss that makes it, which is selected, not sorted for. Only rows that train are then
looked at again, and only theirs are written into the gradients, which are otherwise fresh zeros.

What it trades: it waits for the device nine times, for sizes, and loops over images, and so suits a CPU; memory grows
with the ground truths times the blocks of priors, of which there are some hundreds. What differs from the oracle: as in
`batched`. The gradient cannot be differentiated again. Where all pairs may matter, matching is left to `batched`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import ssd as batched
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse.memory import zeros
from detoracle.implementations.sparse.ssd_matching import matches
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["hard_negatives", "loss", "match"]

_VARIANCES = (0.1, 0.2)  # of centre offsets, of logarithms of sizes


# --------------------------------------------------------------------------------------------------------------- match
@implements("ssd.match", name="sparse")
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
    """Which ground truth each prior is trained towards.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> gt, one = torch.tensor([[[0.0, 0, 0.5, 0.4]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> match(boxes, gt, torch.zeros(1, 1, dtype=torch.int64), one).gt_index.tolist()
    [[0, -1]]
    """
    found = matches(priors, gt_boxes, gt_valid, threshold)
    if found is None:
        return batched.match(priors, gt_boxes, gt_labels, gt_valid, threshold=threshold, variances=variances)
    image, prior, ground_truth, overlap = found
    shape = len(gt_valid), len(priors)
    class_of = gt_labels[image, ground_truth].long() + 1
    positive = class_of > 0
    gt_index = torch.full(shape, BACKGROUND, device=priors.device)
    class_target = torch.zeros_like(gt_index)
    quality, loc_target = priors.new_zeros(shape), priors.new_zeros(*shape, 4)
    class_target[image, prior] = class_of
    gt_index[image, prior] = ground_truth.where(positive, BACKGROUND)
    quality[image, prior] = overlap.where(positive, 0.0)
    offsets = batched.encode(gt_boxes[image, ground_truth], priors[prior], variances=variances)
    loc_target[image, prior] = offsets.where(positive[:, None], 0.0)
    return Assignment(gt_index, quality, {"loc_target": loc_target, "class_target": class_target})


# ------------------------------------------------------------------------------------------------------ hard negatives
@implements("ssd.hard_negatives", name="sparse")
@torch.no_grad()
def hard_negatives(conf: Tensor, gt_index: Tensor, gt_labels: Tensor, *, neg_pos: int = 3) -> Assignment:
    """Background priors that train the class.

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
    others = torch.full_like(label, IGNORED).masked_fill_(negative, BACKGROUND)
    return Assignment(gt_index.long().where(positive, others), mining_loss.where(negative, 0.0))


def _mining_loss(conf: Tensor, positive: Tensor) -> Tensor:
    """Confidence loss as background (B, P), 0 for positives."""
    largest, ones = conf.amax(), conf.new_ones(conf.shape[-1])
    room = torch.empty_like(conf[0])  # one image fits a cache, and a product is faster than a short sum
    sums = torch.stack([torch.sub(image, largest, out=room).exp_() @ ones for image in conf])
    return sums.log_().add_(largest).sub_(conf[..., 0]).masked_fill_(positive, 0.0)


def _hardest(mining_loss: Tensor, positive: Tensor, neg_pos: int) -> Tensor:
    """The first of each image's ranking (B, P), as many as its positives allow; ties in the order of priors."""
    number = (neg_pos * positive.sum(1, keepdim=True)).clamp_(max=positive.shape[1] - 1)
    ranked = mining_loss.topk(max(int(number.max()), 1), dim=1).values
    last = ranked.gather(1, (number - 1).clamp_(min=0))
    # A NaN ranks above infinity.
    missing = mining_loss.isnan()
    above = (mining_loss > last) | (missing & ~last.isnan())
    tied = (mining_loss == last) | (missing & last.isnan())
    return above | (tied & (tied.cumsum(1) <= number - above.sum(1, keepdim=True)))


# ---------------------------------------------------------------------------------------------------------------- loss
@implements("ssd.loss", name="sparse")
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
    """MultiBox loss: total, localisation, classification.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> gt, label = torch.tensor([[[0.0, 0, 0.5, 0.5]]]), torch.tensor([[0]])
    >>> parts = loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), boxes, gt, label, torch.ones(1, 1, dtype=torch.bool))
    >>> round(float(parts["classification"]), 4)
    1.3863
    """
    image, prior, ground_truth = _positives(priors, gt_boxes, gt_labels, gt_valid, threshold)
    positive = torch.zeros(conf.shape[:2], dtype=torch.bool, device=conf.device)
    positive[image, prior] = True
    with torch.no_grad():
        negative = _hardest(_mining_loss(conf, positive), positive, neg_pos).logical_and_(~positive)

    [negatives] = negative.flatten().nonzero(as_tuple=True)
    positives = image * len(priors) + prior
    class_target = F.pad(gt_labels[image, ground_truth].long() + 1, (0, len(negatives)))
    logits = _rows(conf, torch.cat([positives, negatives]))
    loc_target = batched.encode(gt_boxes[image, ground_truth], priors[prior], variances=variances)
    distance = F.smooth_l1_loss(_rows(loc, positives), loc_target, reduction="none")
    entropy = F.cross_entropy(logits, class_target, reduction="none")

    count = len(positives) or int(not gt_valid.any())
    localisation, classification = distance.sum() / count, entropy.sum() / count
    return {"total": localisation + classification, "localisation": localisation, "classification": classification}


@torch.no_grad()
def _positives(
    priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, prior and ground truth of all positives, each (N,)."""
    found = matches(priors, gt_boxes, gt_valid, threshold)
    if found is None:
        gt_index = batched.match(priors, gt_boxes, gt_labels, gt_valid, threshold=threshold).gt_index
        image, prior = (gt_index >= 0).nonzero(as_tuple=True)
        return image, prior, gt_index[image, prior]
    image, prior, ground_truth, _ = found
    [positive] = (gt_labels[image, ground_truth] >= 0).nonzero(as_tuple=True)
    return image[positive], prior[positive], ground_truth[positive]


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows (N, D), none twice, of a batch (B, P, D)."""
    chosen: Tensor = _Rows.apply(values.flatten(0, 1), rows)  # type: ignore[no-untyped-call]
    return chosen


class _Rows(torch.autograd.Function):
    """Rows of a matrix, whose gradient is written once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        """Choose."""
        ctx.shape = values.shape
        ctx.save_for_backward(rows)
        return values[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_chosen: Tensor) -> tuple[Tensor, None]:
        """Put back."""
        [rows] = ctx.saved_tensors
        return zeros(ctx.shape, like=to_chosen).index_copy_(0, rows, to_chosen), None
