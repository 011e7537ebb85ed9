"""Head maps (B, C, H, W), one a level, of which only some anchors are read: without joining or transposing them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Listed", "flat", "listed", "read"]

Listed = list[tuple[Tensor, slice, Tensor]]
"""For each level image, all channels, and cell: what indexes the level as (B, C, H*W)."""


def listed(mask: Tensor, lengths: Sequence[int]) -> Listed:
    """Find where in each level the anchors are that a mask marks; waits once a level.

    Parameters
    ----------
    mask : Tensor (B, A) bool
    lengths : sequence of int
        Anchors of each level.

    Examples
    --------
    >>> [(image.tolist(), cell.tolist()) for image, _, cell in listed(torch.tensor([[False, True, True]]), [2, 1])]
    [([0], [1]), ([0], [0])]
    """
    found = (level.nonzero(as_tuple=True) for level in torch.split(mask, list(lengths), dim=1))
    return [(image, slice(None), cell) for image, cell in found]


def flat(where: Listed, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Image (N,) and anchor (N,) of what is listed, level by level.

    Examples
    --------
    >>> [t.tolist() for t in flat(listed(torch.tensor([[False, True, True]]), [2, 1]), [2, 1])]
    [[0, 0], [1, 2]]
    """
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    images, _, cells = zip(*where, strict=True)
    return torch.cat(images), torch.cat([cell + start for cell, start in zip(cells, starts, strict=True)])


def read(maps: Sequence[Tensor], where: Listed) -> Tensor:
    """All channels (N, C) of what is listed, level by level.

    Examples
    --------
    >>> maps = [torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])]
    >>> read(maps, listed(torch.tensor([[False, True]]), [2])).tolist()
    [[2.0, 4.0]]
    """
    return torch.cat([level.flatten(2)[at] for level, at in zip(maps, where, strict=True)])
