"""The delta coder: worked examples, limits, gradients, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import anchor_head_coder
from detoracle.reference.anchor_head_coder import decode, encode
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError
from detoracle.reference.rounding import Bounded


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 1 + 30 * torch.rand(count, 2, generator=generator)], dim=1).to(dtype)


def test_encoding_by_hand() -> None:
    anchor, box = torch.tensor([[0.0, 0, 8, 4]]).double(), torch.tensor([[4.0, 2, 20, 4]]).double()
    assert encode(anchor, box).tolist() == [[1.0, 0.25, math.log(2), math.log(0.5)]]
    scaled = encode(anchor, box, means=(0.5, 0.25, 0, 0), stds=(0.5, 1, 0.25, 2))
    assert scaled.tolist() == [[1.0, 0.0, math.log(2) / 0.25, math.log(0.5) / 2]]


def test_decoding_by_hand() -> None:
    anchor = torch.tensor([[0.0, 0, 8, 4]]).double()
    deltas = torch.tensor([[1.0, 0.25, 0, 0]]).double()
    assert decode(anchor, deltas).tolist() == [[8, 1, 16, 5]]
    assert decode(anchor, deltas, stds=(0.5, 4, 1, 1), means=(0.5, 0, 0, 0)).tolist() == [[8, 4, 16, 8]]
    assert decode(anchor, deltas, max_shape=(4, 12)).tolist() == [[8, 1, 12, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_undoes_encoding(dtype: torch.dtype) -> None:
    boxes, targets = random_boxes(50, 0, dtype), random_boxes(50, 1, dtype)
    settings: dict[str, Any] = {"means": (0.1, -0.2, 0.3, 0.0), "stds": (0.1, 0.1, 0.2, 0.2)}
    anchor, target = Bounded.exact(boxes, dtype), Bounded.exact(targets, dtype)
    there = unchecked(encode)(anchor, target, **settings)
    back: Any = unchecked(decode)(anchor, there, **settings)
    assert not outside(targets, back.value, back.error).any()
    plain = decode(boxes, encode(boxes, targets, **settings), **settings)
    assert not outside(plain, back.value, back.error).any()


def test_several_boxes_an_anchor_are_decoded_alike() -> None:
    boxes, deltas = random_boxes(5, 2), torch.randn(5, 12, dtype=torch.float64)
    together = decode(boxes, deltas, max_shape=(30, 40))
    alone = [decode(boxes, deltas[:, i : i + 4], max_shape=(30, 40)) for i in (0, 4, 8)]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_sides_change_by_the_ratio_at_most() -> None:
    anchor = torch.tensor([[0.0, 0, 8, 8]]).double()
    for value, factor in ((9.0, 62.5), (-9.0, 0.016)):
        got = decode(anchor, torch.tensor([[0.0, 0, value, value]]).double())
        expected = decode(anchor, torch.tensor([[0.0, 0, 1, 1]]).double() * math.log(factor))
        assert torch.equal(got, expected)
    far = decode(anchor, torch.tensor([[0.0, 0, 9, -9]]).double(), ratio_clip=0.5)
    assert (far[:, 2:] - far[:, :2]).tolist()[0] == [
        8 * math.exp(math.log(2)),
        8 * math.exp(-math.log(2)),
    ]


def test_a_clamped_centre_moves_so_far_and_sides_may_shrink_to_nothing() -> None:
    anchor = torch.tensor([[0.0, 0, 8, 8]]).double()
    got = decode(anchor, torch.tensor([[9.0, -9, 0, -1000]]).double(), center_clamp=8.0)
    assert got.tolist() == [[8, -4, 16, -4]]


def test_no_gradient_beyond_the_limits() -> None:
    deltas = torch.tensor([[0.0, 0, 9, 1]], requires_grad=True)
    [gradient] = torch.autograd.grad(decode(torch.tensor([[0.0, 0, 8, 8]]), deltas)[:, 2:].sum(), deltas)
    assert gradient[0, 2] == 0
    assert gradient[0, 3] > 0


def test_gradients_equal_finite_differences() -> None:
    boxes, targets = random_boxes(4, 3), random_boxes(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: encode(boxes, t, stds=(0.1, 0.1, 0.2, 0.2)), targets)
    deltas = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: decode(boxes, d, means=(0.1, 0, 0, 0.2), max_shape=(90, 90)), deltas)


def test_degenerate_boxes_give_what_division_and_logarithm_give() -> None:
    anchor = torch.tensor([[0.0, 0, 8, 8]])
    assert encode(anchor, torch.tensor([[4.0, 4, 4, 8]]))[0, 2] == -math.inf
    assert encode(anchor, torch.tensor([[8.0, 4, 4, 8]]))[0, 2].isnan()
    assert encode(torch.tensor([[4.0, 0, 4, 8]]), torch.tensor([[4.0, 0, 4, 8]]))[0].tolist()[1::2] == [0, 0]
    assert encode(torch.tensor([[4.0, 0, 4, 8]]), torch.tensor([[4.0, 0, 4, 8]]))[0, ::2].isnan().all()


def test_inputs_stay_as_they_are() -> None:
    boxes, deltas = random_boxes(3, 5), torch.randn(3, 4)
    before = boxes.clone(), deltas.clone()
    encode(boxes, boxes)
    decode(boxes, deltas.double(), max_shape=(9, 9))
    assert torch.equal(boxes, before[0])
    assert torch.equal(deltas, before[1])


def test_shapes_are_checked() -> None:
    with pytest.raises(
        InputError, match=r"anchor_head.encode: boxes: expected a float Tensor of shape \(N, 4\) with N=2"
    ):
        encode(torch.ones(2, 4), torch.ones(3, 4))
    assert anchor_head_coder.encode(torch.ones(0, 4), torch.ones(0, 4)).shape == (0, 4)
