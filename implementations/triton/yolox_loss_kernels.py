"""YOLOX's loss as two kernels, one program per image and block of cells of a level.

`sums` reads the objectness of every cell, and boxes and classes of the positives; each program leaves its own sums,
which are then added in a fixed order. `gradients` writes every channel of every cell once: zero, but for objectness
and the positives. A gradient is computed where it is written, with the scale that arrives, so that it needs no memory
before the backward pass and no second pass over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from detoracle.implementations.triton.arithmetic import bce_with_logits, sign
from detoracle.implementations.triton.boxes import side
from detoracle.implementations.triton.launching import tuned

__all__ = ["Level", "Targets", "gradients", "sums"]


class Level(NamedTuple):
    """Maps of a level, and where its cells stand among the anchors.

    Attributes
    ----------
    raw : Tensor (B, 5+C, H, W) float
        Contiguous.
    step : float
        Pixels a cell.
    width, cells : int
        Cells a row, and all.
    start : int
        Anchor of the first cell.
    """

    raw: Any
    step: Any
    width: Any
    cells: Any
    start: Any


class Targets(NamedTuple):
    """What anchors are trained towards.

    Attributes
    ----------
    gt_index : Tensor (B, A) int64
    quality : Tensor (B, A) float32
    gt_boxes, gt_labels : Tensor (B, G, 4) float32, (B, G) int
    num_anchors, num_gts, num_classes : int
    """

    gt_index: Any
    quality: Any
    gt_boxes: Any
    gt_labels: Any
    num_anchors: Any
    num_gts: Any
    num_classes: Any


@triton.jit
def _channel(level, image, channel, cell, num_classes):
    """Where a channel of cells lies."""
    return (image.to(tl.int64) * (5 + num_classes) + channel) * level.cells + cell


@triton.jit
def _target(level, targets, image, cell, there):
    """Ground truth of cells, -1 for background, and their quality."""
    at = image.to(tl.int64) * targets.num_anchors + level.start + cell
    ground_truth = tl.load(targets.gt_index + at, mask=there, other=-1).to(tl.int32)
    return ground_truth, tl.load(targets.quality + at, mask=there, other=0.0)


@triton.jit
def _box_terms(level, targets, image, cell, positive, ground_truth, L1: tl.constexpr):  # noqa: N803
    """Box and L1 losses of positives, and their derivatives by the four raw channels."""
    at = level.raw + _channel(level, image, 0, cell, targets.num_classes)
    raw_x, raw_y = tl.load(at, positive, 0.0), tl.load(at + level.cells, positive, 0.0)
    raw_w, raw_h = tl.load(at + 2 * level.cells, positive, 0.0), tl.load(at + 3 * level.cells, positive, 0.0)
    raw_x, raw_y, raw_w, raw_h = raw_x.to(tl.float32), raw_y.to(tl.float32), raw_w.to(tl.float32), raw_h.to(tl.float32)
    gt = targets.gt_boxes + 4 * (image * targets.num_gts + ground_truth)
    gt_x, gt_y = tl.load(gt, positive, 0.0), tl.load(gt + 1, positive, 0.0)
    gt_w, gt_h = tl.load(gt + 2, positive, 1.0), tl.load(gt + 3, positive, 1.0)
    step = level.step
    column, row = (cell % level.width).to(tl.float32), (cell // level.width).to(tl.float32)
    x, y, w, h = (raw_x + column) * step, (raw_y + row) * step, tl.exp(raw_w) * step, tl.exp(raw_h) * step

    across, by_left, by_right = side(x - w / 2, x + w / 2, gt_x - gt_w / 2, gt_x + gt_w / 2)
    down, by_top, by_bottom = side(y - h / 2, y + h / 2, gt_y - gt_h / 2, gt_y + gt_h / 2)
    overlap = ((across > 0.0) & (down > 0.0)).to(tl.float32)
    shared = across * down * overlap
    union = w * h + gt_w * gt_h - shared + 1e-16
    iou = tl.div_rn(shared, union)
    by_shared = -2.0 * iou * (1.0 + iou) / union
    by_area = 2.0 * iou * iou / union
    by_across, by_down = by_shared * down * overlap, by_shared * across * overlap
    to_x, to_y = by_across * (by_left + by_right) * step, by_down * (by_top + by_bottom) * step
    to_w = (by_across * (by_right - by_left) / 2 + by_area * h) * w
    to_h = (by_down * (by_bottom - by_top) / 2 + by_area * w) * h
    box = tl.where(positive, 1.0 - iou * iou, 0.0)

    l1, off_x, off_y, off_w, off_h = box * 0.0, box * 0.0, box * 0.0, box * 0.0, box * 0.0
    if L1:
        off_x, off_y = raw_x - (gt_x / step - column), raw_y - (gt_y / step - row)
        off_w, off_h = raw_w - tl.log(gt_w / step + 1e-8), raw_h - tl.log(gt_h / step + 1e-8)
        l1 = tl.where(positive, tl.abs(off_x) + tl.abs(off_y) + tl.abs(off_w) + tl.abs(off_h), 0.0)
    return box, l1, (to_x, to_y, to_w, to_h), (off_x, off_y, off_w, off_h)


@triton.jit
def _class_terms(level, targets, image, cell, positive, label, quality, first, CLASSES: tl.constexpr):  # noqa: N803
    """Class losses (cells, classes) of positives, their derivatives, where they lie, and which exist."""
    channel = first + tl.arange(0, CLASSES)
    exists = (channel < targets.num_classes)[None, :]
    at = _channel(level, image, 5 + channel[None, :], cell[:, None], targets.num_classes)
    logit = tl.load(level.raw + at, mask=exists & positive[:, None], other=0.0).to(tl.float32)
    wanted = tl.where(channel[None, :] == label[:, None], quality[:, None], 0.0)
    loss, derivative = bce_with_logits(logit, wanted)
    here = exists & positive[:, None]
    return tl.where(here, loss, 0.0), tl.where(here, derivative, 0.0), at, exists


@triton.jit
def sums(
    level,
    targets,
    parts,
    first_program,
    L1: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Sum box, objectness, class and L1 losses, and count positives, (P, 5), of each program."""
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    ground_truth, quality = _target(level, targets, image, cell, there)
    positive = ground_truth >= 0
    logit = tl.load(level.raw + _channel(level, image, 4, cell, targets.num_classes), mask=there, other=0.0)
    entropy, _ = bce_with_logits(logit.to(tl.float32), positive.to(tl.float32))
    out = parts + 5 * (first_program + image * tl.num_programs(0) + tl.program_id(0))
    tl.store(out + 1, tl.sum(tl.where(there, entropy, 0.0), 0))
    number = tl.sum(positive.to(tl.float32), 0)
    tl.store(out + 4, number)
    if number > 0:
        boxes = _box_terms(level, targets, image, cell, positive, ground_truth, L1)
        label = tl.load(targets.gt_labels + image * targets.num_gts + ground_truth, mask=positive, other=-1)
        classes = tl.zeros([CELLS], tl.float32)
        for first in range(0, targets.num_classes, CLASSES):
            terms = _class_terms(level, targets, image, cell, positive, label, quality, first, CLASSES)
            classes += tl.sum(terms[0], 1)
        tl.store(out, tl.sum(boxes[0], 0))
        tl.store(out + 2, tl.sum(classes, 0))
        tl.store(out + 3, tl.sum(boxes[1], 0))


@tuned("size", "L1")
@triton.jit
def gradients(
    level,
    targets,
    scales,
    gradient,
    size,
    L1: tl.constexpr,  # noqa: N803
    CELLS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
):
    """Write the gradient of a level's maps, from those of the four sums.

    No number depends on another's place: the tile may be any, and is chosen by the size class.
    """
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < level.cells
    ground_truth, quality = _target(level, targets, image, cell, there)
    positive = ground_truth >= 0
    to_box, to_objectness = tl.load(scales), tl.load(scales + 1)
    to_class, to_l1 = tl.load(scales + 2), tl.load(scales + 3)
    out = _channel(level, image, 4, cell, targets.num_classes)
    logit = tl.load(level.raw + out, mask=there, other=0.0)
    _, derivative = bce_with_logits(logit.to(tl.float32), positive.to(tl.float32))
    tl.store(gradient + out, derivative * to_objectness, mask=there)

    boxes = _box_terms(level, targets, image, cell, positive, ground_truth, L1)
    for number in tl.static_range(4):
        total = boxes[2][number] * to_box
        if L1:
            total += sign(boxes[3][number]) * to_l1
        at = _channel(level, image, number, cell, targets.num_classes)
        tl.store(gradient + at, tl.where(positive, total, 0.0), mask=there)
    label = tl.load(targets.gt_labels + image * targets.num_gts + ground_truth, mask=positive, other=-1)
    for first in range(0, targets.num_classes, CLASSES):
        terms = _class_terms(level, targets, image, cell, positive, label, quality, first, CLASSES)
        tl.store(gradient + terms[2], terms[1] * to_class, mask=terms[3] & there[:, None])
