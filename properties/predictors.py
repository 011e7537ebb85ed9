"""Recipes for predictions: what a detector's head might say about a scene, before any system's encoding.

``trained`` is shaped by the raw outputs of a YOLOX-nano on real images. An anchor *suits* a ground truth as far as it
is near the centre and its stride fits the size; the better it suits, the closer its box and the higher its logits.
All random numbers come from a generator seeded by the scene, so that a scene is replayed by its name and seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from detoracle.properties.sampling import box_with_iou, quantile
from detoracle.reference.errors import InputError

if TYPE_CHECKING:
    from detoracle.properties.scenes import Scene

__all__ = ["SPECK", "Predicted", "Predictor", "Style", "predict"]

Style = Literal[
    "trained",
    "random",
    "perfect",
    "equal",
    "first-only",
    "extreme-logits",
    "overconfident",
    "extreme-boxes",
    "nan-box",
    "nan-class",
    "nan-objectness",
    "inf-box",
    "inf-class",
]

SPECK = 2.0**-10
"""Side in pixels of the smallest predicted box: an IoU with it vanishes in a sum of float32."""

_BEST_IOU = ((0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), (0.2, 0.56, 0.75, 0.875, 0.94, 0.975, 0.995))
_UNSUITED = 0.05  # an anchor that suits no ground truth better than this predicts background


@dataclass(frozen=True)
class Predictor:
    """Recipe for the predictions of a scene.

    Attributes
    ----------
    style : str
        ``trained``: a trained detector. ``random``: an untrained one.
        ``perfect``: the `matches` anchors nearest to each centre predict exactly its box, all others a speck.
        ``equal``: all boxes are two cells wide about their anchor, all logits 0.
        The others are ``trained``, but: ``first-only``: every anchor predicts the image's first ground truth.
        ``extreme-logits``: every logit is plus or minus `magnitude`, each as often where there is no ground truth.
        ``overconfident``: all logits are plus `magnitude` near the first ground truth's centre, minus elsewhere.
        ``extreme-boxes``: of four anchors one predicts sides exp(`magnitude`) times as long, one a speck.
        ``nan-box``, ``inf-box``, ``nan-class``, ``inf-class``, ``nan-objectness``: so says the anchor nearest to the
        centre of the image's first ground truth; of a box, of its lower right corner.
    magnitude : float
        See `style`.
    matches : int
        See `style`.

    Raises
    ------
    InputError
        Unknown style, or a number below zero.

    Examples
    --------
    >>> Predictor("perfect", matches=2)
    Predictor(style='perfect', magnitude=0.0, matches=2)
    """

    style: Style = "trained"
    magnitude: float = 0.0
    matches: int = 0

    def __post_init__(self) -> None:
        """Refuse what no style means."""
        if self.style not in get_args(Style):
            raise InputError("style", expected=f"one of {', '.join(get_args(Style))}", got=repr(self.style))
        if self.magnitude < 0 or self.matches < 0:
            raise InputError("magnitude and matches", expected="0 or more", got=f"{self.magnitude}, {self.matches}")


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions of a batch in no system's encoding.

    Attributes
    ----------
    boxes : Tensor (B, A, 4) float32
        xyxy in pixels.
    class_logits : Tensor (B, A, C) float32
    objectness_logits : Tensor (B, A) float32
    """

    boxes: Tensor
    class_logits: Tensor
    objectness_logits: Tensor


def predict(scene: Scene, anchor_points: Tensor, anchor_strides: Tensor) -> Predicted:
    """Make a scene's predictions for a system's anchors.

    Parameters
    ----------
    scene : Scene
    anchor_points : Tensor (A, 2) float
        Where each anchor sits, in pixels.
    anchor_strides : Tensor (A,) float
        Pixels a cell.

    Returns
    -------
    Predicted
        The same for the same arguments, whatever the global generator and the number of threads.

    Examples
    --------
    >>> from detoracle.properties.scenes import Scene
    >>> boxes, labels = torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([2])
    >>> scene = Scene("one box", (64, 64), 4, (boxes,), (labels,), Predictor("perfect", matches=1))
    >>> points, strides = torch.tensor([[20.0, 28.0], [60.0, 60.0]]), torch.tensor([8.0, 8.0])
    >>> predict(scene, points, strides).boxes[0].tolist()[0]
    [8.0, 8.0, 40.0, 40.0]
    """
    points, strides = anchor_points.float(), anchor_strides.float()
    generator = torch.Generator().manual_seed(scene.seed)
    boxes, class_logits, objectness_logits = (
        torch.empty(scene.num_images, len(points), *channels, dtype=torch.float32)
        for channels in ((4,), (scene.num_classes,), ())
    )
    alter = _ALTERATIONS.get(scene.predictor.style)
    for image, (gt_boxes, gt_labels) in enumerate(zip(scene.gt_boxes, scene.gt_labels, strict=True)):
        head = _Head(
            scene.predictor,
            points,
            strides,
            _upright(gt_boxes),
            gt_labels.clamp(0, scene.num_classes - 1),
            boxes[image],
            class_logits[image],
            objectness_logits[image],
            generator,
        )
        _trained(head)
        if alter is not None:
            alter(head)
    return Predicted(boxes, class_logits, objectness_logits)


@dataclass(frozen=True, eq=False)
class _Head:
    """One image: what is known, and the views of the output that a style fills in."""

    predictor: Predictor
    points: Tensor
    strides: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    boxes: Tensor
    class_logits: Tensor
    objectness_logits: Tensor
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32)

    def nearest(self, count: int) -> Tensor:
        """Indices (G, count) of the anchors nearest to each centre, the first on ties."""
        centre = (self.gt_boxes[:, :2] + self.gt_boxes[:, 2:]) / 2
        distance = (centre[:, None] - self.points).square().sum(-1)
        return distance.argsort(dim=1, stable=True)[:, :count]


def _upright(boxes: Tensor) -> Tensor:
    """Boxes with their corners in order: what a detector can predict of an inverted one."""
    return torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)


# ----------------------------------------------------------------------------------------------------- the styles
def _trained(head: _Head) -> None:
    suits, ground_truth = _suitability(head)
    _background(head)
    near = suits > _UNSUITED
    if not near.any():
        return
    suits, ground_truth = suits[near], ground_truth[near]
    best = quantile(_BEST_IOU, head.uniform(len(head.gt_boxes)))[ground_truth]
    quality = best * suits.sqrt() * (1 - 0.25 * head.uniform(len(suits)) ** 2)
    head.boxes[near] = _at_least_specks(
        box_with_iou(head.gt_boxes[ground_truth], quality.clamp(min=0.02), generator=head.generator)
    )
    sure = (suits**2 * (best / 0.85)).clamp(max=1)
    objectness = head.objectness_logits[near]
    head.objectness_logits[near] = torch.lerp(objectness, -1.5 + 2.2 * head.normal(len(suits)), sure)
    anchor, label = near.nonzero().flatten(), head.gt_labels[ground_truth]
    right_class = head.class_logits[anchor, label]
    head.class_logits[anchor, label] = torch.lerp(right_class, 0.5 + 1.4 * head.normal(len(suits)), sure)


def _suitability(head: _Head) -> tuple[Tensor, Tensor]:
    """How well each anchor suits the ground truth it suits best (A,), 0 to 1, and which that is (A,)."""
    if not len(head.gt_boxes):
        return torch.zeros_like(head.strides), torch.zeros_like(head.strides, dtype=torch.int64)
    size = head.gt_boxes[:, 2:] - head.gt_boxes[:, :2]
    centre = (head.gt_boxes[:, :2] + head.gt_boxes[:, 2:]) / 2
    ideal_stride = (size.prod(1).sqrt() / 4).clamp(float(head.strides.min()), float(head.strides.max()))
    reach = head.strides / 2
    apart = head.points.new_zeros(len(size), len(head.points))  # from the centre, in half sides, at least half a stride
    for axis in (0, 1):
        along = (head.points[:, axis] - centre[:, axis, None]).abs_()
        torch.maximum(apart, along.div_(torch.maximum(size[:, axis, None] / 2, reach)), out=apart)
    mismatch = (head.strides.log2() - ideal_stride.log2()[:, None]).abs_()  # in levels
    suits = mismatch.neg_().add_(3.2).div_(2).clamp_(0, 1)
    return suits.mul_(apart.neg_().mul_(0.6).add_(1.1).clamp_(0, 1)).max(dim=0)


def _background(head: _Head) -> None:
    """Boxes of a few cells about the anchor, and logits as a trained head has them where nothing is."""
    count, stride = len(head.points), head.strides[:, None]
    centre = head.points + 0.6 * stride * head.normal(count, 2)
    half = stride / 2 * torch.exp(1.7 + 0.65 * head.normal(count, 2))
    head.boxes[:, :2], head.boxes[:, 2:] = centre - half, centre + half
    head.objectness_logits.copy_(-13.8 + 4.9 * head.normal(count))
    logits = head.normal(*head.class_logits.shape)
    skew = torch.where(logits > 0, 2.0, logits.abs().mul_(0.6).add_(2.2))  # the lower tail is the longer one
    torch.mul(logits, skew, out=head.class_logits).sub_(6.7)


def _at_least_specks(boxes: Tensor) -> Tensor:
    """Widen what is thinner than a speck; other sides stay to the bit."""
    thin = (boxes[:, 2:] - boxes[:, :2] < SPECK).repeat(1, 2)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return torch.where(thin, torch.cat([centre - SPECK / 2, centre + SPECK / 2], dim=1), boxes)


def _random(head: _Head) -> None:
    count, stride = len(head.points), head.strides[:, None]
    centre = head.points + 0.3 * stride * head.normal(count, 2)
    half = stride / 2 * torch.exp(0.5 * head.normal(count, 2))
    head.boxes[:, :2], head.boxes[:, 2:] = centre - half, centre + half
    head.class_logits.copy_(head.normal(*head.class_logits.shape) - 4.6)  # 0.01, the customary prior
    head.objectness_logits.copy_(head.normal(count) - 4.6)


def _perfect(head: _Head) -> None:
    head.boxes[:, :2], head.boxes[:, 2:] = head.points - SPECK / 2, head.points + SPECK / 2
    for gt_box, anchors in zip(head.gt_boxes, head.nearest(head.predictor.matches), strict=True):
        head.boxes[anchors] = _at_least_specks(gt_box[None])


def _equal(head: _Head) -> None:
    stride = head.strides[:, None]
    head.boxes[:, :2], head.boxes[:, 2:] = head.points - stride, head.points + stride
    head.class_logits.zero_()
    head.objectness_logits.zero_()


def _first_only(head: _Head) -> None:
    quality = 0.4 + 0.3 * head.uniform(len(head.points))
    for gt_box in head.gt_boxes[:1]:
        target = gt_box.expand(len(quality), 4)
        head.boxes.copy_(_at_least_specks(box_with_iou(target, quality, generator=head.generator)))


def _extreme_logits(head: _Head) -> None:
    """The medians split the signs, so that both come as often in both."""
    for logits, middle in ((head.class_logits, -6.7), (head.objectness_logits, -12.7)):
        logits.copy_((logits - middle).sign() * head.predictor.magnitude)


def _overconfident(head: _Head) -> None:
    for logits in (head.class_logits, head.objectness_logits):
        logits.fill_(-head.predictor.magnitude)
        for gt_box in head.gt_boxes[:1]:
            apart = (head.points - (gt_box[:2] + gt_box[2:]) / 2).abs()
            logits[(apart < 2.5 * head.strides[:, None]).all(1)] = head.predictor.magnitude


def _extreme_boxes(head: _Head) -> None:
    centre = (head.boxes[:, :2] + head.boxes[:, 2:]) / 2
    half = (head.boxes[:, 2:] - head.boxes[:, :2]) / 2
    drawn = head.uniform(len(half), 1)
    half = torch.where(drawn < 0.25, half * math.exp(head.predictor.magnitude), half)
    half = torch.where(drawn > 0.75, SPECK / 2, half)
    head.boxes[:, :2], head.boxes[:, 2:] = centre - half, centre + half


def _spoil_box(head: _Head, value: float) -> None:
    for anchor in head.nearest(1)[:1].flatten():
        head.boxes[anchor, 2:] = value


def _spoil_class(head: _Head, value: float) -> None:
    for anchor, label in zip(head.nearest(1)[:1].flatten(), head.gt_labels[:1], strict=True):
        head.class_logits[anchor, label] = value


def _spoil_objectness(head: _Head, value: float) -> None:
    head.objectness_logits[head.nearest(1)[:1].flatten()] = value


_ALTERATIONS: dict[str, Callable[[_Head], None]] = {
    "random": _random,
    "perfect": _perfect,
    "equal": _equal,
    "first-only": _first_only,
    "extreme-logits": _extreme_logits,
    "overconfident": _overconfident,
    "extreme-boxes": _extreme_boxes,
    "nan-box": lambda head: _spoil_box(head, torch.nan),
    "inf-box": lambda head: _spoil_box(head, torch.inf),
    "nan-class": lambda head: _spoil_class(head, torch.nan),
    "inf-class": lambda head: _spoil_class(head, torch.inf),
    "nan-objectness": lambda head: _spoil_objectness(head, torch.nan),
}
