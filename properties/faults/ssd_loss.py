"""Faults of SSD's hard negative mining and loss."""

from __future__ import annotations

from detoracle.properties.faults.fault import Fault

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = (
    # ---------------------------------------------------------------------------------------------- hard negatives
    Fault(
        "ssd.log-sum-exp-of-row",
        "ssd.log_sum_exp",
        "images.append(torch.log(exponentials.sum(dim=1)) + largest)",
        "images.append(logits.logsumexp(dim=1))",
        "N2: rows far below the batch's maximum are minus infinity",
    ),
    Fault(
        "ssd.log-sum-exp-of-image",
        "ssd.log_sum_exp",
        "    images = []\n    for logits in conf:\n",
        "    images = []\n    for logits in conf:\n        largest = logits.max()\n",
        "N2: one maximum for the whole batch",
    ),
    Fault(
        "ssd.log-sum-exp-plain",
        "ssd.log_sum_exp",
        "largest = conf.max()",
        "largest = conf.new_zeros(())",
        "N2: the maximum is subtracted",
    ),
    Fault(
        "ssd.mining-of-row",
        "ssd.hard_negatives",
        "log_sums = log_sum_exp(conf)",
        "log_sums = conf.logsumexp(dim=2)",
        "N2: what underflows ranks last",
    ),
    Fault(
        "ssd.mining-positives-kept",
        "ssd.hard_negatives",
        "        mining_loss[positive] = 0\n",
        "",
        "S1: the loss of positives is set to 0",
    ),
    Fault(
        "ssd.mining-easiest",
        "ssd.hard_negatives",
        "argsort(descending=True, stable=True)",
        "argsort(stable=True)",
        "stage 6: the largest losses",
    ),
    Fault(
        "ssd.mining-across-batch",
        "ssd.hard_negatives",
        "number = neg_pos * int(positive.sum())",
        "number = neg_pos * int((gt_index >= 0).sum())",
        "stage 6: the positives of the image",
    ),
    Fault(
        "ssd.mining-ratio-fixed",
        "ssd.hard_negatives",
        "number = neg_pos * int(positive.sum())",
        "number = 3 * int(positive.sum())",
        "stage 6: the ratio that was asked for",
    ),
    Fault(
        "ssd.mining-at-least-one",
        "ssd.hard_negatives",
        "number = neg_pos * int(positive.sum())",
        "number = max(neg_pos * int(positive.sum()), neg_pos)",
        "stage 6: no positives, no negatives",
    ),
    Fault(
        "ssd.mining-uncapped",
        "ssd.hard_negatives",
        "min(number, len(ranking) - 1)",
        "min(number, len(ranking))",
        "stage 6: one prior fewer than there are",
    ),
    Fault(
        "ssd.mining-takes-positives",
        "ssd.hard_negatives",
        "chosen[image, hardest] = BACKGROUND\n        chosen[image, positive] = gt_index[image, positive].long()\n",
        "chosen[image, positive] = gt_index[image, positive].long()\n        chosen[image, hardest] = BACKGROUND\n",
        "T15: a positive among the hardest stays positive",
    ),
    Fault(
        "ssd.mining-negative-label",
        "ssd.hard_negatives",
        "gt_labels[image, matched] >= 0",
        "gt_labels[image, matched] >= -1",
        "L2: label -1 is the background",
    ),
    Fault(
        "ssd.mining-by-confidence",
        "ssd.hard_negatives",
        "mining_loss = log_sums[image] - conf[image, :, 0]",
        "mining_loss = log_sums[image] - conf[image].amax(dim=1)",
        "stage 6: the loss as background",
    ),
    Fault(
        "ssd.mining-quality-of-all",
        "ssd.hard_negatives",
        "quality[image, hardest] = mining_loss[hardest]",
        "quality[image] = mining_loss",
        "stage 6: the loss of the chosen",
    ),
    # -------------------------------------------------------------------------------------------------------- loss
    Fault(
        "ssd.loss-l1",
        "ssd.loss",
        "F.smooth_l1_loss(",
        "F.l1_loss(",
        "stage 5: smooth L1",
    ),
    Fault(
        "ssd.loss-beta",
        "ssd.loss",
        "F.smooth_l1_loss(loc[image, positive], loc_target, reduction",
        "F.smooth_l1_loss(loc[image, positive], loc_target, beta=1 / 9, reduction",
        "P5: the beta of another system",
    ),
    Fault(
        "ssd.loss-box-of-negatives",
        "ssd.loss",
        "        positive = mined.gt_index[image] >= 0\n",
        "        positive = mined.gt_index[image] != IGNORED\n",
        "stage 5: positive priors only",
    ),
    Fault(
        "ssd.loss-without-mining",
        "ssd.loss",
        "trained = mined.gt_index[image] != IGNORED",
        "trained = torch.ones_like(positive)",
        "stage 7: positives and chosen negatives only",
    ),
    Fault(
        "ssd.loss-of-positives",
        "ssd.loss",
        "trained = mined.gt_index[image] != IGNORED",
        "trained = positive",
        "stage 7: negatives too",
    ),
    Fault(
        "ssd.loss-positives-twice",
        "ssd.loss",
        "classification = classification + class_loss",
        "twice = positive & ((neg_pos + 1) * positive.sum() > len(positive))\n"
        '        class_loss = class_loss + F.cross_entropy(conf[image, twice], matched.extra["class_target"]'
        '[image, twice], reduction="sum")\n'
        "        classification = classification + class_loss",
        "T14: a prior both positive and negative counts once",
    ),
    Fault(
        "ssd.loss-mean-over-images",
        "ssd.loss",
        "positives = int(matched.positive.sum())",
        "positives = int(matched.positive.sum()) / len(loc)",
        "R4: a local normaliser for the global one",
    ),
    Fault(
        "ssd.loss-normalised-by-trained",
        "ssd.loss",
        "classification = classification / positives",
        "classification = classification / (mined.gt_index != IGNORED).sum()",
        "stage 8: both parts by the positives",
    ),
    Fault(
        "ssd.loss-at-least-one",
        "ssd.loss",
        "positives = int(matched.positive.sum())",
        "positives = max(int(matched.positive.sum()), 1)",
        "S3: without positives both parts are 0 / 0",
    ),
    Fault(
        "ssd.loss-box-detached",
        "ssd.loss",
        "loc[image, positive], loc_target",
        "loc[image, positive].detach(), loc_target",
        "A4: no gradient to the offsets",
    ),
    Fault(
        "ssd.loss-class-detached",
        "ssd.loss",
        "F.cross_entropy(conf[image, trained], class_target",
        "F.cross_entropy(conf[image, trained].detach(), class_target",
        "A4: no gradient to the class logits",
    ),
    Fault(
        "ssd.loss-threshold-fixed",
        "ssd.loss",
        "threshold=threshold, variances=variances)\n    mined",
        "variances=variances)\n    mined",
        "stage 3: the threshold that was asked for",
    ),
    Fault(
        "ssd.loss-variances-fixed",
        "ssd.loss",
        "threshold=threshold, variances=variances)\n    mined",
        "threshold=threshold)\n    mined",
        "stage 4: the variances that were asked for",
    ),
    Fault(
        "ssd.loss-ratio-fixed",
        "ssd.loss",
        "matched.gt_index, gt_labels, neg_pos=neg_pos)",
        "matched.gt_index, gt_labels)",
        "stage 6: the ratio that was asked for",
    ),
)
