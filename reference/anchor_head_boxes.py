"""Anchors of the anchor head: those of all levels, and which of them take part.

Anchors are flattened level by level, and within a level by row, column and base anchor. All boxes are xyxy in pixels.
Strides are given as one number a level, or as a pair (horizontal, vertical).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detoracle.reference.contract import operation
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["SOURCE", "anchors", "inside_flags", "ssd_anchors", "ssd_sizes", "valid_flags"]

SOURCE = "OpenMMLab mmdetection 2.28.2 (Apache-2.0)"
_SSD_RATIO_BELOW = {(300, 15): 7, (300, 20): 10, (512, 10): 4, (512, 15): 7}  # percent, of the level below the range


# --------------------------------------------------------------------------------------------------- 1. anchors
@operation("anchor_head.anchors", kind="values", source=SOURCE)
def anchors(
    sizes: Sequence[Sequence[int]],
    *,
    strides: Sequence[int | Sequence[int]],
    ratios: Sequence[float],
    like: Tensor,
    scales: Sequence[float] | None = None,
    octave_base_scale: float | None = None,
    scales_per_octave: int | None = None,
    base_sizes: Sequence[float] | None = None,
    center_offset: float = 0.0,
    centers: Sequence[Sequence[float]] | None = None,
    scale_major: bool = True,
) -> Tensor:
    """Anchors of all levels: one box for each ratio and scale, around a point that moves by the stride.

    Parameters
    ----------
    sizes : sequence of sequence of int
        Height and width of each level, in cells.
    strides : sequence of int or pairs of int
        Pixels a cell, one a level; a pair is horizontal, vertical.
    ratios : sequence of float
        Height over width.
    like : Tensor (...) float
        Gives dtype and device.
    scales : sequence of float or None
        Side of a square anchor in base sizes. Either this or the two octave settings.
    octave_base_scale : float or None
        Smallest scale of an octave.
    scales_per_octave : int or None
        n scales: the smallest one times 2^(i/n).
    base_sizes : sequence of float or None
        Pixels, one a level; by default the shorter stride.
    center_offset : float
        Where in the base square of cell (0, 0) its anchors are centred, 0 to 1.
    centers : sequence of sequence of float or None
        The centre itself (x, y) in pixels, one a level.
    scale_major : bool
        Order of a cell's anchors: all scales of the first ratio come first, or all ratios of the first scale.

    Returns
    -------
    anchors : Tensor (A, 4) float
        Level by level, within a level by row, column and base anchor.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.scales-and-octaves``, ``anchor_head.center-offset-out-of-range``.

    Examples
    --------
    >>> anchors([(1, 2)], strides=[8], ratios=[1.0], scales=[2.0], like=torch.zeros(())).tolist()
    [[-8.0, -8.0, 8.0, 8.0], [0.0, -8.0, 16.0, 8.0]]
    """
    where = "anchor_head.anchors"
    octaves = octave_base_scale is not None and scales_per_octave is not None
    if octaves == (scales is not None):
        raise UpstreamRaises(
            "anchor_head.scales-and-octaves",
            expected="either scales, or octave_base_scale and scales_per_octave",
            got="both" if octaves else "neither",
            where=where,
        )
    if not 0 <= center_offset <= 1 or (center_offset != 0 and centers is not None):
        raise UpstreamRaises(
            "anchor_head.center-offset-out-of-range",
            expected="center_offset from 0 to 1, and 0 beside centers",
            got=f"{center_offset}{'' if centers is None else ' and centers'}",
            where=where,
        )
    if octave_base_scale is not None and scales_per_octave is not None:
        scales = [octave_base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
    pairs = _stride_pairs(strides, len(sizes), where)
    base_sizes = [min(pair) for pair in pairs] if base_sizes is None else base_sizes
    centers = [(center_offset * base, center_offset * base) for base in base_sizes] if centers is None else centers
    _check_levels(len(sizes), where, base_sizes=base_sizes, centers=centers)
    cells = [
        _base_anchors(base, ratios, scales or (), center, scale_major, like)
        for base, center in zip(base_sizes, centers, strict=True)
    ]
    return torch.cat([_shifted(cell, size, pair) for cell, size, pair in zip(cells, sizes, pairs, strict=True)])


@operation("anchor_head.ssd_anchors", kind="values", source=SOURCE)
def ssd_anchors(
    sizes: Sequence[Sequence[int]],
    *,
    strides: Sequence[int | Sequence[int]],
    ratios: Sequence[Sequence[float]],
    min_sizes: Sequence[float],
    max_sizes: Sequence[float],
    like: Tensor,
    scale_major: bool = False,
) -> Tensor:
    """Anchors of all levels in the manner of SSD, centred in their cells.

    A cell has a square of the level's smallest size, a square of the geometric mean of smallest and largest, and then
    for each ratio r a box of ratio 1/r and one of ratio r, with the smallest square's area.

    Parameters
    ----------
    sizes : sequence of sequence of int
        Height and width of each level, in cells.
    strides : sequence of int or pairs of int
        Pixels a cell, one a level; a pair is horizontal, vertical.
    ratios : sequence of sequence of float
        Per level, ratios of height and width other than 1.
    min_sizes : sequence of float
        Pixels, one a level.
    max_sizes : sequence of float
        Pixels, one a level.
    like : Tensor (...) float
        Gives dtype and device.
    scale_major : bool
        Upstream's default, True, picks other boxes: instead of the larger square, and of some of the last ratios, it
        takes earlier ratios at both scales. SSD's configurations turn it off.

    Returns
    -------
    anchors : Tensor (A, 4) float
        Level by level, within a level by row, column and base anchor.

    Examples
    --------
    >>> given = {"strides": [8], "ratios": [[4]], "min_sizes": [4], "max_sizes": [16], "like": torch.zeros(())}
    >>> boxes = ssd_anchors([(1, 1)], **given)
    >>> (boxes[:, 2:] - boxes[:, :2]).tolist()
    [[4.0, 4.0], [8.0, 8.0], [8.0, 2.0], [2.0, 8.0]]
    """
    where = "anchor_head.ssd_anchors"
    pairs = _stride_pairs(strides, len(sizes), where)
    _check_levels(len(sizes), where, ratios=ratios, min_sizes=min_sizes, max_sizes=max_sizes)
    levels = []
    for size, pair, others, smallest, largest in zip(sizes, pairs, ratios, min_sizes, max_sizes, strict=True):
        shapes = [1.0] + [shape for ratio in others for shape in (1 / ratio, ratio)]
        scales, center = (1.0, math.sqrt(largest / smallest)), (pair[0] / 2, pair[1] / 2)
        cell = _base_anchors(smallest, shapes, scales, center, scale_major, like)
        taken = [0, len(shapes), *range(1, len(shapes))]
        levels.append(_shifted(cell[taken], size, pair))
    return torch.cat(levels)


def ssd_sizes(
    input_size: int, ratio_range: Sequence[float], num_levels: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest sizes of each level, as SSD chooses them from a range of shares of the image side.

    Parameters
    ----------
    input_size : int
        Image side in pixels, 300 or 512.
    ratio_range : sequence of float
        Shares of the second and the last level; the first level's share is fixed.
    num_levels : int

    Returns
    -------
    min_sizes, max_sizes : tuple of int
        Pixels, one a level.

    Raises
    ------
    InputError
        If the first level's share is not known.

    Examples
    --------
    >>> ssd_sizes(300, (0.2, 0.9), 6)
    ((30, 60, 111, 162, 213, 264), (60, 111, 162, 213, 264, 315))
    """
    low, high = (int(share * 100) for share in ratio_range)
    if (input_size, low) not in _SSD_RATIO_BELOW or num_levels < 3:
        known = ", ".join(f"{size} from {share}%" for size, share in _SSD_RATIO_BELOW)
        raise InputError(
            "input_size",
            expected=f"{known}, and at least 3 levels",
            got=f"{input_size} from {low}%, {num_levels} levels",
        )
    step = (high - low) // (num_levels - 2)
    shares = [_SSD_RATIO_BELOW[input_size, low], *range(low, high + 1, step)]
    ends = [low, *(share + step for share in shares[1:])]
    smallest, largest = ([int(input_size * share / 100) for share in each] for each in (shares, ends))
    return tuple(smallest), tuple(largest)


def _stride_pairs(strides: Sequence[int | Sequence[int]], num_levels: int, where: str) -> list[tuple[int, int]]:
    """Horizontal and vertical stride of each level."""
    _check_levels(num_levels, where, strides=strides)
    return [(stride, stride) if isinstance(stride, int) else (stride[0], stride[1]) for stride in strides]


def _check_levels(num_levels: int, where: str, **settings: Sequence[object]) -> None:
    for name, values in settings.items():
        if len(values) != num_levels:
            raise InputError(name, expected=f"one for each of {num_levels} levels", got=str(len(values)), where=where)


def _base_anchors(
    base: float,
    ratios: Sequence[float],
    scales: Sequence[float],
    center: Sequence[float],
    scale_major: bool,
    like: Tensor,
) -> Tensor:
    """Anchors (K, 4) of the cell at the origin."""
    height, scale = torch.sqrt(like.new_tensor(list(ratios))), like.new_tensor(list(scales))
    if scale_major:
        widths, heights = (base * side[:, None] * scale[None] for side in (1 / height, height))
    else:
        widths, heights = (base * scale[:, None] * side[None] for side in (1 / height, height))
    half_width, half_height = 0.5 * widths.flatten(), 0.5 * heights.flatten()
    x, y = center
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=1)


def _shifted(cell: Tensor, size: Sequence[int], strides: tuple[int, int]) -> Tensor:
    """Anchors (H*W*K, 4) of a level: those of the cell at the origin, moved by whole strides."""
    height, width = size
    rows, columns = (torch.arange(n, device=cell.device).to(cell) for n in (height, width))
    y, x = torch.meshgrid(rows * strides[1], columns * strides[0], indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (cell + shift).reshape(-1, 4)


# ------------------------------------------------------------------------------------------------- 2. and 3. flags
@operation("anchor_head.valid_flags", kind="values", source=SOURCE)
def valid_flags(
    pad_shapes: Tensor,
    *,
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int | Sequence[int]],
    base_anchors: Sequence[int],
) -> Tensor:
    """Anchors whose cell lies in the padded image, not in the padding that other images of the batch brought.

    Parameters
    ----------
    pad_shapes : Tensor (B, 2) int
        Height and width of each image after its own padding, in pixels.
    sizes : sequence of sequence of int
        Height and width of each level, in cells.
    strides : sequence of int or pairs of int
        Pixels a cell, one a level; a pair is horizontal, vertical.
    base_anchors : sequence of int
        Anchors of one cell, one number a level.

    Returns
    -------
    valid : Tensor (B, A) bool

    Examples
    --------
    >>> valid_flags(torch.tensor([[8, 9]]), sizes=[(2, 3)], strides=[8], base_anchors=[1]).tolist()
    [[True, True, False, False, False, False]]
    """
    where = "anchor_head.valid_flags"
    pairs = _stride_pairs(strides, len(sizes), where)
    _check_levels(len(sizes), where, base_anchors=base_anchors)
    images = []
    for height, width in pad_shapes.tolist():
        flags = []
        for (rows, columns), (stride_x, stride_y), count in zip(sizes, pairs, base_anchors, strict=True):
            row = torch.arange(rows, device=pad_shapes.device) < math.ceil(height / stride_y)
            column = torch.arange(columns, device=pad_shapes.device) < math.ceil(width / stride_x)
            flags.append((row[:, None] & column[None]).flatten().repeat_interleave(count))
        images.append(torch.cat(flags))
    return torch.stack(images)


@operation("anchor_head.inside_flags", kind="values", source=SOURCE)
def inside_flags(anchors: Tensor, valid: Tensor, image_shapes: Tensor, *, allowed_border: float = 0) -> Tensor:
    """Anchors that take part: the valid ones that stick out of their image by at most the allowed border.

    An anchor may touch the left and the top limit, but not the right and the bottom one. A negative border lets all
    valid anchors take part.

    Parameters
    ----------
    anchors : Tensor (A, 4) float
        xyxy in pixels.
    valid : Tensor (B, A) bool
        From `valid_flags`.
    image_shapes : Tensor (B, 2) int
        Height and width of each image before padding, in pixels.
    allowed_border : float
        Pixels.

    Returns
    -------
    inside : Tensor (B, A) bool

    Examples
    --------
    >>> boxes = torch.tensor([[0.0, 0, 7, 7], [0, 0, 8, 8], [-1, 0, 4, 4]])
    >>> inside_flags(boxes, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[8, 8]])).tolist()
    [[True, False, False]]
    """
    if allowed_border < 0:
        return valid
    far = (image_shapes.flip(1) + allowed_border)[:, None]
    return (anchors[:, :2] >= -allowed_border).all(-1) & (anchors[:, 2:] < far).all(-1) & valid
