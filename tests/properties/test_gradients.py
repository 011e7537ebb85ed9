"""Right gradients: bounded by what rounding does, widened before a verdict, and not by much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.gradients import RightGradient, in_float64, right_gradients, tensors_of
from detoracle.properties.systems import find_operation
from detoracle.reference import boxes
from detoracle.reference.errors import UpstreamRaises

PAIR = {"predicted": torch.tensor([[4.0, 4, 4, 4]]), "target": torch.tensor([[5.0, 5, 5, 5]]), "variant": "iou"}
OPERATION = find_operation("boxes.iou_loss_yolox")[1]


def right(call: Any = boxes.iou_loss_yolox) -> dict[str, RightGradient]:
    return right_gradients(OPERATION, call, PAIR, torch.float32)


def test_a_gradient_is_judged_in_the_dtype_under_test() -> None:
    gradient = right()["predicted"]
    assert not gradient.wrong(gradient.exact.float()).any()
    assert gradient.wrong(gradient.exact * 1.001).any()
    assert gradient.wrong(gradient.exact * 0).any()


def test_where_the_oracle_raises_beside_the_inputs_they_are_not_moved() -> None:
    def fragile(**given: Tensor) -> Tensor:
        if bool((given["target"] != 5).any()):
            raise UpstreamRaises("x", expected="y", got="z", where="here")
        return boxes.iou_loss_yolox(**given)  # type: ignore[arg-type]

    gradient = right(fragile)["predicted"]
    assert torch.equal(gradient.exact, right()["predicted"].exact)
    assert gradient.wrong(gradient.exact * 1.001).any()


def widened(given: float) -> tuple[bool, int]:
    """Verdict on a gradient whose bound of 1 grows to 3 when asked for more, and how often it was asked."""
    asked = []

    def more() -> Any:
        for bound in (2.0, 3.0):
            asked.append(bound)
            yield torch.tensor([bound]).double()

    zero = torch.zeros(1).double()
    gradient = RightGradient(zero, zero + 1, zero == 0, more())
    return bool(gradient.wrong(torch.tensor([given])).any()), len(asked)


@pytest.mark.parametrize(
    ("given", "wrong", "asked"), [(0.5, False, 0), (1.5, False, 1), (2.5, False, 2), (4.0, True, 2), (99.0, True, 0)]
)
def test_only_what_may_be_right_is_asked_about_again(given: float, wrong: bool, asked: int) -> None:
    assert widened(given) == (wrong, asked)


def test_all_tensors_are_taken_to_float64() -> None:
    arguments = {"raw": [torch.ones(2), torch.ones(3)], "labels": torch.ones(1).long(), "strides": [8]}
    assert [t.dtype for t in tensors_of(in_float64(arguments))] == [torch.float64, torch.float64, torch.int64]


def test_the_noise_of_what_cancels_is_no_gradient_and_no_error() -> None:
    """Boxes that do not meet: enclosure over enclosure is 1, and its slope 0, but for what rounding leaves of it."""
    centres = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 50
    predicted = torch.cat([centres, centres % 7 + 20.3], 1)
    arguments = {"predicted": predicted, "target": predicted + 300.1, "variant": "giou_tutorial"}
    gradient = right_gradients(OPERATION, boxes.iou_loss_yolox, arguments, torch.float32)["predicted"]
    noise, slope = torch.finfo(torch.float64).eps / 300, 1 / 300  # of sides of some 300 pixels
    assert gradient.exact.abs().max() < noise
    assert not gradient.wrong(gradient.exact.float() + noise).any()
    assert gradient.wrong(gradient.exact.float() + torch.finfo(torch.float32).eps * slope * 64).any()
