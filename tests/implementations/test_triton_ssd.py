from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import ssd as batched
from tests.implementations.triton_trials import (
    DEVICE,
    arguments_of,
    gradients_of,
    interpreted,
    warnings_of_numpy,
    wrong_cases,
)

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, boxes, ssd, ssd_kernels, ssd_loss_kernels

pytestmark = warnings_of_numpy
MATCHED = [
    "empty-one",
    "empty-all",
    "identical-other-class",
    "outside-mixed",
    "zero-row-first",
    "degenerate-pair",
    "inverted-only",
    "symmetric",
    "equal-several",
    "no-overlap",
    "label-minus-one",
]
MINED = {
    "overlapping": ["3:1", "372:1", "logits far apart", "background labels"],
    "equal-one": ["3:1", "1:1"],
    "nan-class": ["3:1"],
    "inf-class": ["3:1"],
}
TRAINED = {
    "identical-other-class": ["logits far apart", "background labels"],
    "inverted-only": ["threshold 0.35, 1:1, other variances"],
    "degenerate-point": ["all negatives"],
    "nan-class": ["threshold 0.5, 3:1"],
    "nan-box": ["threshold 0.5, 3:1"],
    "empty-all": ["threshold 0.5, 3:1"],
}


@pytest.mark.parametrize("name", MATCHED)
def test_matches_rightly(name: str) -> None:
    assert wrong_cases("ssd.match", name) == []


@pytest.mark.parametrize("name", MINED)
def test_mines_rightly(name: str) -> None:
    assert wrong_cases("ssd.hard_negatives", name, MINED[name]) == []


@pytest.mark.parametrize("name", TRAINED)
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("ssd.loss", name, TRAINED[name]) == []


# ---------------------------------------------------------------------------------------------------- to the last prior
@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image has several, the last of which is not full."""
    monkeypatch.setattr(ssd, "_PRIORS", 16)
    monkeypatch.setattr(ssd, "_MATCHED", 16)


def random_rows(number: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(number, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
def test_matches_as_batched_does(threshold: float) -> None:
    corners, places = random_rows(6, 4).view(2, 3, 4) * 0.5, torch.arange(3, device=DEVICE)
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 0.1], dim=-1)
    boxes[1, 2] = boxes[1, 0]  # shares its best prior
    valid = torch.tensor([[True, False, True], [True] * 3], device=DEVICE)
    given = (random_rows(45, 4, 1) + 2**-10, boxes, places.expand(2, 3) - 1, valid)
    found, want = ssd.match(*given, threshold=threshold), batched.match(*given, threshold=threshold)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)
    assert torch.equal(found.extra["class_target"], want.extra["class_target"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("neg_pos", [0, 1, 3, 50])
def test_ranks_as_a_stable_sort_does(neg_pos: int) -> None:
    """Logits of one class beside the background: the other's exceeds it by what orders the losses."""
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(-2, 5, (3, 40), generator=generator).float()
    other[1] = 0
    other[2] += torch.rand(40, generator=generator)
    conf = torch.stack([torch.zeros_like(other), other], dim=-1).to(DEVICE)
    positive = torch.where(torch.rand(3, 40, generator=generator) < 0.2, 0, -1)
    positive[0] = -1
    given = (conf, positive.to(DEVICE), torch.zeros(3, 1, dtype=torch.int64, device=DEVICE))
    found, want = (module.hard_negatives(*given, neg_pos=neg_pos) for module in (ssd, batched))
    assert torch.equal(found.gt_index, want.gt_index)


@pytest.mark.parametrize(
    ("logits", "neg_pos", "hardest"),
    [
        ([[torch.nan, 0.0], [0.0, 9.0], [0.0, 5.0]], 1, [-1, 0, -2]),
        ([[-400.0, -400.0], [0.0, 50.0], [0.0, 0.0]], 1, [-2, 0, -1]),
        ([[-400.0, -400.0], [0.0, 200.0], [-400.0, -400.0]], 50, [-1, 0, -2]),
    ],
    ids=["NaN first", "underflow last", "positive before underflow, and at most all but one"],
)
def test_ranks_what_is_no_ordinary_number(logits: list[list[float]], neg_pos: int, hardest: list[int]) -> None:
    positive, label = torch.tensor([[-1, 0, -1]], device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    found = ssd.hard_negatives(torch.tensor([logits], device=DEVICE), positive, label, neg_pos=neg_pos)
    want = batched.hard_negatives(torch.tensor([logits], device=DEVICE), positive, label, neg_pos=neg_pos)
    assert found.gt_index.tolist() == want.gt_index.tolist()
    assert found.gt_index.tolist() == [hardest]


@pytest.mark.parametrize("part", ["localisation", "classification"])
def test_each_part_has_its_own_gradient(part: str) -> None:
    found = gradients_of("ssd.loss", arguments_of("ssd.loss", "single"), part)
    assert [bool(to_input.any()) for to_input in found] == [part == "localisation", part == "classification"]


def test_batch_without_ground_truth_costs_nothing() -> None:
    given = arguments_of("ssd.loss", "empty-single")
    assert float(ssd.loss(**given)["total"]) == 0
    assert not any(to_input.any() for to_input in gradients_of("ssd.loss", given))


# ------------------------------------------------------------------------------------------------------- wrong variants
def _another_prior(keys: Any) -> Any:
    """Keys name the prior before or after."""
    value, index = KEY_VALUE(keys)
    return value, index ^ 1


def _half_shared(a: Any, b: Any) -> Any:
    """Overlaps are too small."""
    return SHARED_AREA(a, b) * 0.5


def _without_the_last_bits(terms: Any, highest: Any, lowest: Any, at: Any, there: Any) -> Any:
    """Losses that are nearly alike tie."""
    loss, order = RANKED(terms, highest, lowest, at, there)
    return loss, (order >> 16) << 16


def _never_underflows(terms: Any, highest: Any, _lowest: Any, at: Any, there: Any) -> Any:
    """A maximum of each row."""
    return RANKED(terms, highest, float("-inf"), at, there)


KEY_VALUE, SHARED_AREA, RANKED = arithmetic.key_value, boxes.shared_area, ssd_kernels._ranked


@interpreted
@pytest.mark.parametrize(
    ("operation", "name", "wrong", "setting"),
    [
        ("ssd.match", "key_value", _another_prior, "threshold 0.5"),
        ("ssd.match", "shared_area", _half_shared, "threshold 0.5"),
        ("ssd.hard_negatives", "_ranked", _without_the_last_bits, "3:1"),
        ("ssd.hard_negatives", "_ranked", _never_underflows, "logits far apart"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(
    monkeypatch: pytest.MonkeyPatch, operation: str, name: str, wrong: Any, setting: str
) -> None:
    monkeypatch.setattr(ssd_kernels, name, wrong)
    assert wrong_cases(operation, "untrained", [setting])


def _of_all(targets: Any, row: Any, there: Any) -> Any:
    """Every prior is trained."""
    label, positive, _ = TARGET(targets, row, there)
    return label, positive, there


def _farther(loc: Any, targets: Any, row: Any, positive: Any) -> Any:
    """Offsets are twice as far off."""
    at, distance = DISTANCES(loc, targets, row, positive)
    return at, distance * 2.0


TARGET, DISTANCES = ssd_loss_kernels._target, ssd_loss_kernels._distances


@interpreted
@pytest.mark.parametrize(("name", "wrong"), [("_target", _of_all), ("_distances", _farther)])
def test_a_broken_loss_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(ssd_loss_kernels, name, wrong)
    assert wrong_cases("ssd.loss", "identical-other-class", ["logits far apart"])
