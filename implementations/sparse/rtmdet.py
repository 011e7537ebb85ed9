"""RTMDet by way of what can matter: costs of few pairs, and class losses whose gradient is made with them.

Arguments, results and their meaning are those of the operations in `detoracle.reference.rtmdet` and
`detoracle.reference.rtmdet_loss`. The assignment is in `detoracle.implementations.sparse.rtmdet_matching`. The quality
focal loss covers every class of every prior: it is computed in pieces that fit a cache, from one sigmoid and one
softplus an entry, and its gradient is written beside it.

What it trades: it waits for the device some tens of times, for sizes, and so suits a CPU; the gradient of the logits
lives from the forward pass on, in the logits' dtype and no less than float32. A second backward pass through one loss
computes it anew. What differs from the oracle: as in `batched`; moreover, among equal costs the first prior is claimed.
The gradient cannot be differentiated again. Priors that are no grid are assigned by `batched`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import rtmdet as batched
from detoracle.implementations.batched import rtmdet_loss as terms
from detoracle.implementations.batched.anchor_head import inside_flags, valid_flags
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse.dynamic_k import ClassRows, Truths
from detoracle.implementations.sparse.grid import Grid
from detoracle.implementations.sparse.maps import flat, listed, read
from detoracle.implementations.sparse.memory import zeros
from detoracle.implementations.sparse.rtmdet_matching import RTMDetMatcher, Settings
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "loss"]

_UNMATCHED_OVERLAP = -1e8
_AVERAGE_EPS = 2.0**-23
_CHUNK = 1 << 17  # logits treated at a time: a few such tensors fit a cache


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
) -> dict[str, Tensor]:
    """Training loss of a batch: total, and classification and box of each level.

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
    own = [(images, label, cell) for (images, _, cell), label in zip(where, torch.split(labels, counts), strict=True)]
    weights = None
    if pos_weight > 0 or pad_shapes is not None or image_shapes is not None:
        weights = torch.split(terms._label_weights(assignment.gt_index, pos_weight, gt_boxes), lengths, dim=1)
    targets = torch.split(quality, counts)
    sums: Tensor = _ClassLoss.apply(own, targets, weights, beta, *class_logits)  # type: ignore[no-untyped-call]

    chosen = zip(torch.split(boxes[image, anchor], counts), torch.split(truth_boxes, counts), targets, strict=True)
    box = torch.stack(
        [
            terms.giou_loss(*rows, eps=giou_eps, average_factor=1.0, loss_weight=box_loss_weight)
            if len(rows[0])
            else level.sum() * 0
            for rows, level in zip(chosen, torch.split(boxes, lengths, dim=1), strict=True)
        ]
    )
    average_factor = terms._mean_over_ranks(assignment.quality.sum()).clamp(min=1)
    classification = class_loss_weight * (sums / (1 + _AVERAGE_EPS)) / average_factor
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


class _ClassLoss(torch.autograd.Function):
    """Quality focal loss of each level, summed (L,), and with it the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        own: Sequence[_Own],
        quality: Sequence[Tensor],
        weights: Sequence[Tensor] | None,
        beta: float,
        *levels: Tensor,
    ) -> Tensor:
        """Sum up; `own` and `quality` list the entries whose target is not 0."""
        ctx.arguments = own, quality, weights, beta
        ctx.save_for_backward(*levels)
        sums, ctx.gradients = _focal_levels(levels, *ctx.arguments, with_gradients=any(ctx.needs_input_grad))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Scale in place what the forward pass has left, which a second backward pass makes anew."""
        levels: tuple[Tensor, ...] = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, []
        if not gradients:
            _, gradients = _focal_levels(levels, *ctx.arguments, with_gradients=True)
        scaled = (
            gradient.mul_(scale).view(level.shape).to(level.dtype)
            for gradient, scale, level in zip(gradients, to_sums, levels, strict=True)
        )
        return None, None, None, None, *scaled


_Own = tuple[Tensor, Tensor, Tensor]  # image, class and cell of entries, by image


def _focal_levels(
    levels: Sequence[Tensor],
    own: Sequence[_Own],
    quality: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    beta: float,
    *,
    with_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Sums (L,) over levels, and their gradients (B, C, H*W) if wanted, in float32 at least."""
    dtype = torch.promote_types(levels[0].dtype, torch.float32)
    sums: list[Tensor] = []
    gradients: list[Tensor] = []
    for number, level in enumerate(levels):
        logits = level.detach().flatten(2)
        if with_gradients:
            gradients.append(zeros(logits.shape, like=logits.new_empty(0, dtype=dtype)))
        room = gradients[-1] if with_gradients else None
        rows = _focal_rows(logits, own[number], quality[number].to(dtype), beta, room)
        if weights is not None:
            rows = rows * weights[number]
            for gradient in gradients[number:]:
                gradient.mul_(weights[number][:, None])
        sums.append(rows.sum())
    return torch.stack(sums), gradients


def _focal_rows(logits: Tensor, own: _Own, quality: Tensor, beta: float, gradient: Tensor | None) -> Tensor:
    """Quality focal loss (B, N) of logits (B, C, N), summed over classes; writes its gradient if there is room."""
    images, classes, cells = logits.shape
    image, label, cell = own
    with torch.enable_grad():
        own_logits = logits[own].to(quality.dtype).requires_grad_()
        own_loss = terms._focal(own_logits, quality, False, beta)
        [own_gradient] = torch.autograd.grad(own_loss.sum(), own_logits)
    own_loss = own_loss.detach()

    rows, entries = quality.new_empty(images, cells), quality.new_empty(classes, cells)
    step, last = max(1, _CHUNK // max(cells, 1)), 0
    for number, count in enumerate(image.bincount(minlength=images).tolist()):
        for start in range(0, classes, step):
            part = slice(start, start + step)
            x = logits[number, part].to(quality.dtype)
            probability = torch.sigmoid(x)
            weight = probability**beta
            entropy = F.softplus(x, threshold=40)  # log(1 + exp(x)), from 40 on equal to x in any dtype
            torch.mul(entropy, weight, out=entries[part])
            if gradient is not None:
                # The product rule, where the slope of the entropy is p and that of the weight beta * weight * (1 - p).
                slope = (1 - probability).mul_(entropy)
                torch.mul(probability.add_(slope, alpha=beta), weight, out=gradient[number, part])
        first, last = last, last + count
        entries[label[first:last], cell[first:last]] = own_loss[first:last]
        torch.sum(entries, 0, out=rows[number])
    if gradient is not None:
        gradient[own] = own_gradient
    return rows
