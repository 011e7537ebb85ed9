"""The catalogue: small scenes, each at a place where real implementations have gone wrong.

Coordinates lie on a grid of 1/8 pixel, so that edges and ties are exact in float32; images are small, so that a scene
takes milliseconds. The tags that follow from the ground truths are the scene's own doing and not repeated here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from detoracle.properties.predictors import Predictor, Style
from detoracle.properties.scenes import Scene

__all__ = ["edge_cases"]

Row = tuple[float, float, float, float, int]  # x1, y1, x2, y2, class

_PLAIN: Row = (10.5, 8.25, 41.125, 50, 2)  # an ordinary box, for company
_TRIPLE: list[Row] = [(6, 6, 30, 28, 0), (32, 34, 60, 60, 1), (34, 4, 58, 24, 3)]  # ... and three

_NON_FINITE: dict[Style, str] = {
    "nan-box": "One predicted box is NaN",
    "nan-class": "One class logit is NaN",
    "nan-objectness": "One objectness logit is NaN",
    "inf-box": "One predicted box is infinite",
    "inf-class": "One class logit is infinite, a probability of 1",
}


def edge_cases() -> tuple[Scene, ...]:
    """All scenes of the catalogue, always the same.

    Examples
    --------
    >>> scenes = {scene.name: scene for scene in edge_cases()}
    >>> scenes["tiny-on-centre"].note
    'A 2 x 2 box about the stride-8 point (20, 36): the only anchor inside.'
    """
    groups = (_counts, _conflicts, _sizes, _places, _degenerate, _exact, _heads, _predictions, _labels)
    return tuple(scene for group in groups for scene in group())


def _scene(
    name: str,
    note: str,
    *images: list[Row],
    tags: str = "",
    size: tuple[int, int] = (64, 64),
    num_classes: int = 4,
    predictor: Predictor | None = None,
    strides: tuple[int, ...] = (8, 16, 32),
) -> Scene:
    return Scene(
        name=name,
        image_size=size,
        num_classes=num_classes,
        gt_boxes=tuple(torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4) for rows in images),
        gt_labels=tuple(torch.tensor([row[4] for row in rows], dtype=torch.int64) for rows in images),
        predictor=predictor or Predictor(),
        tags=frozenset(tags.split()),
        note=note,
        seed=zlib.crc32(name.encode()),
        strides=strides,
    )


def _scattered(count: int, sides: tuple[int, int], size: tuple[int, int], *, num_classes: int = 4) -> list[Row]:
    """Boxes anywhere in the image, their sides within the given ones, on the grid."""
    generator = torch.Generator().manual_seed(count)
    draws = torch.rand(count, 5, generator=generator, dtype=torch.float64).tolist()
    rows: list[Row] = []
    for x, y, width, height, label in draws:
        w, h = (round((sides[0] + draw * (sides[1] - sides[0])) * 8) / 8 for draw in (width, height))
        left, top = round(x * (size[1] - w) * 8) / 8, round(y * (size[0] - h) * 8) / 8
        rows.append((left, top, left + w, top + h, int(label * num_classes)))
    return rows


def _counts() -> Iterator[Scene]:
    yield _scene("empty-one", "The second of two images has no ground truth.", _TRIPLE, [])
    yield _scene("empty-first", "The first of two images has no ground truth, so that indices run on.", [], _TRIPLE)
    yield _scene("empty-all", "No ground truth in the batch: a sum over positives has no term.", [], [])
    yield _scene("empty-single", "One image, one class, nothing in it.", [], num_classes=1)
    yield _scene("single", "The plainest scene.", [_PLAIN])
    yield _scene(
        "ragged", "None, one, many, none: padding must not leak.", [], [_PLAIN], _scattered(9, (6, 40), (64, 64)), []
    )
    yield _scene("ragged-full", "One, four, three: padding, but no empty image.", [_PLAIN], [*_TRIPLE, _PLAIN], _TRIPLE)
    crowds = {
        "crowd": ([_scattered(24, (6, 28), (96, 96))], "Two dozen boxes with many contested anchors."),
        "crowd-150": ([_scattered(150, (4, 14), (96, 96))], "Over 128 ground truths: past the blocks of tiled code."),
        "crowd-520": (
            [_scattered(520, (3, 10), (96, 96)), [_PLAIN]],
            "Over 512 ground truths, beside an image with one.",
        ),
    }
    for name, (images, note) in crowds.items():
        yield _scene(name, note, *images, tags="crowd conflict", size=(96, 96))


def _on_one_spot(count: int) -> list[Row]:
    """Different boxes that contain one stride-8 point each: (12, 12), or (8, 8) on a grid without offset."""
    generator = torch.Generator().manual_seed(count)
    reaches = (torch.randint(17, 48, (count, 4), generator=generator) / 8).tolist()
    return [(10 - w, 10 - n, 10 + e, 10 + s, number % 4) for number, (w, n, e, s) in enumerate(reaches)]


def _conflicts() -> Iterator[Scene]:
    yield _scene(
        "overlapping",
        "Three boxes that overlap by more than half.",
        [(8, 8, 48, 44, 0), (12, 10, 52, 48, 1), (8, 14, 46, 50, 2)],
        tags="conflict",
    )
    same: Row = (12, 10, 46, 42, 1)
    yield _scene(
        "identical-same-class", "Exact duplicates: every decision between them ties.", [same] * 3, tags="conflict"
    )
    yield _scene(
        "identical-other-class",
        "The same box with three classes: class scores alone decide.",
        [(*same[:4], label) for label in (0, 1, 3)],
        tags="conflict",
    )
    yield _scene(
        "identical-one-claim",
        "Two identical boxes that claim one anchor each, the same: one ends without any.",
        [(16, 16, 48, 48, 0), (16, 16, 48, 48, 1)],
        tags="conflict perfect",
        predictor=Predictor("perfect", matches=1),
    )
    yield _scene(
        "nested", "Boxes within boxes.", [(2, 2, 62, 62, 0), (10, 8, 50, 46, 1), (16, 14, 34, 30, 2)], tags="conflict"
    )
    yield _scene(
        "nested-concentric",
        "One centre for all: the squares about the centres coincide.",
        [(32 - half, 32 - half, 32 + half, 32 + half, label) for label, half in enumerate((30, 20, 12, 6))],
        tags="conflict",
    )
    third: list[Row] = [(8, 8, 120, 120, 0), (52, 52, 84, 84, 1), (54, 52, 86, 84, 1)]
    yield _scene(
        "best-for-a-third",
        "Anchors that the second and third claim, and the first does not, suit the first best.",
        *[third, third],
        tags="conflict",
        size=(128, 128),
        predictor=Predictor("first-only"),
    )
    yield _scene(
        "many-claims-few-anchors",
        "Six boxes share four anchors.",
        _scattered(6, (30, 60), (64, 64)),
        tags="conflict",
        strides=(32,),
    )
    yield _scene(
        "crowded-cell",
        "Five boxes about one anchor: most end with none, or with one far off.",
        [
            (34, 34, 39, 39, 0),
            (33, 35, 38, 40, 1),
            (32.5, 32.5, 39.5, 39.5, 2),
            (35, 33, 40, 38, 3),
            (34, 34, 38, 38, 1),
        ],
        tags="conflict",
    )
    yield _scene(
        "one-spot",
        "256 and 128 boxes about one anchor: counters of its claims overflow in eight bits.",
        *[_on_one_spot(256), _on_one_spot(128)],
        tags="crowd conflict",
        size=(32, 32),
        strides=(8,),
    )


def _sizes() -> Iterator[Scene]:
    yield _scene(
        "tiny-between-points", "A 2 x 2 box that contains no anchor of any level.", [(21.5, 37.5, 23.5, 39.5, 1)]
    )
    yield _scene(
        "tiny-on-centre",
        "A 2 x 2 box about the stride-8 point (20, 36): the only anchor inside.",
        [(19, 35, 21, 37, 1)],
    )
    yield _scene("tiny-several", "Six tiny boxes, most without an anchor inside.", _scattered(6, (1, 6), (64, 64)))
    yield _scene(
        "tiny-and-huge", "A tiny box inside one that fills the image.", [(0, 0, 64, 64, 0), (42, 42, 45, 46, 1)]
    )
    yield _scene("thin", "One pixel wide or tall, and 50 long.", [(20.5, 6, 21.5, 56, 0), (6, 43.5, 56, 44.5, 1)])
    yield _scene("between-strides", "Sides between the two finest strides.", [(9, 9, 21, 22, 0), (30, 37, 45, 46, 1)])
    yield _scene("whole-image", "A box that is the image.", [(0, 0, 64, 64, 3)])
    yield _scene(
        "larger-than-image", "A box beyond the image on all sides.", [(-24, -16, 96, 80, 2), (20, 20, 40, 44, 1)]
    )
    yield _scene(
        "beyond-bins",
        "Sides farther from the anchors than 15 cells of stride 8: distance bins run out.",
        [(8, 8, 280, 280, 0), (120, 16, 200, 272, 1)],
        size=(288, 288),
        strides=(8, 32),
    )
    yield _scene(
        "half-overflow",
        "Areas over 65504, which half precision cannot hold.",
        [(8, 8, 408, 408, 0), (60, 50, 364, 362, 1)],
        size=(416, 416),
    )


def _places() -> Iterator[Scene]:
    yield _scene(
        "border",
        "A box at each border, two of them across it.",
        [(0, 20, 14, 40, 0), (50, -6, 70, 12, 1), (24, 48, 48, 64, 2), (44, 30, 64, 46, 3)],
    )
    far: Row = (200, 210, 240, 250, 1)
    yield _scene("outside-near", "Two pixels reach into the image, none to an anchor.", [(-30, 20, 2, 44, 1), _PLAIN])
    yield _scene("outside-far", "The only box lies far outside: no anchor is near.", [far])
    yield _scene("outside-far-negative", "The only box lies far outside, up left.", [(-140, -120, -90, -80, 1)])
    yield _scene(
        "outside-mixed", "A box far outside beside an ordinary one: it may get an anchor it never meets.", [far, _PLAIN]
    )
    yield _scene(
        "outside-batch", "One image with an ordinary box, one whose only box lies far outside.", [_PLAIN], [far]
    )
    yield _scene(
        "centre-off-grid", "Anchors inside, but the centre far outside the image.", [(-128, 8, 12, 56, 0), _PLAIN]
    )
    yield _scene(
        "negative-corners",
        "Coordinates add up to less than zero, yet anchors lie inside.",
        [(-60, -60, 30, 20, 1), _PLAIN],
    )
    yield _scene(
        "negative-row",
        "Class, centre and size of the first add up to less than zero: a count of positive rows drops the last.",
        [(-65, -35, -15, -25, 0), (22, 22, 42, 42, 1)],
    )
    yield _scene("zero-row-first", "A ground truth of zeros before an ordinary one.", [(0, 0, 0, 0, 0), _PLAIN])
    yield _scene("zero-row-last", "A ground truth of zeros after an ordinary one.", [_PLAIN, (0, 0, 0, 0, 0)])


def _degenerate() -> Iterator[Scene]:
    yield _scene("degenerate-width", "A box of no width: log(0) when encoded.", [(30, 12, 30, 44, 0), _PLAIN])
    yield _scene("degenerate-height", "A box of no height.", [(12, 30, 44, 30, 0), _PLAIN])
    yield _scene(
        "degenerate-point",
        "A box that is a point, exactly on an anchor.",
        [(28, 28, 28, 28, 0), _PLAIN],
        tags="on-edge",
    )
    yield _scene("degenerate-only", "Nothing but a point.", [(33, 30, 33, 30, 1)])
    yield _scene(
        "degenerate-pair",
        "The same point twice: IoU of nothing with nothing.",
        [(33, 30, 33, 30, 1)] * 2,
        tags="conflict",
    )
    yield _scene("inverted-width", "Left and right swapped: a negative area.", [(50, 20, 20, 44, 0), _PLAIN])
    yield _scene("inverted-both", "Both corners swapped: a positive area again.", [(54, 50, 20, 18, 0), _PLAIN])
    yield _scene("inverted-only", "Nothing but an inverted box.", [(50, 20, 20, 44, 0)])


def _exact() -> Iterator[Scene]:
    """Edges, ties and whole numbers, exact in float32."""
    yield _scene(
        "edge-through-centres",
        "Edges run through cell centres of stride 8 and of stride 16.",
        [(12, 12, 44, 36, 0), (24, 8, 56, 40, 1)],
        tags="on-edge conflict",
    )
    yield _scene(
        "edge-through-corners",
        "Edges run through cell corners, where some heads put their points.",
        [(16, 16, 48, 40, 0)],
        tags="on-edge",
    )
    yield _scene(
        "edge-of-centre-square",
        "Stride-8 centres exactly 1.5 and 2.5 strides from the box's centre.",
        [(21, 21, 27, 27, 0), (44, 42, 52, 54, 1)],
        tags="on-edge",
    )
    yield _scene(
        "half-an-anchor",
        "Half of an SSD prior, which it overlaps by exactly 0.5: at the threshold.",
        [(13, 13, 35, 24, 1)],
        tags="on-edge",
    )
    yield _scene(
        "symmetric", "A box about a cell corner: four anchors are equally near.", [(16, 16, 48, 48, 2)], tags="on-edge"
    )
    equal = Predictor("equal")
    yield _scene(
        "equal-one",
        "All predictions alike: ties all around.",
        [(16, 16, 48, 48, 2)],
        tags="equal on-edge",
        predictor=equal,
    )
    yield _scene(
        "equal-several",
        "All predictions alike, and boxes that compete.",
        [*_TRIPLE, (24, 22, 44, 42, 1)],
        tags="equal conflict",
        predictor=equal,
    )
    perfect: list[Row] = [(8, 8, 24, 24, 0), (32, 32, 64, 64, 1)]
    for matches in (1, 2, 3):
        yield _scene(
            f"perfect-{matches}",
            f"{matches} perfect predictions a box: the sum of IoUs is at a whole number, to the last bit.",
            perfect,
            tags="perfect",
            predictor=Predictor("perfect", matches=matches),
        )
    yield _scene(
        "perfect-odd",
        "Three perfect predictions of sizes whose logarithm rounds.",
        [(9.125, 7.25, 29.5, 20.375, 0), (33.25, 30.625, 62.5, 57.75, 1)],
        tags="perfect",
        predictor=Predictor("perfect", matches=3),
    )
    near = 28 + 2.0**-15
    yield _scene(
        "nearly-equal",
        "Midway between two centres but for less than 1e-4 pixels: overlaps differ by 5e-6, far more than they err.",
        [(near - 8, 16, near + 8, 32, 0)],
    )
    yield _scene(
        "no-overlap",
        "Specks only: with every overlap zero, only the rule for ties decides.",
        [(0, 0, 20, 20, 0), (24, 24, 60, 60, 1), (26, 26, 62, 62, 2)],
        tags="no-overlap conflict",
        predictor=Predictor("perfect", matches=0),
    )
    yield _scene(
        "no-overlap-elsewhere",
        "Specks on few anchors: the first ground truth, elsewhere, overlaps a contested one as much as its claimants.",
        [(50, 50, 62, 62, 0), (0, 0, 44, 44, 1), (2, 2, 46, 46, 2)],
        tags="no-overlap conflict",
        predictor=Predictor("perfect", matches=0),
        strides=(16,),
    )


def _heads() -> Iterator[Scene]:
    """Shapes of image, levels and classes."""
    yield _scene("wide", "Twice as wide as high: swapped axes show.", [*_TRIPLE, (70, 10, 120, 54, 2)], size=(64, 128))
    yield _scene("tall", "Four times as high as wide.", [(4, 20, 28, 60, 0), (2, 80, 30, 124, 1)], size=(128, 32))
    yield _scene(
        "odd-72x104",
        "A multiple of 8, not of 32: the coarse levels stick out.",
        [*_TRIPLE, (60, 30, 103, 71, 2)],
        size=(72, 104),
    )
    yield _scene("odd-100x76", "No multiple of any stride.", [*_TRIPLE, (20, 60, 75, 99, 2)], size=(100, 76))
    yield _scene("one-class", "One class: nothing to confuse.", [(*row[:4], 0) for row in _TRIPLE], num_classes=1)
    yield _scene(
        "many-classes",
        "128 classes, the last of them present.",
        [*_TRIPLE, (20, 22, 50, 44, 127)],
        num_classes=128,
    )
    yield _scene(
        "many-classes-overconfident",
        "Class costs over 10,000: an anchor outside the preferred geometry is cheaper unless the penalty is 100,000.",
        [(8, 8, 56, 56, 7), (44, 4, 62, 30, 90)],
        tags="extreme-logits conflict",
        num_classes=160,
        predictor=Predictor("overconfident", magnitude=200),
    )
    yield _scene("one-level-8", "The finest level only.", _TRIPLE, strides=(8,))
    yield _scene(
        "one-level-32",
        "The coarsest level only.",
        [(8, 8, 88, 80, 0), (60, 50, 124, 120, 1)],
        size=(128, 128),
        strides=(32,),
    )
    yield _scene(
        "four-anchors",
        "Fewer anchors than a top-k of 10.",
        [(4, 4, 28, 28, 0), (10, 2, 31, 20, 1)],
        tags="conflict",
        size=(32, 32),
        strides=(16,),
    )
    yield _scene("one-anchor", "A single anchor.", [(1, 1, 7, 7, 0)], size=(8, 8), strides=(8,))


def _predictions() -> Iterator[Scene]:
    """Ordinary ground truths, extraordinary predictions."""
    boxes = [*_TRIPLE, _PLAIN]
    yield _scene(
        "untrained", "An untrained head: all scores near 0.01.", boxes, tags="conflict", predictor=Predictor("random")
    )
    for magnitude in (50, 200):
        yield _scene(
            f"extreme-logits-{magnitude}",
            f"Logits of plus and minus {magnitude}: probabilities of 0 and 1, logarithms of 0.",
            boxes,
            boxes[:2],
            tags="extreme-logits conflict",
            predictor=Predictor("extreme-logits", magnitude=magnitude),
        )
    for magnitude, what in ((10, "areas are large"), (50, "areas overflow float32")):
        yield _scene(
            f"extreme-boxes-{magnitude}",
            f"A quarter of the boxes is exp({magnitude}) times as large ({what}), a quarter are specks.",
            boxes,
            tags="extreme-boxes conflict",
            predictor=Predictor("extreme-boxes", magnitude=magnitude),
        )
    yield _scene(
        "ten-anchors",
        "All anchors are inside, as many as it may claim, and its class has no chance at some.",
        [(-1, -1, 81, 9, 1)],
        tags="extreme-logits",
        size=(8, 80),
        strides=(8,),
        predictor=Predictor("overconfident", magnitude=200),
    )
    for style, what in _NON_FINITE.items():
        yield _scene(style, f"{what}, at the first centre.", boxes, tags="non-finite", predictor=Predictor(style))
    yield _scene(
        "nan-box-outside",
        "NaN where nothing is assigned.",
        [(200, 210, 240, 250, 1)],
        tags="non-finite",
        predictor=Predictor("nan-box"),
    )


def _labels() -> Iterator[Scene]:
    bad = {
        "minus-one": (-1, "Class -1: some libraries index the last class."),
        "num-classes": (4, "Class C: one past the last, the background of some heads."),
        "beyond": (5, "Class C + 1: past the background class too."),
    }
    for name, (label, note) in bad.items():
        yield _scene(f"label-{name}", note, [_TRIPLE[0], (*_TRIPLE[1][:4], label)])
    yield _scene(
        "two-hundred-classes",
        "Class indices beyond 127, which a byte with a sign turns negative.",
        [(*_TRIPLE[0][:4], 150), (*_TRIPLE[1][:4], 94), (*_PLAIN[:4], 199)],
        num_classes=200,
    )
