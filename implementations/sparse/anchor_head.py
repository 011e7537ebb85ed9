"""The anchor head with focal loss by way of what can matter: overlaps in pieces, and a gradient that is written once.

Arguments, results and their meaning are those of the operations in `detoracle.reference.anchor_head` and
`detoracle.reference.anchor_head_loss`. An image's overlaps are computed in pieces that fit a cache, of which only the
largest of every anchor and of every ground truth in each piece are kept; those few rows that hold the best overlap of a
ground truth are computed again for the anchors that equal it. The class loss covers every logit, and its gradient is
written beside it (`detoracle.implementations.sparse.focal`); boxes of positives alone are read.

What it trades: it loops over images and waits for the device several times in each, and so suits a CPU; memory is the
gradient's, which lives from the forward pass on, in float32 at least. A second backward pass through one loss computes
it anew. What differs from the oracle: as in `batched`. The class gradient cannot be differentiated again. Heads with
another class loss, and box deltas that are not finite, are left to `batched`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import anchor_head as batched
from detoracle.implementations.batched import anchor_head_terms as terms
from detoracle.implementations.batched.anchor_head_boxes import Strides, decode, encode, inside_flags, valid_flags
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse.anchor_head_overlaps import Overlaps, Pieces, Rules, boxes_of
from detoracle.implementations.sparse.focal import focal_background_loss
from detoracle.implementations.sparse.memory import zeros
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "loss"]

_EPS = 2.0**-23  # beside an average factor


# ---------------------------------------------------------------------------------------------------------- assignment
@implements("anchor_head.assign", name="sparse")
@torch.no_grad()
def assign(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    inside: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    pos_iou_thr: float = 0.5,
    neg_iou_thr: float | Sequence[float] = 0.4,
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
    match_low_quality: bool = True,
    ignore_iof_thr: float = -1.0,
    ignore_wrt_candidates: bool = True,
) -> Assignment:
    """MaxIoU: ground truth of each anchor, (B, A), and the IoU it has with it.

    Examples
    --------
    >>> boxes = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [0, 2, 8, 8]])
    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> assign(boxes, boxes[None, :1], one, one.expand(1, 3)).gt_index.tolist()
    [[0, -1, 0]]
    """
    low, high = (0.0, neg_iou_thr) if isinstance(neg_iou_thr, int | float) else neg_iou_thr
    rules = Rules(pos_iou_thr, low, high, min_pos_iou, gt_max_assign_all, match_low_quality)
    gt_index = torch.where(inside, BACKGROUND, IGNORED)
    quality = anchors.new_zeros(inside.shape)
    pieces = Pieces.of(boxes_of(anchors), gt_boxes.shape[1])
    for image, (boxes, valid, taking_part) in enumerate(zip(gt_boxes, gt_valid, inside, strict=True)):
        [truths] = valid.nonzero(as_tuple=True)
        if not len(truths):
            continue
        ignored = torch.zeros_like(taking_part)
        if ignore_boxes is not None and ignore_valid is not None and ignore_iof_thr > 0 and ignore_boxes.shape[1]:
            regions = ignore_boxes[image, None], ignore_valid[image, None]
            ignored = batched._covered(anchors, *regions, ignore_wrt_candidates)[0] > ignore_iof_thr
        overlaps = Overlaps(boxes_of(boxes[truths]), pieces, taking_part, ignored)
        chosen = overlaps.assigned(rules)
        gt_index[image] = torch.where(chosen >= 0, truths[chosen.clamp(min=0)], chosen)
        [positive] = (chosen >= 0).nonzero(as_tuple=True)
        quality[image, positive] = overlaps.of(chosen[positive], positive)
    return Assignment(gt_index, quality)


# ---------------------------------------------------------------------------------------------------------------- loss
@implements("anchor_head.loss", name="sparse")
def loss(
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_shapes: Tensor,
    pad_shapes: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    strides: Strides,
    allowed_border: float = -1.0,
    class_loss: str = "focal",
    background: Callable[..., Tensor] = focal_background_loss,
    **settings: Any,
) -> dict[str, Tensor]:
    """Loss per level: total, classification, box; `background` is what treats all logits.

    Examples
    --------
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps, shape = ([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 4, 1, 1)]), torch.tensor([[8, 8]])
    >>> parts = loss(*maps, boxes, boxes[None], torch.zeros(1, 1, dtype=torch.int64), one, shape, shape, strides=[8])
    >>> [round(float(parts[name]), 4) for name in ("classification", "box")]
    [0.0433, 0.0]
    """
    truths, shapes, ignored = (gt_boxes, gt_labels, gt_valid), (image_shapes, pad_shapes), (ignore_boxes, ignore_valid)
    finite = torch.stack([level.detach().sum() for level in bbox_preds]).isfinite().all()
    if class_loss != "focal" or not bool(finite):
        given = {"strides": strides, "allowed_border": allowed_border, "class_loss": class_loss, **settings}
        return batched.loss(cls_scores, bbox_preds, anchors, *truths, *shapes, *ignored, **given)
    valid = valid_flags(
        pad_shapes,
        sizes=[tuple(level.shape[2:]) for level in bbox_preds],
        strides=strides,
        base_anchors=[level.shape[1] // 4 for level in bbox_preds],
    )
    inside = inside_flags(anchors, valid, image_shapes, allowed_border=allowed_border)
    rules = {name: value for name, value in settings.items() if name in batched._ASSIGNER}
    gt_index = assign(anchors, gt_boxes, gt_valid, inside, *ignored, **rules).gt_index
    others = {name: value for name, value in settings.items() if name not in batched._ASSIGNER}
    return _loss(background, cls_scores, bbox_preds, anchors, gt_boxes, gt_labels, gt_index, **others)


def _loss(
    background: Callable[..., Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_index: Tensor,
    *,
    box_loss: str = "l1",
    pos_weight: float = -1.0,
    reg_decoded_bbox: bool = False,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    class_loss_weight: float = 1.0,
    box_loss_weight: float = 1.0,
    gamma: float = 2.0,
    alpha: float = 0.25,
    beta: float = 1.0,
    eps: float = 1e-6,
    **_: Any,  # of samplers and other class losses
) -> dict[str, Tensor]:
    """Losses of an assignment (B, A)."""
    divisor = (gt_index >= 0).sum(1).clamp(min=1).sum().to(torch.promote_types(cls_scores[0].dtype, torch.float32))
    average: dict[str, Any] = {"avg_factor": divisor, "loss_weight": box_loss_weight}
    lengths = [level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in bbox_preds]
    positives, box = [], []
    for deltas, own, matched in zip(
        bbox_preds, torch.split(anchors, lengths), torch.split(gt_index, lengths, dim=1), strict=True
    ):
        image, anchor = (matched >= 0).nonzero(as_tuple=True)
        ground_truth = matched[image, anchor]
        positives.append(_Positives(image, anchor, gt_labels[image, ground_truth].long()))
        predicted, target = deltas.flatten(2)[positives[-1].channels(deltas.shape[1], 4)], gt_boxes[image, ground_truth]
        if reg_decoded_bbox:
            predicted = decode(own[anchor], predicted, means=means, stds=stds)
        else:
            target = encode(own[anchor], target, means=means, stds=stds)
        weight = torch.ones_like(target)
        if box_loss == "smooth_l1":
            box.append(terms.smooth_l1_loss(predicted, target, weight, beta=beta, **average))
        elif box_loss == "giou":
            box.append(terms.giou_loss(predicted, target, weight, eps=eps, **average))
        else:
            box.append(terms.l1_loss(predicted, target, weight, **average))

    scale = class_loss_weight / (divisor + _EPS)
    weights = (gt_index == BACKGROUND).to(divisor.dtype).mul_((1 - alpha) * scale)
    focal = _Focal(background, gamma, alpha, scale * pos_weight if pos_weight > 0 else scale)
    classification: Tensor = _ClassLoss.apply(  # type: ignore[no-untyped-call]
        focal, positives, torch.split(weights, lengths, dim=1), *cls_scores
    )
    boxes = torch.stack(box)
    return {"total": classification.sum() + boxes.sum(), "classification": classification, "box": boxes}


class _Positives(NamedTuple):
    """Positives of a level: image, anchor within the level and class (P,)."""

    image: Tensor
    anchor: Tensor
    label: Tensor

    def channels(self, channels: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where their columns are in a map (B, K*columns, H*W) of so many channels: an index to (P, columns)."""
        per_cell = channels // columns
        column = torch.arange(columns, device=self.anchor.device)
        cell, number = self.anchor[:, None].div(per_cell, rounding_mode="floor"), self.anchor[:, None] % per_cell
        return self.image[:, None], number * columns + column, cell


class _Focal(NamedTuple):
    """What treats all logits; exponent and balance of the focal loss, and the weight of positives."""

    background: Callable[..., Tensor]
    gamma: float
    alpha: float
    weight: Tensor


class _ClassLoss(torch.autograd.Function):
    """Focal loss of each level (L,), and with it the gradient."""

    @staticmethod
    def forward(
        ctx: Any, focal: _Focal, positives: Sequence[_Positives], weights: Sequence[Tensor], *levels: Tensor
    ) -> Tensor:
        """Add up; `weights` are those of background anchors (B, A) of each level."""
        ctx.arguments = focal, positives, weights
        ctx.save_for_backward(*levels)
        losses, ctx.gradients = _focal_losses(levels, *ctx.arguments, with_gradients=any(ctx.needs_input_grad))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out what the forward pass has left, which a second backward pass makes anew."""
        levels: tuple[Tensor, ...] = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, []
        if not gradients:
            _, gradients = _focal_losses(levels, *ctx.arguments, with_gradients=True)
        if bool((to_losses != 1).any()):
            for gradient, scale in zip(gradients, to_losses, strict=True):
                gradient.mul_(scale)
        found = (gradient.view(level.shape).to(level.dtype) for gradient, level in zip(gradients, levels, strict=True))
        return None, None, None, *found


def _focal_losses(
    levels: Sequence[Tensor],
    focal: _Focal,
    positives: Sequence[_Positives],
    weights: Sequence[Tensor],
    *,
    with_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Losses (L,) of maps, and their gradients (B, K*C, H*W) if wanted, in float32 at least."""
    dtype = focal.weight.dtype
    losses, gradients = [], []
    for level, own, weight in zip(levels, positives, weights, strict=True):
        maps = level.detach().flatten(2)
        images, channels, cells = maps.shape
        per_cell = weight.shape[1] // max(1, cells)
        columns = channels // per_cell
        room = zeros(maps.shape, like=maps.new_empty(0, dtype=dtype)) if with_gradients else None
        total = focal.background(
            maps.reshape(-1, columns, cells),
            weight.view(images, cells, per_cell).mT.reshape(-1, cells),
            gamma=focal.gamma,
            gradient=None if room is None else room.view(-1, columns, cells),
        )
        index = own.channels(channels, columns)
        with torch.enable_grad():
            rows = maps[index].to(dtype).requires_grad_()
            loss = terms.sigmoid_focal_loss(
                rows, own.label, focal.weight.expand(len(rows)), gamma=focal.gamma, alpha=focal.alpha, reduction="sum"
            )
            if room is not None:
                room[index] = torch.autograd.grad(loss, rows)[0]
                gradients.append(room)
        losses.append(total + loss.detach())
    return torch.stack(losses), gradients
