"""Claims: every ground truth takes its best candidates, and what rounding leaves open of that and of the conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND
from detoracle.reference.explain.explanation import Count, World, background_world
from detoracle.reference.rounding import Bounded

__all__ = ["Claims", "claim_decisions", "claims_world"]


@dataclass(frozen=True, eq=False)
class Claims:
    """Which ground truth claims which candidate, (G, N), and what rounding leaves open."""

    claimed: Tensor
    definite: Tensor
    possible: Tensor
    margin: Tensor
    fewest: Tensor
    most: Tensor


def claim_decisions(cost: Bounded, fewest: Tensor, most: Tensor, k_margin: Tensor, k: Tensor) -> Claims:
    """Every ground truth (row) claims its k cheapest candidates: what is certain, what is possible.

    Parameters
    ----------
    cost : Bounded (G, N)
        Smaller is better; inf for what cannot be claimed before everything else is.
    fewest, most, k : Tensor (G,) int64
        Range of numbers of claims that rounding leaves open, and the float64 number.
    k_margin : Tensor (G,) float64
        Margin of that number.

    Returns
    -------
    Claims
        Of (G, N) masks and margins.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.int64)
    >>> tied = Bounded.exact(torch.tensor([[2.0, 1.0, 1.0]]), torch.float32)
    >>> claim_decisions(tied, one, one, one.double() * 9, one).possible.tolist()
    [[False, True, True]]
    """
    cost = _without_nan(cost, math.inf)
    count = cost.shape[1]
    order = torch.argsort(cost.value, dim=1, stable=True)
    rank = torch.argsort(order, dim=1)
    claimed = rank < k[:, None]
    lower, upper = cost.lower, cost.upper
    may_precede = torch.searchsorted(lower.sort(dim=1).values, upper.contiguous(), right=True) - 1
    must_precede = torch.searchsorted(upper.sort(dim=1).values, lower.contiguous(), right=False)
    definite = may_precede < fewest[:, None]
    possible = must_precede < most[:, None]

    ranked = cost.value.gather(1, order)
    ranked_error = cost.error.gather(1, order)
    last_in = (k - 1).clamp(0, count - 1)[:, None]
    first_out = k.clamp(0, count - 1)[:, None]
    rival = torch.where(claimed, ranked.gather(1, first_out), ranked.gather(1, last_in))
    rival_error = torch.where(claimed, ranked_error.gather(1, first_out), ranked_error.gather(1, last_in))
    gap = (rival - cost.value).abs().nan_to_num(nan=0.0, posinf=math.inf)
    margin = torch.where((k >= count)[:, None], math.inf, gap / (rival_error + cost.error)).nan_to_num(
        nan=0.0, posinf=math.inf
    )
    at_the_edge = (rank == last_in) | (rank == k[:, None])
    margin = torch.where(at_the_edge, torch.minimum(margin, k_margin[:, None]), margin)
    return Claims(claimed, definite & possible, possible, margin, fewest, most)


def claims_world(
    claims: Claims, preference: Bounded, columns: Tensor, num_anchors: int, ground_truths: Tensor
) -> World:
    """Resolve conflicts: an anchor claimed more than once goes to the ground truth with the smallest preference.

    Parameters
    ----------
    claims : Claims (G, N)
    preference : Bounded (G, N)
        Compared over *all* ground truths of a column, first one on ties.
    columns : Tensor (N,) int64
        Anchor of each column.
    num_anchors : int
        A.
    ground_truths : Tensor (G,) int64
        Index of each row among the image's padded ground truths.

    Returns
    -------
    World

    Examples
    --------
    >>> one = torch.ones(2, dtype=torch.int64)
    >>> cost = Bounded.exact(torch.tensor([[2.0, 5.0], [1.0, 5.5]]), torch.float32)
    >>> claims = claim_decisions(cost, one, one, one.double() * 9, one)
    >>> claims_world(claims, cost, torch.tensor([0, 3]), 4, torch.tensor([0, 1])).gt_index.tolist()
    [1, -1, -1, -1]
    """
    num_gts, count = claims.claimed.shape
    device = columns.device
    world = background_world(num_anchors, device)
    if not num_gts or not count:
        return world
    name = ground_truths.tolist()
    preference = _without_nan(preference, -math.inf)
    claimants = claims.claimed.sum(0)
    best = preference.value.argmin(0)
    lone = claims.claimed.int().argmax(0)
    winner = torch.where(claimants == 1, lone, best)
    outcome = torch.where(claimants == 0, BACKGROUND, ground_truths[winner])
    tied = preference.lower <= preference.upper.amin(0)
    tied[best, torch.arange(count, device=device)] = True

    maybe = claims.possible & ~claims.definite
    num_definite, num_maybe = claims.definite.sum(0), maybe.sum(0)
    open_ = (num_maybe > 0) | ((num_definite > 1) & (tied.sum(0) > 1))
    outcomes = {
        int(columns[n]): _outcomes(claims.definite[:, n], maybe[:, n], tied[:, n], name)
        for n in open_.nonzero().flatten().tolist()
    }
    choices = {anchor: admissible for anchor, admissible in outcomes.items() if len(admissible) > 1}
    counts = []
    sole = maybe & (num_maybe == 1) & (num_definite == 0)
    for g in maybe.any(1).nonzero().flatten().tolist():
        certain, elsewhere = int(claims.definite[g].sum()), int((maybe[g] & ~sole[g]).sum())
        low, high = int(claims.fewest[g]) - certain - elsewhere, int(claims.most[g]) - certain
        counts.append(Count(name[g], columns[sole[g]], low, high))

    gap = torch.where(claimants > 1, _conflict_margin(preference), math.inf)
    margin = torch.minimum(claims.margin.amin(0), gap)
    world.gt_index[columns] = outcome
    world.margin[columns] = margin
    return World(world.gt_index, world.margin, choices, tuple(counts))


def _without_nan(x: Bounded, replacement: float) -> Bounded:
    missing = x.value.isnan()
    return Bounded(x.value.masked_fill(missing, replacement), x.error.masked_fill(missing, 0.0), x.precision)


def _outcomes(definite: Tensor, maybe: Tensor, tied: Tensor, name: Sequence[int]) -> frozenset[int]:
    """All outcomes of one anchor over the ways in which its possible claims can fall."""
    certain, open_, conflict = (
        [name[row] for row in mask.nonzero().flatten().tolist()] for mask in (definite, maybe, tied)
    )
    if len(certain) + len(open_) < 2:
        conflict = []
    if len(certain) > 1:
        return frozenset(conflict)
    alone = certain or [BACKGROUND, *open_]
    return frozenset([*alone, *conflict])


def _conflict_margin(preference: Bounded) -> Tensor:
    """Gap between the best and the second-best ground truth of each column, over its error."""
    if preference.shape[0] < 2:
        return torch.full(preference.shape[1:], math.inf, dtype=torch.float64, device=preference.device)
    two, index = preference.value.topk(2, dim=0, largest=False)
    error = preference.error.gather(0, index).sum(0)
    gap = (two[1] - two[0]).nan_to_num(nan=0.0, posinf=math.inf)
    return torch.where(error > 0, gap / error, torch.where(gap > 0, math.inf, 0.0))
