"""RTMDet in Triton kernels: no tensor of pairs, no wait for the device, and shapes that never depend on the data.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet` and
`detoracle.reference.rtmdet_loss`. The assignment is in `detoracle.implementations.triton.rtmdet_kernels`, the loss in
`detoracle.implementations.triton.rtmdet_loss_kernels`. Everything is computed and summed in float32, from predictions
of float32, bfloat16 or float16. Sums have a fixed order, and what programs add up together are integers: a call repeats
to the last bit. It reads nothing back and no shape depends on the data, so that a CUDA graph can hold it.

What it trades: dynamic k depends on the best IoUs among the candidates of *all* ground truths of an image, so that each
ground truth walks them all, not only those near it; classes are read only where a claim is within reach. Memory is some
tens of bytes a prior, whatever the ground truths. Block sizes are fixed, but for those of the gradients. Maps are
copied if they are not contiguous. Limits: fewer than 2**16 images, fewer than 2**29 ground truths in all, padding
included, and a top-k of no more than 128.

Ties are broken as in the oracle. What differs from it: as in `batched`; float64 is refused. The gradient cannot be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import rtmdet as batched
from detoracle.implementations.batched import rtmdet_loss as terms
from detoracle.implementations.batched.anchor_head_boxes import inside_flags, valid_flags
from detoracle.implementations.registry import implements
from detoracle.implementations.triton import rtmdet_kernels as kernels
from detoracle.implementations.triton import rtmdet_loss_kernels as loss_kernels
from detoracle.implementations.triton.launching import (
    AS_WRITTEN,
    check_runs,
    check_size,
    lanes_for,
    listed,
    size_class,
    starts_of,
    tiles,
)
from detoracle.implementations.triton.matching import Terms
from detoracle.implementations.triton.rtmdet_kernels import Batch
from detoracle.implementations.triton.rtmdet_loss_kernels import Level, Settings, Targets
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "loss", "match"]

_UNMATCHED_OVERLAP = -1e8
_AVERAGE_EPS = 2.0**-23
_ANCHORS, _CLASSES = 128, 16  # of one program at a time


@implements("rtmdet.assign", name="triton")
@torch.no_grad()
def assign(
    class_logits: Tensor,
    boxes: Tensor,
    priors: Tensor,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    gt_masks: Tensor | None = None,
    topk: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
) -> Assignment:
    """Dynamic soft label assignment.

    Raises
    ------
    InputError
        If the kernels cannot run where the predictions are, or on their dtype; or of more than they can hold.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     points, one = torch.tensor([[0.0, 0, 8, 8], [8.0, 8, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    ...     gt, label = torch.tensor([[[1.0, 1, 15, 15]]]), torch.zeros(1, 1, dtype=torch.int64)
    ...     logits = torch.zeros(1, 2, 2)
    >>> assign(logits, gt.expand(1, 2, 4), points, one.expand(1, 2), gt, label, one).gt_index.tolist()
    [[-1, 0]]
    """
    check_runs(boxes, "boxes", where="rtmdet.assign")
    check_runs(class_logits, "class_logits", where="rtmdet.assign")
    found = match(
        [class_logits.mT], boxes.mT, priors, inside, gt_boxes, gt_labels, gt_valid, gt_masks=gt_masks,
        topk=topk, soft_center_radius=soft_center_radius, iou_weight=iou_weight,
    )  # fmt: skip
    dtype = torch.promote_types(boxes.dtype, gt_boxes.dtype)
    overlaps = found.extra["max_overlaps"].to(dtype)
    return Assignment(found.gt_index, found.quality.to(dtype), {**found.extra, "max_overlaps": overlaps})


def match(
    class_logits: Sequence[Tensor],
    boxes: Tensor,
    priors: Tensor,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    gt_masks: Tensor | None = None,
    topk: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
) -> Assignment:
    """Assign priors, whose predictions may lie anywhere.

    Parameters
    ----------
    class_logits : list of Tensor (B, C, Al) float
        One a level.
    boxes : Tensor (B, 4, A) float
        Left, top, right, bottom in pixels.
    priors, inside, gt_boxes, gt_labels, gt_valid, gt_masks, topk, soft_center_radius, iou_weight
        As in the operation.

    Returns
    -------
    Assignment
        Of float32 quality and overlaps.

    Raises
    ------
    InputError
        If there are more images or ground truths than a launch can have, or a larger top-k than a program holds.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     box, one = torch.tensor([[[0.0], [0], [8], [8]]]), torch.ones(1, 1, dtype=torch.bool)
    ...     logit, point, label = torch.zeros(1, 1, 1), torch.tensor([[4.0, 4, 8, 8]]), torch.tensor([[0]])
    >>> match([logit], box, point, one, box.mT, label, one).quality.tolist()
    [[1.0]]
    """
    (images, _, anchors), ground_truths = boxes.shape, gt_valid.shape[1]
    check_size(gt_boxes, "gt_boxes", images=images, rows=images * ground_truths, where="rtmdet.assign")
    lanes = lanes_for(topk, where="rtmdet.assign")
    gt_index = torch.where(inside, BACKGROUND, IGNORED)
    quality = boxes.new_zeros(images, anchors, dtype=torch.float32)
    dynamic_k = torch.zeros_like(gt_valid, dtype=torch.int64)
    if not (images and ground_truths and anchors):
        return Assignment(gt_index, quality, {"dynamic_k": dynamic_k, "max_overlaps": torch.zeros_like(quality)})
    num_classes = class_logits[0].shape[1]
    batch = Batch(
        priors=priors.float().contiguous(),
        inside=inside.contiguous(),
        boxes=boxes,
        box_strides=boxes.stride(),
        maps=tuple(class_logits),
        map_strides=tuple(level.stride() for level in class_logits),
        starts=starts_of(level.shape[2] for level in class_logits),
        gt_boxes=gt_boxes.float().contiguous(),
        gt_labels=gt_labels.contiguous(),
        counted=batched._with_class(gt_labels, gt_valid, num_classes).contiguous(),
        centers=batched._centers(gt_boxes.float(), gt_masks).contiguous(),
        num_anchors=anchors,
        num_gts=ground_truths,
        num_classes=num_classes,
        radius=float(soft_center_radius),
        iou_weight=float(iou_weight),
    )
    sums = Terms(torch.empty_like(quality), torch.empty_like(quality), torch.empty_like(gt_index, dtype=torch.int32))
    settings: dict[str, Any] = {"LEVELS": len(class_logits), "ANCHORS": _ANCHORS, **AS_WRITTEN}
    blocks = (triton.cdiv(anchors, _ANCHORS), images)

    candidate = torch.empty_like(inside)
    kernels.candidates[blocks](batch, sums, candidate, CLASSES=_CLASSES, **settings)
    places, numbers = listed(candidate)
    claimed = torch.zeros_like(gt_index)
    kernels.claim[images * ground_truths,](
        batch, sums, places, numbers, claimed, dynamic_k, topk, LANES=lanes, **settings
    )
    kernels.resolve[blocks](batch, sums, claimed, gt_index, quality, **settings)
    unmatched = torch.where(numbers[:, None] > 0, _UNMATCHED_OVERLAP, 0.0).to(quality)
    overlaps = torch.where(gt_index >= 0, quality, unmatched)
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k, "max_overlaps": overlaps})


@implements("rtmdet.loss", name="triton")
def loss(
    class_logits: Sequence[Tensor],
    distances: Sequence[Tensor],
    strides: Sequence[int | Sequence[int]],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    pad_shapes: Tensor | None = None,
    image_shapes: Tensor | None = None,
    gt_masks: Tensor | None = None,
    ignored_boxes: Tensor | None = None,
    offset: float = 0.0,
    allowed_border: float = -1,
    topk: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
    pos_weight: float = -1.0,
    beta: float = 2.0,
    class_loss_weight: float = 1.0,
    box_loss_weight: float = 2.0,
    giou_eps: float = 1e-6,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, and classification and box of each level.

    Raises
    ------
    InputError
        As `assign`.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    ...     maps, label = ([torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]), torch.tensor([[0]])
    >>> [round(float(part), 4) for part in loss(*maps, [8], gt, label, one).values()]
    [0.9277, 0.5688, 0.3589]
    """
    check_runs(class_logits[0], "class_logits", where="rtmdet.loss")
    check_runs(distances[0], "distances", where="rtmdet.loss")
    with torch.no_grad():
        sizes = [tuple(level.shape[2:]) for level in class_logits]
        lengths = [height * width for height, width in sizes]
        priors = batched.priors(sizes, strides, offset=offset, like=distances[0].new_zeros((), dtype=torch.float32))
        inside = gt_valid.new_ones(len(gt_valid), len(priors))
        if pad_shapes is not None:
            inside = valid_flags(pad_shapes, sizes=sizes, strides=strides, base_anchors=[1] * len(sizes))
        if image_shapes is not None:
            inside = inside_flags(priors, inside, image_shapes, allowed_border=allowed_border)
        sides = torch.cat([level.detach().flatten(2) for level in distances], dim=2)
        boxes = torch.cat([priors[:, :2].mT - sides[:, :2], priors[:, :2].mT + sides[:, 2:]], dim=1)
        logits = [level.detach().flatten(2) for level in class_logits]
        assignment = match(
            logits, boxes, priors, inside, gt_boxes, gt_labels, gt_valid, gt_masks=gt_masks,
            topk=topk, soft_center_radius=soft_center_radius, iou_weight=iou_weight,
        )  # fmt: skip
        nothing = torch.stack([level.sum() for level in torch.split(boxes, lengths, dim=2)]) * 0
        average_factor = terms._mean_over_ranks(assignment.quality.sum()).clamp(min=1)
    settings = Settings(float(beta), float(pos_weight), float(giou_eps))
    sums = _Loss.apply(  # type: ignore[no-untyped-call]
        assignment, settings, priors, gt_boxes, gt_labels, *class_logits, *distances
    )
    classes, box, unweighted, populated, weighted = sums.unbind(1)
    box = (box_loss_weight * (box / (1 + _AVERAGE_EPS))).where(weighted > 0, unweighted.where(populated > 0, nothing))
    classification = class_loss_weight * (classes / (1 + _AVERAGE_EPS)) / average_factor
    box = box / average_factor
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}


class _Loss(torch.autograd.Function):
    """Sums of each level, (L, 5), as in `sums` of the kernels; writes the gradients once."""

    @staticmethod
    def forward(
        ctx: Any,
        assignment: Assignment,
        settings: Settings,
        priors: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        *maps: Tensor,
    ) -> Tensor:
        """Sum."""
        targets = (
            priors,
            assignment.gt_index,
            assignment.quality,
            gt_boxes.float().contiguous(),
            gt_labels.contiguous(),
        )
        ctx.settings = settings
        ctx.save_for_backward(*targets, *maps)
        sums = []
        for level in _levels(maps):
            blocks = (triton.cdiv(level.cells, _ANCHORS), len(gt_boxes))
            parts = priors.new_zeros(blocks[0] * blocks[1], 5)
            loss_kernels.sums[blocks](
                level, _targets(level, *targets), settings, parts,
                SQUARE=settings.beta == 2.0, CELLS=_ANCHORS, CLASSES=_CLASSES, **AS_WRITTEN,
            )  # fmt: skip
            sums.append(parts.sum(0))
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Write."""
        targets, maps = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        gradients: list[tuple[Tensor, Tensor]] = []
        for level, scales in zip(_levels(maps), to_sums.float().contiguous(), strict=True):
            found = torch.empty_like(level.class_logits), torch.empty_like(level.distances)
            loss_kernels.gradients[tiles(level.cells, len(level.distances))](
                level, _targets(level, *targets), ctx.settings, scales, *found, size_class(*found),
                SQUARE=ctx.settings.beta == 2.0, **AS_WRITTEN,
            )  # fmt: skip
            gradients.append(found)
        to_logits, to_distances = zip(*gradients, strict=True)
        return None, None, None, None, None, *to_logits, *to_distances


def _levels(maps: Sequence[Tensor]) -> list[Level]:
    """Levels of as many maps of class logits and then as many of distances."""
    pairs = list(zip(maps[: len(maps) // 2], maps[len(maps) // 2 :], strict=True))
    cells = [logits.shape[2] * logits.shape[3] for logits, _ in pairs]
    return [
        Level(logits.detach().contiguous(), distances.detach().contiguous(), number, start)
        for (logits, distances), number, start in zip(pairs, cells, starts_of(cells)[:-1], strict=True)
    ]


def _targets(
    level: Level, priors: Tensor, gt_index: Tensor, quality: Tensor, gt_boxes: Tensor, gt_labels: Tensor
) -> Targets:
    sizes = gt_index.shape[1], gt_labels.shape[1], level.class_logits.shape[1]
    return Targets(priors, gt_index, quality, gt_boxes, gt_labels, *sizes)
