"""Worlds against brute force: every way tiny matrices can be rounded is admitted, and impossible ones are not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detoracle.reference.explain.claims import claim_decisions, claims_world
from detoracle.reference.explain.explanation import (
    Count,
    Explanation,
    World,
    background_world,
    combinations_of,
    worlds_of,
)
from detoracle.reference.rounding import Bounded, Decision, Precision

Rows = list[list[tuple[int, int]]]
FLOAT32 = Precision.of(torch.float32)


def matrices(gts: int, anchors: int) -> st.SearchStrategy[Rows]:
    """Costs, small whole numbers so that many tie, and their errors."""
    cell = st.tuples(st.integers(0, 4), st.integers(0, 1))
    return st.lists(st.lists(cell, min_size=anchors, max_size=anchors), min_size=gts, max_size=gts)


def bounded(rows: Rows) -> Bounded:
    cells = torch.tensor(rows, dtype=torch.float64)
    return Bounded(cells[..., 0], cells[..., 1], FLOAT32)


def world_of(rows: Rows, ks: list[tuple[int, int]]) -> World:
    """World of costs whose numbers of claims lie in ranges; the float64 number is the lower one."""
    fewest, most = (torch.tensor([k[i] for k in ks]) for i in (0, 1))
    margin = torch.where(fewest == most, math.inf, 0.5).double()
    cost = bounded(rows)
    claims = claim_decisions(cost, fewest, most, margin, fewest)
    return claims_world(claims, cost, torch.arange(len(rows[0])), len(rows[0]), torch.arange(len(rows)))


def outcomes_by_force(rows: Rows, ks: list[tuple[int, int]]) -> set[tuple[int, ...]]:
    """Outcomes of every rounding of the costs, every order of tied ones, and every number of claims."""
    anchors, gts = range(len(rows[0])), range(len(rows))
    cells = [[(v - e, v, v + e) if e else (v,) for v, e in row] for row in rows]
    found = set()
    for flat in itertools.product(*itertools.chain(*cells)):
        cost = [flat[g * len(anchors) : (g + 1) * len(anchors)] for g in gts]
        for order in itertools.permutations(anchors):
            for number in itertools.product(*(range(low, high + 1) for low, high in ks)):
                claims = [sorted(order, key=row.__getitem__)[:k] for row, k in zip(cost, number, strict=True)]
                outcome = []
                for a in anchors:
                    claimants = [g for g in gts if a in claims[g]]
                    cheapest = min(gts, key=lambda g: cost[g][a])
                    outcome.append(cheapest if len(claimants) > 1 else claimants[0] if claimants else -1)
                found.add(tuple(outcome))
    return found


def admitted(world: World, gts: int, anchors: int) -> set[tuple[int, ...]]:
    every = itertools.product(range(-1, gts), repeat=anchors)
    return {outcome for outcome in every if not world.wrong(torch.tensor(outcome)).any()}


ranges = st.tuples(st.integers(1, 3), st.integers(0, 1)).map(lambda k: (k[0], min(k[0] + k[1], 3)))


@settings(max_examples=60)
@given(matrices(1, 3), st.lists(ranges, min_size=1, max_size=1))
def test_one_ground_truth(rows: Rows, ks: list[tuple[int, int]]) -> None:
    possible, found = outcomes_by_force(rows, ks), admitted(world_of(rows, ks), 1, 3)
    assert possible <= found
    for anchor in range(3):  # nothing is admitted that no rounding gives
        assert {o[anchor] for o in possible} == {o[anchor] for o in found}
    if not any(error for row in rows for _, error in row):
        assert possible == found


@settings(max_examples=40)
@given(matrices(2, 3), st.lists(ranges, min_size=2, max_size=2))
def test_two_ground_truths(rows: Rows, ks: list[tuple[int, int]]) -> None:
    world = world_of(rows, ks)
    assert outcomes_by_force(rows, ks) <= admitted(world, 2, 3)


@settings(max_examples=40)
@given(matrices(2, 3), st.lists(ranges, min_size=2, max_size=2))
def test_enumerated_outcomes_are_the_admitted_ones(rows: Rows, ks: list[tuple[int, int]]) -> None:
    world = world_of(rows, ks)
    listed = [tuple(o.tolist()) for o in world.outcomes()]
    assert listed[0] == tuple(world.gt_index.tolist())
    assert len(listed) == len(set(listed))
    assert set(listed) == admitted(world, 2, 3)


def test_clear_costs_leave_one_outcome() -> None:
    world = world_of([[(0, 0), (2, 0), (4, 0)], [(3, 0), (1, 0), (4, 0)]], [(1, 1), (2, 2)])
    assert admitted(world, 2, 3) == {(0, 1, -1)}
    assert world.choices == {}


def test_margins_are_gaps_in_units_of_the_error() -> None:
    cost = Bounded(torch.tensor([[1.0, 4.0]]).double(), torch.tensor([[0.5, 0.5]]).double(), FLOAT32)
    one = torch.ones(1, dtype=torch.int64)
    claims = claim_decisions(cost, one, one, torch.tensor([math.inf]).double(), one)
    assert claims.margin.tolist() == [[3.0, 3.0]]
    assert claim_decisions(cost, one, one, torch.tensor([0.25]).double(), one).margin.tolist() == [[0.25, 0.25]]


def test_nan_is_claimed_last_but_wins_a_conflict() -> None:
    cost = Bounded.exact(torch.tensor([[math.nan, 1.0], [2.0, 1.0]]), torch.float32)
    two = torch.full((2,), 2)
    claims = claim_decisions(cost, two, two, two.double() * math.inf, two)
    world = claims_world(claims, cost, torch.arange(2), 2, torch.arange(2))
    assert world.gt_index[0] == torch.tensor([math.nan, 2.0]).argmin() == 0
    one = torch.ones(2, dtype=torch.int64)
    assert claim_decisions(cost, one, one, one.double(), one).claimed.tolist() == [[False, True], [False, True]]


def test_columns_and_rows_keep_their_names() -> None:
    one = torch.ones(1, dtype=torch.int64)
    cost = Bounded.exact(torch.tensor([[2.0, 1.0]]), torch.float32)
    claims = claim_decisions(cost, one, one, one.double(), one)
    world = claims_world(claims, cost, torch.tensor([2, 5]), 7, torch.tensor([4]))
    assert world.gt_index.tolist() == [-1, -1, -1, -1, -1, 4, -1]


# ----------------------------------------------------------------------------------------------- worlds, explanations
def settled_of(decision: Decision) -> list[tuple[bool, ...]]:
    seen: list[tuple[bool, ...]] = []

    def world(settled: Tensor) -> World:
        seen.append(tuple(settled.flatten().tolist()))
        return background_world(1, settled.device)

    worlds_of(decision, world)
    return seen


@pytest.mark.parametrize("open_", range(5))
def test_up_to_four_open_decisions_fall_in_all_combinations(open_: int) -> None:
    margin = torch.tensor([0.5] * open_ + [3.0] * (6 - open_))
    seen = settled_of(Decision(torch.arange(6) % 2 == 0, margin))
    fixed = tuple((torch.arange(open_, 6) % 2 == 0).tolist())
    assert set(seen) == {(*flips, *fixed) for flips in itertools.product([False, True], repeat=open_)}
    assert len(seen) == 2**open_
    assert seen[0] == tuple((torch.arange(6) % 2 == 0).tolist())


def test_more_that_hang_on_the_same_numbers_fall_together() -> None:
    margin = torch.tensor([0.25, 0.25, 0.25, 0.5, 0.5, 0.5])
    seen = settled_of(Decision(torch.ones(6, dtype=torch.bool), margin))
    assert set(seen) == {(a,) * 3 + (b,) * 3 for a, b in itertools.product([True, False], repeat=2)}


def test_more_groups_fall_one_at_a_time() -> None:
    seen = settled_of(Decision(torch.zeros(6, dtype=torch.bool), torch.arange(6) / 10))
    assert [sum(s) for s in seen] == [0, 1, 1, 1, 1, 1, 1]


def explanation_of(*images: list[World]) -> Explanation:
    return Explanation(tuple(map(tuple, images)), lambda gt_index: Bounded.exact(gt_index.double(), torch.float32))


def plain(outcome: list[int], **more: Any) -> World:
    return World(torch.tensor(outcome), torch.full((len(outcome),), math.inf).double(), **more)


def test_one_world_must_admit_the_whole_image() -> None:
    explanation = explanation_of([plain([0, -1]), plain([-1, 0])], [plain([1, 1])])
    assert explanation.gt_index.tolist() == [[0, -1], [1, 1]]
    assert explanation.ambiguous.tolist() == [[True, True], [False, False]]
    assert not explanation.wrong(torch.tensor([[-1, 0], [1, 1]])).any()
    assert explanation.wrong(torch.tensor([[0, 0], [1, 1]])).sum() == 1
    assert explanation.wrong(torch.tensor([[0, -1], [0, 1]])).tolist() == [[False, False], [True, False]]


def test_alternatives_are_limited_and_begin_with_the_float64_one() -> None:
    explanation = explanation_of([plain([0, -1]), plain([-1, 0])], [plain([1, 1]), plain([0, 1])])
    found = [a.tolist() for a in explanation.alternatives(9)]
    assert found[0] == [[0, -1], [1, 1]]
    assert len(found) == 4
    assert len(list(explanation.alternatives(3))) == 3


def test_no_alternative_comes_twice() -> None:
    explanation = explanation_of([plain([0, -1]), plain([0, -1]), plain([-1, 0])])
    assert [a.tolist() for a in explanation.alternatives(2)] == [[[0, -1]], [[-1, 0]]]


def test_counts_bind_anchors_together() -> None:
    choices = dict.fromkeys(range(3), frozenset([-1, 5]))
    world = plain([5, -1, -1], choices=choices, counts=(Count(5, torch.arange(3), 1, 1),))
    assert {tuple(o.tolist()) for o in world.outcomes()} == {(5, -1, -1), (-1, 5, -1), (-1, -1, 5)}
    assert world.wrong(torch.tensor([5, 5, -1])).all()
    assert world.wrong(torch.tensor([-1, -1, -1])).all()


def test_combinations_store_nothing() -> None:
    def endless() -> Iterator[Tensor]:
        return (torch.tensor(n) for n in itertools.count())

    first = itertools.islice(combinations_of([lambda: iter([torch.tensor(7)]), endless]), 3)
    assert [[int(x) for x in pair] for pair in first] == [[7, 0], [7, 1], [7, 2]]
    assert list(combinations_of([lambda: iter([])])) == []
    assert list(combinations_of([])) == [()]
