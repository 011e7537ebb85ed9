"""Margins of SSD's matching: the threshold, best ground truths, best priors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import ssd
from detoracle.reference.assignment import BACKGROUND
from detoracle.reference.explain.explanation import Explanation, World
from detoracle.reference.rounding import Bounded
from detoracle.reference.ssd_boxes import VARIANCES, _encode

__all__ = ["explain_match"]


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
    exact_priors, exact_boxes = Bounded.exact(priors, dtype), Bounded.exact(gt_boxes, dtype)
    overlaps, worlds = [], []
    for image, valid in enumerate(gt_valid):
        ssd._require_ground_truth(valid, where=f"ssd.match, image {image}")
        overlap: Any = ssd._overlap(exact_priors, exact_boxes[image])
        names = torch.where(gt_labels[image] >= 0, torch.arange(len(valid), device=valid.device), BACKGROUND)
        overlaps.append(overlap)
        worlds.append((_matching(overlap[valid], threshold, names[valid]),))
    stacked: Any = torch.stack(overlaps)
    return Explanation(
        tuple(worlds),
        lambda gt_index: _quality(stacked, gt_index),
        lambda gt_index: _targets(gt_index, exact_priors, exact_boxes, gt_labels, variances),
    )


def _quality(overlaps: Bounded, gt_index: Tensor) -> Any:
    """Overlap (B, P) that an assignment implies."""
    matched: Any = overlaps.gather(1, gt_index.clamp(min=0)[:, None])[:, 0]
    return torch.where(gt_index >= 0, matched, 0.0)


def _targets(
    gt_index: Tensor, priors: Any, gt_boxes: Any, gt_labels: Tensor, variances: Sequence[Any]
) -> dict[str, Any]:
    """Box and class targets that an assignment implies."""
    image = torch.arange(len(gt_index), device=gt_index.device)[:, None]
    offsets: Any = _encode(gt_boxes[image, gt_index.clamp(min=0)], priors, variances)
    targets = {"loc_target": torch.where((gt_index >= 0)[..., None], offsets, 0.0)}
    if int(gt_labels.min()) >= BACKGROUND:  # a lesser label's target is no class, but depends on who matched it
        targets["class_target"] = ssd._class_of(gt_index, gt_labels)
    return targets


@dataclass(frozen=True, eq=False, kw_only=True)
class _Matching(World):
    """One image's matching: beside the choices of each prior, every ground truth must get one best prior.

    Attributes
    ----------
    unforced : World
        The matching if no ground truth were given its best prior.
    names : list of int
        Per ground truth, the outcome of a prior that it takes: its index, or background for class -1.
    best_priors : list of list of int
        Per ground truth, the priors that could be its best one, the float64 one first.
    """

    unforced: World
    names: list[int]
    best_priors: list[list[int]]

    def wrong(self, gt_index: Tensor) -> Tensor:
        wrong = super().wrong(gt_index)
        given, unforced = gt_index.tolist(), self.unforced.gt_index.tolist()
        taken: set[int] = set()  # by this ground truth or a later one
        for name, priors in reversed(list(zip(self.names, self.best_priors, strict=True))):
            own = [prior for prior in priors if given[prior] == name]
            taken.update(own)
            if taken.isdisjoint(priors):
                wrong[priors] = True
            forced = [p for p in own if name not in self.unforced.choices.get(p, {unforced[p]})]
            if name >= 0 and len(forced) > 1:
                wrong[forced] = True
        return wrong

    def outcomes(self) -> Iterator[Tensor]:
        for picks in itertools.product(*self.best_priors):
            for outcome in self.unforced.outcomes():
                for name, prior in zip(self.names, picks, strict=True):
                    outcome[prior] = name
                yield outcome


def _matching(overlap: Bounded, threshold: float, names: Tensor) -> World:
    """Matching of one image from its overlaps (G, P); a NaN counts as largest, and as not below the threshold."""
    missing = overlap.value.isnan()
    value, error = overlap.value.masked_fill(missing, math.inf), overlap.error.masked_fill(missing, math.inf)
    lower, upper = (value - error).nan_to_num(nan=-math.inf), value + error
    best_prior, best_gt = value.argmax(1), value.argmax(0)
    as_best_prior = (upper >= lower.amax(1, keepdim=True)).scatter(1, best_prior[:, None], True)
    as_best_gt = (upper >= lower.amax(0)).scatter(0, best_gt[None], True)

    best = value.amax(0)
    unforced = torch.where(best < threshold, BACKGROUND, names[best_gt])
    near_threshold = (best - threshold).abs() / error.gather(0, best_gt[None])[0]
    rival = torch.where(best < threshold, math.inf, _lead(value, error, 0).gather(0, best_gt[None])[0])
    margin = torch.minimum(near_threshold.nan_to_num(nan=0.0, posinf=math.inf), rival)
    may_take = as_best_gt & (upper >= threshold)
    may_leave = lower.amax(0) < threshold
    label = names.tolist()
    unforced_choices = {}
    for prior in (may_take.sum(0) + may_leave > 1).nonzero().flatten().tolist():
        options = frozenset(label[g] for g in may_take[:, prior].nonzero().flatten().tolist())
        unforced_choices[prior] = options | {BACKGROUND} if may_leave[prior] else options

    gt_index = unforced.clone()
    for name, prior in zip(label, best_prior.tolist(), strict=True):
        gt_index[prior] = name
    margin = margin.index_fill(0, best_prior, math.inf)
    best_priors = [
        [first, *(prior for prior in mask.nonzero().flatten().tolist() if prior != first)]
        for first, mask in zip(best_prior.tolist(), as_best_prior, strict=True)
    ]
    sure, choices = _forced_choices(best_priors, label, unforced, unforced_choices)
    open_unforced = {prior: options for prior, options in unforced_choices.items() if prior not in sure}
    return _Matching(
        gt_index,
        torch.minimum(margin, _lead(value, error, 1).amin(0)),
        choices,
        unforced=World(unforced, margin, open_unforced),
        names=label,
        best_priors=best_priors,
    )


def _forced_choices(
    best_priors: Sequence[Sequence[int]],
    names: Sequence[int],
    unforced: Tensor,
    unforced_choices: dict[int, frozenset[int]],
) -> tuple[set[int], dict[int, frozenset[int]]]:
    """Priors that are certain to be forced, and the outcomes of all priors that have more than one."""
    admissible = dict(unforced_choices)
    sure: set[int] = set()
    plain = unforced.tolist()
    for name, priors in zip(names, best_priors, strict=True):
        for prior in priors:
            if len(priors) == 1:  # the later ground truth wins
                sure.add(prior)
                admissible[prior] = frozenset([name])
            else:
                admissible[prior] = admissible.get(prior, frozenset([plain[prior]])) | {name}
    return sure, {prior: options for prior, options in admissible.items() if len(options) > 1}


def _lead(value: Tensor, error: Tensor, dim: int) -> Tensor:
    """Margin of every element to being, or no longer being, the largest along a dimension."""
    if value.shape[dim] < 2:
        return torch.full_like(value, math.inf)
    two, place = value.topk(2, dim=dim)
    two_error = error.gather(dim, place)
    is_largest = torch.zeros_like(value, dtype=torch.bool).scatter(dim, place.narrow(dim, 0, 1), True)
    other, other_error = (torch.where(is_largest, t.narrow(dim, 1, 1), t.narrow(dim, 0, 1)) for t in (two, two_error))
    gap = (other - value).abs().nan_to_num(nan=0.0, posinf=math.inf)
    return torch.where(gap > 0, gap / (error + other_error), 0.0).nan_to_num(nan=0.0, posinf=math.inf)
