from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.registry import Implementation, discover
from detoracle.properties import arithmetic
from detoracle.properties.arithmetic import ARITHMETICS, false_alarms
from detoracle.properties.outputs import Outcome
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import find_operation

IOU = find_operation("boxes.iou_yolox")[1]
LOSS = find_operation("boxes.iou_loss_yolox")[1]


def run(name: str, call: Callable[..., Tensor], **given: Any) -> Outcome:
    outcome = ARITHMETICS[name](LOSS if "predicted" in given else IOU, call, given)
    assert not outcome.problem, outcome.message
    return outcome


def result(name: str, call: Callable[..., Tensor], *numbers: Any) -> Tensor:
    tensors = {f"x{place}": torch.as_tensor(number, dtype=torch.float32) for place, number in enumerate(numbers)}
    return run(name, lambda **given: call(*given.values()).reshape(1, -1), **tensors).outputs["iou"][0]


def test_a_sum_is_added_in_another_order() -> None:
    terms = torch.rand(1000) * 2.0 ** torch.randint(-12, 12, (1000,))
    for total in (torch.sum, lambda x: x.sum(0), torch.mean, lambda x: x @ x, lambda x: x.prod() * 0 + x.sum()):
        plain, permuted = result("as it is", total, terms), result("permuted", total, terms)
        # No term is negative: either sum errs by as many units of roundoff as it has terms, and a unit is half an eps.
        assert abs(permuted - plain) <= len(terms) * torch.finfo(torch.float32).eps * plain
    assert result("permuted", torch.sum, [1, 2**30, -(2**30)]) in (0, 1)
    found = {float(result("permuted", lambda x: x.sum(1), torch.rand(1, 999))) for _ in range(2)}
    assert len(found) == 2


@pytest.mark.parametrize("reduce", [lambda x: x.sum(1), lambda x: x.mean((0, 2)), lambda x: x @ x.mT, torch.logsumexp])
def test_what_is_kept_stays_in_order(reduce: Callable[..., Tensor]) -> None:
    exact = torch.arange(24.0).view(2, 3, 4)
    call = (lambda x: reduce(x, 1)) if reduce is torch.logsumexp else reduce
    assert torch.allclose(result("permuted", call, exact), result("as it is", call, exact))


def test_a_product_is_not_rounded_before_a_sum() -> None:
    a = 1 + 2.0**-12
    exact = a * a - 1  # in double precision
    assert result("as it is", lambda a, c: a * a + c, a, -1).item() != exact
    assert result("fused", lambda a, c: a * a + c, a, -1).item() == exact
    assert result("fused", lambda a, c: c + a * a, a, -1).item() == exact
    assert result("fused", lambda a, c: -c - a * a, a, -1).item() == -exact
    assert result("fused", lambda a, c: torch.add(c, a * a, alpha=2), a, -1).item() == 2 * a * a - 1


def test_a_product_that_was_changed_is_no_product() -> None:
    def changed(a: Tensor, c: Tensor) -> Tensor:
        return (a * a).clamp_(max=1) + c

    assert result("fused", changed, 3, 1).item() == 2


def test_double_rounds_once() -> None:
    def cancels(x: Tensor, large: Tensor) -> Tensor:
        assert x.dtype == large.dtype == dtypes.pop()
        return x + large - large

    dtypes = [torch.float64, torch.float32]
    assert result("as it is", cancels, 1, 2.0**30).item() == 0
    found = result("double", cancels, 1, 2.0**30)
    assert found.item() == 1
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ARITHMETICS)
def test_gradients_come_through(name: str) -> None:
    pair = {"predicted": torch.full((2, 4), 3.0), "target": torch.full((2, 4), 2.0)}
    outcome = run(name, lambda predicted, target: (predicted * target + predicted).sum(1), **pair)
    gradient = outcome.gradients["predicted"]
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert set(gradient.flatten().tolist()) == {1.5, 4.5}


def test_a_wrong_implementation_raises_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Implementation(IOU.name, "zeros", "detoracle.properties.faults.cheating:zeros")
    found = false_alarms(*find_operation(IOU.name), [wrong], random_scenes(1, seed=0))
    assert [alarms.arithmetic for alarms in found] == list(ARITHMETICS)
    assert all(len(alarms.alarms) == alarms.calls > 0 for alarms in found)


def test_a_looser_arithmetic_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(operation: Any, call: Callable[..., Any], arguments: Any) -> Outcome:
        return ARITHMETICS["as it is"](operation, lambda **given: call(**given).half().float(), arguments)

    mine = [one for one in discover() if one.operation == IOU.name]
    monkeypatch.setattr(arithmetic, "ARITHMETICS", {"half": half})
    assert all(alarms.alarms for alarms in false_alarms(*find_operation(IOU.name), mine, random_scenes(1, seed=0)))


@pytest.mark.parametrize("operation", ["yolox.assign", "yolox.loss", "ssd.loss", "yolov8.assign", "anchor_head.decode"])
def test_what_is_right_raises_none(operation: str) -> None:
    mine = [one for one in discover() if one.operation == operation]
    found = false_alarms(*find_operation(operation), mine, random_scenes(1, seed=0))
    assert [alarm for alarms in found for alarm in alarms.alarms] == []
