"""YOLOX IoUs and box losses by hand, by closed form and by symmetry; other systems have their own files."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detoracle.reference.boxes import cxcywh_to_xyxy, iou_loss_yolox, iou_yolox, xyxy_to_cxcywh
from detoracle.reference.errors import InputError

EPS = torch.finfo(torch.float64).eps
steps = st.integers(0, 256)
grid_boxes = st.tuples(steps, steps, st.integers(1, 128), st.integers(1, 128)).map(
    lambda b: torch.tensor([b], dtype=torch.float64) / 4
)


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@given(grid_boxes)
def test_forms_convert_back_and_forth_exactly_on_a_grid(boxes: Tensor) -> None:
    assert torch.equal(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    assert torch.equal(cxcywh_to_xyxy(boxes)[:, 2:] - cxcywh_to_xyxy(boxes)[:, :2], boxes[:, 2:])


@given(grid_boxes, grid_boxes)
def test_iou_is_the_share_of_cells_that_both_cover(a: Tensor, b: Tensor) -> None:
    """Counted on eighths of a pixel, on which all corners lie."""
    corners = [[int(8 * c) for c in cxcywh_to_xyxy(x)[0]] for x in (a, b)]
    wide, high = (
        len(range(max(corners[0][i], corners[1][i]), min(corners[0][i + 2], corners[1][i + 2]))) for i in (0, 1)
    )
    both = wide * high
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in corners]
    expected = both / (sum(areas) - both)
    assert iou_yolox(a, b).item() == expected
    assert iou_yolox(b, a).item() == expected
    assert iou_yolox(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b), form="xyxy").item() == expected


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ([8.0, 8, 4, 4], [12.0, 8, 4, 4], 0.0),  # share an edge
        ([8.0, 8, 0, 4], [8.0, 8, 4, 4], 0.0),  # no width
        ([8.0, 8, 0, 0], [8.0, 8, 0, 0], math.nan),  # 0/0
        ([8.0, 8, -4, -4], [8.0, 8, 4, 4], 0.0),  # inverted on both axes: its area is positive, its overlap none
        ([8.0, 8, -4, 4], [8.0, 8, 4, 4], math.nan),  # the areas cancel
        ([8.0, 8, 4, 4], [8.0, 8, 4, 4], 1.0),
    ],
)
def test_degenerate_boxes(a: list[float], b: list[float], iou: float) -> None:
    found = iou_yolox(doubles(a), doubles(b)).item()
    assert found == iou or (math.isnan(found) and math.isnan(iou))


def test_every_box_meets_every_other() -> None:
    a, b = doubles([8, 8, 4, 4], [20, 8, 4, 4]), doubles([8, 8, 4, 4], [9, 8, 4, 4], [20, 8, 4, 4])
    assert iou_yolox(a, b).tolist() == [[1, 12 / 20, 0], [0, 0, 1]]
    assert iou_yolox(a, b[:0]).shape == (2, 0)


@pytest.mark.parametrize("variant", ["iou", "giou_tutorial", "giou"])
def test_a_perfect_box_costs_nothing(variant: str) -> None:
    same = doubles([8, 8, 4, 6])
    if variant == "giou_tutorial":  # enclosure less intersection is 0 here too
        assert iou_loss_yolox(same, same, variant=variant).item() == 0
    assert iou_loss_yolox(same, same, variant=variant).item() == 0


@pytest.mark.parametrize(
    ("variant", "loss"),
    [("iou", 1 - (1 / 3) ** 2), ("giou_tutorial", 1 - (1 / 3 - (6 - 2) / 6)), ("giou", 1 - (1 / 3 - (6 - 6) / 6))],
)
def test_two_shifted_boxes(variant: str, loss: float) -> None:
    pair = doubles([1, 1, 2, 2]), doubles([2, 1, 2, 2])
    assert iou_loss_yolox(*pair, variant=variant).item() == pytest.approx(loss, rel=4 * EPS)


def test_boxes_far_apart_cost_at_most_two() -> None:
    pair = doubles([0, 0, 1, 1]), doubles([1e6, 1e6, 1, 1])
    assert iou_loss_yolox(*pair).item() == 1
    for variant in ("giou", "giou_tutorial"):
        assert 1.99 < iou_loss_yolox(*pair, variant=variant).item() <= 2


def test_two_points_cost_one_and_not_nan() -> None:
    point = doubles([8, 8, 0, 0])
    assert iou_loss_yolox(point, point).item() == 1


@pytest.mark.parametrize("variant", ["iou", "giou_tutorial", "giou"])
def test_gradient_equals_finite_differences(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(12, 4, generator=generator, dtype=torch.float64) * 8 + 8
    predicted = (target + torch.randn(12, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: iou_loss_yolox(p, target, variant=variant), predicted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iou_yolox(torch.zeros(2, 5), torch.zeros(2, 4)), "boxes.iou_yolox: boxes_a: expected"),
        (lambda: iou_yolox(torch.zeros(2, 4), torch.zeros(2, 4), form="xywh"), "form: expected"),
        (lambda: iou_loss_yolox(torch.zeros(2, 4), torch.zeros(3, 4)), "target: expected .* with N=2"),
        (lambda: iou_loss_yolox(torch.zeros(2, 4), torch.zeros(2, 4), variant="ciou"), "variant: expected"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
