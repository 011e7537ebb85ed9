"""SSD's boxes: priors, their overlap with ground truths, and the offsets that the network learns.

Everything is in units of the image side, 0 to 1. A prior is given by its centre and size (``cxcywh``), a ground truth
by its corners (``xyxy``). Stages 1, 2 and 4 of `detoracle.reference.ssd`, where the rest of the algorithm is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.boxes import xyxy_to_cxcywh
from detoracle.reference.contract import operation
from detoracle.reference.errors import InputError
from detoracle.reference.rounding import log_ratio

__all__ = ["COCO_SSD300", "SOURCE", "VARIANCES", "VOC_SSD300", "decode", "encode", "jaccard", "priors"]

SOURCE = "amdegroot/ssd.pytorch (MIT)"
VARIANCES = (0.1, 0.2)
"""Scale of the learnt offsets: of centres, and of the logarithm of sizes."""

VOC_SSD300: Mapping[str, Any] = MappingProxyType(
    {
        "image_size": 300,
        "feature_maps": (38, 19, 10, 5, 3, 1),
        "steps": (8, 16, 32, 64, 100, 300),
        "min_sizes": (30, 60, 111, 162, 213, 264),
        "max_sizes": (60, 111, 162, 213, 264, 315),
        "aspect_ratios": ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        "clip": True,
    }
)
"""Prior settings of SSD300 on VOC (21 classes with the background); the defaults of `priors`."""

COCO_SSD300: Mapping[str, Any] = MappingProxyType(
    {**VOC_SSD300, "min_sizes": (21, 45, 99, 153, 207, 261), "max_sizes": (45, 99, 153, 207, 261, 315)}
)
"""Prior settings of SSD300 on COCO, whose published configuration has 201 classes."""


@operation("ssd.priors", kind="values", source=SOURCE)
def priors(
    *,
    image_size: int = VOC_SSD300["image_size"],
    feature_maps: Sequence[int] = VOC_SSD300["feature_maps"],
    steps: Sequence[int] = VOC_SSD300["steps"],
    min_sizes: Sequence[int] = VOC_SSD300["min_sizes"],
    max_sizes: Sequence[int] = VOC_SSD300["max_sizes"],
    aspect_ratios: Sequence[Sequence[float]] = VOC_SSD300["aspect_ratios"],
    clip: bool = True,
    like: Tensor | None = None,
) -> Tensor:
    """Boxes of fixed shapes around every cell of every feature map: map by map, row by row, column by column.

    Computed in double precision and then rounded. Clipping acts on cx, cy, w and h, not on the corners: a prior may
    still reach out of the image.

    Parameters
    ----------
    image_size : int
        Side of the square image in pixels.
    feature_maps : sequence of int
        Cells along a side, one number a map, as in the next four.
    steps : sequence of int
        Pixels a cell.
    min_sizes : sequence of float
        Side of the small square prior in pixels.
    max_sizes : sequence of float
        With `min_sizes` gives the side of the large square prior, their geometric mean.
    aspect_ratios : sequence of sequence of float
        Each ratio a gives two priors, a : 1 and 1 : a, of the small square's area.
    clip : bool
        Clip cx, cy, w, h to [0, 1].
    like : Tensor () float or None
        Gives dtype and device; float32 on the CPU without.

    Returns
    -------
    priors : Tensor (P, 4) float
        cx, cy, w, h; per cell the small square, the large square, then the ratios.

    Raises
    ------
    InputError
        If the settings are not one a map, or not positive.

    Examples
    --------
    >>> len(priors(**VOC_SSD300)), len(priors(**COCO_SSD300))
    (8732, 8732)
    >>> one = {"image_size": 100, "feature_maps": [1], "steps": [100]}
    >>> priors(**one, min_sizes=[20], max_sizes=[45], aspect_ratios=[[4]]).tolist()[2:]
    [[0.5, 0.5, 0.4000000059604645, 0.10000000149011612], [0.5, 0.5, 0.10000000149011612, 0.4000000059604645]]
    """
    maps = (feature_maps, steps, min_sizes, max_sizes, aspect_ratios)
    lengths = [len(setting) for setting in maps]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise InputError("feature_maps", expected="settings one a map", got=f"lengths {lengths}", where="ssd.priors")
    numbers = [
        image_size,
        *feature_maps,
        *steps,
        *min_sizes,
        *max_sizes,
        *(a for ratios in aspect_ratios for a in ratios),
    ]
    if min(numbers) <= 0:
        raise InputError("settings", expected="positive numbers", got=str(min(numbers)), where="ssd.priors")
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)
    boxes = [box for settings in zip(*maps, strict=True) for box in _priors(image_size, *settings)]
    result = torch.tensor(boxes, dtype=dtype, device=device)
    return result.clamp(0, 1) if clip else result


def _priors(
    image_size: int, cells: int, step: int, min_size: float, max_size: float, ratios: Sequence[float]
) -> Iterator[tuple[float, float, float, float]]:
    """Priors of one feature map."""
    small = min_size / image_size
    large = math.sqrt(small * (max_size / image_size))
    shapes = [(small, small), (large, large)]
    for ratio in ratios:
        longer, shorter = small * math.sqrt(ratio), small / math.sqrt(ratio)
        shapes += [(longer, shorter), (shorter, longer)]
    cells_per_side = image_size / step
    for row in range(cells):
        for column in range(cells):
            for width, height in shapes:
                yield (column + 0.5) / cells_per_side, (row + 0.5) / cells_per_side, width, height


@operation("ssd.jaccard", kind="values", source=SOURCE)
def jaccard(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Pairwise IoU of corner boxes, no epsilon.

    Two boxes of area zero give 0/0 = NaN, wherever they are. Swapped corners give a negative area.

    Parameters
    ----------
    boxes_a : Tensor (G, 4) float
        Left, top, right, bottom in any unit.
    boxes_b : Tensor (P, 4) float
        Left, top, right, bottom in the same unit.

    Returns
    -------
    overlap : Tensor (G, P) float

    Examples
    --------
    >>> jaccard(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 1], [3.0, 3, 4, 4]])).tolist()
    [[0.5, 0.0]]
    """
    return _jaccard(boxes_a, boxes_b)


def _jaccard(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    left_top = torch.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    right_bottom = torch.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    intersection = torch.prod(torch.clamp(right_bottom - left_top, min=0), 2)
    area_a, area_b = (torch.prod(boxes[:, 2:] - boxes[:, :2], 1) for boxes in (boxes_a, boxes_b))
    return intersection / (area_a[:, None] + area_b[None] - intersection)


@operation("ssd.encode", kind="values", gradients=("gt_boxes",), source=SOURCE)
def encode(gt_boxes: Tensor, priors: Tensor, *, variances: Sequence[float] = VARIANCES) -> Tensor:
    """Offsets from priors to their ground truths: what the network is to predict.

    A side of zero gives -inf, swapped corners give NaN.

    Parameters
    ----------
    gt_boxes : Tensor (P, 4) float
        Left, top, right, bottom of each prior's ground truth, in units of the image side.
    priors : Tensor (P, 4) float
        cx, cy, w, h in units of the image side.
    variances : sequence of float
        Scale of centre offsets, and of the logarithm of sizes.

    Returns
    -------
    offsets : Tensor (P, 4) float
        Centre offset in prior sizes and log size ratio, each over its variance.

    Examples
    --------
    >>> prior = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    >>> [round(x, 3) for x in encode(torch.tensor([[0.4, 0.4, 0.8, 0.6]]), prior)[0].tolist()]
    [5.0, 0.0, 3.466, 0.0]
    """
    _check_variances(variances, where="ssd.encode")
    return _encode(gt_boxes, priors, variances)


def _encode(gt_boxes: Tensor, priors: Tensor, variances: Sequence[float]) -> Tensor:
    boxes = xyxy_to_cxcywh(gt_boxes)
    centre = (boxes[..., :2] - priors[..., :2]) / (variances[0] * priors[..., 2:])
    size = log_ratio(boxes[..., 2:], priors[..., 2:]) / variances[1]
    return torch.cat([centre, size], dim=-1)


@operation("ssd.decode", kind="values", gradients=("loc",), source=SOURCE)
def decode(loc: Tensor, priors: Tensor, *, variances: Sequence[float] = VARIANCES) -> Tensor:
    """Boxes from predicted offsets; the inverse of `encode`.

    Parameters
    ----------
    loc : Tensor (B, P, 4) float
        Predicted offsets.
    priors : Tensor (P, 4) float
        cx, cy, w, h in units of the image side.
    variances : sequence of float
        Scale of centre offsets, and of the logarithm of sizes.

    Returns
    -------
    boxes : Tensor (B, P, 4) float
        Left, top, right, bottom in units of the image side; the right bottom corner is the left top one plus the size.

    Examples
    --------
    >>> decode(torch.zeros(1, 1, 4), torch.tensor([[0.5, 0.5, 0.5, 0.25]])).tolist()
    [[[0.25, 0.375, 0.75, 0.625]]]
    """
    _check_variances(variances, where="ssd.decode")
    return _decode(loc, priors, variances)


def _decode(loc: Tensor, priors: Tensor, variances: Sequence[float]) -> Tensor:
    centre = priors[..., :2] + loc[..., :2] * variances[0] * priors[..., 2:]
    size = priors[..., 2:] * torch.exp(loc[..., 2:] * variances[1])
    left_top = centre - size / 2
    return torch.cat([left_top, size + left_top], dim=-1)


def _check_variances(variances: Sequence[float], *, where: str) -> None:
    if len(variances) != 2 or min(variances) <= 0:
        raise InputError("variances", expected="two positive numbers", got=str(list(variances)), where=where)
