"""Dynamic k, common to YOLOX and RTMDet: how many candidates a ground truth claims, who gets the contested ones."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from detoracle.reference.explain.claims import claim_decisions, claims_world
from detoracle.reference.explain.explanation import World
from detoracle.reference.rounding import Bounded

__all__ = ["dynamic_k_world", "k_range"]


def dynamic_k_world(cost: Bounded, iou: Bounded, candidate: Tensor, valid: Tensor, *, top: int) -> World:
    """What the costs and IoUs of one image's candidates leave open.

    Parameters
    ----------
    cost, iou : Bounded (G, N)
        Of the valid ground truths and the candidates.
    candidate : Tensor (A,) bool
        Which anchors the N columns are.
    valid : Tensor (G',) bool
        Which of the padded ground truths the G rows are.
    top : int
        Largest IoUs that add up to a ground truth's number of claims.

    Returns
    -------
    World

    Examples
    --------
    >>> cost, iou = (Bounded.exact(torch.tensor([row]), torch.float32) for row in ([1.0, 1.0, 9.0], [0.7, 0.1, 0.1]))
    >>> every = torch.ones(3, dtype=torch.bool)
    >>> dynamic_k_world(cost, iou, every, every[:1], top=10).choices
    {0: frozenset({0, -1}), 1: frozenset({0, -1})}
    """
    k, fewest, most, k_margin = k_range(iou, top)
    claims = claim_decisions(cost, fewest, most, k_margin, k)
    world = claims_world(claims, cost, candidate.nonzero().flatten(), len(candidate), valid.nonzero().flatten())
    low, high = (torch.zeros_like(valid, dtype=torch.int64).masked_scatter(valid, t) for t in (fewest, most))
    return replace(world, k_range=(low, high))


def k_range(iou: Bounded, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dynamic k, the fewest and the most it can be, and the margin of the IoU sum to the next integer that matters.

    Parameters
    ----------
    iou : Bounded (G, N)
    top : int
        Largest IoUs that add up.

    Returns
    -------
    k, fewest, most : Tensor (G,) int64
    margin : Tensor (G,) float64

    Examples
    --------
    >>> k, fewest, most, _ = k_range(Bounded.exact(torch.tensor([[0.9, 0.8, 0.7]]), torch.float32) * 1.25, 10)
    >>> k.tolist(), fewest.tolist(), most.tolist()  # the sum is 3, but for the last bit
    ([2], [2], [3])
    """
    top = min(top, iou.shape[1])
    low, middle, high = (t.topk(top, dim=1).values.sum(1) for t in (iou.lower, iou.value, iou.upper))
    largest = iou.value.topk(top, dim=1).values
    summing: Tensor = Bounded(largest, torch.zeros_like(largest), iou.precision).sum(1).error
    error = torch.maximum(high - middle, middle - low) + summing
    k, fewest, most = (
        t.nan_to_num(nan=1.0).floor().clamp(min=1, max=iou.shape[1]).long()
        for t in (middle, middle - error, middle + error)
    )
    down = torch.where(k >= 2, middle - k, math.inf)
    distance = torch.minimum(down, k + 1 - middle).nan_to_num(nan=math.inf)
    return k, fewest, most, torch.where(error > 0, distance / error, math.inf)
