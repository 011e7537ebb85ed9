"""YOLOX's loss on the assignment: box, objectness and class, and L1 in the last epochs.

Positives train box and class, all anchors objectness; each part is divided by the number of positives in the batch.
Source: Megvii-BaseDetection/YOLOX (Apache-2.0), described from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.reference import yolox
from detoracle.reference.assignment import Assignment
from detoracle.reference.boxes import iou_loss_yolox
from detoracle.reference.contract import operation, unchecked

__all__ = ["loss"]

_SOURCE = "Megvii-BaseDetection/YOLOX (Apache-2.0)"
_BOX_LOSS_WEIGHT = 5.0


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
        As `detoracle.reference.yolox.assign`.

    Examples
    --------
    >>> raw = [torch.zeros(1, 6, 2, 2)]
    >>> gt, one = torch.tensor([[[4.0, 4, 8, 8]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss(raw, [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> round(float(parts["objectness"]), 4)
    2.7726
    """
    yolox._check_strides(raw, strides)
    predictions = yolox._decode(raw, strides)
    cells, points, anchor_strides = yolox.anchor_grid(
        [(level.shape[2], level.shape[3]) for level in raw], strides, like=predictions
    )
    assignment = yolox.assign(
        predictions.detach(), points, anchor_strides, gt_boxes, gt_labels, gt_valid, flavour=flavour
    )
    return _loss(yolox._flatten(raw), predictions, cells, anchor_strides, gt_boxes, gt_labels, assignment, use_l1)


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
