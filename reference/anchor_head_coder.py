"""Delta coder of the anchor head: boxes as what turns an anchor into them, and back. Boxes are xyxy in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.reference.anchor_head_boxes import SOURCE
from detoracle.reference.contract import operation
from detoracle.reference.rounding import log_ratio

__all__ = ["decode", "encode"]

_LARGEST_RATIO = 16 / 1000  # sides shrink or grow at most so much when deltas are decoded


@operation("anchor_head.encode", kind="values", gradients=("boxes",), source=SOURCE)
def encode(
    anchors: Tensor, boxes: Tensor, *, means: Sequence[float] = (0, 0, 0, 0), stds: Sequence[float] = (1, 1, 1, 1)
) -> Tensor:
    """Deltas that turn anchors into boxes: shift of the centre in anchor sizes, logarithms of the sides' ratios.

    A box without area gives -inf, an inverted one NaN; an anchor without area divides by zero.

    Parameters
    ----------
    anchors : Tensor (N, 4) float
        xyxy in pixels.
    boxes : Tensor (N, 4) float
        xyxy in pixels.
    means : sequence of float
        Subtracted from the four deltas.
    stds : sequence of float
        Divides them then.

    Returns
    -------
    deltas : Tensor (N, 4) float

    Examples
    --------
    >>> encode(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 6, 4]])).tolist()
    [[0.5, 0.0, 0.0, 0.0]]
    """
    size, target_size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    center, target = (anchors[:, :2] + anchors[:, 2:]) * 0.5, (boxes[:, :2] + boxes[:, 2:]) * 0.5
    deltas = torch.cat([(target - center) / size, log_ratio(target_size, size)], dim=1)
    return (deltas - deltas.new_tensor(list(means))) / deltas.new_tensor(list(stds))


@operation("anchor_head.decode", kind="values", gradients=("deltas",), source=SOURCE)
def decode(
    anchors: Tensor,
    deltas: Tensor,
    *,
    means: Sequence[float] = (0, 0, 0, 0),
    stds: Sequence[float] = (1, 1, 1, 1),
    max_shape: Sequence[int] | None = None,
    ratio_clip: float = _LARGEST_RATIO,
    center_clamp: float | None = None,
) -> Tensor:
    """Boxes from anchors and deltas: the inverse of `encode`, with sides changed at most 62.5-fold.

    Parameters
    ----------
    anchors : Tensor (N, 4) float
        xyxy in pixels.
    deltas : Tensor (N, 4*C) float
        One or more boxes an anchor.
    means : sequence of float
        Added to the four deltas.
    stds : sequence of float
        Multiplies them before.
    max_shape : sequence of int or None
        Height and width of the image in pixels, to clip boxes to.
    ratio_clip : float
        The smallest ratio of sides; its inverse is the largest.
    center_clamp : float or None
        The farthest that a centre may move on either axis, in pixels; the ratio of sides then has no lower limit.

    Returns
    -------
    boxes : Tensor (N, 4*C) float
        xyxy in pixels.

    Examples
    --------
    >>> decode(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.5, 0, 0, 0]])).tolist()
    [[2.0, 0.0, 6.0, 4.0]]
    """
    limit = abs(math.log(ratio_clip))
    each = deltas.reshape(-1, deltas.shape[1] // 4, 4)
    each = each * each.new_tensor(list(stds)) + each.new_tensor(list(means))
    center = ((anchors[:, :2] + anchors[:, 2:]) * 0.5)[:, None]
    size = (anchors[:, 2:] - anchors[:, :2])[:, None]
    shift, log_ratio = size * each[..., :2], each[..., 2:]
    if center_clamp is None:
        log_ratio = torch.clamp(log_ratio, min=-limit, max=limit)
    else:
        shift, log_ratio = torch.clamp(shift, min=-center_clamp, max=center_clamp), torch.clamp(log_ratio, max=limit)
    center, half = center + shift, size * torch.exp(log_ratio) * 0.5
    left_top, right_bottom = center - half, center + half
    if max_shape is not None:
        height, width = max_shape
        left_top, right_bottom = (
            torch.stack([torch.clamp(t[..., 0], 0, width), torch.clamp(t[..., 1], 0, height)], dim=-1)
            for t in (left_top, right_bottom)
        )
    return torch.cat([left_top, right_bottom], dim=-1).reshape(deltas.shape)
