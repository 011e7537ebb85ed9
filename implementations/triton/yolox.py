"""YOLOX in Triton kernels: no tensor of pairs, no wait for the device, and shapes that never depend on the data.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolox`. The assignment is in
`detoracle.implementations.triton.yolox_kernels`, the loss in `detoracle.implementations.triton.yolox_loss_kernels`.
Everything is computed and summed in float32, from predictions of float32, bfloat16 or float16. Sums have a fixed order,
and what programs add up together are integers: a call repeats to the last bit. It reads nothing back and no shape
depends on the data, so that a CUDA graph can hold it.

What it trades: dynamic k depends on the best IoUs among the candidates of *all* ground truths of an image, so that each
ground truth walks them all, not only those near it. Memory is some tens of bytes an anchor, whatever the ground truths.
Block sizes are fixed, but for those of the gradient. A level's maps are copied if they are not contiguous. Limits:
fewer than 2**16 images and fewer than 2**29 ground truths in all, padding included.

Ties are broken as in the oracle. What differs from it: as in `batched`; a class that does not exist fails in an
assertion on the device; float64 is refused. The gradient cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import yolox as batched
from detoracle.implementations.registry import implements
from detoracle.implementations.triton import yolox_kernels as kernels
from detoracle.implementations.triton import yolox_loss_kernels as loss_kernels
from detoracle.implementations.triton.launching import (
    AS_WRITTEN,
    check_runs,
    check_size,
    listed,
    size_class,
    starts_of,
    tiles,
)
from detoracle.implementations.triton.matching import Terms
from detoracle.implementations.triton.yolox_kernels import Batch
from detoracle.implementations.triton.yolox_loss_kernels import Level, Targets
from detoracle.reference.assignment import BACKGROUND, Assignment

__all__ = ["assign", "loss", "match"]

_CENTER_RADIUS = {"tutorial": 2.5, "official": 1.5}  # half side of the square about a centre, in strides
_PENALTY = {"tutorial": 1e5, "official": 1e6}
_MOST_CLAIMS = 10
_ANCHORS, _CLASSES = 128, 16  # of one program at a time


@implements("yolox.assign", name="triton")
@torch.no_grad()
def assign(
    predictions: Tensor,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
) -> Assignment:
    """SimOTA: which ground truth each anchor is trained towards, and the IoU it has with it.

    Raises
    ------
    InputError
        If the kernels cannot run where the predictions are, or on their dtype.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     points, strides = torch.tensor([[4.0, 4.0], [44.0, 4.0]]), torch.tensor([8.0, 8.0])
    ...     predictions = torch.tensor([[[8.0, 8, 16, 16, 0, 0], [44.0, 4, 16, 16, 0, 0]]])
    ...     gt, label = torch.tensor([[[8.0, 8, 16, 16]]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> assign(predictions, points, strides, gt, label, label == 0).gt_index.tolist()
    [[0, -1]]
    """
    check_runs(predictions, "predictions", where="yolox.assign")
    channels = predictions.mT
    counted = batched._counted(gt_boxes, gt_labels, gt_valid, flavour)
    found = match(
        channels[:, :4], channels[:, 4], [channels[:, 5:]], anchor_points, anchor_strides, gt_boxes, gt_labels, counted,
        flavour=flavour,
    )  # fmt: skip
    return Assignment(found.gt_index, found.quality.to(predictions.dtype), found.extra)


def match(
    boxes: Tensor,
    objectness: Tensor,
    class_logits: Sequence[Tensor],
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    counted: Tensor,
    *,
    flavour: str,
) -> Assignment:
    """Assign ground truths that take part to anchors, whose predictions may lie anywhere.

    Parameters
    ----------
    boxes : Tensor (B, 4, A) float
        cx, cy, w, h in pixels.
    objectness : Tensor (B, A) float
        Logits.
    class_logits : list of Tensor (B, C, Al) float
        One a level.
    anchor_points : Tensor (A, 2) float
    anchor_strides : Tensor (A,) float
    gt_boxes : Tensor (B, G, 4) float
        cx, cy, w, h in pixels.
    gt_labels : Tensor (B, G) int
    counted : Tensor (B, G) bool
    flavour : {"tutorial", "official"}

    Returns
    -------
    Assignment
        Of float32 quality.

    Raises
    ------
    InputError
        If there are more images or ground truths than a launch can have.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     box, label = torch.tensor([[[4.0], [4], [8], [8]]]), torch.zeros(1, 1, dtype=torch.int64)
    ...     logit, point, stride = torch.zeros(1, 1), torch.tensor([[4.0, 4]]), torch.tensor([8.0])
    >>> match(box, logit, [logit[None]], point, stride, box.mT, label, label == 0, flavour="official").quality.tolist()
    [[1.0]]
    """
    (images, anchors), ground_truths = objectness.shape, counted.shape[1]
    check_size(gt_boxes, "gt_boxes", images=images, rows=images * ground_truths, where="yolox.assign")
    gt_index = objectness.new_full((images, anchors), BACKGROUND, dtype=torch.int64)
    quality = objectness.new_zeros(images, anchors, dtype=torch.float32)
    dynamic_k = torch.zeros_like(counted, dtype=torch.int64)
    if not (images and ground_truths and anchors):
        return Assignment(gt_index, quality, {"dynamic_k": dynamic_k})
    num_classes = class_logits[0].shape[1]
    exists = (gt_labels >= 0) & (gt_labels < num_classes)
    torch._assert_async((exists | ~counted).all(), f"gt_labels: expected 0 to {num_classes - 1}")
    batch = Batch(
        points=anchor_points.float().contiguous(),
        steps=anchor_strides.float().contiguous(),
        boxes=boxes,
        box_strides=boxes.stride(),
        objectness=objectness,
        objectness_strides=objectness.stride(),
        maps=tuple(class_logits),
        map_strides=tuple(level.stride() for level in class_logits),
        starts=starts_of(level.shape[2] for level in class_logits),
        gt_boxes=gt_boxes.float().contiguous(),
        gt_labels=gt_labels.contiguous(),
        counted=counted.contiguous(),
        num_anchors=anchors,
        num_gts=ground_truths,
        num_classes=num_classes,
        radius=_CENTER_RADIUS[flavour],
        penalty=_PENALTY[flavour],
    )
    terms = Terms(torch.empty_like(quality), torch.empty_like(quality), torch.empty_like(gt_index, dtype=torch.int32))
    choices: dict[str, Any] = {"OFFICIAL": flavour == "official", "LEVELS": len(class_logits), "ANCHORS": _ANCHORS}
    settings = {**choices, **AS_WRITTEN}
    blocks = (triton.cdiv(anchors, _ANCHORS), images)

    candidate = torch.empty_like(gt_index, dtype=torch.bool)
    kernels.candidates[blocks](batch, terms, candidate, CLASSES=_CLASSES, **settings)
    places = listed(candidate)
    claimed = torch.zeros_like(gt_index)
    kernels.claim[images * ground_truths,](batch, terms, *places, claimed, dynamic_k, MOST=_MOST_CLAIMS, **settings)
    kernels.resolve[blocks](batch, terms, claimed, gt_index, quality, **settings)
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k})


@implements("yolox.loss", name="triton")
def loss(
    raw: Sequence[Tensor],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    flavour: str = "tutorial",
    use_l1: bool = False,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, objectness, classification, and l1 if asked for.

    Raises
    ------
    InputError
        If the kernels cannot run where the maps are, or on their dtype.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     gt, label = torch.tensor([[[4.0, 4, 8, 8]]]), torch.zeros(1, 1, dtype=torch.int64)
    ...     raw = [torch.zeros(1, 6, 2, 2)]
    >>> parts = loss(raw, [8], gt, label, label == 0)
    >>> round(float(parts["objectness"]), 4)
    2.7726
    """
    check_runs(raw[0], "raw", where="yolox.loss")
    with torch.no_grad():
        maps = [level.detach() for level in raw]
        cells, steps = batched._grid([level[:, :1].float() for level in maps], strides)
        few = torch.cat([level[:, :5].flatten(2) for level in maps], dim=2).float()
        boxes = torch.cat([few[:, :2] + cells.mT, few[:, 2:4].exp()], dim=1) * steps
        counted = batched._counted(gt_boxes, gt_labels, gt_valid, flavour)
        logits, points = [level.flatten(2)[:, 5:] for level in maps], (cells + 0.5) * steps[:, None]
        assignment = match(boxes, few[:, 4], logits, points, steps, gt_boxes, gt_labels, counted, flavour=flavour)
    sums = _Loss.apply(assignment, strides, gt_boxes, gt_labels, use_l1, *raw)  # type: ignore[no-untyped-call]
    box, objectness, classification, l1, positives = sums
    parts = {"box": 5.0 * box, "objectness": objectness, "classification": classification, "l1": l1}
    parts = {name: part / positives.clamp(min=1) for name, part in parts.items() if use_l1 or name != "l1"}
    parts = {"total": torch.stack(list(parts.values())).sum(), **parts}
    return {name: part.to(raw[0].dtype) for name, part in parts.items()}


class _Loss(torch.autograd.Function):
    """Sums of box, objectness, class and L1 losses, and the number of positives, (5,); writes the gradient once."""

    @staticmethod
    def forward(
        ctx: Any,
        assignment: Assignment,
        strides: Sequence[int],
        gt_boxes: Tensor,
        gt_labels: Tensor,
        use_l1: bool,
        *raw: Tensor,
    ) -> Tensor:
        """Sum."""
        targets = (assignment.gt_index, assignment.quality, gt_boxes.float().contiguous(), gt_labels.contiguous())
        ctx.strides, ctx.use_l1 = strides, use_l1
        ctx.save_for_backward(*targets, *raw)
        levels = _levels(raw, strides)
        programs = [triton.cdiv(level.cells, _ANCHORS) * len(level.raw) for level in levels]
        parts = gt_boxes.new_zeros(sum(programs), 5, dtype=torch.float32)
        for number, level in enumerate(levels):
            loss_kernels.sums[triton.cdiv(level.cells, _ANCHORS), len(level.raw)](
                level, _targets(level, *targets), parts, sum(programs[:number]),
                L1=use_l1, CELLS=_ANCHORS, CLASSES=_CLASSES, **AS_WRITTEN,
            )  # fmt: skip
        return parts.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Write."""
        gt_index, quality, gt_boxes, gt_labels, *raw = ctx.saved_tensors
        scales = to_sums.float().contiguous()
        gradients = []
        for level in _levels(raw, ctx.strides):
            gradient = torch.empty_like(level.raw)
            loss_kernels.gradients[tiles(level.cells, len(level.raw))](
                level, _targets(level, gt_index, quality, gt_boxes, gt_labels), scales, gradient,
                size_class(level.raw), L1=ctx.use_l1, **AS_WRITTEN,
            )  # fmt: skip
            gradients.append(gradient)
        return None, None, None, None, None, *gradients


def _levels(raw: Sequence[Tensor], strides: Sequence[int]) -> list[Level]:
    cells = [level.shape[2] * level.shape[3] for level in raw]
    return [
        Level(level.detach().contiguous(), float(step), level.shape[3], number, start)
        for level, step, number, start in zip(raw, strides, cells, starts_of(cells)[:-1], strict=True)
    ]


def _targets(level: Level, gt_index: Tensor, quality: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Targets:
    anchors, ground_truths = gt_index.shape[1], gt_labels.shape[1]
    return Targets(gt_index, quality, gt_boxes, gt_labels, anchors, ground_truths, level.raw.shape[1] - 5)
