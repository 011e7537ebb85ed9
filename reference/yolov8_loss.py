"""YOLOv8's loss: boxes from distributions of distances, and CIoU, DFL and class loss on the assignment.

For each side of a box the head predicts a distribution over R distances (``reg_max``), 0 to R-1 cells from the anchor
point; the box is where their means are. A positive is trained by its CIoU and, side by side, by the cross entropy to
the two bins next to its true distance (*distribution focal loss*), both weighted by its quality; every anchor's class
logits by binary cross entropy towards the quality.

Quirks, all faithful: a true distance beyond R-1 bins is clamped to R-1.01, so large objects on fine levels are
trained to be cropped; the total is multiplied by the batch size, the parts are not; in float16 the class sum of a
640 pixel image overflows to infinity.

Stages, in the order data flows: `dfl_decode` and `dist2bbox` (then `yolov8.assign`), `bbox2dist`, `dfl_loss`, `loss`.
Source: ultralytics 8.2.0 (AGPL-3.0; 8.1.30 to 8.2.42 behave alike), described from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detoracle.reference import yolov8
from detoracle.reference.boxes import iou_ultralytics, xyxy_to_cxcywh
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["DFL", "bbox2dist", "dfl_decode", "dfl_loss", "dist2bbox", "loss"]

_SOURCE = "ultralytics 8.2.0 (AGPL-3.0)"
_LAST_BIN_MARGIN = 0.01  # how far below the last bin a target distance is kept


# ---------------------------------------------------------------------------------------------------- 1. decode
@operation("yolov8.dfl_decode", kind="values", gradients=("box_logits",), source=_SOURCE)
def dfl_decode(box_logits: Tensor) -> Tensor:
    """Distance from the anchor point to each side of the box: the mean of its predicted distribution.

    With one bin (R = 1) there is no distribution: the distances are the raw outputs.

    Parameters
    ----------
    box_logits : Tensor (B, A, 4*R) float
        Logits of the distances 0 to R-1 cells, for left, top, right and bottom in turn.

    Returns
    -------
    distances : Tensor (B, A, 4) float
        Left, top, right, bottom in cells.

    Examples
    --------
    >>> dfl_decode(torch.zeros(1, 1, 4 * 16)).tolist()
    [[[7.5, 7.5, 7.5, 7.5]]]
    """
    bins = box_logits.shape[-1] // 4
    return box_logits if bins == 1 else _expectation(box_logits.reshape(*box_logits.shape[:-1], 4, bins))


def _expectation(logits: Tensor) -> Tensor:
    """Mean bin of each distribution, (..., R) to (...)."""
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (torch.softmax(logits, dim=-1) * bins).sum(-1)


class DFL(nn.Module):
    """The same mean as a fixed 1x1 convolution with weights 0 to R-1, as the inference head runs it.

    Heads of one bin leave it out; asked for one bin, it gives zeros.

    Parameters
    ----------
    bins : int
        R, the number of distances.

    Examples
    --------
    >>> DFL(16)(torch.zeros(1, 64, 3)).shape
    torch.Size([1, 4, 3])
    """

    def __init__(self, bins: int = 16) -> None:
        super().__init__()
        self.bins = bins
        # Drawing initial weights would advance the caller's random numbers.
        self.conv = nn.utils.skip_init(nn.Conv2d, bins, 1, kernel_size=1, bias=False)  # type: ignore[no-untyped-call]
        self.conv.requires_grad_(False)
        self.conv.weight.copy_(torch.arange(bins).reshape(1, bins, 1, 1))

    def forward(self, box_logits: Tensor) -> Tensor:
        """Decode box logits (B, 4*R, A) to distances (B, 4, A) in cells."""
        batch, channels, anchors = box_logits.shape
        if channels != 4 * self.bins:
            expected = f"shape (B, {4 * self.bins}, A)"
            raise InputError(
                "box_logits", expected=expected, got=f"shape {tuple(box_logits.shape)}", where="yolov8.DFL"
            )
        probability = box_logits.reshape(batch, 4, self.bins, anchors).softmax(2)
        distances: Tensor = self.conv(probability.transpose(1, 2))
        return distances.reshape(batch, 4, anchors)


def dist2bbox(distances: Tensor, anchor_points: Tensor, *, form: str = "xyxy") -> Tensor:
    """Turn distances from an anchor point into a box.

    Parameters
    ----------
    distances : Tensor (..., 4) float
        Left, top, right, bottom in any unit; negative ones invert the box.
    anchor_points : Tensor (..., 2) float
        x and y in the same unit.
    form : {"xyxy", "cxcywh"}
        Meaning of the result's coordinates.

    Returns
    -------
    boxes : Tensor (..., 4) float

    Examples
    --------
    >>> dist2bbox(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 10])).tolist()
    [9.0, 8.0, 13.0, 14.0]
    """
    boxes = torch.cat([anchor_points - distances[..., :2], anchor_points + distances[..., 2:]], dim=-1)
    return boxes if form == "xyxy" else xyxy_to_cxcywh(boxes)


# --------------------------------------------------------------------------------------------------- 2. targets
@operation("yolov8.bbox2dist", kind="values", source=_SOURCE)
def bbox2dist(anchor_points: Tensor, boxes: Tensor, *, reg_max: int = 16) -> Tensor:
    """Turn boxes into distances from their anchor points, clamped to what the bins can hold.

    Parameters
    ----------
    anchor_points : Tensor (N, 2) float
        x and y in cells.
    boxes : Tensor (N, 4) float
        xyxy in cells.
    reg_max : int
        R, the number of bins; ultralytics calls the last bin, R-1, by this name here.

    Returns
    -------
    distances : Tensor (N, 4) float
        Left, top, right, bottom in cells, from 0 to R - 1.01.

    Examples
    --------
    >>> bbox2dist(torch.tensor([[10.0, 10.0]]), torch.tensor([[9.0, 11, 13, 99]])).tolist()
    [[1.0, 0.0, 3.0, 14.989999771118164]]
    """
    distances = torch.cat([anchor_points - boxes[..., :2], boxes[..., 2:] - anchor_points], dim=-1)
    return distances.clamp(min=0, max=reg_max - 1 - _LAST_BIN_MARGIN)


# ----------------------------------------------------------------------------------------------------- 3. losses
@operation("yolov8.dfl_loss", kind="values", gradients=("box_logits",), source=_SOURCE)
def dfl_loss(box_logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss: cross entropy to the bins left and right of the target, by nearness.

    Parameters
    ----------
    box_logits : Tensor (N, 4*R) float
        Logits of the distances 0 to R-1 cells, for left, top, right and bottom in turn.
    distances : Tensor (N, 4) float
        Targets in cells, at least 0 and less than R-1.

    Returns
    -------
    loss : Tensor (N,) float
        Mean of the four sides, one a box.

    Raises
    ------
    UpstreamRaises
        ``yolov8.dfl-target-out-of-range``: there is no bin to the left or to the right of a target, or it is NaN.

    Examples
    --------
    >>> logits = torch.zeros(1, 4, 16)
    >>> logits[..., 3:5] = 50.0
    >>> round(float(dfl_loss(logits.flatten(1), torch.full((1, 4), 3.5))), 4)
    0.6931
    """
    bins = box_logits.shape[1] // 4
    left = distances.floor()
    left_bin = left.long()
    if bool(((left_bin < 0) | (left_bin + 1 >= bins)).any()):
        outside = left_bin[(left_bin < 0) | (left_bin + 1 >= bins)]
        raise UpstreamRaises(
            "yolov8.dfl-target-out-of-range",
            expected=f"targets from 0 to less than {bins - 1}",
            got=f"left bins {sorted(set(outside.tolist()))}",
            where="yolov8.dfl_loss",
        )
    log_probability = torch.log_softmax(box_logits.reshape(-1, 4, bins), dim=-1)
    to_left, to_right = (-log_probability.gather(2, i[..., None])[..., 0] for i in (left_bin, left_bin + 1))
    return (to_left * (left + 1 - distances) + to_right * (distances - left)).mean(-1)


@operation("yolov8.loss", kind="loss", gradients=("raw",), source=_SOURCE)
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
    """Training loss of a batch, and its gradient to the head maps.

    total = (box + cls + dfl) * B. Each part is a sum over the batch, divided by the sum of all target scores (at
    least 1), times its gain: of (1 - CIoU) * quality in cells and of DFL * quality over positives, of binary cross
    entropy over all logits. No gradient flows through the assignment, nor from the parts.

    Parameters
    ----------
    raw : list of Tensor (B, 4*R+C, Hl, Wl) float
        Head maps, one a level: logits of the distances for left, top, right and bottom in turn, then class logits.
    strides : sequence of int
        Pixels a cell, one a level.
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels, padded to the same G.
    gt_labels : Tensor (B, G) int
        Class, -C to C-1.
    gt_valid : Tensor (B, G) bool
        False for padding; boxes of coordinate sum <= 0 take no part either.
    reg_max : int
        R, the number of bins; with 1 the maps hold the distances themselves and there is no DFL.
    topk : int
        Anchors that a ground truth claims.
    alpha : float
        Exponent of the score in the alignment metric.
    beta : float
        Exponent of the overlap in the alignment metric.
    box_gain : float
        Weight of the box loss.
    cls_gain : float
        Weight of the class loss.
    dfl_gain : float
        Weight of the distribution focal loss.

    Returns
    -------
    total : Tensor () float
    box : Tensor () float or None
    cls : Tensor () float or None
    dfl : Tensor () float or None

    Raises
    ------
    UpstreamRaises
        As `yolov8.assign`.
    InputError
        If strides or channels do not fit.

    Examples
    --------
    >>> raw = [torch.zeros(1, 4 * 16 + 1, 4, 4)]
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = loss(raw, [8], gt, torch.zeros(1, 1, dtype=torch.int64), one)
    >>> {name: round(float(part), 4) for name, part in parts.items()}
    {'total': 5.5567, 'box': 0.0073, 'cls': 5.5452, 'dfl': 0.0041}
    """
    head = _head(raw, strides, reg_max)
    for image, valid in enumerate(gt_valid):
        labels, num_classes = gt_labels[image, valid], head.cls_logits.shape[-1]
        yolov8._require_labels(labels, num_classes, where=f"yolov8.loss, image {image}")
    assignment = yolov8.assign(
        torch.sigmoid(head.cls_logits.detach()),
        (head.boxes.detach() * head.strides).to(gt_boxes.dtype),
        head.points * head.strides,
        gt_boxes,
        gt_labels,
        yolov8.counted_ground_truths(gt_boxes, gt_valid),
        topk=topk,
        alpha=alpha,
        beta=beta,
    )
    gains = (box_gain, cls_gain, dfl_gain)
    return _loss(head, gt_boxes, gt_labels, assignment.gt_index, assignment.quality, gains)


class _Head(NamedTuple):
    """Predictions of all levels: (B, A, 4*R), (B, A, C), (B, A, 4) xyxy in cells, (A, 2) in cells, (A, 1)."""

    box_logits: Tensor
    cls_logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor


def _head(raw: Sequence[Tensor], strides: Sequence[int], reg_max: int) -> _Head:
    """Flatten head maps and decode their boxes."""
    channels = raw[0].shape[1]
    if reg_max < 1 or channels <= 4 * reg_max:
        expected = f"more than 4 * reg_max = {4 * reg_max} channels (reg_max at least 1)"
        raise InputError("raw", expected=expected, got=f"{channels} channels", where="yolov8.loss")
    points, anchor_strides = unchecked(yolov8.anchor_points)(raw, strides)
    flat = torch.cat([level.flatten(2).transpose(1, 2) for level in raw], dim=1)
    box_logits, cls_logits = flat[..., : 4 * reg_max], flat[..., 4 * reg_max :]
    boxes = dist2bbox(unchecked(dfl_decode)(box_logits), points)
    return _Head(box_logits, cls_logits, boxes, points, anchor_strides[:, None])


def _loss(
    head: _Head,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_index: Tensor,
    quality: Tensor,
    gains: tuple[float, float, float],
) -> dict[str, Tensor]:
    """Loss of a given assignment."""
    num_images, _, num_classes = head.cls_logits.shape
    _, boxes, scores = yolov8._targets(gt_index, quality, gt_boxes, gt_labels, num_classes)
    normaliser = quality.sum().clamp(min=1)  # an anchor's target scores add up to its quality
    entropy = F.binary_cross_entropy_with_logits(head.cls_logits, scores.to(head.cls_logits.dtype), reduction="none")
    cls = entropy.sum(-1).sum() / normaliser
    box = dfl = head.boxes.new_zeros(())
    positive = gt_index >= 0
    if positive.any():
        anchor, weight = positive.nonzero()[:, 1], quality[positive]
        target = boxes[positive] / head.strides[anchor]
        ciou = unchecked(iou_ultralytics)(head.boxes[positive], target, mode="ciou")[:, 0]
        box = ((1 - ciou) * weight).sum() / normaliser
        bins = head.box_logits.shape[-1] // 4
        if bins > 1:
            distances = unchecked(bbox2dist)(head.points[anchor], target, reg_max=bins)
            dfl = (unchecked(dfl_loss)(head.box_logits[positive], distances) * weight).sum() / normaliser
    dtype = torch.promote_types(head.cls_logits.dtype, torch.float32)
    box, cls, dfl = (p.to(dtype) * gain for p, gain in zip((box, cls, dfl), gains, strict=True))
    return {"total": (box + cls + dfl) * num_images, "box": box.detach(), "cls": cls.detach(), "dfl": dfl.detach()}
