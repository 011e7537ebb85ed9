"""Quirks of YOLOX that the oracle keeps."""

from __future__ import annotations

from typing import Any

import torch

from detoracle.reference import yolox, yolox_cost
from detoracle.reference.boxes import iou_loss_yolox, iou_yolox
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["QUIRKS"]


def _matching(cost: list[list[float]], iou: list[list[float]]) -> dict[str, Any]:
    """Arguments of `dynamic_k_matching` for one image whose anchors are all candidates."""
    costs = torch.tensor([cost])
    return {
        "cost": costs,
        "iou": torch.tensor([iou]),
        "candidate": torch.ones(1, costs.shape[2], dtype=torch.bool),
        "gt_valid": torch.ones(1, costs.shape[1], dtype=torch.bool),
    }


def _scene(gts: list[list[float]], labels: list[int] | None = None, *, flavour: str = "tutorial") -> dict[str, Any]:
    """Arguments of `assign`: a 64 px image, one stride-8 level, two classes, every anchor predicting its own cell."""
    _, points, strides = yolox.anchor_grid([(8, 8)], [8], like=torch.zeros(()))
    cells = torch.cat([points, torch.full_like(points, 8.0)], dim=1)
    predictions = torch.cat([cells, torch.zeros(64, 3)], dim=1)[None]
    return {
        "predictions": predictions,
        "anchor_points": points,
        "anchor_strides": strides,
        "gt_boxes": torch.tensor([gts]).reshape(1, -1, 4),
        "gt_labels": torch.tensor([labels or [0] * len(gts)]),
        "gt_valid": torch.ones(1, len(gts), dtype=torch.bool),
        "flavour": flavour,
    }


def _behaviour(arguments: dict[str, Any]) -> str:
    try:
        yolox.assign(**arguments)
    except UpstreamRaises as error:
        return error.behaviour
    return ""


def _third_party_wins() -> dict[str, Any]:
    # Ground truths 0 and 1 both claim anchor 0; ground truth 2 claims anchor 1, yet is cheapest at anchor 0 too.
    return _matching([[2.0, 9.0], [3.0, 9.0], [1.0, 0.5]], [[0.5, 0.0], [0.5, 0.0], [0.9, 0.5]])


def _twins() -> dict[str, Any]:
    return _matching([[1.0, 5.0], [1.0, 5.0]], [[0.5, 0.1], [0.5, 0.1]])


def _shared_sum() -> dict[str, Any]:
    # Two of ground truth 0's IoUs are with anchors next to ground truth 1; they count towards its k all the same.
    return _matching([[1.0, 2.0, 3.0], [9.0, 1.0, 2.0]], [[0.9, 0.6, 0.6], [0.0, 0.9, 0.2]])


def _negative_row() -> dict[str, Any]:
    return _scene([[-40.0, -30.0, 50.0, 10.0], [32.0, 32.0, 20.0, 20.0]], flavour="official")


def _far() -> dict[str, Any]:
    return _scene([[-400.0, -400.0, 8.0, 8.0]])


def _far_and_near() -> dict[str, Any]:
    return _scene([[-400.0, -400.0, 8.0, 8.0], [32.0, 32.0, 16.0, 16.0]])


def _bad_label() -> dict[str, Any]:
    return _scene([[32.0, 32.0, 16.0, 16.0]], [2])


def _nan_iou() -> dict[str, Any]:
    return _matching([[1.0, 2.0, 3.0, 4.0]], [[0.9, 0.9, 0.9, float("nan")]])


def _points() -> dict[str, Any]:
    zero = torch.tensor([[5.0, 5.0, 0.0, 0.0]])
    return {"boxes_a": zero, "boxes_b": zero, "form": "cxcywh"}


def _shifted() -> dict[str, Any]:
    first, second = torch.tensor([[1.0, 1.0, 2.0, 2.0]]), torch.tensor([[2.0, 1.0, 2.0, 2.0]])
    return {"predicted": first, "target": second, "variant": "giou_tutorial"}


def _line() -> dict[str, Any]:
    return _scene([[36.0, 36.0, 0.0, 16.0]])


def _edge() -> dict[str, Any]:
    """A box whose left edge is the anchor points' column at x = 36, and that is too far off for the centre square."""
    arguments = _scene([[66.0, 36.0, 60.0, 8.0]])
    return {name: arguments[name] for name in ("anchor_points", "anchor_strides", "gt_boxes", "gt_valid", "flavour")}


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "yolox.conflict-over-all-gts",
        "yolox.dynamic_k_matching",
        "A contested anchor goes to the cheapest of all ground truths, also to one that never claimed it.",
        "Takes the smallest cost of the whole column.",
        "None: the published results depend on it.",
        ("T4", "T13"),
        _third_party_wins,
        lambda: yolox.dynamic_k_matching(**_third_party_wins())[0].tolist() == [[2, 2]],
    ),
    Quirk(
        "yolox.gt-without-anchor",
        "yolox.dynamic_k_matching",
        "A ground truth can lose every anchor it claimed, and then trains nothing.",
        "Leaves it without an anchor, silently.",
        "Report the ground truth as unmatched.",
        ("T7",),
        _twins,
        lambda: yolox.dynamic_k_matching(**_twins())[0].tolist() == [[0, -1]],
    ),
    Quirk(
        "yolox.shared-candidates-in-k",
        "yolox.dynamic_k_matching",
        "IoUs with the candidates of other ground truths count towards a ground truth's dynamic k.",
        "Sums the ten largest IoUs over all candidates of the image.",
        "None: restricting the sum to its own candidates is another algorithm.",
        ("P1",),
        _shared_sum,
        lambda: yolox.dynamic_k_matching(**_shared_sum())[1].tolist() == [[2, 1]],
    ),
    Quirk(
        "yolox.nan-iou-makes-k-one",
        "yolox.dynamic_k_matching",
        "One NaN IoU makes its ground truth's dynamic k 1.",
        "The sum is NaN, its integer is the smallest there is, and the minimum of 1 applies.",
        "Raise a named error for non-finite predictions, or leave the anchor out.",
        ("N8",),
        _nan_iou,
        lambda: yolox.dynamic_k_matching(**_nan_iou())[1].tolist() == [[1]],
    ),
    Quirk(
        "yolox.no-candidate",
        "yolox.assign",
        "An image whose only ground truths lie far outside cannot be assigned at all.",
        "Raises 'selected index k out of range'.",
        "Train the image as background.",
        ("S4",),
        _far,
        lambda: _behaviour(_far()) == "yolox.no-candidate",
    ),
    Quirk(
        "yolox.far-gt-takes-anchor",
        "yolox.assign",
        "Beside another ground truth, one that lies far outside takes an anchor it does not overlap.",
        "Its dynamic k is at least 1, so it claims the cheapest candidate, with IoU 0.",
        "Leave it unmatched, and say so.",
        ("T13",),
        _far_and_near,
        lambda: int((yolox.assign(**_far_and_near()).gt_index == 0).sum()) == 1,
    ),
    Quirk(
        "yolox.rows-counted-by-sum",
        "yolox.assign",
        "A ground truth whose class and coordinates add up to zero or less makes the image's last one drop out.",
        "The official code counts rows with a positive sum and uses the first that many; the tutorial keeps all.",
        "Count ground truths explicitly.",
        ("L4",),
        _negative_row,
        lambda: (
            bool((yolox.assign(**{**_negative_row(), "flavour": "tutorial"}).gt_index == 1).any())
            and _behaviour(_negative_row()) == "yolox.no-candidate"
        ),
    ),
    Quirk(
        "yolox.label-out-of-range",
        "yolox.assign",
        "A class index outside 0 to C-1 cannot be assigned.",
        "One-hot encoding raises on a CPU; on a GPU a device assertion ends the process.",
        "A named error that gives the label.",
        ("L1",),
        _bad_label,
        lambda: _behaviour(_bad_label()) == "yolox.label-out-of-range",
    ),
    Quirk(
        "yolox.degenerate-gt-trained",
        "yolox.assign",
        "A ground truth without area gets one anchor, whose class target is zero.",
        "IoU 0 gives k = 1; the class target is one-hot times IoU.",
        "Drop boxes without area before training.",
        ("N3",),
        _line,
        lambda: (
            yolox.assign(**_line()).quality.tolist()[0][4 * 8 + 4] == 0.0
            and int(yolox.assign(**_line()).positive.sum()) == 1
        ),
    ),
    Quirk(
        "yolox.edge-is-outside",
        "yolox.candidates",
        "An anchor point exactly on a box's edge is outside it.",
        "All four distances must be strictly positive.",
        "None.",
        (),
        _edge,
        lambda: (
            not bool(yolox_cost.candidates(**_edge())[0][0, 4 * 8 + 4])
            and bool(yolox_cost.candidates(**_edge())[0][0, 4 * 8 + 5])
        ),
    ),
    Quirk(
        "yolox.zero-areas-give-nan",
        "boxes.iou_yolox",
        "Two boxes without area have IoU NaN.",
        "Divides 0 by 0: the pairwise IoU has no epsilon.",
        "0.",
        ("N12",),
        _points,
        lambda: bool(iou_yolox(**_points()).isnan().all()),
    ),
    Quirk(
        "yolox.giou-penalises-intersection",
        "boxes.iou_loss_yolox",
        "The tutorial's GIoU loss subtracts the intersection from the enclosing area where the union belongs.",
        "Shifted boxes cost 1.3333 instead of 0.6667; identical boxes cost 0 either way, which hides it.",
        "Subtract the union, as the official code does from 0.2 on.",
        ("N1",),
        _shifted,
        lambda: round(float(iou_loss_yolox(**_shifted())), 4) == 1.3333,
    ),
)
