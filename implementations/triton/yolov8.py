"""YOLOv8 in Triton kernels: no tensor of pairs, no wait for the device, and shapes that never depend on the data.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolov8` and
`detoracle.reference.yolov8_loss`. The assignment is in `detoracle.implementations.triton.yolov8_kernels`, the loss in
`detoracle.implementations.triton.yolov8_loss_kernels`. Everything is computed and summed in float32, from predictions
of float32, bfloat16 or float16. Sums have a fixed order, and what programs add up together are integers: a call repeats
to the last bit. It reads nothing back and no shape depends on the data, so that a CUDA graph can hold it.

What it trades: points that come without maps are taken for no grid, so that each ground truth walks them all, and
computes with those inside. Memory is some tens of bytes an anchor, whatever the ground truths. Block sizes are fixed.
A level's maps are copied if they are not contiguous. Limits: fewer than 2**16 images, fewer than 2**29 ground truths in
all, padding included, a top-k of no more than 128, and exponents of 0 or more, not both 0.

Ties are broken as in the oracle. What differs from it: as in `batched`, but for class logits of minus infinity; float64
is refused. The gradient cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import yolov8 as batched
from detoracle.implementations.registry import implements
from detoracle.implementations.triton import yolov8_kernels as kernels
from detoracle.implementations.triton import yolov8_loss_kernels as loss_kernels
from detoracle.implementations.triton.launching import AS_WRITTEN, check_runs, check_size, lanes_for, starts_of
from detoracle.implementations.triton.yolov8_kernels import Batch, Best, Grid
from detoracle.implementations.triton.yolov8_loss_kernels import Level, Targets
from detoracle.reference.assignment import BACKGROUND, Assignment
from detoracle.reference.errors import InputError

__all__ = ["assign", "loss"]

_ANCHORS, _CLASSES = 128, 16  # of one program at a time
_NO_GRID = Grid((), (), ())


@implements("yolov8.assign", name="triton")
@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Task-aligned assignment and its targets.

    Raises
    ------
    InputError
        If the kernels cannot run where the predictions are, or on their dtype; or of more than they can hold.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     points, one = torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    ...     gt, scores, label = torch.tensor([[[0.0, 0, 8, 8]]]), torch.ones(1, 2, 3), torch.tensor([[2]])
    >>> assign(scores, gt.expand(1, 2, 4), points, gt, label, one).gt_index.tolist()
    [[0, -1]]
    """
    check_runs(scores, "scores", where="yolov8.assign")
    check_runs(boxes, "boxes", where="yolov8.assign")
    _check_limits(gt_valid, topk, alpha, beta, where="yolov8.assign")
    num_classes = scores.shape[-1]
    counted = batched._with_class(gt_labels, gt_valid, num_classes)
    batch = _batch(anchor_points, boxes.mT, [scores.mT], gt_boxes, gt_labels, counted, alpha, beta)
    gt_index, quality = _match(batch, _NO_GRID, topk, logits=False)
    quality = quality.to(torch.promote_types(scores.dtype, torch.promote_types(boxes.dtype, gt_boxes.dtype)))
    if not gt_boxes.shape[1]:
        labels = torch.full_like(gt_index, num_classes)
        target_boxes = gt_boxes.new_zeros(*gt_index.shape, 4)
    else:
        matched = gt_index.clamp(min=0)
        labels = gt_labels.gather(1, matched).clamp(min=0)
        target_boxes = gt_boxes.take_along_dim(matched[..., None], 1)
    classes = torch.arange(num_classes, device=labels.device)
    one_hot = (labels[..., None] == classes) & (gt_index >= 0)[..., None]
    extra = {"labels": labels, "boxes": target_boxes, "scores": quality[..., None] * one_hot}
    return Assignment(gt_index, quality, extra)


def _check_limits(gt_valid: Tensor, topk: int, alpha: float, beta: float, *, where: str) -> None:
    """Refuse what a launch, a program or the rule for pairs outside a box cannot hold."""
    check_size(gt_valid, "gt_valid", images=len(gt_valid), rows=gt_valid.numel(), where=where)
    lanes_for(topk, where=where)
    if alpha < 0 or beta < 0 or alpha == beta == 0:
        expected, got = "exponents of 0 or more, not both 0", f"alpha {alpha}, beta {beta}"
        raise InputError("alpha and beta", expected=expected, got=got, where=where)


def _batch(
    points: Tensor,
    boxes: Tensor,
    class_values: Sequence[Tensor],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    counted: Tensor,
    alpha: float,
    beta: float,
) -> Batch:
    """What kernels read: points in pixels, boxes (B, 4, A), and logits or probabilities (B, C, Al) of each level."""
    starts = starts_of(level.shape[2] for level in class_values)
    return Batch(
        points=points.float().contiguous(),
        boxes=boxes,
        box_strides=boxes.stride(),
        maps=tuple(class_values),
        map_strides=tuple(level.stride() for level in class_values),
        starts=starts,
        gt_boxes=gt_boxes.float().contiguous(),
        gt_labels=gt_labels.contiguous(),
        counted=counted.contiguous(),
        num_anchors=starts[-1],
        num_gts=gt_labels.shape[1],
        num_classes=class_values[0].shape[1],
        alpha=float(alpha),
        beta=float(beta),
    )


def _match(batch: Batch, grid: Grid, topk: int, *, logits: bool) -> tuple[Tensor, Tensor]:
    """Ground truth and quality (B, A) of each anchor."""
    images, ground_truths = batch.counted.shape
    claimed = batch.gt_labels.new_zeros(images, batch.num_anchors, dtype=torch.int64)
    gt_index = torch.full_like(claimed, BACKGROUND)
    quality = torch.zeros_like(claimed, dtype=torch.float32)
    if not claimed.numel() or not ground_truths:
        return gt_index, quality
    metrics = torch.empty_like(quality)
    none = torch.zeros_like(batch.counted, dtype=torch.int32)
    best = Best(none, none.clone(), none.new_zeros(images))
    settings: dict[str, Any] = {"LEVELS": len(batch.maps), "LOGITS": logits, "ANCHORS": _ANCHORS, **AS_WRITTEN}
    blocks = (triton.cdiv(batch.num_anchors, _ANCHORS), images)
    lanes = lanes_for(topk, where="yolov8.assign")
    kernels.claim[images * ground_truths,](
        batch, grid, claimed, best, topk, LANES=lanes, GRID=bool(grid.steps), **settings
    )
    kernels.resolve[blocks](batch, claimed, best, gt_index, metrics, **settings)
    kernels.scale[blocks](batch, best, gt_index, metrics, quality, ANCHORS=_ANCHORS, **AS_WRITTEN)
    return gt_index, quality


@implements("yolov8.loss", name="triton")
def loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    reg_max: int = 16,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, cls, dfl.

    Raises
    ------
    InputError
        As `assign`.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    ...     raw, label = [torch.zeros(1, 65, 4, 4)], torch.tensor([[0]])
    >>> parts = loss(raw, [8], gt, label, one)
    >>> {name: round(float(part), 4) for name, part in parts.items()}
    {'total': 5.5567, 'box': 0.0073, 'cls': 5.5452, 'dfl': 0.0041}
    """
    check_runs(raw[0], "raw", where="yolov8.loss")
    _check_limits(gt_valid, topk, alpha, beta, where="yolov8.loss")
    with torch.no_grad():
        maps = [level.detach().contiguous() for level in raw]
        points, anchor_strides = batched.anchor_points(maps, strides)
        gt_index, quality = _assigned(
            maps, strides, points * anchor_strides[:, None], reg_max, gt_boxes, gt_labels, gt_valid, topk, alpha, beta
        )
        normaliser, positive = quality.sum().clamp(min=1), (gt_index >= 0).any()
    targets = (points.float(), gt_index, quality, gt_boxes.float().contiguous(), gt_labels.contiguous())
    sums = _Loss.apply(strides, reg_max, *targets, *raw)  # type: ignore[no-untyped-call]
    box, cls, dfl = (sums / normaliser).unbind()
    box, dfl = box.where(positive, 0.0), dfl.where(positive & (reg_max > 1), 0.0)  # 0 without a positive, not 0 / NaN
    box, cls, dfl = box * box_gain, cls * cls_gain, dfl * dfl_gain
    return {"total": (box + cls + dfl) * len(raw[0]), "box": box.detach(), "cls": cls.detach(), "dfl": dfl.detach()}


def _assigned(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    points: Tensor,
    reg_max: int,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    topk: int,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Ground truth and quality (B, A) of each anchor, from contiguous maps and points in pixels."""
    class_logits = [level.flatten(2)[:, 4 * reg_max :] for level in maps]
    boxes = torch.empty(len(maps[0]), 4, len(points), device=points.device)
    counted = batched._with_class(gt_labels, gt_valid & (gt_boxes.sum(-1) > 0), class_logits[0].shape[1])
    batch = _batch(points, boxes, class_logits, gt_boxes, gt_labels, counted, alpha, beta)
    for level in _levels(maps, strides):
        kernels.decode[triton.cdiv(level.cells, _ANCHORS), len(boxes)](
            batch, level.raw, level.step, reg_max, level.start, level.cells, boxes,
            BINS=triton.next_power_of_2(reg_max), ANCHORS=_ANCHORS, **AS_WRITTEN,
        )  # fmt: skip
    heights, widths = zip(*(level.shape[2:] for level in maps), strict=True)
    return _match(batch, Grid(tuple(map(float, strides)), widths, heights), topk, logits=True)


class _Loss(torch.autograd.Function):
    """Sums of box, class and DFL losses, (3,); writes the gradient once."""

    @staticmethod
    def forward(ctx: Any, strides: Sequence[int], reg_max: int, *tensors: Tensor) -> Tensor:
        """Sum; the first five tensors are targets, the others maps."""
        ctx.strides, ctx.reg_max = strides, reg_max
        ctx.save_for_backward(*tensors)
        targets, raw = tensors[:5], tensors[5:]
        parts = []
        for level in _levels(raw, strides):
            blocks = (triton.cdiv(level.cells, _ANCHORS), len(level.raw))
            parts.append(targets[2].new_zeros(blocks[0] * blocks[1], 3))
            loss_kernels.sums[blocks](level, _targets(level, reg_max, *targets), parts[-1], **_choices(reg_max))
        return torch.cat(parts).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Write."""
        targets, raw = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        scales = to_sums.float().contiguous()
        gradients = []
        for level in _levels(raw, ctx.strides):
            gradient = torch.empty_like(level.raw)
            loss_kernels.gradients[triton.cdiv(level.cells, _ANCHORS), len(level.raw)](
                level, _targets(level, ctx.reg_max, *targets), scales, gradient, **_choices(ctx.reg_max)
            )
            gradients.append(gradient)
        return *[None] * 7, *gradients


def _choices(reg_max: int) -> dict[str, Any]:
    return {"BINS": triton.next_power_of_2(reg_max), "CELLS": _ANCHORS, "CLASSES": _CLASSES, **AS_WRITTEN}


def _levels(raw: Sequence[Tensor], strides: Sequence[int]) -> list[Level]:
    cells = [level.shape[2] * level.shape[3] for level in raw]
    return [
        Level(level.detach().contiguous(), float(step), number, start)
        for level, step, number, start in zip(raw, strides, cells, starts_of(cells)[:-1], strict=True)
    ]


def _targets(
    level: Level, reg_max: int, points: Tensor, gt_index: Tensor, quality: Tensor, gt_boxes: Tensor, gt_labels: Tensor
) -> Targets:
    sizes = gt_index.shape[1], gt_labels.shape[1], level.raw.shape[1] - 4 * reg_max
    return Targets(points, gt_index, quality, gt_boxes, gt_labels, *sizes, reg_max)
