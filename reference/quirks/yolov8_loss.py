"""Quirks of YOLOv8's box functions and losses that the oracle keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import yolov8_loss
from detoracle.reference.boxes import iou_ultralytics
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["LOSS_QUIRKS", "behaviour_of"]


def behaviour_of(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Name of what the oracle raises; empty if it returns."""
    try:
        function(**arguments)
    except UpstreamRaises as error:
        return error.behaviour
    return ""


def _wide_box() -> dict[str, Any]:
    return {"anchor_points": torch.tensor([[40.0, 40.0]]), "boxes": torch.tensor([[2.5, 39.0, 77.5, 41.0]])}


def _last_bin() -> dict[str, Any]:
    return {"box_logits": torch.zeros(1, 64), "distances": torch.full((1, 4), 15.0)}


def _pair(first: list[float], second: list[float], form: str = "xyxy") -> dict[str, Any]:
    return {"boxes_a": torch.tensor([first]), "boxes_b": torch.tensor([second]), "form": form, "mode": "ciou"}


def _speck() -> dict[str, Any]:
    return {**_pair([0.0, 0.0, 1.0, 1e-6], [0.0, 0.0, 1.0, 1e-6]), "mode": "iou"}


def _speck_on_its_side() -> dict[str, Any]:
    return {**_pair([0.0, 0.0, 1e-6, 1.0], [0.0, 0.0, 1e-6, 1.0]), "mode": "iou"}


def _points() -> dict[str, Any]:
    return _pair([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], "cxcywh")


def _flat_prediction() -> dict[str, Any]:
    return _pair([5.0, 5.0, 4.0, 0.0], [0.0, 0.0, 10.0, 10.0], "cxcywh")


def _tall_and_wide() -> dict[str, Any]:
    return _pair([0.0, 0.0, 8.0, 2.0], [0.0, 0.0, 2.0, 8.0])


def _ciou_gradient(arguments: dict[str, Any]) -> Tensor:
    leaf = arguments["boxes_a"].clone().requires_grad_()
    gradient: Tensor = torch.autograd.grad(iou_ultralytics(**{**arguments, "boxes_a": leaf}).sum(), leaf)[0]
    return gradient


def _alpha_is_constant() -> bool:
    """Is the gradient of the aspect term alpha times the squared difference that of the difference alone?"""
    arguments = _tall_and_wide()
    leaf = arguments["boxes_a"].double().requires_grad_()
    given = {**arguments, "boxes_a": leaf, "boxes_b": arguments["boxes_b"].double()}
    ciou, diou = iou_ultralytics(**given), iou_ultralytics(**{**given, "mode": "diou"})
    (aspect,) = torch.autograd.grad((diou - ciou).sum(), leaf)
    width, height = leaf.detach()[:, 2:3] - leaf.detach()[:, 0:1], leaf[:, 3:] - leaf[:, 1:2] + 1e-7
    other = torch.atan(torch.tensor(2.0 / (8.0 + 1e-7), dtype=torch.float64))
    shape = 4 / torch.pi**2 * (other - torch.atan(width / height)) ** 2
    alpha = ((diou - ciou) / shape).detach()
    (expected,) = torch.autograd.grad((alpha * shape).sum(), leaf)
    return torch.equal(aspect[:, 3].float(), expected[:, 3].float())


def _loss(
    num_images: int = 1, num_classes: int = 1, size: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of `loss`: all-zero maps of one level, and one ground truth an image."""
    return {
        "raw": [torch.zeros(num_images, 64 + num_classes, size, size, dtype=dtype)],
        "strides": [8],
        "gt_boxes": torch.tensor([[[8.0, 8.0, 24.0, 24.0]]]).repeat(num_images, 1, 1),
        "gt_labels": torch.zeros(num_images, 1, dtype=torch.int64),
        "gt_valid": torch.ones(num_images, 1, dtype=torch.bool),
    }


def _batch_of_two() -> dict[str, Any]:
    return _loss(num_images=2)


def _overflowing() -> dict[str, Any]:
    return _loss(num_classes=100, size=32, dtype=torch.float16)


def _weak() -> dict[str, Any]:
    return _loss()


def _total_over_parts(arguments: dict[str, Any]) -> float:
    parts = yolov8_loss.loss(**arguments)
    return float(parts["total"] / (parts["box"] + parts["cls"] + parts["dfl"]))


LOSS_QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "yolov8.dfl-target-clamped",
        "yolov8.bbox2dist",
        "A true distance beyond the last bin is clamped to R - 1.01, which trains large objects to be cropped.",
        "Clamps silently; the assignment ignores the range of the bins. Other code bases clamp to R - 1.1.",
        "Report how many positives are clamped.",
        ("C7", "C8"),
        _wide_box,
        lambda: [round(d, 4) for d in yolov8_loss.bbox2dist(**_wide_box())[0].tolist()] == [14.99, 1.0, 14.99, 1.0],
    ),
    Quirk(
        "yolov8.dfl-target-out-of-range",
        "yolov8.dfl_loss",
        "A target distance of R-1 or more, or less than 0, cannot be trained.",
        "Indexing the bin to its right (or left) raises; later releases clamp the caller's target in place.",
        "Clamp a copy of the target.",
        ("C8", "C9"),
        _last_bin,
        lambda: behaviour_of(yolov8_loss.dfl_loss, _last_bin()) == "yolov8.dfl-target-out-of-range",
    ),
    Quirk(
        "yolov8.eps-in-heights-only",
        "boxes.iou_ultralytics",
        "The IoU of a speck with itself depends on which way round it lies: 0.909 if 1e-6 wide, 0.769 if 1e-6 high.",
        "The epsilon of 1e-7 is added to xyxy heights, not to widths, and to the union.",
        "None: the published results contain it; it matters below about 1e-5 pixels.",
        ("N5",),
        _speck,
        lambda: (
            round(float(iou_ultralytics(**_speck())), 3) == 0.769
            and round(float(iou_ultralytics(**_speck_on_its_side())), 3) == 0.909
        ),
    ),
    Quirk(
        "yolov8.ciou-of-points-is-nan",
        "boxes.iou_ultralytics",
        "The CIoU of two centre-and-size boxes without size is NaN, and so can be that of identical ones.",
        "The aspect ratio is 0/0; or rounding lifts the IoU above 1 and alpha becomes 0/0. Corner boxes are safe.",
        "A finite value.",
        ("N4",),
        _points,
        lambda: bool(iou_ultralytics(**_points()).isnan()),
    ),
    Quirk(
        "yolov8.flat-box-gradient-is-nan",
        "boxes.iou_ultralytics",
        "A centre-and-size prediction of height 0 has a NaN gradient of CIoU.",
        "The aspect ratio w/h is infinite, and its arc tangent's derivative 0 times infinity.",
        "A finite gradient.",
        ("N6",),
        _flat_prediction,
        lambda: _ciou_gradient(_flat_prediction()).isnan().tolist() == [[False, False, True, True]],
    ),
    Quirk(
        "yolov8.alpha-is-constant",
        "boxes.iou_ultralytics",
        "The weight alpha of the CIoU's aspect term has no gradient: other ports agree in value but not in gradient.",
        "Computes alpha without gradient.",
        "None: the published results depend on it.",
        ("A6",),
        _tall_and_wide,
        _alpha_is_constant,
    ),
    Quirk(
        "yolov8.iou-keeps-a-dimension",
        "boxes.iou_ultralytics",
        "The IoU of N pairs has shape (N, 1): combined with weights of shape (N,) it silently broadcasts to (N, N).",
        "Keeps the last dimension.",
        "None: callers expect it.",
        (),
        _tall_and_wide,
        lambda: iou_ultralytics(**_tall_and_wide()).shape == (1, 1),
    ),
    Quirk(
        "yolov8.total-times-batch-size",
        "yolov8.loss",
        "The total is the sum of its parts times the batch size, although each part is a mean over the batch.",
        "Multiplies the total, not the parts.",
        "None: learning rates are tuned to it.",
        (),
        _batch_of_two,
        lambda: _total_over_parts(_batch_of_two()) == 2.0,
    ),
    Quirk(
        "yolov8.normaliser-at-least-one",
        "yolov8.loss",
        "Where all target scores together are less than 1, the loss is their sum instead of their mean.",
        "Divides by at least 1, which keeps the loss finite without positives.",
        "None: other code bases differ here.",
        ("N18",),
        _weak,
        lambda: (
            round(float(yolov8_loss.loss(**_weak())["cls"]) / 0.5, 3) == round(16 * float(torch.tensor(2.0).log()), 3)
        ),
    ),
    Quirk(
        "yolov8.half-class-sum-overflows",
        "yolov8.loss",
        "In float16 the class loss of 8400 anchors and 80 classes is infinite.",
        "Sums in float16, whose largest number is 65504.",
        "Sum in float32.",
        ("D12",),
        _overflowing,
        lambda: bool(yolov8_loss.loss(**_overflowing())["cls"].isinf()),
    ),
)
