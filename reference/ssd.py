"""SSD: prior matching, hard-negative mining and the MultiBox loss.

The network predicts, for each of P fixed *priors*, four box offsets (``loc``) and C class logits (``conf``), class 0
being background. Every prior takes the ground truth it overlaps most, if by at least the threshold; but first every
ground truth gets the prior that overlaps it most, whatever the overlap. Positives train box and class; of all others
only the *hard negatives*, those with the largest confidence loss, train the class, three a positive of their image.

Stages, in the order data flows: `priors`, `jaccard`, `match`, `encode` (and its inverse `decode`), `log_sum_exp`,
`hard_negatives`, `loss`. Boxes are in units of the image side, 0 to 1; those of the first two and the coding are in
`detoracle.reference.ssd_boxes`.

Quirks: an image without ground truth raises, and a batch without positives costs NaN; a ground truth that overlaps no
prior is forced onto the first one, and of two that share a best prior the later one keeps it; the logarithm of sums
behind the ranking subtracts the maximum of the *whole batch*, so that rows far below it become -inf; degenerate boxes
make the loss infinite or NaN. Source: amdegroot/ssd.pytorch (MIT), described from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment
from detoracle.reference.boxes import cxcywh_to_xyxy
from detoracle.reference.contract import operation
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.ssd_boxes import (
    COCO_SSD300,
    SOURCE,
    VARIANCES,
    VOC_SSD300,
    _check_variances,
    _encode,
    _jaccard,
    decode,
    encode,
    jaccard,
    priors,
)

__all__ = [
    "COCO_SSD300",
    "VOC_SSD300",
    "decode",
    "encode",
    "hard_negatives",
    "jaccard",
    "log_sum_exp",
    "loss",
    "match",
    "priors",
]

_FORCED = 2.0  # overlap given to the best prior of a ground truth, above any threshold


# ----------------------------------------------------------------------------------------------------- 3. match
@operation("ssd.match", kind="assignment", source=SOURCE)
@torch.no_grad()
def match(
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    variances: Sequence[float] = VARIANCES,
) -> Assignment:
    """Which ground truth each prior is trained towards, and the targets that follow.

    A prior takes the ground truth it overlaps most, unless that overlap is below the threshold (a NaN is not). The best
    prior of each ground truth takes *it*, in the order of the ground truths, so that the last of several that share a
    best prior keeps it. A ground truth of class -1 trains as background. Ties: lowest index.

    Parameters
    ----------
    priors : Tensor (P, 4) float
        cx, cy, w, h in units of the image side.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in units of the image side, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-2: the background is not counted.
    gt_valid : Tensor (B, G) bool
        False for padding.
    threshold : float
        Overlap from which a prior is positive.
    variances : sequence of float
        As in `encode`.

    Returns
    -------
    gt_index : Tensor (B, P) int
        Ground truth of each prior, -1 for background.
    quality : Tensor (B, P) float
        Overlap of prior and assigned ground truth, 0 for background.
    loc_target : Tensor (B, P, 4) float or None
        Encoded ground truth, 0 for background (upstream fills that in too, but nothing reads it).
    class_target : Tensor (B, P) int or None
        Class plus 1, 0 for background.

    Raises
    ------
    UpstreamRaises
        ``ssd.no-ground-truth``: an image has none.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    >>> gt, label = torch.tensor([[[0.0, 0, 0.5, 0.4]]]), torch.tensor([[6]])
    >>> result = match(boxes, gt, label, torch.ones(1, 1, dtype=torch.bool))
    >>> result.gt_index.tolist(), result.extra["class_target"].tolist()
    ([[0, -1, -1]], [[7, 0, 0]])
    """
    _check_variances(variances, where="ssd.match")
    if not len(gt_valid) or not len(priors):
        sizes = f"{len(gt_valid)} images, {len(priors)} priors"
        raise InputError("gt_valid, priors", expected="an image and a prior at least", got=sizes, where="ssd.match")
    images = []
    for image, valid in enumerate(gt_valid):
        _require_ground_truth(valid, where=f"ssd.match, image {image}")
        overlap = _overlap(priors, gt_boxes[image, valid])
        best, matched = _force(*_best_ground_truth(overlap), _best_prior(overlap))
        class_target = _class_target(best, matched, gt_labels[image, valid], threshold)
        positive = class_target > 0
        gt_index = torch.where(positive, valid.nonzero().flatten()[matched], BACKGROUND)
        quality = torch.where(positive, overlap.gather(0, matched[None])[0], 0.0)
        offsets = _encode(gt_boxes[image, valid][matched], priors, variances)
        images.append((gt_index, quality, torch.where(positive[:, None], offsets, 0.0), class_target))
    gt_indices, qualities, loc_targets, class_targets = (torch.stack(parts) for parts in zip(*images, strict=True))
    return Assignment(gt_indices, qualities, {"loc_target": loc_targets, "class_target": class_targets})


def _require_ground_truth(valid: Tensor, *, where: str) -> None:
    if not valid.any():
        raise UpstreamRaises("ssd.no-ground-truth", expected="a ground truth in every image", got="none", where=where)


def _overlap(priors: Tensor, gt_boxes: Tensor) -> Tensor:
    """Overlap (G, P) of one image's ground truths and the priors."""
    return _jaccard(gt_boxes, cxcywh_to_xyxy(priors))


def _best_ground_truth(overlap: Tensor) -> tuple[Tensor, Tensor]:
    """For every prior the largest overlap and whose it is; a NaN counts as largest."""
    best, matched = overlap.max(0)
    return best, matched


def _best_prior(overlap: Tensor) -> Tensor:
    """For every ground truth the prior that overlaps it most; a NaN counts as largest."""
    return overlap.argmax(1)


def _force(best: Tensor, matched: Tensor, best_prior: Tensor) -> tuple[Tensor, Tensor]:
    """Give every ground truth its best prior; the last one wins."""
    best, matched = best.index_fill(0, best_prior, _FORCED), matched.clone()
    for ground_truth, prior in enumerate(best_prior.tolist()):
        matched[prior] = ground_truth
    return best, matched


def _class_target(best: Tensor, matched: Tensor, gt_labels: Tensor, threshold: float) -> Tensor:
    """Class each prior is trained towards, 0 for background."""
    return torch.where(best < threshold, 0, gt_labels[matched].long() + 1)


# ------------------------------------------------------------------------------------------- 6. hard negatives
@operation("ssd.log_sum_exp", kind="values", source=SOURCE)
def log_sum_exp(conf: Tensor) -> Tensor:
    """Logarithm of the sum of a prior's exponentiated logits, stabilised by the maximum over the *whole* batch.

    A prior whose logits all lie far below that maximum (some 104 in float32, 17 in float16) underflows to -inf; one NaN
    makes every prior NaN. Only the ranking of negatives reads this.

    Parameters
    ----------
    conf : Tensor (B, P, C) float
        Class logits.

    Returns
    -------
    log_sum_exp : Tensor (B, P) float

    Examples
    --------
    >>> log_sum_exp(torch.tensor([[[500.0, 0, 0], [1, 2, 3]]])).tolist()
    [[500.0, -inf]]
    """
    return _log_sum_exp(conf)


def _log_sum_exp(conf: Tensor) -> Tensor:
    largest = conf.reshape(-1).amax(0)
    return torch.log(torch.exp(conf - largest).sum(-1)) + largest


@operation("ssd.hard_negatives", kind="assignment", source=SOURCE)
@torch.no_grad()
def hard_negatives(conf: Tensor, gt_index: Tensor, gt_labels: Tensor, *, neg_pos: int = 3) -> Assignment:
    """Background priors that train the class: per image, those with the largest confidence loss.

    The priors of an image are ranked by `log_sum_exp` minus the logit of their class, positives by 0 instead. The first
    ``neg_pos`` times as many as there are positives, but at most P - 1, are negatives; a positive among them stays a
    positive, counts once, and leaves that many negatives fewer. NaN ranks first. Ties: lowest index.

    Parameters
    ----------
    conf : Tensor (B, P, C) float
        Class logits, background first.
    gt_index : Tensor (B, P) int
        Ground truth of each prior, -1 for background (`match`).
    gt_labels : Tensor (B, G) int
        Class, 0 to C-2.
    neg_pos : int
        Negatives for each positive.

    Returns
    -------
    gt_index : Tensor (B, P) int
        As given for positives, -1 for hard negatives, -2 for priors that take no part in the loss.
    quality : Tensor (B, P) float or None
        Confidence loss of each hard negative, as ranked; 0 elsewhere.

    Raises
    ------
    UpstreamRaises
        ``ssd.label-out-of-range``: a positive's class has no logit.

    Examples
    --------
    >>> conf = torch.tensor([[[0.0, 9], [5, 0], [0, 5], [0, 1], [0, 2]]])
    >>> positive = torch.tensor([[0, -1, -1, -1, -1]])
    >>> hard_negatives(conf, positive, torch.tensor([[0]]), neg_pos=2).gt_index.tolist()
    [[0, -2, -1, -2, -1]]
    """
    _check_neg_pos(neg_pos, where="ssd.hard_negatives")
    if not conf.numel():
        raise InputError(
            "conf", expected="an image, a prior and a class", got=str(tuple(conf.shape)), where="ssd.hard_negatives"
        )
    if gt_index.numel() and int(gt_index.max()) >= gt_labels.shape[1]:
        most = f"indices below {gt_labels.shape[1]}, the number of gt_labels of an image"
        raise InputError("gt_index", expected=most, got=str(int(gt_index.max())), where="ssd.hard_negatives")
    class_target = _class_of(gt_index, gt_labels)
    _check_class_target(class_target, conf.shape[-1], where="ssd.hard_negatives")
    ranked_by = _mining_loss(_log_sum_exp(conf), conf, class_target)
    positive = class_target > 0
    negative = _hardest(ranked_by, _num_negatives(positive, neg_pos))
    selected = torch.where(positive, gt_index.long(), torch.where(negative, BACKGROUND, IGNORED))
    return Assignment(selected, torch.where(negative, ranked_by, 0.0))


def _check_neg_pos(neg_pos: int, *, where: str) -> None:
    if neg_pos < 0:
        raise InputError("neg_pos", expected="0 or more", got=str(neg_pos), where=where)


def _class_of(gt_index: Tensor, gt_labels: Tensor) -> Tensor:
    """Class target (B, P) of an assignment, 0 for background."""
    if not gt_labels.shape[1]:
        return torch.zeros_like(gt_index, dtype=torch.int64)
    return torch.where(gt_index >= 0, gt_labels.long().gather(1, gt_index.long().clamp(min=0)) + 1, 0)


def _check_class_target(class_target: Tensor, num_classes: int, *, where: str) -> None:
    for image, classes in enumerate(class_target):
        outside = classes[(classes < 0) | (classes >= num_classes)]
        if len(outside):
            raise UpstreamRaises(
                "ssd.label-out-of-range",
                expected=f"labels from -1 to {num_classes - 2}, as conf has {num_classes} classes with the background",
                got=str(int(outside[0]) - 1),
                where=f"{where}, image {image}",
            )


def _mining_loss(log_sum_exp: Tensor, conf: Tensor, class_target: Tensor) -> Tensor:
    """Confidence loss (B, P) by which priors are ranked: 0 for positives."""
    of_class = conf.gather(-1, class_target[..., None])[..., 0]
    return torch.where(class_target > 0, 0.0, log_sum_exp - of_class)


def _num_negatives(positive: Tensor, neg_pos: int) -> Tensor:
    """Number of negatives of each image, (B, 1)."""
    return (neg_pos * positive.sum(1, keepdim=True)).clamp(max=positive.shape[1] - 1)


def _hardest(mining_loss: Tensor, num_negatives: Tensor) -> Tensor:
    """The first so many of the ranking by loss, (B, P) bool; may contain positives."""
    order = mining_loss.sort(dim=1, descending=True, stable=True).indices
    return order.argsort(1) < num_negatives


# ------------------------------------------------------------------------------------------- 5., 7. and 8. loss
@operation("ssd.loss", kind="loss", gradients=("loc", "conf"), source=SOURCE)
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
    variances: Sequence[float] = VARIANCES,
) -> dict[str, Tensor]:
    """MultiBox loss of a batch, and its gradient to offsets and logits.

    total = localisation + classification: smooth L1 of the positives' offsets, and cross entropy of positives and hard
    negatives, each summed and divided by the number of positives in the batch. Without positives both are NaN, with
    gradients of 0. A matched box with a side of 0 costs infinity, one with swapped corners NaN.

    Parameters
    ----------
    loc : Tensor (B, P, 4) float
        Predicted offsets.
    conf : Tensor (B, P, C) float
        Class logits, background first.
    priors : Tensor (P, 4) float
        cx, cy, w, h in units of the image side.
    gt_boxes : Tensor (B, G, 4) float
        Left, top, right, bottom in units of the image side, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-2.
    gt_valid : Tensor (B, G) bool
        False for padding.
    threshold : float
        Overlap from which a prior is positive.
    neg_pos : int
        Negatives for each positive.
    variances : sequence of float
        As in `encode`.

    Returns
    -------
    total : Tensor () float
    localisation : Tensor () float or None
    classification : Tensor () float or None

    Raises
    ------
    UpstreamRaises
        ``ssd.no-ground-truth``, ``ssd.label-out-of-range``.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> gt, label = torch.tensor([[[0.0, 0, 0.5, 0.5]]]), torch.tensor([[0]])
    >>> parts = loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), boxes, gt, label, torch.ones(1, 1, dtype=torch.bool))
    >>> round(float(parts["localisation"]), 4), round(float(parts["classification"]), 4)
    (0.0, 1.3863)
    """
    matched = match(priors, gt_boxes, gt_labels, gt_valid, threshold=threshold, variances=variances)
    _check_class_target(matched.extra["class_target"], conf.shape[-1], where="ssd.loss")
    mined = hard_negatives(conf.detach(), matched.gt_index, gt_labels, neg_pos=neg_pos)
    return _loss(loc, conf, priors, gt_boxes, gt_labels, mined.gt_index, variances)


def _loss(
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_index: Tensor,
    variances: Sequence[float],
) -> dict[str, Tensor]:
    """Loss of a given assignment: positives, hard negatives (-1), and priors that take no part (-2)."""
    sums = _loss_sums(loc, conf, priors, gt_boxes, gt_labels, gt_index, variances)
    localisation, classification = (total / (gt_index >= 0).sum() for total in sums)
    return {"total": localisation + classification, "localisation": localisation, "classification": classification}


def _loss_sums(
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_index: Tensor,
    variances: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Localisation and classification loss before the division by the number of positives."""
    positive, trained = gt_index >= 0, gt_index != IGNORED
    image, prior = positive.nonzero(as_tuple=True)
    loc_target = _encode(gt_boxes[image, gt_index[positive]], priors[prior], variances)
    class_target = _class_of(gt_index, gt_labels)[trained]
    localisation = F.smooth_l1_loss(loc[image, prior], loc_target, reduction="none").sum()
    classification = F.cross_entropy(conf[trained], class_target, reduction="none").sum()
    return localisation, classification
