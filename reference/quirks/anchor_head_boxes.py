"""Quirks of the anchor head's anchors, flags, delta coder and overlaps that the oracle keeps."""

from __future__ import annotations

from typing import Any

import torch

from detoracle.reference import anchor_head_boxes, anchor_head_coder
from detoracle.reference.boxes import overlaps_mmdet
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.quirks.quirk import Quirk

__all__ = ["BOX_QUIRKS", "behaviour_of"]


def behaviour_of(call: Any, arguments: dict[str, Any]) -> str:
    """Name of the behaviour that a call raises; empty if it returns."""
    try:
        call(**arguments)
    except UpstreamRaises as error:
        return error.behaviour
    return ""


def _line() -> dict[str, Any]:
    return {"anchors": torch.tensor([[0.0, 0, 8, 8]]), "boxes": torch.tensor([[2.0, 2, 2, 6]])}


def _line_anchor() -> dict[str, Any]:
    return {"anchors": torch.tensor([[4.0, 0, 4, 8]]), "boxes": torch.tensor([[2.0, 2, 6, 6]])}


def _far_delta() -> dict[str, Any]:
    return {"anchors": torch.tensor([[0.0, 0, 8, 8]]), "deltas": torch.tensor([[0.0, 0, 50, -50]])}


def _at_the_limit() -> dict[str, Any]:
    anchors = torch.tensor([[0.0, 0, 4, 4], [4.0, 4, 8, 8]])
    return {
        "anchors": anchors,
        "valid": torch.ones(1, 2, dtype=torch.bool),
        "image_shapes": torch.tensor([[8, 8]]),
        "allowed_border": 0.0,
    }


def _unpadded() -> dict[str, Any]:
    return {"pad_shapes": torch.tensor([[9, 16]]), "sizes": [(3, 3)], "strides": [8], "base_anchors": [1]}


def _scale_major() -> dict[str, Any]:
    cell = {"sizes": [(1, 1)], "strides": [8], "ratios": [[4]], "min_sizes": [4], "max_sizes": [16]}
    return {**cell, "like": torch.zeros(()), "scale_major": True}


def _sides(boxes: torch.Tensor) -> Any:
    return (boxes[:, 2:] - boxes[:, :2]).tolist()


def _two_scale_settings() -> dict[str, Any]:
    scales = {"scales": [1.0], "octave_base_scale": 4, "scales_per_octave": 3}
    return {"sizes": [(1, 1)], "strides": [8], "ratios": [1.0], "like": torch.zeros(()), **scales}


def _points() -> dict[str, Any]:
    zero = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    return {"boxes_a": zero, "boxes_b": zero}


def _half_overflow() -> dict[str, Any]:
    box = torch.tensor([[0.0, 0, 300, 300]], dtype=torch.float16)
    return {"boxes_a": box, "boxes_b": box}


BOX_QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "anchor_head.degenerate-gt-targets",
        "anchor_head.encode",
        "A ground truth with a side of 0 has a target of minus infinity, an inverted one of NaN.",
        "Takes the logarithm of the ratio of sides.",
        "Drop boxes without area before training.",
        ("N3",),
        _line,
        lambda: anchor_head_coder.encode(**_line()).tolist()[0][2] == -torch.inf,
    ),
    Quirk(
        "anchor_head.degenerate-anchor-targets",
        "anchor_head.encode",
        "An anchor with a side of 0 divides by it.",
        "Has no epsilon: 0/0 for the centre, infinity for the side.",
        "Refuse anchors without area.",
        (),
        _line_anchor,
        lambda: bool(anchor_head_coder.encode(**_line_anchor()).isfinite().tolist() == [[False, True, False, True]]),
    ),
    Quirk(
        "anchor_head.decoded-sides-limited",
        "anchor_head.decode",
        "Whatever the deltas, a side grows or shrinks at most 62.5-fold.",
        "Clamps the logarithm of the ratio of sides at 4.135 either way; beyond it there is no gradient.",
        "None.",
        (),
        _far_delta,
        lambda: (
            [round(v, 3) for v in anchor_head_coder.decode(**_far_delta()).tolist()[0]] == [-246.0, 3.936, 254.0, 4.064]
        ),
    ),
    Quirk(
        "anchor_head.half-open-image",
        "anchor_head.inside_flags",
        "An anchor that touches the image's right or bottom edge sticks out; one that touches the others does not.",
        "Compares the near sides with >= and the far sides with <.",
        "None.",
        (),
        _at_the_limit,
        lambda: anchor_head_boxes.inside_flags(**_at_the_limit()).tolist() == [[True, False]],
    ),
    Quirk(
        "anchor_head.valid-by-padded-shape",
        "anchor_head.valid_flags",
        "Anchors in an image's own padding are valid, and so are all of a cell that the padding begins in.",
        "Counts cells of pad_shape, rounded up, not of img_shape.",
        "None: a port that takes img_shape trains other anchors.",
        ("C12",),
        _unpadded,
        lambda: int(anchor_head_boxes.valid_flags(**_unpadded()).sum()) == 4,
    ),
    Quirk(
        "anchor_head.ssd-anchors-scale-major",
        "anchor_head.ssd_anchors",
        "With upstream's default order of anchors, an SSD-style generator makes boxes that SSD does not have.",
        "Picks by position from a list that is sorted for the other order: a second size of the first ratios.",
        "Turn scale_major off, as SSD's configurations do.",
        (),
        _scale_major,
        lambda: _sides(anchor_head_boxes.ssd_anchors(**_scale_major())) == [[4, 4], [16, 4], [8, 8], [8, 2]],
    ),
    Quirk(
        "anchor_head.scales-and-octaves",
        "anchor_head.anchors",
        "Scales and octaves exclude each other.",
        "An assertion fails.",
        "The same named error.",
        (),
        _two_scale_settings,
        lambda: behaviour_of(anchor_head_boxes.anchors, _two_scale_settings()) == "anchor_head.scales-and-octaves",
    ),
    Quirk(
        "anchor_head.no-area-no-overlap",
        "boxes.overlaps_mmdet",
        "A box without area has IoU 0 even with itself.",
        "The union is at least 1e-6, the intersection is 0.",
        "None.",
        ("N12", "N15"),
        _points,
        lambda: overlaps_mmdet(**_points()).tolist() == [[0.0]],
    ),
    Quirk(
        "anchor_head.half-area-overflows",
        "boxes.overlaps_mmdet",
        "In float16 a box of 300 by 300 pixels has IoU NaN with itself.",
        "Computes areas in half precision, in which 90000 is infinite.",
        "Compute areas in single precision.",
        ("D1", "M7"),
        _half_overflow,
        lambda: bool(overlaps_mmdet(**_half_overflow()).isnan().all()),
    ),
)
