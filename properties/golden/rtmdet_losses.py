"""Which RTMDet oracle stage each recorded array of a loss is, from priors to gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import anchor_head_boxes, rtmdet, rtmdet_loss, yolox, yolox_cost
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import rtmdet as explain
from detoracle.reference.explain.rtmdet_assignment import _quality
from detoracle.reference.rounding import Bounded

__all__ = ["arguments_of_loss", "assignment_stages", "loss_stages", "losses"]

_SETTINGS = {
    "offset": "offset",
    "allowed_border": "allowed_border",
    "topk": "topk",
    "soft_center_radius": "soft_center_radius",
    "iou_weight": "iou_weight",
    "pos_weight": "pos_weight",
    "beta": "beta",
    "class_loss_weight": "cls_weight",
    "box_loss_weight": "bbox_weight",
    "giou_eps": "giou_eps",
}
_GROUND_TRUTHS = ("gt_boxes", "gt_labels", "gt_valid")


def _exact(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    return Bounded.exact(tensor, dtype)


def losses(scene: Recorded) -> Iterator[StageCheck]:
    """Replay a recorded loss.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck
        One for the exception, if any, and one for each recorded output.
    """
    error, parts, arguments = None, {}, {}
    try:
        arguments = arguments_of_loss(scene)
        for level in (*arguments["class_logits"], *arguments["distances"]):
            level.requires_grad_()
        with _autocast(scene):
            parts = rtmdet_loss.loss(**arguments)
    except UpstreamRaises as behaviour:
        error = behaviour
    yield raised(scene, error)
    if error is None:
        yield from assignment_stages(scene, arguments)
        yield from loss_stages(scene, arguments, parts)


def _autocast(scene: Recorded) -> AbstractContextManager[object]:
    name = scene.info["cfg"].get("autocast")
    return torch.autocast("cpu", dtype=getattr(torch, name)) if name else nullcontext()


def _grouped(scene: Recorded) -> bool:
    """Was it one of several processes that took a common mean?"""
    return "ddp" in scene.info["tags"]


def arguments_of_loss(scene: Recorded) -> dict[str, Any]:
    """Arguments of `rtmdet_loss.loss` from a recording; after a head network, from what the network gave.

    Parameters
    ----------
    scene : Recorded

    Returns
    -------
    dict
        Ground truths padded to the same number.

    Raises
    ------
    UpstreamRaises
        ``rtmdet.box-type``: recorded with ground truths that are no plain tensors, of which upstream raises.
    """
    config = {**scene.config, **scene.info["cfg"]}
    if config["gt_type"] != "tensor":
        raise UpstreamRaises(
            "rtmdet.box-type", expected="ground truths as plain tensors", got=config["gt_type"], where="rtmdet.loss"
        )
    dtype = getattr(torch, config["dtype"])
    images, classes = scene.tensors("in/gt_bboxes"), scene.tensors("in/gt_labels")
    most = max(len(rows) for rows in images)
    given: dict[str, Any] = {
        "class_logits": [level.to(dtype) for level in scene.tensors("in/cls_scores") or scene.tensors("out/train_cls")],
        "distances": [level.to(dtype) for level in scene.tensors("in/bbox_preds") or scene.tensors("out/train_bbox")],
        "strides": config["strides"],
        "gt_boxes": _padded(images, most),
        "gt_labels": _padded(classes, most),
        "gt_valid": torch.stack([torch.arange(most) < len(rows) for rows in images]),
        "pad_shapes": scene.tensor("in/pad_shape"),
        "image_shapes": scene.tensor("in/img_shape"),
        **{name: config[recorded] for name, recorded in _SETTINGS.items()},
    }
    for name, recorded in (("gt_masks", "in/gt_masks"), ("ignored_boxes", "in/gt_ignore")):
        if scene.has(f"{recorded}.0"):
            rows = scene.tensors(recorded)
            given[name] = _padded(rows, max(len(r) for r in rows))
    return given


def _padded(images: list[Tensor], most: int) -> Tensor:
    return torch.stack([torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) for rows in images])


def assignment_stages(scene: Recorded, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Compare everything up to the targets, each stage from the recorded results of the one before.

    Parameters
    ----------
    scene : Recorded
    arguments : dict
        From `arguments_of_loss`.

    Yields
    ------
    StageCheck
    """
    logits, distances = ([level.detach() for level in arguments[name]] for name in ("class_logits", "distances"))
    sizes = [(level.shape[2], level.shape[3]) for level in logits]
    strides = arguments["strides"]
    points = scene.tensor("out/grid_priors")
    yield discrete("grid_priors", rtmdet.priors(sizes, strides, offset=arguments["offset"]), points)
    counts = [height * width for height, width in sizes]
    yield discrete("num_level_anchors", torch.tensor(counts), scene.tensor("out/num_level_anchors"))
    valid = anchor_head_boxes.valid_flags(
        arguments["pad_shapes"], sizes=sizes, strides=strides, base_anchors=[1] * len(sizes)
    )
    inside = anchor_head_boxes.inside_flags(
        points, valid, arguments["image_shapes"], allowed_border=arguments["allowed_border"]
    )
    boxes = explain._boxes(points, distances, torch.float32)
    for image in range(len(valid)):
        yield discrete(f"valid_flags.{image}", valid[image], scene.tensor(f"out/valid_flags.{image}"))
        yield discrete(f"inside_flags.{image}", inside[image], scene.tensor(f"out/inside_flags.{image}"))
        yield within(f"decoded_bboxes.{image}", scene.tensor(f"out/decoded_bboxes.{image}"), boxes[image])

    flat, decoded = rtmdet_loss._flatten(logits), torch.stack(scene.tensors("out/decoded_bboxes"))
    gt_index = torch.full(inside.shape, -2)
    gt_index[inside] = torch.cat(scene.tensors("out/assigned_gt_inds")) - 1
    for image in range(len(valid)):
        yield from _costs(scene, image, flat[image], decoded[image], points, inside[image], arguments)
    yield from _assignment(scene, gt_index, flat, decoded, points, inside, arguments)
    yield from _targets(scene, gt_index, decoded, counts, flat.shape[-1], arguments)


def _costs(
    scene: Recorded,
    image: int,
    logits: Tensor,
    decoded: Tensor,
    points: Tensor,
    inside: Tensor,
    arguments: dict[str, Any],
) -> Iterator[StageCheck]:
    """Candidates, cost, dynamic k and claims of one image; recorded matrices are candidates by ground truths."""
    if not scene.has(f"out/is_in_gts.{image}"):
        return
    valid = arguments["gt_valid"][image]
    gt_boxes, labels = arguments["gt_boxes"][image, valid], arguments["gt_labels"][image, valid]

    def recorded(name: str) -> Tensor:
        return scene.tensor(f"out/{name}.{image}").T

    near: Any = yolox_cost._inside(_exact(points[inside, :2]), _exact(gt_boxes)[:, None])
    yield discrete(f"is_in_gts.{image}", near.value.T, recorded("is_in_gts").T, open_=near.ambiguous.T)
    if not scene.has(f"out/cost_matrix.{image}"):
        return
    candidate = inside.clone()
    candidate[inside] = recorded("is_in_gts").any(0)
    masks = arguments["gt_masks"][image, valid] if "gt_masks" in arguments else None
    centers: Any = rtmdet._centers(_exact(gt_boxes), None if masks is None else _exact(masks))
    yield within(f"gt_center.{image}", recorded("gt_center").T, centers)
    distance: Any = rtmdet._distance(_exact(points[candidate]), _exact(recorded("gt_center").T))
    radius, iou_weight = arguments["soft_center_radius"], arguments["iou_weight"]
    given: dict[str, Any] = {
        "logits": _exact(logits[candidate], logits.dtype),
        "iou": _exact(recorded("pairwise_ious")),
    }
    cost, iou = rtmdet._cost(
        given["logits"],
        _exact(decoded[candidate]),
        _exact(points[candidate]),
        _exact(gt_boxes),
        labels,
        centers,
        radius,
        iou_weight,
    )
    stages: dict[str, Any] = {
        "distance": distance,
        "soft_center_prior": rtmdet._distance_cost(_exact(recorded("distance")), radius),
        "pairwise_ious": iou,
        "iou_cost": rtmdet._iou_cost(given["iou"], iou_weight),
        "soft_cls_cost": rtmdet._class_cost(given["logits"], labels, given["iou"]),
        "cost_matrix": cost,
    }
    for name, bounded in stages.items():
        yield within(f"{name}.{image}", recorded(name), bounded)

    recorded_iou, recorded_cost = recorded("pairwise_ious"), recorded("cost_matrix")
    best = recorded_iou.topk(min(arguments["topk"], recorded_iou.shape[1]), dim=1).values
    yield discrete(f"topk_ious.{image}", best.nan_to_num(nan=-1.0), recorded("topk_ious").nan_to_num(nan=-1.0))
    k = scene.tensor(f"out/dynamic_ks.{image}").long()
    yield discrete(f"dynamic_ks.{image}", rtmdet._dynamic_k(recorded_iou, arguments["topk"]), k)
    claims, before = yolox._claim(recorded_cost, k), recorded("matching_before")
    kth = recorded_cost.sort(dim=1).values.gather(1, (k - 1)[:, None])
    same_count = claims.sum(1, keepdim=True) == before.sum(1, keepdim=True)
    yield discrete(f"matching_before.{image}", claims, before, open_=(recorded_cost == kth) & same_count)
    winner = yolox._resolve(before, recorded_cost)
    after = winner == torch.arange(len(k))[:, None]
    yield discrete(f"matching_after.{image}", after, recorded("matching_after"))


def _assignment(
    scene: Recorded,
    recorded: Tensor,
    logits: Tensor,
    decoded: Tensor,
    points: Tensor,
    inside: Tensor,
    arguments: dict[str, Any],
) -> Iterator[StageCheck]:
    """Result of all images, from the recorded predictions."""
    names = ("gt_masks", "topk", "soft_center_radius", "iou_weight")
    given = {
        "class_logits": logits,
        "boxes": decoded,
        "priors": points,
        "inside": inside,
        **{name: arguments[name] for name in (*_GROUND_TRUTHS, *names) if name in arguments},
    }
    with _autocast(scene):
        assignment = rtmdet.assign(**given)
    explanation = explain.explain_assign(**given, dtype=logits.dtype)
    open_ = explanation.ambiguous & ~explanation.wrong(recorded)
    # Of the recorded assignment, not of the oracle's: where rounding decides, they may differ.
    quality = _quality(_exact(decoded), _exact(arguments["gt_boxes"]), recorded)
    for image, took_part in enumerate(inside):
        got, want = assignment.gt_index[image, took_part], recorded[image, took_part]
        yield discrete(f"assigned_gt_inds.{image}", got + 1, want + 1, open_=open_[image, took_part])
        matched = want[want >= 0]
        labels = torch.full_like(want, -1)
        labels[want >= 0] = arguments["gt_labels"][image, matched]
        stages = {
            "assigned_labels": labels,
            "pos_inds": (want >= 0).nonzero().flatten(),
            "neg_inds": (want == -1).nonzero().flatten(),
            "matched_gt_inds": matched,
        }
        for name, result in stages.items():
            if scene.has(f"out/{name}.{image}"):
                yield discrete(f"{name}.{image}", result, scene.tensor(f"out/{name}.{image}"))
        positive = recorded[image] >= 0
        if scene.has(f"out/matched_pred_ious.{image}"):
            stage = f"matched_pred_ious.{image}"
            yield within(stage, scene.tensor(f"out/{stage}"), quality[image, positive])
        unmatched = assignment.extra["max_overlaps"][image].amin().clamp(max=0)
        overlaps: Any = torch.where(positive, quality[image], unmatched)
        stage = f"max_overlaps.{image}"
        yield within(stage, scene.tensor(f"out/{stage}"), overlaps[took_part])


def _targets(
    scene: Recorded, gt_index: Tensor, decoded: Tensor, counts: list[int], num_classes: int, arguments: dict[str, Any]
) -> Iterator[StageCheck]:
    """Training targets of the recorded assignment, level by level."""
    gt_boxes = arguments["gt_boxes"]
    quality = _quality(_exact(decoded), _exact(gt_boxes), gt_index)
    labels, weights, boxes, metrics = rtmdet_loss._targets(
        gt_index,
        quality,
        gt_boxes,
        arguments["gt_labels"],
        num_classes=num_classes,
        pos_weight=arguments["pos_weight"],
    )
    for name, exact in (("labels", labels), ("label_weights", weights), ("bbox_targets", boxes)):
        for level, result in enumerate(exact.split(counts, dim=1)):
            yield discrete(f"{name}.{level}", result, scene.tensor(f"out/{name}.{level}"))
    for level, bounded in enumerate(metrics.split(counts, dim=1)):
        yield within(f"assign_metrics.{level}", scene.tensor(f"out/assign_metrics.{level}"), bounded)


def loss_stages(scene: Recorded, arguments: dict[str, Any], parts: dict[str, Tensor]) -> Iterator[StageCheck]:
    """Compare losses before and after normalisation, and gradients, of the recorded assignment.

    Parameters
    ----------
    scene : Recorded
    arguments : dict
        From `arguments_of_loss`; the maps require gradients.
    parts : dict of str to Tensor
        What the oracle's loss returned for them.

    Yields
    ------
    StageCheck
    """
    inside = torch.stack(scene.tensors("out/inside_flags"))
    gt_index = torch.full(inside.shape, -2)
    gt_index[inside] = torch.cat(scene.tensors("out/assigned_gt_inds")) - 1
    leaves = [*arguments["class_logits"], *arguments["distances"]]
    detached = {**arguments}
    for name in ("class_logits", "distances"):
        detached[name] = [level.detach() for level in arguments[name]]
    dtype = leaves[0].dtype
    levels: Any = explain.levels_given(gt_index, **detached, dtype=dtype)
    for number, level in enumerate(levels):
        stages = zip(
            ("raw_loss_cls", "raw_loss_bbox", "cls_avg_factor_part", "bbox_avg_factor_part"), level, strict=True
        )
        for name, bounded in stages:
            yield within(f"{name}.{number}", scene.tensor(f"out/{name}.{number}"), bounded)
    recorded = [scene.tensor(f"out/{name}_avg_factor") for name in ("cls", "bbox")]
    yield from _factors(scene, recorded, levels)
    factors = (float(recorded[0]), float(recorded[1]))
    bounded = explain.loss_given(gt_index, **detached, average_factors=factors, dtype=dtype)
    yield within("loss_total", scene.tensor("out/loss_total"), bounded["total"])
    with _autocast(scene):
        explanation = explain.explain_loss(**detached, dtype=dtype)
    if not _grouped(scene) and torch.equal(explanation.gt_index, gt_index):
        yield within("loss_total", parts["total"].detach(), bounded["total"])  # from the raw predictions to the end
    for stage, part in (("loss_cls", "classification"), ("loss_bbox", "box")):
        for number in range(len(levels)):
            yield within(f"{stage}.{number}", scene.tensor(f"out/{stage}.{number}"), bounded[part][number])
    if scene.has("out/grad_cls.0"):
        yield from _gradients(scene, gt_index, arguments, detached, factors)


def _factors(scene: Recorded, recorded: list[Tensor], levels: Any) -> Iterator[StageCheck]:
    """Average factors: what the levels add up to; in a group, what the recorded losses were divided by."""
    local_factors: Any = rtmdet_loss._average_factors(levels)
    for number, name in enumerate(("cls", "bbox")):
        stage = f"{name}_avg_factor"
        losses = torch.stack(scene.tensors(f"out/loss_{name}")).double()
        if not _grouped(scene):
            yield within(stage, recorded[number], local_factors[number].clamp(min=1))
        elif losses.any():
            undivided: Any = torch.stack([level[number] for level in levels])
            yield within(stage, recorded[number], undivided.sum() / losses.sum())
        else:
            yield StageCheck(stage, "unchecked", "a mean over processes, of which this one has no loss to tell it")


def _gradients(
    scene: Recorded,
    gt_index: Tensor,
    arguments: dict[str, Any],
    detached: dict[str, Any],
    factors: tuple[float, float],
) -> Iterator[StageCheck]:
    leaves = [*arguments["class_logits"], *arguments["distances"]]
    double = {
        name: [level.double().requires_grad_() for level in detached[name]] for name in ("class_logits", "distances")
    }
    in_double = {**detached, **double, "gt_boxes": arguments["gt_boxes"].double()}
    exact_total = explain.loss_given(gt_index, **in_double, average_factors=factors, dtype=None)["total"]
    with _autocast(scene):
        plain_total = explain.loss_given(gt_index, **arguments, average_factors=factors, dtype=None)["total"]
    exact = torch.autograd.grad(exact_total, [*double["class_logits"], *double["distances"]])  # type: ignore[call-overload]
    plain = torch.autograd.grad(plain_total, leaves)  # type: ignore[call-overload]
    names = [f"{name}.{level}" for name in ("grad_cls", "grad_bbox") for level in range(len(leaves) // 2)]
    for stage, fine, coarse in zip(names, exact, plain, strict=True):
        yield gradient(stage, scene.tensor(f"out/{stage}"), fine, coarse)
