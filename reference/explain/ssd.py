"""Explanations of SSD: the priors, and the assignment inside the loss, whose two halves have modules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import ssd
from detoracle.reference.explain.explanation import Explanation, World
from detoracle.reference.explain.mining import MinedWorld
from detoracle.reference.explain.ssd_boxes import explain_decode, explain_encode
from detoracle.reference.explain.ssd_matching import explain_match
from detoracle.reference.explain.ssd_mining import Ranking, explain_hard_negatives, explain_log_sum_exp
from detoracle.reference.rounding import Bounded, Precision
from detoracle.reference.ssd_boxes import VARIANCES

__all__ = [
    "explain_decode",
    "explain_encode",
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


def explain_loss(
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    neg_pos: int = 3,
    variances: Sequence[float] = VARIANCES,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain what `ssd.loss` trains: positives by their ground truth, hard negatives -1, all other priors -2.

    Returns
    -------
    Explanation
        The hard negatives are judged by the positives beside them, so that an open match leaves nothing else open.

    Raises
    ------
    UpstreamRaises
        As the oracle.

    Examples
    --------
    >>> boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5]])
    >>> gt, label, one = torch.tensor([[[0.0, 0, 0.5, 0.5]]]), torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> conf = torch.tensor([[[0.0, 1], [0, 0], [0, 1]]])
    >>> explain_loss(torch.zeros(1, 3, 4), conf, boxes, gt, label, one, neg_pos=1).gt_index.tolist()
    [[0, -2, -1]]
    """
    given = {"threshold": threshold, "variances": variances}
    matched = ssd.match(priors, gt_boxes, gt_labels, gt_valid, **given)  # type: ignore[arg-type]
    ssd._check_class_target(matched.extra["class_target"], conf.shape[-1], where="ssd.loss")
    matching = explain_match(priors, gt_boxes, gt_labels, gt_valid, **given, dtype=dtype)  # type: ignore[arg-type]
    ranking = Ranking.of(conf.detach(), dtype)
    worlds = []
    for image, (world,) in enumerate(matching.worlds):

        def negatives(row: Tensor, image: int = image) -> World:
            return ranking.negatives(image, row, neg_pos)

        worlds.append((MinedWorld.of(world, negatives),))
    return Explanation(tuple(worlds), matching.quality)


def loss_given(
    gt_index: Tensor,
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    neg_pos: int = 3,
    variances: Sequence[float] = VARIANCES,
    dtype: torch.dtype | None = torch.float32,
) -> dict[str, Bounded]:
    """Loss of a given assignment, bounded; for a choice that rounding leaves open.

    Parameters
    ----------
    gt_index : Tensor (B, P) int
        Ground truth of each positive, -1 for hard negatives, -2 for priors that take no part. The rest is as for
        `ssd.loss`.
    dtype : torch.dtype or None
        Dtype whose rounding is allowed for; None computes on the plain tensors, so that gradients flow.

    Returns
    -------
    dict of str to Bounded
        total, localisation, classification.

    Examples
    --------
    >>> boxes, gt = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]), torch.tensor([[[0.0, 0, 0.5, 0.5]]])
    >>> given = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), boxes, gt, torch.tensor([[0]]), torch.ones(1, 1).bool())
    >>> parts = loss_given(torch.tensor([[0, -1]]), *given)
    >>> bool(parts["total"].error < 1e-5)
    True
    """

    def bounded(tensor: Tensor) -> Any:
        return Bounded.exact(tensor, dtype) if dtype else tensor

    return ssd._loss(  # type: ignore[return-value]
        bounded(loc), bounded(conf), bounded(priors), bounded(gt_boxes), gt_labels, gt_index, variances
    )
