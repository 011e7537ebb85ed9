"""Stages of the two systems with a dynamic k: YOLOX and RTMDet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detoracle.reference import rtmdet, yolox, yolox_cost
from detoracle.reports.record import Table
from detoracle.reports.stage import (
    Layer,
    Run,
    Stage,
    by_ground_truth,
    indices,
    listed,
    number,
    result_stage,
    shade,
)

__all__ = ["rtmdet_stages", "yolox_stages"]


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Ground truths and anchors of one image: (G, A), of all padded ground truths."""

    valid: Tensor
    candidate: Tensor
    near: Tensor
    cost: Tensor
    iou: Tensor
    dynamic_k: Tensor
    top: int

    @property
    def gts(self) -> list[int]:
        """Ground truths that take part."""
        return indices(self.valid)

    def claims(self) -> Tensor:
        """Who claims whom, (G, A) bool."""
        claims = torch.zeros_like(self.cost, dtype=torch.bool)
        if bool(self.candidate.any()) and bool(self.valid.any()):
            found = yolox._claim(self.cost[self.valid][:, self.candidate], self.dynamic_k[self.valid])
            claims[self.valid[:, None] & self.candidate] = found.flatten()
        return claims


def yolox_stages(run: Run) -> Iterator[Stage]:
    """Stages of `yolox.assign`.

    Parameters
    ----------
    run : Run

    Yields
    ------
    Stage

    Raises
    ------
    UpstreamRaises
        As the oracle.
    """
    flavour = run.settings("flavour")
    rules = yolox_cost.FLAVOURS[flavour.get("flavour", "tutorial")]
    points, strides = run.arguments["anchor_points"], run.arguments["anchor_strides"]
    boxes, labels = run.of("gt_boxes"), run.of("gt_labels")
    counted = yolox.counted_ground_truths(boxes, labels, run.of("gt_valid"), **flavour)
    candidate, geometry = yolox_cost.candidates(points, strides, boxes, counted, **flavour)
    cost, iou = yolox_cost.cost(run.of("predictions"), boxes, labels, counted, candidate, geometry, **flavour)
    gt_index, dynamic_k = yolox.dynamic_k_matching(cost, iou, candidate, counted)
    near, _ = yolox_cost._candidates(points, strides, boxes[0], rules)
    pairs = _Pairs(counted[0], candidate[0], near, cost[0], iou[0], dynamic_k[0], yolox._TOP_CANDIDATES)
    reach = f"within {rules.center_radius:g} strides of its centre"
    where = f"inside its box or {reach}" if rules.box_counts else reach
    preferred = f"inside the box and {reach}" if rules.box_counts else "near that very ground truth"
    yield _candidates(
        pairs,
        f"An anchor point may be assigned at all if it lies {where}, for some ground truth. A pair is preferred if "
        f"the point is {preferred}; others cost {number(rules.penalty)} more. A point exactly on an edge is outside.",
        {gt: _squares(boxes[0, gt], strides, rules.center_radius) for gt in pairs.gts},
        geometry[0],
    )
    yield _cost(
        run,
        pairs,
        "How badly each candidate suits each ground truth: the binary cross entropy of its class probabilities (times "
        "objectness, under a root), plus 3 times -log(IoU), plus the penalty.",
    )
    yield from _matching(run, pairs, gt_index[0], yolox._matched_iou(gt_index, iou)[0])


def rtmdet_stages(run: Run) -> Iterator[Stage]:
    """Stages of `rtmdet.assign`.

    Parameters
    ----------
    run : Run

    Yields
    ------
    Stage

    Raises
    ------
    UpstreamRaises
        As the oracle.
    """
    priors, inside, valid = run.arguments["priors"], run.of("inside"), run.of("gt_valid")
    boxes, labels = run.of("gt_boxes"), run.of("gt_labels")
    candidate = rtmdet.candidates(priors, inside, boxes, valid)
    weights = run.settings("soft_center_radius", "iou_weight")
    masks = {} if run.arguments.get("gt_masks") is None else {"gt_masks": run.of("gt_masks")}
    cost, iou = rtmdet.cost(
        run.of("class_logits"), run.of("boxes"), priors, candidate, boxes, labels, valid, **masks, **weights
    )
    topk = run.settings("topk")
    gt_index, dynamic_k = rtmdet.dynamic_k_matching(cost, iou, candidate, valid, **topk)
    near = yolox_cost._inside(priors[:, :2], boxes[0][:, None])
    pairs = _Pairs(valid[0], candidate[0], near, cost[0], iou[0], dynamic_k[0], topk.get("topk", 13))
    yield _candidates(
        pairs,
        "A prior may be assigned at all if it lies strictly inside some ground truth. It is then a candidate for all "
        "others too, also those it lies outside of.",
        {},
        inside.new_zeros(0),
    )
    yield _cost(
        run,
        pairs,
        "How badly each candidate suits each ground truth: a soft classification cost whose target is the IoU, plus "
        f"{weights.get('iou_weight', 3.0):g} times -log(IoU), plus 10 to the power of the distance from the centre in "
        f"strides less {weights.get('soft_center_radius', 3.0):g}.",
    )
    gt_index = torch.where(inside, gt_index, -2)
    yield from _matching(run, pairs, gt_index[0], yolox._matched_iou(gt_index, iou)[0])


def _squares(box: Tensor, strides: Tensor, radius: float) -> tuple[list[float], ...]:
    """Squares about a ground truth's centre, one a level."""
    x, y = box[:2].tolist()
    sides = [radius * stride for stride in sorted(set(strides.tolist()))]
    return tuple([x - side, y - side, x + side, y + side] for side in sides)


def _candidates(pairs: _Pairs, text: str, areas: Mapping[int, tuple[list[float], ...]], geometry: Tensor) -> Stage:
    every = Layer("shade", dict.fromkeys(indices(pairs.candidate), 0.0))
    own = [Layer("shade", dict.fromkeys(indices(pairs.near[gt]), 0.5), gt=gt) for gt in pairs.gts]
    own += [Layer("shade", dict.fromkeys(indices(geometry[gt]), 1.0), gt=gt) for gt in pairs.gts if len(geometry)]
    squares = [Layer("area", gt=gt, areas=found) for gt, found in areas.items()]
    lines = {
        gt: [str(int(pairs.near[gt].sum())), *([str(int(geometry[gt].sum()))] if len(geometry) else [])]
        for gt in pairs.gts
    }
    note = f"{int(pairs.candidate.sum())} of {len(pairs.candidate)} anchors are candidates."
    legend = "Light: all candidates of the image. Darker: those near the chosen ground truth."
    return Stage(
        "Candidates",
        text,
        legend + (" Darkest: preferred pairs. Dotted squares: reach of its centre, one a level." if areas else ""),
        (every, *squares, *own),
        by_ground_truth(["anchors near it", *(["of them preferred"] if len(geometry) else [])], lines, note),
    )


def _cost(run: Run, pairs: _Pairs, text: str) -> Stage:
    layers, lines = [], {}
    for gt in pairs.gts:
        layers.append(
            shade(
                run, gt, pairs.cost[gt], pairs.candidate, {"cost": pairs.cost[gt], "IoU": pairs.iou[gt]}, largest=False
            )
        )
        best = int(pairs.cost[gt].argmin())
        lines[gt] = [number(pairs.cost[gt, best]), str(best), number(pairs.iou[gt, best]), number(pairs.iou[gt].max())]
    columns = ["smallest cost", "at anchor", "with IoU", "largest IoU"]
    legend = "Shading: the cost for the chosen ground truth, the darker the cheaper; it ends at the sixtieth cheapest."
    return Stage("Cost", text, legend, tuple(layers), by_ground_truth(columns, lines, "The best pair of each."))


def _matching(run: Run, pairs: _Pairs, gt_index: Tensor, quality: Tensor) -> Iterator[Stage]:
    claims = pairs.claims()
    yield _dynamic_k(run, pairs)
    yield _claims(run, pairs, claims)
    yield _conflicts(run, pairs, claims, gt_index)
    yield result_stage(run, gt_index, quality, "IoU")


def _dynamic_k(run: Run, pairs: _Pairs) -> Stage:
    layers, lines = [], {}
    ranges = run.explanation.worlds[run.image][0].k_range
    for gt in pairs.gts:
        order = pairs.iou[gt].masked_fill(~pairs.candidate, -1).argsort(descending=True, stable=True)
        best = [anchor for anchor in order[: pairs.top].tolist() if pairs.candidate[anchor]]
        told = {anchor: f"{run.named(anchor)}, IoU {number(pairs.iou[gt, anchor])}" for anchor in best}
        layers.append(Layer("ring", dict.fromkeys(best, 0.0), told, gt))
        known = "" if ranges is None or ranges[0][gt] == ranges[1][gt] else f"{ranges[0][gt]} or {ranges[1][gt]}"
        values = [number(pairs.iou[gt, anchor]) for anchor in best if pairs.iou[gt, anchor] > 0]
        total = pairs.iou[gt, torch.tensor(best, dtype=torch.int64)].sum()
        lines[gt] = [listed(values), f"{float(total):.6g}", str(int(pairs.dynamic_k[gt])), known]
    columns = [f"largest {pairs.top} IoUs above 0", "sum", "k", "k that rounding leaves open"]
    return Stage(
        "Dynamic k",
        f"How many anchors a ground truth may claim: the sum of its {pairs.top} largest IoUs over all candidates, cut "
        "to a whole number, and 1 at least. Where predictions fit well, it gets more.",
        f"Rings: the {pairs.top} candidates whose IoU with the chosen ground truth is largest.",
        tuple(layers),
        by_ground_truth(columns, lines, "The sum decides; where it is within rounding of a whole number, k is open."),
    )


def _claims(run: Run, pairs: _Pairs, claims: Tensor) -> Stage:
    contested = claims.sum(0) > 1
    layers, lines = [], {}
    for gt in pairs.gts:
        own = indices(claims[gt])
        told = {anchor: f"{run.named(anchor)}, cost {number(pairs.cost[gt, anchor])}" for anchor in own}
        layers.append(Layer("mark", dict.fromkeys(own, float(gt)), told, gt))
        lines[gt] = [listed(own), str(int((claims[gt] & contested).sum()))]
    told = {
        anchor: f"{run.named(anchor)}, claimed by {listed(indices(claims[:, anchor]))}" for anchor in indices(contested)
    }
    layers.append(Layer("ring", dict.fromkeys(told, 0.0), told))
    return Stage(
        "Claims",
        "Every ground truth claims its k cheapest candidates; of equal costs, the anchor that comes first.",
        "Marks: what the chosen ground truth claims. Rings: anchors that several ground truths claim.",
        tuple(layers),
        by_ground_truth(
            ["anchors claimed", "of them contested"], lines, f"{int(contested.sum())} anchors are contested."
        ),
    )


def _conflicts(run: Run, pairs: _Pairs, claims: Tensor, gt_index: Tensor) -> Stage:
    contested = indices(claims.sum(0) > 1)
    margin = run.explanation.margin[run.image]
    told, lines = {}, []
    for anchor in contested:
        claimants = [f"{gt} at {number(pairs.cost[gt, anchor])}" for gt in indices(claims[:, anchor])]
        winner = int(gt_index[anchor])
        stranger = winner >= 0 and not bool(claims[winner, anchor])
        given = f"{winner}, which did not claim it" if stranger else str(winner)
        told[anchor] = f"{run.named(anchor)}, claimed by {listed(claimants)}, goes to {given}"
        lines.append(
            [str(anchor), listed(claimants), given, number(pairs.cost[winner, anchor]), number(margin[anchor])]
        )
    columns = ("anchor", "claimed by, at cost", "goes to", "at cost", "margin")
    outcomes: dict[int, Any] = {anchor: float(gt_index[anchor]) for anchor in indices(gt_index >= 0)}
    return Stage(
        "Conflicts",
        "An anchor can be trained towards one ground truth only. A contested one goes to the ground truth with the "
        "smallest cost over all of the image, also to one that did not claim it; some ground truth may end with none.",
        "Rings: contested anchors, marked by who gets them.",
        (Layer("mark", outcomes), Layer("ring", dict.fromkeys(contested, 0.0), told)),
        Table("contested anchors", f"{len(lines)} anchors are contested.", columns, lines),
    )
