"""Which YOLOX oracle stage each recorded array is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, uncovered, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import yolox, yolox_cost, yolox_loss
from detoracle.reference.boxes import iou_loss_yolox
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.yolox import explain_assign, loss_given
from detoracle.reference.rounding import Bounded

__all__ = ["UNCHECKED", "replay"]

UNCHECKED = {"derived_*": "a hint of the recorder's, not upstream output"}

_FLOAT = torch.float32
_PARTS = {"loss_iou": "box", "loss_obj": "objectness", "loss_cls": "classification", "loss_l1": "l1", "loss": "total"}


def replay(scene: Recorded) -> Iterator[StageCheck]:
    """Replay one recorded scene through every stage of the YOLOX oracle.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck
        One for each recorded output, and one for the exception, if any.
    """
    checks = []
    for check in _stages(scene):
        checks.append(check)
        yield check
    yield from uncovered(scene, {check.stage for check in checks}, UNCHECKED)


def _stages(scene: Recorded) -> Iterator[StageCheck]:
    arguments = _arguments(scene)
    raw, strides = arguments["raw"], arguments["strides"]
    flavour = arguments["flavour"]
    for level in raw:
        level.requires_grad_()
    error, parts = None, {}
    try:
        parts = yolox_loss.loss(**arguments)
    except UpstreamRaises as behaviour:
        error = behaviour
    yield raised(scene, error)
    yield from _decoding(scene, [level.detach() for level in raw], strides)
    if scene.has("out/labels"):
        yield _labels(scene, arguments)
    if not scene.has("out/decoded"):
        return

    predictions = scene.tensor("out/decoded")
    cells, points, anchor_strides = yolox.anchor_grid(_sizes(raw), strides, like=predictions)
    ground_truths = {name: arguments[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    counted = yolox.counted_ground_truths(**ground_truths, flavour=flavour)
    for image, valid in enumerate(counted):
        if scene.has(f"out/cand_mask.{image}"):
            yield from _image(scene, image, valid, predictions[image], points, anchor_strides, ground_truths, flavour)
    if error is not None:
        return

    assignment = yolox.assign(predictions, points, anchor_strides, **ground_truths, flavour=flavour)
    explanation = explain_assign(predictions, points, anchor_strides, **ground_truths, flavour=flavour)
    recorded = assignment.gt_index.clone()
    for image in range(len(recorded)):
        if not scene.has(f"out/fg.{image}"):
            continue
        positive, given = scene.tensor(f"out/fg.{image}"), counted[image].nonzero().flatten()
        recorded[image] = -1
        recorded[image, positive] = given[scene.tensor(f"out/matched_gt.{image}")]
        open_ = explanation.ambiguous[image] & ~explanation.wrong(recorded)[image]
        yield discrete(f"fg.{image}", assignment.positive[image], positive, open_=open_)
        stage = f"matched_gt.{image}"
        yield StageCheck(stage, discrete(stage, assignment.gt_index[image], recorded[image], open_=open_).status)
        labels = arguments["gt_labels"][image, recorded[image, positive]]
        yield discrete(f"matched_cls.{image}", labels, scene.tensor(f"out/matched_cls.{image}"))
        yield discrete(f"num_fg.{image}", (recorded[image] >= 0).sum(), scene.tensor(f"out/num_fg.{image}"))
    quality = explanation.quality(recorded)
    for image in range(len(recorded)):
        if scene.has(f"out/matched_iou.{image}"):
            stage = f"matched_iou.{image}"
            yield within(stage, scene.tensor(f"out/{stage}"), quality[image, recorded[image] >= 0])
    yield from _targets(scene, recorded, quality, arguments, cells, anchor_strides)
    yield from _losses(scene, recorded, arguments, parts)


def _arguments(scene: Recorded) -> dict[str, Any]:
    """Arguments of `yolox.loss`."""
    raw = scene.tensors("in/raw")
    images = scene.tensors("in/gt")
    most = max(len(rows) for rows in images)
    boxes = torch.zeros(len(images), most, 4)
    labels = torch.zeros(len(images), most, dtype=torch.int64)
    valid = torch.zeros(len(images), most, dtype=torch.bool)
    for image, rows in enumerate(images):
        boxes[image, : len(rows)], labels[image, : len(rows)] = rows[:, :4], rows[:, 4].long()
        valid[image, : len(rows)] = True
    return {
        "raw": raw,
        "strides": scene.tensor("in/strides").tolist(),
        "gt_boxes": boxes,
        "gt_labels": labels,
        "gt_valid": valid,
        "flavour": "tutorial"
        if scene.config["center_radius"] == yolox_cost.FLAVOURS["tutorial"].center_radius
        else "official",
        "use_l1": scene.has("in/use_l1") and bool(scene.tensor("in/use_l1")),
    }


def _sizes(raw: list[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in raw]


def _bounded(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, _FLOAT)


def _decoding(scene: Recorded, raw: list[Tensor], strides: list[int]) -> Iterator[StageCheck]:
    if not scene.has("out/decoded"):
        return
    decoded: Any = yolox._decode([_bounded(level) for level in raw], strides)
    yield within("decoded", scene.tensor("out/decoded"), decoded)
    cells, _, anchor_strides = yolox.anchor_grid(_sizes(raw), strides, like=raw[0])
    for stage, got in (("x_shift", cells[:, 0]), ("y_shift", cells[:, 1]), ("stride", anchor_strides)):
        yield discrete(stage, got, scene.tensor(f"out/{stage}"))


def _labels(scene: Recorded, arguments: dict[str, Any]) -> StageCheck:
    """The official flavours' padded label rows: class, cx, cy, w, h, the valid ones first."""
    recorded = scene.tensor("out/labels")
    rows = torch.cat([arguments["gt_labels"][..., None].float(), arguments["gt_boxes"]], dim=-1)
    given = torch.zeros_like(recorded)
    given[:, : rows.shape[1]] = rows * arguments["gt_valid"][..., None]
    return discrete("labels", given, recorded)


def _image(
    scene: Recorded,
    image: int,
    valid: Tensor,
    predictions: Tensor,
    points: Tensor,
    anchor_strides: Tensor,
    ground_truths: dict[str, Tensor],
    flavour: str,
) -> Iterator[StageCheck]:
    """Candidates, cost, dynamic k and claims of one image, each from the recorded results of the stage before."""
    rules = yolox_cost.FLAVOURS[flavour]
    boxes, labels = ground_truths["gt_boxes"][image, valid], ground_truths["gt_labels"][image, valid]
    near: Any
    preferred: Any
    near, preferred = yolox_cost._candidates(_bounded(points), _bounded(anchor_strides), _bounded(boxes), rules)
    mask = scene.tensor(f"out/cand_mask.{image}")
    yield discrete(f"cand_mask.{image}", near.any(0), mask, open_=near.any(0).ambiguous)
    if not scene.has(f"out/geom.{image}"):
        return
    geometry = scene.tensor(f"out/geom.{image}")
    preferred = preferred[:, mask]
    yield discrete(f"geom.{image}", preferred, geometry, open_=preferred.ambiguous)
    if not scene.has(f"out/cost.{image}"):
        return
    # The recorder's cost terms: without the penalty, a pair's cost is classification and 3 times IoU.
    cost: Any
    iou: Any
    cost, iou = yolox_cost._cost(_bounded(predictions[mask]), _bounded(boxes), labels, geometry, rules, where="golden")
    yield within(f"iou.{image}", scene.tensor(f"out/iou.{image}"), iou)
    class_cost: Any = yolox_cost._class_cost(_bounded(predictions[mask]), labels, where="golden")
    yield within(f"cls_cost.{image}", scene.tensor(f"out/cls_cost.{image}"), class_cost)
    yield within(f"cost.{image}", scene.tensor(f"out/cost.{image}"), cost)
    if not scene.has(f"out/k.{image}"):
        return
    recorded_iou, recorded_cost = scene.tensor(f"out/iou.{image}"), scene.tensor(f"out/cost.{image}")
    top = recorded_iou.topk(min(10, recorded_iou.shape[1]), dim=1).values
    yield discrete(
        f"topk_iou.{image}", top.nan_to_num(nan=-1.0), scene.tensor(f"out/topk_iou.{image}").nan_to_num(nan=-1.0)
    )
    k = scene.tensor(f"out/k.{image}")
    yield discrete(f"k.{image}", yolox._dynamic_k(recorded_iou), k)
    claims, recorded = yolox._claim(recorded_cost, k), scene.tensor(f"out/match_before.{image}")
    kth = recorded_cost.sort(dim=1).values.gather(1, (k - 1)[:, None])
    same_count = claims.sum(1, keepdim=True) == recorded.sum(1, keepdim=True)
    yield discrete(f"match_before.{image}", claims, recorded, open_=(recorded_cost == kth) & same_count)


def _targets(
    scene: Recorded,
    gt_index: Tensor,
    quality: Bounded,
    arguments: dict[str, Any],
    cells: Tensor,
    anchor_strides: Tensor,
) -> Iterator[StageCheck]:
    """Training targets of the recorded assignment."""
    positive = gt_index >= 0
    image, anchor = positive.nonzero(as_tuple=True)
    matched = gt_index[positive]
    boxes, labels = arguments["gt_boxes"][image, matched], arguments["gt_labels"][image, matched]
    if scene.has("out/t_obj"):
        yield discrete("t_obj", positive.reshape(-1, 1), scene.tensor("out/t_obj"))
    if scene.has("out/t_box"):
        yield discrete("t_box", boxes, scene.tensor("out/t_box"))
    if scene.has("out/t_cls"):
        one_hot = (labels[:, None] == torch.arange(int(scene.tensor("in/nc")))).float()
        yield within("t_cls", scene.tensor("out/t_cls"), quality[image, anchor][:, None] * one_hot)
    if scene.has("out/t_l1"):
        target: Any = yolox_loss._l1_target(_bounded(boxes), cells[anchor], anchor_strides[anchor])
        yield within("t_l1", scene.tensor("out/t_l1"), target)
    if scene.has("out/l_iou"):
        predicted = _bounded(scene.tensor("out/decoded")[image, anchor, :4])
        loss: Any = unchecked(iou_loss_yolox)(predicted, _bounded(boxes))
        yield within("l_iou", scene.tensor("out/l_iou"), loss)


def _losses(
    scene: Recorded, gt_index: Tensor, arguments: dict[str, Any], parts: dict[str, Tensor]
) -> Iterator[StageCheck]:
    """Sums, parts, total and gradients of the recorded assignment."""
    bounded = loss_given(gt_index, **{**arguments, "raw": [level.detach() for level in arguments["raw"]]})
    number = max(int((gt_index >= 0).sum()), 1)
    sums = {"sum_iou": bounded["box"] * (number / 5.0), "sum_obj": bounded["objectness"] * number}
    sums |= {"sum_cls": bounded["classification"] * number}
    if "l1" in bounded:
        sums["sum_l1"] = bounded["l1"] * number
    for stage, value in sums.items():
        if scene.has(f"out/{stage}"):
            yield within(stage, scene.tensor(f"out/{stage}"), value)
    for stage, part in _PARTS.items():
        if scene.has(f"out/{stage}") and part in bounded:
            yield within(stage, scene.tensor(f"out/{stage}"), bounded[part])
        elif scene.has(f"out/{stage}"):
            yield discrete(stage, torch.zeros(()), scene.tensor(f"out/{stage}"))
    if scene.has("out/fg_ratio"):
        counted = yolox.counted_ground_truths(
            arguments["gt_boxes"], arguments["gt_labels"], arguments["gt_valid"], flavour=arguments["flavour"]
        )
        ratio = _bounded(torch.tensor(float(number))) / max(int(counted.sum()), 1)
        yield within("fg_ratio", scene.tensor("out/fg_ratio"), ratio)
    plain = torch.autograd.grad(parts["total"], arguments["raw"])
    double = [level.detach().double().requires_grad_() for level in arguments["raw"]]
    in_double = {**arguments, "raw": double, "gt_boxes": arguments["gt_boxes"].double()}
    exact = torch.autograd.grad(loss_given(gt_index, **in_double, dtype=None)["total"], double)
    for level, (fine, coarse) in enumerate(zip(exact, plain, strict=True)):
        if scene.has(f"out/grad.{level}"):
            yield gradient(f"grad.{level}", scene.tensor(f"out/grad.{level}"), fine, coarse)
