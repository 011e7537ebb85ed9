"""Loss of the anchor head, level by level, as RPN and RetinaNet have it; SSD's is in `anchor_head_ssd`.

It starts from raw maps, in which the K anchors of a cell are the outer and their scores or deltas the inner channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detoracle.reference.anchor_head import assign, sample, targets
from detoracle.reference.anchor_head_box_terms import giou_loss, l1_loss, smooth_l1_loss
from detoracle.reference.anchor_head_boxes import SOURCE, inside_flags, valid_flags
from detoracle.reference.anchor_head_coder import decode
from detoracle.reference.anchor_head_terms import cross_entropy, sigmoid_cross_entropy, sigmoid_focal_loss
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["Batch", "Options", "loss"]


@dataclass(frozen=True)
class Options:
    """Settings of what follows the assignment; `loss` says what each means, and has these defaults."""

    class_loss: str = "focal"
    box_loss: str = "l1"
    sampler: str = "pseudo"
    seed: int = 0
    num: int = 256
    pos_fraction: float = 0.5
    neg_pos_ub: float = -1.0
    add_gt_as_proposals: bool = False
    pos_weight: float = -1.0
    reg_decoded_bbox: bool = False
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    class_loss_weight: float = 1.0
    box_loss_weight: float = 1.0
    class_weight: Sequence[float] | None = None
    ignore_index: int = -100
    gamma: float = 2.0
    alpha: float = 0.25
    beta: float = 1.0
    eps: float = 1e-6


class Batch(NamedTuple):
    """What both losses need beside the assignment; `loss` says what each is."""

    cls_scores: Sequence[Tensor]
    bbox_preds: Sequence[Tensor]
    anchors: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor

    @property
    def columns(self) -> int:
        """Logits of one anchor."""
        return self.cls_scores[0].shape[1] // (self.bbox_preds[0].shape[1] // 4)

    @property
    def num_anchors(self) -> list[int]:
        """Anchors of each level."""
        return [level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in self.bbox_preds]

    def check(self) -> None:
        """Raise an `InputError` unless maps and anchors fit together."""
        fitting = len(self.cls_scores) == len(self.bbox_preds) and all(
            deltas.shape[1] >= 4
            and deltas.shape[1] % 4 == 0
            and scores.shape[2:] == deltas.shape[2:]
            and scores.shape[1] == deltas.shape[1] // 4 * self.columns
            for scores, deltas in zip(self.cls_scores, self.bbox_preds, strict=True)
        )
        if not fitting or sum(self.num_anchors) != len(self.anchors):
            scores, deltas = ([tuple(level.shape) for level in maps] for maps in (self.cls_scores, self.bbox_preds))
            raise InputError(
                "cls_scores, bbox_preds, anchors",
                expected="per level K*C and K*4 channels of one size H, W, and H*W*K anchors, the same C on all levels",
                got=f"{scores}, {deltas} and {len(self.anchors)} anchors",
                where="anchor_head.loss",
            )


# ---------------------------------------------------------------------------------------------- 8. loss, per level
@operation("anchor_head.loss", kind="loss", gradients=("cls_scores", "bbox_preds"), source=SOURCE)
def loss(
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_shapes: Tensor,
    pad_shapes: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    strides: Sequence[int | Sequence[int]],
    pos_iou_thr: float = 0.5,
    neg_iou_thr: float | Sequence[float] = 0.4,
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
    match_low_quality: bool = True,
    ignore_iof_thr: float = -1.0,
    ignore_wrt_candidates: bool = True,
    allowed_border: float = -1.0,
    class_loss: str = Options.class_loss,
    box_loss: str = Options.box_loss,
    sampler: str = Options.sampler,
    seed: int = Options.seed,
    num: int = Options.num,
    pos_fraction: float = Options.pos_fraction,
    neg_pos_ub: float = Options.neg_pos_ub,
    add_gt_as_proposals: bool = Options.add_gt_as_proposals,
    pos_weight: float = Options.pos_weight,
    reg_decoded_bbox: bool = Options.reg_decoded_bbox,
    means: Sequence[float] = Options.means,
    stds: Sequence[float] = Options.stds,
    class_loss_weight: float = Options.class_loss_weight,
    box_loss_weight: float = Options.box_loss_weight,
    class_weight: Sequence[float] | None = Options.class_weight,
    ignore_index: int = Options.ignore_index,
    gamma: float = Options.gamma,
    alpha: float = Options.alpha,
    beta: float = Options.beta,
    eps: float = Options.eps,
) -> dict[str, Tensor]:
    """Training loss of a batch, level by level, and its gradient to the raw maps.

    Both losses of every level are divided by one number: the batch's positives, and with the random sampler its sampled
    background too, each image counting at least 1. With the focal loss a sampler is silently ignored.

    Parameters
    ----------
    cls_scores : list of Tensor (B, Sl, Hl, Wl) float
        K*C channels of logits; with softmax K*(C+1), background last.
    bbox_preds : list of Tensor (B, Dl, Hl, Wl) float
        K*4 channels of deltas.
    anchors : Tensor (A, 4) float
        xyxy in pixels, in the order of the maps.
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1; all 0 for a region proposal network.
    gt_valid : Tensor (B, G) bool
        False for padding.
    image_shapes : Tensor (B, 2) int
        Height and width of each image before padding, in pixels.
    pad_shapes : Tensor (B, 2) int
        Height and width of each image after its own padding.
    ignore_boxes : Tensor (B, I, 4) float or None
        As in `assign`.
    ignore_valid : Tensor (B, I) bool or None
        As in `assign`.
    strides : sequence of int or pairs of int
        Pixels a cell, one a level; a pair is horizontal, vertical.
    pos_iou_thr : float
        Best IoU from which an anchor is positive; this and the next six as in `assign`.
    neg_iou_thr : float or pair of float
        Best IoU below which it is background.
    min_pos_iou : float
        Least best IoU of a ground truth that claims anchors.
    gt_max_assign_all : bool
        It claims all that tie for its best IoU.
    match_low_quality : bool
        Ground truths claim anchors at all.
    ignore_iof_thr : float
        Share in an ignored region above which an anchor is left out, if above 0.
    ignore_wrt_candidates : bool
        That share is of the anchor's area.
    allowed_border : float
        As in `inside_flags`.
    class_loss : {"cross_entropy", "sigmoid_cross_entropy", "focal"}
        Which term trains the class.
    box_loss : {"smooth_l1", "l1", "giou"}
        Which term trains the box.
    sampler : {"pseudo", "random"}
        As in `sample`.
    seed : int
        Of the random draw; this and the next four as in `sample`.
    num : int
        Most anchors of an image.
    pos_fraction : float
        Largest share of positives among them.
    neg_pos_ub : float
        Most background anchors for each positive; negative for no limit.
    add_gt_as_proposals : bool
        Not possible here: the random sampler then raises, for it is given no labels.
    pos_weight : float
        As in `targets`.
    reg_decoded_bbox : bool
        Compare boxes in pixels, not deltas.
    means : sequence of float
        As in `encode`.
    stds : sequence of float
        As in `encode`.
    class_loss_weight : float
        Multiplies the class loss.
    box_loss_weight : float
        Multiplies the box loss.
    class_weight : sequence of float or None
        As in `cross_entropy` and `sigmoid_cross_entropy`.
    ignore_index : int
        As there.
    gamma : float
        As in `sigmoid_focal_loss`.
    alpha : float
        As there.
    beta : float
        As in `smooth_l1_loss`.
    eps : float
        As in `giou_loss`.

    Returns
    -------
    total : Tensor () float
        Sum over all levels of both.
    classification : Tensor (L,) float or None
    box : Tensor (L,) float or None

    Raises
    ------
    InputError
        If maps, anchors and strides do not fit together.
    UpstreamRaises
        ``anchor_head.no-anchor-inside``, ``anchor_head.label-out-of-range``, ``anchor_head.added-gt-needs-labels``.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> shape = torch.tensor([[8, 8]])
    >>> maps = [torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 4, 1, 1)]
    >>> parts = loss(*maps, boxes, boxes[None], torch.zeros(1, 1, dtype=torch.int64), one, shape, shape, strides=[8])
    >>> round(float(parts["total"]), 4)
    0.0433
    """
    batch = Batch(cls_scores, bbox_preds, anchors, gt_boxes, gt_labels)
    inside = _taking_part(batch, image_shapes, pad_shapes, strides, allowed_border)
    assignment = assign(
        anchors,
        gt_boxes,
        gt_valid,
        inside,
        ignore_boxes,
        ignore_valid,
        pos_iou_thr=pos_iou_thr,
        neg_iou_thr=neg_iou_thr,
        min_pos_iou=min_pos_iou,
        gt_max_assign_all=gt_max_assign_all,
        match_low_quality=match_low_quality,
        ignore_iof_thr=ignore_iof_thr,
        ignore_wrt_candidates=ignore_wrt_candidates,
    )
    options = Options(
        class_loss=class_loss,
        box_loss=box_loss,
        sampler=sampler,
        seed=seed,
        num=num,
        pos_fraction=pos_fraction,
        neg_pos_ub=neg_pos_ub,
        add_gt_as_proposals=add_gt_as_proposals,
        pos_weight=pos_weight,
        reg_decoded_bbox=reg_decoded_bbox,
        means=means,
        stds=stds,
        class_loss_weight=class_loss_weight,
        box_loss_weight=box_loss_weight,
        class_weight=class_weight,
        ignore_index=ignore_index,
        gamma=gamma,
        alpha=alpha,
        beta=beta,
        eps=eps,
    )
    return _loss(assignment.gt_index, batch, options)


def _taking_part(
    batch: Batch,
    image_shapes: Tensor,
    pad_shapes: Tensor,
    strides: Sequence[int | Sequence[int]],
    allowed_border: float,
) -> Tensor:
    """Anchors (B, A) that take part; at least one in every image."""
    batch.check()
    sizes = [tuple(level.shape[2:]) for level in batch.bbox_preds]
    base_anchors = [level.shape[1] // 4 for level in batch.bbox_preds]
    valid = valid_flags(pad_shapes, sizes=sizes, strides=strides, base_anchors=base_anchors)
    inside = inside_flags(batch.anchors, valid, image_shapes, allowed_border=allowed_border)
    for image, flags in enumerate(inside):
        if not flags.any():
            raise UpstreamRaises(
                "anchor_head.no-anchor-inside",
                expected="an anchor inside the image",
                got="none",
                where=f"anchor_head.loss, image {image}",
                fix="2.x then has no loss (None) for the whole batch, 3.x a ValueError.",
            )
    return inside


def _rows(level: Tensor, columns: int) -> Tensor:
    """Map (B, K*C, H, W) to rows (B, H*W*K, C) in the order of the anchors."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, columns)


def _loss(gt_index: Tensor, batch: Batch, options: Options) -> dict[str, Tensor]:
    """Loss of a given assignment."""
    columns, lengths = batch.columns, batch.num_anchors
    classes = columns - 1 if options.class_loss == "cross_entropy" else columns
    positive, negative = _sampled(gt_index, options)
    *each, num_positives, num_negatives = _targets(gt_index, batch, positive, negative, classes, options)
    divisor = int(num_positives + num_negatives if _samples(options) else num_positives)
    parts, levels = [], torch.split(batch.anchors, lengths)
    per_level = zip(*(torch.split(target, lengths, 1) for target in each), strict=True)
    for scores, deltas, anchors, target in zip(batch.cls_scores, batch.bbox_preds, levels, per_level, strict=True):
        labels, label_weights, box_targets, box_weights = (t.flatten(0, 1) for t in target)
        predicted = _predicted(anchors, _rows(deltas, 4), options).flatten(0, 1)
        class_term = _class_loss(_rows(scores, columns).flatten(0, 1), labels, label_weights, divisor, options)
        parts.append((class_term, _box_loss(predicted, box_targets, box_weights, divisor, options)))
    classification, box = (torch.stack(part) for part in zip(*parts, strict=True))
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}


def _samples(options: Options) -> bool:
    """Is there a draw: not with the focal loss, whatever the sampler."""
    return options.sampler == "random" and options.class_loss != "focal"


def _sampled(gt_index: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Positives and background (B, A) that are trained."""
    positive, negative, _ = unchecked(sample)(
        gt_index,
        sampler="random" if _samples(options) else "pseudo",
        seed=options.seed,
        num=options.num,
        pos_fraction=options.pos_fraction,
        neg_pos_ub=options.neg_pos_ub,
        add_gt_as_proposals=options.add_gt_as_proposals,
    )
    return positive, negative


def _targets(
    gt_index: Tensor, batch: Batch, positive: Tensor, negative: Tensor, num_classes: int, options: Options
) -> tuple[Tensor, ...]:
    return unchecked(targets)(
        batch.anchors,
        gt_index,
        batch.gt_boxes,
        batch.gt_labels,
        positive,
        negative,
        num_classes=num_classes,
        reg_decoded_bbox=options.reg_decoded_bbox,
        pos_weight=options.pos_weight,
        means=options.means,
        stds=options.stds,
    )


def _predicted(anchors: Tensor, deltas: Tensor, options: Options) -> Tensor:
    """Deltas (B, A, 4), or the boxes in pixels that they mean."""
    if not options.reg_decoded_bbox:
        return deltas
    return torch.stack(
        [unchecked(decode)(anchors, image, means=options.means, stds=options.stds) for image in deltas.unbind()]
    )


def _class_loss(scores: Tensor, labels: Tensor, weights: Tensor, divisor: float, options: Options) -> Tensor:
    given: dict[str, Any] = {"weight": weights, "avg_factor": divisor, "loss_weight": options.class_loss_weight}
    if options.class_loss == "focal":
        return unchecked(sigmoid_focal_loss)(scores, labels, **given, gamma=options.gamma, alpha=options.alpha)
    term = cross_entropy if options.class_loss == "cross_entropy" else sigmoid_cross_entropy
    settings: dict[str, Any] = {"class_weight": options.class_weight, "ignore_index": options.ignore_index}
    return unchecked(term)(scores, labels, **given, **settings)


def _box_loss(predicted: Tensor, target: Tensor, weights: Tensor, divisor: float, options: Options) -> Tensor:
    given: dict[str, Any] = {"weight": weights, "avg_factor": divisor, "loss_weight": options.box_loss_weight}
    if options.box_loss == "smooth_l1":
        return unchecked(smooth_l1_loss)(predicted, target, **given, beta=options.beta)
    if options.box_loss == "giou":
        return unchecked(giou_loss)(predicted, target, **given, eps=options.eps)
    return unchecked(l1_loss)(predicted, target, **given)
