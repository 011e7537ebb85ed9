"""Anchors and flags: worked examples, plain loops, limits, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference.anchor_head_boxes import (
    anchors,
    inside_flags,
    ssd_anchors,
    ssd_sizes,
    valid_flags,
)
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rounding import Bounded

LIKE = torch.zeros((), dtype=torch.float64)


def sides(boxes: Tensor) -> list[list[float]]:
    found: list[list[float]] = (boxes[:, 2:] - boxes[:, :2]).tolist()
    return found


# -------------------------------------------------------------------------------------------------------- anchors
def slow_anchors(
    sizes: list[tuple[int, int]],
    strides: list[tuple[int, int]],
    ratios: list[float],
    scales: list[float],
    center_offset: float,
    scale_major: bool,
) -> list[list[float]]:
    """All anchors by plain loops, exact for ratios that are squares of powers of two."""
    boxes = []
    for (rows, columns), (step_x, step_y) in zip(sizes, strides, strict=True):
        base = min(step_x, step_y)
        shapes = [(r, s) for r in ratios for s in scales] if scale_major else [(r, s) for s in scales for r in ratios]
        for row, column, (ratio, scale) in itertools.product(range(rows), range(columns), shapes):
            x, y = center_offset * base + column * step_x, center_offset * base + row * step_y
            half_width, half_height = base * scale / math.sqrt(ratio) / 2, base * scale * math.sqrt(ratio) / 2
            boxes.append([x - half_width, y - half_height, x + half_width, y + half_height])
    return boxes


@pytest.mark.parametrize("scale_major", [True, False])
@pytest.mark.parametrize("center_offset", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_equal_plain_loops(center_offset: float, scale_major: bool, dtype: torch.dtype) -> None:
    sizes, strides, ratios, scales = [(2, 3), (1, 2)], [(8, 8), (16, 32)], [0.25, 1.0, 4.0], [1.0, 2.0, 3.0]
    got = anchors(
        sizes,
        strides=[8, (16, 32)],
        ratios=ratios,
        scales=scales,
        center_offset=center_offset,
        scale_major=scale_major,
        like=LIKE.to(dtype),
    )
    assert got.dtype == dtype
    assert got.tolist() == slow_anchors(sizes, strides, ratios, scales, center_offset, scale_major)


def test_octaves_are_scales() -> None:
    given: dict[str, Any] = {"strides": [8], "ratios": [1.0], "like": LIKE}
    octaves = anchors([(2, 2)], octave_base_scale=4, scales_per_octave=2, **given)
    assert torch.equal(octaves, anchors([(2, 2)], scales=[4.0, 4 * 2**0.5], **given))


def test_centers_and_base_sizes_are_per_level() -> None:
    got = anchors(
        [(1, 1), (1, 1)],
        strides=[8, 16],
        ratios=[1.0],
        scales=[1.0],
        base_sizes=[9, 18],
        centers=[(4.0, 4.0), (8.0, 7.0)],
        like=LIKE,
    )
    assert got.tolist() == [[-0.5, -0.5, 8.5, 8.5], [-1.0, -2.0, 17.0, 16.0]]


def test_a_level_without_cells_has_no_anchors() -> None:
    got = anchors([(0, 3), (1, 1)], strides=[8, 16], ratios=[1.0], scales=[1.0], like=LIKE)
    assert got.tolist() == [[-8.0, -8.0, 8.0, 8.0]]


def test_anchors_in_float32_are_within_their_bounds() -> None:
    given: dict[str, Any] = {"strides": [8], "ratios": [0.5, 1.0, 2.0], "octave_base_scale": 4, "scales_per_octave": 3}
    like: Any = Bounded.exact(LIKE, torch.float32)
    bounded: Any = unchecked(anchors)([(3, 3)], like=like, **given)
    assert not outside(anchors([(3, 3)], like=LIKE.float(), **given), bounded.value, bounded.error).any()


@pytest.mark.parametrize(
    ("settings", "behaviour", "text"),
    [
        (
            {"scales": [1.0], "octave_base_scale": 4, "scales_per_octave": 3},
            "anchor_head.scales-and-octaves",
            "expected either scales, or octave_base_scale and scales_per_octave, got both",
        ),
        ({}, "anchor_head.scales-and-octaves", "got neither"),
        (
            {"scales": [1.0], "center_offset": 1.5},
            "anchor_head.center-offset-out-of-range",
            "expected center_offset from 0 to 1, and 0 beside centers, got 1.5",
        ),
        (
            {"scales": [1.0], "center_offset": 0.5, "centers": [(0.0, 0.0)]},
            "anchor_head.center-offset-out-of-range",
            "got 0.5 and centers",
        ),
    ],
)
def test_contradictory_settings_raise_as_upstream(settings: dict[str, Any], behaviour: str, text: str) -> None:
    with pytest.raises(UpstreamRaises) as caught:
        anchors([(1, 1)], strides=[8], ratios=[1.0], like=LIKE, **settings)
    assert caught.value.behaviour == behaviour
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["strides", "base_sizes", "centers"])
def test_settings_must_be_one_a_level(name: str) -> None:
    settings: dict[str, Any] = {"strides": [8], "base_sizes": [8], "centers": [(0.0, 0.0)]}
    settings[name] = settings[name] * 2
    with pytest.raises(InputError, match=rf"anchor_head.anchors: {name}: expected one for each of 1 levels, got 2"):
        anchors([(1, 1)], ratios=[1.0], scales=[1.0], like=LIKE, **settings)


# --------------------------------------------------------------------------------------------------- SSD's anchors
def test_ssd_anchors_are_two_squares_and_pairs_of_ratios() -> None:
    got = ssd_anchors([(1, 2)], strides=[8], ratios=[[4, 16]], min_sizes=[4], max_sizes=[16], like=LIKE)
    assert sides(got[:6]) == [[4, 4], [8, 8], [8, 2], [2, 8], [16, 1], [1, 16]]
    assert ((got[:, :2] + got[:, 2:]) / 2).tolist() == [[4, 4]] * 6 + [[12, 4]] * 6


def test_ssd_anchors_differ_per_level() -> None:
    got = ssd_anchors(
        [(1, 1), (1, 1)], strides=[8, 16], ratios=[[4], []], min_sizes=[4, 9], max_sizes=[16, 36], like=LIKE
    )
    assert sides(got) == [[4, 4], [8, 8], [8, 2], [2, 8], [9, 9], [18, 18]]


def test_ssd_sizes_of_the_published_configurations() -> None:
    assert ssd_sizes(300, (0.15, 0.9), 6) == ((21, 45, 99, 153, 207, 261), (45, 99, 153, 207, 261, 315))
    assert ssd_sizes(300, (0.2, 0.9), 6) == ((30, 60, 111, 162, 213, 264), (60, 111, 162, 213, 264, 315))
    smallest, largest = ssd_sizes(512, (0.1, 0.9), 7)
    assert (smallest[:3], largest[:3]) == ((20, 51, 133), (51, 133, 215))


@pytest.mark.parametrize(("size", "low", "levels"), [(320, 0.2, 6), (300, 0.1, 6), (300, 0.2, 2)])
def test_unknown_ssd_sizes_are_refused(size: int, low: float, levels: int) -> None:
    with pytest.raises(InputError, match=r"input_size: expected 300 from 15%, 300 from 20%, .* and at least 3 levels"):
        ssd_sizes(size, (low, 0.9), levels)


# ---------------------------------------------------------------------------------------------------------- flags
def test_valid_flags_equal_plain_loops() -> None:
    shapes, sizes = [(17, 24), (0, 9), (99, 1), (32, 32)], [(4, 3), (2, 2)]
    strides: list[int | tuple[int, int]] = [8, (16, 32)]
    got = valid_flags(torch.tensor(shapes), sizes=sizes, strides=strides, base_anchors=[2, 3])
    for image, (height, width) in enumerate(shapes):
        expected = [
            row * step_y < height and column * step_x < width
            for (rows, columns), (step_x, step_y), count in zip(sizes, [(8, 8), (16, 32)], [2, 3], strict=True)
            for row in range(rows)
            for column in range(columns)
            for _ in range(count)
        ]
        assert got[image].tolist() == expected


def test_inside_flags_at_every_limit() -> None:
    boxes = torch.tensor([[-2.0, 0, 4, 4], [0, -2, 4, 4], [0, 0, 9, 4], [0, 0, 4, 17], [0, 0, 10, 4], [0, 0, 4, 18]])
    valid, shape = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[16, 8]])  # height, width
    assert inside_flags(boxes, valid, shape, allowed_border=2).tolist() == [[True, True, True, True, False, False]]
    assert not inside_flags(boxes, valid, shape, allowed_border=0).any()


def test_only_valid_anchors_are_inside() -> None:
    boxes, valid = torch.tensor([[0.0, 0, 4, 4], [1.0, 1, 99, 99]]), torch.tensor([[True, True], [False, True]])
    shapes = torch.tensor([[8, 8], [8, 8]])
    assert inside_flags(boxes, valid, shapes, allowed_border=-1).tolist() == valid.tolist()
    assert inside_flags(boxes, valid, shapes).tolist() == [[True, False], [False, False]]
