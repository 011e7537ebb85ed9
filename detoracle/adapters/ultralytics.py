"""ultralytics (YOLOv8): operations of `detoracle.reference.yolov8` and `boxes.iou_ultralytics`.

Releases moved their modules (``ultralytics.yolo.utils`` before 8.0.136) and the DFL term; the names tried here follow
them. A change of what is computed is not followed: that is what the comparison is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from detoracle.adapters.genuine import genuine, release

__all__ = ["anchor_points", "assign", "bbox2dist", "dfl_decode", "dfl_loss", "iou", "loss", "pad_targets"]


def _tal() -> Any:
    return genuine("ultralytics.utils.tal", "ultralytics.yolo.utils.tal")


def _criterion(**model: Any) -> Any:
    """The loss module for a head (``nc``, ``reg_max``, ``stride``) and gains (``box``, ``cls``, ``dfl``)."""
    gains = SimpleNamespace(**{name: model.pop(name, 1.0) for name in ("box", "cls", "dfl")}, class_weights=None)
    head = SimpleNamespace(no=model["nc"] + 4 * model["reg_max"], **model)
    detector = SimpleNamespace(args=gains, model=[head], parameters=lambda: iter([head.stride]), class_weights=None)
    losses = genuine("ultralytics.utils.loss", "ultralytics.yolo.v8.detect.train")
    return (losses.v8DetectionLoss if hasattr(losses, "v8DetectionLoss") else losses.Loss)(detector)


def anchor_points(*, raw: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``yolov8.anchor_points`` by ``make_anchors``."""
    points, per_anchor = _tal().make_anchors(raw, strides, 0.5)
    return points, per_anchor[:, 0]


def pad_targets(
    *, batch_index: Tensor, labels: Tensor, boxes: Tensor, batch_size: int, image_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``yolov8.pad_targets`` by ``v8DetectionLoss.preprocess``."""
    criterion = _criterion(nc=1, reg_max=16, stride=boxes.new_ones(1))
    rows = torch.cat([batch_index[:, None].to(boxes), labels[:, None].to(boxes), boxes], dim=1)
    height, width = image_size
    padded = criterion.preprocess(rows, batch_size, scale_tensor=boxes.new_tensor([width, height, width, height]))
    return padded[..., 1:], padded[..., 0].long(), padded[..., 1:].sum(-1) > 0


def assign(
    *,
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> dict[str, Tensor]:
    """``yolov8.assign`` by ``TaskAlignedAssigner``."""
    assigner = _tal().TaskAlignedAssigner(topk=topk, num_classes=scores.shape[-1], alpha=alpha, beta=beta)
    unreadable = ~gt_valid & (gt_labels < 0)  # the package reads the class of padding too
    padded, labels = torch.where(unreadable[..., None], 0.0, gt_boxes), torch.where(unreadable, 0, gt_labels)
    result = assigner(scores, boxes, anchor_points, labels[..., None], padded, gt_valid[..., None])
    labels, target_boxes, target_scores, foreground, gt_index = result
    return {
        "gt_index": torch.where(foreground.bool(), gt_index, -1).long(),
        "quality": target_scores.sum(-1),
        "labels": labels.long(),
        "boxes": target_boxes,
        "scores": target_scores,
    }


def dfl_decode(*, box_logits: Tensor) -> Tensor:
    """``yolov8.dfl_decode`` by the module ``DFL``."""
    module = genuine("ultralytics.nn.modules").DFL(box_logits.shape[-1] // 4).to(box_logits)
    distances: Tensor = module(box_logits.transpose(1, 2)).transpose(1, 2)
    return distances


def bbox2dist(*, anchor_points: Tensor, boxes: Tensor, reg_max: int = 16) -> Tensor:
    """``yolov8.bbox2dist`` by the function of that name, which takes the last bin's number."""
    distances: Tensor = _tal().bbox2dist(anchor_points, boxes, reg_max - 1)
    return distances


def dfl_loss(*, box_logits: Tensor, distances: Tensor) -> Tensor:
    """``yolov8.dfl_loss`` by ``DFLoss``, or ``BboxLoss._df_loss`` before 8.2."""
    losses = genuine("ultralytics.utils.loss", "ultralytics.yolo.utils.loss")
    bins = box_logits.shape[-1] // 4
    term = losses.DFLoss(bins) if hasattr(losses, "DFLoss") else losses.BboxLoss._df_loss
    loss: Tensor = term(box_logits.reshape(-1, bins), distances)
    return loss[..., 0]


def iou(*, boxes_a: Tensor, boxes_b: Tensor, form: str = "xyxy", mode: str = "iou", eps: float = 1e-7) -> Tensor:
    """``boxes.iou_ultralytics`` by ``bbox_iou``."""
    metrics = genuine("ultralytics.utils.metrics", "ultralytics.yolo.utils.metrics")
    flag = {} if mode == "iou" else {{"giou": "GIoU", "diou": "DIoU", "ciou": "CIoU"}[mode]: True}
    overlap: Tensor = metrics.bbox_iou(boxes_a, boxes_b, xywh=form == "cxcywh", eps=eps, **flag)
    return overlap


def loss(
    *,
    raw: list[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    reg_max: int = 16,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
) -> dict[str, Tensor]:
    """``yolov8.loss`` by ``v8DetectionLoss``.

    Its own padding step is `pad_targets`; here it is handed what that step makes, for boxes that went to shares of the
    image and back are not quite the same boxes.
    """
    criterion = _criterion(
        nc=raw[0].shape[1] - 4 * reg_max,
        reg_max=reg_max,
        stride=raw[0].new_tensor(strides),
        box=box_gain,
        cls=cls_gain,
        dfl=dfl_gain,
    )
    criterion.assigner.topk, criterion.assigner.alpha, criterion.assigner.beta = topk, alpha, beta
    if hasattr(criterion.assigner, "topk2"):
        criterion.assigner.topk2 = topk
    padded = torch.cat([gt_labels[..., None].to(gt_boxes), gt_boxes], dim=-1)
    padded = torch.where(gt_valid[..., None], padded, 0.0)
    criterion.preprocess = lambda *_, **__: padded
    image, row = gt_valid.nonzero(as_tuple=True)
    batch = {"batch_idx": image.to(gt_boxes), "cls": gt_labels[image, row].to(gt_boxes), "bboxes": gt_boxes[image, row]}
    total, parts = criterion(_predictions(raw, reg_max), batch)
    box, cls, dfl = parts.values() if isinstance(parts, dict) else parts
    return {"total": total.sum(), "box": box, "cls": cls, "dfl": dfl}


def _predictions(raw: list[Tensor], reg_max: int) -> Any:
    """The head's maps as the loss of this release takes them."""
    if release("ultralytics") < (8, 4):
        return raw
    flat = torch.cat([level.flatten(2) for level in raw], dim=2)
    return {"boxes": flat[:, : 4 * reg_max], "scores": flat[:, 4 * reg_max :], "feats": raw}
