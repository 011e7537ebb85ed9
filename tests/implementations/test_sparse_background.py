from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detoracle.implementations.sparse.background import background_loss
from detoracle.properties.bounds import gradient_bound, outside


def logits(centre: float, classes: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(classes, 7, generator=generator, dtype=torch.float64) * 3 + centre).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 80, 300])
@pytest.mark.parametrize("centre", [-80.0, -15.0, -4.0, 0.0, 15.0, 90.0])
def test_as_exact_as_one_logarithm_an_entry(centre: float, classes: int, dtype: torch.dtype) -> None:
    x = logits(centre, classes, dtype)
    room = torch.empty(x.shape, dtype=torch.promote_types(dtype, torch.float32))
    found, exact = background_loss(x, gradient=room), F.softplus(x.double(), threshold=800).sum()
    # Every term is right to some units in the last place, whatever its size, and all are positive.
    assert abs(float(found) - float(exact)) <= 32 * torch.finfo(found.dtype).eps * float(exact)
    probability = torch.sigmoid(x.double())
    assert not outside(room, probability, gradient_bound(probability, torch.sigmoid(x.to(room.dtype)), row=1)).any()


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x = logits(-4.0, 50, torch.float64)
    whole = background_loss(x)
    monkeypatch.setattr("detoracle.implementations.sparse.background._CHUNK", 21)
    room = torch.empty_like(x)
    torch.testing.assert_close(background_loss(x, scale=2.0, gradient=room), whole)
    torch.testing.assert_close(room, torch.sigmoid(x) * 2)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_no_number(value: float) -> None:
    x = torch.zeros(4, 4)
    x[2, 2] = value
    assert not bool(background_loss(x).isfinite())


def test_minus_infinity_costs_nothing() -> None:
    assert float(background_loss(torch.full((5, 5), -torch.inf))) == 0


def test_of_nothing() -> None:
    assert float(background_loss(torch.empty(0, 5))) == float(background_loss(torch.empty(5, 0))) == 0
