"""SSD in the suite: native input from a scene, arguments of its operations, and what explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.predictors import predict
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import Canvas, System
from detoracle.reference import boxes, ssd, ssd_boxes
from detoracle.reference.contract import operations_in
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import ssd as explain

__all__ = ["SMALL", "SYSTEM", "native"]

SMALL: dict[str, Any] = {
    "image_size": 64,
    "feature_maps": (8, 4, 2, 1),
    "steps": (8, 16, 32, 64),
    "min_sizes": (10, 22, 36, 50),
    "max_sizes": (22, 36, 50, 64),
    "aspect_ratios": ((2,), (2, 3), (2,), (2,)),
}
"""Prior boxes of small scenes: 372 instead of 8732."""

_LARGE = 300  # from this image side on, the priors of SSD300
_FAR_APART = 150.0  # logits so far below the largest of the batch vanish from the ranking of negatives
_OTHER_VARIANCES = (0.25, 0.125)
_SMALL = 0.0625  # overlaps are ratios: they stay as they are, but for what is added to an area or limits it


def native(scene: Scene) -> dict[str, Any]:
    """Turn a scene into SSD predictions and ground truths in units of the image's sides.

    Parameters
    ----------
    scene : Scene

    Returns
    -------
    dict
        loc, conf, priors, gt_boxes, gt_labels, gt_valid: the arguments of `ssd.loss`; and settings, those of
        `ssd.priors`.

    Examples
    --------
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> tuple(native(edge_cases()[0])["priors"].shape)
    (372, 4)
    """
    gt_boxes, gt_labels, gt_valid = scene.padded()
    height, width = scene.image_size
    pixels = gt_boxes.new_tensor([width, height, width, height])
    settings = ssd.VOC_SSD300 if min(height, width) >= _LARGE else SMALL
    priors = ssd.priors(**settings)
    in_pixels = priors * pixels
    predicted = predict(scene, in_pixels[:, :2].contiguous(), in_pixels[:, 2:].amin(1) / 2)
    loc = torch.stack([ssd.encode(image / pixels, priors) for image in predicted.boxes])
    background = torch.zeros_like(predicted.objectness_logits)[..., None]
    return {
        "loc": loc,
        "conf": torch.cat([background, predicted.class_logits], dim=-1),
        "priors": priors,
        "gt_boxes": gt_boxes / pixels,
        "gt_labels": gt_labels,
        "gt_valid": gt_valid,
        "settings": settings,
    }


def _arguments(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    priors, conf, loc = given["priors"], given["conf"], given["loc"]
    ground_truths = {name: given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    if operation == "ssd.priors":
        for clip in (True, False):
            yield f"clip {clip}", {**given["settings"], "clip": clip, "like": loc.new_zeros(())}
    elif operation == "ssd.log_sum_exp":
        yield "", {"conf": conf}
        yield "logits far apart", {"conf": _far_apart(conf)}
    elif operation == "ssd.decode":
        yield "", {"loc": loc, "priors": priors}
        yield "other variances", {"loc": loc, "priors": priors, "variances": _OTHER_VARIANCES}
    elif operation in ("ssd.jaccard", "ssd.encode"):
        yield from _box_arguments(operation, priors, ground_truths)
    elif operation == "ssd.match":
        yield "threshold 0.5", {"priors": priors, **ground_truths, "threshold": 0.5}
        other = {"threshold": 0.35, "variances": _OTHER_VARIANCES}
        yield "threshold 0.35, other variances, padding first", {"priors": priors, **_backwards(ground_truths), **other}
        yield (
            "background labels",
            {"priors": priors, **ground_truths, "gt_labels": _some_background(given["gt_labels"])},
        )
        smaller = {**ground_truths, "gt_boxes": given["gt_boxes"] * _SMALL}
        yield "all a sixteenth as large", {"priors": priors * _SMALL, **smaller}
    elif operation == "ssd.loss":
        rest = {"loc": loc, "priors": priors, **ground_truths}
        yield "threshold 0.5, 3:1", {**rest, "conf": conf, "threshold": 0.5, "neg_pos": 3}
        other = {"threshold": 0.35, "neg_pos": 1, "variances": _OTHER_VARIANCES}
        yield "threshold 0.35, 1:1, other variances", {**rest, "conf": conf, **other}
        yield "logits far apart", {**rest, "conf": _far_apart(conf)}
        yield "all negatives", {**rest, "conf": conf, "neg_pos": len(priors)}
        yield "background labels", {**rest, "conf": conf, "gt_labels": _some_background(given["gt_labels"])}
    else:
        try:
            matched = ssd.match(priors, **ground_truths).gt_index
        except UpstreamRaises:
            return  # nothing to mine: the match operation itself shows this behaviour
        rest = {"gt_index": matched, "gt_labels": given["gt_labels"]}
        for neg_pos in (3, 1, len(priors)):
            yield f"{neg_pos}:1", {**rest, "conf": conf, "neg_pos": neg_pos}
        yield "logits far apart", {**rest, "conf": _far_apart(conf)}
        yield "background labels", {**rest, "conf": conf, "gt_labels": _some_background(given["gt_labels"])}


def _some_background(labels: Tensor) -> Tensor:
    """Labels of which every other one is that of the background, the first with it."""
    labels = labels.clone()
    labels[:, ::2] = -1
    return labels


def _far_apart(conf: Tensor) -> Tensor:
    """Raise all logits of every other prior: no cross entropy changes, but the other priors underflow in the mining.

    In all images but the last they are raised by half as much: with a maximum per image, nothing would underflow there.
    """
    raised = (torch.arange(conf.shape[1], device=conf.device) % 2).to(conf).expand(conf.shape[:2]).clone()
    raised[:-1] /= 2
    return conf + _FAR_APART * raised[..., None]


def _backwards(ground_truths: dict[str, Any]) -> dict[str, Any]:
    """Rows of every image in reverse order: padding comes first."""
    return {name: rows.flip(1) for name, rows in ground_truths.items()}


def _box_arguments(
    operation: str, priors: Tensor, ground_truths: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for image, valid in enumerate(ground_truths["gt_valid"]):
        targets = ground_truths["gt_boxes"][image, valid]
        if not len(targets):
            continue
        if operation == "ssd.jaccard":
            pair = {"boxes_a": targets, "boxes_b": boxes.cxcywh_to_xyxy(priors)}
            yield f"image {image}", pair
            yield f"image {image}, all a sixteenth as large", {name: side * _SMALL for name, side in pair.items()}
        else:
            turn = torch.arange(len(priors), device=priors.device) % len(targets)
            yield f"image {image}", {"gt_boxes": targets[turn], "priors": priors}
            other = {"gt_boxes": targets[turn], "priors": priors, "variances": _OTHER_VARIANCES}
            yield f"image {image}, other variances", other


def _canvas(operation: str, arguments: dict[str, Any]) -> Canvas | None:
    if operation not in ("ssd.match", "ssd.loss"):
        return None
    priors = arguments["priors"]
    sizes = priors[:, 2:].amin(1) / 2
    return Canvas(
        (1.0, 1.0), arguments["gt_boxes"], arguments["gt_labels"], arguments["gt_valid"], priors[:, :2], sizes
    )


SYSTEM = System(
    name="ssd",
    operations=(*operations_in(ssd_boxes), *(o for o in operations_in(ssd) if o not in operations_in(ssd_boxes))),
    shared=frozenset({"priors", "settings"}),
    native=native,
    arguments=_arguments,
    explain={
        "ssd.priors": explain.explain_priors,
        "ssd.encode": explain.explain_encode,
        "ssd.decode": explain.explain_decode,
        "ssd.match": explain.explain_match,
        "ssd.log_sum_exp": explain.explain_log_sum_exp,
        "ssd.hard_negatives": explain.explain_hard_negatives,
        "ssd.loss": explain.explain_loss,
    },
    loss_given={"ssd.loss": explain.loss_given},
    canvas=_canvas,
)
