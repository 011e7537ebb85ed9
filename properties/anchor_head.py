"""The anchor head in the suite: native input from a scene, arguments of its operations, and what explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.anchor_head_settings import HEADS
from detoracle.properties.predictors import predict
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import Canvas, System
from detoracle.reference import (
    anchor_head,
    anchor_head_box_terms,
    anchor_head_boxes,
    anchor_head_coder,
    anchor_head_loss,
    anchor_head_ssd,
    anchor_head_terms,
    boxes,
)
from detoracle.reference.contract import operations_in
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import anchor_head as explain
from detoracle.reference.explain import anchor_head_loss as explain_loss

__all__ = ["SYSTEM", "native"]

_SSD_STDS = (0.1, 0.1, 0.2, 0.2)
_ASSIGNER = ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "gt_max_assign_all")
_MEANS = (0.0, 0.1, -0.1, 0.2)
_RATIOS = (0.5, 1.0, 2.0)
_LARGE = 256  # from this image side on, one scale an octave instead of three ...
_RETINANET_LEVELS = 5  # ... but for a pyramid of as many levels as RetinaNet's


def native(scene: Scene) -> dict[str, Any]:
    """Turn a scene into an anchor head's maps, anchors and image shapes.

    Parameters
    ----------
    scene : Scene

    Returns
    -------
    dict
        cls_scores, bbox_preds, anchors, strides, gt_boxes (xyxy pixels), gt_labels, gt_valid, image_shapes, pad_shapes:
        the arguments of `anchor_head.loss`.

    Examples
    --------
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> tuple(native(edge_cases()[0])["bbox_preds"][0].shape)
    (2, 36, 8, 8)
    """
    gt_boxes, gt_labels, gt_valid = scene.padded()
    height, width = scene.image_size
    sizes = scene.level_sizes
    scales = 1 if min(height, width) >= _LARGE and len(scene.strides) < _RETINANET_LEVELS else 3
    anchors = anchor_head_boxes.anchors(
        sizes,
        strides=scene.strides,
        ratios=_RATIOS,
        like=gt_boxes.new_zeros(()),
        octave_base_scale=2,
        scales_per_octave=scales,
    )
    counts = [h * w * 3 * scales for h, w in sizes]
    strides = torch.cat([anchors.new_full((n,), s) for n, s in zip(counts, scene.strides, strict=True)])
    predicted = predict(scene, (anchors[:, :2] + anchors[:, 2:]) / 2, strides)
    deltas = torch.stack([anchor_head_coder.encode(anchors, image) for image in predicted.boxes])
    shapes = torch.tensor([[height, width]] * len(gt_boxes))
    return {
        "cls_scores": _maps(predicted.class_logits, sizes, 3 * scales),
        "bbox_preds": _maps(deltas, sizes, 3 * scales),
        "anchors": anchors,
        "strides": list(scene.strides),
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_valid": gt_valid,
        "image_shapes": shapes,
        "pad_shapes": shapes.clone(),
    }


def _maps(flat: Tensor, sizes: tuple[tuple[int, int], ...], per_cell: int) -> list[Tensor]:
    """(B, A, N) to a map (B, K*N, H, W) a level, the channels anchor-major."""
    levels = torch.split(flat, [h * w * per_cell for h, w in sizes], dim=1)
    return [
        level.reshape(len(flat), h, w, -1).permute(0, 3, 1, 2).contiguous()
        for level, (h, w) in zip(levels, sizes, strict=True)
    ]


def _flat(maps: list[Tensor], columns: int) -> Tensor:
    """Maps to (B, A, columns)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, columns) for level in maps], dim=1)


def _sizes(maps: list[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in maps]


def _arguments(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if operation in ("anchor_head.anchors", "anchor_head.ssd_anchors", "anchor_head.valid_flags"):
        yield from _generators(operation, given)
    elif operation == "anchor_head.loss":
        for name, settings in HEADS.items():
            yield name, {**_head(name, given), **settings}
    elif operation == "anchor_head.ssd_loss":
        plain = _head("ssd-like", given)
        yield "3:1", {**plain, "neg_pos_ratio": 3}
        yield "1:1", {**plain, "neg_pos_ratio": 1, "pad_shapes": _smaller(given["pad_shapes"]), "beta": 1 / 9}
        by_threshold = {"match_low_quality": False, "pos_iou_thr": 0.35, "neg_iou_thr": 0.25, "allowed_border": 8}
        yield "thresholds alone", {**plain, **by_threshold, "pos_weight": 2.0, "reg_decoded_bbox": True}
        claims = {"min_pos_iou": 0.25, "gt_max_assign_all": True, "means": _MEANS, "stds": (0.2, 0.2, 0.1, 0.1)}
        regions = {**_regions(given), "ignore_iof_thr": 0.3, "ignore_wrt_candidates": False}
        yield "ignored regions", {**plain, **claims, **regions}
    elif operation == "anchor_head.inside_flags":
        valid = _inside(given)
        valid[:, ::7] = False
        taken = {"anchors": given["anchors"], "valid": valid, "image_shapes": _smaller(given["image_shapes"])}
        for border in (-1.0, 0.0, 8.0):
            yield f"border {border:g}", {**taken, "allowed_border": border}
    elif operation in ("anchor_head.encode", "anchor_head.decode", "boxes.overlaps_mmdet"):
        yield from _boxes(operation, given)
    else:
        yield from _assigned(operation, given)


def _inside(given: dict[str, Any]) -> Tensor:
    return torch.ones(len(given["gt_valid"]), len(given["anchors"]), dtype=torch.bool, device=given["gt_valid"].device)


def _taking_part(given: dict[str, Any], border: float) -> Tensor:
    """Anchors (B, A) inside images of different sizes."""
    return anchor_head_boxes.inside_flags(
        given["anchors"], _inside(given), _smaller(given["image_shapes"]), allowed_border=border
    )


def _smaller(shapes: Tensor) -> Tensor:
    """Shapes of images (B, 2) that differ, whatever the batch's."""
    return (shapes - 8 * torch.arange(1, len(shapes) + 1, device=shapes.device)[:, None]).clamp(min=1)


def _head(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the loss whose class channels fit the head: one for a proposal network, background for softmax."""
    arguments = dict(given)
    per_cell = given["bbox_preds"][0].shape[1] // 4
    scores = []
    for level in given["cls_scores"]:
        by_anchor = level.unflatten(1, (per_cell, -1))
        if name == "rpn":
            by_anchor = by_anchor[:, :, :1]
        elif name in ("ssd-like", "other softmax"):
            by_anchor = torch.cat([by_anchor, torch.zeros_like(by_anchor[:, :, :1])], dim=2)
        scores.append(by_anchor.flatten(1, 2).contiguous())
    arguments["cls_scores"] = scores
    if name == "rpn":
        arguments["gt_labels"] = torch.zeros_like(given["gt_labels"])
        arguments["image_shapes"] = _smaller(given["image_shapes"])
    elif name == "giou":
        arguments["pad_shapes"] = _smaller(given["pad_shapes"])
        arguments["sampler"] = "random"  # which the focal loss ignores
    elif name.startswith("other"):
        arguments |= _regions(given)
        if name == "other softmax":
            arguments["class_weight"] = [1 + label / 4 for label in range(scores[0].shape[1] // per_cell)]
    return arguments


def _regions(given: dict[str, Any]) -> dict[str, Any]:
    """Regions to ignore, beside the ground truths."""
    return {"ignore_boxes": given["gt_boxes"] + 8, "ignore_valid": given["gt_valid"]}


def _generators(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    grid = {"sizes": _sizes(given["bbox_preds"]), "strides": given["strides"]}
    oblong = {**grid, "strides": [(stride, 2 * stride) for stride in given["strides"]]}
    like = given["gt_boxes"].new_zeros(())
    levels = len(grid["sizes"])
    if operation == "anchor_head.anchors":
        yield "octaves", {**grid, "ratios": _RATIOS, "like": like, "octave_base_scale": 2, "scales_per_octave": 3}
        apart = {"center_offset": 0.5, "scale_major": False}
        yield "scales", {**oblong, "ratios": _RATIOS, "like": like, "scales": (3.0, 8.0), **apart}
        places = {"base_sizes": [6.0] * levels, "centers": [(3.0, 5.0)] * levels}
        yield "centres", {**grid, "ratios": _RATIOS, "like": like, "scales": (2.0,), **places}
    elif operation == "anchor_head.ssd_anchors":
        small = [10.0 + 12 * level for level in range(levels)]
        ratios = [(2.0, 3.0) if level % 2 else (2.0,) for level in range(levels)]
        shapes = {"ratios": ratios, "min_sizes": small, "max_sizes": [s + 12 for s in small], "like": like}
        yield "", {**oblong, **shapes}
        yield "scale-major", {**grid, **shapes, "scale_major": True}
    else:
        base = [level.shape[1] // 4 for level in given["bbox_preds"]]
        yield "whole", {**grid, "pad_shapes": given["pad_shapes"], "base_anchors": base}
        yield "smaller", {**grid, "pad_shapes": _smaller(given["pad_shapes"]), "base_anchors": base}
        yield "oblong", {**oblong, "pad_shapes": _smaller(given["pad_shapes"]), "base_anchors": base}


def _boxes(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    anchors, deltas = given["anchors"], _flat(given["bbox_preds"], 4)
    if operation == "anchor_head.decode":
        yield "", {"anchors": anchors, "deltas": deltas[0]}
        yield "clipped", {"anchors": anchors, "deltas": deltas[0], "stds": _SSD_STDS, "max_shape": (32, 48)}
        several = torch.cat([deltas[0], deltas[-1]], dim=1)
        limits = {"means": _MEANS, "stds": _SSD_STDS, "ratio_clip": 1 / 4, "center_clamp": 4.0}
        yield "two classes, clamped", {"anchors": anchors, "deltas": several, **limits}
        return
    for image, valid in enumerate(given["gt_valid"]):
        targets = given["gt_boxes"][image, valid]
        if not len(targets):
            continue
        paired = targets[torch.arange(len(anchors), device=anchors.device) % len(targets)]
        if operation == "anchor_head.encode":
            yield f"image {image}", {"anchors": anchors, "boxes": paired, "means": _MEANS, "stds": _SSD_STDS}
            continue
        for mode in ("iou", "iof", "giou"):
            yield f"image {image}, {mode}", {"boxes_a": targets, "boxes_b": anchors, "mode": mode}
            yield (
                f"image {image}, {mode} aligned",
                {"boxes_a": paired, "boxes_b": anchors, "mode": mode, "aligned": True, "eps": 300.0},
            )


def _assigned(operation: str, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Assignment and what follows from the oracle's own."""
    anchors = given["anchors"]
    arguments = {
        "anchors": anchors,
        "gt_boxes": given["gt_boxes"],
        "gt_valid": given["gt_valid"],
        "inside": _inside(given),
    }
    if operation == "anchor_head.assign":
        for name in ("retina", "rpn", "ssd-like"):
            inside = _taking_part(given, HEADS[name].get("allowed_border", -1))
            yield name, {**arguments, "inside": inside, **{k: v for k, v in HEADS[name].items() if k in _ASSIGNER}}
        regions = _regions(given)
        last = {name: given[name].flip(1) for name in ("gt_boxes", "gt_valid")}  # with padding before what is real
        by_anchor = {"ignore_iof_thr": 0.5, "neg_iou_thr": (0.1, 0.25)}
        yield "ignored regions", {**arguments, **last, **regions, **by_anchor}
        yield "all may be claimed", {**arguments, **last, **regions, "ignore_iof_thr": 0.1, "min_pos_iou": -1.0}
        by_region = {"ignore_iof_thr": 0.3, "ignore_wrt_candidates": False, "pos_iou_thr": 0.25, "neg_iou_thr": 0.125}
        yield "shares of ignored regions", {**arguments, **regions, **by_region, "match_low_quality": False}
        return
    gt_index = anchor_head.assign(**arguments).gt_index
    if operation == "anchor_head.sample":
        yield "pseudo", {"gt_index": gt_index, "sampler": "pseudo"}
        yield "random", {"gt_index": gt_index, "sampler": "random", "seed": 3, "num": 32, "neg_pos_ub": 5.0}
        added = {"gt_labels": given["gt_labels"], "gt_valid": given["gt_valid"], "add_gt_as_proposals": True}
        yield "added ground truths", {"gt_index": gt_index, **added, "num": 24, "pos_fraction": 0.25}
        return
    sampled = anchor_head.sample(gt_index, sampler="pseudo")
    num_classes = given["cls_scores"][0].shape[1] * 4 // given["bbox_preds"][0].shape[1]
    targets = {
        "anchors": anchors,
        "gt_index": gt_index,
        "gt_boxes": given["gt_boxes"],
        "gt_labels": given["gt_labels"],
        "positive": sampled[0],
        "negative": sampled[1],
        "num_classes": num_classes,
    }
    if operation == "anchor_head.targets":
        yield "", {**targets, "means": _MEANS, "stds": _SSD_STDS}
        positive, negative, _ = anchor_head.sample(gt_index, num=16, seed=1)
        drawn = {**targets, "positive": positive, "negative": negative}
        yield "drawn, decoded, weighted", {**drawn, "reg_decoded_bbox": True, "pos_weight": 2.0}
        return
    try:
        made = anchor_head.targets(**targets)
    except UpstreamRaises:
        return  # no targets: the targets operation itself shows this behaviour
    yield from _terms(operation, given, made, num_classes)


def _terms(operation: str, given: dict[str, Any], made: Any, num_classes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Loss terms on the rows of all images."""
    labels, label_weights, box_targets, box_weights = (t.flatten(0, 1) for t in made[:4])
    reductions: tuple[tuple[str, dict[str, Any]], ...] = (
        ("mean over a factor", {"avg_factor": 6.0}),
        ("sum", {"reduction": "sum", "loss_weight": 2.0}),
    )
    term = operation.partition(".")[2]
    if term in ("cross_entropy", "sigmoid_cross_entropy", "sigmoid_focal_loss"):
        logits = _flat(given["cls_scores"], num_classes).flatten(0, 1)
        if term == "cross_entropy":
            logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
        rows = {"logits": logits, "labels": labels, "weight": label_weights}
        if bool(((labels < 0) | (labels > num_classes)).any()):
            return  # labels that do not exist: the targets and the loss show what they do
    else:
        predicted = _flat(given["bbox_preds"], 4).flatten(0, 1)
        if term == "giou_loss":
            anchors = given["anchors"].repeat(len(given["gt_valid"]), 1)
            predicted = anchor_head_coder.decode(anchors, predicted)
            box_targets = anchors + 4
        rows = {"predicted": predicted, "target": box_targets, "weight": box_weights}
    for name, settings in reductions:
        yield name, {**rows, **settings}
    yield _special(term, rows)


def _special(term: str, rows: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What one loss term alone can do, or does without its defaults."""
    if term in ("cross_entropy", "sigmoid_cross_entropy"):
        weights = [1 + label / 4 for label in range(rows["logits"].shape[1])]
        if term == "sigmoid_cross_entropy":
            rows["labels"] = rows["labels"].where(torch.arange(len(rows["labels"])) % 5 > 0, -1)
        return "weighted classes", {**rows, "class_weight": weights, "ignore_index": 0, "avg_non_ignore": True}
    if term == "sigmoid_focal_loss":
        probabilities = rows["logits"].sigmoid().nan_to_num().clamp(1 / 64, 63 / 64)  # which rounding keeps in 0 to 1
        settings = {"activated": True, "gamma": 1.5, "alpha": 0.6, "reduction": "none"}
        return "probabilities", {**rows, "logits": probabilities, **settings}
    if term == "giou_loss":
        return "each pair", {**rows, "weight": rows["weight"][:, 0], "reduction": "none", "eps": 300.0}
    if term == "smooth_l1_loss":
        return "each number", {**rows, "beta": 1 / 9, "reduction": "none"}
    return "plain mean", {**rows, "weight": None}


def _canvas(operation: str, arguments: dict[str, Any]) -> Canvas | None:
    if operation not in ("anchor_head.assign", "anchor_head.loss", "anchor_head.ssd_loss"):
        return None
    anchors = arguments["anchors"]
    points, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:] - anchors[:, :2]).amin(1) / 2
    valid = arguments["gt_valid"]
    labels = arguments.get("gt_labels", torch.zeros_like(valid, dtype=torch.int64))
    height, width = points.amax(0).flip(0).tolist()
    return Canvas((height, width), arguments["gt_boxes"], labels, valid, points, sides)


SYSTEM = System(
    name="anchor_head",
    operations=(
        *operations_in(anchor_head_boxes),
        *operations_in(anchor_head_coder),
        *operations_in(anchor_head),
        *operations_in(anchor_head_terms),
        *operations_in(anchor_head_box_terms),
        *operations_in(anchor_head_loss),
        *operations_in(anchor_head_ssd),
        *(operation for operation in operations_in(boxes) if operation.name.endswith("_mmdet")),
    ),
    shared=frozenset({"anchors", "strides"}),
    native=native,
    arguments=_arguments,
    explain={
        "anchor_head.assign": explain.explain_assign,
        "anchor_head.loss": explain_loss.explain_loss,
        "anchor_head.ssd_loss": explain_loss.explain_ssd_loss,
    },
    loss_given={"anchor_head.loss": explain_loss.loss_given, "anchor_head.ssd_loss": explain_loss.ssd_loss_given},
    canvas=_canvas,
)
