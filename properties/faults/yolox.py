"""Faults of YOLOX."""

from __future__ import annotations

from detoracle.properties.faults.fault import Fault

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (
    # ------------------------------------------------------------------------------------------------ decoding
    Fault(
        "yolox.decode-cell-centre", "yolox.decode", "(flat[..., :2] + cells) * stride", "(flat[..., :2] + cells + 0.5) * stride",
        "stage 1: the centre is offset from the cell's corner",
    ),
    Fault(
        "yolox.decode-stride-twice", "yolox.decode", "size = torch.exp(flat[..., 2:4]) * stride", "size = torch.exp(flat[..., 2:4]) * stride * stride",
        "C5: boxes scaled by the stride, anchors not, or twice",
    ),
    Fault(
        "yolox.decode-rows-for-columns", "yolox.decode", "for row in range(height) for column in range(width)", "for column in range(width) for row in range(height)",
        "C3: height and width swapped; only a map that is not square, or not symmetric, shows it",
    ),
    Fault(
        "yolox.decode-detached", "yolox.decode", "levels.append(torch.cat([centre, size, flat[..., 4:]], dim=-1))",
        "levels.append(torch.cat([centre.detach(), size, flat[..., 4:]], dim=-1))", "stage 8: gradients flow through the decoding",
    ),
    Fault(
        "yolox.decode-in-place", "yolox.decode", "        flat = level.flatten(2).transpose(1, 2)\n        centre",
        "        flat = level.flatten(2).transpose(1, 2)\n        level.data.mul_(1.0)\n        level.data[:, :2] += 0.25\n        centre",
        "A1: the tutorial's decoding overwrites its input",
    ),
    # ------------------------------------------------------------------------------------------------------ boxes
    Fault(
        "yolox.iou-epsilon", "boxes.iou_yolox", "(box_area + area - intersection)", "(box_area + area - intersection + 1e-3)",
        "P5: an epsilon of another system",
    ),
    Fault(
        "yolox.iou-clamped-sides", "boxes.iou_yolox", "return (right_bottom - left_top).prod(-1) * overlap", "return (right_bottom - left_top).prod(-1).abs()",
        "boxes: no overlap unless strict on both axes",
    ),
    Fault(
        "yolox.iou-form-ignored", "boxes.iou_yolox", 'if form == "xyxy":\n        return boxes', 'if form == "never":\n        return boxes',
        "C1: corner form taken for centre form",
    ),
    Fault(
        "yolox.iou-loss-not-squared", "boxes.iou_loss_yolox", "return 1 - iou**2", "return 1 - iou", "boxes: the IoU loss is 1 - IoU squared",
    ),
    Fault(
        "yolox.giou-union-for-intersection", "boxes.iou_loss_yolox", 'variant == "giou_tutorial" else union', 'variant == "never" else union',
        "N1: the tutorial's GIoU keeps the published bug",
    ),
    Fault(
        "yolox.giou-intersection-for-union", "boxes.iou_loss_yolox", 'intersection if variant == "giou_tutorial" else union', "intersection",
        "N1: the bug where it was fixed",
    ),
    Fault(
        "yolox.iou-loss-detached", "boxes.iou_loss_yolox", 'return 1 - iou**2', "return 1 - (iou**2).detach() + 0 * iou", "A4: the value is right, the gradient is not",
    ),
    Fault(
        "yolox.iou-loss-half", "boxes.iou_loss_yolox", "iou = intersection / (union + 1e-16)", "iou = (intersection.half() / union.half().clamp(min=1e-4)).to(union)",
        "D1: areas overflow in half precision",
    ),
    # ------------------------------------------------------------------------------------------------- candidates
    Fault(
        "yolox.edge-counts", "yolox.candidates", "(position > centre - reach) & (position < centre + reach)", "(position >= centre - reach) & (position <= centre + reach)",
        "stage 2: strictly greater",
    ),
    Fault(
        "yolox.radius-of-other-flavour", "yolox.candidates", '(2.5 if flavour == "tutorial" else 1.5)', "2.5", "P2: the two published versions mixed",
    ),
    Fault(
        "yolox.radius-without-stride", "yolox.candidates", '(2.5 if flavour == "tutorial" else 1.5) * anchor_strides', '(2.5 if flavour == "tutorial" else 1.5) * 8 * torch.ones_like(anchor_strides)',
        "stage 2: the anchor's own stride",
    ),
    Fault(
        "yolox.candidates-need-both", "yolox.candidates", "candidate[image] |= in_box | in_center", "candidate[image] |= in_box & in_center", "stage 2: or, not and",
    ),
    Fault(
        "yolox.geometry-either", "yolox.candidates", "geometry[image, g] = in_box & in_center", "geometry[image, g] = in_box | in_center", "stage 2: and, not or",
    ),
    Fault(
        "yolox.height-for-width", "yolox.candidates", "_within(x, centre_x, width / 2)", "_within(x, centre_x, height / 2)", "C2, C11: a side mixed up",
    ),
    Fault(
        "yolox.full-width", "yolox.candidates", "_within(x, centre_x, width / 2)", "_within(x, centre_x, width)", "C11: half a width, not a whole one",
    ),
    # ------------------------------------------------------------------------------------------------------- cost
    Fault(
        "yolox.penalty-too-small", "yolox.assign", "penalty = 1e5 if", "penalty = 1e4 if", "stage 3: 1e5",
    ),
    Fault(
        "yolox.penalty-of-other-flavour", "yolox.cost", 'penalty = 1e5 if flavour == "tutorial" else 1e6', "penalty = 1e5", "P2: the two published versions mixed",
    ),
    Fault(
        "yolox.no-penalty", "yolox.assign", "pair_cost[~geometry[image, g, near]] += penalty", "pair_cost = pair_cost + 0 * penalty", "stage 3: geometry",
    ),
    Fault(
        "yolox.iou-cost-weight", "yolox.cost", "class_cost + 3 * -torch.log", "class_cost + 2 * -torch.log", "stage 3: three times the IoU cost",
    ),
    Fault(
        "yolox.iou-cost-epsilon", "yolox.cost", "torch.log(pair_iou + 1e-8)", "torch.log(pair_iou + 1e-6)", "stage 3: 1e-8",
    ),
    Fault(
        "yolox.no-square-root", "yolox.cost", "torch.sqrt(torch.sigmoid(classes) * torch.sigmoid(objectness))", "torch.sigmoid(classes) * torch.sigmoid(objectness)",
        "stage 3: the square root of the product",
    ),
    Fault(
        "yolox.no-objectness-in-cost", "yolox.cost", "torch.sqrt(torch.sigmoid(classes) * torch.sigmoid(objectness))", "torch.sigmoid(classes)",
        "stage 3: the objectness belongs there",
    ),
    Fault(
        "yolox.class-of-gt-only", "yolox.cost", 'reduction="none").sum(-1)\n            pair_iou', 'reduction="none")[:, gt_labels[image, g]]\n            pair_iou',
        "P1: the cost of the ground truth's class alone",
    ),
    # -------------------------------------------------------------------------------------------------- matching
    Fault(
        "yolox.k-rounded", "yolox.dynamic_k_matching", "max(int(best), 1)", "max(round(float(best)), 1)", "stage 4: truncated",
    ),
    Fault(
        "yolox.k-without-minimum", "yolox.dynamic_k_matching", "max(int(best), 1)", "int(best)", "stage 4: at least 1",
    ),
    Fault(
        "yolox.top-20", "yolox.dynamic_k_matching", "values[:10].sum()", "values[:20].sum()", "stage 4: the ten largest",
    ),
    Fault(
        "yolox.k-mean", "yolox.dynamic_k_matching", "values[:10].sum()", "values[:10].mean()", "stage 4: the sum",
    ),
    Fault(
        "yolox.claims-dearest", "yolox.dynamic_k_matching", "argsort(stable=True)[:k]", "argsort(stable=True, descending=True)[:k]", "stage 4: the smallest costs",
    ),
    Fault(
        "yolox.one-claim-too-many", "yolox.dynamic_k_matching", "argsort(stable=True)[:k]", "argsort(stable=True)[: k + 1]", "stage 4: k claims",
    ),
    Fault(
        "yolox.conflict-among-claimants", "yolox.dynamic_k_matching", "gt_index[image, anchor] = present[int(cost[image, present, anchor].argmin())]",
        "gt_index[image, anchor] = claimants[int(cost[image, claimants, anchor].argmin())]", "T4: over all ground truths",
    ),
    Fault(
        "yolox.conflict-first-wins", "yolox.dynamic_k_matching", "gt_index[image, anchor] = present[int(cost[image, present, anchor].argmin())]",
        "gt_index[image, anchor] = claimants[0]", "T10: order decides",
    ),
    Fault(
        "yolox.conflict-last-wins", "yolox.dynamic_k_matching", "gt_index[image, anchor] = present[int(cost[image, present, anchor].argmin())]",
        "gt_index[image, anchor] = claimants[-1]", "T10, T12: the last write wins",
    ),
    Fault(
        "yolox.conflict-by-iou", "yolox.dynamic_k_matching", "int(cost[image, present, anchor].argmin())", "int(iou[image, present, anchor].argmax())", "stage 5: the smallest cost",
    ),
    Fault(
        "yolox.conflict-dropped", "yolox.dynamic_k_matching", "gt_index[image, anchor] = present[int(cost[image, present, anchor].argmin())]",
        "gt_index[image, anchor] = BACKGROUND", "T8: a contested anchor is lost",
    ),
    Fault(
        "yolox.index-not-mapped", "yolox.assign", "present[int(cost[image, present, anchor].argmin())]", "int(cost[image, present, anchor].argmax())", "T9: the wrong index",
    ),
    # ------------------------------------------------------------------------------------------------ assignment
    Fault(
        "yolox.last-gt-dropped", "yolox.assign", "return [g for g, real in enumerate(valid.tolist()) if real]", "return [g for g, real in enumerate(valid.tolist()) if real][:128]",
        "M5: more than a buffer's worth of ground truths",
    ),
    Fault(
        "yolox.padding-is-gt", "yolox.assign", "return [g for g, real in enumerate(valid.tolist()) if real]", "return list(range(len(valid)))", "L7: padding claims anchors",
    ),
    Fault(
        "yolox.rows-not-counted", "yolox.assign", 'if flavour == "official":', 'if flavour == "never":', "L4: the official code counts rows by their sum",
    ),
    Fault(
        "yolox.quality-is-one", "yolox.assign", "quality[image, anchor] = iou[image, gt_index[image, anchor], anchor]", "quality[image, anchor] = 1.0", "stage 6: the matched IoU",
    ),
    Fault(
        "yolox.quality-of-next-anchor", "yolox.assign", "iou[image, gt_index[image, anchor], anchor]", "iou[image, gt_index[image, anchor], anchor - 1]", "L7: an index off by one",
    ),
    # ------------------------------------------------------------------------------------------------------- loss
    Fault(
        "yolox.box-weight", "yolox.loss", "box + 5 * iou_loss_yolox", "box + iou_loss_yolox", "stage 8: the box loss counts five times",
    ),
    Fault(
        "yolox.per-image-normaliser", "yolox.loss", "positives = max(int(assignment.positive.sum()), 1)", "positives = max(int(assignment.positive.sum()) / len(raw[0]), 1)",
        "R4: a local normaliser for the global one",
    ),
    Fault(
        "yolox.no-minimum-of-one", "yolox.loss", "positives = max(int(assignment.positive.sum()), 1)", "positives = assignment.positive.sum()", "S3, N18: divided by no positives",
    ),
    Fault(
        "yolox.class-target-one-hot", "yolox.loss", "F.one_hot(label, predicted.shape[1] - 5) * quality[:, None]", "F.one_hot(label, predicted.shape[1] - 5) * torch.ones_like(quality)[:, None]",
        "stage 7: one-hot times matched IoU",
    ),
    Fault(
        "yolox.objectness-target-iou", "yolox.loss", "predictions[image, :, 4], positive.to(predictions)", "predictions[image, :, 4], assignment.quality[image]", "stage 7: 1 for positives",
    ),
    Fault(
        "yolox.objectness-of-positives", "yolox.loss", "predictions[image, :, 4], positive.to(predictions), reduction", "predictions[image, positive, 4], positive[positive].to(predictions), reduction",
        "stage 8: over all anchors",
    ),
    Fault(
        "yolox.objectness-mean", "yolox.loss", 'positive.to(predictions), reduction="sum"', 'positive.to(predictions), reduction="mean"', "stage 8: summed, not averaged",
    ),
    Fault(
        "yolox.class-detached", "yolox.loss", "predicted[:, 5:], target, reduction", "predicted[:, 5:].detach(), target, reduction", "A4: no gradient to the class logits",
    ),
    Fault(
        "yolox.l1-in-pixels", "yolox.loss", "in_cells = gt_box / stride[positive, None]", "in_cells = gt_box / 8", "C5: one stride for all levels",
    ),
    Fault(
        "yolox.l1-without-cells", "yolox.loss", "in_cells[:, :2] - cells[positive]", "in_cells[:, :2]", "stage 8: relative to the cell",
    ),
)  # fmt: skip
