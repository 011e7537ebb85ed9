"""Stages of the two systems that assign by overlap with fixed boxes: SSD and the anchor head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detoracle.reference import anchor_head, ssd
from detoracle.reference.anchor_head import Thresholds
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reports.stage import Layer, Run, Stage, by_ground_truth, indices, listed, number, result_stage, shade

__all__ = ["anchor_head_stages", "ssd_stages"]


def ssd_stages(run: Run) -> Iterator[Stage]:
    """Stages of `ssd.match`.

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
    valid, priors = run.of("gt_valid")[0], run.arguments["priors"]
    ssd._require_ground_truth(valid, where=f"ssd.match, image {run.image}")
    names = valid.nonzero().flatten()
    overlap = ssd._overlap(priors, run.of("gt_boxes")[0, valid])
    settings = run.settings("threshold", "variances")
    threshold = settings.get("threshold", 0.5)
    result = ssd.match(priors, run.of("gt_boxes"), run.of("gt_labels"), run.of("gt_valid"), **settings)
    yield _overlaps(run, names, overlap, "prior", threshold)
    best, row = ssd._best_ground_truth(overlap)
    unforced = torch.where(best < threshold, BACKGROUND, names[row])
    lines = {int(gt): [str(int((unforced == gt).sum()))] for gt in names}
    yield Stage(
        "Threshold",
        f"Every prior takes the ground truth that it overlaps most, unless that overlap is below {threshold:g}. A "
        "small ground truth, or one between the priors, may so end with none.",
        "Marks: who takes whom by the threshold alone.",
        (Layer("mark", _marked(unforced)),),
        by_ground_truth(["priors over the threshold"], lines, f"{int((unforced >= 0).sum())} priors are positive."),
    )
    yield _forced(run, names, overlap, unforced)
    yield result_stage(run, result.gt_index[0], result.quality[0], "overlap")


def _forced(run: Run, names: Tensor, overlap: Tensor, unforced: Tensor) -> Stage:
    """What the best prior of every ground truth changes."""
    best_prior = ssd._best_prior(overlap)
    _, row = ssd._force(*ssd._best_ground_truth(overlap), best_prior)
    told, lines, outcome = {}, {}, unforced.clone()
    outcome[best_prior] = names[row[best_prior]]
    for number_, (gt, prior) in enumerate(zip(names.tolist(), best_prior.tolist(), strict=True)):
        before = "nobody" if unforced[prior] < 0 else f"ground truth {int(unforced[prior])}"
        kept = int(names[row[prior]])
        last = "" if kept == gt else f"; lost to ground truth {kept}, which comes later"
        value = number(overlap[number_, prior])
        told[prior] = f"{run.named(prior)}: best prior of ground truth {gt}, overlap {value}, before: {before}{last}"
        lines[gt] = [str(prior), value, before, "yes" if kept == gt else f"no, {kept} does"]
    return Stage(
        "Best priors",
        "So that no ground truth goes without, the prior that overlaps it most takes it, whatever the threshold says. "
        "This goes in the order of the ground truths: the last of several that share a best prior keeps it.",
        "Rings: the best prior of each ground truth; marks: who has whom now.",
        (Layer("mark", _marked(outcome)), Layer("ring", dict.fromkeys(told, 0.0), told)),
        by_ground_truth(["best prior", "overlap", "before", "keeps it"], lines, "The best prior of each ground truth."),
    )


def anchor_head_stages(run: Run) -> Iterator[Stage]:
    """Stages of `anchor_head.assign`.

    Parameters
    ----------
    run : Run

    Yields
    ------
    Stage
    """
    names = run.of("gt_valid")[0].nonzero().flatten()
    inside = run.of("inside")[0]
    anchors, boxes = run.arguments["anchors"], run.of("gt_boxes")
    named = {name: run.of(name) for name in ("ignore_boxes", "ignore_valid") if run.arguments.get(name) is not None}
    given = run.settings(
        "pos_iou_thr", "neg_iou_thr", "min_pos_iou", "gt_max_assign_all", "match_low_quality", "ignore_iof_thr",
        "ignore_wrt_candidates",
    )  # fmt: skip
    result = anchor_head.assign(anchors, boxes, run.of("gt_valid"), run.of("inside"), **named, **given)
    usual = {
        "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0.0, "gt_max_assign_all": True,
        "match_low_quality": True,
    }  # fmt: skip
    rules = Thresholds.of(**{name: given.get(name, value) for name, value in usual.items()})
    overlap = unchecked(overlaps_mmdet)(boxes[0, names], anchors)
    ignored = _in_ignored_regions(run, anchors)
    overlap[:, ignored] = -1
    yield _taking_part(run, inside, ignored)
    shown = torch.where(inside, overlap, -torch.inf)
    yield _overlaps(run, names, shown, "anchor", rules.positive)
    by_threshold = torch.where(inside, BACKGROUND, IGNORED)
    claimed = by_threshold.clone()
    if len(names) and bool(inside.any()):
        chosen = anchor_head._by_threshold(overlap[:, inside], rules)
        by_threshold[inside] = anchor_head._named(chosen, run.of("gt_valid")[0])
        after = anchor_head._claimed(chosen, overlap[:, inside], rules) if rules.claims else chosen
        claimed[inside] = anchor_head._named(after, run.of("gt_valid")[0])
    yield _thresholds(rules, names, by_threshold)
    if rules.claims:
        yield _claims(run, rules, names, shown, by_threshold, claimed)
    yield result_stage(run, result.gt_index[0], result.quality[0], "IoU")


def _in_ignored_regions(run: Run, anchors: Tensor) -> Tensor:
    """Anchors (A,) bool that are left out for lying in an ignored region."""
    threshold = run.arguments.get("ignore_iof_thr", -1.0)
    if run.arguments.get("ignore_boxes") is None or run.arguments.get("ignore_valid") is None or threshold <= 0:
        return torch.zeros(len(anchors), dtype=torch.bool)
    regions = run.of("ignore_boxes")[0, run.of("ignore_valid")[0]]
    share = anchor_head._share_ignored(anchors, regions, run.arguments.get("ignore_wrt_candidates", True))
    ignored: Tensor = share > threshold
    return ignored


def _taking_part(run: Run, inside: Tensor, ignored: Tensor) -> Stage:
    regions: tuple[list[float], ...] = ()
    if run.arguments.get("ignore_boxes") is not None:
        regions = tuple(run.of("ignore_boxes")[0, run.of("ignore_valid")[0]].tolist())
    left_out = dict.fromkeys(indices(~inside | ignored), float(IGNORED))
    return Stage(
        "Taking part",
        f"{int(inside.sum())} of {len(inside)} anchors take part: those of valid cells, that do not stick out of the "
        "image further than its border allows. Anchors in an ignored region, if there are any, have all overlaps set "
        "to -1, so that they are neither positive nor background.",
        "Crossed out: anchors left out. Dotted: ignored regions.",
        (Layer("area", areas=regions), Layer("mark", left_out)),
    )


def _overlaps(run: Run, names: Tensor, overlap: Tensor, word: str, threshold: float) -> Stage:
    layers, lines = [], {}
    for row, gt in enumerate(names.tolist()):
        layers.append(shade(run, gt, overlap[row], overlap[row] > 0, {"overlap": overlap[row]}, largest=True))
        best = int(overlap[row].argmax())
        over = str(int((overlap[row] >= threshold).sum()))
        lines[gt] = [number(overlap[row, best]), str(best), str(int((overlap[row] > 0).sum())), over]
    return Stage(
        "Overlap",
        f"How much every {word} overlaps every ground truth: the area they share over the area they cover together. "
        f"Several {word}s of other sizes lie about the same point; the best is drawn on top.",
        f"Shading: the overlap with the chosen ground truth, the darker the larger; it ends at the sixtieth {word}.",
        tuple(layers),
        by_ground_truth(
            ["largest overlap", f"at {word}", f"{word}s that overlap it", f"of them from {threshold:g} on"],
            lines,
            f"The best {word} of each.",
        ),
    )


def _thresholds(rules: Thresholds, names: Tensor, outcome: Tensor) -> Stage:
    low, high = rules.background
    least = f"from {low:g} " if low else ""
    lines = {int(gt): [str(int((outcome == gt).sum()))] for gt in names}
    left_out = int((outcome == IGNORED).sum())
    return Stage(
        "Thresholds",
        f"By its largest overlap, an anchor is background {least}to below {high:g}, and takes the ground truth it "
        f"overlaps most from {rules.positive:g} on. What lies between is left out: neither trained towards a box nor "
        "as background.",
        "Marks: anchors that take a ground truth; crossed out: anchors left out.",
        (Layer("mark", _marked(outcome)),),
        by_ground_truth(
            ["anchors"], lines, f"{int((outcome >= 0).sum())} anchors are positive, {left_out} are left out."
        ),
    )


def _claims(run: Run, rules: Thresholds, names: Tensor, overlap: Tensor, before: Tensor, after: Tensor) -> Stage:
    layers, lines = [Layer("mark", _marked(after))], {}
    for row, gt in enumerate(names.tolist()):
        best = overlap[row].max()
        claims = bool(best >= rules.least)
        tied = indices(overlap[row] == best) if claims else []
        own = tied if rules.claims_all else tied[:1]
        told = {}
        for anchor in own:
            had = "nobody" if before[anchor] < 0 else f"ground truth {int(before[anchor])}"
            told[anchor] = f"{run.named(anchor)}: claimed by ground truth {gt}, overlap {number(best)}, before: {had}"
        layers.append(Layer("ring", dict.fromkeys(own, 0.0), told, gt))
        lost = [anchor for anchor in own if after[anchor] != gt]
        lines[gt] = [number(best), listed(own), listed(lost)]
    who = "all anchors" if rules.claims_all else "the first anchor"
    return Stage(
        "Claims of the ground truths",
        f"So that no ground truth goes without, each in turn claims {who} of its largest overlap, if that is "
        f"{rules.least:g} at least, whatever the thresholds say. A later ground truth overwrites an earlier one.",
        "Rings: what the chosen ground truth claims; marks: who has whom after all claims.",
        tuple(layers),
        by_ground_truth(["largest overlap", "claims", "of them lost to a later one"], lines, "Claims, in their order."),
    )


def _marked(outcome: Tensor) -> dict[int, float]:
    """What is drawn of an outcome (A,): all but background."""
    return {anchor: float(outcome[anchor]) for anchor in indices(outcome != BACKGROUND)}
