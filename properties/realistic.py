"""Ground truths as real images have them: how many, how large, how they overlap and repeat.

``coco`` is shaped by everyday photographs, ``crowd`` by drone views of streets; images are letterboxed to the top left.
Its boxes come in *groups* of one class and similar size that lie near each other; a few boxes are *twins* that overlap
another by more than half, as a rider does with a horse; all others keep apart where there is room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from detoracle.properties.sampling import box_with_iou, quantile
from detoracle.properties.scenes import Scene
from detoracle.reference.boxes import cxcywh_to_xyxy, iou_yolox
from detoracle.reference.errors import InputError

__all__ = ["built_in", "realistic"]

Knots = tuple[tuple[float, ...], tuple[float, ...]]
_ROUNDS = 20  # attempts to keep a box apart from the others


@dataclass(frozen=True)
class _Preset:
    """Measured on real sets, at a longer image side of 640 pixels."""

    counts: Knots  # share of images, boxes an image
    sizes: Knots  # share of boxes, square root of the area in pixels
    aspect: tuple[float, float]  # mean and spread of log(width / height)
    spread: tuple[float, float, float, float]  # of log size: by the image's count, by image, by group, by box
    newness: float  # the i-th box founds a group with probability newness / (newness + i)
    twins: float  # share of boxes that overlap another by more than half by intent
    image_aspects: tuple[float, ...]  # width / height, all as likely
    num_classes: int


_PRESETS = {
    "coco": _Preset(
        counts=((0, 0.006, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1), (0, 1, 3, 6, 12, 19, 24, 40, 51.9)),
        sizes=((0, 0.01, 0.1, 0.5, 0.9, 0.99, 1), (2, 7, 15, 56, 246, 504, 640)),
        aspect=(-0.16, 0.72),
        spread=(0.65, 0.4, 0.35, 0.55),
        newness=2.6,
        twins=0.012,
        image_aspects=(4 / 3, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 1, 3 / 4, 2 / 3),
        num_classes=80,
    ),
    "crowd": _Preset(
        counts=((0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1), (1, 40, 65, 93, 123, 158, 212, 317.9)),
        sizes=((0, 0.01, 0.1, 0.5, 0.9, 0.99, 1), (1.2, 3, 5, 11, 28, 59, 280)),
        aspect=(-0.17, 0.64),
        spread=(0.25, 0.55, 0.55, 0.58),
        newness=6,
        twins=0.025,
        image_aspects=(16 / 9,),
        num_classes=10,
    ),
}


def realistic(
    preset: Literal["coco", "crowd"],
    *,
    num_images: int,
    seed: int,
    image_size: tuple[int, int] = (640, 640),
    num_classes: int | None = None,
    num_gts: int | None = None,
) -> Scene:
    """Draw a scene whose ground truths look like those of real images, with a trained detector's predictions.

    Parameters
    ----------
    preset : {"coco", "crowd"}
        0 to 51 boxes an image, half of them under 56 pixels; or 1 to 317, half of them under 11.
    num_images : int
        Their counts are spread evenly over the distribution, so that a few images show its range.
    seed : int
        Decides everything.
    image_size : (int, int)
        Height and width of the network's input in pixels.
    num_classes : int, optional
        80 for ``coco``, 10 for ``crowd``. The lower the class, the more frequent.
    num_gts : int, optional
        Boxes of every image, instead of as many as real images have.

    Raises
    ------
    InputError
        Unknown preset, no image, or a negative number of boxes.

    Examples
    --------
    >>> scene = realistic("coco", num_images=2, seed=0)
    >>> scene.num_images, scene.num_classes, "realistic" in scene.tags
    (2, 80, True)
    """
    if preset not in _PRESETS:
        raise InputError("preset", expected=f"one of {', '.join(_PRESETS)}", got=repr(preset), where="realistic")
    if num_images < 1:
        raise InputError("num_images", expected="at least 1", got=str(num_images), where="realistic")
    shape = _PRESETS[preset]
    if num_gts is not None:
        if num_gts < 0:
            raise InputError("num_gts", expected="0 or more", got=str(num_gts), where="realistic")
        shape = replace(shape, counts=((0, 1), (num_gts + 0.5, num_gts + 0.5)))
    classes = num_classes or shape.num_classes
    generator = torch.Generator().manual_seed(seed)
    ranks = (torch.randperm(num_images, generator=generator) + _uniform(generator, num_images)) / num_images
    images = [_image(shape, rank, image_size, classes, generator) for rank in ranks]
    height, width = image_size
    return Scene(
        name=f"{preset}-{num_images}x{height}x{width}-seed-{seed}",
        image_size=image_size,
        num_classes=classes,
        gt_boxes=tuple(boxes for boxes, _ in images),
        gt_labels=tuple(labels for _, labels in images),
        tags=frozenset({"realistic"} | ({"crowd"} if preset == "crowd" else set())),
        note=f"Ground truths as in real images ({preset}), predictions as of a trained detector.",
        seed=seed,
    )


def built_in(kind: Literal["realistic", "crowd"], seed: int = 0) -> tuple[Scene, ...]:
    """The sets of realistic scenes that a comparison runs by default.

    Parameters
    ----------
    kind : {"realistic", "crowd"}
        Everyday images, or crowded ones, at two input sizes each.
    seed : int
        Of the first scene; the others count on from it.

    Raises
    ------
    InputError
        Unknown kind.

    Examples
    --------
    >>> [scene.name for scene in built_in("crowd", seed=3)]
    ['crowd-1x640x640-seed-3', 'crowd-2x384x640-seed-4']
    """
    sets: dict[str, tuple[Literal["coco", "crowd"], list[tuple[int, tuple[int, int]]]]] = {
        "realistic": ("coco", [(1, (640, 640)), (2, (320, 416))]),
        "crowd": ("crowd", [(1, (640, 640)), (2, (384, 640))]),
    }
    if kind not in sets:
        raise InputError("kind", expected=f"one of {', '.join(sets)}", got=repr(kind), where="built_in")
    preset, members = sets[kind]
    return tuple(
        realistic(preset, num_images=images, seed=seed + number, image_size=size)
        for number, (images, size) in enumerate(members)
    )


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _image(
    preset: _Preset, rank: Tensor, image_size: tuple[int, int], num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes and labels of the image at that rank of the counts."""
    count = int(quantile(preset.counts, rank))
    group, founder = _groups(count, preset.newness, generator)
    frequency = 1 / torch.arange(1, num_classes + 1)
    labels = torch.multinomial(frequency, count + 1, replacement=True, generator=generator)[group]

    choice = torch.randint(len(preset.image_aspects), (), generator=generator)
    content = _letterbox(image_size, preset.image_aspects[int(choice)])
    size = _sizes(preset, rank, group, content, generator)
    boxes = _place(size, group, founder, content, generator)

    twin = (_uniform(generator, count) < preset.twins).nonzero().flatten()
    if count > 1:
        other = (twin + 1 + torch.randint(count - 1, (len(twin),), generator=generator)) % count
        boxes[twin] = box_with_iou(boxes[other], 0.55 + 0.35 * _uniform(generator, len(twin)), generator=generator)
    return torch.minimum(boxes.clamp(min=0), content.repeat(2)), labels


def _groups(count: int, newness: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Number of each box's group, and the box that founded it: rich groups get richer."""
    founds = _uniform(generator, count) < newness / (newness + torch.arange(count))
    joined = (_uniform(generator, count) * torch.arange(count)).long().tolist()
    founder: list[int] = []
    for box, alone in enumerate(founds.tolist()):
        founder.append(box if alone or box == 0 else founder[joined[box]])
    founders = torch.tensor(founder, dtype=torch.int64)
    return torch.unique(founders, return_inverse=True)[1], founders


def _letterbox(image_size: tuple[int, int], aspect: float) -> Tensor:
    """Width and height in pixels of an image of that aspect scaled to fit."""
    height, width = image_size
    return torch.tensor([min(width, height * aspect), min(height, width / aspect)], dtype=torch.float32)


def _sizes(preset: _Preset, rank: Tensor, group: Tensor, content: Tensor, generator: torch.Generator) -> Tensor:
    """Widths and heights (G, 2): smaller in fuller images, alike in a group, all together as the knots say."""
    count = len(group)
    by_count, by_image, by_group, by_box = (part / math.hypot(*preset.spread) for part in preset.spread)
    of_group = _normal(generator, count + 1, 2)[group]
    score = (
        -by_count * torch.special.ndtri(_share_of_boxes(preset.counts, rank).clamp(0.001, 0.999))
        + by_image * _normal(generator, 1)
        + by_group * of_group[:, 0]
        + by_box * _normal(generator, count)
    )
    side = quantile(preset.sizes, torch.special.ndtr(score)) * content.max() / 640
    mean, spread = preset.aspect
    aspect = torch.exp(mean + spread * (0.8 * of_group[:, 1] + 0.6 * _normal(generator, count)))
    width = torch.minimum(side * aspect.sqrt(), content[0])
    height = torch.minimum(side**2 / width, content[1])
    return torch.stack([width, height], dim=1)


def _share_of_boxes(counts: Knots, rank: Tensor) -> Tensor:
    """Share of all boxes that lie in images up to that rank."""
    ranks = torch.linspace(0, 1, 1001, dtype=torch.float32)
    cumulative = quantile(counts, ranks).cumsum(0)
    return (cumulative / cumulative[-1])[(rank * 1000).long()]


def _place(size: Tensor, group: Tensor, founder: Tensor, content: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes (G, 4) of these sizes inside the image, members about their founder, none upon another if avoidable."""
    room = content - size
    members = group.bincount()[group] if len(group) else group
    reach = 0.7 * size * members.sqrt()[:, None]
    centre = size / 2 + room * _anywhere(len(size), generator)
    boxes = cxcywh_to_xyxy(torch.cat([centre, size], dim=1))
    crowded = torch.ones(len(size), dtype=torch.bool)
    for widening in range(_ROUNDS):
        near = centre[founder] + reach * (1 + widening / 2) * _normal(generator, len(size), 2)
        fresh = size / 2 + room * _anywhere(len(size), generator)
        is_founder = founder == torch.arange(len(founder))
        outside = ((near < size / 2) | (near > content - size / 2)).any(1)
        moved = torch.where((is_founder | outside)[:, None], fresh, near)
        centre = torch.where(crowded[:, None], moved, centre)
        boxes = cxcywh_to_xyxy(torch.cat([centre, size], dim=1))
        crowded = iou_yolox(boxes, boxes, form="xyxy").tril(-1).gt(0.5).any(1)
        if not crowded.any():
            break
    return boxes


def _anywhere(count: int, generator: torch.Generator) -> Tensor:
    """Relative places (G, 2), across the whole width, and more often halfway up than at the top or bottom."""
    draws = _uniform(generator, count, 3)
    return torch.stack([draws[:, 0], draws[:, 1:].mean(1)], dim=1)
