"""Loss of the anchor head, image by image with hard negatives, as mmdetection's SSD has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detoracle.reference.anchor_head import assign
from detoracle.reference.anchor_head_box_terms import smooth_l1_loss
from detoracle.reference.anchor_head_boxes import SOURCE
from detoracle.reference.anchor_head_loss import Batch, Options, _predicted, _rows, _taking_part, _targets
from detoracle.reference.anchor_head_terms import cross_entropy, weighted
from detoracle.reference.assignment import BACKGROUND
from detoracle.reference.contract import operation, unchecked

__all__ = ["ssd_loss"]


@operation("anchor_head.ssd_loss", kind="loss", gradients=("cls_scores", "bbox_preds"), source=SOURCE)
def ssd_loss(
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
    neg_iou_thr: float | Sequence[float] = 0.5,
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = False,
    match_low_quality: bool = True,
    ignore_iof_thr: float = -1.0,
    ignore_wrt_candidates: bool = True,
    allowed_border: float = -1.0,
    neg_pos_ratio: int = 3,
    pos_weight: float = Options.pos_weight,
    reg_decoded_bbox: bool = Options.reg_decoded_bbox,
    means: Sequence[float] = Options.means,
    stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    beta: float = Options.beta,
) -> dict[str, Tensor]:
    """Training loss of a batch, image by image, with hard negatives, and its gradient to the raw maps.

    Per image, softmax cross entropy of the positives and of the costliest background anchors, three for each positive,
    and smooth L1 of the positives' deltas; both divided by the number of positives in the batch, each image counting at
    least 1. An image without positives costs exactly 0. Ties among background: lowest index. The defaults of the
    assignment and the deltas are those of SSD's configurations.

    Parameters
    ----------
    cls_scores : list of Tensor (B, Sl, Hl, Wl) float
        K*(C+1) channels of logits, background last.
    bbox_preds : list of Tensor (B, Dl, Hl, Wl) float
        K*4 channels of deltas.
    anchors : Tensor (A, 4) float
        xyxy in pixels, in the order of the maps (`ssd_anchors`).
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1.
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
    neg_pos_ratio : int
        Most background anchors for each positive.
    pos_weight : float
        As in `targets`.
    reg_decoded_bbox : bool
        Compare boxes in pixels, not deltas.
    means : sequence of float
        As in `encode`.
    stds : sequence of float
        As in `encode`.
    beta : float
        As in `smooth_l1_loss`.

    Returns
    -------
    total : Tensor () float
        Sum over all images of both.
    classification : Tensor (B,) float or None
    box : Tensor (B,) float or None

    Raises
    ------
    InputError
        If maps, anchors and strides do not fit together.
    UpstreamRaises
        ``anchor_head.no-anchor-inside``, ``anchor_head.label-out-of-range``.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> shape, label = torch.tensor([[8, 8]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> maps = [torch.zeros(1, 2, 1, 1)], [torch.zeros(1, 4, 1, 1)]
    >>> round(float(ssd_loss(*maps, boxes, boxes[None], label, one, shape, shape, strides=[8])["total"]), 4)
    0.6931
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
        "cross_entropy",
        "smooth_l1",
        pos_weight=pos_weight,
        reg_decoded_bbox=reg_decoded_bbox,
        means=means,
        stds=stds,
        beta=beta,
    )
    rows = _SsdRows.of(assignment.gt_index, batch, options)
    mined = torch.stack([_hardest(*candidates) for candidates in rows.candidates(neg_pos_ratio)])
    return rows.loss(mined)


@dataclass(frozen=True, eq=False)
class _SsdRows:
    """Weighted class losses (B, A) and box losses (B, A, 4) of all anchors, and who is positive or background."""

    classification: Tensor
    box: Tensor
    positive: Tensor
    background: Tensor
    divisor: float

    @classmethod
    def of(cls, gt_index: Tensor, batch: Batch, options: Options) -> _SsdRows:
        """Work out the losses of a given assignment."""
        columns = batch.columns
        scores = torch.cat([_rows(level, columns) for level in batch.cls_scores], dim=1)
        deltas = torch.cat([_rows(level, 4) for level in batch.bbox_preds], dim=1)
        labels, label_weights, box_targets, box_weights, num_positives, _ = _targets(
            gt_index, batch, gt_index >= 0, gt_index == BACKGROUND, columns - 1, options
        )
        flat = unchecked(cross_entropy)(scores.flatten(0, 1), labels.flatten(), reduction="none")
        predicted = _predicted(batch.anchors, deltas, options).flatten(0, 1)
        box = unchecked(smooth_l1_loss)(
            predicted, box_targets.flatten(0, 1), box_weights.flatten(0, 1), beta=options.beta, reduction="none"
        )
        classification = flat.reshape(labels.shape) * label_weights
        has_class, background = (labels >= 0) & (labels < columns - 1), labels == columns - 1
        return cls(classification, box.reshape(box_targets.shape), has_class, background, int(num_positives))

    def candidates(self, neg_pos_ratio: int) -> list[tuple[Tensor, Tensor, int]]:
        """Per image: class losses, who is background, and how many of them are to be mined."""
        numbers = torch.minimum(neg_pos_ratio * self.positive.sum(1), self.background.sum(1)).tolist()
        return list(zip(self.classification.unbind(), self.background, numbers, strict=True))

    def loss(self, mined: Tensor) -> dict[str, Tensor]:
        """Loss of given hard negatives (B, A)."""
        classification, box = [], []
        for image, (positive, chosen) in enumerate(zip(self.positive, mined, strict=True)):
            costs = self.classification[image]
            classification.append((costs[positive].sum() + costs[chosen].sum()) / self.divisor)
            box.append(weighted(self.box[image], avg_factor=self.divisor))
        parts = torch.stack(classification), torch.stack(box)
        return {"total": parts[0].sum() + parts[1].sum(), "classification": parts[0], "box": parts[1]}


def _hardest(cost: Tensor, background: Tensor, number: int) -> Tensor:
    """The so many costliest background anchors, (A,) bool; NaN costs most."""
    anchors = background.nonzero().flatten()
    order = cost.detach()[anchors].argsort(descending=True, stable=True)
    return torch.zeros_like(background).index_fill(0, anchors[order[:number]], True)
