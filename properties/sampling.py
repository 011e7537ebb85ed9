"""Random draws that scenes are made of: from a measured distribution, and boxes that miss their target by so much."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["box_with_iou", "quantile"]


def quantile(knots: tuple[tuple[float, ...], tuple[float, ...]], share: Tensor) -> Tensor:
    """Quantile function through given points, straight between them.

    Parameters
    ----------
    knots : (shares, values)
        Shares ascending from 0 to 1, and the value at each.
    share : Tensor float
        0 to 1.

    Returns
    -------
    values : Tensor float, of the same shape

    Examples
    --------
    >>> quantile(((0.0, 0.5, 1.0), (0.0, 10.0, 12.0)), torch.tensor([0.25, 0.75])).tolist()
    [5.0, 11.0]
    """
    shares, values = torch.tensor(knots, dtype=share.dtype)
    right = torch.searchsorted(shares, share.contiguous()).clamp(1, len(shares) - 1)
    weight = (share - shares[right - 1]) / (shares[right] - shares[right - 1])
    return torch.lerp(values[right - 1], values[right], weight)


def box_with_iou(target: Tensor, iou: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw boxes that have a given IoU with their target, by an error of place, size and shape.

    Parameters
    ----------
    target : Tensor (N, 4) float
        xyxy.
    iou : Tensor (N,) float
        Above 0, at most 1.
    generator : torch.Generator

    Returns
    -------
    boxes : Tensor (N, 4) float
        xyxy; of no area where the target has none.

    Examples
    --------
    >>> from detoracle.reference.boxes import iou_yolox
    >>> target, iou = torch.tensor([[0.0, 0, 64, 32]]), torch.tensor([0.75])
    >>> box = box_with_iou(target, iou, generator=torch.Generator().manual_seed(0))
    >>> round(float(iou_yolox(target, box, form="xyxy")), 5)
    0.75
    """
    draws = torch.rand(5, len(target), generator=generator, dtype=torch.float32).to(target.dtype)
    size_error, shape_error, place_error, *sides = draws
    area = iou ** (0.6 * (2 * size_error - 1))  # of the box, in areas of the target
    both = iou * (1 + area) / (1 + iou)  # the area they share that makes the IoU
    slack = both / area.clamp(max=1)  # ... of the largest they could share
    shape = (2 * shape_error + 1) / 4
    ratio = torch.stack([area**shape, area ** (1 - shape)], dim=1)  # sides of the box, in sides of the target
    shared = ratio.clamp(max=1) * torch.stack([slack**place_error, slack ** (1 - place_error)], dim=1)
    shift = ((1 + ratio) / 2 - shared) * torch.where(torch.stack(sides, dim=1) < 0.5, -1, 1)
    size = target[:, 2:] - target[:, :2]
    centre, half = (target[:, :2] + target[:, 2:]) / 2 + shift * size, ratio * size / 2
    return torch.cat([centre - half, centre + half], dim=1)
