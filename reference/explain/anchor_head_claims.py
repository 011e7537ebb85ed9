"""The world of a MaxIoU assignment: what thresholds give, overwritten by one ground truth's claim after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from detoracle.reference.explain.explanation import World, combinations_of

__all__ = ["Claim", "ClaimingWorld"]

_MOST_GROUPS = 4  # groups of tied anchors of which all subsets are tried


@dataclass(frozen=True, eq=False)
class Claim:
    """The anchors that one ground truth claims, for overlapping it most.

    Attributes
    ----------
    gt : int
        Index of the ground truth among the image's padded ones.
    claimed : Tensor (A,) bool
        The float64 claim; nothing if it does not claim.
    groups : tuple of Tensor (A,) bool
        Anchors that could overlap it most, by which of them tie for certain; none if it cannot claim.
    certain : bool
        It claims however its overlaps are rounded.
    margin : Tensor (A,) float64
        Of each anchor to being, or no longer being, claimed.
    """

    gt: int
    claimed: Tensor
    groups: tuple[Tensor, ...]
    certain: bool
    margin: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class ClaimingWorld(World):
    """One image's right assignments.

    Beside the choices of each anchor, every ground truth that claims must get anchors that tie for certain together,
    and at least one such group; or, where it claims only one anchor, exactly one.

    Attributes
    ----------
    by_threshold : World
        The assignment before all claims.
    claims : tuple of Claim
        In the order in which they overwrite each other.
    claims_all : bool
        A claim takes all anchors that tie, not one of them.
    """

    by_threshold: World
    claims: tuple[Claim, ...]
    claims_all: bool

    @classmethod
    def of(cls, by_threshold: World, claims: Sequence[Claim], *, claims_all: bool) -> ClaimingWorld:
        """Overwrite what the thresholds give by claims, in their order."""
        gt_index, margin = by_threshold.gt_index.clone(), by_threshold.margin
        settled, choices = by_threshold.gt_index.clone(), dict(by_threshold.choices)
        for claim in claims:
            gt_index[claim.claimed] = claim.gt
            margin = torch.where(claim.claimed, claim.margin, torch.minimum(margin, claim.margin))
            alone = len(claim.groups) == 1 and (claims_all or int(claim.groups[0].sum()) == 1)
            if claim.certain and alone:
                settled[claim.groups[0]] = claim.gt
                choices = {anchor: c for anchor, c in choices.items() if not claim.groups[0][anchor]}
                continue
            for anchor in (int(a) for group in claim.groups for a in group.nonzero().flatten()):
                choices[anchor] = choices.get(anchor, frozenset([int(settled[anchor])])) | {claim.gt}
        open_ = {anchor: options for anchor, options in choices.items() if len(options) > 1}
        effective = tuple(claim for claim in claims if claim.groups)
        return cls(gt_index, margin, open_, by_threshold=by_threshold, claims=effective, claims_all=claims_all)

    def wrong(self, gt_index: Tensor) -> Tensor:
        """Anchors (A,) bool whose outcome, alone or with the others, is not admitted."""
        wrong = super().wrong(gt_index)
        by_threshold = ~self.by_threshold.wrong(gt_index)
        overwritten = torch.zeros_like(wrong)
        for claim in reversed(self.claims):
            members = torch.stack(claim.groups)
            own = gt_index == claim.gt
            taken = own | (overwritten & (gt_index > claim.gt))
            for_certain = own & ~by_threshold
            wrong |= self._torn(members, taken, for_certain)
            complete = (taken | ~members).all(1) if self.claims_all else (taken & members).any(1)
            if claim.certain and not complete.any():
                wrong |= members.any(0)
            overwritten = overwritten | members.any(0)
        return wrong

    def _torn(self, members: Tensor, taken: Tensor, for_certain: Tensor) -> Tensor:
        """Anchors of claims that are not whole: part of a group, or several where one was to be claimed."""
        if self.claims_all:
            return (members & (members & for_certain).any(1, keepdim=True) & ~taken).any(0)
        several = members.any(0) & for_certain
        return several if int(several.sum()) > 1 else torch.zeros_like(several)

    def nearest(self, gt_index: Tensor, evidence: Tensor) -> Tensor:
        """Claim anew, each ground truth the anchors that agree best with those given, where `evidence` (A,) counts."""
        if self.claims_all:  # of many ways to claim tied groups only some are listed
            return super().nearest(gt_index, evidence)
        found = torch.where(self.by_threshold.wrong(gt_index), self.by_threshold.gt_index, gt_index)
        for claim in self.claims:
            own = gt_index == claim.gt
            later = gt_index > claim.gt  # may overwrite this claim

            def cost(pick: Tensor, own: Tensor = own, later: Tensor = later) -> tuple[float, int]:
                apart = (pick & ~own & ~later) | (own & ~pick)
                return float(evidence[apart].sum()), int(apart.sum())

            found[min(self._ways(claim), key=cost)] = claim.gt
        return found

    def outcomes(self) -> Iterator[Tensor]:
        """Right outcomes (A,) of the image, the float64 one first."""
        for picks in combinations_of([self.by_threshold.outcomes, *(partial(self._picks, c) for c in self.claims)]):
            outcome = picks[0].clone()
            for claim, pick in zip(self.claims, picks[1:], strict=True):
                outcome[pick] = claim.gt
            yield outcome

    def _picks(self, claim: Claim) -> Iterator[Tensor]:
        """Masks of anchors that a ground truth may claim, the float64 one first."""
        yield claim.claimed
        for pick in self._ways(claim):
            if not torch.equal(pick, claim.claimed):
                yield pick

    def _ways(self, claim: Claim) -> Iterator[Tensor]:
        nothing = torch.zeros_like(claim.claimed)
        if self.claims_all:
            most = len(claim.groups) if len(claim.groups) <= _MOST_GROUPS else 1
            for number in range(1, most + 1):
                for groups in itertools.combinations(claim.groups, number):
                    yield torch.stack(groups).any(0)
        else:
            for anchor in torch.stack(claim.groups).any(0).nonzero().flatten():
                yield nothing.index_fill(0, anchor, True)
        if not claim.certain:
            yield nothing
