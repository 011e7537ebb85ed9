"""The IoU family of ultralytics: closed forms, epsilon, broadcasting, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference.boxes import iou_ultralytics, xyxy_to_cxcywh
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError
from detoracle.reference.rounding import Bounded

MODES = ("iou", "giou", "diou", "ciou")


def random_boxes(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * 40
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, dtype=dtype) * 30], dim=1)


def expected(first: list[float], second: list[float]) -> dict[str, float]:
    """The four values of proper corner boxes without epsilon, in plain Python."""
    sides = [(b[2] - b[0], b[3] - b[1]) for b in (first, second)]
    width = max(min(first[2], second[2]) - max(first[0], second[0]), 0.0)
    height = max(min(first[3], second[3]) - max(first[1], second[1]), 0.0)
    union = sides[0][0] * sides[0][1] + sides[1][0] * sides[1][1] - width * height
    across = max(first[2], second[2]) - min(first[0], second[0])
    down = max(first[3], second[3]) - min(first[1], second[1])
    iou = width * height / union
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (first, second)]
    apart = math.dist(*centres) ** 2 / (across**2 + down**2)
    shape = 4 / math.pi**2 * (math.atan(sides[0][0] / sides[0][1]) - math.atan(sides[1][0] / sides[1][1])) ** 2
    ciou = iou - apart - (shape**2 / (1 - iou + shape) if shape else 0.0)
    return {"iou": iou, "giou": iou - (across * down - union) / (across * down), "diou": iou - apart, "ciou": ciou}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "pair",
    [
        ([0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0]),
        ([0.0, 0.0, 10.0, 10.0], [20.0, 30.0, 22.0, 70.0]),
        ([0.0, 0.0, 40.0, 10.0], [10.0, 2.0, 14.0, 8.0]),
        ([3.0, 4.0, 13.0, 24.0], [3.0, 4.0, 13.0, 24.0]),
    ],
    ids=["shifted", "apart", "nested", "identical"],
)
def test_closed_form(pair: tuple[list[float], list[float]], mode: str) -> None:
    want = expected(*pair)[mode]
    # The epsilons, left out of the closed form, are too small to matter in float32 at this size.
    for form, convert in (("xyxy", lambda b: b), ("cxcywh", xyxy_to_cxcywh)):
        first, second = (convert(torch.tensor([box])) for box in pair)
        bound: Any = unchecked(iou_ultralytics)(
            Bounded.exact(first, torch.float32), Bounded.exact(second, torch.float32), form=form, mode=mode
        )
        assert not outside(torch.tensor([[want]], dtype=torch.float64), bound.value, bound.error).any()
        assert not outside(iou_ultralytics(first, second, form=form, mode=mode), bound.value, bound.error).any()


@pytest.mark.parametrize("mode", MODES)
def test_leading_dimensions_broadcast_and_the_last_stays(mode: str) -> None:
    first, second = random_boxes(3), random_boxes(5)
    table = iou_ultralytics(first[:, None], second, mode=mode)
    assert table.shape == (3, 5, 1)
    assert torch.equal(table[1], iou_ultralytics(first[1:2], second, mode=mode))
    assert iou_ultralytics(first[0], second[0], mode=mode).shape == (1,)
    assert iou_ultralytics(first[:0], second[:0], mode=mode).shape == (0, 1)


def test_leading_dimensions_must_broadcast() -> None:
    with pytest.raises(InputError) as error:
        iou_ultralytics(torch.zeros(3, 4), torch.zeros(2, 4))
    assert str(error.value) == (
        "boxes.iou_ultralytics: boxes_b: expected leading dimensions that broadcast with (3,), got (2,)."
    )


@pytest.mark.parametrize(("field", "value"), [("mode", "siou"), ("form", "xywh")])
def test_choices_are_checked(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{field}: expected {{"):
        iou_ultralytics(torch.zeros(1, 4), torch.zeros(1, 4), **{field: value})  # type: ignore[arg-type]


def test_identical_corner_boxes_are_one_but_centre_boxes_can_be_nan() -> None:
    corners = random_boxes(500)
    assert (iou_ultralytics(corners, corners, mode="ciou") <= 1).all()
    centres = xyxy_to_cxcywh(corners)
    ciou = iou_ultralytics(centres, centres, form="cxcywh", mode="ciou")
    assert ciou.isnan().any()  # where rounding lifts the IoU by one unit
    assert not ciou.isnan().all()


def test_touching_boxes_are_pulled_together_all_the_same() -> None:
    first = torch.tensor([[0.0, 0.0, 10.0, 10.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(iou_ultralytics(first, torch.tensor([[10.0, 0.0, 20.0, 10.0]])).sum(), first)
    assert gradient[0, 2] > 0  # at zero overlap the clamp still lets the gradient through
    assert gradient[0, 0] == 0


@pytest.mark.parametrize("mode", ["iou", "giou", "diou"])
@pytest.mark.parametrize("form", ["xyxy", "cxcywh"])
def test_gradients_are_those_of_finite_differences(form: str, mode: str) -> None:
    first, second = (random_boxes(4, torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: iou_ultralytics(a, b, form=form, mode=mode), (first, second))


def test_alpha_has_no_gradient() -> None:
    first, second = (
        torch.tensor([[0.0, 0, 8, 2]], dtype=torch.float64),
        torch.tensor([[0.0, 0, 2, 8]], dtype=torch.float64),
    )
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda a: iou_ultralytics(a, second, mode="ciou"), first.requires_grad_())


def test_inputs_are_not_written_to() -> None:
    first, second = random_boxes(4), random_boxes(4)
    copies = first.clone(), second.clone()
    for mode in MODES:
        iou_ultralytics(first, second, mode=mode)
    assert torch.equal(first, copies[0])
    assert torch.equal(second, copies[1])
