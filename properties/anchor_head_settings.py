"""Settings of `anchor_head.loss`: the heads that are published, and two that set every other option."""

from __future__ import annotations

from typing import Any

__all__ = ["HEADS"]

HEADS: dict[str, dict[str, Any]] = {
    "retina": {"class_loss": "focal", "box_loss": "l1"},
    "rpn": {
        "class_loss": "sigmoid_cross_entropy",
        "box_loss": "smooth_l1",
        "beta": 1 / 9,
        "pos_iou_thr": 0.7,
        "neg_iou_thr": 0.3,
        "min_pos_iou": 0.3,
        "sampler": "random",
        "seed": 7,
        "num": 48,
        "allowed_border": 8,
    },
    "ssd-like": {
        "class_loss": "cross_entropy",
        "box_loss": "smooth_l1",
        "neg_iou_thr": 0.5,
        "gt_max_assign_all": False,
        "stds": (0.1, 0.1, 0.2, 0.2),
        "pos_weight": 2.0,
    },
    "giou": {"class_loss": "focal", "box_loss": "giou", "reg_decoded_bbox": True, "box_loss_weight": 2.0},
    "other focal": {
        "class_loss": "focal",
        "box_loss": "giou",
        "reg_decoded_bbox": True,
        "class_loss_weight": 2.0,
        "gamma": 1.5,
        "alpha": 0.6,
        "eps": 300.0,
        "match_low_quality": False,
        "pos_iou_thr": 0.35,
        "neg_iou_thr": (0.1, 0.25),
        "ignore_iof_thr": 0.5,
        "ignore_wrt_candidates": False,
    },
    "other softmax": {
        "class_loss": "cross_entropy",
        "box_loss": "l1",
        "sampler": "random",
        "seed": 5,
        "num": 24,
        "pos_fraction": 0.25,
        "neg_pos_ub": 2.0,
        "ignore_index": 0,
        "means": (0.0, 0.1, -0.1, 0.2),
        "ignore_iof_thr": 0.5,
    },
}
"""Settings of `anchor_head.loss` for the heads that are compared."""
