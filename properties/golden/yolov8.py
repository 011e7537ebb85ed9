"""Which YOLOv8 oracle stage each recorded array is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, uncovered, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import yolov8, yolov8_loss
from detoracle.reference.boxes import iou_ultralytics
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.yolov8 import explain_assign, loss_given
from detoracle.reference.rounding import Bounded

__all__ = ["UNCHECKED", "replay"]

UNCHECKED = {"derived_*": "a hint of the recorder's, not upstream output"}

_ORACLE = "yolov8_doc"  # recordings of the releases that the oracle describes; all others are other flavours
_FLOAT = torch.float32
_SETTINGS = {"topk": "topk", "alpha": "alpha", "beta": "beta", "box_gain": "box", "cls_gain": "cls", "dfl_gain": "dfl"}
_UNIT_GAINS = {"box_gain": 1.0, "cls_gain": 1.0, "dfl_gain": 1.0}
_PARTS = ("box", "cls", "dfl")


def replay(scene: Recorded) -> Iterator[StageCheck]:
    """Replay one recorded scene through every stage of the YOLOv8 oracle.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck
        One for each recorded output, and one for the exception, if any. What a recording of another flavour does
        otherwise has the status ``flavour``: it is no oracle's.
    """
    stages = next(s for key, s in _KINDS.items() if scene.has(key))
    checks = []
    for check in stages(scene):
        checks.append(check)
        yield _judged(scene, check)
    for check in uncovered(scene, {check.stage for check in checks}, UNCHECKED):
        yield _judged(scene, check)


def _judged(scene: Recorded, check: StageCheck) -> StageCheck:
    if check.status == "different" and not scene.recording.startswith(_ORACLE):
        return replace(check, status="flavour")
    return check


def _bounded(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, _FLOAT)


# ------------------------------------------------------------------------------------------------ single functions
def _iou(scene: Recorded) -> Iterator[StageCheck]:
    first, second = scene.tensor("in/box1"), scene.tensor("in/box2")
    for mode in ("iou", "giou", "diou", "ciou"):
        for name, form in (("xywh", "cxcywh"), ("xyxy", "xyxy")):
            stage = f"{mode}.{name}"
            expected: Any = unchecked(iou_ultralytics)(_bounded(first), _bounded(second), form=form, mode=mode)
            yield within(stage, scene.tensor(f"out/{stage}"), expected)
            gradients: list[Tensor] = []
            for dtype in (torch.float64, _FLOAT):
                leaf = first.to(dtype).requires_grad_()
                iou = iou_ultralytics(leaf, second.to(dtype), form=form, mode=mode)
                gradients += torch.autograd.grad(iou.sum(), leaf)
            yield gradient(f"grad_box1.{stage}", scene.tensor(f"out/grad_box1.{stage}"), *gradients)


def _distances(scene: Recorded) -> Iterator[StageCheck]:
    points, boxes = _bounded(scene.tensor("in/anchors")), _bounded(scene.tensor("in/boxes"))
    for stage in scene.outputs:
        function, _, variant = stage.partition(".")
        got: Any
        if function == "bbox2dist":  # upstream names the last bin
            got = unchecked(yolov8_loss.bbox2dist)(points, boxes, reg_max=int(variant) + 1)
        elif function == "dist2bbox":
            form = {"xyxy": "xyxy", "xywh": "cxcywh"}[variant]
            got = yolov8_loss.dist2bbox(_bounded(scene.tensor("in/dist")), points, form=form)
        else:
            continue
        yield within(stage, scene.tensor(f"out/{stage}"), got)


def _distribution(scene: Recorded) -> Iterator[StageCheck]:
    target = scene.tensor("in/target")
    logits = scene.tensor("in/logits").reshape(len(target), -1)
    error = None
    gradients: list[Tensor] = []
    given = target.clone()
    try:
        for dtype in (torch.float64, _FLOAT):
            leaf = logits.to(dtype).requires_grad_()
            gradients += torch.autograd.grad(yolov8_loss.dfl_loss(leaf, given.to(dtype)).sum(), leaf)
    except UpstreamRaises as behaviour:
        error = behaviour
    yield raised(scene, error)
    if error is not None or scene.raises is not None:
        return
    expected: Any = unchecked(yolov8_loss.dfl_loss)(_bounded(logits), _bounded(target))
    yield within("dfl", scene.tensor("out/dfl"), expected[:, None])
    yield discrete("target_after_call", given, scene.tensor("out/target_after_call"))
    recorded = scene.tensor("out/grad_logits").reshape(logits.shape)
    yield gradient("grad_logits", recorded, *gradients)


# ------------------------------------------------------------------------------------------------------- losses
def _losses(scene: Recorded) -> Iterator[StageCheck]:
    arguments = _arguments(scene)
    error = None
    try:
        yolov8_loss.loss(**arguments)
    except UpstreamRaises as behaviour:
        error = behaviour
    yield raised(scene, error)
    yield from _inputs(scene, arguments)
    if error is not None or not scene.has("out/fg_mask"):
        return
    gt_index = torch.where(scene.tensor("out/fg_mask") > 0, scene.tensor("out/target_gt_idx").long(), -1)
    yield from _whole_assignment(scene, arguments, gt_index)
    if scene.has("out/mask_in_gts"):
        yield from _assignment(scene, arguments)
    yield from _targets(scene, gt_index)
    yield from _positives(scene, arguments, gt_index)
    yield from _sums(scene, arguments, gt_index)


def _arguments(scene: Recorded) -> dict[str, Any]:
    """Arguments of `yolov8_loss.loss`; upstream's flat ground truths are grouped by `yolov8.pad_targets`."""
    raw, strides = scene.tensors("in/feat"), scene.tensor("in/strides").tolist()
    batch_index = scene.tensor("in/batch_idx").long()
    gt_boxes, gt_labels, _ = yolov8.pad_targets(
        batch_index,
        scene.tensor("in/cls").long().flatten(),
        scene.tensor("in/bboxes"),
        batch_size=len(raw[0]),
        image_size=_image_size(raw, strides),
    )
    counts = torch.tensor([int((batch_index == image).sum()) for image in range(len(raw[0]))])
    settings = {**scene.config, **scene.info.get("cfg", {})}
    return {
        "raw": raw,
        "strides": strides,
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_valid": torch.arange(gt_boxes.shape[1]) < counts[:, None],
        "reg_max": int(scene.tensor("in/reg_max")),
        **{ours: settings[theirs] for ours, theirs in _SETTINGS.items()},
    }


def _image_size(raw: list[Tensor], strides: list[int]) -> tuple[int, int]:
    return raw[0].shape[2] * strides[0], raw[0].shape[3] * strides[0]


def _bounded_head(arguments: dict[str, Any]) -> Any:
    raw: Any = [_bounded(level) for level in arguments["raw"]]
    return yolov8_loss._head(raw, arguments["strides"], arguments["reg_max"])


def _inputs(scene: Recorded, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Anchor points, padded ground truths and decoded boxes."""
    raw, strides = arguments["raw"], arguments["strides"]
    if scene.has("out/anchor_points"):
        points, anchor_strides = yolov8.anchor_points(raw, strides)
        yield discrete("anchor_points", points, scene.tensor("out/anchor_points"))
        yield discrete("stride_tensor", anchor_strides[:, None], scene.tensor("out/stride_tensor"))
    if scene.has("out/targets"):
        boxes: Any
        boxes, labels, _ = unchecked(yolov8.pad_targets)(
            scene.tensor("in/batch_idx").long(),
            scene.tensor("in/cls").long().flatten(),
            _bounded(scene.tensor("in/bboxes")),
            batch_size=len(raw[0]),
            image_size=_image_size(raw, strides),
        )
        rows: Any = torch.cat([_bounded(labels[..., None]), boxes], dim=-1)
        yield within("targets", scene.tensor("out/targets"), rows)
    if scene.has("out/mask_gt"):
        counted: Any = yolov8.counted_ground_truths(_bounded(arguments["gt_boxes"]), arguments["gt_valid"])
        yield discrete("mask_gt", counted[..., None], scene.tensor("out/mask_gt"), open_=counted.ambiguous[..., None])
    if scene.has("out/pred_bboxes"):
        yield within("pred_bboxes", scene.tensor("out/pred_bboxes"), _bounded_head(arguments).boxes)


def _whole_assignment(scene: Recorded, arguments: dict[str, Any], gt_index: Tensor) -> Iterator[StageCheck]:
    """The assignment from the raw maps on: equal to the oracle's, or explained by rounding and ties."""
    head, boxes = _bounded_head(arguments), _bounded(arguments["gt_boxes"])
    explanation = explain_assign(
        torch.sigmoid(head.cls_logits),
        head.boxes * head.strides,
        head.points * head.strides,
        boxes,
        arguments["gt_labels"],
        yolov8.counted_ground_truths(boxes, arguments["gt_valid"]),
        **{name: arguments[name] for name in ("topk", "alpha", "beta")},
    )
    open_ = explanation.ambiguous & ~explanation.wrong(gt_index)
    yield discrete("fg_mask", explanation.gt_index >= 0, scene.tensor("out/fg_mask"), open_=open_)
    got = torch.where(scene.tensor("out/fg_mask") > 0, explanation.gt_index, 0)
    yield discrete("target_gt_idx", got, scene.tensor("out/target_gt_idx"), open_=open_)


def _recorded_inputs(scene: Recorded) -> dict[str, Tensor]:
    """Recorded inputs of the assignment."""
    targets, strides = scene.tensor("out/targets"), scene.tensor("out/stride_tensor")
    return {
        "boxes": scene.tensor("out/pred_bboxes") * strides,
        "anchor_points": scene.tensor("out/anchor_points") * strides,
        "gt_boxes": targets[..., 1:],
        "gt_labels": targets[..., 0].long(),
        "gt_valid": scene.tensor("out/mask_gt")[..., 0] > 0,
    }


def _assignment(scene: Recorded, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Each stage of the assignment from the recorded results of the stage before."""
    given = _recorded_inputs(scene)
    metric: Any
    overlaps: Any
    in_gt: Any
    metric, overlaps, in_gt = unchecked(yolov8.align)(
        torch.sigmoid(_bounded_head(arguments).cls_logits),
        **{name: _bounded(t) if t.is_floating_point() else t for name, t in given.items()},
        alpha=arguments["alpha"],
        beta=arguments["beta"],
    )
    recorded = {name: scene.tensor(f"out/{name}") for name in ("align_metric", "overlaps", "mask_in_gts", "mask_topk")}
    yield discrete("mask_in_gts", in_gt, recorded["mask_in_gts"], open_=in_gt.ambiguous)
    yield within("align_metric", recorded["align_metric"], metric)
    yield within("overlaps", recorded["overlaps"], overlaps)

    order = recorded["align_metric"].nan_to_num(nan=torch.inf)  # NaN comes first
    topk, valid = arguments["topk"], given["gt_valid"]
    claims = torch.stack([yolov8._claim(m, v, topk) for m, v in zip(order, valid, strict=True)])
    kth = order.topk(topk, dim=-1).values[..., -1:]
    tied = (order == kth) & ((order >= kth).sum(-1, keepdim=True) > topk)
    same_count = claims.sum(-1, keepdim=True) == recorded["mask_topk"].sum(-1, keepdim=True)
    yield discrete("mask_topk", claims, recorded["mask_topk"], open_=tied & same_count)
    if scene.has("out/derived_topk_ambiguous"):
        inside = tied & recorded["mask_in_gts"] & valid[..., None]
        yield discrete("derived_topk_ambiguous", inside, scene.tensor("out/derived_topk_ambiguous"))
    before = recorded["mask_topk"].bool() & recorded["mask_in_gts"] & valid[..., None]
    yield discrete("mask_pos_before", before, scene.tensor("out/mask_pos_before"))
    before = scene.tensor("out/mask_pos_before").bool()
    gt_index = torch.stack([yolov8._resolve(*image) for image in zip(before, recorded["overlaps"], strict=True)])
    positive = gt_index[:, None] == torch.arange(before.shape[1])[:, None]
    yield discrete("mask_pos", positive, scene.tensor("out/mask_pos"))
    yield discrete("fg_count", gt_index >= 0, scene.tensor("out/fg_count"))


def _targets(scene: Recorded, gt_index: Tensor) -> Iterator[StageCheck]:
    """Training targets of the recorded assignment."""
    given = _recorded_inputs(scene)
    num_classes = int(scene.tensor("in/nc"))
    empty = torch.zeros(len(gt_index), 0, gt_index.shape[1])
    metric, overlaps = (
        _bounded(scene.tensor(f"out/{name}") if scene.has(f"out/{name}") else empty)
        for name in ("align_metric", "overlaps")
    )
    quality: Any = yolov8._quality(gt_index, metric, overlaps)
    scores: Any
    labels, boxes, scores = yolov8._targets(gt_index, quality, given["gt_boxes"], given["gt_labels"], num_classes)
    yield discrete("target_labels", labels, scene.tensor("out/target_labels"))
    yield discrete("target_bboxes", boxes, scene.tensor("out/target_bboxes"))
    if scene.has("out/target_onehot"):
        one = torch.ones_like(gt_index)
        one_hot = yolov8._targets(gt_index, one, given["gt_boxes"], given["gt_labels"], num_classes)[2]
        yield discrete("target_onehot", one_hot, scene.tensor("out/target_onehot"))
    scores = _bounded(scores) if isinstance(scores, Tensor) else scores
    yield within("target_scores", scene.tensor("out/target_scores"), scores)
    if scene.has("out/target_scores_sum"):
        total = _bounded(scene.tensor("out/target_scores")).sum().clamp(min=1)
        yield within("target_scores_sum", scene.tensor("out/target_scores_sum"), total)


def _positives(scene: Recorded, arguments: dict[str, Any], gt_index: Tensor) -> Iterator[StageCheck]:
    """Unreduced losses of the recorded positives."""
    positive = gt_index >= 0
    anchor, bins = positive.nonzero()[:, 1], arguments["reg_max"]
    strides = scene.tensor("out/stride_tensor")[anchor]
    target = _bounded(scene.tensor("out/target_bboxes")[positive]) / strides
    expected: Any
    if scene.has("out/loss_ciou"):
        predicted = _bounded(scene.tensor("out/pred_bboxes")[positive])
        expected = unchecked(iou_ultralytics)(predicted, target, mode="ciou")
        yield within("loss_ciou", scene.tensor("out/loss_ciou"), expected)
    if scene.has("out/target_ltrb_fg"):
        points = _bounded(scene.tensor("out/anchor_points")[anchor])
        expected = unchecked(yolov8_loss.bbox2dist)(points, target, reg_max=bins)
        yield within("target_ltrb_fg", scene.tensor("out/target_ltrb_fg"), expected)
    if scene.has("out/dfl"):
        distances = _bounded(scene.tensor("out/target_ltrb_fg"))
        logits = _bounded_head(arguments).box_logits[positive]
        expected = unchecked(yolov8_loss.dfl_loss)(logits, distances)
        yield within("dfl", scene.tensor("out/dfl"), expected[:, None])


def _sums(scene: Recorded, arguments: dict[str, Any], gt_index: Tensor) -> Iterator[StageCheck]:
    """Parts, total and gradients of the recorded assignment, from the raw maps on."""
    for suffix, changed in (("", {}), ("_unit_gains", _UNIT_GAINS)):
        bounded = loss_given(gt_index, **{**arguments, **changed})
        bounded = {name: _bounded(part) if isinstance(part, Tensor) else part for name, part in bounded.items()}
        parts: Any = torch.stack([bounded[name] for name in _PARTS])
        yield within(f"parts{suffix}", scene.tensor(f"out/parts{suffix}"), parts)
        yield within(f"total{suffix}", scene.tensor(f"out/total{suffix}"), bounded["total"])
        for name in ("box", "dfl"):
            if changed and scene.has(f"out/raw_{name}"):
                yield within(f"raw_{name}", scene.tensor(f"out/raw_{name}"), bounded[name])
        if not suffix:
            shape = torch.tensor(bounded["total"].shape, dtype=torch.int64)
            yield discrete("returned_shape", shape, scene.tensor("out/returned_shape"))
    gradients = []
    for dtype in (torch.float64, _FLOAT):
        leaves = [level.to(dtype).requires_grad_() for level in arguments["raw"]]
        inputs = {**arguments, "raw": leaves, "gt_boxes": arguments["gt_boxes"].to(dtype)}
        gradients.append(torch.autograd.grad(loss_given(gt_index, **inputs, dtype=None)["total"], leaves))
    for level, (exact, plain) in enumerate(zip(*gradients, strict=True)):
        yield gradient(f"grad.{level}", scene.tensor(f"out/grad.{level}"), exact, plain)


_KINDS = {"in/box1": _iou, "in/dist": _distances, "in/logits": _distribution, "in/feat.0": _losses}
