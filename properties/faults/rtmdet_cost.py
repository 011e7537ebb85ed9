"""Faults of RTMDet's cost of every pair of prior and ground truth."""

from __future__ import annotations

from detoracle.properties.faults.fault import Fault

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (
    # ------------------------------------------------------------------------------------------------------------ cost
    Fault(
        "rtmdet.cost-log-epsilon",
        "rtmdet.cost",
        "torch.log(pair_iou + 1e-7)",
        "torch.log(pair_iou + 1e-8)",
        "P5: an epsilon of another system",
    ),
    Fault(
        "rtmdet.cost-iou-weight-fixed",
        "rtmdet.cost",
        "torch.log(pair_iou + 1e-7) * iou_weight",
        "torch.log(pair_iou + 1e-7) * 3",
        "stage 4: the weight that was asked for",
    ),
    Fault(
        "rtmdet.cost-own-class-only",
        "rtmdet.cost",
        "(entropy * error.abs() ** 2).sum(1)",
        "(entropy * error.abs() ** 2)[:, gt_labels[image, g]]",
        "P1: all classes, not the ground truth's alone",
    ),
    Fault(
        "rtmdet.cost-hard-label",
        "rtmdet.cost",
        "soft_label = one_hot * pair_iou[:, None]",
        "soft_label = one_hot * torch.ones_like(pair_iou[:, None])",
        "stage 4: the label is the IoU, not 1",
    ),
    Fault(
        "rtmdet.cost-not-squared",
        "rtmdet.cost",
        "error.abs() ** 2",
        "error.abs()",
        "stage 4: the squared error",
    ),
    Fault(
        "rtmdet.cost-of-probabilities",
        "rtmdet.cost",
        'F.binary_cross_entropy_with_logits(logits, soft_label, reduction="none")',
        'F.binary_cross_entropy(torch.sigmoid(logits), soft_label, reduction="none")',
        "N7: logits, not probabilities, whose logarithm ends at -100",
    ),
    Fault(
        "rtmdet.cost-label-of-first",
        "rtmdet.cost",
        "F.one_hot(gt_labels[image, g].long()",
        "F.one_hot(gt_labels[image, 0].long()",
        "stage 4: each ground truth's own class",
    ),
    Fault(
        "rtmdet.cost-centre-form",
        "rtmdet.cost",
        "centre = (gt_boxes[image, g, :2] + gt_boxes[image, g, 2:]) / 2",
        "centre = gt_boxes[image, g, :2]",
        "C1: centre form for corner form",
    ),
    Fault(
        "rtmdet.cost-in-pixels",
        "rtmdet.cost",
        " / priors[near, 2]\n",
        "\n",
        "stage 4: the distance is in strides",
    ),
    Fault(
        "rtmdet.cost-finest-stride",
        "rtmdet.cost",
        "/ priors[near, 2]",
        "/ priors[0, 2]",
        "stage 4: the stride of the prior's own level",
    ),
    Fault(
        "rtmdet.cost-natural-exponential",
        "rtmdet.cost",
        "10.0 ** (distance - soft_center_radius)",
        "torch.exp(distance - soft_center_radius)",
        "stage 4: to the base 10",
    ),
    Fault(
        "rtmdet.cost-radius-fixed",
        "rtmdet.cost",
        "10.0 ** (distance - soft_center_radius)",
        "10.0 ** (distance - 3.0)",
        "stage 4: the radius that was asked for",
    ),
    Fault(
        "rtmdet.cost-capped",
        "rtmdet.cost",
        "10.0 ** (distance - soft_center_radius)",
        "(10.0 ** (distance - soft_center_radius)).clamp(max=1e8)",
        "N11: far priors are costlier without limit",
    ),
    Fault(
        "rtmdet.cost-large-for-infinite",
        "rtmdet.cost",
        "boxes.new_full(shape, math.inf,",
        "boxes.new_full(shape, 1e8,",
        "P1: infinite where there is no candidate",
    ),
    Fault(
        "rtmdet.cost-masks-ignored",
        "rtmdet.cost",
        "if gt_masks is None:",
        "if True:",
        "quirk: the mask's centre of mass, if there are masks",
    ),
    Fault(
        "rtmdet.cost-mask-swapped",
        "rtmdet.cost",
        "torch.stack([column.sum() / pixels, row.sum() / pixels])",
        "torch.stack([row.sum() / pixels, column.sum() / pixels])",
        "C3: rows and columns swapped",
    ),
    Fault(
        "rtmdet.cost-mask-pixel-centres",
        "rtmdet.cost",
        "column.sum() / pixels",
        "(column + 0.5).sum() / pixels",
        "quirk: the mean index of pixels, not of their centres",
    ),
    Fault(
        "rtmdet.cost-inside-own-only",
        "rtmdet.cost",
        "cost[image, g, near] = (class_cost + iou_cost + distance_cost).to(dtype)",
        "own = ((priors[near, :2] > gt_boxes[image, g, :2]) & (priors[near, :2] < gt_boxes[image, g, 2:])).all(1)\n"
        "            total = class_cost + iou_cost + distance_cost\n"
        "            cost[image, g, near] = total.masked_fill(~own, math.inf).to(dtype)",
        "T13: a candidate of one ground truth is one of all",
    ),
    Fault(
        "rtmdet.iou-legacy-pixel",
        "rtmdet.cost",
        "area = (box[2] - box[0]) * (box[3] - box[1])",
        "area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)",
        "C14: one pixel more on each side",
    ),
    Fault(
        "rtmdet.iou-not-clamped",
        "rtmdet.cost",
        "shared = (right_bottom - left_top).clamp(min=0)\n    intersection = shared[:, 0] * shared[:, 1]\n    area =",
        "shared = right_bottom - left_top\n    intersection = shared[:, 0] * shared[:, 1]\n    area =",
        "boxes: sides clamped at 0",
    ),
    Fault(
        "rtmdet.iou-of-first",
        "rtmdet.cost",
        "union = area + areas - intersection",
        "union = area",
        "C13: the share of the ground truth for IoU",
    ),
    Fault(
        "rtmdet.iou-half",
        "rtmdet.cost",
        "pair_iou = _iou(gt_boxes[image, g], boxes[image, near])",
        "pair_iou = _iou(gt_boxes[image, g].half(), boxes[image, near].half()).to(boxes)",
        "M7: areas overflow half precision",
    ),
)
