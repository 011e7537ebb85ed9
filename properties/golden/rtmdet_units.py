"""Which RTMDet oracle stage each recorded array of a single function is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.golden.checks import StageCheck, discrete, gradient, raised, within
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference import anchor_head_boxes, rtmdet, rtmdet_head, rtmdet_terms
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.contract import unchecked
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.rounding import Bounded

__all__ = ["UNITS"]

_overlaps: Any = unchecked(overlaps_mmdet)
_decode: Any = unchecked(rtmdet.decode)
_encode: Any = unchecked(rtmdet.encode)


def _exact(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    return Bounded.exact(tensor, dtype)


def _dtype(scene: Recorded, name: str = "dtype") -> torch.dtype:
    dtype: torch.dtype = getattr(torch, scene.info["cfg"].get(name, "float32"))
    return dtype


def _overlap(scene: Recorded) -> Iterator[StageCheck]:
    """Every mode, pairwise and aligned; a calculator in half precision divides the boxes by its scale first."""
    cfg, dtype = scene.info["cfg"], _dtype(scene)
    if "calc" in cfg:
        dtype = {"fp16": torch.float16}[cfg["calc"]]
    first, second = ((scene.tensor(f"in/{n}") / cfg.get("scale", 1.0)).to(dtype) for n in ("boxes1", "boxes2"))
    eps = cfg.get("eps", 1e-6)
    for stage in scene.outputs:
        mode, _, variant = stage.partition(".")
        settings = {"mode": mode, "aligned": variant != "pair", "eps": eps}
        if variant != "aligned_grad1":
            expected = _overlaps(_exact(first, dtype), _exact(second, dtype), **settings)
            yield within(stage, scene.tensor(f"out/{stage}"), expected)
            continue
        gradients = []
        for precision in (torch.float64, dtype):
            leaf = first.to(precision).requires_grad_()
            gradients += torch.autograd.grad(_overlaps(leaf, second.to(precision), **settings).sum(), leaf)
        yield gradient(stage, scene.tensor(f"out/{stage}"), *gradients)


def _qfl(scene: Recorded) -> Iterator[StageCheck]:
    labelled = scene.has("in/label")
    predicted = scene.tensor("in/pred").to(_dtype(scene))
    quality = scene.tensor("in/score" if labelled else "in/target").to(_dtype(scene, "score_dtype"))
    cfg = scene.info["cfg"]
    settings = {"beta": cfg.get("beta", 2.0), "activated": cfg.get("activated", False)}
    settings |= {"loss_weight": cfg.get("loss_weight", scene.config["cls_weight"])}
    settings |= {"labels": scene.tensor("in/label")} if labelled else {}
    yield from _term(scene, rtmdet_terms.qfl, predicted, {"quality": quality}, settings)


def _giou(scene: Recorded) -> Iterator[StageCheck]:
    dtype, cfg = _dtype(scene), scene.info["cfg"]
    settings = {"eps": cfg.get("eps", scene.config["giou_eps"])}
    settings |= {"loss_weight": cfg.get("loss_weight", scene.config["bbox_weight"])}
    target = scene.tensor("in/target").to(dtype)
    yield from _term(scene, rtmdet_terms.giou_loss, scene.tensor("in/pred").to(dtype), {"target": target}, settings)


def _term(
    scene: Recorded,
    function: Callable[..., Tensor],
    predicted: Tensor,
    targets: dict[str, Tensor],
    settings: dict[str, Any],
) -> Iterator[StageCheck]:
    """A loss term in all recorded reductions: value, and gradient of its sum."""
    weight = scene.tensor("in/weight")
    for name, reduction in _reductions(scene):
        weighted = reduction.pop("weighted")
        error = None
        try:
            function(predicted, **targets, **({"weight": weight} if weighted else {}), **settings, **reduction)
        except UpstreamRaises as behaviour:
            error = behaviour
        if error is not None or scene.raises is not None:
            yield raised(scene, error)
            continue
        bounded = {key: _exact(tensor, tensor.dtype) for key, tensor in targets.items()}
        if weighted:
            bounded["weight"] = _exact(weight, weight.dtype)
        private: Any = unchecked(function)
        expected = private(_exact(predicted, predicted.dtype), **bounded, **settings, **reduction)
        yield within(f"{name}.value", scene.tensor(f"out/{name}.value"), expected)
        if not scene.has(f"out/{name}.grad"):
            continue
        gradients: list[Tensor] = []
        for dtype in (torch.float64, predicted.dtype):
            leaf = predicted.to(dtype).requires_grad_()
            given = {key: tensor.to(torch.promote_types(dtype, tensor.dtype)) for key, tensor in targets.items()}
            if weighted:
                given["weight"] = weight.to(torch.promote_types(dtype, weight.dtype))
            gradients += torch.autograd.grad(function(leaf, **given, **settings, **reduction).sum(), leaf)
        yield gradient(f"{name}.grad", scene.tensor(f"out/{name}.grad"), *gradients, row=-1)


def _reductions(scene: Recorded) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names such as ``mean``, ``wsum`` (weighted) or ``wavg7`` (weighted, average factor 7); or the only one."""
    if "only" in scene.info["cfg"]:
        reduction, factor = scene.info["cfg"]["only"]
        yield "only", {"weighted": True, "reduction": reduction or "mean", "average_factor": factor}
        return
    names = dict.fromkeys(stage.partition(".")[0] for stage in scene.outputs) or {"none": None}
    for name in names:
        weighted, reduction, factor = re.fullmatch(r"(w?)(none|mean|sum|avg)(\d*)", name).groups()  # type: ignore[union-attr]
        yield (
            name,
            {
                "weighted": bool(weighted),
                "reduction": "mean" if reduction == "avg" else reduction,
                "average_factor": float(factor) if factor else None,
            },
        )


def _coder(scene: Recorded) -> Iterator[StageCheck]:
    points, distances, boxes = (_exact(scene.tensor(f"in/{name}")) for name in ("points", "distance", "gt"))
    shape = scene.tensor("in/max_shape").tolist()
    batch = [(distances, shape), (_exact(scene.tensor("in/distance").flip(0)), [side // 2 for side in shape])]
    for stage in scene.outputs:
        function, *variants = stage.split("_")
        expected: Any
        if function == "encode":
            limit = float(variants[0].removeprefix("max")) if variants else None
            eps = {"eps001": 0.01}[variants[1]] if len(variants) > 1 else 0.1
            expected = _encode(points, boxes, max_distance=limit, eps=eps)
        else:
            clip = "clip1" in variants and "noshape" not in variants
            images = [_decode(points, d, max_shape=s if clip else None) for d, s in batch]
            expected = torch.stack(images) if "batch" in variants else images[0]
        yield within(stage, scene.tensor(f"out/{stage}"), expected)


def _points(scene: Recorded) -> Iterator[StageCheck]:
    cfg = scene.info["cfg"]
    sizes, strides = cfg["featmap_sizes"], cfg["strides"]
    counts = [height * width for height, width in sizes]
    priors = rtmdet.priors(sizes, strides, offset=cfg["offset"])
    shapes = torch.tensor(cfg["pad_shapes"])
    valid = anchor_head_boxes.valid_flags(shapes, sizes=sizes, strides=strides, base_anchors=[1] * len(sizes))
    for level, points in enumerate(torch.split(priors, counts)):
        yield discrete(f"priors.{level}", points, scene.tensor(f"out/priors.{level}"))
        yield discrete(f"priors_nostride.{level}", points[:, :2], scene.tensor(f"out/priors_nostride.{level}"))
    for stage in scene.outputs:
        kind, image, variant = (*stage.split("."), "")[:3]
        if kind == "valid":
            got = torch.split(valid[int(image)], counts)[int(variant)]
        elif kind == "inside":
            border = float(variant.removeprefix("ab"))
            got = anchor_head_boxes.inside_flags(priors, valid, shapes, allowed_border=border)[int(image)]
        else:
            continue
        yield discrete(stage, got, scene.tensor(f"out/{stage}"))


def _joint_logits(scene: Recorded) -> Iterator[StageCheck]:
    x, y, cotangent = (scene.tensor(f"in/{name}") for name in ("x", "y", "cot"))
    mean: Any = rtmdet_head._geometric_mean(_exact(x), _exact(y))
    yield within("geomean", scene.tensor("out/geomean"), mean)
    inverse: Any = rtmdet_head._inverse_sigmoid(_exact(scene.tensor("out/geomean")))
    yield within("inverse", scene.tensor("out/inverse"), inverse)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, y)]
        joint = rtmdet_head.joint_logits(*leaves)
        gradients.append(torch.autograd.grad(joint, leaves, cotangent.to(dtype)))
    for stage, fine, coarse in zip(("grad_x", "grad_y"), *gradients, strict=True):
        yield gradient(stage, scene.tensor(f"out/{stage}")[:, None], fine[:, None], coarse[:, None])


UNITS: dict[str, Callable[[Recorded], Iterator[StageCheck]]] = {
    "overlaps": _overlap,
    "qfl": _qfl,
    "giou": _giou,
    "coder": _coder,
    "points": _points,
    "geomean": _joint_logits,
}
