"""Overlaps of mmdetection: closed forms, shapes, degenerate boxes, half precision, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError
from detoracle.reference.rounding import Bounded

MODES = ("iou", "iof", "giou")


def random_boxes(count: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    corner = 40 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 1 + 30 * torch.rand(count, 2, generator=generator)], dim=1).to(dtype)


def expected(first: list[float], second: list[float], mode: str, eps: float = 1e-6) -> float:
    """One pair in plain Python."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return (right - left) * (bottom - top)

    def clamped(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left, 0.0) * max(bottom - top, 0.0)

    (a, b, c, d), (e, f, g, h) = first, second
    shared = clamped(max(a, e), max(b, f), min(c, g), min(d, h))
    if mode == "iof":
        return shared / max(area(*first), eps)
    union = max(area(*first) + area(*second) - shared, eps)
    if mode == "iou":
        return shared / union
    enclosure = max(clamped(min(a, e), min(b, f), max(c, g), max(d, h)), eps)
    return shared / union - (enclosure - union) / enclosure


@pytest.mark.parametrize("mode", MODES)
def test_every_pair_equals_plain_python(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = random_boxes(7, generator), random_boxes(5, generator)
    first[0], first[1, 2:] = 0, first[1, :2]  # a point at the origin, a point elsewhere
    second[0] = second[0, [2, 3, 0, 1]]  # inverted
    table = [[expected(a, b, mode) for b in second.tolist()] for a in first.tolist()]
    assert overlaps_mmdet(first, second, mode=mode).tolist() == table


@pytest.mark.parametrize("mode", MODES)
def test_aligned_is_the_diagonal(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = random_boxes(6, generator), random_boxes(6, generator)
    pairs = overlaps_mmdet(first, second, mode=mode)
    assert torch.equal(overlaps_mmdet(first, second, mode=mode, aligned=True), pairs.diagonal())


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_batches_are_single_images(mode: str, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = (random_boxes(24, generator).reshape(2, 3, 4, 4) for _ in range(2))
    batched = overlaps_mmdet(first, second, mode=mode, aligned=aligned)
    for i in range(2):
        for j in range(3):
            alone = overlaps_mmdet(first[i, j], second[i, j], mode=mode, aligned=aligned)
            assert torch.equal(batched[i, j], alone)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sides_give_empty_tables(rows: int, columns: int, mode: str) -> None:
    assert overlaps_mmdet(torch.ones(rows, 4), torch.ones(columns, 4), mode=mode).shape == (rows, columns)
    assert overlaps_mmdet(torch.ones(2, rows, 4), torch.ones(2, columns, 4), mode=mode).shape == (2, rows, columns)
    assert overlaps_mmdet(torch.ones(0, 4), torch.ones(0, 4), mode=mode, aligned=True).shape == (0,)


def test_foreground_is_the_first_box() -> None:
    small, large = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 4, 4]])
    assert overlaps_mmdet(small, large, mode="iof").item() == 1.0
    assert overlaps_mmdet(large, small, mode="iof").item() == 0.25


def test_partly_overlapping_boxes_by_hand() -> None:
    first, second = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 2, 6, 6]])
    assert torch.equal(overlaps_mmdet(first, second), torch.tensor([[4.0]]) / 28)
    assert torch.equal(overlaps_mmdet(first, second, mode="giou"), torch.tensor([[4.0]]) / 28 - torch.tensor(8.0) / 36)


def test_boxes_without_area_overlap_nothing() -> None:
    point, box = torch.tensor([[3.0, 3, 3, 3]]), torch.tensor([[0.0, 0, 8, 8]])
    for mode in ("iou", "iof"):
        assert overlaps_mmdet(point, point, mode=mode).item() == 0
        assert overlaps_mmdet(point, box, mode=mode).item() == 0


def test_epsilon_is_the_smallest_denominator() -> None:
    box = torch.tensor([[0.0, 0, 1, 1]])
    assert overlaps_mmdet(box, box, eps=4.0).item() == 0.25
    assert overlaps_mmdet(box, box, mode="iof", eps=4.0).item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_half(dtype: torch.dtype) -> None:
    first, second = torch.tensor([[0.0, 0, 3, 3]], dtype=dtype), torch.tensor([[1.0, 1, 4, 4]], dtype=dtype)
    overlap = overlaps_mmdet(first, second)
    assert overlap.dtype == dtype
    assert torch.equal(overlap, torch.tensor([[4]], dtype=dtype) / 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_bounds_hold(mode: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = random_boxes(30, generator, dtype), random_boxes(30, generator, dtype)
    first[0], first[1, 2:], second[0] = 0, first[1, :2], 0
    bounded: Any = unchecked(overlaps_mmdet)(Bounded.exact(first, dtype), Bounded.exact(second, dtype), mode=mode)
    assert not outside(overlaps_mmdet(first, second, mode=mode), bounded.value, bounded.error).any()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_finite_differences(mode: str, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    pair = [random_boxes(3, generator).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: overlaps_mmdet(a, b, mode=mode, aligned=aligned), pair)


def test_touching_boxes_have_a_gradient() -> None:
    # The clamp of the sides lets the gradient through at 0: boxes that touch along an edge are drawn together.
    first = torch.tensor([[0.0, 0, 4, 4]], requires_grad=True)
    [gradient] = torch.autograd.grad(overlaps_mmdet(first, torch.tensor([[4.0, 0, 8, 4]])).sum(), first)
    assert gradient.tolist() == [[0, 0, 0.125, 0]]


def test_inputs_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(5)
    pair = [random_boxes(3, generator) for _ in range(2)]
    before = copy.deepcopy(pair)
    overlaps_mmdet(*pair, mode="giou")
    assert all(torch.equal(a, b) for a, b in zip(pair, before, strict=True))


def test_unequal_numbers_cannot_be_aligned() -> None:
    with pytest.raises(InputError) as caught:
        overlaps_mmdet(torch.ones(2, 4), torch.ones(3, 4), aligned=True)
    assert str(caught.value) == "boxes.overlaps_mmdet: boxes_b: expected as many boxes as boxes_a, (2,), got (3,)."


def test_leading_dimensions_must_agree() -> None:
    with pytest.raises(InputError, match=r"expected leading dimensions as boxes_a, \(2,\), got \(3,\)"):
        overlaps_mmdet(torch.ones(2, 1, 4), torch.ones(3, 1, 4))
