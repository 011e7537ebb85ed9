"""YOLOv8 by way of what can matter: pairs inside boxes, losses of positives, and a gradient that is written once.

Arguments, results and their meaning are those of the operations in `detoracle.reference.yolov8` and
`detoracle.reference.yolov8_loss`. The assignment is in `detoracle.implementations.sparse.yolov8_matching`. Only boxes
of anchors inside some ground truth are decoded. The class loss covers every logit: it is computed in pieces that fit a
cache (`detoracle.implementations.sparse.background`), and the gradient of the whole loss with it, straight into maps.

What it trades: it waits for the device some tens of times, for sizes, and so suits a CPU; memory grows with the pairs
inside boxes; the gradient lives from the forward pass on, in float32 at least. A second backward pass through one loss
computes it anew. What differs from the oracle: as in `batched`. The gradient cannot be differentiated again. Anchor
points that are no grid are left to `batched`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import yolov8 as batched
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse.background import background_loss
from detoracle.implementations.sparse.grid import Grid
from detoracle.implementations.sparse.maps import Listed, flat, listed
from detoracle.implementations.sparse.memory import zeros
from detoracle.implementations.sparse.yolov8_matching import Predictions, Settings, Truths, match
from detoracle.reference.assignment import Assignment

__all__ = ["assign", "loss"]


# ---------------------------------------------------------------------------------------------------------- assignment
@implements("yolov8.assign", name="sparse")
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

    Examples
    --------
    >>> points, one = torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> gt = torch.tensor([[[0.0, 0, 8, 8]]])
    >>> assign(torch.ones(1, 2, 3), gt.expand(1, 2, 4), points, gt, torch.tensor([[2]]), one).gt_index.tolist()
    [[0, -1]]
    """
    num_classes = scores.shape[-1]
    level = (anchor_points[:, 1].diff(prepend=anchor_points[:1, 1]) < 0).cumsum(0)  # the next one starts at the top
    grid = Grid.of_points(anchor_points, level)
    if grid is None:
        return batched.assign(
            scores, boxes, anchor_points, gt_boxes, gt_labels, gt_valid, topk=topk, alpha=alpha, beta=beta
        )
    predictions = Predictions(
        lambda wanted: boxes.permute(2, 0, 1),
        lambda image, label, row, anchor: scores[image[row], anchor, label[row]],
        num_classes,
    )
    truths = Truths(gt_boxes, gt_labels, batched._with_class(gt_labels, gt_valid, num_classes))
    gt_index, quality = match(predictions, grid, truths, Settings(topk, alpha, beta))
    return Assignment(gt_index, quality, _targets(gt_index, quality, gt_boxes, gt_labels, num_classes))


def _targets(
    gt_index: Tensor, quality: Tensor, gt_boxes: Tensor, gt_labels: Tensor, num_classes: int
) -> dict[str, Tensor]:
    """What an assignment trains: labels (B, A), boxes (B, A, 4), scores (B, A, C)."""
    scores = quality.new_zeros(*gt_index.shape, num_classes)
    scores.masked_fill_(quality.isnan()[..., None], torch.nan)
    if not gt_boxes.shape[1]:
        no_boxes = gt_boxes.new_zeros(*gt_index.shape, 4)
        return {"labels": torch.full_like(gt_index, num_classes), "boxes": no_boxes, "scores": scores}
    matched = gt_index.clamp(min=0)
    labels = gt_labels.gather(1, matched).clamp(min=0)
    image, anchor = (gt_index >= 0).nonzero(as_tuple=True)
    scores[image, anchor, labels[image, anchor]] = quality[image, anchor]
    return {"labels": labels, "boxes": gt_boxes.take_along_dim(matched[..., None], 1), "scores": scores}


# ---------------------------------------------------------------------------------------------------------------- loss
@implements("yolov8.loss", name="sparse")
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
    background: Callable[..., Tensor] = background_loss,
) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, cls, dfl; `background` treats all class logits.

    Examples
    --------
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss([torch.zeros(1, 65, 4, 4)], [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> {name: round(float(part), 4) for name, part in parts.items()}
    {'total': 5.5567, 'box': 0.0073, 'cls': 5.5452, 'dfl': 0.0041}
    """
    num_classes = raw[0].shape[1] - 4 * reg_max
    grid = Grid.of_maps([(level.shape[2], level.shape[3]) for level in raw], strides, like=raw[0])
    counted = batched._with_class(gt_labels, gt_valid & (gt_boxes.sum(-1) > 0), num_classes)
    truths = Truths(gt_boxes, gt_labels, counted)
    detached = [level.detach().flatten(2) for level in raw]
    positives = _assigned(detached, reg_max, grid, truths, Settings(topk, alpha, beta))
    gains = _Gains(background, box_gain, cls_gain, dfl_gain)
    total, parts = _Loss.apply(positives, gains, *raw)  # type: ignore[no-untyped-call]
    box, cls, dfl = parts.unbind()
    return {"total": total, "box": box, "cls": cls, "dfl": dfl}


class _Gains(NamedTuple):
    """What treats all class logits, and what the parts weigh."""

    background: Callable[..., Tensor]
    box: float
    cls: float
    dfl: float


class _Positives(NamedTuple):
    """Positives, level by level: where, and of each point (P, 2) and target box (P, 4) in cells, class, weight."""

    where: Listed
    point: Tensor
    target: Tensor
    label: Tensor
    weight: Tensor
    reg_max: int

    def of_levels(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split values of all positives."""
        return torch.split(values, [len(image) for image, _, _ in self.where])


@torch.no_grad()
def _assigned(maps: list[Tensor], reg_max: int, grid: Grid, truths: Truths, settings: Settings) -> _Positives:
    """Assign from maps (B, 4*R+C, H*W), of which only the anchors inside boxes are read."""
    channels, lengths = 4 * reg_max, grid.lengths
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    points = torch.stack(grid.cells(), dim=1) + 0.5
    stride = grid.points()[2]

    def boxes(wanted: Tensor) -> Tensor:
        distances = maps[0].new_empty(4, wanted.numel())
        for level, start, (image, _, cells) in zip(maps, starts, listed(wanted, lengths), strict=True):
            per_image = torch.split(cells, image.bincount(minlength=len(level)).tolist())
            pieces = zip(level[:, :channels], per_image, strict=True)  # one at a time, to fit a cache
            decoded = [_distances(logits.index_select(1, cell)) for logits, cell in pieces]
            distances.index_copy_(1, image * wanted.shape[1] + (cells + start), torch.cat(decoded, dim=1))
        left, top, right, bottom = distances.view(4, *wanted.shape)
        x, y = points.unbind(1)
        sides = torch.stack([x - left, y - top, x + right, y + bottom])
        return sides.mul_(stride).to(truths.boxes.dtype)

    def scores(image: Tensor, label: Tensor, row: Tensor, anchor: Tensor) -> Tensor:
        found = maps[0].new_empty(len(row))
        for level, start in zip(maps, starts, strict=True):
            length = level.shape[2]
            [here] = ((anchor >= start) & (anchor < start + length)).nonzero(as_tuple=True)
            first = (image * level.shape[1] + (channels + label)) * length - start
            place = first.index_select(0, row.index_select(0, here)) + anchor.index_select(0, here)
            found.index_copy_(0, here, level.reshape(-1).index_select(0, place))
        return found.sigmoid_()

    num_classes = maps[0].shape[1] - channels
    gt_index, quality = match(Predictions(boxes, scores, num_classes), grid, truths, settings)
    where = listed(gt_index >= 0, lengths)
    image, anchor = flat(where, lengths)
    ground_truth = gt_index[image, anchor]
    target = truths.boxes[image, ground_truth] / stride[anchor, None]
    label = truths.labels[image, ground_truth].long().clamp(0, num_classes - 1)
    return _Positives(where, points[anchor], target, label, quality[image, anchor], reg_max)


def _distances(logits: Tensor) -> Tensor:
    """Distances (4, N) in cells from box logits (4*R, N)."""
    bins = len(logits) // 4
    if bins == 1:
        return logits
    probability = torch.unflatten(logits, 0, (4, bins)).softmax(1)
    return probability.mul_(torch.arange(bins, dtype=logits.dtype, device=logits.device)[:, None]).sum(1)


def _box_logits(maps: Sequence[Tensor], where: Listed, channels: int) -> Tensor:
    """Box logits (N, 4*R) of what is listed, level by level."""
    parts = (level[image, :channels, cell] for level, (image, _, cell) in zip(maps, where, strict=True))
    return torch.cat(list(parts))


class _Loss(torch.autograd.Function):
    """Total, and box, class and DFL parts (3,), which train nothing; and with them the gradient."""

    @staticmethod
    def forward(ctx: Any, positives: _Positives, gains: _Gains, *raw: Tensor) -> tuple[Tensor, Tensor]:
        """Add up."""
        ctx.arguments = positives, gains
        ctx.save_for_backward(*raw)
        total, parts, ctx.gradients = _losses(raw, *ctx.arguments, with_gradients=any(ctx.needs_input_grad))
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out what the forward pass has left, which a second backward pass makes anew."""
        raw: tuple[Tensor, ...] = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, []
        if not gradients:
            _, _, gradients = _losses(raw, *ctx.arguments, with_gradients=True)
        if bool(to_total != 1):
            for gradient in gradients:
                gradient.mul_(to_total)
        return None, None, *(gradient.to(level.dtype) for gradient, level in zip(gradients, raw, strict=True))


def _losses(
    raw: Sequence[Tensor], positives: _Positives, gains: _Gains, *, with_gradients: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total (), parts (3,) and, if wanted, the gradient of the total to each level, in float32 at least."""
    where, channels, images = positives.where, 4 * positives.reg_max, len(raw[0])
    maps = [level.detach().flatten(2) for level in raw]
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    normaliser = positives.weight.sum(dtype=dtype).clamp(min=1)
    with torch.enable_grad():
        logits = _box_logits(maps, where, channels).requires_grad_()
        box, dfl = _box_losses(logits, positives, dtype)
        box = box / normaliser * gains.box
        if positives.reg_max > 1:  # a head without bins has no such part, not even 0 / NaN
            dfl = dfl / normaliser * gains.dfl
        to_logits = torch.autograd.grad((box + dfl) * images, logits)[0] if with_gradients else logits

    gradients = [zeros(level.shape, like=level.new_empty(0, dtype=dtype)) for level in maps] if with_gradients else []
    scale = gains.cls * images / float(normaliser)
    cls = normaliser.new_zeros(())
    per_level = (positives.of_levels(values) for values in (positives.label, positives.weight, to_logits))
    for number, (level, (image, _, cell), label, weight, rows) in enumerate(zip(maps, where, *per_level, strict=True)):
        own = image, channels + label, cell
        gradient = gradients[number] if with_gradients else None
        for index, class_logits in enumerate(level[:, channels:]):
            room = None if gradient is None else gradient[index, channels:]
            cls = cls + gains.background(class_logits, scale=scale, gradient=room)
        cls = cls - (level[own] * weight).sum(dtype=dtype)
        if gradient is not None:
            gradient[own] -= (weight * scale).to(dtype)
            gradient[image, :channels, cell] = rows.to(dtype)
    cls = cls / normaliser * gains.cls
    parts = torch.stack([box.detach(), cls, dfl.detach()])
    return parts.sum() * images, parts, [g.view(level.shape) for g, level in zip(gradients, raw, strict=False)]


def _box_losses(logits: Tensor, positives: _Positives, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums, weighted, of CIoU losses and DFL of positives' box logits (P, 4*R)."""
    _, point, target, _, weight, reg_max = positives
    predicted = [side[0] for side in batched._decoded(logits.mT[None], point)]
    ciou = batched._iou(batched._sides(predicted), batched._sides(target.unbind(-1)))
    box = ((1 - ciou) * weight).sum(dtype=dtype)
    if reg_max == 1:
        return box, torch.zeros_like(box)
    distances = batched.bbox2dist(point, target, reg_max=reg_max)
    dfl = batched._dfl(torch.unflatten(logits, -1, (4, reg_max)), distances)
    return box, (dfl * weight).sum(dtype=dtype)
