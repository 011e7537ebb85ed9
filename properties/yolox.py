"""YOLOX in the suite: native input from a scene, arguments of its operations, and what explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from detoracle.properties.predictors import predict
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import Canvas, System
from detoracle.reference import boxes, yolox, yolox_cost, yolox_loss
from detoracle.reference.contract import operations_in
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import yolox as explain

__all__ = ["SYSTEM", "native"]


def native(scene: Scene) -> dict[str, Any]:
    """Turn a scene into raw YOLOX head maps and centre-and-size ground truths.

    Parameters
    ----------
    scene : Scene

    Returns
    -------
    dict
        raw, strides, gt_boxes (cxcywh), gt_labels, gt_valid: the arguments of `yolox.loss`.

    Examples
    --------
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> sorted(native(edge_cases()[0]))
    ['gt_boxes', 'gt_labels', 'gt_valid', 'raw', 'strides']
    """
    gt_boxes, gt_labels, gt_valid = scene.padded()
    ground_truths = {"gt_boxes": boxes.xyxy_to_cxcywh(gt_boxes), "gt_labels": gt_labels, "gt_valid": gt_valid}
    given = scene.native.get("yolox")
    if given is not None:
        return {**ground_truths, **given}
    height, width = scene.image_size
    sizes = [(-(-height // stride), -(-width // stride)) for stride in scene.strides]
    cells, points, strides = yolox.anchor_grid(sizes, scene.strides, like=gt_boxes)
    predicted = predict(scene, points, strides)
    decoded = boxes.xyxy_to_cxcywh(predicted.boxes)
    per_anchor = strides[:, None]
    flat = torch.cat(
        [
            decoded[..., :2] / per_anchor - cells,
            torch.log(decoded[..., 2:] / per_anchor),
            predicted.objectness_logits[..., None],
            predicted.class_logits,
        ],
        dim=-1,
    )
    levels = torch.split(flat, [h * w for h, w in sizes], dim=1)
    raw = [
        level.permute(0, 2, 1).reshape(len(flat), -1, h, w).contiguous()
        for level, (h, w) in zip(levels, sizes, strict=True)
    ]
    return {**ground_truths, "raw": raw, "strides": list(scene.strides)}


def _arguments(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    raw, strides = given["raw"], given["strides"]
    ground_truths = {name: given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    if operation == "yolox.decode":
        yield "", {"raw": raw, "strides": strides}
        return
    predictions = yolox.decode(raw, strides)
    _, points, anchor_strides = yolox.anchor_grid([tuple(level.shape[2:]) for level in raw], strides, like=predictions)
    if operation.startswith("boxes."):
        yield from _box_arguments(operation, predictions, ground_truths)
        return
    grid = {"anchor_points": points, "anchor_strides": anchor_strides}
    for flavour in yolox_cost.FLAVOURS:
        counted = yolox.counted_ground_truths(**ground_truths, flavour=flavour)
        if operation == "yolox.loss":
            yield (
                flavour,
                {"raw": raw, "strides": strides, **ground_truths, "flavour": flavour, "use_l1": flavour == "official"},
            )
        elif operation == "yolox.assign":
            yield flavour, {"predictions": predictions, **grid, **ground_truths, "flavour": flavour}
        elif operation == "yolox.candidates":
            yield flavour, {**grid, "gt_boxes": given["gt_boxes"], "gt_valid": counted, "flavour": flavour}
        else:
            yield from _later_stage(operation, predictions, grid, {**ground_truths, "gt_valid": counted}, flavour)


def _later_stage(
    operation: str, predictions: torch.Tensor, grid: dict[str, Any], ground_truths: dict[str, Any], flavour: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    candidate, geometry = yolox_cost.candidates(
        **grid, gt_boxes=ground_truths["gt_boxes"], gt_valid=ground_truths["gt_valid"], flavour=flavour
    )
    pairs: dict[str, Any] = {"candidate": candidate, "geometry": geometry, "flavour": flavour}
    if operation == "yolox.cost":
        yield flavour, {"predictions": predictions, **ground_truths, **pairs}
        return
    try:
        cost, iou = yolox_cost.cost(predictions, **ground_truths, **pairs)
    except UpstreamRaises:
        return  # no costs to match: the cost operation itself shows this behaviour
    yield flavour, {"cost": cost, "iou": iou, "candidate": candidate, "gt_valid": ground_truths["gt_valid"]}


def _box_arguments(
    operation: str, predictions: torch.Tensor, ground_truths: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each image's ground truths against its predictions; for the aligned loss, anchor by anchor in turn."""
    for image, valid in enumerate(ground_truths["gt_valid"]):
        targets, predicted = ground_truths["gt_boxes"][image, valid], predictions[image, :, :4]
        if not len(targets):
            continue
        if operation == "boxes.iou_yolox":
            for form, convert in (("cxcywh", lambda b: b), ("xyxy", boxes.cxcywh_to_xyxy)):
                yield (
                    f"image {image}, {form}",
                    {"boxes_a": convert(targets), "boxes_b": convert(predicted), "form": form},
                )
        else:
            paired = targets[torch.arange(len(predicted)) % len(targets)]
            for variant in ("iou", "giou_tutorial", "giou"):
                yield f"image {image}, {variant}", {"predicted": predicted, "target": paired, "variant": variant}


def _safe(behaviour: UpstreamRaises, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Without a candidate, a safe implementation trains the image as background: as if it had no ground truth."""
    if behaviour.behaviour != "yolox.no-candidate":
        return None
    if "candidate" in arguments:
        candidate, counted = arguments["candidate"], arguments["gt_valid"]
    else:
        boxes_, labels, valid, flavour = (arguments[n] for n in ("gt_boxes", "gt_labels", "gt_valid", "flavour"))
        counted = yolox.counted_ground_truths(boxes_, labels, valid, flavour=flavour)
        points, strides = _grid(arguments)
        candidate, _ = yolox_cost.candidates(points, strides, boxes_, counted, flavour=flavour)
    return {**arguments, "gt_valid": arguments["gt_valid"] & candidate.any(1, keepdim=True)}


def _grid(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if "anchor_points" in arguments:
        return arguments["anchor_points"], arguments["anchor_strides"]
    sizes = [tuple(level.shape[2:]) for level in arguments["raw"]]
    _, points, strides = yolox.anchor_grid(sizes, arguments["strides"], like=arguments["gt_boxes"])
    return points, strides


def _canvas(operation: str, arguments: dict[str, Any]) -> Canvas | None:
    if operation not in ("yolox.assign", "yolox.loss"):
        return None
    points, strides = _grid(arguments)
    height, width = (points + strides[:, None] / 2).amax(0).flip(0).tolist()
    corners = boxes.cxcywh_to_xyxy(arguments["gt_boxes"])
    return Canvas((height, width), corners, arguments["gt_labels"], arguments["gt_valid"], points, strides)


SYSTEM = System(
    name="yolox",
    operations=(
        *operations_in(yolox),
        *operations_in(yolox_cost),
        *operations_in(yolox_loss),
        *(operation for operation in operations_in(boxes) if operation.name.endswith("_yolox")),
    ),
    shared=frozenset({"strides"}),
    native=native,
    arguments=_arguments,
    explain={
        "yolox.candidates": explain.explain_candidates,
        "yolox.cost": explain.explain_cost,
        "yolox.dynamic_k_matching": explain.explain_dynamic_k_matching,
        "yolox.assign": explain.explain_assign,
        "yolox.loss": explain.explain_loss,
    },
    loss_given={"yolox.loss": explain.loss_given},
    canvas=_canvas,
    safe=_safe,
)
