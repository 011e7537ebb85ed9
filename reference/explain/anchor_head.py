"""Margins of the MaxIoU assignment: ignored regions, thresholds, and the anchors that overlap a ground truth most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import anchor_head
from detoracle.reference.anchor_head import Thresholds
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.boxes import _shared_areas, overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reference.explain.anchor_head_claims import Claim, ClaimingWorld
from detoracle.reference.explain.explanation import Explanation, World
from detoracle.reference.rounding import Bounded, Decision

__all__ = ["explain_assign"]


def explain_assign(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    inside: Tensor,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    *,
    pos_iou_thr: float = 0.5,
    neg_iou_thr: float | Sequence[float] = 0.4,
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
    match_low_quality: bool = True,
    ignore_iof_thr: float = -1.0,
    ignore_wrt_candidates: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `anchor_head.assign`: same arguments, and the dtype whose rounding is to be allowed for.

    Anchors tie for certain where the same numbers make their IoUs: an implementation that takes one for a ground truth
    must take all. Others whose IoUs differ by less than their errors may tie or not. An anchor that may lie in an
    ignored region or not has an IoU anywhere between -1 and its own.

    Returns
    -------
    Explanation

    Raises
    ------
    InputError
        As the oracle.

    Examples
    --------
    >>> boxes = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [0, 2, 8, 8]])
    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> explain_assign(boxes, boxes[None, :1], one, one.expand(1, 3)).gt_index.tolist()
    [[0, -1, 0]]
    """
    rules = Thresholds.of(pos_iou_thr, neg_iou_thr, min_pos_iou, gt_max_assign_all, match_low_quality)
    boxes, ground_truths = Bounded.exact(anchors, dtype), Bounded.exact(gt_boxes, dtype)
    worlds, tables = [], []
    for image, (present, taking_part) in enumerate(zip(gt_valid, inside, strict=True)):
        regions = None
        if ignore_boxes is not None and ignore_valid is not None and ignore_iof_thr > 0:
            regions = Bounded.exact(ignore_boxes[image, ignore_valid[image]], dtype)
        ignored = _ignored(boxes, regions, ignore_wrt_candidates, ignore_iof_thr) & taking_part
        overlaps = _Overlaps.of(ground_truths[image, present], boxes, taking_part).without(ignored)
        worlds.append((_world(overlaps, rules, present.nonzero().flatten(), taking_part),))
        tables.append(_padded(overlaps.iou, present))
    iou: Any = torch.stack(tables)  # type: ignore[arg-type]
    return Explanation(tuple(worlds), lambda gt_index: _quality(iou, gt_index))


def _ignored(boxes: Any, regions: Any, of_boxes: bool, threshold: float) -> Decision:
    """Which boxes (N,) are left out for lying in an ignored region."""
    if regions is None or not len(regions) or not len(boxes):
        nothing = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        return Decision(nothing, torch.full_like(nothing, math.inf, dtype=torch.float64))
    return anchor_head._share_ignored(boxes, regions, of_boxes) > threshold  # type: ignore[return-value]


def _padded(iou: Bounded, present: Tensor) -> Bounded:
    """Overlaps (G, A) with a row for every padded ground truth."""
    value, error = (iou.value.new_zeros(len(present), iou.shape[1]) for _ in range(2))
    value[present], error[present] = iou.value, iou.error
    return Bounded(value, error, iou.precision)


def _quality(iou: Any, gt_index: Tensor) -> Any:
    """IoU (B, A) that an assignment implies."""
    if not iou.shape[1]:
        return iou.sum(1)
    return torch.where(gt_index >= 0, iou.gather(1, gt_index.clamp(min=0)[:, None])[:, 0], 0.0)


@dataclass(frozen=True, eq=False)
class _Overlaps:
    """IoUs (G, N) of one image, the range that each may have, and the boxes they are made of.

    IoUs of anchors that take no part are -inf, and -1 in ignored regions, where those marked `unsure` (N,) may be.
    """

    iou: Bounded
    lower: Tensor
    upper: Tensor
    ground_truths: Bounded
    boxes: Bounded
    unsure: Tensor

    @classmethod
    def of(cls, ground_truths: Any, boxes: Any, taking_part: Tensor) -> _Overlaps:
        """Overlap ground truths with boxes."""
        iou: Any = unchecked(overlaps_mmdet)(ground_truths, boxes)
        nobody = torch.zeros_like(taking_part)
        every = cls(iou, iou.lower.clamp(min=0), iou.upper, ground_truths, boxes, nobody)
        return every._with(~taking_part, -math.inf)

    def without(self, ignored: Decision) -> _Overlaps:
        """Set all overlaps of ignored boxes (N,) to -1."""
        certain = self._with(ignored.value & ~ignored.ambiguous, -1.0)
        value = certain.iou.value.masked_fill(ignored.value, -1.0)
        lower = certain.lower.masked_fill(ignored.ambiguous, -1.0)
        error = torch.where(ignored.ambiguous, certain.upper + 1, certain.iou.error)
        return replace(certain, iou=Bounded(value, error, self.iou.precision), lower=lower, unsure=ignored.ambiguous)

    def _with(self, boxes: Tensor, overlap: float) -> _Overlaps:
        value, lower, upper = (t.masked_fill(boxes, overlap) for t in (self.iou.value, self.lower, self.upper))
        iou = Bounded(value, self.iou.error.masked_fill(boxes, 0.0), self.iou.precision)
        return replace(self, iou=iou, lower=lower, upper=upper)

    def sources(self, row: int, columns: Tensor) -> Tensor:
        """Numbers (N, 5) that make the IoUs of one ground truth with some boxes: those of equal numbers are equal.

        An IoU without error is its own source. Otherwise it is made of intersection and union, if both are exact; or of
        the sides of the intersection, whose rounding is that of their exact value, and the box's exact area or sides.
        """
        target: Any = self.ground_truths[row : row + 1]
        boxes: Any = self.boxes[columns]
        iou: Any = self.iou[row, columns]
        areas: Any = _shared_areas(boxes[:, None], target[None])
        intersection, area, union = (t[:, 0] for t in areas)
        near: Any = torch.maximum(target[:, :2], boxes[:, :2])
        far: Any = torch.minimum(target[:, 2:], boxes[:, 2:])
        shared, own = ((sides.value).sort(1).values for sides in (far - near, boxes[:, 2:] - boxes[:, :2]))
        nothing = torch.zeros_like(shared)
        by_area = torch.stack([area.value, nothing[:, 0]], dim=1)
        sources = torch.cat([shared, torch.where((area.error == 0)[:, None], by_area, own)], dim=1)
        both = torch.cat([torch.stack([intersection.value, union.value], dim=1), nothing], dim=1)
        itself = torch.cat([iou.value[:, None], nothing, nothing[:, :1]], dim=1)
        sources = torch.where(((intersection.error == 0) & (union.error == 0))[:, None], both, sources)
        sources = torch.where((iou.error == 0)[:, None], itself, sources)
        alone = torch.where(self.unsure[columns], columns, -1)
        return torch.cat([sources, alone[:, None].to(sources)], dim=1)


# ------------------------------------------------------------------------------------------------ one image's world
def _world(overlaps: _Overlaps, rules: Thresholds, names: Tensor, taking_part: Tensor) -> World:
    """World of one image; `names` are the indices of its ground truths among the padded ones."""
    if not len(names) or not taking_part.any():
        outcome = torch.where(taking_part, BACKGROUND, IGNORED)
        return World(outcome, torch.full_like(outcome, math.inf, dtype=torch.float64))
    by_threshold = _by_threshold(overlaps, rules, names)
    if not rules.claims:
        return by_threshold
    claims = [_claim(overlaps, row, name, rules) for row, name in enumerate(names.tolist())]
    return ClaimingWorld.of(by_threshold, claims, claims_all=rules.claims_all)


def _by_threshold(overlaps: _Overlaps, rules: Thresholds, names: Tensor) -> World:
    """What the thresholds alone give; a NaN leaves an anchor out."""
    value, error, lower, upper = overlaps.iou.value, overlaps.iou.error, overlaps.lower, overlaps.upper
    low, high = rules.background
    chosen = anchor_head._by_threshold(value, rules)
    outcome = torch.where(chosen >= 0, names[chosen.clamp(min=0)], chosen)

    least, most = lower.amax(0), upper.amax(0)
    as_background, above = least.clamp(min=low), least.clamp(min=high)
    may_be_gt = upper >= least.clamp(min=rules.positive)
    may_be_background = (as_background <= most) & (as_background < min(high, rules.positive))
    may_be_left_out = (least < min(low, rules.positive)) | ((above <= most) & (above < rules.positive))
    may_be_left_out |= most.isinf() & (most > 0)  # then it may also be NaN
    options = torch.cat([may_be_gt, may_be_background[None], may_be_left_out[None]])
    open_ = (options.sum(0) > 1) & ~value.isnan().any(0)
    labels = [*names.tolist(), BACKGROUND, IGNORED]
    choices = {n: frozenset(labels[i] for i in options[:, n].nonzero().flatten().tolist()) for n in _indices(open_)}

    best, best_error = value.amax(0), error.gather(0, value.argmax(0)[None])[0]
    margin = (best - rules.positive).abs() / best_error
    others = torch.stack([(best - edge).abs() / best_error for edge in (low, high) if edge > 0] or [margin]).amin(0)
    margin = torch.where(chosen >= 0, torch.minimum(margin, _lead(value, error)), torch.minimum(margin, others))
    margin = torch.where((best_error == 0) & (chosen < 0) | value.isnan().any(0), math.inf, margin)
    return World(outcome, margin.nan_to_num(nan=math.inf, posinf=math.inf), choices)


def _indices(mask: Tensor) -> list[int]:
    return [int(index) for index in mask.nonzero().flatten()]


def _lead(value: Tensor, error: Tensor) -> Tensor:
    """Margin of the best over the second-best row of each column; 0 where they are equal."""
    if len(value) < 2:
        return torch.full_like(value[0], math.inf)
    two, place = value.topk(2, dim=0)
    gap = two[0] - two[1]
    return torch.where(gap > 0, gap / error.gather(0, place).sum(0), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def _claim(overlaps: _Overlaps, row: int, name: int, rules: Thresholds) -> Claim:
    """Which boxes one ground truth claims, and may claim."""
    value, error = overlaps.iou.value[row], overlaps.iou.error[row]
    lower, upper = overlaps.lower[row], overlaps.upper[row]
    nothing = torch.zeros_like(value, dtype=torch.bool)
    best, place = value.max(0)
    if best.isnan():
        return Claim(name, nothing, (), False, torch.full_like(value, math.inf))
    certain = bool(lower.amax() >= rules.least) and not bool(upper.amax().isinf())
    claimed = value == best if rules.claims_all else nothing.index_fill(0, place, True)
    groups = _groups(overlaps, row, upper >= lower.amax()) if bool(upper.amax() >= rules.least) else ()

    gap = (best - value) / (error + error[place])
    gap = torch.where(best == value, 0.0, gap).nan_to_num(nan=math.inf, posinf=math.inf)
    tied = next((group for group in groups if bool(group[place])), nothing)
    lead = gap.masked_fill(tied if rules.claims_all else claimed, math.inf).amin()
    threshold = (best - rules.least).abs() / error[place] if error[place] > 0 else value.new_tensor(math.inf)
    if best >= rules.least:
        margin = torch.where(claimed, torch.minimum(lead, threshold), gap)
        return Claim(name, claimed, groups, certain, margin)
    return Claim(name, nothing, groups, certain, torch.maximum(gap, threshold))


def _groups(overlaps: _Overlaps, row: int, candidates: Tensor) -> tuple[Tensor, ...]:
    """Masks (N,) of candidates that tie for certain, the first one's group first."""
    columns = candidates.nonzero().flatten()
    distinct, number = torch.unique(overlaps.sources(row, columns), dim=0, return_inverse=True)
    groups = (columns[number == group] for group in range(len(distinct)))
    return tuple(torch.zeros_like(candidates).index_fill(0, group, True) for group in sorted(groups, key=min))
