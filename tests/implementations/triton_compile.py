"""Compile the kernels for an H100, which need not be there; a program, for Triton must not interpret in its process."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from detoracle.implementations.triton import yolox_kernels, yolox_loss_kernels

__all__: list[str] = []


def compiled(kernel: Any, types: dict[str, Any], choices: dict[str, Any]) -> int:
    """Bytes of a kernel's machine code."""
    signature = {**types, **dict.fromkeys(choices, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=choices)
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).kernel)


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
    both = {"batch": batch, "terms": yolox_kernels.Terms("*fp32", "*fp32", "*i32")}
    choices = {"OFFICIAL": official, "LEVELS": 3, "ANCHORS": 128}
    lists = {"listed": "*i32", "numbers": "*i64", "claimed": "*i64", "dynamic_k": "*i64"}
    level = yolox_loss_kernels.Level(head, "fp32", "i32", "i32", "i32")
    targets = yolox_loss_kernels.Targets("*i64", "*fp32", "*fp32", labels, "i32", "i32", "i32")
    of_level = {"level": level, "targets": targets}
    blocks = {"L1": official, "CELLS": 128, "CLASSES": 16}
    for kernel, types, chosen in (
        (yolox_kernels.candidates, {**both, "candidate": "*i1"}, {**choices, "CLASSES": 16}),
        (yolox_kernels.claim, {**both, **lists}, {**choices, "MOST": 10}),
        (yolox_kernels.resolve, {**both, "claimed": "*i64", "gt_index": "*i64", "quality": "*fp32"}, choices),
        (yolox_loss_kernels.sums, {**of_level, "parts": "*fp32", "first_program": "i32"}, blocks),
        (yolox_loss_kernels.gradients, {**of_level, "scales": "*fp32", "gradient": head}, blocks),
    ):
        print(kernel.__name__, dtype, compiled(kernel, types, chosen), flush=True)


if __name__ == "__main__":
    yolox("fp32", official=False)
    yolox("bf16", official=True)
