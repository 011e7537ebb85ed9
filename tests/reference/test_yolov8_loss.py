"""Decoding, distribution focal loss and the whole loss of YOLOv8: closed forms, finite differences, quirks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import yolov8_loss
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.yolov8 import explain_loss, loss_given
from detoracle.reference.rounding import Bounded


def bounded(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, torch.float32)


def agrees(given: Tensor | float, expected: Any) -> bool:
    """Is a result within the bound of the oracle's error analysis?"""
    return not bool(outside(torch.as_tensor(given), expected.value, expected.error).any())


def maps(seed: int = 0, *, reg_max: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two 64 px images with two and one ground truths."""
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(2, 4 * reg_max + 3, 64 // s, 64 // s, generator=generator) for s in (8, 16, 32)]
    return {
        "raw": [(level.abs() if reg_max == 1 else level).to(dtype) for level in raw],
        "strides": [8, 16, 32],
        "gt_boxes": torch.tensor([[[4.0, 6, 40, 44], [22, 18, 60, 52]], [[10, 2, 62, 50], [0, 0, 0, 0]]], dtype=dtype),
        "gt_labels": torch.tensor([[0, 2], [1, 0]]),
        "gt_valid": torch.tensor([[True, True], [True, False]]),
        "reg_max": reg_max,
    }


# ----------------------------------------------------------------------------------------------------------- decoding
def test_a_certain_distribution_decodes_to_its_bin() -> None:
    logits = torch.zeros(1, 1, 4, 8)
    for side, distance in enumerate([0, 3, 7, 5]):
        logits[0, 0, side, distance] = 1000.0
    assert yolov8_loss.dfl_decode(logits.flatten(2)).tolist() == [[[0.0, 3.0, 7.0, 5.0]]]


def test_one_bin_is_the_distance_itself() -> None:
    distances = torch.tensor([[[1.0, -2.0, 3.5, 40.0]]])
    assert torch.equal(yolov8_loss.dfl_decode(distances), distances)


def test_the_convolution_decodes_as_the_function_does() -> None:
    logits = torch.randn(2, 5, 64)
    expected: Any = unchecked(yolov8_loss.dfl_decode)(bounded(logits))
    assert agrees(yolov8_loss.dfl_decode(logits), expected)
    assert agrees(yolov8_loss.DFL(16)(logits.transpose(1, 2)).transpose(1, 2), expected)


def test_the_convolution_is_fixed_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    module = yolov8_loss.DFL(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.flatten().tolist() for name, p in module.named_parameters()} == {
        "conv.weight": [0.0, 1.0, 2.0, 3.0]
    }
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_convolution_checks_its_input() -> None:
    with pytest.raises(InputError) as error:
        yolov8_loss.DFL(16)(torch.zeros(1, 32, 5))
    assert str(error.value) == "yolov8.DFL: box_logits: expected shape (B, 64, A), got shape (1, 32, 5)."


def test_boxes_and_distances_are_inverse() -> None:
    points, distances = torch.tensor([[4.5, 7.5], [0.5, 2.5]]), torch.tensor([[1.0, 2, 3, 4], [0, 0.25, 8, 14.5]])
    boxes = yolov8_loss.dist2bbox(distances, points)
    assert boxes.tolist() == [[3.5, 5.5, 7.5, 11.5], [0.5, 2.25, 8.5, 17.0]]
    assert torch.equal(yolov8_loss.bbox2dist(points, boxes), distances)
    assert yolov8_loss.dist2bbox(distances, points, form="cxcywh")[0].tolist() == [5.5, 8.5, 4.0, 6.0]


def test_distances_are_clamped_to_the_bins() -> None:
    boxes = torch.tensor([[1.0, 4.0, 30.0, 10.0]])
    clamped = yolov8_loss.bbox2dist(torch.tensor([[2.0, 2.0]]), boxes, reg_max=8)
    assert torch.equal(clamped, torch.tensor([[1.0, 0.0, 6.99, 6.99]]))


# ---------------------------------------------------------------------------------------------------------------- DFL
def test_dfl_of_a_whole_distance_is_its_cross_entropy() -> None:
    logits, target = torch.randn(3, 4, 16), torch.tensor([[0.0, 1, 2, 3], [14, 13, 12, 11], [5, 5, 5, 5]])
    expected: Any = unchecked(yolov8_loss.dfl_loss)(bounded(logits.flatten(1)), bounded(target))
    entropy = F.cross_entropy(logits.reshape(-1, 16), target.long().flatten(), reduction="none").reshape(3, 4).mean(1)
    assert agrees(entropy, expected)
    assert agrees(yolov8_loss.dfl_loss(logits.flatten(1), target), expected)


def test_dfl_of_uniform_logits_is_the_logarithm_of_the_bins() -> None:
    logits, target = torch.zeros(2, 4 * 8), torch.rand(2, 4) * 6.99
    expected: Any = unchecked(yolov8_loss.dfl_loss)(bounded(logits), bounded(target))
    assert agrees(torch.full((2,), math.log(8), dtype=torch.float64), expected)


def test_dfl_pulls_towards_both_neighbours_by_nearness() -> None:
    logits = torch.zeros(1, 4 * 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(yolov8_loss.dfl_loss(logits, torch.full((1, 4), 1.25)).sum(), logits)
    # Softmax less target distribution, a quarter for each side.
    assert torch.equal(gradient.reshape(4, 4), (torch.tensor([0.25, 0.25 - 0.75, 0.25 - 0.25, 0.25]) / 4).expand(4, 4))


def test_dfl_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(2, 4 * 5, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 4, dtype=torch.float64) * 3.99
    assert torch.autograd.gradcheck(lambda x: yolov8_loss.dfl_loss(x, target), logits)


@pytest.mark.parametrize("target", [-0.5, 15.0, 99.0, math.nan])
def test_dfl_raises_where_a_bin_is_missing(target: float) -> None:
    with pytest.raises(UpstreamRaises) as error:
        yolov8_loss.dfl_loss(torch.zeros(1, 64), torch.tensor([[0.0, 1.0, target, 3.0]]))
    assert error.value.behaviour == "yolov8.dfl-target-out-of-range"
    assert "expected targets from 0 to less than 15" in str(error.value)


def test_dfl_leaves_its_target_alone() -> None:
    target = torch.tensor([[0.0, 14.99, 3.0, 3.5]])
    before = target.clone()
    yolov8_loss.dfl_loss(torch.zeros(1, 64), target)
    assert torch.equal(target, before)


# --------------------------------------------------------------------------------------------------------- whole loss
def test_without_ground_truths_only_classes_are_trained() -> None:
    arguments = maps()
    arguments["raw"] = [torch.zeros_like(level).requires_grad_() for level in arguments["raw"]]
    empty = {
        "gt_boxes": torch.zeros(2, 0, 4),
        "gt_labels": torch.zeros(2, 0).long(),
        "gt_valid": torch.zeros(2, 0).bool(),
    }
    parts = yolov8_loss.loss(**{**arguments, **empty})
    expected = loss_given(torch.full((2, 84), -1), **{**arguments, **empty})
    assert parts["box"] == parts["dfl"] == 0
    assert agrees(2 * 84 * 3 * math.log(2) * 0.5, expected["cls"])
    assert agrees(parts["cls"], expected["cls"])
    for gradient in torch.autograd.grad(parts["total"], arguments["raw"]):
        assert not gradient[:, :64].any()
        assert (gradient[:, 64:] == 0.5 * 0.5 * 2).all()  # sigmoid(0), gain, batch size


def test_total_is_parts_times_batch_size() -> None:
    arguments = maps()
    arguments["raw"] = [level.requires_grad_() for level in arguments["raw"]]
    parts = yolov8_loss.loss(**arguments)
    assert list(parts) == ["total", "box", "cls", "dfl"]
    assert parts["total"] == (parts["box"] + parts["cls"] + parts["dfl"]) * 2
    assert [name for name, part in parts.items() if part.requires_grad] == ["total"]


def test_gains_weight_the_parts() -> None:
    unit = yolov8_loss.loss(**maps(), box_gain=1.0, cls_gain=1.0, dfl_gain=1.0)
    twice = yolov8_loss.loss(**maps(), box_gain=2.0, cls_gain=4.0, dfl_gain=8.0)
    assert all(twice[name] == factor * unit[name] for name, factor in (("box", 2), ("cls", 4), ("dfl", 8)))
    default = yolov8_loss.loss(**maps())
    assert all(default[name] == factor * unit[name] for name, factor in (("box", 7.5), ("cls", 0.5), ("dfl", 1.5)))


def test_raw_distances_have_no_distribution_loss() -> None:
    parts = yolov8_loss.loss(**maps(reg_max=1))
    assert parts["dfl"] == 0
    assert parts["box"] > 0


def test_a_box_of_negative_sum_trains_nothing() -> None:
    arguments = maps()
    arguments["gt_boxes"][0, 0] = torch.tensor([-60.0, -50, 14, 12])
    ignored = {**arguments, "gt_valid": torch.tensor([[False, True], [True, False]])}
    assert yolov8_loss.loss(**arguments) == yolov8_loss.loss(**ignored)


def test_labels_are_indexed_before_boxes_are_ignored() -> None:
    arguments = maps()
    arguments["gt_boxes"][0, 0], arguments["gt_labels"][0, 0] = torch.tensor([-60.0, -50, 14, 12]), 3
    with pytest.raises(
        UpstreamRaises, match=r"yolov8.loss, image 0: yolov8.label-out-of-range: expected labels -3 to 2"
    ):
        yolov8_loss.loss(**arguments)


def test_nan_spreads_to_every_part() -> None:
    arguments = maps()
    gt_index = explain_loss(**arguments).gt_index
    anchor = int((gt_index[0, :64] >= 0).nonzero()[0])
    arguments["raw"][0][0, 64:, anchor // 8, anchor % 8] = torch.nan
    assert all(part.isnan() for part in yolov8_loss.loss(**arguments).values())


def test_gradient_is_that_of_finite_differences() -> None:
    """Quality and alpha are constants for the gradient: so the first is given, and the box part stays out."""
    arguments = maps(dtype=torch.float64)
    gt_index = torch.full((2, 84), -1)
    gt_index[0, 80], gt_index[0, 83], gt_index[1, 81] = 0, 1, 0  # all on the last level, whose map is varied
    quality = torch.rand(gt_index.shape, dtype=torch.float64) * (gt_index >= 0)

    def total(flat: Tensor) -> Tensor:
        level = flat.reshape(2, 67, 2, 2)
        head = yolov8_loss._head([*arguments["raw"][:2], level], arguments["strides"], 16)
        gains = (0.0, 0.5, 1.5)
        return yolov8_loss._loss(head, arguments["gt_boxes"], arguments["gt_labels"], gt_index, quality, gains)["total"]

    assert torch.autograd.gradcheck(total, arguments["raw"][2].flatten().requires_grad_(), fast_mode=True)


def test_the_box_part_pulls_positives_towards_their_box() -> None:
    arguments = maps()
    arguments["raw"] = [level.requires_grad_() for level in arguments["raw"]]
    gradients = torch.autograd.grad(
        yolov8_loss.loss(**arguments, cls_gain=0.0, dfl_gain=0.0)["total"], arguments["raw"]
    )
    gt_index = explain_loss(**{**arguments, "raw": [level.detach() for level in arguments["raw"]]}).gt_index
    flat = torch.cat([level.flatten(2) for level in gradients], dim=2)
    assert not flat[:, 64:].any()
    assert not flat[:, :64].abs().sum(1)[gt_index < 0].any()
    stepped = [level.detach() - 1e-3 * gradient for level, gradient in zip(arguments["raw"], gradients, strict=True)]
    before, after = (
        loss_given(gt_index, **{**arguments, "raw": raw}, dtype=None) for raw in (arguments["raw"], stepped)
    )
    assert after["box"] < before["box"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    parts = yolov8_loss.loss(**{**maps(dtype=dtype), "gt_boxes": maps()["gt_boxes"]})
    assert all(part.isfinite() for part in parts.values())
    assert parts["total"].dtype == torch.promote_types(dtype, torch.float32)


def test_inputs_are_not_written_to() -> None:
    arguments, before = maps(), maps()
    yolov8_loss.loss(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments["raw"], before["raw"], strict=True))
    assert all(torch.equal(arguments[name], before[name]) for name in ("gt_boxes", "gt_labels", "gt_valid"))


def test_channels_must_hold_distances_and_a_class() -> None:
    with pytest.raises(InputError) as error:
        yolov8_loss.loss(**{**maps(), "raw": [torch.zeros(2, 64, 8, 8)], "strides": [8]})
    assert str(error.value) == (
        "yolov8.loss: raw: expected more than 4 * reg_max = 64 channels (reg_max at least 1), got 64 channels."
    )
