"""Faults of SSD."""

from __future__ import annotations

from detoracle.properties.faults.fault import Fault

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (
    # ------------------------------------------------------------------------------------------------- prior boxes
    Fault(
        "ssd.priors-cell-corner", "ssd.priors", "x = (column + 0.5) / cells_in_image", "x = column / cells_in_image",
        "stage 1: the centre of the cell",
    ),
    Fault(
        "ssd.priors-columns-first", "ssd.priors", "for row in range(cells):\n            for column in range(cells):",
        "for column in range(cells):\n            for row in range(cells):", "C3: rows and columns swapped",
    ),
    Fault(
        "ssd.priors-grid-for-step", "ssd.priors", "cells_in_image = image_size / steps[level]", "cells_in_image = cells",
        "stage 1: the image over the step, 37.5 of 38 cells",
    ),
    Fault(
        "ssd.priors-tall-before-wide", "ssd.priors",
        "boxes.append([x, y, longer, shorter])\n                    boxes.append([x, y, shorter, longer])",
        "boxes.append([x, y, shorter, longer])\n                    boxes.append([x, y, longer, shorter])",
        "stage 1: the wide box of a ratio comes first",
    ),
    Fault(
        "ssd.priors-ratio-without-root", "ssd.priors", "longer = small * math.sqrt(ratio)", "longer = small * ratio",
        "stage 1: the square root of the ratio",
    ),
    Fault(
        "ssd.priors-all-square", "ssd.priors", "shorter = small / math.sqrt(ratio)", "shorter = small * math.sqrt(ratio)",
        "C6: multiplied in place of divided",
    ),
    Fault(
        "ssd.priors-largest-size", "ssd.priors", "large = math.sqrt(small * max_sizes[level] / image_size)",
        "large = max_sizes[level] / image_size", "stage 1: the geometric mean of both sizes",
    ),
    Fault(
        "ssd.priors-clipped-corners", "ssd.priors", "result = result.clamp(min=0, max=1)",
        "low = (result[:, :2] - result[:, 2:] / 2).clamp(0, 1)\n"
        "        high = (result[:, :2] + result[:, 2:] / 2).clamp(0, 1)\n"
        "        result = torch.cat([(low + high) / 2, high - low], dim=1)",
        "quirk: clipping acts on centre and size, not on the corners",
    ),
    Fault(
        "ssd.priors-always-clipped", "ssd.priors", "    if clip:\n", "    if True:\n", "stage 1: clipped only if asked for",
    ),
    # ---------------------------------------------------------------------------------------------------- overlaps
    Fault(
        "ssd.jaccard-legacy-pixel", "ssd.jaccard",
        "(boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])",
        "(boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)", "C14: one pixel more on each side",
    ),
    Fault(
        "ssd.jaccard-not-clamped", "ssd.jaccard", "(right_bottom - left_top).clamp(min=0)", "right_bottom - left_top",
        "boxes: sides clamped at 0",
    ),
    Fault(
        "ssd.jaccard-absolute-sides", "ssd.jaccard", "(right_bottom - left_top).clamp(min=0)", "(right_bottom - left_top).abs()",
        "boxes: sides clamped at 0",
    ),
    Fault(
        "ssd.jaccard-epsilon", "ssd.jaccard", "intersection / union", "intersection / (union + 1e-5)",
        "P5: an epsilon of another system",
    ),
    Fault(
        "ssd.jaccard-overlap-twice", "ssd.jaccard", "_area(box) + areas_b - intersection", "_area(box) + areas_b",
        "boxes: the intersection counts once in the union",
    ),
    Fault(
        "ssd.jaccard-of-smaller", "ssd.jaccard", "union = _area(box) + areas_b - intersection", "union = torch.minimum(_area(box), areas_b)",
        "C13: the share of the smaller box for IoU",
    ),
    Fault(
        "ssd.jaccard-half", "ssd.jaccard", "overlap[g] = intersection / union",
        "overlap[g] = (intersection.half() / union.half()).to(union)", "D1: areas in half precision",
    ),
    # ------------------------------------------------------------------------------------------- encode and decode
    Fault(
        "ssd.encode-one-variance", "ssd.encode", "log_size / variances[1]", "log_size / variances[0]", "stage 4: two variances",
    ),
    Fault(
        "ssd.encode-variances-fixed", "ssd.encode", "torch.cat([centre / variances[0], log_size / variances[1]], dim=1)",
        "torch.cat([centre / 0.1, log_size / 0.2], dim=1)", "stage 4: the variances that were asked for",
    ),
    Fault(
        "ssd.encode-corner", "ssd.encode", "gt_centre = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2", "gt_centre = gt_boxes[:, :2]",
        "C1: a corner taken for the centre",
    ),
    Fault(
        "ssd.encode-height-for-width", "ssd.encode", "(gt_centre - priors[:, :2]) / priors[:, 2:]",
        "(gt_centre - priors[:, :2]) / priors[:, [3, 2]]", "C2: a side mixed up",
    ),
    Fault(
        "ssd.encode-floor-under-log", "ssd.encode", "torch.log(gt_size / priors[:, 2:])", "torch.log((gt_size / priors[:, 2:]).clamp(min=1e-6))",
        "N3: the infinite target of a box without area is hidden",
    ),
    Fault(
        "ssd.decode-without-variance", "ssd.decode", "torch.exp(offsets[:, 2:] * variances[1])", "torch.exp(offsets[:, 2:])",
        "stage 4: the variance inside the exponential",
    ),
    Fault(
        "ssd.decode-variances-fixed", "ssd.decode", "offsets[:, :2] * variances[0] * priors[:, 2:]", "offsets[:, :2] * 0.1 * priors[:, 2:]",
        "stage 4: the variances that were asked for",
    ),
    Fault(
        "ssd.decode-centre-form", "ssd.decode", "left_top = centre - size / 2", "left_top = centre", "C1: centre form for corner form",
    ),
    Fault(
        "ssd.decode-capped", "ssd.decode", "torch.exp(offsets[:, 2:] * variances[1])",
        "torch.exp((offsets[:, 2:] * variances[1]).clamp(max=math.log(1000 / 16)))", "P5: the cap of another system",
    ),
    Fault(
        "ssd.decode-detached", "ssd.decode", "images.append(torch.cat([left_top, right_bottom], dim=1))",
        "images.append(torch.cat([left_top, right_bottom.detach()], dim=1))", "A4: no gradient to half of the corners",
    ),
    Fault(
        "ssd.decode-in-place", "ssd.decode", "    for offsets in loc:\n",
        "    for offsets in loc:\n        offsets.data[:, 2:].clamp_(max=4)\n", "A1: the input is overwritten",
    ),
    # ------------------------------------------------------------------------------------------------------- match
    Fault(
        "ssd.match-centre-form", "ssd.match",
        "corners = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], dim=1)", "corners = priors",
        "C1: priors in centre form, ground truths in corner form",
    ),
    Fault(
        "ssd.match-threshold-fixed", "ssd.match", "taken = best_overlap >= threshold", "taken = best_overlap >= 0.5",
        "stage 3: the threshold that was asked for",
    ),
    Fault(
        "ssd.match-nothing-forced", "ssd.match", "taken[best_prior] = True", "pass", "stage 3: each ground truth keeps its best prior",
    ),
    Fault(
        "ssd.match-forced-but-not-given", "ssd.match", "best_gt[best_prior] = g\n", "pass\n",
        "T2: the label is forced, the match is not",
    ),
    Fault(
        "ssd.match-first-wins", "ssd.match", "for g in range(len(present)):", "for g in reversed(range(len(present))):",
        "T10: of two ground truths with one best prior the later wins",
    ),
    Fault(
        "ssd.match-overlap-needed", "ssd.match", "best_prior = overlap[g].argmax()\n",
        "best_prior = overlap[g].argmax()\n            if overlap[g].max() == 0:\n                continue\n",
        "T11: a ground truth that overlaps no prior gets the first",
    ),
    Fault(
        "ssd.match-forced-only-if-free", "ssd.match", "best_prior = overlap[g].argmax()\n",
        "best_prior = overlap[g].argmax()\n            if taken[best_prior]:\n                continue\n",
        "T2: a better match is overwritten all the same",
    ),
    Fault(
        "ssd.match-labels-not-shifted", "ssd.match", "label[taken].long() + 1", "label[taken].long()", "L3: class 0 is the background",
    ),
    Fault(
        "ssd.match-label-of-background", "ssd.match", "positive = class_target[image] > 0", "positive = taken",
        "L2: label -1 becomes class 0, the background, and is no positive",
    ),
    Fault(
        "ssd.match-padding-is-gt", "ssd.match", "present = gt_valid[image].nonzero().flatten()", "present = torch.arange(len(gt_valid[image]))",
        "L7: padding takes priors",
    ),
    Fault(
        "ssd.match-index-not-mapped", "ssd.match", "gt_index[image, positive] = present[best_gt[positive]]", "gt_index[image, positive] = best_gt[positive]",
        "L7: an index into the real ground truths for one into all rows",
    ),
    Fault(
        "ssd.match-quality-of-best", "ssd.match", "overlap[best_gt[positive], positive]", "best_overlap[positive]",
        "stage 3: the overlap with the ground truth that it is given to",
    ),
    Fault(
        "ssd.match-variances-fixed", "ssd.match", "encode(matched_boxes, priors[positive], variances=variances)",
        "encode(matched_boxes, priors[positive])", "stage 4: the variances that were asked for",
    ),
    Fault(
        "ssd.match-halved-targets", "ssd.match", "jaccard(gt_boxes[image, present], corners)",
        "jaccard(gt_boxes[image, present].half().to(corners), corners)", "D3: ground truths rounded to half precision",
    ),
    # ---------------------------------------------------------------------------------------------- hard negatives
    Fault(
        "ssd.log-sum-exp-of-row", "ssd.log_sum_exp", "images.append(torch.log(exponentials.sum(dim=1)) + largest)",
        "images.append(logits.logsumexp(dim=1))", "N2: rows far below the batch's maximum are minus infinity",
    ),
    Fault(
        "ssd.log-sum-exp-of-image", "ssd.log_sum_exp", "    images = []\n    for logits in conf:\n",
        "    images = []\n    for logits in conf:\n        largest = logits.max()\n", "N2: one maximum for the whole batch",
    ),
    Fault(
        "ssd.log-sum-exp-plain", "ssd.log_sum_exp", "largest = conf.max()", "largest = conf.new_zeros(())", "N2: the maximum is subtracted",
    ),
    Fault(
        "ssd.mining-of-row", "ssd.hard_negatives", "log_sums = log_sum_exp(conf)", "log_sums = conf.logsumexp(dim=2)",
        "N2: what underflows ranks last",
    ),
    Fault(
        "ssd.mining-positives-kept", "ssd.hard_negatives", "        mining_loss[positive] = 0\n", "", "S1: the loss of positives is set to 0",
    ),
    Fault(
        "ssd.mining-easiest", "ssd.hard_negatives", "argsort(descending=True, stable=True)", "argsort(stable=True)", "stage 6: the largest losses",
    ),
    Fault(
        "ssd.mining-across-batch", "ssd.hard_negatives", "number = neg_pos * int(positive.sum())", "number = neg_pos * int((gt_index >= 0).sum())",
        "stage 6: the positives of the image",
    ),
    Fault(
        "ssd.mining-ratio-fixed", "ssd.hard_negatives", "number = neg_pos * int(positive.sum())", "number = 3 * int(positive.sum())",
        "stage 6: the ratio that was asked for",
    ),
    Fault(
        "ssd.mining-at-least-one", "ssd.hard_negatives", "number = neg_pos * int(positive.sum())", "number = max(neg_pos * int(positive.sum()), neg_pos)",
        "stage 6: no positives, no negatives",
    ),
    Fault(
        "ssd.mining-uncapped", "ssd.hard_negatives", "min(number, len(ranking) - 1)", "min(number, len(ranking))", "stage 6: one prior fewer than there are",
    ),
    Fault(
        "ssd.mining-takes-positives", "ssd.hard_negatives",
        "chosen[image, hardest] = BACKGROUND\n        chosen[image, positive] = gt_index[image, positive].long()\n",
        "chosen[image, positive] = gt_index[image, positive].long()\n        chosen[image, hardest] = BACKGROUND\n",
        "T15: a positive among the hardest stays positive",
    ),
    Fault(
        "ssd.mining-negative-label", "ssd.hard_negatives", "gt_labels[image, matched] >= 0", "gt_labels[image, matched] >= -1",
        "L2: label -1 is the background",
    ),
    Fault(
        "ssd.mining-by-confidence", "ssd.hard_negatives", "mining_loss = log_sums[image] - conf[image, :, 0]",
        "mining_loss = log_sums[image] - conf[image].amax(dim=1)", "stage 6: the loss as background",
    ),
    Fault(
        "ssd.mining-quality-of-all", "ssd.hard_negatives", "quality[image, hardest] = mining_loss[hardest]", "quality[image] = mining_loss",
        "stage 6: the loss of the chosen",
    ),
    # -------------------------------------------------------------------------------------------------------- loss
    Fault(
        "ssd.loss-l1", "ssd.loss", "F.smooth_l1_loss(", "F.l1_loss(", "stage 5: smooth L1",
    ),
    Fault(
        "ssd.loss-beta", "ssd.loss", "F.smooth_l1_loss(loc[image, positive], loc_target, reduction",
        "F.smooth_l1_loss(loc[image, positive], loc_target, beta=1 / 9, reduction", "P5: the beta of another system",
    ),
    Fault(
        "ssd.loss-box-of-negatives", "ssd.loss", "        positive = mined.gt_index[image] >= 0\n", "        positive = mined.gt_index[image] != IGNORED\n",
        "stage 5: positive priors only",
    ),
    Fault(
        "ssd.loss-without-mining", "ssd.loss", "trained = mined.gt_index[image] != IGNORED", "trained = torch.ones_like(positive)",
        "stage 7: positives and chosen negatives only",
    ),
    Fault(
        "ssd.loss-of-positives", "ssd.loss", "trained = mined.gt_index[image] != IGNORED", "trained = positive", "stage 7: negatives too",
    ),
    Fault(
        "ssd.loss-positives-twice", "ssd.loss", "classification = classification + class_loss",
        "twice = positive & (4 * positive.sum() > len(positive))\n"
        "        class_loss = class_loss + F.cross_entropy(conf[image, twice], matched.extra[\"class_target\"][image, twice], reduction=\"sum\")\n"
        "        classification = classification + class_loss", "T14: a prior both positive and negative counts once",
    ),
    Fault(
        "ssd.loss-mean-over-images", "ssd.loss", "positives = int(matched.positive.sum())", "positives = int(matched.positive.sum()) / len(loc)",
        "R4: a local normaliser for the global one",
    ),
    Fault(
        "ssd.loss-normalised-by-trained", "ssd.loss", "classification = classification / positives",
        "classification = classification / (mined.gt_index != IGNORED).sum()", "stage 8: both parts by the positives",
    ),
    Fault(
        "ssd.loss-at-least-one", "ssd.loss", "positives = int(matched.positive.sum())", "positives = max(int(matched.positive.sum()), 1)",
        "S3: without positives both parts are 0 / 0",
    ),
    Fault(
        "ssd.loss-box-detached", "ssd.loss", "loc[image, positive], loc_target", "loc[image, positive].detach(), loc_target", "A4: no gradient to the offsets",
    ),
    Fault(
        "ssd.loss-class-detached", "ssd.loss", "F.cross_entropy(conf[image, trained], class_target", "F.cross_entropy(conf[image, trained].detach(), class_target",
        "A4: no gradient to the class logits",
    ),
    Fault(
        "ssd.loss-threshold-fixed", "ssd.loss", "threshold=threshold, variances=variances)\n    mined", "variances=variances)\n    mined",
        "stage 3: the threshold that was asked for",
    ),
    Fault(
        "ssd.loss-variances-fixed", "ssd.loss", "threshold=threshold, variances=variances)\n    mined", "threshold=threshold)\n    mined",
        "stage 4: the variances that were asked for",
    ),
    Fault(
        "ssd.loss-ratio-fixed", "ssd.loss", "matched.gt_index, gt_labels, neg_pos=neg_pos)", "matched.gt_index, gt_labels)",
        "stage 6: the ratio that was asked for",
    ),
)  # fmt: skip
