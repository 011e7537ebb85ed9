"""The world of an image whose background is mined: a matching, and the hard negatives that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND, IGNORED
from detoracle.reference.explain.explanation import World

__all__ = ["MinedWorld"]

_EITHER = frozenset([BACKGROUND, IGNORED])


@dataclass(frozen=True, eq=False, kw_only=True)
class MinedWorld(World):
    """One image's matching and, given who is positive, its hard negatives.

    Positives have their ground truth, hard negatives -1, and anchors that take no part -2.

    Attributes
    ----------
    matching : World
    negatives : callable
        Maps a matching (A,) to the world of its hard negatives.
    """

    matching: World
    negatives: Callable[[Tensor], World]

    @classmethod
    def of(cls, matching: World, negatives: Callable[[Tensor], World]) -> MinedWorld:
        """Mine the negatives of a matching."""
        mined = negatives(matching.gt_index)
        margin = torch.minimum(matching.margin, mined.margin)
        choices = {**mined.choices, **_outcomes(matching)}
        return cls(mined.gt_index, margin, choices, matching=matching, negatives=negatives)

    def wrong(self, gt_index: Tensor) -> Tensor:
        """Anchors (A,) bool whose outcome the matching, or the mining that follows from it, does not admit."""
        matched = self._matched(gt_index)
        return self.matching.wrong(matched) | self.negatives(matched).wrong(gt_index)

    def _matched(self, gt_index: Tensor) -> Tensor:
        """The matching behind an outcome; whether an anchor that is no positive is background is the float64 one's."""
        likely = torch.where(self.matching.gt_index >= 0, BACKGROUND, self.matching.gt_index)
        return torch.where(gt_index >= 0, gt_index, likely)

    def options(self, gt_index: Tensor) -> Mapping[int, frozenset[int]]:
        """Outcomes of open matches, and of anchors that may be hard negatives beside the positives given."""
        return {**self.negatives(self._matched(gt_index)).choices, **_outcomes(self.matching)}

    def nearest(self, gt_index: Tensor, evidence: Tensor) -> Tensor:
        """Mine anew by the positives given, as they may be, with those of the hard negatives given that may be."""
        mined = self.negatives(self.matching.nearest(self._matched(gt_index), evidence))
        free = torch.tensor(sorted(mined.choices), dtype=torch.int64, device=gt_index.device)
        return mined.nearest(mined.gt_index.index_copy(0, free, gt_index[free]), evidence)

    def outcomes(self) -> Iterator[Tensor]:
        """Right outcomes (A,) of the image, the float64 one first."""
        for matched in self.matching.outcomes():
            yield from self.negatives(matched).outcomes()


def _outcomes(matching: World) -> dict[int, frozenset[int]]:
    """What open matches may be after the mining: no positive is a hard negative or none."""
    return {anchor: options | _EITHER if min(options) < 0 else options for anchor, options in matching.choices.items()}
