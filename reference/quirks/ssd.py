"""Quirks of SSD that the oracle keeps."""

from __future__ import annotations

import math
from typing import Any

import torch

from detoracle.reference import ssd
from detoracle.reference.boxes import cxcywh_to_xyxy
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["QUIRKS"]

_QUADRANTS = ((0.25, 0.25, 0.5, 0.5), (0.75, 0.25, 0.5, 0.5), (0.25, 0.75, 0.5, 0.5), (0.75, 0.75, 0.5, 0.5))


def _match(gts: list[list[float]], labels: list[int], priors: Any = _QUADRANTS) -> dict[str, Any]:
    """Arguments of `match` for one image, whose priors are its quadrants."""
    return {
        "priors": torch.tensor(priors),
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_labels": torch.tensor([labels], dtype=torch.int64),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
    }


def _loss(gts: list[list[float]], labels: list[int]) -> dict[str, Any]:
    """Arguments of `loss` for one image of quadrants, three classes with the background, all predictions 0."""
    return {"loc": torch.zeros(1, 4, 4), "conf": torch.zeros(1, 4, 3), **_match(gts, labels)}


def _mining(conf: list[list[float]], positive: int = 1, **settings: int) -> dict[str, Any]:
    """Arguments of `hard_negatives` for one image, whose first priors are positive."""
    gt_index = [0] * positive + [-1] * (len(conf) - positive)
    return {
        "conf": torch.tensor([conf]),
        "gt_index": torch.tensor([gt_index]),
        "gt_labels": torch.tensor([[0]]),
        **settings,
    }


def _chosen(arguments: dict[str, Any]) -> list[int]:
    return ssd.hard_negatives(**arguments).gt_index[0].tolist()


def _behaviour(arguments: dict[str, Any]) -> str:
    try:
        ssd.loss(**arguments)
    except UpstreamRaises as error:
        return error.behaviour
    return ""


def _empty() -> dict[str, Any]:
    return _loss([], [])


def _background_label() -> dict[str, Any]:
    return _loss([[0.0, 0.0, 0.5, 0.5]], [-1])


def _bad_label() -> dict[str, Any]:
    return _loss([[0.0, 0.0, 0.5, 0.5]], [2])


def _outside() -> dict[str, Any]:
    return _match([[5.0, 5.0, 6.0, 6.0]], [0])


def _shared_best_prior() -> dict[str, Any]:
    return _match([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]], [0, 1])


def _twins_with_second_best() -> dict[str, Any]:
    priors = ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.625))
    return _match([[0.25, 0.25, 0.75, 0.75]] * 2, [0, 1], priors)


def _line() -> dict[str, Any]:
    return _loss([[0.125, 0.125, 0.125, 0.375]], [0])


def _swapped() -> dict[str, Any]:
    return _loss([[0.375, 0.375, 0.125, 0.125]], [0])


def _points() -> dict[str, Any]:
    return {"boxes_a": torch.full((1, 4), 0.25), "boxes_b": torch.full((1, 4), 0.75)}


def _far_below() -> dict[str, Any]:
    return {"conf": torch.tensor([[[500.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])}


def _hardest_underflows() -> dict[str, Any]:
    return _mining([[300.0, 0.0], [0.0, 50.0], [300.0, 300.0]], neg_pos=1)


def _one_nan() -> dict[str, Any]:
    return _mining([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [math.nan, 0.0]], neg_pos=1)


def _equal_logits() -> dict[str, Any]:
    return _mining([[0.0, 0.0]] * 6)


def _last_underflows() -> dict[str, Any]:
    return _mining([[300.0, 0.0], [300.0, 300.0], [0.0, 0.0]], neg_pos=9)


def _more_positives() -> dict[str, Any]:
    return _loss([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0]], [0, 0, 0])


def _two_images() -> dict[str, Any]:
    one = _mining([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]], neg_pos=1)
    return {n: v if n == "neg_pos" else torch.cat([v, v]) for n, v in one.items()}


def _big_prior() -> dict[str, Any]:
    cell = {"image_size": 100, "feature_maps": [2], "steps": [50]}
    return {**cell, "min_sizes": [90], "max_sizes": [160], "aspect_ratios": [[]]}


def _overflow() -> dict[str, Any]:
    return {"loc": torch.tensor([[[0.0, 0.0, 500.0, 0.0]]]), "priors": torch.tensor([_QUADRANTS[0]])}


def _half() -> dict[str, Any]:
    # Both priors contain the ground truth; float16 cannot tell the overlap with the second, smaller one from the other.
    priors = ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.4998))
    exact = _match([[0.4375, 0.4375, 0.5625, 0.5625]], [0], priors)
    return {n: v.half() if v.is_floating_point() else v for n, v in exact.items()}


def _in_single(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.float() if v.is_floating_point() else v for n, v in arguments.items()}


QUIRKS = (
    Quirk(
        "ssd.no-ground-truth",
        "ssd.loss",
        "An image without ground truth cannot be trained.",
        "Raises 'max(): Expected reduction dim 0 to have non-zero size'.",
        "Train the image as background; it then has no hard negatives either.",
        ("S2",),
        _empty,
        lambda: _behaviour(_empty()) == "ssd.no-ground-truth",
    ),
    Quirk(
        "ssd.no-positive-costs-nan",
        "ssd.loss",
        "A batch whose ground truths all have class -1, the background, costs NaN, with gradients of 0.",
        "Class -1 becomes target 0, so N is 0 and both losses are 0/0.",
        "A loss of 0 that is connected to its inputs.",
        ("S3",),
        _background_label,
        lambda: bool(ssd.loss(**_background_label())["total"].isnan()),
    ),
    Quirk(
        "ssd.label-out-of-range",
        "ssd.loss",
        "A matched class without a logit cannot be trained.",
        "Raises 'index is out of bounds'.",
        "A named error that gives the label.",
        ("L1",),
        _bad_label,
        lambda: _behaviour(_bad_label()) == "ssd.label-out-of-range",
    ),
    Quirk(
        "ssd.unmatched-gt-takes-first-prior",
        "ssd.match",
        "A ground truth that overlaps no prior is forced onto the first prior.",
        "The largest of a row of zeros is its first element; the localisation loss runs into the hundreds.",
        "Leave it unmatched, and say so.",
        ("T11",),
        _outside,
        lambda: ssd.match(**_outside()).gt_index.tolist() == [[0, -1, -1, -1]],
    ),
    Quirk(
        "ssd.last-gt-keeps-shared-prior",
        "ssd.match",
        "Of ground truths that share a best prior, the last one keeps it, and the others may end with none.",
        "A loop over the ground truths writes each into its best prior.",
        "Give the others their next best prior.",
        ("T10",),
        _shared_best_prior,
        lambda: ssd.match(**_shared_best_prior()).gt_index.tolist() == [[1, -1, -1, -1]],
    ),
    Quirk(
        "ssd.first-gt-takes-other-priors",
        "ssd.match",
        "A prior that is nobody's best goes to the first of the ground truths it overlaps equally.",
        "The maximum over ground truths returns the first; so twins share their priors unevenly.",
        "Any of the tied ones.",
        (),
        _twins_with_second_best,
        lambda: ssd.match(**_twins_with_second_best()).gt_index.tolist() == [[1, 0]],
    ),
    Quirk(
        "ssd.zero-side-costs-infinity",
        "ssd.loss",
        "A matched ground truth with a side of 0 makes the loss infinite, though its gradients are finite.",
        "Encodes the logarithm of 0.",
        "Drop boxes without area before training.",
        ("N3",),
        _line,
        lambda: ssd.loss(**_line())["localisation"].item() == math.inf,
    ),
    Quirk(
        "ssd.swapped-corners-cost-nan",
        "ssd.loss",
        "A matched ground truth with swapped corners makes the loss and its gradients NaN.",
        "Encodes the logarithm of a negative number.",
        "Drop such boxes, or swap the corners back, before training.",
        ("N3",),
        _swapped,
        lambda: bool(ssd.loss(**_swapped())["localisation"].isnan()),
    ),
    Quirk(
        "ssd.zero-areas-give-nan",
        "ssd.jaccard",
        "Two boxes without area have overlap NaN, also where they are apart.",
        "Divides 0 by 0: there is no epsilon.",
        "0.",
        (),
        _points,
        lambda: bool(ssd.jaccard(**_points()).isnan().all()),
    ),
    Quirk(
        "ssd.global-maximum-underflow",
        "ssd.log_sum_exp",
        "A row of logits some 104 below the largest logit of the batch (17 in float16) has a log-sum-exp of -inf.",
        "Subtracts one maximum for the whole batch, and takes the logarithm of a sum that has become 0.",
        "Subtract each row's own maximum: 3.4076 in the scene.",
        ("N2",),
        _far_below,
        lambda: ssd.log_sum_exp(**_far_below()).tolist() == [[500.0, -math.inf]],
    ),
    Quirk(
        "ssd.underflown-rows-rank-last",
        "ssd.hard_negatives",
        "The hardest negative is passed over if its logits lie far below the largest logit of the batch.",
        "Its confidence loss is -inf by the underflow; the cross entropy of what is chosen is right all the same.",
        "Rank by the cross entropy itself.",
        ("N2",),
        _hardest_underflows,
        lambda: _chosen(_hardest_underflows()) == [0, -2, -1],
    ),
    Quirk(
        "ssd.nan-logit-spoils-ranking",
        "ssd.hard_negatives",
        "One NaN logit makes all negatives of the batch tie, and the loss of those chosen stays finite.",
        "The maximum of the batch is NaN, and so is every confidence loss; NaN sorts first, in any order.",
        "Report the NaN.",
        (),
        _one_nan,
        lambda: _chosen(_one_nan()) == [0, -1, -2, -2],
    ),
    Quirk(
        "ssd.ranking-ties",
        "ssd.hard_negatives",
        "Equal confidence losses are ranked arbitrarily; the oracle takes the lowest index.",
        "Sorts without promising stability: on a CPU other indices than the lowest were seen.",
        "Any of the tied ones.",
        (),
        _equal_logits,
        lambda: _chosen(_equal_logits()) == [0, -1, -1, -1, -2, -2],
    ),
    Quirk(
        "ssd.at-most-all-but-one-negative",
        "ssd.hard_negatives",
        "The prior ranked last is never a negative, and a positive takes up a place before it.",
        "The number of negatives is capped at the number of priors less one, positives included.",
        "Cap at the number of priors that are not positive.",
        (),
        _last_underflows,
        lambda: _chosen(_last_underflows()) == [0, -1, -2],
    ),
    Quirk(
        "ssd.positive-among-negatives-counts-once",
        "ssd.loss",
        "Where negatives run out, positives are ranked among them, and still count once.",
        "Adds the two masks as booleans; ports that add them as numbers weigh such positives twice.",
        "None: choose the negatives among the other priors only, and the result is the same.",
        ("T14", "T15"),
        _more_positives,
        # Three positives and one negative, each of which costs log 3, over three positives.
        lambda: round(float(ssd.loss(**_more_positives())["classification"]) * 3 / math.log(3)) == 4,
    ),
    Quirk(
        "ssd.masked-after-reshaping",
        "ssd.hard_negatives",
        "Positives are masked once the losses are in rows of images.",
        "As published the two lines are in the other order, which PyTorch now refuses; swapped, they do this.",
        "None.",
        ("S1",),
        _two_images,
        lambda: ssd.hard_negatives(**_two_images()).gt_index.tolist() == [[0, -2, -1]] * 2,
    ),
    Quirk(
        "ssd.clip-keeps-corners-outside",
        "ssd.priors",
        "Clipped priors may still reach out of the image.",
        "Clips the centre and the size to [0, 1], not the corners.",
        "None.",
        (),
        _big_prior,
        lambda: float(cxcywh_to_xyxy(ssd.priors(**_big_prior())).min()) < 0,
    ),
    Quirk(
        "ssd.overflowing-box-is-nan",
        "ssd.decode",
        "A predicted size that overflows gives -inf for one corner and NaN for the other.",
        "Computes the right bottom corner as the left top one plus the size.",
        "Clamp the predicted log size.",
        (),
        _overflow,
        lambda: bool(ssd.decode(**_overflow())[0, 0, 2].isnan()),
    ),
    Quirk(
        "ssd.float16-picks-another-prior",
        "ssd.match",
        "In float16 another prior can be a ground truth's best.",
        "Overlaps are rounded to the dtype of the boxes before they are compared; the loss can change a hundredfold.",
        "Match in float32.",
        (),
        _half,
        lambda: (
            ssd.match(**_half()).gt_index.tolist() == [[0, -1]]
            and ssd.match(**_in_single(_half())).gt_index.tolist() == [[-1, 0]]
        ),
    ),
)
