"""Anchor points that form regular grids: what lies inside a rectangle is a product of columns and rows.

Whether an anchor is inside a box is decided per column and per row of each level, 280 decisions a ground truth instead
of 8400, by the same comparisons of the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detoracle.implementations.sparse.ragged import ragged_arange

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Columns and rows of all levels; anchors are level-major, then row-major.

    Attributes
    ----------
    widths, heights : tuple of int
        Columns and rows of each level.
    x, y : Tensor (sum of widths,), (sum of heights,) float
        Coordinates of the columns and the rows of all levels, one level after the other; none decreases in a level.
    x_strides, y_strides : Tensor (sum of widths,), (sum of heights,) float
        Stride of the level that each column, or row, belongs to.

    Examples
    --------
    >>> grid = Grid.of_maps([(1, 2), (1, 1)], [8, 16], like=torch.zeros(()))
    >>> grid.x.tolist(), grid.y.tolist(), grid.x_strides.tolist(), grid.lengths
    ([4.0, 12.0, 8.0], [4.0, 8.0], [8.0, 8.0, 16.0], (2, 1))
    """

    widths: tuple[int, ...]
    heights: tuple[int, ...]
    x: Tensor
    y: Tensor
    x_strides: Tensor
    y_strides: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Anchors of each level."""
        return tuple(width * height for width, height in zip(self.widths, self.heights, strict=True))

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates x and y and stride of every anchor, each (A,)."""
        return self._across(self.x), self._down(self.y), self._across(self.x_strides)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Column and row of every anchor within its level, each (A,) and of the coordinates' dtype."""
        column, row = (
            torch.cat([torch.arange(side) for side in sides]).to(self.x) for sides in (self.widths, self.heights)
        )
        return self._across(column), self._down(row)

    def _across(self, columns: Tensor) -> Tensor:
        levels = zip(torch.split(columns, list(self.widths)), self.heights, strict=True)
        return torch.cat([level.repeat(height) for level, height in levels])

    def _down(self, rows: Tensor) -> Tensor:
        levels = zip(torch.split(rows, list(self.heights)), self.widths, strict=True)
        return torch.cat([level.repeat_interleave(width) for level, width in levels])

    @classmethod
    def of_maps(
        cls, sizes: Sequence[tuple[int, int]], strides: Sequence[int], *, like: Tensor, offset: float = 0.5
    ) -> Grid:
        """Grid of maps of these heights and widths; points lie `offset` cells into their cell."""
        heights, widths = zip(*sizes, strict=True)
        (x, x_strides), (y, y_strides) = (_axis(sides, strides, like, offset) for sides in (widths, heights))
        return cls(tuple(widths), tuple(heights), x, y, x_strides, y_strides)

    @classmethod
    def of_points(cls, points: Tensor, strides: Tensor) -> Grid | None:
        """Find the grid that points (A, 2) of strides (A,) form, a level being a run of one stride; None if none.

        Coordinates must not decrease from a column or row to the next. Waits for the device once, and twice a level.

        Examples
        --------
        >>> Grid.of_points(torch.tensor([[4.0, 4.0], [12.0, 4.0]]), torch.tensor([8.0, 8.0])).widths
        (2,)
        >>> Grid.of_points(torch.tensor([[4.0, 4.0], [12.0, 5.0], [4.0, 5.0]]), torch.full((3,), 8.0))
        """
        lengths = torch.unique_consecutive(strides, return_counts=True)[1].tolist()
        widths, heights, axes = [], [], ([], [], [], [])  # type: ignore[var-annotated]
        for level, stride in zip(torch.split(points, lengths), torch.split(strides, lengths), strict=True):
            width = int((level[:, 1] != level[0, 1]).long().cumsum(0).eq(0).sum())
            if len(level) % width:
                return None
            cells = level.reshape(-1, width, 2)
            x, y = cells[0, :, 0], cells[:, 0, 1]
            regular = ((cells[..., 0] == x) & (cells[..., 1] == y[:, None])).all()
            if not bool(regular & (x.diff() >= 0).all() & (y.diff() >= 0).all()):
                return None
            widths.append(width)
            heights.append(len(y))
            for axis, part in zip(axes, (x, y, stride[:width], stride[: len(y)]), strict=True):
                axis.append(part)
        return cls(tuple(widths), tuple(heights), *(torch.cat(axis) for axis in axes))

    def covered(self, in_columns: Tensor, in_rows: Tensor) -> Tensor:
        """Anchors (B, A) in some rectangle, from the columns (B, R, sum of widths) and rows (B, R, ...) of each.

        Examples
        --------
        >>> grid = Grid.of_maps([(2, 2)], [8], like=torch.zeros(()))
        >>> grid.covered(torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])).tolist()
        [[False, False, True, False]]
        """
        columns = torch.split(in_columns.float(), list(self.widths), dim=-1)
        rows = torch.split(in_rows.float(), list(self.heights), dim=-1)
        return torch.cat([(y.mT @ x).flatten(1) for x, y in zip(columns, rows, strict=True)], dim=1) > 0

    def inside(self, in_columns: Tensor, in_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors in each of S rectangles, as ragged rows; waits once, for sizes.

        Coordinates never decrease, so that the columns and the rows of a rectangle follow each other: it is listed by
        runs of anchors, of which there are few.

        Parameters
        ----------
        in_columns : Tensor (S, sum of widths) bool
        in_rows : Tensor (S, sum of heights) bool

        Returns
        -------
        rectangle : Tensor (N,) int
            Which one each anchor is in.
        anchor : Tensor (N,) int
            In order, rectangle by rectangle.
        counts : Tensor (S,) int
            Anchors of each.

        Examples
        --------
        >>> grid = Grid.of_maps([(2, 2)], [8], like=torch.zeros(()))
        >>> [t.tolist() for t in grid.inside(torch.tensor([[True, True]]), torch.tensor([[False, True]]))]
        [[0, 0], [2, 3], [2]]
        """
        first_column, columns = _spans(in_columns, self.widths)  # of each rectangle and level
        first_row, rows = _spans(in_rows, self.heights)
        counts = (columns * rows).sum(1)
        rows = rows.where(columns > 0, 0)
        runs, total = torch.stack([rows.sum(), counts.sum()]).tolist()

        own_width, start = (torch.tensor(n, device=rows.device) for n in (self.widths, _starts(self.lengths)))
        first = start + first_row * own_width + first_column
        part, down = ragged_arange(rows.flatten(), total=runs)
        level_width = own_width.expand_as(rows).flatten()
        run_start = first.flatten().index_select(0, part) + down * level_width.index_select(0, part)
        length = columns.flatten().index_select(0, part)
        shift = run_start + length - length.cumsum(0)
        anchor = torch.repeat_interleave(shift, length, output_size=total)
        anchor += torch.arange(total, device=rows.device)
        rectangles = torch.arange(len(rows), device=rows.device)
        return torch.repeat_interleave(rectangles, counts, output_size=total), anchor, counts


def _axis(sides: Sequence[int], strides: Sequence[int], like: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Coordinates along one axis, and strides, of all levels."""
    index = torch.cat([torch.arange(side, device=like.device) for side in sides]).to(like.dtype)
    stride = torch.cat([like.new_full((side,), step) for side, step in zip(sides, strides, strict=True)])
    return (index + offset) * stride, stride


def _spans(mask: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """First marked column within its level, and how many are marked, of each row of the mask and level, (S, L) each."""
    levels = torch.split(mask.byte(), list(sides), dim=-1)
    first, count = [level.argmax(-1) for level in levels], [level.sum(-1) for level in levels]
    return torch.stack(first, dim=-1), torch.stack(count, dim=-1)


def _starts(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:level]) for level in range(len(lengths))]
