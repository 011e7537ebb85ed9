"""Which anchor-head oracle stage each recorded array of a single function is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden.anchor_head_configs import anchors_from, assigning, coding, sampling, term_settings
from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import (
    anchor_head,
    anchor_head_box_terms,
    anchor_head_boxes,
    anchor_head_coder,
    anchor_head_terms,
)
from detoracle.reference.anchor_head import Thresholds
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.explanation import Explanation
from detoracle.reference.rounding import Bounded

__all__ = ["anchor_stages", "as_gt_index", "assignment_stages", "judged", "stages"]

_TERMS: dict[str, Callable[..., Any]] = {
    "focal": anchor_head_terms.sigmoid_focal_loss,
    "cross_entropy": anchor_head_terms.cross_entropy,
    "sigmoid_cross_entropy": anchor_head_terms.sigmoid_cross_entropy,
    "smooth_l1": anchor_head_box_terms.smooth_l1_loss,
    "l1": anchor_head_box_terms.l1_loss,
    "giou": anchor_head_box_terms.giou_loss,
}
_CALLS: list[list[Any]] = [  # reduction, average factor, weighted: what the recorder calls a loss with by default
    ["none", None, False],
    [None, None, False],
    ["sum", None, True],
    [None, 6.0, True],
    [None, 0.0, True],
    [None, 11.0, False],
]


def stages(scene: Recorded) -> Iterator[StageCheck]:
    """Replay a recorded scene of a single function.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck

    Raises
    ------
    InputError
        The scene is of an unknown kind.
    """
    kinds = {"gen": _generator, "coder": _coder, "assigner": _assigner, "sampler": _sampler, "losses": _losses}
    kind = scene.info["kind"]
    if kind not in kinds:
        raise InputError(
            "kind", expected=f"one of loss, {', '.join(kinds)}", got=repr(kind), where=f"recorded scene '{scene.name}'"
        )
    try:
        yield from kinds[kind](scene)
        yield raised(scene, None)
    except UpstreamRaises as behaviour:
        yield raised(scene, behaviour)


def _exact(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, tensor.dtype)


def as_gt_index(assigned: Tensor) -> Tensor:
    """Upstream's outcome (-1 left out, 0 background, from 1 a ground truth) as ours.

    Examples
    --------
    >>> as_gt_index(torch.tensor([-1, 0, 1])).tolist()
    [-2, -1, 0]
    """
    return torch.where(assigned > 0, assigned - 1, torch.where(assigned == 0, BACKGROUND, IGNORED))


def judged(stage: str, ours: Tensor, recorded: Tensor, explanation: Explanation) -> StageCheck:
    """Compare an assignment: ours may differ from the recorded one where the explanation admits both."""
    wrong = explanation.wrong(recorded) | explanation.wrong(ours)
    check = discrete(stage, ours, recorded, open_=~wrong)
    if check.status == "equal" and wrong.any():
        return StageCheck(stage, "different", f"{int(wrong.sum())} recorded outcomes are wrong by the explanation")
    return check


# ------------------------------------------------------------------------------------------------- anchors, coder
def _generator(scene: Recorded) -> Iterator[StageCheck]:
    cfg = scene.info["cfg"]
    generator, sizes = cfg["gen"], [tuple(size) for size in cfg["featmap_sizes"]]
    cells = [_base_anchors(generator, len(sizes), level) for level in range(len(sizes))]
    for level, cell in enumerate(cells):
        yield within(f"base_anchors.{level}", scene.tensor(f"out/base_anchors.{level}"), cell)
    counts = [len(cell) for cell in cells]
    yield discrete("num_base_priors", torch.tensor(counts), scene.tensor("out/num_base_priors"))
    yield from anchor_stages(scene, generator, sizes)
    everything = torch.cat(scene.tensors("out/anchors"))
    for number, shape in enumerate(cfg["pad_shapes"]):
        shapes = torch.tensor([shape])
        valid = anchor_head_boxes.valid_flags(shapes, sizes=sizes, strides=generator["strides"], base_anchors=counts)
        yield discrete(f"valid.{number}", valid[0], scene.tensor(f"out/valid.{number}"))
        prefix = f"inside.{number}.ab"
        for stage in (name for name in scene.outputs if name.startswith(prefix)):
            border = float(stage.removeprefix(prefix))
            inside = anchor_head_boxes.inside_flags(everything, valid, shapes, allowed_border=border)
            yield discrete(stage, inside[0], scene.tensor(f"out/{stage}"))


def _base_anchors(generator: Mapping[str, Any], num_levels: int, level: int) -> Any:
    """Anchors of a level's cell at the origin: those of a map of one cell."""
    sizes = [(1, 1) if other == level else (0, 0) for other in range(num_levels)]
    return anchors_from(generator, sizes, _exact(torch.zeros(())))


def anchor_stages(
    scene: Recorded, generator: Mapping[str, Any], sizes: Sequence[tuple[int, ...]]
) -> Iterator[StageCheck]:
    """Anchors of all levels.

    Parameters
    ----------
    scene : Recorded
    generator : mapping
        The recorded settings of the generator.
    sizes : sequence of (int, int)
        Height and width of each level, in cells.

    Yields
    ------
    StageCheck
    """
    recorded = scene.tensors("out/anchors")
    bounded = anchors_from(generator, sizes, _exact(torch.zeros(())))
    for level, expected in enumerate(bounded.split([len(t) for t in recorded])):
        yield within(f"anchors.{level}", recorded[level], expected)


def _coder(scene: Recorded) -> Iterator[StageCheck]:
    cfg = scene.info["cfg"]
    coder, anchors = cfg.get("coder", {}), scene.tensor("in/anchors")
    if scene.has("out/encode"):
        pair = _exact(anchors), _exact(scene.tensor("in/gt"))
        encoded: Any = unchecked(anchor_head_coder.encode)(*pair, **coding(coder))
        yield within("encode", scene.tensor("out/encode"), encoded)
    settings = coding(coder)
    if coder.get("clip_border", True) and "max_shape" in cfg:
        settings["max_shape"] = cfg["max_shape"]
    if "wh_ratio_clip" in cfg:
        settings["ratio_clip"] = cfg["wh_ratio_clip"]
    if coder.get("add_ctr_clamp"):
        settings["center_clamp"] = coder["ctr_clamp"]
    deltas = scene.tensor("in/deltas")
    decoded: Any = unchecked(anchor_head_coder.decode)(_exact(anchors), _exact(deltas), **settings)
    yield within("decode", scene.tensor("out/decode"), decoded)
    if scene.has("out/decode_grad"):
        plain, fine = (
            _gradient(deltas.to(dtype), lambda d: anchor_head_coder.decode(anchors.to(d), d, **settings), scene)
            for dtype in (deltas.dtype, torch.float64)
        )
        yield gradient("decode_grad", scene.tensor("out/decode_grad"), fine, plain, row=-1)


def _gradient(given: Tensor, function: Any, scene: Recorded) -> Tensor:
    leaf = given.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, scene.tensor("in/cot").to(given))[0]


# ---------------------------------------------------------------------------------------------- assigner, sampler
def _assigner(scene: Recorded) -> Iterator[StageCheck]:
    rules = Thresholds.of(**assigning(scene.info["cfg"]["assigner"], thresholds_only=True))
    labels = scene.tensor("in/gt_labels") if scene.has("in/gt_labels") else None
    yield from assignment_stages(scene, scene.tensor("in/overlaps"), rules, labels, "")


def assignment_stages(
    scene: Recorded, overlaps: Tensor, rules: Thresholds, labels: Tensor | None, suffix: str
) -> Iterator[StageCheck]:
    """Everything that follows from one image's recorded overlaps (G, N).

    Parameters
    ----------
    scene : Recorded
    overlaps : Tensor (G, N) float
    rules : Thresholds
    labels : Tensor (G,) int or None
    suffix : str
        Of the recorded names.

    Yields
    ------
    StageCheck
    """
    empty = overlaps.new_zeros(overlaps.shape[1])
    best = overlaps.amax(0) if overlaps.numel() else empty
    yield within(f"max_overlaps{suffix}", scene.tensor(f"out/max_overlaps{suffix}"), _exact(best))
    assigned = as_gt_index(scene.tensor(f"out/assigned_gt_inds{suffix}"))
    if labels is not None and scene.has(f"out/assigned_labels{suffix}"):
        of_gt = labels[assigned.clamp(min=0)] if len(labels) else torch.full_like(assigned, -1)
        given = scene.tensor(f"out/assigned_labels{suffix}")
        yield discrete(f"assigned_labels{suffix}", torch.where(assigned >= 0, of_gt, -1), given)
    if not scene.has(f"out/gt_inds_step3{suffix}"):
        yield discrete(f"assigned_gt_inds{suffix}", anchor_head._assign(overlaps, rules), assigned)
        return
    for axis, value, index in ((0, None, "argmax_overlaps"), (1, "gt_max_overlaps", "gt_argmax_overlaps")):
        largest, place = overlaps.max(axis)
        given = scene.tensor(f"out/{index}{suffix}")
        tied = overlaps.gather(axis, given.unsqueeze(axis)).squeeze(axis) == largest
        yield discrete(f"{index}{suffix}", place, given, open_=tied)
        if value is not None:
            yield within(f"{value}{suffix}", scene.tensor(f"out/{value}{suffix}"), _exact(largest))
    low, high = rules.background
    background = torch.where((best >= low) & (best < high), BACKGROUND, IGNORED)
    yield discrete(f"gt_inds_step2{suffix}", background, as_gt_index(scene.tensor(f"out/gt_inds_step2{suffix}")))
    by_threshold = as_gt_index(scene.tensor(f"out/gt_inds_step3{suffix}"))
    tied = overlaps.gather(0, by_threshold.clamp(min=0)[None])[0] == best
    yield discrete(f"gt_inds_step3{suffix}", anchor_head._by_threshold(overlaps, rules), by_threshold, open_=tied)
    claimed = anchor_head._claimed(by_threshold, overlaps, rules) if rules.claims else by_threshold
    yield discrete(f"assigned_gt_inds{suffix}", claimed, assigned)


def _sampler(scene: Recorded) -> Iterator[StageCheck]:
    cfg = scene.info["cfg"]
    labels = scene.tensor("in/gt_labels")[None] if scene.has("in/gt_labels") else None
    gt_index, gt_boxes = as_gt_index(scene.tensor("in/gt_inds")), scene.tensor("in/gt_bboxes")
    present = torch.ones(1, len(gt_boxes), dtype=torch.bool)
    settings = sampling(cfg["sampler"], cfg["seed"])
    positive, negative, added = (t[0] for t in anchor_head.sample(gt_index[None], labels, present, **settings))
    yield discrete("pos_inds", torch.cat([added, positive]).nonzero().flatten(), scene.tensor("out/pos_inds"))
    yield discrete("neg_inds", negative.nonzero().flatten() + len(added), scene.tensor("out/neg_inds"))
    boxes = torch.cat([gt_boxes[: len(added)], scene.tensor("in/bboxes")])
    matched = torch.cat([torch.arange(len(added)), gt_index])
    chosen, others = scene.tensor("out/pos_inds"), scene.tensor("out/neg_inds")
    yield discrete("pos_is_gt", chosen < len(added), scene.tensor("out/pos_is_gt"))
    yield discrete("pos_assigned_gt_inds", matched[chosen], scene.tensor("out/pos_assigned_gt_inds"))
    yield discrete("pos_bboxes", boxes[chosen], scene.tensor("out/pos_bboxes"))
    yield discrete("neg_bboxes", boxes[others], scene.tensor("out/neg_bboxes"))
    yield discrete("pos_gt_bboxes", gt_boxes[matched[chosen]], scene.tensor("out/pos_gt_bboxes"))


# --------------------------------------------------------------------------------------------------------- losses
def _losses(scene: Recorded) -> Iterator[StageCheck]:
    cfg = scene.info["cfg"]
    kind, settings = term_settings(cfg["loss"])
    predicted = scene.tensor("in/pred").to(getattr(torch, cfg.get("dtype", "float32")))
    target, weight = scene.tensor("in/target"), scene.tensor("in/weight")
    for number, (reduction, avg_factor, weighs) in enumerate(cfg.get("only", _CALLS)):
        reducing = {"reduction": reduction or "mean", "avg_factor": avg_factor, **settings}

        def term(given: Any, *, weights: Any, against: Tensor = target, reducing: dict[str, Any] = reducing) -> Any:
            return unchecked(_TERMS[kind])(given, against, weights, **reducing)

        bounded = term(_exact(predicted), weights=_exact(weight) if weighs else None)
        yield within(f"{number}.value", scene.tensor(f"out/{number}.value"), bounded)
        if scene.has(f"out/{number}.grad"):
            plain, fine = (
                _gradient_of_sum(term, predicted.to(dtype), weight if weighs else None)
                for dtype in (predicted.dtype, torch.float64)
            )
            yield gradient(f"{number}.grad", scene.tensor(f"out/{number}.grad"), fine, plain, row=-1)


def _gradient_of_sum(term: Any, predicted: Tensor, weight: Tensor | None) -> Tensor:
    leaf = predicted.clone().requires_grad_()
    wide = weight.double() if weight is not None and leaf.dtype == torch.float64 else weight
    return torch.autograd.grad(term(leaf, weights=wide).sum(), leaf)[0]
