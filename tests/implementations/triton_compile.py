"""Compile the kernels for an H100, which need not be there; a program, for Triton must not interpret in its process."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from detoracle.implementations.triton import (
    anchor_head_kernels,
    anchor_head_loss_kernels,
    matching,
    rtmdet_kernels,
    rtmdet_loss_kernels,
    ssd_kernels,
    ssd_loss_kernels,
    yolov8_kernels,
    yolov8_loss_kernels,
    yolox_kernels,
    yolox_loss_kernels,
)

__all__: list[str] = []


_COMPILED: set[tuple[str, str]] = set()


def compile_for(system: str, *kernels: tuple[Any, dict[str, Any], dict[str, Any]]) -> None:
    """Print the sizes of kernels' machine code, given types and choices; what differs in types alone is left out."""
    for kernel, types, choices in kernels:
        if isinstance(kernel, Autotuner):  # its first tile stands for all
            choices, types, kernel = {**choices, **kernel.configs[0].kwargs}, {**types, "size": "i32"}, kernel.fn
        if (f"{system}.{kernel.__name__}", str(choices)) in _COMPILED:
            continue
        _COMPILED.add((f"{system}.{kernel.__name__}", str(choices)))
        source = ASTSource(kernel, {**types, **dict.fromkeys(choices, "constexpr")}, constexprs=choices)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        print(system, kernel.__name__, len(found.kernel), flush=True)


def yolox(dtype: str, *, official: bool) -> None:
    """Both flavours; labels of either type."""
    head, labels = f"*{dtype}", "*i64" if official else "*i32"
    batch = yolox_kernels.Batch(
        points="*fp32",
        steps="*fp32",
        boxes=head,
        box_strides=("i32",) * 3,
        objectness=head,
        objectness_strides=("i32",) * 2,
        maps=(head,) * 3,
        map_strides=(("i32",) * 3,) * 3,
        starts=("i32",) * 4,
        gt_boxes="*fp32",
        gt_labels=labels,
        counted="*i1",
        num_anchors="i32",
        num_gts="i32",
        num_classes="i32",
        radius="fp32",
        penalty="fp32",
    )
    both = {"batch": batch, "terms": matching.Terms("*fp32", "*fp32", "*i32")}
    choices = {"OFFICIAL": official, "LEVELS": 3, "ANCHORS": 128}
    lists = {"listed": "*i32", "numbers": "*i64", "claimed": "*i64", "dynamic_k": "*i64"}
    level = yolox_loss_kernels.Level(head, "fp32", "i32", "i32", "i32")
    targets = yolox_loss_kernels.Targets("*i64", "*fp32", "*fp32", labels, "i32", "i32", "i32")
    of_level = {"level": level, "targets": targets}
    blocks = {"L1": official, "CELLS": 128, "CLASSES": 16}
    compile_for(
        "yolox",
        (yolox_kernels.candidates, {**both, "candidate": "*i1"}, {**choices, "CLASSES": 16}),
        (yolox_kernels.claim, {**both, **lists}, {**choices, "MOST": 10}),
        (yolox_kernels.resolve, {**both, "claimed": "*i64", "gt_index": "*i64", "quality": "*fp32"}, choices),
        (yolox_loss_kernels.sums, {**of_level, "parts": "*fp32", "first_program": "i32"}, blocks),
        (yolox_loss_kernels.gradients, {**of_level, "scales": "*fp32", "gradient": head}, blocks),
    )


def rtmdet(dtype: str, *, square: bool) -> None:
    """Both exponents of the quality focal loss; labels of either type."""
    head, labels = f"*{dtype}", "*i64" if square else "*i32"
    batch = rtmdet_kernels.Batch(
        priors="*fp32",
        inside="*i1",
        boxes="*fp32",
        box_strides=("i32",) * 3,
        maps=(head,) * 3,
        map_strides=(("i32",) * 3,) * 3,
        starts=("i32",) * 4,
        gt_boxes="*fp32",
        gt_labels=labels,
        counted="*i1",
        centers="*fp32",
        num_anchors="i32",
        num_gts="i32",
        num_classes="i32",
        radius="fp32",
        iou_weight="fp32",
    )
    both = {"batch": batch, "terms": matching.Terms("*fp32", "*fp32", "*i32")}
    choices = {"LEVELS": 3, "ANCHORS": 128}
    lists = {"listed": "*i32", "numbers": "*i64", "claimed": "*i64", "dynamic_k": "*i64", "most": "i32"}
    level = rtmdet_loss_kernels.Level(head, head, "i32", "i32")
    targets = rtmdet_loss_kernels.Targets("*fp32", "*i64", "*fp32", "*fp32", labels, "i32", "i32", "i32")
    of_level = {"level": level, "targets": targets, "settings": rtmdet_loss_kernels.Settings("fp32", "fp32", "fp32")}
    blocks = {"SQUARE": square, "CELLS": 128, "CLASSES": 16}
    maps = {"to_logits": head, "to_distances": head}
    compile_for(
        "rtmdet",
        (rtmdet_kernels.candidates, {**both, "candidate": "*i1"}, {**choices, "CLASSES": 16}),
        (rtmdet_kernels.claim, {**both, **lists}, {"LANES": 16, **choices}),
        (rtmdet_kernels.resolve, {**both, "claimed": "*i64", "gt_index": "*i64", "quality": "*fp32"}, choices),
        (rtmdet_loss_kernels.sums, {**of_level, "parts": "*fp32"}, blocks),
        (rtmdet_loss_kernels.gradients, {**of_level, "scales": "*fp32", **maps}, blocks),
    )


def ssd(dtype: str, labels: str) -> None:
    """Labels of either type."""
    head = f"*{dtype}"
    matching = ssd_kernels.Matching("*fp32", "*fp32", labels, "*i1", "i32", "i32")
    terms = ssd_kernels.Terms("*fp32", "*fp32", "*i64")
    targets = ssd_loss_kernels.Targets("*fp32", "*i64", "*i1")
    assigned = {"gt_index": "*i64", "quality": "*fp32", "class_target": "*i64", "loc_target": "*fp32"}
    variances = {"threshold": "fp32", "of_centre": "fp32", "of_size": "fp32"}
    mined = {"highest": "*fp32", "negative": "*i1", "mining_loss": "*fp32"}
    size, tile = {"rows": "i32", "classes": "i32"}, {"ROWS": 32, "CLASSES": 32}
    written = {"scales": "*fp32", "to_loc": head, "to_conf": head}
    compile_for(
        "ssd",
        (ssd_kernels.best_priors, {"given": matching, "claimed": "*i32"}, {"PRIORS": 1024}),
        (ssd_kernels.match, {"given": matching, "claimed": "*i32", **assigned, **variances}, {"PRIORS": 128}),
        (ssd_kernels.entropies, {"conf": head, "terms": terms, **size}, tile),
        (
            ssd_kernels.mine,
            {"terms": terms, **mined, "lowest": "fp32", "neg_pos": "i32", "priors": "i32"},
            {"PRIORS": 1024},
        ),
        (
            ssd_loss_kernels.sums,
            {"loc": head, "targets": targets, "entropy": "*fp32", "parts": "*fp32", "rows": "i32"},
            {"ROWS": 128},
        ),
        (ssd_loss_kernels.gradients, {"loc": head, "conf": head, "targets": targets, **written, **size}, tile),
    )


def yolov8(dtype: str, *, maps: bool) -> None:
    """Logits of a grid's levels, and probabilities at any points; with bins and without; labels of either type."""
    head, labels, levels = f"*{dtype}", "*i64" if maps else "*i32", 3 if maps else 1
    batch = yolov8_kernels.Batch(
        points="*fp32",
        boxes="*fp32",
        box_strides=("i32",) * 3,
        maps=(head,) * levels,
        map_strides=(("i32",) * 3,) * levels,
        starts=("i32",) * (levels + 1),
        gt_boxes="*fp32",
        gt_labels=labels,
        counted="*i1",
        num_anchors="i32",
        num_gts="i32",
        num_classes="i32",
        alpha="fp32",
        beta="fp32",
    )
    grid = yolov8_kernels.Grid(*((one,) * levels * maps for one in ("fp32", "i32", "i32")))
    best = yolov8_kernels.Best("*i32", "*i32", "*i32")
    choices = {"LEVELS": levels, "LOGITS": maps, "ANCHORS": 128}
    bins = {"BINS": 16 if maps else 1}
    map_types = {"raw": head, "step": "fp32", "reg_max": "i32", "start": "i32", "cells": "i32", "boxes": "*fp32"}
    found = {"gt_index": "*i64", "metrics": "*fp32"}
    level = yolov8_loss_kernels.Level(head, "fp32", "i32", "i32")
    targets = yolov8_loss_kernels.Targets("*fp32", "*i64", "*fp32", "*fp32", labels, "i32", "i32", "i32", "i32")
    of_level, blocks = {"level": level, "targets": targets}, {**bins, "CELLS": 128, "CLASSES": 16}
    compile_for(
        "yolov8",
        (yolov8_kernels.decode, {"batch": batch, **map_types}, {**bins, "ANCHORS": 128}),
        (
            yolov8_kernels.claim,
            {"batch": batch, "grid": grid, "claimed": "*i64", "best": best, "most": "i32"},
            {**choices, "LANES": 16, "GRID": maps},
        ),
        (yolov8_kernels.resolve, {"batch": batch, "claimed": "*i64", "best": best, **found}, choices),
        (yolov8_kernels.scale, {"batch": batch, "best": best, **found, "quality": "*fp32"}, {"ANCHORS": 128}),
        (yolov8_loss_kernels.sums, {**of_level, "parts": "*fp32"}, blocks),
        (yolov8_loss_kernels.gradients, {**of_level, "scales": "*fp32", "gradient": head}, blocks),
    )


def anchor_head(dtype: str, box_loss: Any, *, other: bool) -> None:
    """Both choices of every setting; labels of either type."""
    head, labels = f"*{dtype}", "*i64" if other else "*i32"
    batch = anchor_head_kernels.Batch("*fp32", "*i1", "*fp32", "*i1", "*fp32", "*i1", "i32", "i32", "i32")
    pairs = {"batch": batch, "rules": anchor_head_kernels.Rules(*("fp32",) * 5), "best": "*i64"}
    blocks = {"OF_ANCHORS": other, "ANCHORS": 512}
    level = anchor_head_loss_kernels.Level(head, head, "i32", "i32")
    targets = anchor_head_loss_kernels.Targets("*fp32", "*i64", "*fp32", labels, "i32", "i32", "i32")
    four = ("fp32",) * 4
    settings = anchor_head_loss_kernels.Settings("fp32", "fp32", "fp32", "fp32", "fp32", four, four, "fp32")
    of_level = {"level": level, "targets": targets, "settings": settings}
    tile = {"LOSS": box_loss.value, "DECODED": other, "SQUARE": other, "CELLS": 128, "CLASSES": 16}
    maps = {"scales": "*fp32", "to_scores": head, "to_deltas": head}
    compile_for(
        "anchor_head",
        (anchor_head_kernels.best_anchors, pairs, blocks),
        (
            anchor_head_kernels.assign,
            {**pairs, "gt_index": "*i64", "quality": "*fp32"},
            {"CLAIMS": True, "ALL": other, **blocks},
        ),
        (anchor_head_loss_kernels.sums, {**of_level, "parts": "*fp32"}, tile),
        (anchor_head_loss_kernels.gradients, {**of_level, **maps}, tile),
    )


if __name__ == "__main__":
    yolox("bf16", official=True)
    yolox("fp32", official=False)
    rtmdet("bf16", square=True)
    rtmdet("fp32", square=False)
    yolov8("bf16", maps=True)
    yolov8("fp32", maps=False)
    ssd("bf16", "*i32")
    anchor_head("bf16", anchor_head_loss_kernels.GIOU, other=True)
    anchor_head("fp32", anchor_head_loss_kernels.SMOOTH_L1, other=False)
