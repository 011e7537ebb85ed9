"""mmdet 2.x and 3.x, anchor head: anchors, box coder, MaxIoU assignment and loss terms.

The head's losses are in `detoracle.adapters.mmdet_heads`. Needs mmcv without compiled operators (``mmcv`` 1.x built
without them, or ``mmcv-lite``) or with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.adapters.genuine import genuine, release

__all__ = [
    "anchors",
    "assign",
    "cross_entropy",
    "decode",
    "encode",
    "giou_loss",
    "inside_flags",
    "l1_loss",
    "overlaps",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "ssd_anchors",
    "valid_flags",
]


def _generators() -> Any:
    return genuine("mmdet.models.task_modules.prior_generators", "mmdet.core.anchor.anchor_generator")


def _grid(generator: Any, sizes: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    return torch.cat(generator.grid_priors([tuple(size) for size in sizes], dtype=like.dtype, device=like.device))


def anchors(*, sizes: Sequence[Sequence[int]], like: Tensor, **settings: Any) -> Tensor:
    """``anchor_head.anchors`` by ``AnchorGenerator``, whose settings have the same names."""
    return _grid(_generators().AnchorGenerator(**settings), sizes, like)


def ssd_anchors(*, sizes: Sequence[Sequence[int]], like: Tensor, **settings: Any) -> Tensor:
    """``anchor_head.ssd_anchors`` by ``SSDAnchorGenerator``, whose settings have the same names."""
    return _grid(_generators().SSDAnchorGenerator(**{"scale_major": False, **settings}), sizes, like)


def valid_flags(
    *,
    pad_shapes: Tensor,
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int | Sequence[int]],
    base_anchors: Sequence[int],
) -> Tensor:
    """``anchor_head.valid_flags`` by ``AnchorGenerator.valid_flags``, image by image."""
    generator = _generators().AnchorGenerator(strides=list(strides), ratios=[1.0], scales=[1.0] * base_anchors[0])
    maps = [tuple(size) for size in sizes]
    per_image = [torch.cat(generator.valid_flags(maps, tuple(shape), device="cpu")) for shape in pad_shapes.tolist()]
    return torch.stack(per_image).to(pad_shapes.device)


def inside_flags(*, anchors: Tensor, valid: Tensor, image_shapes: Tensor, allowed_border: float = 0) -> Tensor:
    """``anchor_head.inside_flags`` by ``anchor_inside_flags``, image by image."""
    flags = genuine("mmdet.models.task_modules.prior_generators", "mmdet.core.anchor").anchor_inside_flags
    shapes = image_shapes.tolist()
    return torch.stack(
        [
            flags(anchors, per_image, tuple(shape), allowed_border)
            for per_image, shape in zip(valid, shapes, strict=True)
        ]
    )


def _coder(means: Sequence[float], stds: Sequence[float], **settings: Any) -> Any:
    coders = genuine("mmdet.models.task_modules.coders", "mmdet.core.bbox.coder")
    return coders.DeltaXYWHBBoxCoder(tuple(means), tuple(stds), **settings)


def encode(
    *, anchors: Tensor, boxes: Tensor, means: Sequence[float] = (0, 0, 0, 0), stds: Sequence[float] = (1, 1, 1, 1)
) -> Tensor:
    """``anchor_head.encode`` by ``DeltaXYWHBBoxCoder.encode``."""
    deltas: Tensor = _coder(means, stds).encode(anchors, boxes)
    return deltas


def decode(
    *,
    anchors: Tensor,
    deltas: Tensor,
    means: Sequence[float] = (0, 0, 0, 0),
    stds: Sequence[float] = (1, 1, 1, 1),
    max_shape: Sequence[int] | None = None,
    ratio_clip: float = 16 / 1000,
    center_clamp: float | None = None,
) -> Tensor:
    """``anchor_head.decode`` by ``DeltaXYWHBBoxCoder.decode``."""
    coder = _coder(means, stds, add_ctr_clamp=center_clamp is not None, ctr_clamp=center_clamp or 0)
    boxes: Tensor = coder.decode(anchors, deltas, max_shape=max_shape, wh_ratio_clip=ratio_clip)
    return boxes


def overlaps(
    *, boxes_a: Tensor, boxes_b: Tensor, mode: str = "iou", aligned: bool = False, eps: float = 1e-6
) -> Tensor:
    """``boxes.overlaps_mmdet`` by ``bbox_overlaps``."""
    module = genuine("mmdet.structures.bbox", "mmdet.core.bbox")
    overlap: Tensor = module.bbox_overlaps(boxes_a, boxes_b, mode=mode, is_aligned=aligned, eps=eps)
    return overlap


def assign(
    *,
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    inside: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """``anchor_head.assign`` by ``MaxIoUAssigner``, image by image; its settings have the same names."""
    module = genuine("mmdet.models.task_modules.assigners", "mmdet.core.bbox.assigners")
    assigner = module.MaxIoUAssigner(**{"pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0.0, **settings})
    gt_index = torch.full_like(inside, -2, dtype=torch.int64)
    for image, (taking_part, valid) in enumerate(zip(inside, gt_valid, strict=True)):
        rows = valid.nonzero().flatten()
        ignored = None
        if ignore_boxes is not None:
            ignored = ignore_boxes[image] if ignore_valid is None else ignore_boxes[image, ignore_valid[image]]
        found = _assigned(assigner, anchors[taking_part], gt_boxes[image, rows], ignored)
        numbered = torch.cat([rows.new_tensor([-2, -1]), rows])  # don't care, background, ground truths
        gt_index[image, taking_part] = numbered[found + 1]
    return gt_index


def _assigned(assigner: Any, anchors: Tensor, gt_boxes: Tensor, ignored: Tensor | None) -> Tensor:
    """1 and more for a ground truth, 0 for background, -1 for neither."""
    labels = torch.zeros(len(gt_boxes), dtype=torch.int64, device=gt_boxes.device)
    if release("mmdet") < (3,):
        found: Tensor = assigner.assign(anchors, gt_boxes, ignored, labels).gt_inds
        return found
    data = genuine("mmengine.structures").InstanceData
    instances = data(bboxes=gt_boxes, labels=labels)
    found = assigner.assign(data(priors=anchors), instances, None if ignored is None else data(bboxes=ignored)).gt_inds
    return found


def _term(kind: str, inputs: tuple[Tensor, Tensor, Tensor | None], avg_factor: float | None, **settings: Any) -> Tensor:
    predicted, target, weight = inputs
    loss: Tensor = getattr(genuine("mmdet.models.losses"), kind)(**settings)(
        predicted, target, weight, avg_factor=avg_factor
    )
    return loss


def cross_entropy(
    *, logits: Tensor, labels: Tensor, weight: Tensor | None = None, avg_factor: float | None = None, **settings: Any
) -> Tensor:
    """``anchor_head.cross_entropy`` by ``CrossEntropyLoss``, whose settings have the same names."""
    return _term("CrossEntropyLoss", (logits, labels, weight), avg_factor, **settings)


def sigmoid_cross_entropy(
    *, logits: Tensor, labels: Tensor, weight: Tensor | None = None, avg_factor: float | None = None, **settings: Any
) -> Tensor:
    """``anchor_head.sigmoid_cross_entropy`` by ``CrossEntropyLoss`` with ``use_sigmoid``."""
    return _term("CrossEntropyLoss", (logits, labels, weight), avg_factor, use_sigmoid=True, **settings)


def sigmoid_focal_loss(
    *, logits: Tensor, labels: Tensor, weight: Tensor | None = None, avg_factor: float | None = None, **settings: Any
) -> Tensor:
    """``anchor_head.sigmoid_focal_loss`` by ``FocalLoss``, whose settings have the same names."""
    return _term("FocalLoss", (logits, labels, weight), avg_factor, **settings)


def smooth_l1_loss(
    *, predicted: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: float | None = None, **settings: Any
) -> Tensor:
    """``anchor_head.smooth_l1_loss`` by ``SmoothL1Loss``, whose settings have the same names."""
    return _term("SmoothL1Loss", (predicted, target, weight), avg_factor, **settings)


def l1_loss(
    *, predicted: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: float | None = None, **settings: Any
) -> Tensor:
    """``anchor_head.l1_loss`` by ``L1Loss``, whose settings have the same names."""
    return _term("L1Loss", (predicted, target, weight), avg_factor, **settings)


def giou_loss(
    *, predicted: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: float | None = None, **settings: Any
) -> Tensor:
    """``anchor_head.giou_loss`` by ``GIoULoss``, whose settings have the same names."""
    return _term("GIoULoss", (predicted, target, weight), avg_factor, **settings)
