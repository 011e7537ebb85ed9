"""Hypothesis strategies for scenes, as a published API.

They draw structure (how many images, where boxes lie, on a grid of a quarter pixel) and seeds, not thousands of floats,
so that a failure shrinks to few images and boxes. Every argument is keyword-only; errors come when something is drawn,
not at import.

>>> from hypothesis import given, settings
>>> @settings(max_examples=5, database=None, derandomize=True)
... @given(scene=scenes())
... def has_images(scene):
...     assert scene.num_images > 0
>>> has_images()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from detoracle.properties.predictors import Predictor
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of

__all__ = [
    "anchors_on_edges",
    "batches",
    "conflicting_anchors",
    "degenerate_boxes",
    "ground_truths",
    "integer_k_boundary",
    "overlapping_gts",
    "predictions",
    "scenes",
]

Box = tuple[float, float, float, float]
Boxes = list[Box]

_NEEDS_GTS = frozenset({"ssd"})  # the published matching raises on an image without ground truths
_SUMS_IOUS = frozenset({"yolox", "rtmdet"})  # a ground truth claims as many anchors as the sum of its best IoUs says
_GRID = 4  # steps a pixel: coordinates stay exact in float32 and half


@st.composite
def _box(draw: st.DrawFn, size: int, smallest: int = 1) -> Box:
    """A box with its centre in the image, xyxy pixels; shrinks to a small one at the top left."""
    steps = size * _GRID
    width, height = (draw(st.integers(smallest, steps)) for _ in range(2))
    x, y = (draw(st.integers(0, steps)) for _ in range(2))
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return tuple(c / _GRID for c in corners)  # type: ignore[return-value]


def ground_truths(*, size: int = 64, min_gts: int = 0, max_gts: int = 5) -> st.SearchStrategy[Boxes]:
    """Ground-truth boxes of one image, xyxy pixels.

    Parameters
    ----------
    size : int
        Side of the image in pixels.
    min_gts, max_gts : int
        Fewest and most boxes.

    Returns
    -------
    SearchStrategy of list of (float, float, float, float)

    Examples
    --------
    >>> from hypothesis import find
    >>> find(ground_truths(), lambda boxes: len(boxes) == 1)
    [(-0.125, -0.125, 0.125, 0.125)]
    """
    return st.lists(_box(size), min_size=min_gts, max_size=max_gts)


def overlapping_gts(*, size: int = 64, max_gts: int = 4) -> st.SearchStrategy[Boxes]:
    """Ground truths that overlap: a box, and others within a few pixels of it, some of them the same.

    Parameters
    ----------
    size, max_gts : int
        As for `ground_truths`.

    Returns
    -------
    SearchStrategy of list of (float, float, float, float)
    """
    shift = st.integers(-4 * _GRID, 4 * _GRID).map(lambda steps: steps / _GRID)
    shifts = st.lists(st.tuples(shift, shift, shift, shift), min_size=1, max_size=max_gts - 1)
    return st.builds(
        lambda box, moved: [box, *(tuple(c + d for c, d in zip(box, m, strict=True)) for m in moved)],
        _box(size, 8 * _GRID),
        shifts,
    )


def conflicting_anchors(*, size: int = 64, max_gts: int = 6) -> st.SearchStrategy[Boxes]:
    """Ground truths that crowd about one point, so that they compete for the same few anchors.

    Parameters
    ----------
    size, max_gts : int
        As for `ground_truths`.

    Returns
    -------
    SearchStrategy of list of (float, float, float, float)
    """
    point = st.integers(size // 4, 3 * size // 4)
    half = st.integers(_GRID, size // 2 * _GRID).map(lambda steps: steps / _GRID)
    halves = st.lists(st.tuples(half, half), min_size=2, max_size=max_gts)
    return st.builds(lambda x, y, sides: [(x - w, y - h, x + w, y + h) for w, h in sides], point, point, halves)


def anchors_on_edges(*, size: int = 64, stride: int = 8) -> st.SearchStrategy[Boxes]:
    """Ground truths whose edges run exactly through anchor points, or through cell corners.

    Parameters
    ----------
    size : int
        Side of the image in pixels.
    stride : int
        Pixels a cell: points lie at odd multiples of half of it.

    Returns
    -------
    SearchStrategy of list of (float, float, float, float)
    """
    line = st.integers(0, 2 * size // stride).map(lambda halves: halves * stride / 2)
    side = st.tuples(line, line).filter(lambda ends: ends[0] < ends[1])
    box = st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), side, side)
    return st.lists(box, min_size=1, max_size=3)


def degenerate_boxes(*, size: int = 64) -> st.SearchStrategy[Boxes]:
    """Ground truths among which some have no width, no height, swapped corners, or lie outside the image.

    Parameters
    ----------
    size : int
        Side of the image in pixels.

    Returns
    -------
    SearchStrategy of list of (float, float, float, float)
    """

    def spoil(box: Box, how: str) -> Box:
        left, top, right, bottom = box
        return {
            "no width": (left, top, left, bottom),
            "no height": (left, top, right, top),
            "point": (left, top, left, top),
            "swapped": (right, top, left, bottom),
            "swapped twice": (right, bottom, left, top),
            "outside": (left - 2 * size, top - 2 * size, right - 2 * size, bottom - 2 * size),
        }[how]

    ways = st.sampled_from(["no width", "no height", "point", "swapped", "swapped twice", "outside"])
    spoilt = st.builds(spoil, _box(size), ways)
    return st.builds(
        lambda bad, good: [*bad, *good], st.lists(spoilt, min_size=1, max_size=2), ground_truths(max_gts=2)
    )


def predictions() -> st.SearchStrategy[Predictor]:
    """Recipes for finite predictions: trained, untrained, perfect, all equal, or with extreme logits.

    Returns
    -------
    SearchStrategy of Predictor

    Examples
    --------
    >>> from hypothesis import find
    >>> find(predictions(), lambda _: True).style
    'trained'
    """
    return st.one_of(
        st.just(Predictor("trained")),
        st.just(Predictor("random")),
        st.just(Predictor("first-only")),
        st.builds(lambda matches: Predictor("perfect", matches=matches), st.integers(1, 4)),
        st.just(Predictor("equal")),
        st.builds(
            lambda magnitude: Predictor("extreme-logits", magnitude=magnitude), st.sampled_from([20.0, 60.0, 200.0])
        ),
    )


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    images: st.SearchStrategy[Boxes] | None = None,
    predictors: st.SearchStrategy[Predictor] | None = None,
    max_images: int = 3,
    size: int = 64,
    tags: Sequence[str] = ("drawn",),
) -> Scene:
    """Scenes of several images whose boxes come from one of the strategies above.

    Parameters
    ----------
    images : strategy of list of boxes, optional
        Each image's ground truths; `ground_truths` without it.
    predictors : strategy of Predictor, optional
        `predictions` without it.
    max_images : int
    size : int
        Shorter side of the images in pixels; the longer may be twice as long.
    tags : sequence of str
        Words of `TAGS`.

    Returns
    -------
    SearchStrategy of Scene
    """
    boxes = draw(st.lists(ground_truths(size=size) if images is None else images, min_size=1, max_size=max_images))
    num_classes = draw(st.sampled_from([3, 1, 20]))
    labels = [draw(st.lists(st.integers(0, num_classes - 1), min_size=len(b), max_size=len(b))) for b in boxes]
    width, height = draw(st.sampled_from([(size, size), (2 * size, size), (size, 2 * size)]))
    return Scene(
        name="drawn",
        image_size=(height, width),
        num_classes=num_classes,
        gt_boxes=tuple(torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes),
        gt_labels=tuple(torch.tensor(row, dtype=torch.int64) for row in labels),
        predictor=draw(predictions() if predictors is None else predictors),
        tags=frozenset(tags),
        note="Drawn by Hypothesis.",
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def integer_k_boundary(*, max_images: int = 2) -> st.SearchStrategy[Scene]:
    """Scenes whose perfect predictions make sums of IoUs whole numbers, where truncation decides.

    Parameters
    ----------
    max_images : int

    Returns
    -------
    SearchStrategy of Scene
    """
    perfect = st.builds(lambda matches: Predictor("perfect", matches=matches), st.integers(1, 5))
    return batches(
        images=st.lists(_box(64, 8 * _GRID), min_size=1, max_size=3), predictors=perfect, max_images=max_images
    )


def scenes(*, system: str | None = None, max_images: int = 3) -> st.SearchStrategy[Scene]:
    """Scenes of every kind above, plain ones first.

    Parameters
    ----------
    system : str, optional
        Only what says something about this system: sums of IoUs decide nothing in ``ssd``, ``anchor_head`` and
        ``yolov8``, and ``ssd`` refuses images without ground truths.
    max_images : int

    Returns
    -------
    SearchStrategy of Scene

    Raises
    ------
    InputError
        If there is no such system; when a scene is drawn.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(scenes(), lambda scene: scene.max_gts >= 2).num_images
    1
    >>> find(scenes(system="ssd"), lambda scene: True).max_gts
    1
    """
    return st.deferred(lambda: _scenes(system, max_images))


def _scenes(system: str | None, max_images: int) -> st.SearchStrategy[Scene]:
    name = system if system is None else system_of(system).name
    plain = ground_truths(min_gts=1 if name in _NEEDS_GTS else 0)
    kinds = (plain, overlapping_gts(), conflicting_anchors(), anchors_on_edges(), degenerate_boxes())
    found = [batches(images=kind, max_images=max_images) for kind in kinds]
    if name is None or name in _SUMS_IOUS:
        found.append(integer_k_boundary(max_images=max_images))
    return st.one_of(found)
