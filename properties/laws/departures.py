"""Where the five systems depart from a law, and why: quirks that every faithful implementation shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor

from detoracle.properties.laws.law import Question
from detoracle.reference import anchor_head_loss, ssd, yolov8, yolox
from detoracle.reference.anchor_head_loss import Batch
from detoracle.reference.boxes import cxcywh_to_xyxy, overlaps_mmdet

__all__ = ["DEPARTURES", "Departure"]


@dataclass(frozen=True)
class Departure:
    """A law that operations do not obey.

    Attributes
    ----------
    laws, operations : tuple of str
    reason : str
        Why not.
    scene : str
        The edge case that shows it.
    where : callable or None
        For which arguments; None for all.
    outputs : tuple of str
        For which outputs; empty for all.
    """

    laws: tuple[str, ...]
    operations: tuple[str, ...]
    reason: str
    scene: str
    where: Callable[[Question], bool] | None = None
    outputs: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Does nothing of the law hold?"""
        return self.where is None and not self.outputs


def _official(question: Question) -> bool:
    return bool(question.arguments.get("flavour", "tutorial") == "official")


def _row_not_counted(question: Question) -> bool:
    """Is there a row whose sum, if only without its label, is not positive?"""
    boxes, labels, valid = (question.arguments[name] for name in ("gt_boxes", "gt_labels", "gt_valid"))
    counted = yolox.counted_ground_truths(boxes, labels, valid, flavour="official")
    return _official(question) and bool((counted != valid).any() or (valid & (boxes.sum(-1) <= 0)).any())


def _negative_label(question: Question) -> bool:
    return bool((question.arguments["gt_labels"] < 0).any())


def _draws(question: Question) -> bool:
    usual = "random" if question.operation.name == "anchor_head.sample" else "pseudo"
    focal = question.arguments.get("class_loss") == "focal"
    return question.arguments.get("sampler", usual) == "random" and not focal


def _shared_best_prior(question: Question) -> bool:
    priors = cxcywh_to_xyxy(question.arguments["priors"])
    for boxes, valid in zip(question.arguments["gt_boxes"], question.arguments["gt_valid"], strict=True):
        best = ssd.jaccard(boxes[valid], priors).argmax(1)
        if len(set(best.tolist())) < len(best):
            return True
    return False


def _shared_best_anchor(question: Question) -> bool:
    """Do several ground truths claim the same anchor, or tie for one? Where regions are ignored, who knows."""
    if question.arguments.get("ignore_boxes") is not None:
        return True
    anchors, taking_part = question.arguments["anchors"], _taking_part(question)
    return any(
        _several_claim(*image, anchors[inside]) for image, inside in zip(_images(question), taking_part, strict=True)
    )


def _taking_part(question: Question) -> Tensor:
    """Anchors (B, A) that take part, by the assignment's argument or the loss's."""
    given = question.arguments
    if "inside" in given:
        inside: Tensor = given["inside"]
        return inside
    batch = Batch(*(given[name] for name in ("cls_scores", "bbox_preds", "anchors", "gt_boxes", "gt_labels")))
    border = given.get("allowed_border", -1.0)
    return anchor_head_loss._taking_part(batch, given["image_shapes"], given["pad_shapes"], given["strides"], border)


def _images(question: Question) -> list[tuple[Tensor, Tensor]]:
    return list(zip(question.arguments["gt_boxes"], question.arguments["gt_valid"], strict=True))


def _several_claim(boxes: Tensor, valid: Tensor, anchors: Tensor) -> bool:
    if not valid.any() or not len(anchors):
        return False
    overlap = overlaps_mmdet(boxes[valid], anchors)
    claims = (overlap == overlap.amax(1, keepdim=True)).sum(0)
    ties = (overlap == overlap.amax(0)).sum(0) > 1
    return bool((claims > 1).any() or (ties & (overlap.amax(0) > 0)).any())


def _contested_without_overlap(question: Question) -> bool:
    """Is an anchor inside several ground truths, and overlaps none?"""
    given = {
        name: question.arguments[name] for name in signature(yolov8.align).parameters if name in question.arguments
    }
    _, overlap, inside = yolov8.align(**given)
    inside &= given["gt_valid"][..., None]
    return bool(((inside.sum(1) > 1) & ~((overlap > 0) & inside).any(1)).any())


def _background_label(question: Question) -> bool:
    return bool((question.arguments["gt_labels"] < 0)[question.arguments["gt_valid"]].any())


def _far_below(question: Question) -> bool:
    """Does a row vanish beside the largest logit of the batch?"""
    conf: Tensor = question.arguments["conf"]
    return not bool(((conf.amax(-1) - conf.max()).exp() >= torch.finfo(conf.dtype).tiny).all())


def _nan_class(question: Question) -> bool:
    return bool(question.arguments["conf"].isnan().any())


def _no_weight(question: Question) -> bool:
    weight = question.arguments.get("weight")
    return weight is not None and not bool((weight > 0).any())


def _large_epsilon(question: Question) -> bool:
    return bool(question.arguments.get("eps", 0) > _USUAL_EPSILON)


def _epsilon_tells(question: Question) -> bool:
    """Is the epsilon more than a rounding of some side? A side of zero is nothing else."""
    eps, corners = question.arguments.get("eps", _USUAL_EPSILON), question.arguments.get("form", "xyxy") == "xyxy"
    boxes = [question.arguments[name] for name in ("boxes_a", "boxes_b")]
    sides = [one[..., 2:] - one[..., :2] if corners else one[..., 2:] for one in boxes]
    return any(bool((side.abs() * torch.finfo(side.dtype).eps <= eps).any()) for side in sides)


_USUAL_EPSILON = 1e-7  # vanishes beside the area of any box but a speck

DEPARTURES: tuple[Departure, ...] = (
    Departure(
        ("empty-image",),
        ("anchor_head.loss", "anchor_head.ssd_loss"),
        "an image without a positive adds one to the divisor",
        "single",
    ),
    Departure(
        ("permute-gts", "permute-classes"),
        ("yolox.assign", "yolox.loss"),
        "the official flavour counts the rows with a positive sum, label included, and takes that many from the front",
        "zero-row-first",
        _row_not_counted,
    ),
    Departure(
        ("mirror", "upside-down"),
        ("yolox.assign",),
        "the official flavour counts the rows with a positive sum, which negative coordinates change",
        "inverted-only",
        _official,
    ),
    Departure(
        ("empty-image",),
        ("ssd.match", "ssd.loss"),
        "an image without ground truths raises",
        "single",
    ),
    Departure(
        ("permute-gts",),
        ("ssd.match", "ssd.loss"),
        "of ground truths that share their best prior the last one keeps it",
        "overlapping",
        _shared_best_prior,
    ),
    Departure(
        ("split", "expanded"),
        ("ssd.log_sum_exp", "ssd.hard_negatives", "ssd.loss"),
        "rows far below the largest logit of the whole batch become -inf",
        "ragged-full",
        _far_below,
    ),
    Departure(
        ("split",),
        ("ssd.loss",),
        "alone, an image whose only matches are of class -1 has no positive to divide by",
        "ragged-full",
        _background_label,
    ),
    Departure(
        ("chunked",),
        ("ssd.log_sum_exp",),
        "a NaN anywhere makes the largest logit of the batch NaN",
        "nan-class",
        _nan_class,
    ),
    Departure(
        ("permute-gts",),
        ("anchor_head.assign", "anchor_head.loss", "anchor_head.ssd_loss"),
        "a later ground truth takes the anchors it overlaps most from an earlier one, and of equals the first stays",
        "overlapping",
        _shared_best_anchor,
    ),
    Departure(
        ("permute-images", "permute-anchors", "split", "join", "expanded"),
        ("anchor_head.sample",),
        "the random sampler draws positions for all images in turn",
        "ragged-full",
        _draws,
    ),
    Departure(
        ("permute-gts", "empty-image"),
        ("anchor_head.sample",),
        "ground truths matter to the random sampler alone, which draws their positions too",
        "centre-off-grid",
    ),
    Departure(
        ("permute-images", "split"),
        ("anchor_head.loss",),
        "the random sampler draws positions for all images in turn",
        "empty-one",
        _draws,
    ),
    Departure(
        ("scale",),
        ("anchor_head.giou_loss", "rtmdet.giou_loss"),
        "the epsilon is an absolute area in pixels",
        "no-overlap",
    ),
    Departure(
        ("mirror", "upside-down"),
        ("rtmdet.giou_loss",),
        "without a weight above 0 the loss is the sum of the coordinates times their weights",
        "single",
        _no_weight,
    ),
    Departure(
        ("permute-gts", "padding"),
        ("yolov8.assign",),
        "an unassigned anchor is given the box and class of its image's first row, padding or not",
        "empty-one",
        outputs=("labels", "boxes"),
    ),
    Departure(
        ("permute-gts",),
        ("yolov8.assign",),
        "a contested anchor that overlaps no ground truth goes to the image's first one",
        "no-overlap-elsewhere",
        _contested_without_overlap,
    ),
    Departure(
        ("padding",),
        ("yolov8.align",),
        "which anchors lie inside is told for rows of padding too",
        "centre-off-grid",
        outputs=("in_gt",),
    ),
    Departure(
        ("permute-classes",),
        ("yolov8.align", "yolov8.assign", "yolov8.loss"),
        "a label of -1 reads the last class's score and trains class 0",
        "label-minus-one",
        _negative_label,
    ),
    Departure(
        ("scale",),
        ("boxes.overlaps_mmdet",),
        "the epsilon is an absolute area in pixels: the least union there is",
        "tiny-several",
        _large_epsilon,
    ),
    Departure(
        ("scale", "transpose"),
        ("boxes.iou_ultralytics",),
        "an epsilon that tells is in pixels, and is added to heights, not to widths",
        "single",
        _epsilon_tells,
    ),
)
