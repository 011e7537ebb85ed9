"""Stages of YOLOv8's task-aligned assignment."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from detoracle.reference import yolov8
from detoracle.reports.record import Table
from detoracle.reports.stage import Layer, Run, Stage, by_ground_truth, indices, listed, number, result_stage, shade

__all__ = ["yolov8_stages"]


def yolov8_stages(run: Run) -> Iterator[Stage]:
    """Stages of `yolov8.assign`.

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
    points, valid = run.arguments["anchor_points"], run.of("gt_valid")
    given = run.of("scores"), run.of("boxes"), points, run.of("gt_boxes"), run.of("gt_labels"), valid
    powers, topk = run.settings("alpha", "beta"), run.settings("topk")
    result = yolov8.assign(*given, **{**powers, **topk})
    metrics, overlaps, insides = yolov8.align(*given, **powers)
    metric, overlap, inside = metrics[0], overlaps[0], insides[0] & valid[0][:, None]
    most = topk.get("topk", 10)
    top = yolov8._claim(metric, valid[0], most)
    gts = indices(valid[0])
    yield _inside(gts, inside)
    yield _metric(run, gts, metric, overlap, inside)
    yield _claims(run, gts, metric, inside, top, most)
    yield _conflicts(run, overlap, top & inside, result.gt_index[0])
    yield result_stage(run, result.gt_index[0], result.quality[0], "quality")


def _inside(gts: list[int], inside: Tensor) -> Stage:
    layers = [Layer("shade", dict.fromkeys(indices(inside.any(0)), 0.0))]
    layers += [Layer("shade", dict.fromkeys(indices(inside[gt]), 1.0), gt=gt) for gt in gts]
    lines = {gt: [str(int(inside[gt].sum()))] for gt in gts}
    note = f"{int(inside.any(0).sum())} of {inside.shape[1]} anchors lie inside a ground truth."
    return Stage(
        "Candidates",
        "An anchor point can be assigned to the ground truths that it lies inside of, a hair's breadth from each side.",
        "Light: anchors inside some ground truth. Dark: those inside the chosen one.",
        tuple(layers),
        by_ground_truth(["anchors inside"], lines, note),
    )


def _metric(run: Run, gts: list[int], metric: Tensor, overlap: Tensor, inside: Tensor) -> Stage:
    alpha, beta = (run.arguments.get(name, usual) for name, usual in (("alpha", 0.5), ("beta", 6.0)))
    layers, lines = [], {}
    for gt in gts:
        told = {"metric": metric[gt], "overlap": overlap[gt]}
        layers.append(shade(run, gt, metric[gt], inside[gt], told, largest=True))
        best = int(metric[gt].argmax())
        positive = str(int((metric[gt] > 0).sum()))
        lines[gt] = [number(metric[gt, best]), str(best), number(overlap[gt, best]), positive]
    columns = ["largest metric", "at anchor", "overlap there", "anchors of positive metric"]
    return Stage(
        "Metric",
        f"How well the prediction of each anchor inside suits the ground truth: the probability of its class to the "
        f"power {alpha:g}, times the overlap (CIoU) to the power {beta:g}. So both tasks must do well.",
        "Shading: the metric for the chosen ground truth, the darker the better; it ends at the sixtieth best.",
        tuple(layers),
        by_ground_truth(columns, lines, "The best anchor of each."),
    )


def _claims(run: Run, gts: list[int], metric: Tensor, inside: Tensor, top: Tensor, most: int) -> Stage:
    claims = top & inside
    contested = indices(claims.sum(0) > 1)
    layers, lines = [], {}
    for gt in gts:
        own = indices(claims[gt])
        told = {anchor: f"{run.named(anchor)}, metric {number(metric[gt, anchor])}" for anchor in own}
        layers.append(Layer("mark", dict.fromkeys(own, float(gt)), told, gt))
        lost, zero = int((top[gt] & ~inside[gt]).sum()), int((metric[gt, own] == 0).sum())
        lines[gt] = [listed(own), str(len(set(own) & set(contested))), str(zero), str(lost)]
    told = {anchor: f"{run.named(anchor)}, claimed by {listed(indices(claims[:, anchor]))}" for anchor in contested}
    layers.append(Layer("ring", dict.fromkeys(contested, 0.0), told))
    columns = ["anchors claimed", "of them contested", "of them of metric 0", "claims wasted outside"]
    return Stage(
        "Claims",
        f"Every ground truth claims the {most} anchors of its largest metric. Where fewer are positive, anchors of "
        "metric zero fill up, in no order that the published code promises; of these, only those inside count.",
        "Marks: what the chosen ground truth claims. Rings: anchors that several ground truths claim.",
        tuple(layers),
        by_ground_truth(columns, lines, f"{len(contested)} anchors are contested."),
    )


def _conflicts(run: Run, overlap: Tensor, claims: Tensor, gt_index: Tensor) -> Stage:
    contested = indices(claims.sum(0) > 1)
    margin = run.explanation.margin[run.image]
    told, lines = {}, []
    for anchor in contested:
        claimants = [f"{gt} at {number(overlap[gt, anchor])}" for gt in indices(claims[:, anchor])]
        winner = int(gt_index[anchor])
        given = str(winner) if bool(claims[winner, anchor]) else f"{winner}, which did not claim it"
        told[anchor] = f"{run.named(anchor)}, claimed by {listed(claimants)}, goes to {given}"
        lines.append([str(anchor), listed(claimants), given, number(margin[anchor])])
    outcomes = {anchor: float(gt_index[anchor]) for anchor in indices(gt_index >= 0)}
    return Stage(
        "Conflicts",
        "An anchor can be trained towards one ground truth only. A contested one goes to the ground truth that its "
        "prediction overlaps most, over all of the image, also to one that did not claim it.",
        "Rings: contested anchors, marked by who gets them.",
        (Layer("mark", outcomes), Layer("ring", dict.fromkeys(contested, 0.0), told)),
        Table(
            "contested anchors",
            f"{len(lines)} anchors are contested.",
            ("anchor", "claimed by, at overlap", "goes to", "margin"),
            lines,
        ),
    )
