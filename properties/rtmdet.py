"""RTMDet in the suite: native input from a scene, arguments of its operations, and what explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.predictors import SPECK, predict
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import Canvas, System
from detoracle.reference import rtmdet, rtmdet_head, rtmdet_loss
from detoracle.reference.anchor_head_boxes import valid_flags
from detoracle.reference.contract import operations_in
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import rtmdet as explain

__all__ = ["SYSTEM", "native"]

_COST = {"soft_center_radius": 2.5, "iou_weight": 1.5}  # settings of the cost, none the default


def native(scene: Scene) -> dict[str, Any]:
    """Turn a scene into RTMDet class logits and distances in pixels.

    Distances are positive, as the head's exponential makes them: a box that leaves its prior out is not predicted as it
    stands.

    Parameters
    ----------
    scene : Scene

    Returns
    -------
    dict
        class_logits, distances, strides, gt_boxes (xyxy pixels), gt_labels, gt_valid: the arguments of `rtmdet.loss`.

    Examples
    --------
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> tuple(native(edge_cases()[0])["distances"][0].shape)
    (2, 4, 8, 8)
    """
    gt_boxes, gt_labels, gt_valid = scene.padded()
    sizes = scene.level_sizes
    priors = rtmdet.priors(sizes, scene.strides, like=gt_boxes.new_zeros(()))
    predicted = predict(scene, priors[:, :2].contiguous(), priors[:, 2].contiguous())
    sign = priors.new_tensor([-1, -1, 1, 1])
    distances = ((predicted.boxes - priors[:, :2].repeat(1, 2)) * sign).clamp(min=SPECK)
    return {
        "class_logits": _maps(predicted.class_logits, sizes),
        "distances": _maps(distances, sizes),
        "strides": list(scene.strides),
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_valid": gt_valid,
    }


def _maps(flat: Tensor, sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """(B, A, N) to a map (B, N, H, W) a level."""
    levels = torch.split(flat, [h * w for h, w in sizes], dim=1)
    return [
        level.permute(0, 2, 1).reshape(len(flat), -1, h, w).contiguous()
        for level, (h, w) in zip(levels, sizes, strict=True)
    ]


def _flat(maps: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2).permute(0, 2, 1) for level in maps], dim=1).contiguous()


def _sizes(maps: list[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in maps]


def _arguments(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    maps, strides = given["distances"], given["strides"]
    ground_truths = {name: given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    like = maps[0].new_zeros(())
    if operation == "rtmdet.priors":
        for offset in (0.0, 0.5):
            yield f"offset {offset}", {"sizes": _sizes(maps), "strides": strides, "offset": offset, "like": like}
        high = [(stride, 2 * stride) for stride in strides]
        yield "high cells", {"sizes": _sizes(maps), "strides": high, "offset": 0.5, "like": like}
        return
    if operation == "rtmdet.loss":
        images = {"class_logits": given["class_logits"], "distances": maps, "strides": strides, **ground_truths}
        yield "", images
        yield "other settings", {**images, **_other_settings(given)}
        return
    priors = rtmdet.priors(_sizes(maps), strides, like=like)
    points, distances, logits = priors[:, :2].contiguous(), _flat(maps), _flat(given["class_logits"])
    boxes = rtmdet.decode(points, distances)
    inside = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    padded = valid_flags(_pad_shapes(given), sizes=_sizes(maps), strides=strides, base_anchors=[1] * len(maps))
    if operation == "rtmdet.decode":
        yield "", {"points": points, "distances": distances}
        yield "clipped", {"points": points, "distances": distances, "max_shape": (40, 48)}
    elif operation == "rtmdet.candidates":
        for name, flags in (("", inside), ("padded", padded)):
            yield name, {"priors": priors, "inside": flags, **_without(ground_truths, "gt_labels")}
    elif operation == "rtmdet.assign":
        images = {"class_logits": logits, "boxes": boxes, "priors": priors, **ground_truths}
        yield "", {**images, "inside": inside}
        yield "padded, masks, top 5", {**images, "inside": padded, **_COST, "gt_masks": _masks(given), "topk": 5}
    elif operation in ("rtmdet.cost", "rtmdet.dynamic_k_matching"):
        candidate = rtmdet.candidates(priors, inside, **_without(ground_truths, "gt_labels"))
        pairs = {"class_logits": logits, "boxes": boxes, "priors": priors, "candidate": candidate, **ground_truths}
        yield from _pairs(operation, pairs, given)
    elif operation == "rtmdet.joint_logits":
        yield "", {"class_logits": logits, "objectness_logits": logits[..., :1].contiguous()}
    elif operation == "rtmdet.encode":
        yield from _encoding(points, ground_truths)
    else:
        yield from _losses(operation, logits, boxes, priors, padded, ground_truths)


def _other_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Everything that `rtmdet.loss` can be told, none of it the default."""
    height, width = _canvas_size(given)
    return {
        "pad_shapes": _pad_shapes(given),
        "image_shapes": given["gt_labels"].new_tensor([[height // 2, width * 3 // 4]] * len(given["gt_valid"])),
        "gt_masks": _masks(given),
        "ignored_boxes": given["gt_boxes"],
        "offset": 0.5,
        "allowed_border": 8,
        "topk": 5,
        **_COST,
        "pos_weight": 2.0,
        "beta": 1.5,
        "class_loss_weight": 0.5,
        "box_loss_weight": 3.0,
        "giou_eps": 64.0,
    }


def _canvas_size(given: dict[str, Any]) -> tuple[int, int]:
    """Height and width that the maps cover."""
    height, width = given["distances"][0].shape[2:]
    return height * given["strides"][0], width * given["strides"][0]


def _pad_shapes(given: dict[str, Any]) -> Tensor:
    """Every other image (B, 2) is smaller than the batch, by no whole number of cells."""
    height, width = _canvas_size(given)
    shapes: Tensor = given["gt_labels"].new_tensor([[height, width]] * len(given["gt_valid"]))
    shapes[::2] = shapes.new_tensor([height * 5 // 8, width * 7 // 8])
    return shapes


def _masks(given: dict[str, Any]) -> Tensor:
    """Instance masks (B, G, H, W) of the upper halves, whose centres are not the boxes'."""
    gt_boxes: Tensor = given["gt_boxes"]
    left, top, right, bottom = gt_boxes[..., None, None].unbind(2)
    height, width = _canvas_size(given)
    row, column = torch.arange(height, device=top.device)[:, None], torch.arange(width, device=top.device)
    return (row >= top) & (row < (top + bottom) / 2) & (column >= left) & (column < right)


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _pairs(operation: str, arguments: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if operation == "rtmdet.cost":
        yield "", arguments
        yield "masks", {**arguments, **_COST, "gt_masks": _masks(given)}
        return
    try:
        cost, iou = rtmdet.cost(**arguments)
    except UpstreamRaises:
        return  # no costs to match: the cost operation itself shows this behaviour
    matching = {"cost": cost, "iou": iou, **{name: arguments[name] for name in ("candidate", "gt_valid")}}
    yield "", matching
    yield "top 5", {**matching, "topk": 5}


def _encoding(points: Tensor, ground_truths: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for image, valid in enumerate(ground_truths["gt_valid"]):
        targets = ground_truths["gt_boxes"][image, valid]
        if len(targets):
            paired = targets[torch.arange(len(points), device=points.device) % len(targets)]
            yield f"image {image}", {"points": points, "boxes": paired}
            yield f"image {image}, at most 16", {"points": points, "boxes": paired, "max_distance": 16.0, "eps": 0.5}


def _losses(
    operation: str, logits: Tensor, boxes: Tensor, priors: Tensor, inside: Tensor, ground_truths: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Targets and losses of the oracle's own assignment."""
    try:
        assignment = rtmdet.assign(logits, boxes, priors, inside, **ground_truths)
    except UpstreamRaises:
        return
    num_classes = logits.shape[2]
    arguments: dict[str, Any] = {"gt_index": assignment.gt_index, "quality": assignment.quality}
    arguments |= {name: ground_truths[name] for name in ("gt_boxes", "gt_labels")}
    if operation == "rtmdet.targets":
        for pos_weight in (-1.0, 2.0):
            yield f"pos_weight {pos_weight}", {**arguments, "num_classes": num_classes, "pos_weight": pos_weight}
        return
    labels, weights, box_targets, metrics = rtmdet_loss.targets(**arguments, num_classes=num_classes)
    if operation == "rtmdet.qfl":
        rows = {"predicted": logits.flatten(0, 1), "quality": metrics.flatten(), "labels": labels.flatten()}
        yield "sum", {**rows, "weight": weights.flatten(), "reduction": "sum"}
        yield "mean over a factor", {**rows, "average_factor": 7.0, "beta": 1.5}
        probabilities = 0.125 + 0.75 * torch.sigmoid(rows["predicted"])  # still some when moved by a rounding
        dense = {"predicted": probabilities, "quality": probabilities.flip(1), "activated": True}
        yield "probabilities, a quality a class", {**dense, "loss_weight": 2.0}
        return
    positive = assignment.positive
    pairs = {"predicted": boxes[positive], "target": box_targets[positive]}
    metrics = metrics[positive]
    a_side = metrics[:, None] * metrics.new_tensor([0.5, 1.0, 2.0, 0.25])
    yield "sum", {**pairs, "weight": metrics, "reduction": "sum"}
    yield "none", {**pairs, "reduction": "none", "loss_weight": 2.0}
    yield "a weight a side", {**pairs, "weight": a_side, "average_factor": 7.0, "eps": 64.0}
    yield "no weight above 0", {**pairs, "weight": -metrics, "average_factor": 7.0, "loss_weight": 2.0}


def _canvas(operation: str, arguments: dict[str, Any]) -> Canvas | None:
    if operation == "rtmdet.assign":
        priors = arguments["priors"]
    elif operation == "rtmdet.loss":
        priors = rtmdet.priors(
            _sizes(arguments["distances"]),
            arguments["strides"],
            offset=arguments.get("offset", 0.0),
            like=arguments["gt_boxes"].new_zeros(()),
        )
    else:
        return None
    height, width = (priors[:, :2] + priors[:, 2:]).amax(0).flip(0).tolist()
    ground_truths = {name: arguments[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    return Canvas((height, width), **ground_truths, anchor_points=priors[:, :2], anchor_strides=priors[:, 2])


SYSTEM = System(
    name="rtmdet",
    operations=(*operations_in(rtmdet), *operations_in(rtmdet_loss), *operations_in(rtmdet_head)),
    shared=frozenset({"strides"}),
    native=native,
    arguments=_arguments,
    explain={
        "rtmdet.candidates": explain.explain_candidates,
        "rtmdet.cost": explain.explain_cost,
        "rtmdet.dynamic_k_matching": explain.explain_dynamic_k_matching,
        "rtmdet.assign": explain.explain_assign,
        "rtmdet.loss": explain.explain_loss,
        "rtmdet.joint_logits": explain.explain_joint_logits,
    },
    loss_given={"rtmdet.loss": explain.loss_given},
    canvas=_canvas,
)
