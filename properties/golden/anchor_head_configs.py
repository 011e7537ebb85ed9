"""Recorded configurations of the anchor head, in upstream's words, as arguments of the oracle's operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.anchor_head_boxes import anchors, ssd_anchors, ssd_sizes
from detoracle.reference.contract import unchecked

__all__ = [
    "anchors_from",
    "assigning",
    "coding",
    "loss_settings",
    "padded",
    "sampling",
    "ssd_settings",
    "term_settings",
]

_CLASS_LOSSES = {"FocalLoss": "focal", "CrossEntropyLoss": "cross_entropy"}
_BOX_LOSSES = {"SmoothL1Loss": "smooth_l1", "L1Loss": "l1", "GIoULoss": "giou"}
_SAMPLERS = {"RandomSampler": "random", "PseudoSampler": "pseudo"}
_ANCHOR_SSD = "SSDAnchorGenerator"


def anchors_from(generator: Mapping[str, Any], sizes: Sequence[tuple[int, ...]], like: Any) -> Any:
    """Anchors of all levels, by the generator's unchecked function, so that `like` may be bounded."""
    settings = dict(generator)
    if settings.pop("type") != _ANCHOR_SSD:
        return unchecked(anchors)(sizes, like=like, **settings)
    if "input_size" in settings:
        settings["min_sizes"], settings["max_sizes"] = ssd_sizes(
            settings.pop("input_size"), settings.pop("basesize_ratio_range"), len(settings["strides"])
        )
    return unchecked(ssd_anchors)(sizes, like=like, **{"scale_major": True, **settings})


def assigning(assigner: Mapping[str, Any], *, thresholds_only: bool = False) -> dict[str, Any]:
    """Settings of `anchor_head.assign`, or those of `Thresholds.of`.

    An int or a list as ``neg_iou_thr``, which upstream takes as no background at all, becomes an empty interval.
    """
    settings: dict[str, Any] = {"min_pos_iou": 0.0, "gt_max_assign_all": True, "match_low_quality": True, **assigner}
    python_type = settings.pop("neg_iou_thr_python_type", None)
    negative = settings["neg_iou_thr"]
    if isinstance(negative, int) or python_type == "list":
        negative = (0.0, 0.0)
    settings["neg_iou_thr"] = tuple(negative) if isinstance(negative, list) else negative
    settings.pop("type", None)
    regions: dict[str, Any] = {
        name: settings.pop(name) for name in ("ignore_iof_thr", "ignore_wrt_candidates") if name in settings
    }
    return settings if thresholds_only else {**settings, **regions}


def sampling(sampler: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    """Settings of `anchor_head.sample`."""
    settings = dict(sampler or {"type": "PseudoSampler"})
    return {"sampler": _SAMPLERS[settings.pop("type")], "seed": seed, **settings}


def coding(coder: Mapping[str, Any]) -> dict[str, Any]:
    """Means and deviations of the delta coder, where they are given."""
    names = {"target_means": "means", "target_stds": "stds"}
    return {ours: coder[theirs] for theirs, ours in names.items() if theirs in coder}


def term_settings(loss: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind of a loss module in our words, and its settings."""
    settings = dict(loss)
    kind = {**_CLASS_LOSSES, **_BOX_LOSSES}[settings.pop("type")]
    sigmoid = settings.pop("use_sigmoid", False)
    return ("sigmoid_cross_entropy" if kind == "cross_entropy" and sigmoid else kind), settings


def _common(cfg: Mapping[str, Any]) -> dict[str, Any]:
    names = ("allowed_border", "pos_weight", "reg_decoded_bbox")
    return {
        "strides": cfg["anchor_generator"]["strides"],
        **{name: cfg[name] for name in names},
        **assigning(cfg["assigner"]),
        **coding(cfg["bbox_coder"]),
    }


def loss_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `anchor_head.loss`."""
    (class_loss, of_class), (box_loss, of_box) = term_settings(cfg["loss_cls"]), term_settings(cfg["loss_bbox"])
    return {
        **_common(cfg),
        **sampling(cfg["sampler"], cfg["seed"]),
        "class_loss": class_loss,
        "box_loss": box_loss,
        "class_loss_weight": of_class.pop("loss_weight", 1.0),
        "box_loss_weight": of_box.pop("loss_weight", 1.0),
        **of_class,
        **of_box,
    }


def ssd_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `anchor_head.ssd_loss`."""
    return {**_common(cfg), "neg_pos_ratio": cfg["neg_pos_ratio"], "beta": cfg["smoothl1_beta"]}


def padded(images: Sequence[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of several images in one tensor (B, G, *shape), and which of them there are."""
    most = max(len(rows) for rows in images)
    values = torch.zeros(len(images), most, *shape, dtype=images[0].dtype)
    valid = torch.zeros(len(images), most, dtype=torch.bool)
    for image, rows in enumerate(images):
        values[image, : len(rows)], valid[image, : len(rows)] = rows, True
    return values, valid
