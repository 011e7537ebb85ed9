"""The common result of all five systems: who is assigned to whom, and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pytest loads our plugin in every run: `import detoracle` must not take a second
    from torch import Tensor

__all__ = ["BACKGROUND", "IGNORED", "Assignment"]

BACKGROUND = -1
IGNORED = -2


@dataclass(frozen=True, eq=False)
class Assignment:
    """Per image and anchor, the ground truth it is assigned to.

    Attributes
    ----------
    gt_index : Tensor (B, A) int64
        Index into the image's (padded) ground truths, -1 for background, -2 for ignored anchors.
    quality : Tensor (B, A) float
        What the system trains towards at a positive (matched IoU, alignment score, ...); 0 elsewhere.
    extra : mapping of str to Tensor
        Whatever else the system yields, by the names its oracle documents.

    Examples
    --------
    >>> import torch
    >>> Assignment(torch.tensor([[0, -1]]), torch.tensor([[0.8, 0.0]])).positive.tolist()
    [[True, False]]
    """

    gt_index: Tensor
    quality: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def positive(self) -> Tensor:
        """Mask of assigned anchors, (B, A) bool."""
        return self.gt_index >= 0
