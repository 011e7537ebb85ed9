from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detoracle.properties.checking import cases
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.kinks import OtherSide
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import find_operation

EDGE = {scene.name: scene for scene in edge_cases()}


@pytest.mark.parametrize(
    ("function", "at", "sides"),
    [
        (lambda x: x.clamp(min=0), 0.0, (0.0, 0.0)),
        (lambda x: x.clamp(max=1), 1.0, (0.0, 0.0)),
        (lambda x: torch.clamp(x, 0, 2), 1.0, (1.0, 1.0)),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), 0.0, (1.0, 0.0)),
        (lambda x: torch.minimum(torch.zeros_like(x), x), 0.0, (0.0, 1.0)),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), 3.0, (1.0, 1.0)),
        (lambda x: x.abs(), 0.0, (1.0, -1.0)),
        (lambda x: torch.abs(x), -2.0, (-1.0, -1.0)),
    ],
)
def test_each_side_has_its_own_slope_and_the_same_value(
    function: Callable[[Tensor], Tensor], at: float, sides: tuple[float, float]
) -> None:
    for first, slope in zip((True, False), sides, strict=True):
        x = torch.tensor(at, requires_grad=True)
        with OtherSide(first=first):
            value = function(x)
        assert value.item() == function(x).item()
        assert torch.autograd.grad(value, x)[0].item() == slope


def test_nan_stays_nan() -> None:
    nan = torch.tensor(torch.nan)
    with OtherSide(first=True):
        assert all(bool(f.isnan()) for f in (nan.clamp(min=0), torch.maximum(nan, -nan), nan.abs()))


def judged(operation: str, scene: str, setting: str, change: Callable[[Outcome], None] | None, *, side: bool) -> str:
    system, found = find_operation(operation)
    case = next(case for case in cases(system, found, EDGE[scene]) if setting in case.setting)
    expectation = expect(system, found, case.arguments)
    if side:
        with OtherSide(first=True):
            outcome = perform(found, found.oracle, case.arguments)
    else:
        outcome = perform(found, found.oracle, case.arguments)
    if change is not None:
        change(outcome)
    return expectation.judge(outcome).status


def gradient_to(outcome: Outcome, name: str) -> Tensor:
    gradient = outcome.gradients[name]
    assert gradient is not None
    return gradient


def doubled(outcome: Outcome) -> None:
    gradient_to(outcome, "boxes_b").mul_(2)


def test_a_flat_box_may_pass_its_gradient_on_or_not() -> None:
    place = "boxes.iou_ultralytics", "degenerate-height", "iou of xyxy"
    assert judged(*place, None, side=False) == judged(*place, None, side=True) == "equal"
    assert judged(*place, doubled, side=True) == "different"


def nan_where_the_output_is(outcome: Outcome) -> None:
    gradient_to(outcome, "boxes_a")[outcome.outputs["iou"].isnan().flatten()] = torch.nan


def nan_everywhere(outcome: Outcome) -> None:
    gradient_to(outcome, "boxes_a").fill_(torch.nan)


def test_where_the_output_is_nan_so_may_the_gradient_be_but_nowhere_else() -> None:
    place = "boxes.iou_ultralytics", "nan-box", "iou of cxcywh"
    assert judged(*place, nan_where_the_output_is, side=False) == "equal"
    assert judged(*place, nan_everywhere, side=False) == "different"
