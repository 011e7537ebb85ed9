from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch

from detoracle.implementations.loop import anchor_head_terms as terms
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.systems import find_operation

EDGE = {scene.name: scene for scene in edge_cases()}
CHOSEN = ["ragged", "empty-all", "one-class", "extreme-logits-200", "extreme-boxes-50", "nan-class"]
TERMS: dict[str, Callable[..., torch.Tensor]] = {name: getattr(terms, name) for name in terms.__all__}
CLASS = [name for name in TERMS if name.endswith(("entropy", "focal_loss"))]
BOX = [name for name in TERMS if name not in CLASS]


def wrong_cases(name: str, scene: str, call: Callable[..., Any], dtype: torch.dtype = torch.float32) -> list[str]:
    system, operation = find_operation(f"anchor_head.{name}")
    run = partial(perform, operation, call)
    found = cases(system, operation, EDGE[scene], dtype=dtype)
    results = [judge_case(case, expect(system, operation, case.arguments), run) for case in found]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("scene", CHOSEN)
@pytest.mark.parametrize("name", TERMS)
def test_right(name: str, scene: str) -> None:
    assert wrong_cases(name, scene, TERMS[name]) == []


@pytest.mark.parametrize("name", TERMS)
def test_right_in_double_precision(name: str) -> None:
    assert wrong_cases(name, "ragged", TERMS[name], torch.float64) == []


@pytest.mark.parametrize("name", TERMS)
def test_oracle_and_loop_take_the_same_settings(name: str) -> None:
    oracle = find_operation(f"anchor_head.{name}")[1].oracle
    settings, right = ({n: p.default for n, p in signature(f).parameters.items()} for f in (TERMS[name], oracle))
    assert settings == right


# -------------------------------------------------------------------------------------------- beyond the suite's cases
def rows(name: str, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name in CLASS:
        labels = torch.randint(3, (count,), generator=generator)
        return {"logits": torch.randn(count, 3, generator=generator), "labels": labels}
    near = torch.rand(count, 4, generator=generator).cumsum(1)
    return {"predicted": near, "target": near + 1 / 4}


def same(name: str, arguments: dict[str, Any]) -> None:
    system, operation = find_operation(f"anchor_head.{name}")
    verdict = expect(system, operation, arguments).judge(perform(operation, TERMS[name], arguments))
    assert not verdict.wrong, verdict.findings


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", [*CLASS, *BOX])
def test_without_rows(name: str, reduction: str) -> None:
    same(name, {**rows(name, 0), "reduction": reduction})


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", TERMS)
def test_without_weights(name: str, reduction: str) -> None:
    same(name, {**rows(name, 7), "reduction": reduction, "loss_weight": 0.5})


@pytest.mark.parametrize("weight", [0.0, -1.0])
@pytest.mark.parametrize("shape", [(5,), (5, 4)], ids=str)
def test_coordinates_stand_in_without_a_positive_weight(shape: tuple[int, ...], weight: float) -> None:
    same("giou_loss", {**rows("giou_loss", 5), "weight": torch.full(shape, weight)})


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    given = rows("sigmoid_cross_entropy", 4)
    value = TERMS["sigmoid_cross_entropy"](given["logits"].half(), given["labels"])
    assert value.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ wrong variants
def without_weights(name: str, **given: Any) -> torch.Tensor:
    """All rows count alike."""
    return TERMS[name](**{**given, "weight": None})


def twice(name: str, **given: Any) -> torch.Tensor:
    """Twice the loss."""
    return 2 * TERMS[name](**given)


def without_gradient(name: str, **given: Any) -> torch.Tensor:
    """Values alone."""
    return TERMS[name](**given).detach()


@pytest.mark.parametrize("variant", [without_weights, twice, without_gradient])
@pytest.mark.parametrize("name", TERMS)
def test_wrong_is_judged_wrong(name: str, variant: Callable[..., torch.Tensor]) -> None:
    assert wrong_cases(name, "ragged", partial(variant, name))
