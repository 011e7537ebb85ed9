"""Small random scenes: what `check` draws beyond the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detoracle.properties.predictors import Predictor
from detoracle.properties.scenes import Scene

__all__ = ["random_scenes"]

_SIZES = (64, 96, 128)


def random_scenes(count: int, *, seed: int) -> Iterator[Scene]:
    """Draw small scenes of one to three images, crowded, empty or in between.

    Parameters
    ----------
    count : int
    seed : int
        Scene number i depends on ``seed`` and i alone.

    Yields
    ------
    Scene
        Tagged ``random``.

    Examples
    --------
    >>> [scene.num_images for scene in random_scenes(3, seed=0)] == [s.num_images for s in random_scenes(3, seed=0)]
    True
    """
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

        def draw(choices: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(choices, (1,), generator=generator))

        height, width = _SIZES[draw(3)], _SIZES[draw(3)]
        num_classes = (1, 3, 7, 20)[draw(4)]
        counts = [(0, 1, 2, 3, 5, 8, 13)[draw(7)] for _ in range(1 + draw(3))]
        yield Scene(
            name=f"random {seed}-{number}",
            image_size=(height, width),
            num_classes=num_classes,
            gt_boxes=tuple(_boxes(n, height, width, generator) for n in counts),
            gt_labels=tuple(torch.randint(num_classes, (n,), generator=generator) for n in counts),
            predictor=Predictor("trained" if draw(4) else "random"),
            tags=frozenset({"random"}),
            note="Boxes of all sizes, some beside each other, predictions of a half-trained detector.",
            seed=seed * 1_000_003 + number,
        )


def _boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes (count, 4) xyxy whose sizes are log-uniform from 4 px to the image, a third of them near the one before."""
    image = torch.tensor([width, height], dtype=torch.float32)
    centre = torch.rand(count, 2, generator=generator) * image
    near = torch.rand(count, generator=generator) < 1 / 3
    for index in range(1, count):
        if near[index]:
            centre[index] = centre[index - 1] + 8 * torch.randn(2, generator=generator)
    size = 4 * (image / 4) ** torch.rand(count, 2, generator=generator)
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)
