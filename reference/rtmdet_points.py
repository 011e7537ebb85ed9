"""RTMDet's points: the priors of all levels, and boxes as distances from them.

Stages 1 and 2 of `detoracle.reference.rtmdet`, where the rest of the algorithm is. Everything is in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.reference.anchor_head_boxes import _stride_pairs
from detoracle.reference.contract import operation

__all__ = ["SOURCE", "decode", "encode", "priors"]

SOURCE = "OpenMMLab mmdetection 3.x (Apache-2.0)"


# ---------------------------------------------------------------------------------------------------- 1. priors
@operation("rtmdet.priors", kind="values", source=SOURCE)
def priors(
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int | Sequence[int]],
    *,
    offset: float = 0.0,
    like: Tensor | None = None,
) -> Tensor:
    """One point a cell, level by level, row by row: the cell's corner, unless an offset moves it.

    Parameters
    ----------
    sizes : sequence of sequence of int
        Height and width of each level, in cells.
    strides : sequence of int or pairs of int
        Pixels a cell, one a level; a pair is horizontal, vertical.
    offset : float
        Position of the point within its cell, in cells.
    like : Tensor () float or None
        Gives dtype and device; float32 on the CPU without.

    Returns
    -------
    priors : Tensor (A, 4) float
        x, y, and the stride along x and y, in pixels.

    Raises
    ------
    InputError
        If there is not one stride a level.

    Examples
    --------
    >>> priors([(1, 2)], [8]).tolist()
    [[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 8.0, 8.0]]
    """
    levels = []
    pairs = _stride_pairs(strides, len(sizes), "rtmdet.priors")
    for (height, width), (stride_x, stride_y) in zip(sizes, pairs, strict=True):
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        point = [(column.flatten() + offset) * stride_x, (row.flatten() + offset) * stride_y]
        levels.append(torch.stack([*point, *(torch.full_like(point[0], s) for s in (stride_x, stride_y))], dim=1))
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)
    return torch.cat(levels).to(dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------ 2. boxes, distances
@operation("rtmdet.decode", kind="values", gradients=("distances",), source=SOURCE)
def decode(points: Tensor, distances: Tensor, *, max_shape: Sequence[int] | None = None) -> Tensor:
    """Boxes at given distances from points: x - left, y - top, x + right, y + bottom.

    Parameters
    ----------
    points : Tensor (A, 2) float
        x and y in pixels.
    distances : Tensor (..., A, 4) float
        To the left, top, right and bottom side, in pixels; negative ones give inverted boxes.
    max_shape : sequence of int or None
        Height and width to clip the boxes to; training does not clip.

    Returns
    -------
    boxes : Tensor (..., A, 4) float
        Left, top, right, bottom in pixels.

    Examples
    --------
    >>> decode(torch.tensor([[8.0, 8.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist()
    [[7.0, 6.0, 11.0, 12.0]]
    """
    boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
    if max_shape is None:
        return boxes
    height, width = max_shape
    return torch.stack([boxes[..., side].clamp(min=0, max=(width, height)[side % 2]) for side in range(4)], dim=-1)


@operation("rtmdet.encode", kind="values", gradients=("boxes",), source=SOURCE)
def encode(points: Tensor, boxes: Tensor, *, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    """Distances from points to the sides of boxes, the inverse of `decode`.

    Parameters
    ----------
    points : Tensor (A, 2) float
        x and y in pixels.
    boxes : Tensor (A, 4) float
        Left, top, right, bottom in pixels.
    max_distance : float or None
        Limits the distances to 0 at least and `max_distance` - `eps` at most.
    eps : float
        Pixels.

    Returns
    -------
    distances : Tensor (A, 4) float
        To the left, top, right and bottom side, in pixels; negative if the point is outside.

    Examples
    --------
    >>> point, box = torch.tensor([[8.0, 8.0]]), torch.tensor([[9.0, 6.0, 11.0, 40.0]])
    >>> encode(point, box).tolist(), encode(point, box, max_distance=16).tolist()[0][:3]
    ([[-1.0, 2.0, 3.0, 32.0]], [0.0, 2.0, 3.0])
    """
    distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
    return distances if max_distance is None else distances.clamp(min=0, max=max_distance - eps)
