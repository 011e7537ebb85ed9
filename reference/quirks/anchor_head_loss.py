"""Quirks of the anchor head's losses that the oracle keeps."""

from __future__ import annotations

import math
from typing import Any

import torch

from detoracle.reference import anchor_head_box_terms, anchor_head_loss, anchor_head_ssd, anchor_head_terms
from detoracle.reference.quirks.anchor_head_boxes import behaviour_of
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["LOSS_QUIRKS"]


def _heads(
    gts: list[list[float]], labels: list[int], *, scores: int = 2, images: int = 1, **settings: Any
) -> dict[str, Any]:
    """Arguments of the losses for images of 2 x 2 cells of 8 pixels, one anchor a cell, all predictions 0."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [8.0, 0, 16, 8], [0.0, 8, 8, 16], [8.0, 8, 16, 16]])
    shapes = torch.tensor([[16, 16]] * images)
    boxes = torch.tensor([gts]).reshape(1, -1, 4)
    valid = torch.ones(images, len(gts), dtype=torch.bool)
    valid[1:] = False
    return {
        "cls_scores": [torch.zeros(images, scores, 2, 2)],
        "bbox_preds": [torch.zeros(images, 4, 2, 2)],
        "anchors": anchors,
        "gt_boxes": boxes.expand(images, -1, 4).clone(),
        "gt_labels": torch.tensor([labels] * images, dtype=torch.int64),
        "gt_valid": valid,
        "image_shapes": shapes,
        "pad_shapes": shapes,
        "strides": [8],
        **settings,
    }


def _loss(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return anchor_head_loss.loss(**arguments)


def _total(arguments: dict[str, Any]) -> float:
    return float(_loss(arguments)["total"])


def _tiny_image() -> dict[str, Any]:
    arguments = _heads([[0.0, 0, 8, 8]], [0], images=2, allowed_border=0.0)
    arguments["image_shapes"] = torch.tensor([[17, 17], [4, 4]])
    return arguments


def _sampled_focal() -> dict[str, Any]:
    return _heads([[0.0, 0, 8, 8]], [0], sampler="random", num=2)


def _explicit_pseudo() -> dict[str, Any]:
    return _heads([[0.0, 0, 8, 8]], [0], sampler="pseudo", class_loss="sigmoid_cross_entropy")


def _all_ignored() -> dict[str, Any]:
    covering, one = torch.tensor([[[0.0, 0, 16, 16]]]), torch.ones(1, 1, dtype=torch.bool)
    return _heads([[0.0, 0, 8, 8]], [0], ignore_iof_thr=0.5, ignore_boxes=covering, ignore_valid=one)


def _background_class() -> dict[str, Any]:
    return _heads([[1.0, 0, 8, 8]], [2])


def _too_large(class_loss: str, scores: int = 2) -> dict[str, Any]:
    return _heads([[0.0, 0, 8, 8]], [3], scores=scores, class_loss=class_loss)


def _negative(class_loss: str) -> dict[str, Any]:
    return _heads([[0.0, 0, 8, 8]], [-1], class_loss=class_loss)


def _large_sigmoid() -> dict[str, Any]:
    return _too_large("sigmoid_cross_entropy")


def _large_focal() -> dict[str, Any]:
    return _too_large("focal")


def _large_softmax() -> dict[str, Any]:
    return _too_large("cross_entropy", scores=3)


def _negative_sigmoid() -> dict[str, Any]:
    return _negative("sigmoid_cross_entropy")


def _negative_softmax() -> dict[str, Any]:
    return _negative("cross_entropy")


def _ignored_label() -> dict[str, Any]:
    return _heads([[0.0, 0, 8, 8]], [-100], scores=3, class_loss="cross_entropy")


def _nan_of_background() -> dict[str, Any]:
    arguments = _heads([[0.0, 0, 8, 8]], [0])
    arguments["bbox_preds"][0][..., 1, 1] = math.nan
    return arguments


def _nan_loss_has_gradient() -> bool:
    arguments = _nan_of_background()
    leaves = [level.requires_grad_() for level in arguments["bbox_preds"]]
    loss = _loss(arguments)["box"].sum()
    [gradient] = torch.autograd.grad(loss, leaves)
    return bool(loss.isnan()) and bool(gradient.nan_to_num(nan=0.0)[..., 0, 0].isfinite().all())


def _line() -> dict[str, Any]:
    return _heads([[2.0, 0, 2, 8]], [0])


def _encoded_giou() -> dict[str, Any]:
    # As corners, the deltas are an inverted box of positive area, and those of the anchor itself are a point.
    arguments = _heads([[0.0, 0, 8, 8]], [0], box_loss="giou")
    arguments["bbox_preds"][0][:] = torch.tensor([0.05, 0.05, -0.05, -0.05])[None, :, None, None]
    return arguments


def _class_weighted() -> dict[str, Any]:
    return {"logits": torch.zeros(1, 2), "labels": torch.tensor([0]), "class_weight": [3.0, 5.0], "reduction": "none"}


def _no_positive() -> dict[str, Any]:
    return _heads([[0.0, 0, 4, 4]], [0], scores=2, min_pos_iou=0.3)


def _few_background() -> dict[str, Any]:
    return _heads([[0.0, 0, 8, 8], [8.0, 0, 16, 8]], [0, 0], scores=2, min_pos_iou=0.3)


def _box_term(**settings: Any) -> dict[str, Any]:
    boxes = torch.tensor([[1.0, 2, 3, 4], [0.0, 0, 2, 2]])
    return {"predicted": boxes, "target": boxes + 1, **settings}


def _negative_weights() -> dict[str, Any]:
    return _box_term(weight=-torch.ones(2))


def _zero_average() -> dict[str, Any]:
    return _box_term(avg_factor=0.0)


def _sum_with_average() -> dict[str, Any]:
    return _box_term(reduction="sum", avg_factor=2.0)


def _no_rows() -> dict[str, Any]:
    return {"predicted": torch.zeros(0, 4), "target": torch.zeros(0, 4), "reduction": "none"}


LOSS_QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "anchor_head.no-anchor-inside",
        "anchor_head.loss",
        "One image without an anchor inside leaves the whole batch without a loss.",
        "2.x returns None, which its callers do not expect; 3.x raises ValueError.",
        "Train the image as background, or a named error.",
        ("S11",),
        _tiny_image,
        lambda: behaviour_of(anchor_head_loss.loss, _tiny_image()) == "anchor_head.no-anchor-inside",
    ),
    Quirk(
        "anchor_head.focal-does-not-sample",
        "anchor_head.loss",
        "With the focal loss, a sampler does nothing.",
        "2.x switches it off with a warning, and divides by positives alone; 3.x samples, and divides by all sampled.",
        "Refuse the configuration.",
        (),
        _sampled_focal,
        lambda: _total(_sampled_focal()) == _total(_heads([[0.0, 0, 8, 8]], [0])),
    ),
    Quirk(
        "anchor_head.pseudo-sampler-counts-positives",
        "anchor_head.loss",
        "With the pseudo sampler, the losses are divided by the positives, though background trains the class too.",
        "Only a sampler that draws counts its background.",
        "None: the published losses are divided by it.",
        (),
        _explicit_pseudo,
        lambda: math.isclose(_total(_explicit_pseudo()), 8 * math.log(2), rel_tol=2**-20),
    ),
    Quirk(
        "anchor_head.all-ignored-costs-nothing",
        "anchor_head.loss",
        "An image that an ignored region covers costs exactly 0.",
        "All weights are 0, and the count of positives is 1.",
        "None.",
        ("C13",),
        _all_ignored,
        lambda: _total(_all_ignored()) == 0.0,
    ),
    Quirk(
        "anchor_head.background-label",
        "anchor_head.loss",
        "A ground truth whose class is C trains its anchors' boxes, and their class as background.",
        "C is the label of background: class indices start at 0, not at 1.",
        "A named error that gives the label.",
        ("L1", "L3"),
        _background_class,
        lambda: (
            float(_loss(_background_class())["box"].sum()) > 0
            and torch.equal(
                _loss(_background_class())["classification"], _loss(_heads([], [], pos_iou_thr=2.0))["classification"]
            )
        ),
    ),
    Quirk(
        "anchor_head.label-above-background-raises",
        "anchor_head.loss",
        "With the focal loss, a class above C cannot be trained.",
        "One-hot encoding raises on a CPU; on a GPU a device assertion ends the process.",
        "A named error that gives the label.",
        ("L1",),
        _large_focal,
        lambda: behaviour_of(anchor_head_loss.loss, _large_focal()) == "anchor_head.label-out-of-range",
    ),
    Quirk(
        "anchor_head.softmax-label-above-background-raises",
        "anchor_head.loss",
        "With softmax, a class above C cannot be trained.",
        "Cross entropy raises: the target is out of bounds.",
        "A named error that gives the label.",
        ("L1",),
        _large_softmax,
        lambda: behaviour_of(anchor_head_loss.loss, _large_softmax()) == "anchor_head.label-out-of-range",
    ),
    Quirk(
        "anchor_head.sigmoid-label-above-background",
        "anchor_head.loss",
        "With the sigmoid cross entropy, a class above C trains as background, silently.",
        "No column is marked.",
        "A named error that gives the label.",
        ("L1",),
        _large_sigmoid,
        lambda: math.isclose(_total(_large_sigmoid()), 8 * math.log(2), rel_tol=2**-20),
    ),
    Quirk(
        "anchor_head.sigmoid-negative-label",
        "anchor_head.loss",
        "With the sigmoid cross entropy, an anchor of class -1 does not train the class, silently.",
        "Masks rows of negative labels.",
        "A named error that gives the label.",
        ("L2",),
        _negative_sigmoid,
        lambda: math.isclose(_total(_negative_sigmoid()), 6 * math.log(2), rel_tol=2**-20),
    ),
    Quirk(
        "anchor_head.softmax-negative-label-raises",
        "anchor_head.loss",
        "With softmax, a class of -1 cannot be trained.",
        "Cross entropy raises: the target is out of bounds.",
        "A named error that gives the label.",
        ("L2",),
        _negative_softmax,
        lambda: behaviour_of(anchor_head_loss.loss, _negative_softmax()) == "anchor_head.label-out-of-range",
    ),
    Quirk(
        "anchor_head.softmax-ignored-label",
        "anchor_head.loss",
        "With softmax, an anchor of class -100 does not train the class, silently.",
        "-100 is the cross entropy's ignored index.",
        "A named error that gives the label.",
        ("L2",),
        _ignored_label,
        lambda: math.isclose(_total(_ignored_label()), 3 * math.log(3), rel_tol=2**-20),
    ),
    Quirk(
        "anchor_head.nan-of-background",
        "anchor_head.loss",
        "A NaN delta of a background anchor makes the loss NaN, while the gradients of positives stay finite.",
        "Multiplies its loss by a weight of 0, and NaN times 0 is NaN.",
        "Leave out what has no weight, or a named error.",
        ("N9",),
        _nan_of_background,
        _nan_loss_has_gradient,
    ),
    Quirk(
        "anchor_head.degenerate-gt-costs-infinity",
        "anchor_head.loss",
        "A matched ground truth with a side of 0 makes the box loss infinite.",
        "Its target is the logarithm of 0.",
        "Drop boxes without area before training.",
        ("N3", "N13"),
        _line,
        lambda: _total(_line()) == math.inf,
    ),
    Quirk(
        "anchor_head.giou-of-deltas",
        "anchor_head.loss",
        "GIoU of deltas that were not decoded gives losses of minus thousands.",
        "Takes deltas for corners when reg_decoded_bbox is off, and does not notice.",
        "Refuse the configuration.",
        (),
        _encoded_giou,
        lambda: _total(_encoded_giou()) < -1000 and _total({**_encoded_giou(), "reg_decoded_bbox": True}) > 0,
    ),
    Quirk(
        "anchor_head.class-weight-of-presence",
        "anchor_head.sigmoid_cross_entropy",
        "With sigmoids, a class weight weighs the class only where it is present.",
        "Passes it on as the weight of positives.",
        "None: the same setting means another thing with softmax.",
        (),
        _class_weighted,
        lambda: (
            [round(v / math.log(2)) for v in anchor_head_terms.sigmoid_cross_entropy(**_class_weighted()).tolist()[0]]
            == [3, 1]
        ),
    ),
    Quirk(
        "anchor_head.ssd-nothing-mined",
        "anchor_head.ssd_loss",
        "An image without positives costs exactly 0: its background does not train at all.",
        "Mines three background anchors for each positive.",
        "None: the published losses do so.",
        ("S3",),
        _no_positive,
        lambda: float(anchor_head_ssd.ssd_loss(**_no_positive())["total"]) == 0.0,
    ),
    Quirk(
        "anchor_head.ssd-runs-out-of-background",
        "anchor_head.ssd_loss",
        "Where there are fewer background anchors than three for each positive, all of them train, once.",
        "Takes the smaller number.",
        "None.",
        ("T14",),
        _few_background,
        lambda: math.isclose(
            float(anchor_head_ssd.ssd_loss(**_few_background())["total"]), 2 * math.log(2), rel_tol=2**-20
        ),
    ),
    Quirk(
        "anchor_head.giou-without-positive-weight",
        "anchor_head.giou_loss",
        "Where no weight is positive, the sum of the boxes' weighted coordinates stands in for the loss.",
        "A short cut for weights of 0, which is nonsense for negative ones.",
        "0 for weights of 0, the weighted loss otherwise.",
        ("A3",),
        _negative_weights,
        lambda: float(anchor_head_box_terms.giou_loss(**_negative_weights())) == -14.0,
    ),
    Quirk(
        "anchor_head.average-of-nothing",
        "anchor_head.l1_loss",
        "An average factor of 0 multiplies the loss by eight million.",
        "Divides by the factor plus 1.19e-7.",
        "Divide by at least 1.",
        ("N18",),
        _zero_average,
        lambda: float(anchor_head_box_terms.l1_loss(**_zero_average())) == 8 * 2**23,
    ),
    Quirk(
        "anchor_head.sum-with-average-factor",
        "anchor_head.l1_loss",
        "A sum cannot be averaged.",
        "Raises ValueError.",
        "The same named error.",
        (),
        _sum_with_average,
        lambda: (
            behaviour_of(anchor_head_box_terms.l1_loss, _sum_with_average()) == "anchor_head.sum-with-average-factor"
        ),
    ),
    Quirk(
        "anchor_head.no-rows-are-reduced",
        "anchor_head.l1_loss",
        "Without rows, an unreduced loss is a scalar.",
        "Returns the sum of nothing whatever the reduction.",
        "An empty tensor.",
        (),
        _no_rows,
        lambda: anchor_head_box_terms.l1_loss(**_no_rows()).shape == (),
    ),
)
