"""Margins of SSD's decisions: best priors, best ground truths, the threshold, the ranking of negatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import ssd
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.explain.explanation import Count, Explanation, World
from detoracle.reference.rounding import Bounded, Precision
from detoracle.reference.ssd_boxes import VARIANCES

__all__ = [
    "explain_hard_negatives",
    "explain_log_sum_exp",
    "explain_loss",
    "explain_match",
    "explain_priors",
    "loss_given",
]

_PRIOR_ROUNDINGS = 4.0  # operations behind one coordinate of a prior


def explain_priors(*, dtype: torch.dtype = torch.float32, **settings: Any) -> Bounded:
    """Explain `ssd.priors`: the boxes, and how far computing them in `dtype` may lead.

    Returns
    -------
    Bounded
        (P, 4).

    Examples
    --------
    >>> bool(explain_priors().error.max() < 1e-6)
    True
    """
    exact = ssd.priors(**{**settings, "like": torch.zeros((), dtype=torch.float64)})
    precision = Precision.of(dtype)
    return Bounded(exact, _PRIOR_ROUNDINGS * precision.unit * exact, precision)


# ----------------------------------------------------------------------------------------------------- matching
def explain_match(
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    variances: Sequence[float] = VARIANCES,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `ssd.match`: same arguments, and the dtype whose rounding is to be allowed for.

    Returns
    -------
    Explanation
        Per image the admissible outcomes, with the margins of the decisions behind them. A ground truth that several
        priors fit alike, such as one smaller than the smallest prior, may get any one of them.

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    >>> gt, label = torch.tensor([[[0.3, 0.3, 0.7, 0.7]]]), torch.tensor([[0]])
    >>> explain_match(boxes, gt, label, torch.ones(1, 1, dtype=torch.bool)).ambiguous.tolist()
    [[True, True]]
    """
    bounded = [Bounded.exact(priors, dtype), Bounded.exact(gt_boxes, dtype)]
    limit = float(torch.tensor(threshold, dtype=dtype))
    overlaps, worlds = [], []
    for image, valid in enumerate(gt_valid):
        ssd._require_ground_truth(valid, where=f"ssd.match, image {image}")
        overlap: Any = ssd._overlap(bounded[0], bounded[1][image])  # type: ignore[arg-type]
        names = torch.where(gt_labels[image] >= 0, torch.arange(len(valid), device=valid.device), BACKGROUND)
        overlaps.append(overlap)
        worlds.append((_matching(overlap[valid], limit, names[valid]),))
    stacked: Any = torch.stack(overlaps)
    return Explanation(tuple(worlds), lambda gt_index: _quality(stacked, gt_index))


def _quality(overlaps: Bounded, gt_index: Tensor) -> Any:
    """Overlap (B, P) that an assignment implies."""
    matched: Any = overlaps.gather(1, gt_index.clamp(min=0)[:, None])[:, 0]
    return torch.where(gt_index >= 0, matched, 0.0)


@dataclass(frozen=True, eq=False)
class _Matching(World):
    """One image's matching, whose ambiguous anchors obey one more rule: every ground truth gets one best prior.

    Attributes
    ----------
    names : tuple of int
        Outcome of a prior that the ground truth in that place takes: its index, or background for class -1.
    best_priors : tuple of tuple of int
        Priors that could be the best one of each ground truth, the float64 one first.
    unforced : Tensor (P,) int64
        The float64 outcome of each prior if it were no ground truth's best.
    unforced_choices : dict of int to frozenset of int
        Its admissible outcomes then, where there are several.
    """

    names: tuple[int, ...] = ()
    best_priors: tuple[tuple[int, ...], ...] = ()
    unforced: Tensor = torch.empty(0)
    unforced_choices: dict[int, frozenset[int]] = None  # type: ignore[assignment]
