"""YOLOv8 in the suite: native input from a scene, arguments of its operations, and what explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.predictors import predict
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import Canvas, System
from detoracle.reference import boxes, yolov8, yolov8_loss
from detoracle.reference.contract import operations_in
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import yolov8 as explain

__all__ = ["REG_MAX", "SYSTEM", "native"]

REG_MAX = 16
"""Bins of the distances that generated heads predict."""

_ASSIGNMENT: dict[str, Any] = {"topk": 5, "alpha": 1.0, "beta": 2.0}  # instead of 10, 0.5 and 6
_GAINS = {"box_gain": 1.25, "cls_gain": 1.75, "dfl_gain": 2.5}  # instead of 7.5, 0.5 and 1.5
_SHARPNESS = 8.0  # logit difference between the two bins around a distance and all others


def native(scene: Scene) -> dict[str, Any]:
    """Turn a scene into raw YOLOv8 head maps and xyxy ground truths.

    Distances are clamped to what the bins can say: a box that leaves its anchor out, or is wider than 15 cells, is not
    predicted as it stands.

    Parameters
    ----------
    scene : Scene

    Returns
    -------
    dict
        raw, strides, gt_boxes (xyxy pixels), gt_labels, gt_valid: the arguments of `yolov8.loss`; and image_size.

    Examples
    --------
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> tuple(native(edge_cases()[0])["raw"][0].shape)
    (2, 68, 8, 8)
    """
    gt_boxes, gt_labels, gt_valid = scene.padded()
    sizes = scene.level_sizes
    points, strides = yolov8.anchor_points([gt_boxes.new_zeros(1, 1, h, w) for h, w in sizes], scene.strides)
    per_anchor = strides[:, None]
    predicted = predict(scene, points * per_anchor, strides)
    sides = (predicted.boxes / per_anchor - points.repeat(1, 2)) * points.new_tensor([-1, -1, 1, 1])
    flat = torch.cat([_bins(sides).flatten(2), predicted.class_logits], dim=-1)
    levels = torch.split(flat, [h * w for h, w in sizes], dim=1)
    raw = [
        level.permute(0, 2, 1).reshape(len(flat), -1, h, w).contiguous()
        for level, (h, w) in zip(levels, sizes, strict=True)
    ]
    ground_truths = {"gt_boxes": gt_boxes, "gt_labels": gt_labels, "gt_valid": gt_valid}
    return {"raw": raw, "strides": list(scene.strides), **ground_truths, "image_size": list(scene.image_size)}


def _bins(distances: Tensor) -> Tensor:
    """Logits (..., 4, R) whose expectation is near the distances: two neighbouring bins share the weight."""
    clamped = distances.clamp(0, REG_MAX - 1)  # keeps NaN
    away = (torch.arange(REG_MAX, device=distances.device) - clamped[..., None]).abs()
    return torch.log((1 - away).clamp_min(0) + torch.e**-_SHARPNESS)


def _arguments(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    raw, strides = given["raw"], given["strides"]
    ground_truths = {name: given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    if operation == "yolov8.anchor_points":
        yield "", {"raw": raw, "strides": strides}
    elif operation == "yolov8.pad_targets":
        yield from _flat_targets(given)
    elif operation == "yolov8.loss":
        yield "", {"raw": raw, "strides": strides, **ground_truths}
        yield (
            "no DFL",
            {"raw": [_without_bins(level) for level in raw], "strides": strides, **ground_truths, "reg_max": 1},
        )
        other = {**_backwards(ground_truths), **_ASSIGNMENT, **_GAINS}
        yield "other settings, padding first", {"raw": raw, "strides": strides, **other}
    else:
        yield from _on_anchors(operation, raw, strides, ground_truths)


def _flat_targets(given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ground truths as flat rows, in the images' order and backwards."""
    image, row = given["gt_valid"].nonzero(as_tuple=True)
    height, width = given["image_size"]
    scale = given["gt_boxes"].new_tensor([width, height, width, height])
    shares = boxes.xyxy_to_cxcywh(given["gt_boxes"][image, row]) / scale
    labels, size = given["gt_labels"][image, row], given["image_size"]
    for name, order in (
        ("sorted", slice(None)),
        ("reversed", torch.arange(len(image) - 1, -1, -1, device=image.device)),
    ):
        flat = {"batch_index": image[order], "labels": labels[order], "boxes": shares[order]}
        yield name, {**flat, "batch_size": len(given["gt_valid"]), "image_size": size}


def _without_bins(level: Tensor) -> Tensor:
    """The same head with plain distances in place of bins."""
    batch, _, height, width = level.shape
    bins = level[:, : 4 * REG_MAX].reshape(batch, 4, REG_MAX, height, width).softmax(2)
    distances = (bins * torch.arange(REG_MAX, device=level.device).reshape(-1, 1, 1)).sum(2)
    return torch.cat([distances, level[:, 4 * REG_MAX :]], dim=1)


def _on_anchors(
    operation: str, raw: list[Tensor], strides: list[int], ground_truths: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    points, anchor_strides = yolov8.anchor_points(raw, strides)
    flat = torch.cat([level.flatten(2).permute(0, 2, 1) for level in raw], dim=1)
    box_logits, class_logits = flat[..., : 4 * REG_MAX].contiguous(), flat[..., 4 * REG_MAX :].contiguous()
    distances = yolov8_loss.dfl_decode(box_logits)
    in_cells = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
    if operation == "yolov8.dfl_decode":
        yield "", {"box_logits": box_logits}
        return
    if operation in ("yolov8.align", "yolov8.assign"):
        arguments = {
            "scores": class_logits.sigmoid(),
            "boxes": in_cells * anchor_strides[:, None],
            "anchor_points": points * anchor_strides[:, None],
        }
        settings = dict(_ASSIGNMENT)
        if operation == "yolov8.align":
            ground_truths["gt_valid"] = yolov8.counted_ground_truths(
                ground_truths["gt_boxes"], ground_truths["gt_valid"]
            )
            del settings["topk"]
        yield "", {**arguments, **ground_truths}
        yield "other settings, padding first", {**arguments, **_backwards(ground_truths), **settings}
        return
    for image, valid in enumerate(ground_truths["gt_valid"]):
        targets = ground_truths["gt_boxes"][image, valid]
        if not len(targets):
            continue
        paired = targets[torch.arange(len(points), device=points.device) % len(targets)] / anchor_strides[:, None]
        if operation == "yolov8.bbox2dist":
            for reg_max in (REG_MAX, REG_MAX // 2):
                yield f"image {image}, {reg_max} bins", {"anchor_points": points, "boxes": paired, "reg_max": reg_max}
        elif operation == "yolov8.dfl_loss":
            wanted = yolov8_loss.bbox2dist(points, paired, reg_max=REG_MAX)
            yield f"image {image}", {"box_logits": box_logits[image], "distances": wanted}
        else:
            yield from _overlaps(image, in_cells[image], paired)


def _overlaps(image: int, predicted: Tensor, targets: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    for form, convert in (("xyxy", lambda b: b), ("cxcywh", boxes.xyxy_to_cxcywh)):
        for mode in ("iou", "giou", "diou", "ciou"):
            pair = {"boxes_a": convert(predicted), "boxes_b": convert(targets)}
            yield f"image {image}, {mode} of {form}", {**pair, "form": form, "mode": mode}
    for mode in ("iou", "ciou"):
        pair = {"boxes_a": predicted, "boxes_b": targets}
        yield f"image {image}, {mode} with a larger epsilon", {**pair, "mode": mode, "eps": 2.0**-10}
    inverted = {name: box[:, [2, 3, 0, 1]] for name, box in pair.items()}
    yield f"image {image}, giou of inverted boxes", {**inverted, "mode": "giou"}


def _backwards(ground_truths: dict[str, Any]) -> dict[str, Any]:
    """Rows of every image in reverse order: padding comes first."""
    return {name: rows.flip(1) for name, rows in ground_truths.items()}


def _canvas(operation: str, arguments: dict[str, Any]) -> Canvas | None:
    if operation == "yolov8.assign":
        points = arguments["anchor_points"]
        gaps = (points[1:, 0] - points[:-1, 0]).clamp_min(1)
        strides = torch.cat([gaps, gaps[-1:]]) if len(gaps) else points.new_full((len(points),), 8.0)
    elif operation == "yolov8.loss":
        cells, strides = yolov8.anchor_points(arguments["raw"], arguments["strides"])
        points = cells * strides[:, None]
    else:
        return None
    height, width = (points + strides[:, None] / 2).amax(0).flip(0).tolist()
    boxes, labels, valid = (arguments[name] for name in ("gt_boxes", "gt_labels", "gt_valid"))
    return Canvas((height, width), boxes, labels, valid, points, strides)


def _safe(behaviour: UpstreamRaises, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """With fewer anchors than a top-k asks for, a safe implementation lets every ground truth claim them all."""
    if behaviour.behaviour != "yolov8.few-anchors":
        return None
    anchors = len(arguments["anchor_points"]) if "anchor_points" in arguments else sum(
        level.shape[2] * level.shape[3] for level in arguments["raw"]
    )  # fmt: skip
    return {**arguments, "topk": anchors}


SYSTEM = System(
    name="yolov8",
    operations=(
        *operations_in(yolov8),
        *operations_in(yolov8_loss),
        *(operation for operation in operations_in(boxes) if operation.name.endswith("_ultralytics")),
    ),
    shared=frozenset({"strides", "image_size"}),
    native=native,
    arguments=_arguments,
    explain={"yolov8.assign": explain.explain_assign, "yolov8.loss": explain.explain_loss},
    loss_given={"yolov8.loss": explain.loss_given},
    canvas=_canvas,
    safe=_safe,
)
