"""mmdet 3.x, RTMDet: priors, box coding, dynamic soft label assignment and loss terms; the loss is in `mmdet_heads`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.adapters.genuine import genuine

__all__ = ["assign", "decode", "encode", "giou_loss", "priors", "qfl"]


def priors(
    *,
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int | Sequence[int]],
    offset: float = 0.0,
    like: Tensor | None = None,
) -> Tensor:
    """``rtmdet.priors`` by ``MlvlPointGenerator``."""
    like = torch.zeros(()) if like is None else like
    generator = genuine("mmdet.models.task_modules.prior_generators").MlvlPointGenerator(list(strides), offset)
    maps = [tuple(size) for size in sizes]
    return torch.cat(generator.grid_priors(maps, dtype=like.dtype, device=like.device, with_stride=True))


def decode(*, points: Tensor, distances: Tensor, max_shape: Sequence[int] | None = None) -> Tensor:
    """``rtmdet.decode`` by ``distance2bbox``."""
    boxes: Tensor = genuine("mmdet.structures.bbox").distance2bbox(points, distances, max_shape)
    return boxes


def encode(*, points: Tensor, boxes: Tensor, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    """``rtmdet.encode`` by ``bbox2distance``."""
    distances: Tensor = genuine("mmdet.structures.bbox").bbox2distance(points, boxes, max_distance, eps)
    return distances


def assign(
    *,
    class_logits: Tensor,
    boxes: Tensor,
    priors: Tensor,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    gt_masks: Tensor | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """``rtmdet.assign`` by ``DynamicSoftLabelAssigner``, image by image; its settings have the same names."""
    assigner = genuine("mmdet.models.task_modules.assigners").DynamicSoftLabelAssigner(**settings)
    data = genuine("mmengine.structures").InstanceData
    gt_index = torch.full_like(inside, -2, dtype=torch.int64)
    quality = boxes.new_zeros(inside.shape)
    for image, (taking_part, valid) in enumerate(zip(inside, gt_valid, strict=True)):
        rows = valid.nonzero().flatten()
        given = {"bboxes": gt_boxes[image, rows], "labels": gt_labels[image, rows]}
        if gt_masks is not None:
            given["masks"] = gt_masks[image, rows]
        predicted = data(
            bboxes=boxes[image, taking_part], scores=class_logits[image, taking_part], priors=priors[taking_part]
        )
        result = assigner.assign(predicted, data(**given))
        numbered = torch.cat([rows.new_tensor([-1]), rows])
        gt_index[image, taking_part] = numbered[result.gt_inds]
        quality[image, taking_part] = torch.where(result.gt_inds > 0, result.max_overlaps, 0.0).to(quality)
    return {"gt_index": gt_index, "quality": quality}


def giou_loss(
    *,
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    average_factor: float | None = None,
    **settings: Any,
) -> Tensor:
    """``rtmdet.giou_loss`` by ``GIoULoss``, whose settings have the same names."""
    module = genuine("mmdet.models.losses").GIoULoss(**settings)
    loss: Tensor = module(predicted, target, weight, avg_factor=average_factor)
    return loss


def qfl(
    *,
    predicted: Tensor,
    quality: Tensor,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    average_factor: float | None = None,
    **settings: Any,
) -> Tensor:
    """``rtmdet.qfl`` by ``QualityFocalLoss``, whose settings have the same names."""
    module = genuine("mmdet.models.losses").QualityFocalLoss(**settings)
    target = quality if labels is None else (labels, quality)
    loss: Tensor = module(predicted, target, weight, avg_factor=average_factor)
    return loss
