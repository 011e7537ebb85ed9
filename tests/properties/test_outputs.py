from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.outputs import cotangent, normalised, perform
from detoracle.properties.systems import find_operation
from detoracle.reference import boxes, yolox
from detoracle.reference.assignment import Assignment
from detoracle.reference.errors import InputError

ASSIGN, DECODE, LOSS, IOU_LOSS = (
    find_operation(name)[1] for name in ("yolox.assign", "yolox.decode", "yolox.loss", "boxes.iou_loss_yolox")
)
INDEX, QUALITY, K = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.int64)


def heads() -> dict[str, Any]:
    return {"raw": [torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 1, 1)], "strides": [8, 16]}


@dataclass
class Found:
    gt_index: Tensor
    quality: Tensor
    aside: str = "not asked for"


RETURNED: dict[str, Any] = {
    "assignment": Assignment(INDEX, QUALITY, {"dynamic_k": K, "cost": K}),
    "tuple": (INDEX, QUALITY, K),
    "list": [INDEX, QUALITY],
    "mapping": {"quality": QUALITY, "gt_index": INDEX},
    "dataclass": Found(INDEX, QUALITY),
    "none for what is optional": (INDEX, QUALITY, None),
    "object": SimpleNamespace(gt_index=INDEX.int(), quality=QUALITY.half(), dynamic_k=K),
}


@pytest.mark.parametrize("form", RETURNED)
def test_every_form_of_return_is_understood(form: str) -> None:
    found = normalised(ASSIGN, RETURNED[form])
    assert {"gt_index", "quality"} <= found.keys() <= {"gt_index", "quality", "dynamic_k"}
    assert found["gt_index"].shape == INDEX.shape


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "gt_index: expected gt_index: Tensor .* got NoneType without it"),
        (INDEX, "quality: expected .* got Tensor without it"),
        ((INDEX, QUALITY, K, K), "outputs: expected at most 3, got 4"),
        ({"gt_index": INDEX, "quality": QUALITY, "cost": K}, "got also cost"),
        ((INDEX, [0.0] * 3), r"quality: expected Tensor \(B, A\) float, got list"),
        ((QUALITY, QUALITY), r"gt_index: expected Tensor \(B, A\) int, got torch.float32 of shape \(1, 3\)"),
        ((INDEX[0], QUALITY), r"of shape \(3,\)"),
        ((INDEX.bool(), QUALITY), "torch.bool"),
        ((INDEX, INDEX), "quality: expected .* got torch.int64"),
    ],
)
def test_what_does_not_meet_the_contract_is_named(returned: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        normalised(ASSIGN, returned)
    assert perform(ASSIGN, lambda **_: returned, {}).problem == "contract"


class Sub(Tensor):
    """A subclass could still be working when it is read."""


def test_a_tensor_that_is_none_quite_is_refused() -> None:
    with pytest.raises(InputError, match=r"quality: expected Tensor .* got Sub"):
        normalised(ASSIGN, (INDEX, QUALITY.as_subclass(Sub)))
    with pytest.raises(InputError, match=r"quality: expected .* got Tensor of layout torch.sparse_coo"):
        normalised(ASSIGN, (INDEX, QUALITY.to_sparse()))
    normalised(ASSIGN, (INDEX, torch.nn.Parameter(QUALITY)))


@pytest.mark.parametrize(
    ("leak", "name", "got"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "default dtype", "torch.float64"),
        (lambda: torch.set_default_device("meta"), "default device", "meta"),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "number of threads", "[0-9]+"),
        (lambda: torch.set_grad_enabled(False), "gradient mode", "False"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic mode", "True"),
    ],
)
def test_a_setting_left_behind_is_named_and_undone(leak: Callable[[], None], name: str, got: str) -> None:
    def call(raw: list[Tensor], strides: list[int]) -> Tensor:
        found = yolox.decode(raw, strides)
        leak()
        return found

    outcome = perform(DECODE, call, heads())
    assert outcome.problem == "contract"
    assert re.search(f"PyTorch's {name}: expected .*, got {got}", outcome.message)
    assert torch.get_default_dtype() == torch.float32
    assert perform(DECODE, yolox.decode, heads()).problem == ""


def test_without_gradients_none_are_asked_for() -> None:
    def call(raw: list[Tensor], strides: list[int]) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not raw[0].requires_grad
        return yolox.decode(raw, strides)

    outcome = perform(DECODE, call, heads(), grad=False)
    assert (outcome.problem, outcome.gradients) == ("", {})


def test_what_is_raised_becomes_the_outcome() -> None:
    def fail(**_: object) -> None:
        raise KeyError("x" * 5000)

    outcome = perform(ASSIGN, fail, {})
    assert outcome.problem == "raised"
    assert outcome.message.startswith("KeyError: 'xxx")
    assert len(outcome.message) <= 2000

    def refuse(**_: object) -> None:
        raise InputError("gt_boxes", expected="a", got="b")

    assert perform(ASSIGN, refuse, {}).problem == "raised"


def write_tensor(raw: list[Tensor], strides: list[int]) -> Tensor:
    found = yolox.decode(raw, strides)
    with torch.no_grad():
        raw[1][0, 0, 0, 0] = 1
    return found


def write_behind_autograd(raw: list[Tensor], strides: list[int]) -> Tensor:
    found = yolox.decode(raw, strides)
    raw[0].data.add_(1)
    return found


def write_and_undo(raw: list[Tensor], strides: list[int]) -> Tensor:
    found = yolox.decode(raw, strides)
    with torch.no_grad():
        raw[0].add_(1).sub_(1)
    return found


def replace_element(raw: list[Tensor], strides: list[int]) -> Tensor:
    found = yolox.decode(raw, strides)
    raw[0] = torch.zeros_like(raw[0])
    return found


def empty_list(raw: list[Tensor], strides: list[int]) -> Tensor:
    found = yolox.decode(raw, strides)
    strides.clear()
    return found


WRITERS = [write_tensor, write_behind_autograd, write_and_undo, replace_element, empty_list]


@pytest.mark.parametrize("writer", WRITERS)
def test_writing_to_an_input_is_seen_and_reaches_no_one_else(writer: Callable[..., Tensor]) -> None:
    arguments = heads()
    outcome = perform(DECODE, writer, arguments)
    assert outcome.problem == "mutated-input"
    assert not outcome.outputs
    assert all(not level.any() for level in arguments["raw"])
    assert arguments["strides"] == [8, 16]


def test_nan_in_an_input_is_no_writing() -> None:
    arguments = heads()
    arguments["raw"][0].fill_(torch.nan)
    assert perform(DECODE, yolox.decode, arguments).problem == ""


def test_gradients_arrive_by_input_and_level() -> None:
    outcome = perform(DECODE, yolox.decode, heads())
    assert list(outcome.gradients) == ["raw[0]", "raw[1]"]
    weights = cotangent(outcome.outputs["predictions"])
    assert torch.equal(outcome.gradients["raw[0]"][:, 4].flatten(), weights[0, :4, 4])  # type: ignore[index]
    assert not outcome.outputs["predictions"].requires_grad


def test_a_missing_gradient_is_none() -> None:
    detached = perform(DECODE, lambda raw, strides: yolox.decode([r.detach() for r in raw], strides), heads())
    assert detached.gradients == {"raw[0]": None, "raw[1]": None}
    half = perform(DECODE, lambda raw, strides: yolox.decode([raw[0], raw[1].detach()], strides), heads())
    assert half.gradients["raw[0]"] is not None
    assert half.gradients["raw[1]"] is None


def test_a_loss_is_differentiated_by_its_total_alone() -> None:
    def total(raw: list[Tensor], **_: Any) -> dict[str, Tensor]:
        return {"total": raw[0].sum() * 2, "box": raw[1].sum()}

    outcome = perform(LOSS, total, heads())
    assert set(outcome.gradients["raw[0]"].flatten().tolist()) == {2}  # type: ignore[union-attr]
    assert outcome.gradients["raw[1]"] is None


def test_no_two_weights_are_alike() -> None:
    weights = cotangent(torch.zeros(5, 7))
    assert len(set(weights.flatten().tolist())) == 35
    assert weights.shape == (5, 7)
    assert cotangent(torch.zeros(0, 3)).shape == (0, 3)


def test_the_caller_s_requires_grad_is_not_touched() -> None:
    pair = {"predicted": torch.ones(2, 4), "target": torch.ones(2, 4), "variant": "iou"}
    perform(IOU_LOSS, boxes.iou_loss_yolox, pair)
    assert not pair["predicted"].requires_grad  # type: ignore[attr-defined]
