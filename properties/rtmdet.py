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
from detoracle.reference.contract import operations_in
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import rtmdet as explain

__all__ = ["SYSTEM", "native"]


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
        return
    if operation == "rtmdet.loss":
        images = {"class_logits": given["class_logits"], "distances": maps, "strides": strides, **ground_truths}
        yield "", images
        yield "top 5, radius 2.5", {**images, "topk": 5, "soft_center_radius": 2.5}
        return
    priors = rtmdet.priors(_sizes(maps), strides, like=like)
    points, distances, logits = priors[:, :2].contiguous(), _flat(maps), _flat(given["class_logits"])
    boxes = rtmdet.decode(points, distances)
    inside = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    if operation == "rtmdet.decode":
        yield "", {"points": points, "distances": distances}
    elif operation == "rtmdet.candidates":
        yield "", {"priors": priors, "inside": inside, **_without(ground_truths, "gt_labels")}
    elif operation == "rtmdet.assign":
        yield "", {"class_logits": logits, "boxes": boxes, "priors": priors, "inside": inside, **ground_truths}
    elif operation in ("rtmdet.cost", "rtmdet.dynamic_k_matching"):
        yield from _pairs(operation, logits, boxes, priors, inside, ground_truths)
    elif operation == "rtmdet.joint_logits":
        yield "", {"class_logits": logits, "objectness_logits": logits[..., :1].contiguous()}
    elif operation == "rtmdet.encode":
        yield from _encoding(points, ground_truths)
    else:
        yield from _losses(operation, logits, boxes, priors, inside, ground_truths)


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _pairs(
    operation: str, logits: Tensor, boxes: Tensor, priors: Tensor, inside: Tensor, ground_truths: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    candidate = rtmdet.candidates(priors, inside, **_without(ground_truths, "gt_labels"))
    arguments = {"class_logits": logits, "boxes": boxes, "priors": priors, "candidate": candidate, **ground_truths}
    if operation == "rtmdet.cost":
        yield "", arguments
        return
    try:
        cost, iou = rtmdet.cost(**arguments)
    except UpstreamRaises:
        return  # no costs to match: the cost operation itself shows this behaviour
    yield "", {"cost": cost, "iou": iou, "candidate": candidate, "gt_valid": ground_truths["gt_valid"]}


def _encoding(points: Tensor, ground_truths: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for image, valid in enumerate(ground_truths["gt_valid"]):
        targets = ground_truths["gt_boxes"][image, valid]
        if len(targets):
            paired = targets[torch.arange(len(points), device=points.device) % len(targets)]
            yield f"image {image}", {"points": points, "boxes": paired}
            yield f"image {image}, at most 16", {"points": points, "boxes": paired, "max_distance": 16.0}


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
        return
    positive = assignment.positive
    pairs = {"predicted": boxes[positive], "target": box_targets[positive]}
    yield "sum", {**pairs, "weight": metrics[positive], "reduction": "sum"}
    yield "none", {**pairs, "reduction": "none", "loss_weight": 2.0}


def _canvas(operation: str, arguments: dict[str, Any]) -> Canvas | None:
    if operation == "rtmdet.assign":
        priors = arguments["priors"]
    elif operation == "rtmdet.loss":
        priors = rtmdet.priors(
            _sizes(arguments["distances"]), arguments["strides"], like=arguments["gt_boxes"].new_zeros(())
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
