"""Quirks of the anchor head that the oracle keeps: its boxes and assignment, and those of its losses."""

from __future__ import annotations

from typing import Any

import torch

from detoracle.reference import anchor_head
from detoracle.reference.errors import InputError
from detoracle.reference.quirks.anchor_head_boxes import BOX_QUIRKS, behaviour_of
from detoracle.reference.quirks.anchor_head_loss import LOSS_QUIRKS
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["QUIRKS"]

_CELLS = [[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0], [0.0, 8.0, 8.0, 16.0], [8.0, 8.0, 16.0, 16.0]]


def _assigning(
    gts: list[list[float]],
    anchors: list[list[float]] | None = None,
    ignored: list[list[float]] | None = None,
    **rules: Any,
) -> dict[str, Any]:
    """Arguments of `assign` for one image, whose four cells are the anchors unless others are given."""
    boxes = torch.tensor(anchors or _CELLS)
    arguments = {
        "anchors": boxes,
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "inside": torch.ones(1, len(boxes), dtype=torch.bool),
        **rules,
    }
    if ignored is not None:
        arguments["ignore_boxes"] = torch.tensor([ignored]).reshape(1, -1, 4)
        arguments["ignore_valid"] = torch.ones(1, len(ignored), dtype=torch.bool)
    return arguments


def _assigned(arguments: dict[str, Any]) -> list[int]:
    return anchor_head.assign(**arguments).gt_index[0].tolist()


def _hair_apart() -> dict[str, Any]:
    # Both anchors overlap the ground truth by a quarter, but for the last bit.
    return _assigning([[0.0, 0, 4, 4]], [[0.0, 0, 8, 8], [0.0, 0, 8, 8.000001]])


def _equal() -> dict[str, Any]:
    return _assigning([[6.0, 2, 10, 6]], _CELLS[:2])


def _stolen() -> dict[str, Any]:
    return _assigning([[0.0, 0, 10, 10], [0.0, 0, 10, 6]], [[0.0, 0, 10, 10], [10.0, 0, 20, 10]])


def _outside() -> dict[str, Any]:
    return _assigning([[0.0, 0, 8, 8], [40.0, 40, 48, 48]])


def _outside_one() -> dict[str, Any]:
    return {**_outside(), "gt_max_assign_all": False}


def _unmatched() -> dict[str, Any]:
    return {**_outside(), "min_pos_iou": 0.3}


def _twins() -> dict[str, Any]:
    # The first anchor overlaps both by 3/4, the second is them.
    return _assigning([[0.0, 0, 8, 8]] * 2, [[0.0, 0, 8, 6], [0.0, 0, 8, 8]])


def _as_list() -> dict[str, Any]:
    return {**_assigning([[0.0, 0, 8, 8]]), "neg_iou_thr": 1}


def _nothing_is_background() -> list[int]:
    return _assigned(_assigning([[0.0, 0, 8, 8]], neg_iou_thr=(0.0, 0.0)))


def _rejected(arguments: dict[str, Any]) -> bool:
    try:
        anchor_head.assign(**arguments)
    except InputError:
        return True
    return False


def _ignored_without_gt() -> dict[str, Any]:
    return _assigning([], ignored=[[0.0, 0, 16, 16]], ignore_iof_thr=0.5)


def _all_ignored() -> dict[str, Any]:
    return _assigning([[0.0, 0, 8, 8]], ignored=[[0.0, 0, 16, 16]], ignore_iof_thr=0.5)


def _revived() -> dict[str, Any]:
    return {**_all_ignored(), "min_pos_iou": -1.0}


def _share_of_region() -> dict[str, Any]:
    region = [[2.0, 2, 4, 4]]  # lies in the first anchor, of which it is a sixteenth
    return _assigning([[8.0, 0, 16, 8]], ignored=region, ignore_iof_thr=0.5, ignore_wrt_candidates=False)


def _background_above_positive() -> dict[str, Any]:
    return _assigning([[0.0, 0, 8, 6]], pos_iou_thr=0.5, neg_iou_thr=0.9, match_low_quality=False)


def _nan_gt() -> dict[str, Any]:
    return _assigning([[0.0, 0, 8, float("nan")]])


def _few_images() -> dict[str, Any]:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    return {
        "anchors": torch.tensor(_CELLS),
        "gt_index": torch.full((2, 4), -2),
        "gt_boxes": torch.zeros(2, 0, 4),
        "gt_labels": torch.zeros(2, 0, dtype=torch.int64),
        "positive": nothing,
        "negative": nothing,
        "num_classes": 1,
    }


def _added() -> dict[str, Any]:
    return {"gt_index": torch.tensor([[0, -1, -1]]), "add_gt_as_proposals": True}


def _no_positive() -> dict[str, Any]:
    return {"gt_index": torch.full((1, 20), -1), "num": 16, "neg_pos_ub": 3.0}


QUIRKS: tuple[Quirk, ...] = (
    *BOX_QUIRKS,
    Quirk(
        "anchor_head.claims-by-float-equality",
        "anchor_head.assign",
        "A ground truth claims every anchor whose IoU equals its best one as a float, and none a last bit below.",
        "Compares floats for equality, so that rounding decides between anchors that overlap it alike.",
        "Take all within a few roundings, as detectron2 did for a while; the positives then differ.",
        ("T3",),
        _hair_apart,
        lambda: _assigned(_hair_apart()) == [0, -1] and _assigned(_equal()) == [0, 0],
    ),
    Quirk(
        "anchor_head.later-gt-steals",
        "anchor_head.assign",
        "A later ground truth claims its best anchor from one that the anchor equals.",
        "Claims overwrite each other and the matches over the threshold, in the order of the ground truths.",
        "Keep the anchor with the ground truth it overlaps more, as detectron2 does: another algorithm.",
        ("T2",),
        _stolen,
        lambda: _assigned(_stolen()) == [1, -1],
    ),
    Quirk(
        "anchor_head.zero-overlap-claims-all",
        "anchor_head.assign",
        "With a least overlap of 0, a ground truth that overlaps nothing claims every anchor that it does not overlap.",
        "Its best IoU is 0, which all of them equal; true positives of other ground truths are lost too.",
        "Ask for an IoU above 0, or set min_pos_iou to 0.01.",
        ("T1",),
        _outside,
        lambda: _assigned(_outside()) == [1, 1, 1, 1],
    ),
    Quirk(
        "anchor_head.zero-overlap-claims-first",
        "anchor_head.assign",
        "With gt_max_assign_all off, a ground truth that overlaps nothing claims the first anchor, whoever's it was.",
        "The argmax of zeros is the first one.",
        "Leave it unmatched, and say so.",
        ("T1", "T11"),
        _outside_one,
        lambda: _assigned(_outside_one()) == [1, -1, -1, -1],
    ),
    Quirk(
        "anchor_head.gt-below-least-overlap",
        "anchor_head.assign",
        "A ground truth none of whose IoUs reaches min_pos_iou gets no anchor.",
        "Leaves it unmatched, silently.",
        "Report the ground truth as unmatched.",
        ("T7",),
        _unmatched,
        lambda: _assigned(_unmatched()) == [0, -1, -1, -1],
    ),
    Quirk(
        "anchor_head.twins-share",
        "anchor_head.assign",
        "Of identical ground truths, the first gets the anchors over the threshold and the last gets the best ones.",
        "The threshold takes the first argmax, the claims overwrite each other.",
        "None: the published results depend on it.",
        ("T7", "T10"),
        _twins,
        lambda: _assigned(_twins()) == [0, 1],
    ),
    Quirk(
        "anchor_head.neg-iou-thr-type",
        "anchor_head.assign",
        "Where neg_iou_thr is an int or a list, nothing is background.",
        "Tests for a float and for a tuple, and silently does nothing otherwise.",
        "The oracle refuses an int, and takes a list as the pair it looks like.",
        (),
        _as_list,
        lambda: _rejected(_as_list()) and _nothing_is_background() == [0, -2, -2, -2],
    ),
    Quirk(
        "anchor_head.background-above-positive",
        "anchor_head.assign",
        "An IoU that is both below neg_iou_thr and at least pos_iou_thr makes a positive.",
        "Positives overwrite background.",
        "Refuse such thresholds.",
        (),
        _background_above_positive,
        lambda: _assigned(_background_above_positive()) == [0, -1, -1, -1],
    ),
    Quirk(
        "anchor_head.ignored-regions-need-gts",
        "anchor_head.assign",
        "Without ground truths, anchors in ignored regions are background.",
        "Sets the overlaps of ignored anchors to -1, and there are none.",
        "Leave them out.",
        ("C13",),
        _ignored_without_gt,
        lambda: _assigned(_ignored_without_gt()) == [-1, -1, -1, -1],
    ),
    Quirk(
        "anchor_head.all-ignored",
        "anchor_head.assign",
        "Where an ignored region covers everything, an image with ground truths trains nothing.",
        "All overlaps are -1: below every threshold that makes background, and below min_pos_iou.",
        "None.",
        ("C13",),
        _all_ignored,
        lambda: _assigned(_all_ignored()) == [-2, -2, -2, -2],
    ),
    Quirk(
        "anchor_head.ignored-revived",
        "anchor_head.assign",
        "With min_pos_iou at -1 or less, a ground truth whose anchors are all ignored claims them all.",
        "Its best overlap is -1, which all ignored anchors equal.",
        "Never claim an ignored anchor.",
        ("C13",),
        _revived,
        lambda: _assigned(_revived()) == [0, 0, 0, 0],
    ),
    Quirk(
        "anchor_head.ignored-by-region",
        "anchor_head.assign",
        "With ignore_wrt_candidates off, a small region leaves out every anchor that contains most of it.",
        "Divides the intersection by the region's area instead of the anchor's.",
        "None.",
        ("C13",),
        _share_of_region,
        lambda: _assigned(_share_of_region()) == [-2, 0, -1, -1],
    ),
    Quirk(
        "anchor_head.nan-gt-trains-nothing",
        "anchor_head.assign",
        "A ground truth with a NaN coordinate leaves the whole image out of training.",
        "Its NaN overlaps are every anchor's maximum, and no comparison with a NaN holds.",
        "A named error.",
        (),
        _nan_gt,
        lambda: _assigned(_nan_gt()) == [-2, -2, -2, -2],
    ),
    Quirk(
        "anchor_head.counts-at-least-one",
        "anchor_head.targets",
        "An image without positives counts as having one, and likewise without background.",
        "Sums max(n, 1) over the images for the divisor of the losses.",
        "None: the published losses are divided by it.",
        ("S3", "N18"),
        _few_images,
        lambda: [int(count) for count in anchor_head.targets(**_few_images())[4:]] == [2, 2],
    ),
    Quirk(
        "anchor_head.added-gt-needs-labels",
        "anchor_head.sample",
        "A sampler that adds the ground truths to the proposals cannot be used in an anchor head.",
        "The head passes no labels, and the sampler raises ValueError (3.x: an index error).",
        "A named error.",
        (),
        _added,
        lambda: behaviour_of(anchor_head.sample, _added()) == "anchor_head.added-gt-needs-labels",
    ),
    Quirk(
        "anchor_head.background-limit-counts-one",
        "anchor_head.sample",
        "With a limit on background for each positive, an image without positives keeps as much as with one.",
        "Multiplies the limit by max(positives, 1).",
        "None.",
        (),
        _no_positive,
        lambda: int(anchor_head.sample(**_no_positive())[1].sum()) == 3,
    ),
    *LOSS_QUIRKS,
)
