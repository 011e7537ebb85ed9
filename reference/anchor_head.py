"""The anchor head of mmdetection: MaxIoU assignment, sampling and training targets; losses in `anchor_head_loss`.

Every cell of every level has a few fixed *anchors*. An anchor takes part if its cell lies in the image and, optionally,
if it does not stick out of it. Of those, an anchor whose best IoU with a ground truth is small is background, one whose
best IoU is large takes that ground truth, and in between it is left out of training. Then every ground truth claims the
anchors that overlap it *most*, whatever they were. A sampler may thin out positives and background.

Stages, in the order data flows: `anchors` or `ssd_anchors`, `valid_flags`, `inside_flags` (in `anchor_head_boxes`),
`assign`, `sample`, `targets` (which encodes boxes by `anchor_head_coder`), and the losses. Boxes are xyxy in pixels.

Quirks: "most" is tested by float equality, so that anchors that tie are all taken and those 1e-7 apart are not; with a
least overlap of 0, a ground truth that overlaps nothing claims every anchor that overlaps it by 0; a later ground truth
takes an anchor from an earlier one that it overlaps less. Source: OpenMMLab mmdetection 2.28.2 (Apache-2.0), described
from its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detoracle.reference.anchor_head_boxes import SOURCE
from detoracle.reference.anchor_head_coder import encode
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import operation, unchecked
from detoracle.reference.errors import InputError, UpstreamRaises

__all__ = ["Thresholds", "assign", "sample", "targets"]


@dataclass(frozen=True)
class Thresholds:
    """Settings of the MaxIoU assignment that act on overlaps; see `assign`.

    Attributes
    ----------
    positive : float
        Overlap from which an anchor is positive.
    background : tuple of float
        Overlaps from the first to below the second are background.
    least : float
        Overlap that a ground truth must have with some anchor to claim its best ones.
    claims_all : bool
        It claims all that tie for the best, not only the first.
    claims : bool
        Ground truths claim at all.
    """

    positive: float
    background: tuple[float, float]
    least: float
    claims_all: bool
    claims: bool

    @classmethod
    def of(
        cls,
        pos_iou_thr: float,
        neg_iou_thr: float | Sequence[float],
        min_pos_iou: float,
        gt_max_assign_all: bool,
        match_low_quality: bool,
    ) -> Thresholds:
        """Check the arguments of `assign`."""
        pair: Any = (0.0, neg_iou_thr) if isinstance(neg_iou_thr, float) else neg_iou_thr
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(
                "neg_iou_thr",
                expected="a float or a pair of them",
                got=f"{neg_iou_thr!r} ({type(neg_iou_thr).__name__})",
                where="anchor_head.assign",
                fix="Upstream takes an int or a list silently as 'no background at all': say (0.0, 0.0) for that.",
            )
        return cls(pos_iou_thr, (pair[0], pair[1]), min_pos_iou, gt_max_assign_all, match_low_quality)


# -------------------------------------------------------------------------------------------- 4. MaxIoU assignment
@operation("anchor_head.assign", kind="assignment", source=SOURCE)
@torch.no_grad()
def assign(
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
) -> Assignment:
    """MaxIoU: which ground truth each anchor is trained towards, and the IoU it has with it.

    In this order, later steps overwriting earlier ones: background by threshold, positives by threshold, and for each
    ground truth in turn the anchors whose IoU *equals* its best one. Without ground truths, everything is background.
    Anchors in ignored regions have all overlaps set to -1. Ties: the first ground truth over the threshold, the last
    one that claims. Upstream has no default for the first two thresholds; those here are RetinaNet's.

    Parameters
    ----------
    anchors : Tensor (A, 4) float
        xyxy in pixels, all levels.
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels, padded to the same G.
    gt_valid : Tensor (B, G) bool
        False for padding.
    inside : Tensor (B, A) bool
        Anchors that take part (`inside_flags`).
    ignore_boxes : Tensor (B, I, 4) float or None
        xyxy in pixels, regions in which nothing is trained.
    ignore_valid : Tensor (B, I) bool or None
        False for padding.
    pos_iou_thr : float
        Best IoU from which an anchor is positive.
    neg_iou_thr : float or pair of float
        Best IoU below which it is background; a pair is the lowest that is and the lowest that is not.
    min_pos_iou : float
        Least best IoU of a ground truth that claims anchors.
    gt_max_assign_all : bool
        It claims all anchors that tie for its best IoU, not only the first.
    match_low_quality : bool
        Ground truths claim anchors at all.
    ignore_iof_thr : float
        Share of an anchor in an ignored region above which it is left out; 0 or less turns that off.
    ignore_wrt_candidates : bool
        That share is of the anchor's area; if False, of the region's.

    Returns
    -------
    gt_index : Tensor (B, A) int
        Ground truth of each anchor, -1 for background, -2 for those left out or not taking part.
    quality : Tensor (B, A) float or None
        IoU with the assigned ground truth; 0 elsewhere.

    Raises
    ------
    InputError
        If `neg_iou_thr` is neither a float nor a pair: upstream then silently has no background at all.

    Examples
    --------
    >>> boxes = torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [0, 2, 8, 8]])
    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> assign(boxes, boxes[None, :1], one, one.expand(1, 3)).gt_index.tolist()
    [[0, -1, 0]]
    """
    rules = Thresholds.of(pos_iou_thr, neg_iou_thr, min_pos_iou, gt_max_assign_all, match_low_quality)
    gt_index = torch.full_like(inside, IGNORED, dtype=torch.int64)
    quality = anchors.new_zeros(inside.shape)
    for image, (present, taking_part) in enumerate(zip(gt_valid, inside, strict=True)):
        boxes = anchors[taking_part]
        overlaps = overlaps_mmdet(gt_boxes[image, present], boxes)
        if ignore_boxes is not None and ignore_valid is not None and ignore_iof_thr > 0:
            regions = ignore_boxes[image, ignore_valid[image]]
            overlaps[:, _share_ignored(boxes, regions, ignore_wrt_candidates) > ignore_iof_thr] = -1
        chosen = _assign(overlaps, rules)
        gt_index[image, taking_part] = _named(chosen, present)
        quality[image, taking_part] = _overlap_of(chosen, overlaps)
    return Assignment(gt_index, quality)


def _share_ignored(boxes: Tensor, regions: Tensor, of_boxes: bool) -> Tensor:
    """Largest share of each box in an ignored region, (N,), or of a region in the box; 0 without regions."""
    if not len(regions) or not len(boxes):
        return boxes.new_zeros(len(boxes))
    if of_boxes:
        return unchecked(overlaps_mmdet)(boxes, regions, mode="iof").amax(1)
    return unchecked(overlaps_mmdet)(regions, boxes, mode="iof").amax(0)


def _assign(overlaps: Tensor, rules: Thresholds) -> Tensor:
    """Outcome (N,) of one image's overlaps (G, N): row of the ground truth, -1 or -2."""
    chosen = torch.full_like(overlaps[:1].flatten(), IGNORED, dtype=torch.int64)
    if not overlaps.numel():
        return torch.full((overlaps.shape[1],), BACKGROUND, device=overlaps.device)
    chosen = _by_threshold(overlaps, rules)
    return _claimed(chosen, overlaps, rules) if rules.claims else chosen


def _by_threshold(overlaps: Tensor, rules: Thresholds) -> Tensor:
    """Outcome (N,) of the thresholds: best ground truth, background, or neither."""
    best, ground_truth = overlaps.max(0)
    low, high = rules.background
    chosen = torch.where((best >= low) & (best < high), BACKGROUND, IGNORED)
    return torch.where(best >= rules.positive, ground_truth, chosen)


def _claimed(chosen: Tensor, overlaps: Tensor, rules: Thresholds) -> Tensor:
    """Let each ground truth in turn claim the anchors that overlap it most."""
    chosen = chosen.clone()
    for row, overlap in enumerate(overlaps):
        best, first = overlap.max(0)
        if best >= rules.least:
            chosen[overlap == best if rules.claims_all else first] = row
    return chosen


def _named(chosen: Tensor, present: Tensor) -> Tensor:
    """Rows of valid ground truths as indices into the padded ones."""
    ground_truths = present.nonzero().flatten()
    if not len(ground_truths):
        return chosen
    return torch.where(chosen >= 0, ground_truths[chosen.clamp(min=0)], chosen)


def _overlap_of(chosen: Tensor, overlaps: Tensor) -> Tensor:
    """Overlap (N,) with the chosen ground truth; 0 where there is none."""
    if not len(overlaps):
        return overlaps.new_zeros(len(chosen))
    return torch.where(chosen >= 0, overlaps.gather(0, chosen.clamp(min=0)[None])[0], 0.0)


# ----------------------------------------------------------------------------------------------------- 5. sampling
@operation("anchor_head.sample", kind="values", source=SOURCE)
def sample(
    gt_index: Tensor,
    gt_labels: Tensor | None = None,
    gt_valid: Tensor | None = None,
    *,
    sampler: str = "random",
    seed: int = 0,
    num: int = 256,
    pos_fraction: float = 0.5,
    neg_pos_ub: float = -1.0,
    add_gt_as_proposals: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positives and background that train the class.

    ``random`` takes at most ``num * pos_fraction`` positives of an image, and fills up to `num` with background: each
    time the first so many of ``torch.randperm`` over those there are (in anchor order), drawn on the CPU from one
    generator seeded once a batch, and only where there are too many. Only this draw reproduces a seeded subset; another
    implementation is right if its subset has the same size. ``pseudo`` takes all.

    Parameters
    ----------
    gt_index : Tensor (B, A) int
        From `assign`.
    gt_labels : Tensor (B, G) int or None
        Class; needed to add ground truths.
    gt_valid : Tensor (B, G) bool or None
        False for padding; needed to add ground truths.
    sampler : {"random", "pseudo"}
        Which sampler.
    seed : int
        Of the random draw.
    num : int
        Most anchors of an image.
    pos_fraction : float
        Largest share of positives among them.
    neg_pos_ub : float
        Most background anchors for each positive (counted as at least 1); negative for no limit.
    add_gt_as_proposals : bool
        Let the ground truths take part in the draw as their own positives, before all anchors.

    Returns
    -------
    positive : Tensor (B, A) bool
        Positives sampled.
    negative : Tensor (B, A) bool
        Background sampled.
    gt_positive : Tensor (B, G) bool or None
        Ground truths sampled as their own positives; (B, 0) if they take no part.

    Raises
    ------
    UpstreamRaises
        ``anchor_head.added-gt-needs-labels``.

    Examples
    --------
    >>> positive, negative, _ = sample(torch.tensor([[0, -1, -1, -2, 0, 0]]), num=2)
    >>> positive.sum().item(), negative.sum().item()
    (1, 1)
    """
    added = add_gt_as_proposals and sampler == "random"
    if added and (gt_labels is None or gt_valid is None):
        raise UpstreamRaises(
            "anchor_head.added-gt-needs-labels",
            expected="gt_labels and gt_valid beside add_gt_as_proposals",
            got="None",
            where="anchor_head.sample",
        )
    first = gt_valid if added and gt_valid is not None else torch.zeros_like(gt_index[:, :0], dtype=torch.bool)
    positive = torch.cat([first, gt_index >= 0], dim=1)
    negative = torch.cat([torch.zeros_like(first), gt_index == BACKGROUND], dim=1)
    if sampler == "random":
        generator = torch.Generator().manual_seed(seed)
        for image in range(len(gt_index)):
            positive[image] = _draw(positive[image], int(num * pos_fraction), generator)
            taken = int(positive[image].sum())
            most = num - taken
            if neg_pos_ub >= 0:
                most = min(most, int(neg_pos_ub * max(taken, 1)))
            negative[image] = _draw(negative[image], most, generator)
    count = first.shape[1]
    return positive[:, count:], negative[:, count:], positive[:, :count]


def _draw(mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of the marked elements."""
    marked = mask.nonzero().flatten()
    if len(marked) <= most:
        return mask
    drawn = marked[torch.randperm(len(marked), generator=generator)[:most].to(marked.device)]
    return torch.zeros_like(mask).index_fill(0, drawn, True)


# ------------------------------------------------------------------------------------------------------ 6. targets
@operation("anchor_head.targets", kind="values", source=SOURCE)
def targets(
    anchors: Tensor,
    gt_index: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    num_classes: int,
    reg_decoded_bbox: bool = False,
    pos_weight: float = -1.0,
    means: Sequence[float] = (0, 0, 0, 0),
    stds: Sequence[float] = (1, 1, 1, 1),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What every anchor is trained towards, and with which weight.

    Parameters
    ----------
    anchors : Tensor (A, 4) float
        xyxy in pixels, all levels.
    gt_index : Tensor (B, A) int
        From `assign`.
    gt_boxes : Tensor (B, G, 4) float
        xyxy in pixels.
    gt_labels : Tensor (B, G) int
        Class, 0 to C-1; all 0 for a region proposal network.
    positive : Tensor (B, A) bool
        From `sample`.
    negative : Tensor (B, A) bool
        From `sample`.
    num_classes : int
        C, which itself is the label of background.
    reg_decoded_bbox : bool
        The box target is the ground truth itself, not its deltas.
    pos_weight : float
        Class weight of positives if above 0; else 1.
    means : sequence of float
        As in `encode`.
    stds : sequence of float
        As in `encode`.

    Returns
    -------
    labels : Tensor (B, A) int
    label_weights : Tensor (B, A) float
        0 for what was not sampled.
    box_targets : Tensor (B, A, 4) float
        0 for what is not positive.
    box_weights : Tensor (B, A, 4) float
        1 for positives.
    num_positives : Tensor () int
        Of the batch, each image counting at least 1.
    num_negatives : Tensor () int
        Likewise.

    Examples
    --------
    >>> boxes, yes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4]]), torch.tensor([[True, False]])
    >>> matched, label = torch.tensor([[0, -1]]), torch.tensor([[2]])
    >>> labels, _, box_targets, *_ = targets(boxes, matched, boxes[None, 1:], label, yes, ~yes, num_classes=3)
    >>> labels.tolist(), box_targets[0, 0].tolist()
    ([[2, 3]], [0.5, 0.0, 0.0, 0.0])
    """
    labels = torch.full_like(gt_index, num_classes, dtype=torch.int64)
    images = []
    for image, chosen in enumerate(gt_index):
        boxes = anchors
        if gt_labels.shape[1]:
            labels[image] = torch.where(positive[image], gt_labels[image][chosen.clamp(min=0)].long(), num_classes)
            boxes = gt_boxes[image][chosen.clamp(min=0)]
        target = boxes if reg_decoded_bbox else unchecked(encode)(anchors, boxes, means=means, stds=stds)
        images.append(torch.where(positive[image][:, None], target, 0.0))
    one = anchors.new_tensor(1.0)
    of_positives = anchors.new_tensor(pos_weight) if pos_weight > 0 else one
    label_weights = torch.where(positive, of_positives, torch.where(negative, one, 0.0))
    box_weights = torch.where(positive[..., None].expand(*positive.shape, 4), one, 0.0)
    num_positives, num_negatives = (mask.sum(1).clamp(min=1).sum() for mask in (positive, negative))
    return labels, label_weights, torch.stack(images), box_weights, num_positives, num_negatives
