"""Faults of YOLOX's assignment as a whole, and of its loss."""

from __future__ import annotations

from detoracle.properties.faults.fault import Fault

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (
    # ------------------------------------------------------------------------------------------------ assignment
    Fault(
        "yolox.last-gt-dropped",
        "yolox.assign",
        "return [g for g, real in enumerate(valid.tolist()) if real]",
        "return [g for g, real in enumerate(valid.tolist()) if real][:128]",
        "M5: more than a buffer's worth of ground truths",
    ),
    Fault(
        "yolox.padding-is-gt",
        "yolox.assign",
        "return [g for g, real in enumerate(valid.tolist()) if real]",
        "return list(range(len(valid)))",
        "L7: padding claims anchors",
    ),
    Fault(
        "yolox.rows-not-counted",
        "yolox.assign",
        'if flavour == "official":',
        'if flavour == "never":',
        "L4: the official code counts rows by their sum",
    ),
    Fault(
        "yolox.quality-is-one",
        "yolox.assign",
        "quality[image, anchor] = iou[image, gt_index[image, anchor], anchor]",
        "quality[image, anchor] = 1.0",
        "stage 6: the matched IoU",
    ),
    Fault(
        "yolox.quality-of-next-anchor",
        "yolox.assign",
        "iou[image, gt_index[image, anchor], anchor]",
        "iou[image, gt_index[image, anchor], anchor - 1]",
        "L7: an index off by one",
    ),
    # ------------------------------------------------------------------------------------------------------- loss
    Fault(
        "yolox.box-weight",
        "yolox.loss",
        "box + 5 * iou_loss_yolox",
        "box + iou_loss_yolox",
        "stage 8: the box loss counts five times",
    ),
    Fault(
        "yolox.per-image-normaliser",
        "yolox.loss",
        "positives = max(int(assignment.positive.sum()), 1)",
        "positives = max(int(assignment.positive.sum()) / len(raw[0]), 1)",
        "R4: a local normaliser for the global one",
    ),
    Fault(
        "yolox.no-minimum-of-one",
        "yolox.loss",
        "positives = max(int(assignment.positive.sum()), 1)",
        "positives = assignment.positive.sum()",
        "S3, N18: divided by no positives",
    ),
    Fault(
        "yolox.class-target-one-hot",
        "yolox.loss",
        "F.one_hot(label, predicted.shape[1] - 5) * quality[:, None]",
        "F.one_hot(label, predicted.shape[1] - 5) * torch.ones_like(quality)[:, None]",
        "stage 7: one-hot times matched IoU",
    ),
    Fault(
        "yolox.objectness-target-iou",
        "yolox.loss",
        "predictions[image, :, 4], positive.to(predictions)",
        "predictions[image, :, 4], assignment.quality[image]",
        "stage 7: 1 for positives",
    ),
    Fault(
        "yolox.objectness-of-positives",
        "yolox.loss",
        "predictions[image, :, 4], positive.to(predictions), reduction",
        "predictions[image, positive, 4], positive[positive].to(predictions), reduction",
        "stage 8: over all anchors",
    ),
    Fault(
        "yolox.objectness-mean",
        "yolox.loss",
        'positive.to(predictions), reduction="sum"',
        'positive.to(predictions), reduction="mean"',
        "stage 8: summed, not averaged",
    ),
    Fault(
        "yolox.class-detached",
        "yolox.loss",
        "predicted[:, 5:], target, reduction",
        "predicted[:, 5:].detach(), target, reduction",
        "A4: no gradient to the class logits",
    ),
    Fault(
        "yolox.l1-in-pixels",
        "yolox.loss",
        "in_cells = gt_box / stride[positive, None]",
        "in_cells = gt_box / 8",
        "C5: one stride for all levels",
    ),
    Fault(
        "yolox.l1-without-cells",
        "yolox.loss",
        "in_cells[:, :2] - cells[positive]",
        "in_cells[:, :2]",
        "stage 8: relative to the cell",
    ),
)
