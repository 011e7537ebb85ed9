"""Which RTMDet oracle stage each recorded array is, and those of the head network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck, discrete, gradient, uncovered
from detoracle.properties.golden.rtmdet_losses import arguments_of_loss, assignment_stages, loss_stages, losses
from detoracle.properties.golden.rtmdet_units import UNITS
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import rtmdet_head, rtmdet_loss
from detoracle.reference.errors import InputError

__all__ = ["UNCHECKED", "replay"]

UNCHECKED = {"derived_*": "a hint of the recorder's, not upstream output"}


def replay(scene: Recorded) -> Iterator[StageCheck]:
    """Replay one recorded scene through every stage of the RTMDet oracle.

    Parameters
    ----------
    scene : Recorded

    Yields
    ------
    StageCheck
        One for each recorded output, and one for the exception, if any.

    Raises
    ------
    InputError
        If the scene is of an unknown kind.
    """
    kinds = {"loss": losses, "net": _network, "net_loss": _network, **UNITS}
    kind = scene.info.get("kind")
    if kind not in kinds:
        raise InputError("kind", expected=f"one of {', '.join(kinds)}", got=repr(kind), where=f"scene '{scene.name}'")
    stages = kinds[kind]
    checks = []
    for check in stages(scene):
        checks.append(check)
        yield check
    yield from uncovered(scene, {check.stage for check in checks}, UNCHECKED)


def _network(scene: Recorded) -> Iterator[StageCheck]:
    """Outputs, running statistics and gradients of a head, by what it does in float64 and in float32."""
    with_loss = scene.info["kind"] == "net_loss"
    cfg = scene.info["cfg"]
    runs = []
    for dtype in (torch.float64, torch.float32):
        head = rtmdet_head.RTMDetSepBNHead(num_classes=cfg["num_classes"], strides=cfg["strides"], **cfg["net"])
        state = {k.removeprefix("in/sd."): scene.tensor(k) for k in scene.arrays if k.startswith("in/sd.")}
        head.load_state_dict(state)
        runs.append(_run(scene, head.to(dtype), dtype, with_loss))
    exact, plain = runs
    for stage, fine in exact.items():
        if not scene.has(f"out/{stage}"):
            continue
        recorded = scene.tensor(f"out/{stage}")
        if fine.is_floating_point():
            given = (tensor.reshape(fine.shape or 1) for tensor in (recorded, fine, plain[stage]))
            yield gradient(stage, *given, row=1 if fine.ndim > 1 else -1)
        else:
            yield discrete(stage, fine, recorded)
    if with_loss:
        arguments = arguments_of_loss(scene)
        yield from assignment_stages(scene, arguments)
        for level in (*arguments["class_logits"], *arguments["distances"]):
            level.requires_grad_()
        yield from loss_stages(scene, arguments, rtmdet_loss.loss(**arguments))


def _run(scene: Recorded, head: torch.nn.Module, dtype: torch.dtype, with_loss: bool) -> dict[str, Tensor]:
    """Everything that a head gives, by the recorded names: in evaluation, and then in training."""
    features = [feature.to(dtype).requires_grad_() for feature in scene.tensors("in/feats")]
    found: dict[str, Tensor] = {}
    for mode in ("eval", "train"):
        logits, distances = head.train(mode == "train")(features)
        for name, levels in (("cls", logits), ("bbox", distances)):
            found |= {f"{mode}_{name}.{number}": level for number, level in enumerate(levels)}
    found |= {f"sd_after.{name}": buffer.clone() for name, buffer in head.named_buffers()}
    if with_loss:
        given = {**arguments_of_loss(scene), "class_logits": logits, "distances": distances}
        total = rtmdet_loss.loss(**{**given, "gt_boxes": given["gt_boxes"].to(dtype)})["total"]
    else:
        weights = [*scene.tensors("in/cot_cls"), *scene.tensors("in/cot_bbox")]
        total = torch.stack([(t * w).sum() for t, w in zip([*logits, *distances], weights, strict=True)]).sum()
        found["loss_total"] = total
    parameters = dict(head.named_parameters())
    gradients = torch.autograd.grad(total, [*features, *parameters.values()])
    names = [*(f"grad_feat.{level}" for level in range(len(features))), *(f"grad_param.{name}" for name in parameters)]
    found |= dict(zip(names, gradients, strict=True))
    return {name: tensor.detach() for name, tensor in found.items()}
