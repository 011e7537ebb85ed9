"""Which SSD oracle stage each recorded array is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, uncovered, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import ssd, ssd_boxes
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.boxes import cxcywh_to_xyxy
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.explanation import Explanation
from detoracle.reference.explain.ssd import explain_log_sum_exp, explain_loss, explain_match, loss_given
from detoracle.reference.rounding import Bounded

__all__ = ["UNCHECKED", "replay"]

UNCHECKED = {"derived_*": "a hint of the recorder's, not upstream output"}


def replay(scene: Recorded) -> Iterator[StageCheck]:
    """Replay one recorded scene through every stage of the SSD oracle.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck
        One for each recorded output, one for the exception; ``match`` and ``hard_negatives`` for the assignment from
        the inputs alone.
    """
    checks = []
    for check in _stages(scene):
        checks.append(check)
        yield check
    yield from uncovered(scene, {check.stage for check in checks}, UNCHECKED)


def _stages(scene: Recorded) -> Iterator[StageCheck]:
    if not scene.has("in/loc"):
        yield raised(scene, None)
        yield discrete("priors", ssd.priors(**_prior_settings(scene)), scene.tensor("out/priors"))
        return
    arguments = _arguments(scene)
    error = None
    try:
        ssd.loss(**arguments)
    except UpstreamRaises as behaviour:
        error = behaviour
    yield raised(scene, error)
    priors: Any = _exact(arguments["priors"])
    if scene.has("out/prior_corners"):
        yield within("prior_corners", scene.tensor("out/prior_corners"), cxcywh_to_xyxy(priors))  # type: ignore[arg-type]
    variances = arguments["variances"]
    for image, loc in enumerate(arguments["loc"]):
        yield from _overlaps(scene, image, arguments)
        yield from _match(scene, image, arguments)
        if scene.has(f"out/decoded.{image}"):
            decoded: Any = unchecked(ssd.decode)(_exact(loc), priors, variances=variances)
            yield within(f"decoded.{image}", scene.tensor(f"out/decoded.{image}"), decoded)
    yield from _mining(scene, arguments["conf"])
    if error is None:
        yield from _whole(scene, arguments)


def _exact(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, tensor.dtype)


def _prior_settings(scene: Recorded) -> dict[str, Any]:
    names = ("feature_maps", "steps", "min_sizes", "max_sizes")
    ratios = [ratio.tolist() for ratio in scene.tensors("in/aspect_ratios")]
    return {
        "image_size": int(scene.tensor("in/min_dim")),
        "clip": bool(scene.tensor("in/clip")),
        "aspect_ratios": ratios,
        **{name: scene.tensor(f"in/{name}").tolist() for name in names},
    }


def _arguments(scene: Recorded) -> dict[str, Any]:
    """Arguments of `ssd.loss`."""
    images = scene.tensors("in/target")
    most = max(len(rows) for rows in images)
    boxes = torch.zeros(len(images), most, 4, dtype=images[0].dtype)
    labels = torch.zeros(len(images), most, dtype=torch.int64)
    valid = torch.zeros(len(images), most, dtype=torch.bool)
    for image, rows in enumerate(images):
        boxes[image, : len(rows)], labels[image, : len(rows)] = rows[:, :4], rows[:, 4].long()
        valid[image, : len(rows)] = True
    return {
        **{name: scene.tensor(f"in/{name}") for name in ("loc", "conf", "priors")},
        "gt_boxes": boxes,
        "gt_labels": labels,
        "gt_valid": valid,
        "threshold": float(scene.tensor("in/overlap")),
        "neg_pos": int(scene.tensor("in/neg_pos")),
        # As they take part in the recorded arithmetic.
        "variances": torch.tensor(scene.config["variances"], dtype=images[0].dtype).tolist(),
    }


def _overlaps(scene: Recorded, image: int, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Overlaps of one image, and the largest in each row and column of the recorded ones."""
    if not scene.has(f"out/jaccard.{image}"):
        return
    recorded = scene.tensor(f"out/jaccard.{image}")
    boxes = arguments["gt_boxes"][image, arguments["gt_valid"][image]]
    overlap: Any = ssd_boxes._jaccard(_exact(boxes), _exact(scene.tensor("out/prior_corners")))
    yield within(f"jaccard.{image}", recorded, overlap)
    best, matched = ssd._best_ground_truth(recorded)
    best_prior = ssd._best_prior(recorded)
    for axis, stage, value, index in (
        (0, "best_truth", best, matched),
        (1, "best_prior", recorded.gather(1, best_prior[:, None])[:, 0], best_prior),
    ):
        suffix = f"_before.{image}" if axis == 0 else f".{image}"
        if scene.has(f"out/{stage}_idx{suffix}"):
            given = scene.tensor(f"out/{stage}_idx{suffix}")
            tied = _same(recorded.gather(axis, given.unsqueeze(axis)).squeeze(axis), value)
            yield within(f"{stage}_overlap{suffix}", scene.tensor(f"out/{stage}_overlap{suffix}"), _exact(value))
            yield discrete(f"{stage}_idx{suffix}", index, given, open_=tied)


def _match(scene: Recorded, image: int, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Forced priors, class and box targets of one image, each from the recorded results of the stage before."""
    if not scene.has(f"out/conf_t.{image}"):
        return
    boxes, labels = (arguments[n][image, arguments["gt_valid"][image]] for n in ("gt_boxes", "gt_labels"))
    recorded = {
        name: scene.tensor(f"out/{name}.{image}")
        for name in ("best_truth_overlap_before", "best_truth_idx_before", "best_prior_idx")
    }
    best, matched = ssd._force(*recorded.values())
    yield within(f"best_truth_overlap.{image}", scene.tensor(f"out/best_truth_overlap.{image}"), _exact(best))
    given = scene.tensor(f"out/best_truth_idx.{image}")
    yield discrete(f"best_truth_idx.{image}", matched, given)
    class_target = ssd._class_target(best, given, labels, arguments["threshold"])
    yield discrete(f"conf_t.{image}", class_target, scene.tensor(f"out/conf_t.{image}"))
    yield discrete(f"matched_box.{image}", boxes[given], scene.tensor(f"out/matched_box.{image}"))
    offsets: Any = ssd_boxes._encode(_exact(boxes[given]), _exact(arguments["priors"]), arguments["variances"])
    yield within(f"loc_t_all.{image}", scene.tensor(f"out/loc_t_all.{image}"), offsets)


def _mining(scene: Recorded, conf: Tensor) -> Iterator[StageCheck]:
    """Ranking of the negatives, each step from the recorded results of the one before."""
    if not scene.has("out/log_sum_exp"):
        return
    log_sum_exp = scene.tensor("out/log_sum_exp")
    yield within("log_sum_exp", log_sum_exp, explain_log_sum_exp(conf, dtype=conf.dtype))
    class_target = torch.stack(scene.tensors("out/conf_t"))
    positive = class_target > 0
    yield discrete("pos", positive, scene.tensor("out/pos"))
    mining_loss, order = scene.tensor("out/mining_loss"), scene.tensor("out/mining_order")
    expected: Any = ssd._mining_loss(_exact(log_sum_exp), _exact(conf), class_target)
    yield within("mining_loss", mining_loss, expected)
    ranked = mining_loss.sort(dim=1, descending=True, stable=True)
    tied = _same(mining_loss.gather(1, order), ranked.values)
    yield discrete("mining_order", ranked.indices, order, open_=tied)
    yield discrete("idx_rank", order.argsort(1), scene.tensor("out/idx_rank"))
    number = ssd._num_negatives(positive, int(scene.tensor("in/neg_pos")))
    yield discrete("num_neg", number, scene.tensor("out/num_neg"))
    cut = ranked.values.gather(1, (number - 1).clamp(min=0))
    chosen = ssd._hardest(mining_loss, number)
    recorded = scene.tensor("out/neg")
    same_count = chosen.sum(1, keepdim=True) == recorded.sum(1, keepdim=True)
    yield discrete("neg", chosen, recorded, open_=_same(mining_loss, cut) & same_count)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _whole(scene: Recorded, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """The assignment from the inputs alone; losses and gradients of the recorded assignment."""
    given = torch.stack(scene.tensors("out/best_truth_idx"))
    positive, negative = scene.tensor("out/pos"), scene.tensor("out/neg")
    matched = torch.where(positive, given, BACKGROUND)
    recorded = torch.where(positive, given, torch.where(negative, BACKGROUND, IGNORED))
    ground_truths = {n: arguments[n] for n in ("priors", "gt_boxes", "gt_labels", "gt_valid", "threshold", "variances")}
    dtype = arguments["conf"].dtype
    ours = ssd.match(**ground_truths).gt_index
    yield _assigned("match", ours, matched, explain_match(**ground_truths, dtype=dtype))
    ours = ssd.hard_negatives(arguments["conf"], ours, arguments["gt_labels"], neg_pos=arguments["neg_pos"]).gt_index
    yield _assigned("hard_negatives", ours, recorded, explain_loss(**arguments, dtype=dtype))

    loc, conf, priors, boxes, labels, variances = (
        arguments[n] for n in ("loc", "conf", "priors", "gt_boxes", "gt_labels", "variances")
    )
    image, prior = positive.nonzero(as_tuple=True)
    offsets: Any = ssd_boxes._encode(_exact(boxes[image, given[positive]]), _exact(priors[prior]), variances)
    class_target = ssd._class_of(recorded, labels)
    yield discrete("loc_p", loc[positive], scene.tensor("out/loc_p"))
    yield within("loc_t", scene.tensor("out/loc_t"), offsets)
    yield within("conf_p", scene.tensor("out/conf_p"), _exact(conf[recorded != IGNORED]))
    yield discrete("conf_t_sel", class_target[recorded != IGNORED], scene.tensor("out/conf_t_sel"))
    sums: Any = ssd._loss_sums(_exact(loc), _exact(conf), _exact(priors), _exact(boxes), labels, recorded, variances)
    for stage, total in zip(("sum_l", "sum_c"), sums, strict=True):
        yield within(stage, scene.tensor(f"out/{stage}"), total)
    bounded = loss_given(recorded, **arguments, dtype=dtype)
    yield within("loss_l", scene.tensor("out/loss_l"), bounded["localisation"])
    yield within("loss_c", scene.tensor("out/loss_c"), bounded["classification"])
    plain, fine = _gradients(recorded, arguments), _gradients(recorded, _in_double(arguments))
    for name in ("loc", "conf"):
        yield gradient(f"grad.{name}", scene.tensor(f"out/grad.{name}"), fine[name], plain[name], row=-1)


def _assigned(stage: str, ours: Tensor, recorded: Tensor, explanation: Explanation) -> StageCheck:
    wrong = explanation.wrong(recorded)
    check = discrete(stage, ours, recorded, open_=~wrong)
    if check.status == "equal" and wrong.any():
        return StageCheck(stage, "different", f"{int(wrong.sum())} recorded outcomes are wrong by the explanation")
    return check


def _in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _gradients(gt_index: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("loc", "conf")}
    total: Any = loss_given(gt_index, **{**arguments, **leaves}, dtype=None)["total"]
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
