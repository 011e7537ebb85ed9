"""Ragged rows: lists of lists of different lengths, kept as one flat tensor and the number of elements of each row.

Rows stand one after the other; ``counts`` (S,) says how long each is. Functions that must know a size on the host say
how often they wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ragged_arange", "ragged_smallest", "top_columns"]

_LEAST_FOLD = 4  # elements that `top_columns` compares before it looks for the largest, or it does not compare any


def ragged_arange(counts: Tensor, *, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Row of each element, and its place in the row.

    Waits once, for the sum of the counts, unless told.

    Parameters
    ----------
    counts : Tensor (S,) int
        Elements of each row.
    total : int, optional
        Their sum.

    Returns
    -------
    row : Tensor (N,) int
    place : Tensor (N,) int

    Examples
    --------
    >>> [t.tolist() for t in ragged_arange(torch.tensor([2, 0, 3]))]
    [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    rows = torch.arange(len(counts), device=counts.device)
    row = torch.repeat_interleave(rows, counts, output_size=total)
    before = counts.cumsum(0) - counts
    return row, torch.arange(len(row), device=counts.device) - before.index_select(0, row)


def ragged_smallest(keys: Tensor, counts: Tensor, take: Tensor) -> Tensor:
    """Mark each row's smallest elements; of equal ones the earlier is smaller, and NaN is the largest.

    The k-th smallest of a row is looked up in a table as wide as the longest row, for which memory must suffice. Waits
    once, for the sizes.

    Parameters
    ----------
    keys : Tensor (N,) float
    counts : Tensor (S,) int
        Elements of each row.
    take : Tensor (S,) int
        How many to mark in each row; a row that is shorter is marked whole.

    Returns
    -------
    smallest : Tensor (N,) bool

    Examples
    --------
    >>> keys, counts = torch.tensor([3.0, 1.0, 1.0, 5.0, 4.0]), torch.tensor([3, 2])
    >>> ragged_smallest(keys, counts, torch.tensor([1, 1])).tolist()
    [False, True, False, False, True]
    """
    if not len(keys):
        return torch.zeros_like(keys, dtype=torch.bool)
    longest, most = torch.stack([counts.max(), take.max()]).tolist()
    row, place = ragged_arange(counts, total=len(keys))
    table = keys.new_full((len(counts), longest), torch.nan)
    table[row, place] = keys
    take = take.clamp(max=longest)
    smallest = table.topk(min(max(most, 1), longest), dim=1, largest=False).values  # NaN, like padding, comes last
    last = smallest.gather(1, (take[:, None] - 1).clamp(min=0))[row, 0]

    below = (keys < last) | (last.isnan() & ~keys.isnan())
    tied = ~below & ~(keys > last) & ~(keys.isnan() & ~last.isnan())
    vacant = take.index_add(0, row, -below.long())
    before = tied.cumsum(0)
    first = counts.cumsum(0) - counts
    ahead = torch.cat([before.new_zeros(1), before])[first][row]  # ties in the rows above
    return below | (tied & (before - ahead <= vacant[row]))


def top_columns(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest values of each row and their columns, unordered ties and all, as `torch.topk` does.

    The maxima of groups of columns are searched first: the largest k elements lie in the k groups of the largest
    maxima. One pass of comparisons so replaces most of the search, which pays for rows of hundreds.

    Parameters
    ----------
    matrix : Tensor (S, N) float
    k : int
        At most N.

    Returns
    -------
    values : Tensor (S, k) float
        From the largest on; NaN is the largest.
    columns : Tensor (S, k) int

    Examples
    --------
    >>> values, columns = top_columns(torch.arange(1000.0).view(2, 500), 2)
    >>> values.tolist(), columns.tolist()
    ([[499.0, 498.0], [999.0, 998.0]], [[499, 498], [499, 498]])
    """
    rows, width = matrix.shape
    fold = math.isqrt(width // max(k, 1))  # then there are about as many maxima as elements in the chosen groups
    if fold < _LEAST_FOLD:
        values, columns = matrix.topk(k, dim=1)
        return values, columns
    groups = width // fold
    folded = matrix[:, : groups * fold].reshape(rows, fold, groups)
    group = folded.amax(1).topk(k, dim=1).indices
    members = torch.arange(fold, device=matrix.device)[:, None] * groups + group[:, None]
    rest = torch.arange(groups * fold, width, device=matrix.device).expand(rows, -1)
    shortlist = torch.cat([members.flatten(1), rest], dim=1)
    values, chosen = matrix.gather(1, shortlist).topk(k, dim=1)
    return values, shortlist.gather(1, chosen)
