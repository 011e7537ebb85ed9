"""RTMDet by way of what can matter: costs of few pairs, and class losses whose gradient is made with them.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet` and
`detoracle.reference.rtmdet_loss`. The assignment is in `detoracle.implementations.sparse.rtmdet_matching`. The quality
focal loss covers every class of every prior: it is computed in pieces that fit a cache, and its gradient is written
beside it (`detoracle.implementations.sparse.focal`). Positives, which weigh nothing there, are computed anew.

What it trades: it waits for the device some tens of times, for sizes, and so suits a CPU; the gradient of the logits
lives from the forward pass on, in the logits' dtype and no less than float32. A second backward pass through one loss
computes it anew. What differs from the oracle: as in `batched`; moreover, among equal costs the first prior is claimed.
The gradient cannot be differentiated again. Priors that are no grid are assigned by `batched`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import rtmdet as batched
from detoracle.implementations.batched import rtmdet_loss as terms
from detoracle.implementations.batched.anchor_head_boxes import inside_flags, valid_flags
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse.dynamic_k import ClassRows, Truths
from detoracle.implementations.sparse.focal import focal_background_loss
from detoracle.implementations.sparse.grid import Grid
from detoracle.implementations.sparse.maps import flat, listed, read
from detoracle.implementations.sparse.memory import zeros
from detoracle.implementations.sparse.rtmdet_matching import RTMDetMatcher, Settings
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "loss"]

_UNMATCHED_OVERLAP = -1e8
_AVERAGE_EPS = 2.0**-23


# ---------------------------------------------------------------------------------------------------------- assignment
@implements("rtmdet.assign", name="sparse")
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

    Examples
    --------
    >>> points, one = batched.priors([(2, 2)], [8]), torch.ones(1, 1, dtype=torch.bool)
    >>> boxes = batched.decode(points[:, :2], torch.full((1, 4, 4), 8.0))
    >>> gt, label = torch.tensor([[[1.0, 1, 15, 15]]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> assign(torch.zeros(1, 4, 2), boxes, points, one.expand(1, 4), gt, label, one).gt_index.tolist()
    [[-1, -1, -1, 0]]
    """
    grid = Grid.of_points(priors[:, :2], priors[:, 2])
    settings = Settings(topk, soft_center_radius, iou_weight)
    if grid is None:
        return batched.assign(
            class_logits, boxes, priors, inside, gt_boxes, gt_labels, gt_valid, gt_masks=gt_masks, **settings._asdict()
        )

    def class_rows(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, anchor = wanted.nonzero(as_tuple=True)
        return image, anchor, class_logits[image, anchor]

    counted = batched._with_class(gt_labels, gt_valid, class_logits.shape[-1])
    centers = batched._centers(gt_boxes, gt_masks)
    return _assign(class_rows, boxes, priors, grid, inside, gt_boxes, gt_labels, counted, centers, settings)


def _assign(
    class_rows: ClassRows,
    boxes: Tensor,
    priors: Tensor,
    grid: Grid,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    counted: Tensor,
    centers: Tensor,
    settings: Settings,
) -> Assignment:
    image, column = counted.nonzero(as_tuple=True)
    left, top, right, bottom = gt_boxes[..., None].unbind(2)
    in_columns, in_rows = (grid.x > left) & (grid.x < right), (grid.y > top) & (grid.y < bottom)
    candidate = inside & grid.covered(in_columns & counted[..., None], in_rows)
    truths = Truths(image, gt_boxes[image, column], gt_labels[image, column].long(), counted.sum(1))

    gt_index = torch.where(inside, BACKGROUND, IGNORED)
    quality = torch.zeros_like(gt_index, dtype=torch.promote_types(boxes.dtype, gt_boxes.dtype))
    matched = candidate.any(1, keepdim=True)
    overlaps = torch.where(matched, _UNMATCHED_OVERLAP, 0.0).to(quality).expand_as(quality).clone()
    dynamic_k = torch.zeros_like(counted, dtype=torch.int64)
    if bool(matched.any()):
        matcher = RTMDetMatcher(boxes, class_rows, priors, grid, truths, centers[image, column], candidate, settings)
        winner, dynamic_k[image, column] = matcher.match()
        at = (winner >= 0).nonzero(as_tuple=True)
        row = winner[at]
        iou = matcher.iou(row, at[1]).to(quality)
        gt_index[at], quality[at], overlaps[at] = column[row], iou, iou
    return Assignment(gt_index, quality, {"dynamic_k": dynamic_k, "max_overlaps": overlaps})


# ---------------------------------------------------------------------------------------------------------------- loss
@implements("rtmdet.loss", name="sparse")
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
    background: Callable[..., Tensor] = focal_background_loss,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, and classification and box of each level; `background` treats all logits.

    Examples
    --------
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, label = ([torch.zeros(1, 1, 2, 2)], [torch.full((1, 4, 2, 2), 8.0)]), torch.zeros(1, 1, dtype=torch.int64)
    >>> [round(float(part), 4) for part in loss(*maps, [8], gt, label, one).values()]
    [0.9277, 0.5688, 0.3589]
    """
    sizes = [tuple(level.shape[2:]) for level in class_logits]
    lengths = [height * width for height, width in sizes]
    dtype = torch.promote_types(distances[0].dtype, torch.float32)
    priors = batched.priors(sizes, strides, offset=offset, like=distances[0].new_zeros((), dtype=dtype))
    inside = gt_valid.new_ones(len(gt_valid), len(priors))
    if pad_shapes is not None:
        inside = valid_flags(pad_shapes, sizes=sizes, strides=strides, base_anchors=[1] * len(sizes))
    if image_shapes is not None:
        inside = inside_flags(priors, inside, image_shapes, allowed_border=allowed_border)

    boxes = batched.decode(priors[:, :2], torch.cat([level.flatten(2) for level in distances], dim=2).mT)
    settings = Settings(topk, soft_center_radius, iou_weight)
    assignment = _assign_maps(
        class_logits, lengths, boxes.detach(), priors, inside, gt_boxes, gt_labels, gt_valid, gt_masks, settings
    )
    where = listed(assignment.positive, lengths)
    image, anchor = flat(where, lengths)
    ground_truth, quality = assignment.gt_index[image, anchor], assignment.quality[image, anchor]
    counts = [len(images) for images, _, _ in where]
    truth_boxes, labels = gt_boxes[image, ground_truth], gt_labels[image, ground_truth].long()
    targets = torch.split(quality, counts)
    average_factor = terms._mean_over_ranks(assignment.quality.sum()).clamp(min=1)
    scale = class_loss_weight / (1 + _AVERAGE_EPS) / float(average_factor)
    weights = (assignment.gt_index == BACKGROUND).to(dtype).mul_(scale)
    positives = [
        _Positives((images, label, cell), target.to(dtype), scale * pos_weight if pos_weight > 0 else scale)
        for (images, _, cell), label, target in zip(where, torch.split(labels, counts), targets, strict=True)
    ]
    focal = _Focal(background, beta, positives, torch.split(weights, lengths, dim=1))
    classification: Tensor = _ClassLoss.apply(focal, *class_logits)  # type: ignore[no-untyped-call]

    chosen = zip(torch.split(boxes[image, anchor], counts), torch.split(truth_boxes, counts), targets, strict=True)
    box = torch.stack(
        [
            terms.giou_loss(*rows, eps=giou_eps, average_factor=1.0, loss_weight=box_loss_weight)
            if len(rows[0])
            else level.sum() * 0
            for rows, level in zip(chosen, torch.split(boxes, lengths, dim=1), strict=True)
        ]
    )
    box = box / average_factor
    return {"total": classification.sum() + box.sum(), "classification": classification, "box": box}


@torch.no_grad()
def _assign_maps(
    class_logits: Sequence[Tensor],
    lengths: Sequence[int],
    boxes: Tensor,
    priors: Tensor,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    gt_masks: Tensor | None,
    settings: Settings,
) -> Assignment:
    """Assign from maps of logits, of which only some priors are read."""
    grid = Grid.of_points(priors[:, :2], priors[:, 2])
    if grid is None:
        logits = torch.cat([level.flatten(2) for level in class_logits], dim=2).to(boxes.dtype).mT
        return batched.assign(
            logits, boxes, priors, inside, gt_boxes, gt_labels, gt_valid, gt_masks=gt_masks, **settings._asdict()
        )

    def class_rows(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = listed(wanted, lengths)
        return *flat(where, lengths), read(class_logits, where).to(boxes.dtype)

    counted = batched._with_class(gt_labels, gt_valid, class_logits[0].shape[1])
    centers = batched._centers(gt_boxes, gt_masks)
    return _assign(class_rows, boxes, priors, grid, inside, gt_boxes, gt_labels, counted, centers, settings)


class _Positives(NamedTuple):
    """Positives of a level, (P,) each: image, class and cell; quality; and what their class losses weigh."""

    where: tuple[Tensor, Tensor, Tensor]
    quality: Tensor
    weight: float


class _Focal(NamedTuple):
    """What treats all logits, an exponent, and level by level positives and the weights (B, H*W) of other priors."""

    background: Callable[..., Tensor]
    beta: float
    positives: list[_Positives]
    weights: tuple[Tensor, ...]


class _ClassLoss(torch.autograd.Function):
    """Quality focal loss of each level (L,), and with it the gradient."""

    @staticmethod
    def forward(ctx: Any, focal: _Focal, *levels: Tensor) -> Tensor:
        """Sum up."""
        ctx.focal = focal
        ctx.save_for_backward(*levels)
        losses, ctx.gradients = _focal_levels(levels, focal, with_gradients=any(ctx.needs_input_grad))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out what the forward pass has left, which a second backward pass makes anew."""
        levels: tuple[Tensor, ...] = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, []
        if not gradients:
            _, gradients = _focal_levels(levels, ctx.focal, with_gradients=True)
        for gradient, scale in zip(gradients, to_losses.tolist(), strict=True):
            if scale != 1:
                gradient.mul_(scale)
        return None, *(g.view(level.shape).to(level.dtype) for g, level in zip(gradients, levels, strict=True))


def _focal_levels(levels: Sequence[Tensor], focal: _Focal, *, with_gradients: bool) -> tuple[Tensor, list[Tensor]]:
    """Losses (L,) of levels, and their gradients (B, C, H*W) if wanted, in float32 at least."""
    maps = [level.detach().flatten(2) for level in levels]
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    own = _own_losses(maps, focal)
    for logits, positives, weight, (own_loss, own_slope) in zip(maps, focal.positives, focal.weights, own, strict=True):
        gradient = zeros(logits.shape, like=weight[:0]) if with_gradients else None
        loss = focal.background(logits, weight, gamma=focal.beta, gradient=gradient)
        losses.append(loss + own_loss.sum() * positives.weight + _others(logits, positives, focal, gradient))
        if gradient is not None:
            gradient[positives.where] = own_slope * positives.weight
            gradients.append(gradient)
    return torch.stack(losses), gradients


def _own_losses(maps: list[Tensor], focal: _Focal) -> list[tuple[Tensor, Tensor]]:
    """Losses (P,) of positives' own classes, and slopes, of each level."""
    counts = [len(positives.quality) for positives in focal.positives]
    quality = torch.cat([positives.quality for positives in focal.positives])
    read = [logits[positives.where] for logits, positives in zip(maps, focal.positives, strict=True)]
    with torch.enable_grad():
        logits = torch.cat(read).to(quality.dtype).requires_grad_()
        losses = terms._focal(logits, quality, False, focal.beta)
        [slopes] = torch.autograd.grad(losses.sum(), logits)
    return list(zip(torch.split(losses.detach(), counts), torch.split(slopes, counts), strict=True))


def _others(logits: Tensor, positives: _Positives, focal: _Focal, gradient: Tensor | None) -> Tensor:
    """Loss of positives' other classes, logits (B, C, N); writes the gradient of all if there is room, 0 of the own."""
    image, label, cell = positives.where
    others = logits[image, :, cell].scatter_(1, label[:, None], -torch.inf).mT.contiguous()[None]
    room = None if gradient is None else torch.empty_like(others, dtype=gradient.dtype)
    weights = positives.quality.new_full((1, len(image)), positives.weight)
    loss = focal.background(others, weights, gamma=focal.beta, gradient=room)
    if gradient is not None and room is not None:
        gradient[image, :, cell] = room[0].mT
    return loss
