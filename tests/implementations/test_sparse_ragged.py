from __future__ import annotations

import pytest
import torch

from detoracle.implementations.sparse.grid import Grid
from detoracle.implementations.sparse.memory import zeros
from detoracle.implementations.sparse.ragged import ragged_arange, ragged_smallest, top_columns


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Few distinct keys, some NaN or infinite, in rows of which some are empty."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (30,), generator=generator)
    choice = torch.tensor([0.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    return choice[torch.randint(6, (int(counts.sum()),), generator=generator)], counts


@pytest.mark.parametrize("seed", range(3))
def test_ragged_smallest_takes_what_a_stable_sort_of_each_row_takes(seed: int) -> None:
    keys, counts = ragged(seed)
    take = torch.randint(0, 12, counts.shape, generator=torch.Generator().manual_seed(seed))
    given = torch.split(ragged_smallest(keys, counts, take), counts.tolist())
    for row, mask, number in zip(torch.split(keys, counts.tolist()), given, take.tolist(), strict=True):
        want = torch.zeros_like(mask)
        want[row.argsort(stable=True)[:number]] = True
        assert torch.equal(mask, want)


def test_ragged_of_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [len(part) for part in ragged_arange(none)] == [0, 0]
    assert len(ragged_smallest(torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.ones(3))) == 0


@pytest.mark.parametrize("width", [10, 159, 160, 161, 700, 2000])
@pytest.mark.parametrize("poison", [0.5, torch.nan, torch.inf])
def test_top_columns_are_those_of_topk(width: int, poison: float) -> None:
    matrix = torch.rand(4, width, generator=torch.Generator().manual_seed(width))
    matrix[2, width // 2] = matrix[3, -1] = poison
    values, columns = top_columns(matrix, 10)
    assert torch.equal(values.nan_to_num(nan=9.0), matrix.topk(10).values.nan_to_num(nan=9.0))
    assert torch.equal(matrix.gather(1, columns).nan_to_num(nan=9.0), values.nan_to_num(nan=9.0))
    assert all(len(set(row)) == 10 for row in columns.tolist())


# --------------------------------------------------------------------------------------------------------------- grid
SIZES, STRIDES = [(6, 9), (3, 5), (2, 3)], [8, 16, 32]


def grid() -> Grid:
    return Grid.of_maps(SIZES, STRIDES, like=torch.zeros(()))


def test_grid_is_found_again_from_its_points() -> None:
    x, y, strides = grid().points()
    found = Grid.of_points(torch.stack([x, y], dim=1), strides)
    assert found is not None
    assert (found.widths, found.heights) == (grid().widths, grid().heights)
    assert all(
        torch.equal(getattr(found, name), getattr(grid(), name)) for name in ("x", "y", "x_strides", "y_strides")
    )


@pytest.mark.parametrize("wrong", [0, 8, 9, 30, 53, 54, 74])
def test_points_that_are_no_grid_are_not_taken_for_one(wrong: int) -> None:
    x, y, strides = grid().points()
    points = torch.stack([x, y], dim=1)
    points[wrong] += 1
    assert Grid.of_points(points, strides) is None
    assert Grid.of_points(points.flip(0).roll(3, 0), strides.flip(0).roll(3)) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_points_that_go_backwards_are_not_taken_for_a_grid(axis: int) -> None:
    x, y, strides = grid().points()
    points = torch.stack([x, y], dim=1)
    points[:, axis] *= -1
    assert Grid.of_points(points, strides) is None


def test_rectangles_hold_what_comparing_every_point_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(40, 2, generator=generator) * 64
    high = low + torch.rand(40, 2, generator=generator) * 50
    high[5] = low[5]
    high[6, 0], high[7, 1] = low[6, 0], low[7, 1]  # rows without columns, and columns without rows
    g = grid()
    in_columns = (g.x > low[:, :1]) & (g.x < high[:, :1])
    in_rows = (g.y > low[:, 1:]) & (g.y < high[:, 1:])
    x, y, _ = g.points()
    want = (x > low[:, :1]) & (x < high[:, :1]) & (y > low[:, 1:]) & (y < high[:, 1:])
    rectangle, anchor, counts = g.inside(in_columns, in_rows)
    assert torch.equal(counts, want.sum(1))
    assert torch.equal(torch.stack([rectangle, anchor], dim=1), want.nonzero())
    halves = g.covered(in_columns.view(2, 20, -1), in_rows.view(2, 20, -1))
    assert torch.equal(halves, want.view(2, 20, -1).any(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (1200, 1100), (0, 4)])
def test_zeros_are_new_zeros(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    given, other = zeros(shape, like=torch.ones(1, dtype=dtype)), zeros(shape, like=torch.ones(1, dtype=dtype))
    given += 1
    assert torch.equal(other, torch.zeros(shape, dtype=dtype))
    assert given.is_contiguous()
