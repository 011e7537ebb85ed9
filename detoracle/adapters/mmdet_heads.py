"""mmdet 2.x and 3.x: the losses of `AnchorHead`, `SSDHead` and, from 3.0, `RTMDetHead`.

A head is built for every call, with the least layers it can have: they are never run. Where an operation is given its
anchors, the head's generator hands these out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.adapters.genuine import genuine, release

__all__ = ["anchor_head_loss", "rtmdet_loss", "ssd_loss"]

_CLASS_LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"type": "CrossEntropyLoss", "use_sigmoid": False},
    "sigmoid_cross_entropy": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    "focal": {"type": "FocalLoss", "use_sigmoid": True},
}
_BOX_LOSSES = {"smooth_l1": "SmoothL1Loss", "l1": "L1Loss", "giou": "GIoULoss"}
_ASSIGNER: dict[str, Any] = {
    "pos_iou_thr": 0.5,
    "neg_iou_thr": 0.4,
    "min_pos_iou": 0.0,
    "gt_max_assign_all": True,
    "match_low_quality": True,
    "ignore_iof_thr": -1.0,
    "ignore_wrt_candidates": True,
}
_SAMPLER: dict[str, Any] = {"num": 256, "pos_fraction": 0.5, "neg_pos_ub": -1.0, "add_gt_as_proposals": False}


def _taken(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.pop(name, default) for name, default in defaults.items()}


def _config(settings: dict[str, Any]) -> Any:
    """What the head reads by attribute."""
    module = genuine("mmcv" if release("mmdet") < (3,) else "mmengine.config")
    return module.ConfigDict(settings)


def _coder(settings: dict[str, Any], stds: Sequence[float]) -> dict[str, Any]:
    means = list(settings.pop("means", (0.0, 0.0, 0.0, 0.0)))
    return {"type": "DeltaXYWHBBoxCoder", "target_means": means, "target_stds": list(settings.pop("stds", stds))}


def _training(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "assigner": {"type": "MaxIoUAssigner", **_taken(settings, _ASSIGNER)},
        "allowed_border": settings.pop("allowed_border", -1.0),
        "pos_weight": settings.pop("pos_weight", -1.0),
        "debug": False,
        **more,
    }


def _generator(per_cell: int, strides: Sequence[Any]) -> dict[str, Any]:
    """As many base anchors as the maps say."""
    return {"type": "AnchorGenerator", "ratios": [1.0], "scales": [1.0] * per_cell, "strides": list(strides)}


def _hand_out(head: Any, maps: Sequence[Tensor], anchors: Tensor) -> None:
    """Give the head these anchors, split by level."""
    per_level = [level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in maps]
    split = list(torch.split(anchors, per_level))
    head.prior_generator.grid_priors = lambda *_, **__: split


def _losses(
    head: Any, maps: tuple[list[Tensor], list[Tensor]], images: dict[str, Tensor | None]
) -> dict[str, list[Tensor]]:
    """Call the head's loss; `images` holds padded ground truths, ignored boxes, masks and shapes."""
    valid, pad_shapes = images["gt_valid"], images["pad_shapes"]
    assert valid is not None
    assert pad_shapes is not None
    shapes = pad_shapes if images.get("image_shapes") is None else images["image_shapes"]
    assert shapes is not None
    metas = [
        {"img_shape": (*shape, 3), "pad_shape": (*pad, 3), "scale_factor": 1.0, "batch_input_shape": tuple(pad)}
        for shape, pad in zip(shapes.tolist(), pad_shapes.tolist(), strict=True)
    ]
    boxes = _rows(images["gt_boxes"], valid)
    labels = _rows(images["gt_labels"], valid)
    ignored = None if images.get("ignore_boxes") is None else _rows(images["ignore_boxes"], images.get("ignore_valid"))
    if release("mmdet") < (3,):
        found: dict[str, list[Tensor]] | None = head.loss(*maps, boxes, labels, metas, gt_bboxes_ignore=ignored)
    else:
        data = genuine("mmengine.structures").InstanceData
        instances = [data(bboxes=b, labels=n) for b, n in zip(boxes, labels, strict=True)]
        if images.get("gt_masks") is not None:
            for one, masks in zip(instances, _rows(images["gt_masks"], valid), strict=True):
                one.masks = masks
        regions = None if ignored is None else [data(bboxes=b) for b in ignored]
        found = head.loss_by_feat(*maps, instances, metas, batch_gt_instances_ignore=regions)
    if found is None:
        raise ValueError("the head returned no loss")
    return found


def _rows(padded: Tensor | None, valid: Tensor | None) -> list[Tensor]:
    assert padded is not None
    return list(padded) if valid is None else [rows[mask] for rows, mask in zip(padded, valid, strict=True)]


def _summed(found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    classification, box = torch.stack(found["loss_cls"]).flatten(), torch.stack(found["loss_bbox"]).flatten()
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}


def anchor_head_loss(
    *,
    cls_scores: list[Tensor],
    bbox_preds: list[Tensor],
    anchors: Tensor,
    strides: Sequence[Any],
    class_loss: str = "focal",
    box_loss: str = "l1",
    sampler: str = "pseudo",
    seed: int = 0,
    **settings: Any,
) -> dict[str, Tensor]:
    """``anchor_head.loss`` by ``AnchorHead``, whose settings have the same names."""
    per_cell = bbox_preds[0].shape[1] // 4
    class_term = dict(_CLASS_LOSSES[class_loss], loss_weight=settings.pop("class_loss_weight", 1.0))
    focal, rest = _taken(settings, {"gamma": 2.0, "alpha": 0.25}), _taken(settings, {"class_weight": None})
    ignore_index = settings.pop("ignore_index", -100)
    class_term |= focal if class_loss == "focal" else {**rest, "ignore_index": ignore_index}
    box_term = {"type": _BOX_LOSSES[box_loss], "loss_weight": settings.pop("box_loss_weight", 1.0)}
    beta, eps = settings.pop("beta", 1.0), settings.pop("eps", 1e-6)
    box_term |= {"smooth_l1": {"beta": beta}, "l1": {}, "giou": {"eps": eps}}[box_loss]
    drawing = _taken(settings, _SAMPLER)
    sampling = {"sampler": {"type": "RandomSampler", **drawing}} if sampler == "random" else {}
    head = genuine("mmdet.models.dense_heads").AnchorHead(
        num_classes=cls_scores[0].shape[1] // per_cell - (class_loss == "cross_entropy"),
        in_channels=1,
        feat_channels=1,
        anchor_generator=_generator(per_cell, strides),
        bbox_coder=_coder(settings, (1.0, 1.0, 1.0, 1.0)),
        reg_decoded_bbox=settings.pop("reg_decoded_bbox", False),
        loss_cls=class_term,
        loss_bbox=box_term,
        train_cfg=_config(_training(settings, **sampling)),
    )
    _hand_out(head, bbox_preds, anchors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _summed(_losses(head, (cls_scores, bbox_preds), settings))


def ssd_loss(
    *,
    cls_scores: list[Tensor],
    bbox_preds: list[Tensor],
    anchors: Tensor,
    strides: Sequence[Any],
    neg_pos_ratio: int = 3,
    beta: float = 1.0,
    **settings: Any,
) -> dict[str, Tensor]:
    """``anchor_head.ssd_loss`` by ``SSDHead``, whose settings have the same names."""
    per_cell = bbox_preds[0].shape[1] // 4
    settings = {"neg_iou_thr": 0.5, "gt_max_assign_all": False, **settings}
    head = genuine("mmdet.models.dense_heads").SSDHead(
        num_classes=cls_scores[0].shape[1] // per_cell - 1,
        in_channels=[1] * len(strides),
        anchor_generator=_generator(per_cell, strides),
        bbox_coder=_coder(settings, (0.1, 0.1, 0.2, 0.2)),
        reg_decoded_bbox=settings.pop("reg_decoded_bbox", False),
        train_cfg=_config(_training(settings, smoothl1_beta=beta, neg_pos_ratio=neg_pos_ratio)),
    )
    _hand_out(head, bbox_preds, anchors)
    return _summed(_losses(head, (cls_scores, bbox_preds), settings))


def rtmdet_loss(
    *,
    class_logits: list[Tensor],
    distances: list[Tensor],
    strides: Sequence[Any],
    **settings: Any,
) -> dict[str, Tensor]:
    """``rtmdet.loss`` by ``RTMDetHead``."""
    if settings.get("pad_shapes") is None:
        along = strides[0] if isinstance(strides[0], int) else strides[0][0]
        settings["pad_shapes"] = torch.tensor(distances[0].shape[2:]).mul(along).expand(len(distances[0]), 2)
    assigner = _taken(settings, {"topk": 13, "soft_center_radius": 3.0, "iou_weight": 3.0})
    head = genuine("mmdet.models.dense_heads").RTMDetHead(
        num_classes=class_logits[0].shape[1],
        in_channels=32,  # the least that the head's normalisation layers take
        feat_channels=32,
        with_objectness=False,
        anchor_generator={
            "type": "MlvlPointGenerator",
            "offset": settings.pop("offset", 0.0),
            "strides": list(strides),
        },
        bbox_coder={"type": "DistancePointBBoxCoder"},
        loss_cls={
            "type": "QualityFocalLoss",
            "use_sigmoid": True,
            "beta": settings.pop("beta", 2.0),
            "loss_weight": settings.pop("class_loss_weight", 1.0),
        },
        loss_bbox={
            "type": "GIoULoss",
            "loss_weight": settings.pop("box_loss_weight", 2.0),
            "eps": settings.pop("giou_eps", 1e-6),
        },
        train_cfg=_config(
            {
                "assigner": {"type": "DynamicSoftLabelAssigner", **assigner},
                "allowed_border": settings.pop("allowed_border", -1),
                "pos_weight": settings.pop("pos_weight", -1.0),
                "debug": False,
            }
        ),
    )
    images = {**settings, "ignore_boxes": settings.pop("ignored_boxes", None)}
    return _summed(_losses(head, (class_logits, distances), images))
