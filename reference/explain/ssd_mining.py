"""Margins of SSD's hard-negative mining: the ranking by confidence loss, underflow included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import ssd
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.explain.explanation import Count, Explanation, World
from detoracle.reference.rounding import Bounded

__all__ = ["Ranking", "explain_hard_negatives", "explain_log_sum_exp"]


def explain_log_sum_exp(conf: Tensor, *, dtype: torch.dtype = torch.float32) -> Bounded:
    """Explain `ssd.log_sum_exp`: rows that underflow in `dtype` whatever the rounding are -inf for certain.

    Returns
    -------
    Bounded
        (B, P).

    Examples
    --------
    >>> explain_log_sum_exp(torch.tensor([[[500.0, 0, 0], [1, 2, 3]]])).value.tolist()
    [[500.0, -inf]]
    """
    result: Any = ssd._log_sum_exp(Bounded.exact(conf, dtype))
    distance = conf.double().amax(-1) - conf.double().amax()
    half_the_smallest = math.log(result.precision.smallest) + math.log(result.precision.unit)
    vanished = (distance < half_the_smallest - 1) & ~result.value.isnan()
    value, error = result.value.masked_fill(vanished, -math.inf), result.error.masked_fill(vanished, 0.0)
    return Bounded(value, error, result.precision)


def explain_hard_negatives(
    conf: Tensor, gt_index: Tensor, gt_labels: Tensor, *, neg_pos: int = 3, dtype: torch.dtype = torch.float32
) -> Explanation:
    """Explain `ssd.hard_negatives`: same arguments, and the dtype whose rounding is to be allowed for.

    Returns
    -------
    Explanation

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> conf = torch.tensor([[[0.0, 9], [0, 5], [0, 5], [5, 0]]])
    >>> positive, label = torch.tensor([[0, -1, -1, -1]]), torch.tensor([[0]])
    >>> explain_hard_negatives(conf, positive, label, neg_pos=1).ambiguous.tolist()
    [[False, True, True, False]]
    """
    class_target = ssd._class_of(gt_index, gt_labels)
    ssd._check_class_target(class_target, conf.shape[-1], where="ssd.hard_negatives")
    matched = torch.where(class_target > 0, gt_index.long(), BACKGROUND)
    ranking = Ranking.of(conf, dtype)
    worlds = tuple((ranking.negatives(image, row, neg_pos),) for image, row in enumerate(matched))
    return Explanation(worlds, lambda chosen: torch.where(chosen == BACKGROUND, ranking.loss, 0.0))  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Mining loss (B, P) of every prior as background, and the range it has in the dtype explained.

    Attributes
    ----------
    loss : Bounded
        As the oracle states it, NaN included.
    value, lower, upper : Tensor float64
        By which priors are ranked; NaN is infinite, for it ranks first.
    """

    loss: Bounded
    value: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, conf: Tensor, dtype: torch.dtype) -> Ranking:
        """Rank by the logits of a batch."""
        background = torch.zeros(conf.shape[:2], dtype=torch.int64, device=conf.device)
        log_sum_exp: Any = explain_log_sum_exp(conf, dtype=dtype)
        bounded = Bounded.exact(conf, dtype)
        loss: Any = ssd._mining_loss(log_sum_exp, bounded, background)
        value, lower, upper = (
            t.masked_fill(loss.value.isnan(), math.inf) for t in (loss.value, loss.lower, loss.upper)
        )
        # Where exponentials are subnormal they may vanish, but none grows by more than the smallest number.
        exact, precision = conf.double(), loss.precision
        largest = exact.amax()
        added = conf.shape[-1] * 2 * precision.unit * precision.smallest
        ceiling = torch.log(torch.exp(exact - largest).sum(-1) + added) + largest - exact[..., 0]
        slack = 16 * precision.unit * (largest.abs() + exact.abs().amax(-1))
        return cls(loss, value, lower, torch.where(loss.error.isinf() & ~loss.value.isnan(), ceiling + slack, upper))

    def negatives(self, image: int, matched: Tensor, neg_pos: int) -> World:
        """Hard negatives of one image, given the ground truth (P,) of each prior."""
        positive = matched >= 0
        value, lower, upper = (t[image].masked_fill(positive, 0.0) for t in (self.value, self.lower, self.upper))
        count = len(value)
        number = int(ssd._num_negatives(positive[None], neg_pos))
        order = value.argsort(descending=True, stable=True)
        chosen = torch.zeros_like(positive).index_fill(0, order[:number], True)
        above_for_certain = count - torch.searchsorted(lower.sort().values, upper, right=True)
        perhaps_above = count - torch.searchsorted(upper.sort().values, lower, right=False) - 1
        possible, definite = above_for_certain < number, perhaps_above < number
        open_ = possible & ~definite
        certain, free = int(definite.sum()), (open_ & ~positive).nonzero().flatten()
        low = number - certain - int((open_ & positive).sum())
        return World(
            torch.where(positive, matched, torch.where(chosen, BACKGROUND, IGNORED)),
            self._margin(value, lower, upper, order, number).masked_fill(positive, math.inf),
            dict.fromkeys(free.tolist(), frozenset([BACKGROUND, IGNORED])),
            (Count(BACKGROUND, free, low, number - certain, IGNORED),) if len(free) else (),
        )

    @staticmethod
    def _margin(value: Tensor, lower: Tensor, upper: Tensor, order: Tensor, number: int) -> Tensor:
        """Distance of every prior to the other side of the cut, in units of the errors of both."""
        if not 0 < number < len(order):
            return torch.full_like(value, math.inf)
        last_in, first_out = order[number - 1], order[number]
        inside = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:number], True)
        gap = torch.where(inside, value - value[first_out], value[last_in] - value)
        error = torch.where(
            inside, value - lower + upper[first_out] - value[first_out], value[last_in] - lower[last_in] + upper - value
        )
        return torch.where(gap > 0, gap / error, 0.0).nan_to_num(nan=0.0, posinf=math.inf)
