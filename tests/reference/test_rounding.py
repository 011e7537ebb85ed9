"""Bounds hold for every float32 evaluation, decisions for every way their inputs can fall, and both are sharp."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detoracle.reference.rounding import (
    Bounded,
    Decision,
    Precision,
    known,
    known_range,
    log_at_least,
    log_ratio,
    nothing_by_luck,
    value_of,
)
from detoracle.reference.rounding_rules import RULES

UNIT = torch.finfo(torch.float32).eps / 2
floats = st.floats(-1e4, 1e4, width=32)
triples = st.lists(floats, min_size=3, max_size=3).map(torch.tensor)


def exact(values: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A tensor without error; Any, for it goes where PyTorch declares tensors."""
    return Bounded.exact(torch.as_tensor(values), dtype)


def held(given_: Tensor, bounded: Bounded) -> bool:
    given_ = given_.double()
    return bool(
        (((given_ - bounded.value).abs() <= bounded.error) | (given_ == bounded.value) | bounded.error.isinf()).all()
    )


# ---------------------------------------------------------------------------------------------- rule by rule
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "true_divide": torch.true_divide,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "square": lambda a, b: torch.square(a),
    "pow": lambda a, b: a.abs() ** 1.5,
    "rpow": lambda a, b: 2.0 ** (a / 50),
    "exp": lambda a, b: torch.exp(a / 8),
    "log": lambda a, b: torch.log(a.abs()),
    "log1p": lambda a, b: torch.log1p(a.abs()),
    "sqrt": lambda a, b: torch.sqrt(a.abs()),
    "sigmoid": lambda a, b: torch.sigmoid(a),
    "atan": lambda a, b: torch.atan(a),
    "softplus": lambda a, b: F.softplus(a),
    "clamp": lambda a, b: torch.clamp(a, min=-1.1, max=2.3),
    "clamp_min": lambda a, b: a.clamp_min(0.5),
    "clamp_max": lambda a, b: a.clamp_max(0.5),
    "softmax": lambda a, b: torch.softmax(a, dim=0),
    "log_softmax": lambda a, b: torch.log_softmax(a, dim=0),
    "sum": lambda a, b: a.sum(0),
    "mean": lambda a, b: a.mean(0),
    "prod": lambda a, b: (a / 100).prod(0),
    "where": lambda a, b: torch.where(torch.tensor(True), a, b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "amax": lambda a, b: a.amax(0),
    "amin": lambda a, b: a.amin(0),
    "binary_cross_entropy_with_logits": lambda a, b: F.binary_cross_entropy_with_logits(
        a, b.sigmoid(), reduction="none"
    ),
    "binary_cross_entropy": lambda a, b: F.binary_cross_entropy(
        a.sigmoid(), torch.tensor([1.0, 0.0, 1.0, 0.0]), reduction="none"
    ),
    "cross_entropy": lambda a, b: F.cross_entropy(a[None], torch.tensor([1]), reduction="none"),
    "smooth_l1_loss": lambda a, b: F.smooth_l1_loss(a, b, reduction="none"),
}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "gt": lambda a, b: a > b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "le": lambda a, b: a <= b,
}
LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "logical_and": lambda p, q: p & q,
    "logical_or": lambda p, q: p | q,
    "logical_not": lambda p, q: ~p,
    "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or,
    "bitwise_not": lambda p, q: torch.bitwise_not(p),
    "all": lambda p, q: torch.stack([p, q]).all(0),
    "any": lambda p, q: torch.stack([p, q]).any(0),
}
STRUCTURE: dict[str, Callable[[Any], Any]] = {
    "reshape": lambda x: x.reshape(3, 2),
    "view": lambda x: x.view(6),
    "flatten": lambda x: x.flatten(),
    "permute": lambda x: x.permute(1, 0),
    "transpose": lambda x: x.transpose(0, 1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x[:, :1].expand(2, 3),
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "gather": lambda x: x.gather(1, torch.tensor([[2], [1]])),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "movedim": lambda x: x.movedim(0, 1),
    "t": lambda x: x.t(),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=0),
    "expand_as": lambda x: x[:, :1].expand_as(torch.zeros(2, 3)),
    "masked_select": lambda x: x.masked_select(torch.tensor([True, False, True])),
    "__getitem__": lambda x: x[:, [2, 0]],
    "cat": lambda x: torch.cat([x, x], dim=1),
    "stack": lambda x: torch.stack([x, x], dim=2),
    "unbind": lambda x: torch.unbind(x, 1)[1],
    "split": lambda x: x.split([1, 2], dim=1)[1],
    "split_with_sizes": lambda x: torch.split_with_sizes(x, [2, 1], dim=1)[0],
    "detach": lambda x: x.detach(),
    "double": lambda x: x.double(),
    "to": lambda x: x.to(torch.float64),
}
PLAIN: dict[str, Callable[[Any], Any]] = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda x: torch.full_like(x, 2),
    "new_zeros": lambda x: x.new_zeros(2),
    "new_full": lambda x: x.new_full((2,), 7.0),
    "numel": lambda x: x.numel(),
    "size": lambda x: x.size(1),
    "dim": lambda x: x.dim(),
    "isnan": torch.isnan,
    "isfinite": torch.isfinite,
    "isinf": torch.isinf,
    "floor": torch.floor,
    "long": lambda x: x.long(),
    "new_tensor": lambda x: x.new_tensor([0.25]),
}


def test_every_rule_is_tested() -> None:
    tested = ARITHMETIC.keys() | COMPARISONS.keys() | LOGIC.keys() | STRUCTURE.keys() | PLAIN.keys()
    assert tested == RULES.keys()


@pytest.mark.parametrize("rule", ARITHMETIC)
@pytest.mark.parametrize("spread", [0.0, 1e-3], ids=["exact", "carried"])
def test_every_evaluation_lies_within_the_bound(rule: str, spread: float) -> None:
    """Operands anywhere within their errors, evaluated in float32."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 30.0, 150.0):
        a, b = (scale * torch.randn(4, 200, generator=generator) for _ in range(2))
        bounded = [Bounded(x.double(), spread * x.double().abs(), Precision.of(torch.float32)) for x in (a, b)]
        rows = [Bounded(x.value[:, i], x.error[:, i], x.precision) for i in range(200) for x in bounded]
        for i in range(0, 200, 1 if rule in ("cross_entropy", "binary_cross_entropy") else 10):
            bound = ARITHMETIC[rule](rows[2 * i], rows[2 * i + 1])
            for _ in range(3):
                moved = [x[:, i] * (1 + spread * 0.999 * (2 * torch.rand(4, generator=generator) - 1)) for x in (a, b)]
                assert held(ARITHMETIC[rule](*moved), bound), (rule, scale)


@pytest.mark.parametrize("rule", STRUCTURE)
def test_structure_moves_values_and_errors_alike(rule: str) -> None:
    value = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    found = STRUCTURE[rule](Bounded(value, value + 10, Precision.of(torch.float32)))
    expected = STRUCTURE[rule](value)
    assert torch.equal(found.value, expected)
    assert torch.equal(found.error, expected + 10)


@pytest.mark.parametrize("rule", PLAIN)
def test_what_carries_no_error_is_as_on_tensors(rule: str) -> None:
    value = torch.tensor([[1.5, math.inf, -2.5]], dtype=torch.float64)
    value = value.nan_to_num(posinf=3.5) if rule in ("long", "floor") else value
    found = value_of(PLAIN[rule](exact(value)))
    expected = PLAIN[rule](value)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("rule", COMPARISONS)
@pytest.mark.parametrize("dyadic", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
def test_a_comparison_is_ambiguous_exactly_where_it_could_fall_otherwise(rule: str, dyadic: float) -> None:
    a, b = torch.tensor([dyadic]).double(), torch.tensor([1.0]).double()
    bounded = Bounded(a, torch.tensor([0.5]).double(), Precision.of(torch.float32))
    other = Bounded(b, torch.tensor([0.25]).double(), Precision.of(torch.float32))
    found = COMPARISONS[rule](bounded, other)
    outcomes = {bool(COMPARISONS[rule](a + x, b + y)) for x in (-0.4999, 0, 0.4999) for y in (-0.2499, 0, 0.2499)}
    assert bool(found.value) == bool(COMPARISONS[rule](a, b))
    assert bool(found.ambiguous) == (len(outcomes) > 1)
    assert math.isinf(COMPARISONS[rule](exact(a), 1.0).margin)


@pytest.mark.parametrize("rule", LOGIC)
@pytest.mark.parametrize(("p", "q"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize(("open_p", "open_q"), [*itertools.product([False, True], repeat=2)])
def test_logic_is_ambiguous_exactly_where_an_open_operand_changes_it(
    rule: str, p: bool, q: bool, open_p: bool, open_q: bool
) -> None:
    margins = [torch.tensor([0.5 if o else 7.0], dtype=torch.float64) for o in (open_p, open_q)]
    given_ = [Decision(torch.tensor([v]), m) for v, m in zip((p, q), margins, strict=True)]
    found = LOGIC[rule](*given_)
    outcomes = {
        bool(LOGIC[rule](torch.tensor([x]), torch.tensor([y])))
        for x in ({p, not p} if open_p else {p})
        for y in ({q, not q} if open_q else {q})
    }
    assert bool(found.value) == bool(LOGIC[rule](torch.tensor([p]), torch.tensor([q])))
    assert bool(found.ambiguous) == (len(outcomes) > 1)


# ---------------------------------------------------------------------------------------------- expressions
@given(triples, triples)
def test_arrangements_of_an_expression_lie_within_one_bound(a: Tensor, b: Tensor) -> None:
    x, y = exact(a), exact(b)
    assert held(a * b + a, x * y + x)
    assert held(a * (b + 1), x * (y + 1))
    orders = [sum((a * b)[list(order)]) for order in itertools.permutations(range(3))]
    assert all(held(torch.as_tensor(total), (x * y).sum(0)) for total in orders)
    mean = (x + y) / 2
    assert held((a + b) / 2, mean)
    assert held(a / 2 + b / 2, x / 2 + y / 2)


@given(st.lists(st.integers(-(2**10), 2**10), min_size=2, max_size=12))
def test_grid_coordinates_stay_exact(steps: list[int]) -> None:
    x = exact(torch.tensor(steps) / 8)
    for result in (x + 0.5, x - 3, x / 2, x.sum(0), (x / 64) * (x / 64), x.abs(), x.clamp(min=0)):
        assert not result.error.any()


@given(st.lists(floats, min_size=2, max_size=8))
def test_a_sum_holds_in_every_order(values: list[float]) -> None:
    x = torch.tensor(values)
    bound = exact(x).sum(0)
    for order in (x, x.flip(0), x.sort().values, x[x.abs().argsort()]):
        total = torch.zeros(())
        for value in order:
            total = total + value
        assert held(total, bound)


def test_a_sum_whose_partial_sums_do_not_fit_is_not_exact() -> None:
    x = torch.tensor([2.0**25, 1.0, -(2.0**25)])
    assert [((x[0] + x[1]) + x[2]).item(), ((x[0] + x[2]) + x[1]).item()] == [0, 1]
    assert held(torch.tensor(0.0), exact(x).sum(0))


def test_bounds_are_a_few_units() -> None:
    x = exact(torch.tensor([0.1, 0.7, 3.3]))
    for result, units in (
        (x / 3, 1),
        (x * x, 1),
        (x.sum(0), 3),
        (x.exp(), 2 + 3.4),
        (x.log(), 2),
        (x.sigmoid(), 5),
        (x.sqrt(), 2),
    ):
        assert (result.error <= units * UNIT * result.value.abs().clamp(min=x.value.abs().amin())).all()


def test_exponentials_may_be_taken_in_base_two() -> None:
    x = torch.linspace(-80, 80, 4001)
    in_base_two = (x.double() * math.log2(math.e)).float()
    assert held(in_base_two.exp2(), exact(x).exp())
    assert held(1 / (1 + (-in_base_two).exp2()), exact(x).sigmoid())


# ---------------------------------------------------------------------------------------------- the ends of the range
def test_overflow_is_certain_or_unknown() -> None:
    result = exact(torch.tensor([60.0, 200.0])).exp()
    assert result.value.isinf().tolist() == [False, True]
    assert result.error[0] < result.value[0] * (60 + 4) * UNIT
    assert result.error[1] == 0
    largest = torch.tensor([torch.finfo(torch.float32).max]).double()
    assert (Bounded(largest, largest / 1000, result.precision) * 1).error.item() == math.inf


def test_underflow_may_be_flushed_or_kept() -> None:
    x = torch.tensor([1e-30, 1e-20, 1e-30])
    result = exact(x) * exact(torch.tensor([1e-10, 1e-20, 1e-30]))
    assert held(torch.zeros(3), result)
    assert held(x * torch.tensor([1e-10, 1e-20, 1e-30]), result)
    assert result.error[2] == result.value[2] * (1 + UNIT)  # zero for certain, for it rounds to that


def test_saturated_probabilities_are_exact_and_their_logarithms_clamped() -> None:
    one: Any
    zero: Any
    one, zero = (torch.sigmoid(exact(torch.tensor([x]))) for x in (200.0, -200.0))
    assert (one.value.item(), one.error.item()) == (1, 0)
    probabilities: list[Any] = [torch.sqrt(one * one), torch.sqrt(zero * zero)]
    for p in probabilities:
        for log in (log_at_least(p, -100.0), log_at_least(-p, -100.0, torch.log1p)):
            assert log.value.item() == pytest.approx(-100 if log.value.item() < -50 else 0, abs=UNIT)
            assert log.error.item() <= UNIT


@pytest.mark.parametrize("p", [0.0, 1e-44, 1e-40, 1e-30, 0.5, 1 - 2**-24, 1.0])
def test_clamped_logarithms_hold(p: float) -> None:
    value = torch.tensor([p])
    for spread in (0.0, 1e-30, 1e-6):
        bounded = Bounded(value.double(), torch.tensor([spread]).double(), Precision.of(torch.float32))
        ends = [(value + s).clamp(0, 1) for s in (-0.9 * spread, 0.0, 0.9 * spread)]
        assert all(held(torch.log(e).clamp(min=-100), log_at_least(bounded, -100.0)) for e in ends)
        assert all(held(torch.log1p(-e).clamp(min=-100), log_at_least(-bounded, -100.0, torch.log1p)) for e in ends)


def test_a_logarithm_of_a_quotient_may_be_a_difference_of_logarithms() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2000, generator=generator) * 600 + 1e-3 for _ in range(2))
    b[:1000] = a[:1000] * (1 + 1e-6 * b[:1000])  # nearly the same: all of the logarithms cancels
    bounded = log_ratio(exact(a), exact(b))
    assert held(torch.log(a / b), bounded)
    assert held(torch.log(a) - torch.log(b), bounded)
    quotient: Any = exact(a) / exact(b)
    assert not held(torch.log(a) - torch.log(b), quotient.log())
    assert float(bounded.error.max()) < 40 * UNIT


@pytest.mark.parametrize(("a", "b", "value"), [(0.0, 2.0, -math.inf), (2.0, 0.0, math.inf), (-1.0, 2.0, math.nan)])
def test_logarithms_of_what_has_no_size_are_certain(a: float, b: float, value: float) -> None:
    ratio = log_ratio(exact(torch.tensor([a])), exact(torch.tensor([b])))
    torch.testing.assert_close(ratio.value, torch.tensor([value]).double(), equal_nan=True)
    assert ratio.error.item() == 0


CARRIED: Any = Bounded(torch.tensor([3.0]).double(), torch.tensor([0.5]).double(), Precision.of(torch.float32))
NAN, INFINITE, ZERO = (torch.tensor([x]) for x in (math.nan, math.inf, 0.0))


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x(ZERO) / x(ZERO),
        lambda x: x(NAN) + CARRIED,
        lambda x: CARRIED * x(NAN),
        lambda x: CARRIED / x(NAN),
        lambda x: x(NAN).exp().sqrt().clamp(min=0.1),
        lambda x: torch.maximum(x(NAN), CARRIED),
        lambda x: torch.cat([x(NAN), CARRIED]).sum(0),
        lambda x: torch.cat([x(NAN), CARRIED]).amax(0),
    ],
)
def test_a_nan_of_what_is_known_is_certain(formula: Callable[..., Any]) -> None:
    found = formula(exact)
    assert found.value.isnan().all()
    assert not found.error.any()


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x(INFINITE) * 0 + x(ZERO),  # in a wider arithmetic it may be a number
        lambda x: x(INFINITE) - x(INFINITE),
        lambda x: torch.softmax(torch.cat([x(INFINITE), CARRIED]), 0)[0],
        lambda x: (CARRIED - 3) / x(ZERO),
        lambda x: (CARRIED - 3) * x(INFINITE),
        lambda x: x(ZERO) * Bounded(INFINITE.double(), INFINITE.double(), CARRIED.precision),
        lambda x: torch.sqrt(CARRIED - 3.25),
        lambda x: torch.cat([x(ZERO), CARRIED - 3.25]).sqrt().sum(0),
    ],
)
def test_a_nan_of_what_carries_an_error_or_may_overflow_is_unknown(formula: Callable[..., Any]) -> None:
    found = formula(exact)
    assert found.value.isnan().all()
    assert found.error.isinf().all()
    assert (found > 1).ambiguous.all()


def test_numbers_that_the_precision_does_not_hold_carry_a_rounding() -> None:
    x = exact(torch.tensor(0.15625))
    assert (0.1 * x).error > 0  # 0.015625 in float64, by luck
    assert [(number * x).error.item() for number in (0.5, 3, 0.25)] == [0, 0, 0]
    nearest = torch.tensor([0.1])
    assert (exact(nearest) > 0.1).ambiguous.all()  # it is 0.1 in float32, and more in float64
    assert not (exact(nearest) > 0.5).ambiguous.any()
    assert not (exact(torch.tensor([64.0])) + 1e-16).error.any()  # lost, so that nothing is rounded
    assert held(torch.tensor([3.0]) / 0.3, exact(torch.tensor([3.0])) / 0.3)


def test_an_ambiguous_choice_covers_both_branches() -> None:
    decision: Any = Decision(torch.tensor([True, True]), torch.tensor([0.5, 2.0]).double())
    chosen: Any = torch.where(decision, exact(torch.tensor([1.0, 1.0])), exact(torch.tensor([4.0, 4.0])))
    assert (chosen.value.tolist(), chosen.error.tolist()) == ([1, 1], [3, 0])
    assert known(decision).tolist() == [True, True]


def test_a_known_range_never_hides_a_value_outside() -> None:
    far = Bounded(torch.tensor([0.25, 2.0]).double(), torch.tensor([9.0, 9.0]).double(), Precision.of(torch.float32))
    assert known_range(far, 0.0, 1.0).error.tolist() == [0.75, 9.0]


def test_a_function_without_a_rule_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no error rule for torch function 'erf'"):
        torch.erf(exact(torch.ones(1)))
    with pytest.raises(AttributeError, match="no rule for 'cosh'"):
        exact(torch.ones(1)).cosh()


def test_a_result_in_few_bits_may_be_exact_by_luck() -> None:
    def errors() -> list[bool]:
        x = exact(torch.tensor([1.0, 2.0, 3.0]))
        return [bool((y.error > 0).any()) for y in (x + 2, x * 3, x.sum(), x * 0)]

    assert errors() == [False, False, False, False]
    with nothing_by_luck():
        assert errors() == [True, True, True, False]
    with pytest.raises(ZeroDivisionError), nothing_by_luck():
        raise ZeroDivisionError
    assert errors() == [False, False, False, False]
