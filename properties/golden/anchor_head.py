"""Which anchor-head oracle stage each recorded array of a loss is; `anchor_head_units` has the single functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden import anchor_head_units as units
from detoracle.properties.golden.anchor_head_configs import anchors_from, assigning, loss_settings, padded, ssd_settings
from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, uncovered, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import anchor_head, anchor_head_boxes, anchor_head_loss, anchor_head_ssd
from detoracle.reference.anchor_head import Thresholds
from detoracle.reference.anchor_head_loss import Batch, Options
from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain.anchor_head import explain_assign
from detoracle.reference.explain.anchor_head_loss import _bounded, explain_ssd_loss, loss_given, ssd_loss_given
from detoracle.reference.rounding import Bounded

__all__ = ["UNCHECKED", "replay"]

UNCHECKED = {"derived_*": "a hint of the recorder's, not upstream output"}


def replay(scene: Recorded) -> Iterator[StageCheck]:
    """Replay one recorded scene through every stage of the anchor head's oracle.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck
        One for each recorded output, one for the exception; ``assign`` and ``hard_negatives`` for the assignment from
        anchors and ground truths alone.

    Raises
    ------
    InputError
        The scene is of an unknown kind.
    """
    checks = []
    for check in _stages(scene) if scene.info["kind"] == "loss" else units.stages(scene):
        checks.append(check)
        yield check
    yield from uncovered(scene, {check.stage for check in checks}, UNCHECKED)


def _stages(scene: Recorded) -> Iterator[StageCheck]:
    error, arguments = None, None
    try:
        arguments = _arguments(scene)
        _oracle(scene)(**arguments)
    except UpstreamRaises as behaviour:
        error = behaviour
    yield from _returned(scene, error)
    if arguments is None or not scene.has("out/anchors.0"):
        return
    yield from _anchors(scene, arguments)
    num_images = len(arguments["gt_valid"])
    assigned = [scene.has(f"out/assigned_gt_inds.{image}") for image in range(num_images)]
    for image in range(num_images):
        if assigned[image]:
            yield from _assignment(scene, image, arguments)
    if not all(assigned):
        return
    recorded = _recorded_assignment(scene)
    yield _whole_assignment(scene, arguments, recorded)
    if scene.has("out/labels.0"):
        yield from _targets(scene, arguments, recorded)
    if scene.has("out/loss_total"):
        yield from _losses(scene, arguments, recorded)


def _returned(scene: Recorded, error: UpstreamRaises | None) -> Iterator[StageCheck]:
    """The exception, or that there was no loss at all, for which the oracle raises."""
    no_loss = error is not None and error.behaviour == "anchor_head.no-anchor-inside"
    recorded_none = scene.has("out/returned_none") and bool(scene.tensor("out/returned_none"))
    if no_loss and recorded_none and error is not None:
        yield StageCheck("raises", "equal", f"{error.behaviour} for no loss at all")
    else:
        yield raised(scene, error)
    if scene.has("out/returned_none"):
        yield discrete("returned_none", torch.tensor(no_loss), scene.tensor("out/returned_none"))


def _is_ssd(scene: Recorded) -> bool:
    return bool(scene.info["cfg"]["head"] == "ssd")


def _oracle(scene: Recorded) -> Any:
    return anchor_head_ssd.ssd_loss if _is_ssd(scene) else anchor_head_loss.loss


def _exact(tensor: Tensor) -> Any:
    return Bounded.exact(tensor, tensor.dtype)


# ------------------------------------------------------------------------------------------------------ arguments
def _arguments(scene: Recorded) -> dict[str, Any]:
    """Arguments of the oracle's loss."""
    cfg = scene.info["cfg"]
    dtype = getattr(torch, cfg.get("dtype", "float32"))
    cls_scores, bbox_preds = (
        [t.to(dtype) for t in scene.tensors(f"in/{name}")] for name in ("cls_scores", "bbox_preds")
    )
    gt_boxes, gt_valid = padded(scene.tensors("in/gt_bboxes"), (4,))
    gt_labels = torch.zeros(gt_valid.shape, dtype=torch.int64)
    if cfg["use_labels"]:
        gt_labels, has_label = padded(scene.tensors("in/gt_labels"), ())
        if not torch.equal(has_label, gt_valid):
            # Padded ground truths cannot even say this.
            raise UpstreamRaises(
                "anchor_head.fewer-labels-than-boxes", expected="a label for each box", got="fewer", where=scene.name
            )
    regions = [
        scene.tensor(key) if scene.has(key) else torch.zeros(0, 4)
        for key in (f"in/gt_ignore.{image}" for image in range(len(gt_valid)))
    ]
    ignore_boxes, ignore_valid = padded(regions, (4,))
    sizes, recorded = [tuple(level.shape[2:]) for level in cls_scores], scene.tensors("out/anchors")
    return {
        "cls_scores": cls_scores,
        "bbox_preds": bbox_preds,
        "anchors": torch.cat(recorded) if recorded else anchors_from(cfg["anchor_generator"], sizes, torch.zeros(())),
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_valid": gt_valid,
        "image_shapes": scene.tensor("in/img_shape"),
        "pad_shapes": scene.tensor("in/pad_shape"),
        "ignore_boxes": ignore_boxes,
        "ignore_valid": ignore_valid,
        **(ssd_settings(cfg) if _is_ssd(scene) else loss_settings(cfg)),
    }


def _recorded_assignment(scene: Recorded) -> Tensor:
    """Recorded outcome (B, A) of the assignment."""
    images = []
    for image, inside in enumerate(scene.tensors("out/inside_flags")):
        assigned = scene.tensor(f"out/assigned_gt_inds.{image}")
        outcome = torch.full(inside.shape, IGNORED)
        outcome[inside] = units.as_gt_index(assigned)
        images.append(outcome)
    return torch.stack(images)


# --------------------------------------------------------------------------------------------------------- stages
def _anchors(scene: Recorded, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Anchors and flags."""
    sizes = [tuple(level.shape[2:]) for level in arguments["cls_scores"]]
    yield from units.anchor_stages(scene, scene.info["cfg"]["anchor_generator"], sizes)
    counts = [level.shape[1] // 4 for level in arguments["bbox_preds"]]
    flags = {"strides": arguments["strides"], "sizes": sizes, "base_anchors": counts}
    valid = anchor_head_boxes.valid_flags(arguments["pad_shapes"], **flags)
    inside = anchor_head_boxes.inside_flags(
        arguments["anchors"], valid, arguments["image_shapes"], allowed_border=arguments["allowed_border"]
    )
    for name, got in (("valid_flags", valid), ("inside_flags", inside)):
        for image, row in enumerate(got):
            if scene.has(f"out/{name}.{image}"):
                yield discrete(f"{name}.{image}", row, scene.tensor(f"out/{name}.{image}"))


def _assignment(scene: Recorded, image: int, arguments: dict[str, Any]) -> Iterator[StageCheck]:
    """Overlaps and assignment of one image, each from the recorded results of the stage before."""
    inside, overlaps = scene.tensor(f"out/inside_flags.{image}"), scene.tensor(f"out/overlaps.{image}")
    boxes, present = arguments["anchors"][inside], arguments["gt_valid"][image]
    expected: Any = unchecked(overlaps_mmdet)(_exact(arguments["gt_boxes"][image, present]), _exact(boxes))
    if scene.has(f"out/ignore_max_overlaps.{image}"):
        regions = arguments["ignore_boxes"][image, arguments["ignore_valid"][image]]
        share = scene.tensor(f"out/ignore_max_overlaps.{image}")
        of_boxes = arguments.get("ignore_wrt_candidates", True)
        ours: Any = anchor_head._share_ignored(_exact(boxes), _exact(regions), of_boxes)
        yield within(f"ignore_max_overlaps.{image}", share, ours)
        expected = torch.where(share > arguments["ignore_iof_thr"], -1.0, expected)
    yield within(f"overlaps.{image}", overlaps, expected)
    rules = Thresholds.of(**assigning(scene.info["cfg"]["assigner"], thresholds_only=True))
    suffix = f".{image}"
    yield from units.assignment_stages(scene, overlaps, rules, arguments["gt_labels"][image, present], suffix)


def _whole_assignment(scene: Recorded, arguments: dict[str, Any], recorded: Tensor) -> StageCheck:
    """The assignment from anchors and ground truths alone."""
    given = {
        "anchors": arguments["anchors"],
        "inside": torch.stack(scene.tensors("out/inside_flags")),
        **{name: arguments[name] for name in ("gt_boxes", "gt_valid", "ignore_boxes", "ignore_valid")},
        **assigning(scene.info["cfg"]["assigner"]),
    }
    return units.judged("assign", anchor_head.assign(**given).gt_index, recorded, explain_assign(**given))


def _options(scene: Recorded, arguments: Mapping[str, Any]) -> Options:
    given = {name: arguments[name] for name in Options.__dataclass_fields__ if name in arguments}
    return Options(**{**given, "class_loss": "cross_entropy"}) if _is_ssd(scene) else Options(**given)


def _targets(scene: Recorded, arguments: dict[str, Any], recorded: Tensor) -> Iterator[StageCheck]:
    """Samples and targets of the recorded assignment, targets of the recorded samples."""
    options = _options(scene, arguments)
    sampled = anchor_head_loss._sampled(recorded, options)
    given = {}
    for name, ours in zip(("pos_inds", "neg_inds"), sampled, strict=True):
        given[name] = torch.zeros_like(ours)
        for image, inside in enumerate(scene.tensors("out/inside_flags")):
            chosen = scene.tensor(f"out/{name}.{image}")
            yield discrete(f"{name}.{image}", ours[image, inside].nonzero().flatten(), chosen)
            given[name][image, inside.nonzero().flatten()[chosen]] = True
    batch, num_classes = _bounded(_batch(arguments), arguments["cls_scores"][0].dtype), scene.info["cfg"]["num_classes"]
    results: Any = anchor_head_loss._targets(
        recorded, batch, given["pos_inds"], given["neg_inds"], num_classes, options
    )
    per_level = [torch.split(t, batch.num_anchors, 1) for t in results[:4]]
    for name, levels in zip(("labels", "label_weights", "bbox_targets", "bbox_weights"), per_level, strict=True):
        for level, expected in enumerate(levels):
            target = scene.tensor(f"out/{name}.{level}")
            if isinstance(expected, Bounded):
                yield within(f"{name}.{level}", target, expected)
            else:
                yield discrete(f"{name}.{level}", expected, target)
    counts = {"num_total_pos": results[4], "num_total_neg": results[5]}
    counts["num_total_samples"] = results[4] + results[5] if anchor_head_loss._samples(options) else results[4]
    for name, count in counts.items():
        yield discrete(name, count, scene.tensor(f"out/{name}"))
    for level, anchors in enumerate(torch.split(batch.anchors, batch.num_anchors)):
        if scene.has(f"out/decoded.{level}"):
            rows = anchor_head_loss._rows(batch.bbox_preds[level], 4)
            decoded: Any = anchor_head_loss._predicted(anchors, rows, options)
            yield within(f"decoded.{level}", scene.tensor(f"out/decoded.{level}"), decoded)


def _batch(arguments: Mapping[str, Any]) -> Batch:
    return Batch(**{name: arguments[name] for name in Batch._fields})


def _losses(scene: Recorded, arguments: dict[str, Any], recorded: Tensor) -> Iterator[StageCheck]:
    """Losses and gradients of the recorded assignment; with hard negatives, of those that the gradients tell."""
    dtype, given = arguments["cls_scores"][0].dtype, loss_given
    if _is_ssd(scene):
        given = ssd_loss_given
        ours, recorded = (_mined(scene, arguments, recorded, ties_by_gradient=told) for told in (False, True))
        yield units.judged("hard_negatives", ours, recorded, explain_ssd_loss(**arguments, dtype=dtype))
    bounded = given(recorded, **arguments, dtype=dtype)
    for name, part in (("loss_cls", "classification"), ("loss_bbox", "box")):
        for number, value in enumerate(bounded[part].unbind()):
            yield within(f"{name}.{number}", scene.tensor(f"out/{name}.{number}").reshape(()), value)
    yield within("loss_total", scene.tensor("out/loss_total").reshape(()), bounded["total"])
    plain, fine = _gradients(given, recorded, arguments), _gradients(given, recorded, _in_double(arguments))
    for stage, names in (("grad_cls", "cls_scores"), ("grad_bbox", "bbox_preds")):
        for level in range(len(arguments[names])):
            key = f"{stage}.{level}"
            if scene.has(f"out/{key}"):
                yield gradient(key, scene.tensor(f"out/{key}"), fine[names][level], plain[names][level])


def _mined(scene: Recorded, arguments: dict[str, Any], recorded: Tensor, *, ties_by_gradient: bool) -> Tensor:
    """Positives, hard negatives (-1) and other anchors (-2) of the recorded assignment.

    Ties are broken by index, or in favour of the anchors whose class the recorded gradients train.
    """
    batch = _batch(arguments)
    rows = anchor_head_ssd._SsdRows.of(recorded, batch, _options(scene, arguments))
    gradients = [anchor_head_loss._rows(level, batch.columns) for level in scene.tensors("out/grad_cls")]
    trained = (torch.cat(gradients, dim=1) != 0).any(-1) & ties_by_gradient
    images = []
    for image, (cost, background, number) in enumerate(rows.candidates(arguments["neg_pos_ratio"])):
        order = (~trained[image]).int().argsort(stable=True)
        mined = torch.zeros_like(background)
        mined[order] = anchor_head_ssd._hardest(cost[order], background[order], number)
        outcome = torch.where(mined, BACKGROUND, IGNORED)
        images.append(torch.where(recorded[image] >= 0, recorded[image], outcome))
    return torch.stack(images)


def _in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    def double(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [tensor.double() for tensor in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in arguments.items()}


def _gradients(given: Any, gt_index: Tensor, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    maps = {
        name: [level.clone().requires_grad_() for level in arguments[name]] for name in ("cls_scores", "bbox_preds")
    }
    total = given(gt_index, **{**arguments, **maps}, dtype=None)["total"]
    leaves = [level for levels in maps.values() for level in levels]
    found = iter(torch.autograd.grad(total, leaves))
    return {name: [next(found) for _ in levels] for name, levels in maps.items()}
