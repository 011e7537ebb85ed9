"""The anchor head with focal loss in Triton kernels: no tensor of pairs, no wait for the device, shapes of no data.

Arguments, results and their meaning are those of the operations in `detoracle.reference.anchor_head` and
`detoracle.reference.anchor_head_loss`. The assignment is in `detoracle.implementations.triton.anchor_head_kernels`, the
loss in `detoracle.implementations.triton.anchor_head_loss_kernels`. Everything is computed and summed in float32, from
anchors, boxes and predictions of float32, bfloat16 or float16. Sums have a fixed order, and what programs combine out
of order are integers: a call repeats to the last bit. It reads nothing back and no shape depends on the data, so that a
CUDA graph can hold it.

What it trades: anchors may be any boxes, and a ground truth claims anchors however little they overlap, so that all
pairs are computed, twice, in registers; the backward pass reads the maps again. Memory is 13 bytes an anchor of each
image beside the gradients. Block sizes are fixed, but for those of the gradients. Maps are copied if they are not
contiguous. Limits: fewer than 2**16 images, and fewer than 2**29 anchors, and 2**29 ground truths and regions in all,
padding included.

What differs from the oracle: as in `batched`; float64 is refused. The gradient cannot be differentiated again. Heads
with another class loss are left to `batched`, whose random sampler waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.batched import anchor_head as batched
from detoracle.implementations.batched.anchor_head_boxes import Strides, inside_flags, valid_flags
from detoracle.implementations.registry import implements
from detoracle.implementations.triton import anchor_head_kernels as kernels
from detoracle.implementations.triton import anchor_head_loss_kernels as loss_kernels
from detoracle.implementations.triton.anchor_head_kernels import Batch, Rules
from detoracle.implementations.triton.anchor_head_loss_kernels import Level, Settings, Targets
from detoracle.implementations.triton.launching import AS_WRITTEN, check_runs, check_size, size_class, starts_of, tiles
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["assign", "loss"]

_ANCHORS, _CELLS, _CLASSES = 512, 128, 16  # of one program at a time
_NO_KEY = 2**63 - 1
_LOSSES = {"l1": loss_kernels.L1.value, "smooth_l1": loss_kernels.SMOOTH_L1.value, "giou": loss_kernels.GIOU.value}
_RATIO_LIMIT = abs(math.log(16 / 1000))  # of a decoded side to the anchor's, as a logarithm
_EPS = 2.0**-23  # beside an average factor


# ---------------------------------------------------------------------------------------------------------- assignment
@implements("anchor_head.assign", name="triton")
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

    Raises
    ------
    InputError
        If the kernels cannot run where the anchors are, or on their dtype, or there are more rows than can be
        addressed.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     boxes = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [0, 2, 8, 8]])
    ...     one, three = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    >>> assign(boxes, boxes[None, :1], one, three).gt_index.tolist()
    [[0, -1, 0]]
    """
    check_runs(anchors, "anchors", where="anchor_head.assign")
    (images, number), ground_truths = inside.shape, gt_boxes.shape[1]
    if ignore_boxes is None or ignore_valid is None or not ignore_iof_thr > 0:
        ignore_boxes, ignore_valid = gt_boxes[:, :0], gt_valid[:, :0]
    regions = ignore_boxes.shape[1]
    for name, boxes, rows in (
        ("anchors", anchors, number),
        ("gt_boxes", gt_boxes, images * ground_truths),
        ("ignore_boxes", ignore_boxes, images * regions),
    ):
        check_size(boxes, name, images=images, rows=rows, where="anchor_head.assign")
    gt_index = torch.where(inside, BACKGROUND, IGNORED)
    quality = torch.zeros_like(gt_index, dtype=torch.float32)
    if images and number and ground_truths:
        low, high = (0.0, neg_iou_thr) if isinstance(neg_iou_thr, int | float) else neg_iou_thr
        rules = Rules(*map(float, (pos_iou_thr, low, high, min_pos_iou, ignore_iof_thr if regions else math.inf)))
        batch = Batch(
            *(anchors.float().contiguous(), inside.contiguous(), gt_boxes.float().contiguous(), gt_valid.contiguous()),
            *(ignore_boxes.float().contiguous(), ignore_valid.contiguous(), number, ground_truths, regions),
        )
        best = torch.full_like(gt_valid, _NO_KEY, dtype=torch.int64, memory_format=torch.contiguous_format)
        blocks = triton.cdiv(number, _ANCHORS), images
        settings: dict[str, Any] = {"OF_ANCHORS": ignore_wrt_candidates, "ANCHORS": _ANCHORS, **AS_WRITTEN}
        if match_low_quality:
            kernels.best_anchors[blocks](batch, rules, best, **settings)
        kernels.assign[blocks](
            batch, rules, best, gt_index, quality, CLAIMS=match_low_quality, ALL=gt_max_assign_all, **settings
        )
    return Assignment(gt_index, quality.to(anchors.dtype))


# ---------------------------------------------------------------------------------------------------------------- loss
@implements("anchor_head.loss", name="triton")
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
    **settings: Any,
) -> dict[str, Tensor]:
    """Loss per level: total, classification, box.

    Raises
    ------
    InputError
        If the kernels cannot run where the maps are, or on their dtype, or there are more rows than can be addressed.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    ...     maps, shape = ([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 4, 1, 1)]), torch.tensor([[8, 8]])
    ...     label = torch.zeros(1, 1, dtype=torch.int64)
    >>> parts = loss(*maps, boxes, boxes[None], label, one, shape, shape, strides=[8])
    >>> [round(float(parts[name]), 4) for name in ("classification", "box")]
    [0.0433, 0.0]
    """
    for name, level in (*(("cls_scores", m) for m in cls_scores), *(("bbox_preds", m) for m in bbox_preds)):
        check_runs(level, name, where="anchor_head.loss")
    truths, shapes, ignored = (gt_boxes, gt_labels, gt_valid), (image_shapes, pad_shapes), (ignore_boxes, ignore_valid)
    if class_loss != "focal":
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
    return _loss(cls_scores, bbox_preds, anchors, gt_boxes, gt_labels, gt_index, **others)


def _loss(
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
    weight = float(pos_weight) if pos_weight > 0 else 1.0
    coder = tuple(map(float, means)), tuple(map(float, stds))
    settings = Settings(float(gamma), float(alpha), weight, float(beta), float(eps), *coder, _RATIO_LIMIT)
    choices = {"LOSS": _LOSSES[box_loss], "DECODED": reg_decoded_bbox, "SQUARE": gamma == 2}
    given = _Given(
        anchors.float().contiguous(), gt_index, gt_boxes.float().contiguous(), gt_labels.contiguous(), settings, choices
    )
    sums = _Loss.apply(given, len(cls_scores), *cls_scores, *bbox_preds)  # type: ignore[no-untyped-call]
    divisor = (gt_index >= 0).sum(1).clamp(min=1).sum().float() + _EPS
    classification, box = (sums / divisor).unbind(1)
    parts = {"classification": classification * class_loss_weight, "box": box * box_loss_weight}
    parts = {"total": torch.stack(list(parts.values())).sum(), **parts}
    return {name: part.to(cls_scores[0].dtype) for name, part in parts.items()}


class _Given(NamedTuple):
    """What both passes of the loss need beside the maps; see `Targets` and `Settings`."""

    anchors: Tensor
    gt_index: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    settings: Settings
    choices: dict[str, Any]

    def targets(self, num_classes: int) -> Targets:
        """As kernels take them."""
        return Targets(*self[:4], self.gt_index.shape[1], self.gt_labels.shape[1], num_classes)


class _Loss(torch.autograd.Function):
    """Sums of class and box losses of each level, (L, 2); writes the gradients once."""

    @staticmethod
    def forward(ctx: Any, given: _Given, number: int, *maps: Tensor) -> Tensor:
        """Sum."""
        ctx.given, ctx.number = given, number
        ctx.save_for_backward(*maps)
        sums = []
        for level, classes, blocks in _levels(maps[:number], maps[number:]):
            parts = given.anchors.new_zeros(math.prod(blocks), 2)
            if len(parts):
                loss_kernels.sums[blocks](
                    level, given.targets(classes), given.settings, parts,
                    CELLS=_CELLS, CLASSES=_CLASSES, **given.choices, **AS_WRITTEN,
                )  # fmt: skip
            sums.append(parts.sum(0))
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Write."""
        maps: tuple[Tensor, ...] = ctx.saved_tensors
        given, number, to_sums = ctx.given, ctx.number, to_sums.float().contiguous()
        gradients = [torch.empty_like(level, memory_format=torch.contiguous_format) for level in maps]
        for index, (level, classes, blocks) in enumerate(_levels(maps[:number], maps[number:])):
            found = gradients[index], gradients[number + index]
            if math.prod(blocks):
                loss_kernels.gradients[tiles(level.cells, *blocks[1:])](
                    level, given.targets(classes), given.settings, to_sums[index], *found, size_class(*found),
                    **given.choices, **AS_WRITTEN,
                )  # fmt: skip
        return None, None, *gradients


def _levels(
    cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor]
) -> list[tuple[Level, int, tuple[int, int, int]]]:
    """Levels, their classes, and the programs that each takes."""
    levels = []
    starts = starts_of(math.prod(level.shape[1:]) // 4 for level in bbox_preds)
    for scores, deltas, start in zip(cls_scores, bbox_preds, starts[:-1], strict=True):
        per_cell, cells = deltas.shape[1] // 4, deltas.shape[2] * deltas.shape[3]
        level = Level(scores.detach().contiguous(), deltas.detach().contiguous(), cells, start)
        levels.append((level, scores.shape[1] // per_cell, (triton.cdiv(cells, _CELLS), per_cell, len(deltas))))
    return levels
