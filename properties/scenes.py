"""What a scene is: the ground truths of a few images and a recipe for predictions, the same for every system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.predictors import Predictor
from detoracle.reference.errors import InputError

__all__ = ["TAGS", "Scene"]

TAGS: Mapping[str, str] = {
    # What follows from the other fields; a scene adds these itself.
    "bad-label": "A class index lies outside 0 to C-1.",
    "border": "A box touches or crosses the image's border.",
    "degenerate": "A box has a side of zero or less: no area, or swapped corners.",
    "empty": "An image has no ground truth.",
    "few-anchors": "There are fewer cells than the largest top-k (13) asks for.",
    "half-overflow": "The area of a box exceeds 65504, the largest float16.",
    "huge": "A box is at least as large as the image.",
    "identical": "Two ground truths of an image have the same box.",
    "many-classes": "There are at least 128 classes.",
    "many-gts": "An image has more than 128 ground truths.",
    "negative-sum": "The four coordinates of a box, or class, centre and size, add up to zero or less.",
    "non-square": "Height and width of the image differ.",
    "odd-size": "The image's size is no multiple of the largest stride.",
    "off-grid": "The centre of a box lies outside the image.",
    "one-class": "There is a single class.",
    "one-level": "The head has a single level.",
    "outside": "A box lies outside the image altogether.",
    "ragged": "The images of a batch have different numbers of ground truths.",
    "single": "The scene has exactly one ground truth.",
    "tiny": "A box is smaller than a cell of the finest level.",
    "zero-row": "A ground truth is all zeros, as padding is.",
    # What only the author knows.
    "conflict": "Several ground truths compete for the same anchors.",
    "crowd": "Many boxes an image, most of them small.",
    "drawn": "A Hypothesis strategy drew the scene.",
    "equal": "All anchors predict the same relative to their place.",
    "extreme-boxes": "Predicted boxes are thousands of pixels wide, or specks.",
    "extreme-logits": "Logits are so large that probabilities round to 0 or 1.",
    "file": "Ground truths come from a file of annotations.",
    "no-overlap": "No prediction overlaps a ground truth to speak of.",
    "non-finite": "A prediction is NaN or infinite.",
    "on-edge": "An anchor point lies exactly on an edge that decides, or anchors tie exactly.",
    "perfect": "A few predictions equal their ground truth, so that IoU sums are whole numbers.",
    "random": "Drawn by a seeded generator: boxes of all sizes, a half-trained detector.",
    "realistic": "Counts, sizes and overlaps follow real images, predictions a trained detector.",
    "recorded": "Predictions are recorded outputs of a real network.",
}
"""The vocabulary of `Scene.tags`, each word with what it promises."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Ground truths of a batch of images, and how predictions for them are made.

    Attributes
    ----------
    name : str
    image_size : (int, int)
        Height and width of the network's input in pixels.
    num_classes : int
    gt_boxes : tuple of Tensor (Gi, 4) float32
        xyxy in pixels, one tensor an image.
    gt_labels : tuple of Tensor (Gi,) int64
        Class, one tensor an image.
    predictor : Predictor
        Recipe for the predictions.
    tags : frozenset of str
        Words of `TAGS`; those that follow from the other fields are added.
    note : str
        Why this scene, in one sentence.
    seed : int
        Decides every random number of the predictions.
    strides : tuple of int
        Pixels a cell, one a level.
    native : mapping of str to mapping
        System to inputs given directly; for that system `predictor` is not used.

    Raises
    ------
    InputError
        Number, shape, dtype or values do not fit the above.

    Examples
    --------
    >>> scene = Scene(
    ...     "one box", (64, 64), 4, (torch.tensor([[8.0, 8, 40, 40]]),), (torch.tensor([2]),), note="an example"
    ... )
    >>> scene.num_images, scene.max_gts, scene.level_sizes, sorted(scene.tags)
    (1, 1, ((8, 8), (4, 4), (2, 2)), ['single'])
    """

    name: str
    image_size: tuple[int, int]
    num_classes: int
    gt_boxes: tuple[Tensor, ...]
    gt_labels: tuple[Tensor, ...]
    predictor: Predictor = field(default_factory=Predictor)
    tags: frozenset[str] = frozenset()
    note: str = ""
    seed: int = 0
    strides: tuple[int, ...] = (8, 16, 32)
    native: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what every system relies on, and add the tags that follow."""
        for what, numbers in (
            ("image_size", self.image_size),
            ("num_classes", [self.num_classes]),
            ("strides", self.strides),
        ):
            if not numbers or min(numbers) < 1:
                raise self._error(what, expected="whole numbers above 0", got=str(numbers))
        if not len(self.gt_boxes) == len(self.gt_labels) > 0:
            got = f"{len(self.gt_boxes)} and {len(self.gt_labels)}"
            raise self._error("gt_boxes and gt_labels", expected="as many, one an image, at least one", got=got)
        for image, (boxes, labels) in enumerate(zip(self.gt_boxes, self.gt_labels, strict=True)):
            self._check_image(image, boxes, labels)
        if unknown := self.tags - TAGS.keys():
            raise self._error("tags", expected="words of TAGS", got=", ".join(sorted(unknown)))
        object.__setattr__(self, "tags", self.tags | _following_tags(self))

    def _check_image(self, image: int, boxes: Tensor, labels: Tensor) -> None:
        if boxes.dtype != torch.float32 or boxes.shape != (len(boxes), 4) or not boxes.isfinite().all():
            finite = "finite" if boxes.isfinite().all() else "not finite"
            got = f"{tuple(boxes.shape)} {boxes.dtype}, {finite}"
            raise self._error(f"gt_boxes of image {image}", expected="shape (G, 4), torch.float32, finite", got=got)
        if labels.dtype != torch.int64 or labels.shape != (len(boxes),):
            got = f"{tuple(labels.shape)} {labels.dtype}"
            raise self._error(f"gt_labels of image {image}", expected=f"shape ({len(boxes)},), torch.int64", got=got)

    def _error(self, what: str, *, expected: str, got: str) -> InputError:
        return InputError(what, expected=expected, got=got, where=f"scene '{self.name}'")

    @property
    def num_images(self) -> int:
        """Images in the batch."""
        return len(self.gt_boxes)

    @property
    def max_gts(self) -> int:
        """Ground truths of the fullest image."""
        return max(len(labels) for labels in self.gt_labels)

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each level in cells: cells that stick out of the image count."""
        height, width = self.image_size
        return tuple((-(-height // stride), -(-width // stride)) for stride in self.strides)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ground truths of all images in one tensor, zeros where an image has fewer than the fullest.

        Returns
        -------
        gt_boxes : Tensor (B, G, 4) float32
            xyxy in pixels.
        gt_labels : Tensor (B, G) int64
        gt_valid : Tensor (B, G) bool
            False for padding.

        Examples
        --------
        >>> boxes = torch.tensor([[8.0, 8, 40, 40]]), torch.zeros(0, 4)
        >>> labels = torch.tensor([2]), torch.zeros(0, dtype=torch.int64)
        >>> Scene("two images", (64, 64), 4, boxes, labels).padded()[2].tolist()
        [[True], [False]]
        """
        gt_boxes = torch.zeros(self.num_images, self.max_gts, 4)
        gt_labels = torch.zeros(self.num_images, self.max_gts, dtype=torch.int64)
        gt_valid = torch.zeros(self.num_images, self.max_gts, dtype=torch.bool)
        for image, (boxes, labels) in enumerate(zip(self.gt_boxes, self.gt_labels, strict=True)):
            gt_boxes[image, : len(boxes)] = boxes
            gt_labels[image, : len(labels)] = labels
            gt_valid[image, : len(labels)] = True
        return gt_boxes, gt_labels, gt_valid


def _following_tags(scene: Scene) -> frozenset[str]:
    """Tags that are facts of the scene's other fields."""
    counts = [len(labels) for labels in scene.gt_labels]
    boxes, labels = torch.cat(scene.gt_boxes), torch.cat(scene.gt_labels)
    left_top, right_bottom = boxes[:, :2], boxes[:, 2:]
    size, centre = right_bottom - left_top, (left_top + right_bottom) / 2
    image = boxes.new_tensor([scene.image_size[1], scene.image_size[0]])
    row_sum = labels + centre.sum(1) + size.sum(1)
    facts = {
        "bad-label": ((labels < 0) | (labels >= scene.num_classes)).any(),
        "border": ((left_top <= 0) | (right_bottom >= image)).any(),
        "degenerate": (size <= 0).any(),
        "empty": min(counts) == 0,
        "few-anchors": sum(height * width for height, width in scene.level_sizes) < 13,
        "half-overflow": (size.prod(1) > torch.finfo(torch.float16).max).any(),
        "huge": (size >= image).all(1).any(),
        "identical": any(len(set(map(tuple, boxes.tolist()))) < len(boxes) for boxes in scene.gt_boxes),
        "many-classes": scene.num_classes >= 128,
        "many-gts": max(counts) > 128,
        "negative-sum": ((boxes.sum(1) <= 0) | (row_sum <= 0)).any(),
        "non-square": scene.image_size[0] != scene.image_size[1],
        "odd-size": any(side % max(scene.strides) for side in scene.image_size),
        "off-grid": ((centre < 0) | (centre > image)).any(),
        "one-class": scene.num_classes == 1,
        "one-level": len(scene.strides) == 1,
        "outside": ((right_bottom <= 0) | (left_top >= image)).any(),
        "ragged": len(set(counts)) > 1,
        "single": sum(counts) == 1,
        "tiny": ((size > 0) & (size < min(scene.strides))).all(1).any(),
        "zero-row": ((boxes == 0).all(1) & (labels == 0)).any(),
    }
    return frozenset(tag for tag, holds in facts.items() if holds)
