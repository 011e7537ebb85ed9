"""Quirks of RTMDet that the oracle keeps."""

from __future__ import annotations

import math
from typing import Any

import torch

from detoracle.reference import rtmdet
from detoracle.reference.assignment import Assignment
from detoracle.reference.quirks.quirk import Quirk
from detoracle.reference.quirks.rtmdet_loss import LOSS_QUIRKS, SIDE, behaviour_of, ground_truths

__all__ = ["QUIRKS"]


def _matching(cost: list[list[float]], iou: list[list[float]]) -> dict[str, Any]:
    """Arguments of `dynamic_k_matching` for one image whose priors are all candidates."""
    costs = torch.tensor([cost])
    return {
        "cost": costs,
        "iou": torch.tensor([iou]),
        "candidate": torch.ones(1, costs.shape[2], dtype=torch.bool),
        "gt_valid": torch.ones(1, costs.shape[1], dtype=torch.bool),
    }


def _scene(gts: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    """Arguments of `assign`: a 64 px image, two classes, every prior predicting a square of 16 px around its point."""
    points = rtmdet.priors([(SIDE, SIDE)], [8])
    return {
        "class_logits": torch.zeros(1, len(points), 2),
        "boxes": rtmdet.decode(points[:, :2], torch.full((1, len(points), 4), 8.0)),
        "priors": points,
        "inside": torch.ones(1, len(points), dtype=torch.bool),
        **ground_truths(gts, labels),
    }


def _assigned(arguments: dict[str, Any]) -> Assignment:
    return rtmdet.assign(**arguments)


def _at(column: int, row: int) -> int:
    return row * SIDE + column


def _positives(result: Assignment) -> dict[int, int]:
    """Prior to ground truth, of the only image."""
    return {int(p): int(result.gt_index[0, p]) for p in result.positive[0].nonzero()}


def _third_party_wins() -> dict[str, Any]:
    # Ground truths 0 and 1 both claim prior 0; ground truth 2 claims prior 1, yet is cheapest at prior 0 too.
    return _matching([[2.0, 9.0], [3.0, 9.0], [1.0, 0.5]], [[0.5, 0.0], [0.5, 0.0], [0.9, 0.5]])


def _nan_iou() -> dict[str, Any]:
    return _matching([[1.0, 2.0, math.nan]], [[0.9, 0.8, math.nan]])


def _twins() -> dict[str, Any]:
    return _scene([[17.0, 17.0, 31.0, 31.0]] * 2)


def _tiny_and_large() -> dict[str, Any]:
    return _scene([[1.0, 1.0, 3.0, 3.0], [1.0, 1.0, 47.0, 47.0]])


def _edge() -> dict[str, Any]:
    names = ("priors", "inside", "gt_boxes", "gt_valid")
    return {name: _scene([[16.0, 16.0, 33.0, 33.0]])[name] for name in names}


def _lines_alone() -> dict[str, Any]:
    return _scene([[24.0, 17.0, 24.0, 47.0], [47.0, 47.0, 33.0, 33.0]])


def _line_beside() -> dict[str, Any]:
    return _scene([[24.0, 17.0, 24.0, 47.0], [17.0, 17.0, 47.0, 47.0]])


def _far() -> dict[str, Any]:
    return _scene([[900.0, 900.0, 916.0, 916.0], [17.0, 17.0, 31.0, 31.0]])


def _far_cost() -> dict[str, Any]:
    given = _far()
    candidate = rtmdet.candidates(**{name: given[name] for name in ("priors", "inside", "gt_boxes", "gt_valid")})
    return {name: value for name, value in given.items() if name != "inside"} | {"candidate": candidate}


def _untouched_cost() -> dict[str, Any]:
    """A prior at the centre of a box, in the right class for certain, whose own prediction lies elsewhere."""
    one = torch.ones(1, 1, dtype=torch.bool)
    return {
        "class_logits": torch.full((1, 1, 1), -200.0),
        "boxes": torch.tensor([[[40.0, 40.0, 48.0, 48.0]]]),
        "priors": torch.tensor([[8.0, 8.0, 8.0, 8.0]]),
        "candidate": one,
        **ground_truths([[0.0, 0.0, 16.0, 16.0]]),
    }


def _other_class_costs() -> dict[str, Any]:
    """Two priors alike but for the logit of a class that the ground truth is not of."""
    logits = torch.tensor([[[0.0, 0.0], [0.0, 9.0]]])
    given = _untouched_cost()
    twice = {name: given[name].expand(1, 2, *given[name].shape[2:]) for name in ("boxes", "candidate")}
    return {**given, **twice, "class_logits": logits, "priors": given["priors"].expand(2, 4)}


def _masked() -> dict[str, Any]:
    """A box whose mask lies in its left half only."""
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[..., 16:33, 16:25] = True
    return {**_scene([[15.0, 15.0, 49.0, 33.0]]), "gt_masks": masks}


def _outside_alone() -> dict[str, Any]:
    return _scene([[900.0, 900.0, 916.0, 916.0]])


def _nan_box() -> dict[str, Any]:
    """Nine good predictions of one ground truth; with a NaN among them, it gets a single one."""
    given = _scene([[17.0, 17.0, 47.0, 47.0]])
    given["boxes"] = given["gt_boxes"].expand(1, 64, 4).clone()
    given["boxes"][0, _at(3, 3)] = math.nan
    return given


def _bad_label() -> dict[str, Any]:
    return _scene([[17.0, 17.0, 31.0, 31.0]], [2])


def _bad_label_of_nobody() -> dict[str, Any]:
    return _scene([[900.0, 900.0, 916.0, 916.0]], [-7])


def _only_the_edge_is_out() -> bool:
    candidate = rtmdet.candidates(**_edge())[0]
    return candidate.nonzero().flatten().tolist() == [_at(x, y) for y in (3, 4) for x in (3, 4)]


def _tiny_in_another() -> bool:
    result = _assigned(_tiny_and_large())
    prior = next(iter(p for p, gt in _positives(result).items() if gt == 0))
    return bool((_tiny_and_large()["priors"][prior, :2] > 3).all())


def _line_weighs_nothing() -> bool:
    result = _assigned(_line_beside())
    lines = result.gt_index[0] == 0
    return int(lines.sum()) == 1 and not bool(result.quality[0, lines].any())


def _far_is_infinite() -> bool:
    cost, _ = rtmdet.cost(**_far_cost())
    candidate = _far_cost()["candidate"][0]
    return bool(cost[0, 0, candidate].isposinf().all()) and bool(cost[0, 1, candidate].isfinite().all())


def _nan_box_takes_all_but_one() -> bool:
    given = _nan_box()
    whole = {**given, "boxes": given["gt_boxes"].expand(1, 64, 4)}
    return [int(_assigned(a).positive.sum()) for a in (whole, given)] == [9, 1]


def _mask_moves_the_centre() -> bool:
    given = _masked()
    named = {name: value for name, value in given.items() if name != "inside"}
    named["candidate"] = rtmdet.candidates(**{n: given[n] for n in ("priors", "inside", "gt_boxes", "gt_valid")})
    by_mask = rtmdet.cost(**named)[0][0, 0]
    by_box = rtmdet.cost(**{**named, "gt_masks": None})[0][0, 0]
    return int(by_mask.argmin()) == _at(3, 3) and int(by_box.argmin()) != _at(3, 3)


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "rtmdet.conflict-over-all-gts",
        "rtmdet.dynamic_k_matching",
        "A contested prior can go to a ground truth that did not claim it, and that it does not lie in.",
        "Takes the smallest cost over all ground truths of the image, not over those that claim the prior.",
        "Choose among the claiming ground truths only.",
        ("T4",),
        _third_party_wins,
        lambda: rtmdet.dynamic_k_matching(**_third_party_wins())[0].tolist() == [[2, 2]],
    ),
    Quirk(
        "rtmdet.gt-left-without-prior",
        "rtmdet.assign",
        "Of two ground truths alike in box and class, the first takes all priors.",
        "Ties of the smallest cost go to the lowest index; the other is left without a prior, silently.",
        "Report the ground truth as unmatched.",
        ("T7",),
        _twins,
        lambda: set(_positives(_assigned(_twins())).values()) == {0},
    ),
    Quirk(
        "rtmdet.prior-of-another-gt",
        "rtmdet.assign",
        "A ground truth that no prior lies in takes one that lies in another ground truth.",
        "Candidates of any ground truth are candidates for all, and each claims at least one.",
        "Leave it unmatched, and say so.",
        ("T13",),
        _tiny_and_large,
        _tiny_in_another,
    ),
    Quirk(
        "rtmdet.edge-is-outside",
        "rtmdet.candidates",
        "A prior exactly on a box's edge is outside it.",
        "All four distances must be strictly positive.",
        "None.",
        (),
        _edge,
        _only_the_edge_is_out,
    ),
    Quirk(
        "rtmdet.degenerate-gt-untrained",
        "rtmdet.assign",
        "Ground truths without area, or with swapped corners, contain no prior: alone, they get none.",
        "No candidate, so the image is background.",
        "Drop boxes without area before training.",
        ("N3",),
        _lines_alone,
        lambda: not _positives(_assigned(_lines_alone())),
    ),
    Quirk(
        "rtmdet.zero-quality-positive",
        "rtmdet.assign",
        "Beside another ground truth, one without area takes a prior away, which then weighs nothing.",
        "Its claim is at least 1; the matched IoU of 0 is the class target and the weight of the box loss.",
        "Drop boxes without area before training.",
        ("T13",),
        _line_beside,
        _line_weighs_nothing,
    ),
    Quirk(
        "rtmdet.distance-cost-overflows",
        "rtmdet.cost",
        "More than about 41 strides from a centre, the cost is infinite in float32, alike for all priors there.",
        "The distance cost is 10 to the power of the distance in strides, less 3.",
        "An order-preserving finite cost.",
        ("N11",),
        _far_cost,
        _far_is_infinite,
    ),
    Quirk(
        "rtmdet.far-gt-takes-prior",
        "rtmdet.assign",
        "A ground truth far outside takes a prior all the same, if another ground truth has candidates.",
        "Its costs are all infinite, and of equals the claim takes any one.",
        "Leave it unmatched, and say so.",
        ("N11", "T13"),
        _far,
        lambda: _assigned(_far()).extra["dynamic_k"].tolist() == [[1, 1]],
    ),
    Quirk(
        "rtmdet.iou-cost-limited",
        "rtmdet.cost",
        "A prediction that does not touch the ground truth costs 48.35 for its IoU, and so remains in play.",
        "-3 times the logarithm of 0 + 1e-7.",
        "None.",
        (),
        _untouched_cost,
        lambda: 48.35 < float(rtmdet.cost(**_untouched_cost())[0]) < 48.36,
    ),
    Quirk(
        "rtmdet.class-cost-over-all-classes",
        "rtmdet.cost",
        "Confidence in any other class makes a prior dearer.",
        "Sums the classification cost over all classes; a port elsewhere takes the ground truth's class alone.",
        "None: the port is another algorithm.",
        ("P1",),
        _other_class_costs,
        lambda: bool(rtmdet.cost(**_other_class_costs())[0].diff() > 1),
    ),
    Quirk(
        "rtmdet.center-of-mass",
        "rtmdet.assign",
        "With instance masks, the distance is to the centre of the mask, which may lie elsewhere than the box's.",
        "Uses the masks whenever the ground truths carry them.",
        "None.",
        (),
        _masked,
        _mask_moves_the_centre,
    ),
    Quirk(
        "rtmdet.stored-overlap",
        "rtmdet.assign",
        "The stored overlap of an unmatched prior is -1e8, but 0 in an image without candidates.",
        "Fills with -1e8 and returns early with zeros.",
        "0 in both cases.",
        (),
        _outside_alone,
        lambda: (
            float(_assigned(_outside_alone()).extra["max_overlaps"].min()) == 0
            and float(_assigned(_far()).extra["max_overlaps"].min()) == -1e8
        ),
    ),
    Quirk(
        "rtmdet.nan-iou-makes-k-one",
        "rtmdet.assign",
        "One NaN box among the candidates leaves every ground truth of the image with a single claim.",
        "NaN ranks first among the IoUs, their sum's integer is the smallest there is, and the minimum of 1 applies.",
        "Raise a named error for non-finite predictions, or leave the prior out.",
        ("N8",),
        _nan_box,
        _nan_box_takes_all_but_one,
    ),
    Quirk(
        "rtmdet.nan-cost-ranks-last",
        "rtmdet.dynamic_k_matching",
        "A NaN cost is never claimed before all others are.",
        "NaN counts as the largest number in a top-k.",
        "Raise a named error for non-finite predictions.",
        ("N8", "N9"),
        _nan_iou,
        lambda: rtmdet.dynamic_k_matching(**_nan_iou())[0].tolist() == [[0, -1, -1]],
    ),
    Quirk(
        "rtmdet.label-out-of-range",
        "rtmdet.assign",
        "A class index outside 0 to C-1 raises, but only in an image that has candidates.",
        "One-hot encoding raises on a CPU; on a GPU a device assertion ends the process.",
        "A named error that gives the label.",
        ("L1", "L2"),
        _bad_label,
        lambda: (
            behaviour_of(rtmdet.assign, _bad_label()) == "rtmdet.label-out-of-range"
            and not behaviour_of(rtmdet.assign, _bad_label_of_nobody())
        ),
    ),
    *LOSS_QUIRKS,
)
