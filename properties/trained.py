"""Which assignment a loss has trained, read off its gradients and, where those are alike, off its value.

An anchor's row of the gradient depends on its own outcome alone, but for what the loss is divided by. So all anchors
that rounding leaves open are tried at once, one of their outcomes after the other, and every anchor takes the outcome
whose row comes nearest to its own. An L1 loss pulls towards different ground truths alike: then the sum must tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detoracle.properties.bounds import GRADIENT_UNITS
from detoracle.properties.outputs import Outcome
from detoracle.reference.explain.explanation import Explanation

__all__ = ["trained_assignment"]

_ROUNDS = 4  # of trying all outcomes; a quality depends on the other anchors of the same ground truth
_CLEARLY = 0.25  # squared distance, of that of the outcome so far, below which another one is taken for it
_MOST_SINGLE = 64  # outcomes that are tried one by one
_MOST_ALIKE = 512  # outcomes with the same gradient whose effect on the loss is worked out
_MOST_SUMS = 4096  # sums of such effects that are kept while they are added up
_MOST_TRIED = 16  # ... and that are tried


def trained_assignment(
    explanation: Explanation, given: Outcome, loss_given: Callable[[Tensor], Outcome]
) -> Iterator[Tensor]:
    """Find right assignments that explain a loss's gradients: those that explain its value best, then the nearest.

    Parameters
    ----------
    explanation : Explanation
        Of the loss: what could rightly be assigned.
    given : Outcome
        Of the loss to judge. Its gradients have a row for every anchor, or are the maps ``raw[0]``, ``raw[1]``, ... of
        its levels.
    loss_given : callable
        Maps an assignment (B, A) to what a right loss makes of it, in float64.

    Yields
    ------
    Tensor (B, A) int64
        Nothing if no right assignment comes near.

    Examples
    --------
    >>> from detoracle.reference.explain.explanation import World
    >>> tie = World(torch.tensor([0, -1]), torch.zeros(2), {0: frozenset([0, -1]), 1: frozenset([0, -1])})
    >>> explanation = Explanation(((tie,),), lambda gt_index: gt_index)
    >>> loss = lambda gt_index: Outcome(gradients={"boxes": (gt_index[..., None] + 1).double()})
    >>> [found.tolist() for found in trained_assignment(explanation, loss(torch.tensor([[-1, 0]])), loss)]
    [[[-1, 0]]]
    """
    found = explanation.gt_index
    seen = _rows(given.gradients, found)
    if seen is None:
        return
    trials = _Trials.of(found, explanation.options(found), seen, loss_given)
    for _ in range(_ROUNDS):
        found = explanation.nearest(trials.likeliest(), trials.evidence())
        if torch.equal(found, trials.found):
            break
        trials = _Trials.of(found, explanation.options(found), seen, loss_given)
    candidates = [*_by_value(found, trials.alike(given), given, loss_given), found]
    if trials.unexplained(given):
        other = _one_by_one(explanation, found, seen, loss_given)
        trials = _Trials.of(other, explanation.options(other), seen, loss_given)
        candidates += [*_by_value(other, trials.alike(given), given, loss_given), other]
    for number, candidate in enumerate(candidates):
        repeated = any(torch.equal(candidate, before) for before in candidates[:number])
        if not repeated and not explanation.wrong(candidate).any():
            yield candidate


@dataclass(frozen=True, eq=False)
class _Trials:
    """An assignment (B, A), the `options` (K, B, A) to it, and how far the row of each is from the one seen.

    Attributes
    ----------
    distance : Tensor (1 + K, B, A)
        Squared; infinite for what is no other option. The first is that of the assignment itself.
    size : Tensor (B, A)
        Squared length of the row seen.
    """

    found: Tensor
    options: Tensor
    distance: Tensor
    size: Tensor

    @classmethod
    def of(
        cls, found: Tensor, options: Tensor, seen: Sequence[Tensor], loss_given: Callable[[Tensor], Outcome]
    ) -> _Trials:
        """Try one option of all anchors after the other, and of positives or others alone: with none, no row tells."""
        fixed = (options == found).all(0)
        apart = [torch.where(mask, option, found) for option in options for mask in (found >= 0, found < 0)]
        tried = [*options, *(option for option in apart if not any(torch.equal(option, o) for o in (found, *options)))]
        options = torch.stack([found, *tried])[1:]
        trials = [_rows(loss_given(trial).gradients, found) for trial in (found, *options)]
        distance = torch.stack([_distance(seen, rows, fixed) for rows in trials])
        distance[1:].masked_fill_(options == found, math.inf)
        size = torch.stack([(rows * rows).nan_to_num(nan=0.0, posinf=0.0).sum(-1) for rows in seen]).sum(0)
        return cls(found, options, distance, size)

    def likeliest(self) -> Tensor:
        """The outcome of every anchor whose row is nearest."""
        best, place = self.distance.min(0)
        outcomes = torch.cat([self.found[None], self.options])
        return torch.where(best < _CLEARLY * self.distance[0], outcomes.gather(0, place[None])[0], self.found)

    def evidence(self) -> Tensor:
        """How much farther the second-nearest row is."""
        if not len(self.options):
            return self.size
        two = self.distance.topk(2, dim=0, largest=False).values
        return (two[1] - two[0]).nan_to_num(nan=0.0)

    def unexplained(self, given: Outcome) -> bool:
        """Is any row farther from the one seen than rounding takes it?"""
        return not bool(self._near(given)[0].all())

    def _near(self, given: Outcome) -> Tensor:
        units = max(torch.finfo(g.dtype).eps / 2 for g in given.gradients.values() if g is not None)
        return self.distance <= (GRADIENT_UNITS * units) ** 2 * self.size

    def alike(self, given: Outcome) -> list[tuple[int, int, list[int]]]:
        """Image, anchor and other outcomes of the anchors whose gradient leaves a choice."""
        near = self._near(given)
        anchors = (near[0] & near[1:].any(0)).nonzero().tolist()
        return [(b, a, sorted(set(self.options[:, b, a][near[1:, b, a]].tolist()))) for b, a in anchors]


def _rows(gradients: Mapping[str, Tensor | None], like: Tensor) -> list[Tensor] | None:
    """Gradients to each input, (B, A, C); None if one is missing."""
    inputs: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        if gradient is None:
            return None
        inputs.setdefault(name.partition("[")[0], []).append(gradient)
    images, anchors = like.shape
    rows = []
    for levels in inputs.values():
        channels = sum(level.numel() for level in levels) // max(images * anchors, 1)
        if any(len(level) != images or level.numel() % max(images * channels, 1) for level in levels):
            return None
        last = [level.movedim(1, -1) if level.ndim == 4 else level for level in levels]
        rows.append(torch.cat([level.reshape(images, -1, channels) for level in last], dim=1).double())
    return rows or None


def _distance(seen: Sequence[Tensor], trial: Sequence[Tensor] | None, fixed: Tensor) -> Tensor:
    """Squared distance (B, A) of rows, those of the trial brought to the scale that anchors of `fixed` outcome show."""
    if trial is None:
        return torch.full(fixed.shape, math.inf, dtype=torch.float64, device=fixed.device)
    scales = [_scale(given, right, fixed) for given, right in zip(seen, trial, strict=True)]
    usual = next((scale for scale in scales if math.isfinite(scale)), 1.0)
    total = torch.zeros(fixed.shape, dtype=torch.float64, device=fixed.device)
    for given, right, scale in zip(seen, trial, scales, strict=True):
        scaled = right * (scale if math.isfinite(scale) else usual)
        apart = (given - scaled).masked_fill(given.isnan() & right.isnan() | (given == right), 0.0)
        total += (apart * apart).sum(-1).nan_to_num(nan=math.inf)
    return total


def _scale(given: Tensor, right: Tensor, fixed: Tensor) -> float:
    """What brings rows of a trial to those seen: over anchors of fixed outcome, or else on the row that fits best."""
    given, right = (t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for t in (given, right))
    product, square = (given * right).sum(-1), (right * right).sum(-1)
    scale = float(product[fixed].sum() / square[fixed].sum())
    if math.isfinite(scale):
        return scale
    own = product / square
    misfit = ((given - own[..., None] * right) ** 2).sum(-1) / (given * given).sum(-1)
    return float(own.flatten()[misfit.nan_to_num(nan=math.inf).argmin()])


def _one_by_one(
    explanation: Explanation, found: Tensor, seen: Sequence[Tensor], loss_given: Callable[[Tensor], Outcome]
) -> Tensor:
    """Change one outcome at a time while rows come nearer: where a loss samples, every row hangs on all outcomes."""
    every = torch.ones_like(found, dtype=torch.bool)

    def distance(trial: Tensor) -> float:
        return float(_distance(seen, _rows(loss_given(trial).gradients, found), every).sum())

    now = distance(found)
    for _ in range(_ROUNDS):
        options = explanation.options(found)
        places = (options != found).nonzero().tolist()
        if not 0 < len(places) <= _MOST_SINGLE:
            break
        changed = [_with(found, b, a, int(options[k, b, a])) for k, b, a in places]
        nearest, best = min((distance(trial), number) for number, trial in enumerate(changed))
        if not nearest < now:
            break
        now, found = nearest, changed[best]
    return found


# ------------------------------------------------------------------------------------------------------- by value
def _by_value(
    found: Tensor,
    alike: Sequence[tuple[int, int, list[int]]],
    given: Outcome,
    loss_given: Callable[[Tensor], Outcome],
) -> Iterator[Tensor]:
    """The assignment with outcomes of the same gradient exchanged, so that the loss comes near the one given.

    What is exchanged leaves what the loss is divided by as it is, so the effects add up.
    """
    if not alike or not given.outputs or sum(len(options) for *_, options in alike) > _MOST_ALIKE:
        yield found
        return
    before = loss_given(found).outputs
    aim = _difference(given.outputs, before)
    sums, picks = aim.new_zeros(1, len(aim)), aim.new_zeros(1, 0, dtype=torch.int64)
    for image, anchor, options in alike:
        effects = [aim.new_zeros(len(aim))]
        for option in options:
            effects.append(_difference(loss_given(_with(found, image, anchor, option)).outputs, before))
        sums = (sums[:, None] + torch.stack(effects)).flatten(0, 1)
        pick = torch.arange(len(effects), device=found.device).repeat(len(picks))
        picks = torch.cat([picks.repeat_interleave(len(effects), 0), pick[:, None]], dim=1)
        if len(sums) > _MOST_SUMS:
            kept = (sums - aim).abs().amax(1).topk(_MOST_SUMS, largest=False).indices
            sums, picks = sums[kept], picks[kept]
    order = (sums - aim).abs().amax(1).argsort(stable=True)[:_MOST_TRIED]
    for pick in picks[order].tolist():
        candidate = found
        for (image, anchor, options), number in zip(alike, pick, strict=True):
            candidate = _with(candidate, image, anchor, options[number - 1]) if number else candidate
        yield candidate


def _with(found: Tensor, image: int, anchor: int, outcome: int) -> Tensor:
    """An assignment with one anchor's outcome changed."""
    changed = found.clone()
    changed[image, anchor] = outcome
    return changed


def _difference(outputs: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor:
    """Of all parts of two losses, (P,)."""
    parts = [
        (outputs[n].double() - before[n]).flatten()
        for n in before
        if n in outputs and outputs[n].shape == before[n].shape
    ]
    return torch.cat(parts).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
