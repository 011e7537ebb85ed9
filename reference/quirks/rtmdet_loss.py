"""Quirks of RTMDet's loss and head that the oracle keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import rtmdet_head, rtmdet_loss
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["LOSS_QUIRKS", "SIDE", "behaviour_of", "ground_truths"]

SIDE = 8
"""Cells of the only level, of stride 8, along a side."""


def ground_truths(gts: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    """Ground truths of one image, of class 0 unless labelled, as arguments.

    Examples
    --------
    >>> ground_truths([[0.0, 0.0, 8.0, 8.0]])["gt_labels"].tolist()
    [[0]]
    """
    return {
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_labels": torch.tensor([labels or [0] * len(gts)], dtype=torch.int64),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
    }


def _training(gts: list[list[float]], labels: list[int] | None = None, *, images: int = 1) -> dict[str, Any]:
    """Arguments of `loss`: 64 px images of the same ground truths, two classes, all predictions squares of 16 px."""
    given = {name: t.expand(images, *t.shape[1:]).clone() for name, t in ground_truths(gts, labels).items()}
    return {
        "class_logits": [torch.zeros(images, 2, SIDE, SIDE)],
        "distances": [torch.full((images, 4, SIDE, SIDE), 8.0)],
        "strides": [8],
        **given,
    }


def behaviour_of(call: Callable[..., object], arguments: dict[str, Any]) -> str:
    """Name of the behaviour that a call raises; empty if it raises none.

    Examples
    --------
    >>> behaviour_of(rtmdet_loss.qfl, _summed())
    'rtmdet.sum-with-average-factor'
    """
    try:
        call(**arguments)
    except UpstreamRaises as error:
        return error.behaviour
    return ""


def _nan_logits() -> dict[str, Any]:
    """Two candidates, of which the ground truth claims one; the logits of the first are NaN."""
    given = _training([[17.0, 17.0, 39.0, 31.0]])
    given["class_logits"][0][0, :, 3, 3] = math.nan
    return given


def _bordered() -> dict[str, Any]:
    """An image of 24 px in a batch of 64 px, without a border; the ground truth lies beyond the image."""
    given = _training([[33.0, 33.0, 47.0, 47.0]])
    return {**given, "image_shapes": torch.tensor([[24, 24]]), "allowed_border": 0}


def _no_valid_prior() -> dict[str, Any]:
    return {**_training([[17.0, 17.0, 31.0, 31.0]]), "pad_shapes": torch.tensor([[0, 64]])}


def _one_without_valid_prior() -> dict[str, Any]:
    given = _training([[17.0, 17.0, 31.0, 31.0]], images=2)
    return {**given, "pad_shapes": torch.tensor([[64, 64], [0, 64]])}


def _half() -> dict[str, Any]:
    given = _training([[17.0, 17.0, 31.0, 31.0]])
    return {**given, "class_logits": [given["class_logits"][0].half()], "distances": [given["distances"][0].half()]}


def _oblong_strides() -> dict[str, Any]:
    return {**_training([[17.0, 17.0, 31.0, 31.0]]), "strides": [(8, 16)]}


def _ignored() -> dict[str, Any]:
    return {**_training([[17.0, 17.0, 31.0, 31.0]]), "ignored_boxes": torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])}


def _nan_background() -> dict[str, Any]:
    given = _training([])
    given["distances"][0][0, 0, 0, 0] = math.nan
    return given


def _poor_match() -> dict[str, Any]:
    """One positive of IoU 1/16."""
    given = _training([[17.0, 17.0, 31.0, 31.0]])
    given["distances"] = [torch.full((1, 4, SIDE, SIDE), 28.0)]
    return given


def _negative_weights() -> dict[str, Any]:
    boxes = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    return {"predicted": boxes, "target": boxes, "weight": torch.tensor([-1.0])}


def _summed() -> dict[str, Any]:
    logits, quality = torch.zeros(2, 2), torch.zeros(2, 2)
    return {"predicted": logits, "quality": quality, "reduction": "sum", "average_factor": 3.0}


def _averaged_by_nothing() -> dict[str, Any]:
    return {"predicted": torch.zeros(2, 2), "quality": torch.zeros(2, 2), "average_factor": 0.0}


def _weighted_by_class() -> dict[str, Any]:
    return {"predicted": torch.zeros(3, 2), "quality": torch.zeros(3, 2), "weight": torch.ones(3, 2)}


def _improbable() -> dict[str, Any]:
    return {"predicted": torch.tensor([[1.5]]), "quality": torch.tensor([[1.0]]), "activated": True}


def _sure() -> dict[str, Tensor]:
    return {"class_logits": torch.tensor([20.0, -20.0]), "objectness_logits": torch.tensor([20.0, -20.0])}


def _nan_logits_reach_the_class_loss_only() -> bool:
    parts = rtmdet_loss.loss(**_nan_logits())
    return bool(parts["classification"].isnan().all()) and bool((parts["box"] > 0).all())


def _border_keeps_everyone() -> bool:
    arguments = _bordered()
    without = {**arguments, "allowed_border": -1}
    return bool(rtmdet_loss.loss(**arguments)["box"] > 0) and torch.equal(
        rtmdet_loss.loss(**arguments)["total"], rtmdet_loss.loss(**without)["total"]
    )


def _poor_match_is_not_averaged() -> bool:
    given = _poor_match()
    box, metric = rtmdet_loss.loss(**given)["box"], 1 / 16
    return bool((box < 2 * metric).all())


def _no_gradient_beyond() -> bool:
    given = {name: tensor.clone().requires_grad_() for name, tensor in _sure().items()}
    logits = rtmdet_head.joint_logits(**given)
    gradients = torch.autograd.grad(logits.sum(), list(given.values()))
    return bool((logits.abs() < 11.513).all()) and all(bool((g.abs() < 1e-8).all()) for g in gradients)


LOSS_QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "rtmdet.nan-logits",
        "rtmdet.loss",
        "A NaN logit makes the class loss NaN, though the assignment passes over it while other candidates remain.",
        "Does not look for it.",
        "Raise a named error for non-finite predictions.",
        ("N9",),
        _nan_logits,
        _nan_logits_reach_the_class_loss_only,
    ),
    Quirk(
        "rtmdet.border-compares-strides",
        "rtmdet.loss",
        "An allowed border of 0 or more lets priors beyond the right and bottom of the image take part.",
        "The test is made for corners of anchor boxes, and finds the strides in the place of the second corner.",
        "Compare the point with all four sides.",
        (),
        _bordered,
        _border_keeps_everyone,
    ),
    Quirk(
        "rtmdet.no-valid-prior",
        "rtmdet.loss",
        "A batch in which no image has a valid prior cannot be trained.",
        "Returns a tuple of the wrong length to a caller that unpacks it: 'too many values to unpack'.",
        "A named error, or a loss of background.",
        ("S11",),
        _no_valid_prior,
        lambda: behaviour_of(rtmdet_loss.loss, _no_valid_prior()) == "rtmdet.no-valid-prior",
    ),
    Quirk(
        "rtmdet.no-valid-prior-in-one-image",
        "rtmdet.loss",
        "One image without a valid prior fails the whole batch.",
        "Returns None to a caller that unpacks it: 'cannot unpack non-iterable NoneType object'.",
        "A named error, or a loss without that image.",
        ("S11",),
        _one_without_valid_prior,
        lambda: behaviour_of(rtmdet_loss.loss, _one_without_valid_prior()) == "rtmdet.no-valid-prior-in-one-image",
    ),
    Quirk(
        "rtmdet.quality-dtype",
        "rtmdet.loss",
        "Half-precision predictions cannot be trained, except under autocast.",
        "Writes the positives' losses, in the float32 of the matched IoU, into a tensor of the logits' dtype.",
        "Compute the loss in float32.",
        ("D7",),
        _half,
        lambda: behaviour_of(rtmdet_loss.loss, _half()) == "rtmdet.quality-dtype",
    ),
    Quirk(
        "rtmdet.unequal-strides",
        "rtmdet.loss",
        "Strides must be the same along x and y, though the priors have both.",
        "Asserts it, and measures distances in strides along x.",
        "None.",
        (),
        _oblong_strides,
        lambda: behaviour_of(rtmdet_loss.loss, _oblong_strides()) == "rtmdet.unequal-strides",
    ),
    Quirk(
        "rtmdet.ignored-never-read",
        "rtmdet.loss",
        "Regions to be ignored change nothing.",
        "Accepts them, and trains the priors in them as background.",
        "Give those priors the weight 0, or refuse the argument.",
        ("C13",),
        _ignored,
        lambda: torch.equal(
            rtmdet_loss.loss(**_ignored())["total"],
            rtmdet_loss.loss(**{**_ignored(), "ignored_boxes": None})["total"],
        ),
    ),
    Quirk(
        "rtmdet.level-without-positives",
        "rtmdet.loss",
        "A NaN or infinite box makes the loss NaN on a level without positives too.",
        "The box loss is then 0 times the sum of all boxes, so that gradients exist.",
        "A zero that keeps gradients and reads no non-finite box.",
        ("A4", "R5"),
        _nan_background,
        lambda: bool(rtmdet_loss.loss(**_nan_background())["box"].isnan().all()),
    ),
    Quirk(
        "rtmdet.average-factor-at-least-one",
        "rtmdet.loss",
        "Where qualities add up to less than 1, losses are not averages: poor matches train little.",
        "Divides by the mean of the processes' sums of qualities, limited to 1 after the mean.",
        "None.",
        ("R4", "N18"),
        _poor_match,
        _poor_match_is_not_averaged,
    ),
    Quirk(
        "rtmdet.giou-loss-of-no-weight",
        "rtmdet.giou_loss",
        "If no weight is above 0, the loss is the sum of the box coordinates times the weights.",
        "A short cut for weights of 0 that also takes negative ones, and forgets loss weight and average factor.",
        "0 that keeps gradients.",
        ("A3",),
        _negative_weights,
        lambda: float(rtmdet_loss.giou_loss(**_negative_weights())) == -6.0,
    ),
    Quirk(
        "rtmdet.sum-with-average-factor",
        "rtmdet.qfl",
        "An average factor cannot come with the reduction 'sum'.",
        "Raises a ValueError.",
        "None.",
        (),
        _summed,
        lambda: behaviour_of(rtmdet_loss.qfl, _summed()) == "rtmdet.sum-with-average-factor",
    ),
    Quirk(
        "rtmdet.average-factor-plus-eps",
        "rtmdet.qfl",
        "An average factor of 0 gives a large finite loss, and one of 1 divides by a little more than 1.",
        "Adds the float32 machine epsilon, 1.19e-7, to the average factor.",
        "None.",
        (),
        _averaged_by_nothing,
        lambda: bool(torch.isfinite(rtmdet_loss.qfl(**_averaged_by_nothing()))),
    ),
    Quirk(
        "rtmdet.weight-shape",
        "rtmdet.qfl",
        "The class loss takes no weight a class.",
        "The loss is summed over the classes before it is multiplied: weights of the logits' shape do not broadcast.",
        "A named error.",
        (),
        _weighted_by_class,
        lambda: behaviour_of(rtmdet_loss.qfl, _weighted_by_class()) == "rtmdet.weight-shape",
    ),
    Quirk(
        "rtmdet.probability-out-of-range",
        "rtmdet.qfl",
        "Activated predictions must be probabilities.",
        "Binary cross entropy raises on a CPU; on a GPU a device assertion ends the process.",
        "A named error.",
        ("N9",),
        _improbable,
        lambda: behaviour_of(rtmdet_loss.qfl, _improbable()) == "rtmdet.probability-out-of-range",
    ),
    Quirk(
        "rtmdet.objectness-saturates",
        "rtmdet.joint_logits",
        "With objectness, class logits end at +-11.5129, and beyond there is next to no gradient.",
        "Limits the probability and its complement to 1e-5.",
        "Work in logits throughout.",
        (),
        _sure,
        _no_gradient_beyond,
    ),
)
