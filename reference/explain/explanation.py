"""What an assignment could rightly be: the outcomes that rounding leaves open, and the margins of all others.

An oracle's ``explain_*`` function returns an `Explanation`: per image at least one `World` (one for every way in
which ambiguous candidate decisions can fall), each with the admissible outcomes of every anchor and the counts
that every ground truth's claims must meet. An implementation is right where *one* world admits its whole image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from detoracle.reference.assignment import BACKGROUND
from detoracle.reference.rounding import Bounded, Decision

__all__ = [
    "Count",
    "Explanation",
    "World",
    "background_world",
    "combinations_of",
    "worlds_of",
]

_MOST_REPEATS = 16  # ways to the same right assignment, at the mean, before no more are looked for
_MOST_OPEN = 4  # ambiguous decisions of one image that are tried in all combinations, unless a caller affords more


@dataclass(frozen=True, eq=False)
class Count:
    """Of `anchors`, whose outcome is `gt` or `otherwise`, at least `low` and at most `high` must be `gt`."""

    gt: int
    anchors: Tensor
    low: int
    high: int
    otherwise: int = BACKGROUND

    def outcomes(self, first: Tensor) -> Iterator[Tensor]:
        """Right outcomes of the anchors, beginning with the one given."""
        yield first
        most = len(self.anchors)
        for number in range(max(self.low, 0), min(self.high, most) + 1):
            for taken in itertools.combinations(range(most), number):
                outcome = torch.full_like(first, self.otherwise)
                outcome[list(taken)] = self.gt
                if not torch.equal(outcome, first):
                    yield outcome


@dataclass(frozen=True, eq=False)
class World:
    """One image's right answers, given how its ambiguous candidate decisions fell.

    Attributes
    ----------
    gt_index : Tensor (A,) int64
        The float64 outcome.
    margin : Tensor (A,) float64
        Smallest margin of the decisions the anchor's outcome depended on, in units of their rounding error.
    choices : mapping of int to frozenset of int
        For each ambiguous anchor, its admissible outcomes; every other anchor must match `gt_index`.
    counts : tuple of Count
        Joint constraints among ambiguous anchors.
    k_range : tuple of Tensor (G,) int64, optional
        Fewest and most claims of each (padded) ground truth, where the system counts them.
    """

    gt_index: Tensor
    margin: Tensor
    choices: dict[int, frozenset[int]] = field(default_factory=dict)
    counts: tuple[Count, ...] = ()
    k_range: tuple[Tensor, Tensor] | None = None

    def wrong(self, gt_index: Tensor) -> Tensor:
        """Anchors (A,) bool whose given outcome this world does not admit."""
        wrong = gt_index != self.gt_index
        for anchor, admissible in self.choices.items():
            wrong[anchor] = int(gt_index[anchor]) not in admissible
        for count in self.counts:
            taken = int((gt_index[count.anchors] == count.gt).sum())
            if not count.low <= taken <= count.high:
                wrong[count.anchors] = True
        return wrong

    def outcomes(self) -> Iterator[Tensor]:
        """Right outcomes (A,) of the image, the float64 one first."""
        counted = [count.anchors for count in self.counts]
        free = sorted(self.choices.keys() - {anchor for anchors in counted for anchor in anchors.tolist()})
        ways = [partial(count.outcomes, self.gt_index[count.anchors]) for count in self.counts]
        places: list[Tensor | int] = [*counted, *free]
        for picks in combinations_of([*ways, *(partial(self._options, anchor) for anchor in free)]):
            outcome = self.gt_index.clone()
            for anchors, pick in zip(places, picks, strict=True):
                outcome[anchors] = pick
            if not self.wrong(outcome).any():
                yield outcome

    def options(self, gt_index: Tensor) -> Mapping[int, frozenset[int]]:
        """Outcomes that open anchors have in right assignments near a given one (A,)."""
        return self.choices

    def nearest(self, gt_index: Tensor, evidence: Tensor) -> Tensor:
        """Change the outcomes (A,) that joint constraints rule out, those with the least `evidence` (A,) first."""
        found = gt_index.clone()
        for count in self.counts:
            taken = found[count.anchors] == count.gt
            excess = int(taken.sum()) - min(max(int(taken.sum()), count.low), count.high)
            wrong, instead = (
                (taken, count.otherwise) if excess > 0 else (found[count.anchors] == count.otherwise, count.gt)
            )
            candidates = count.anchors[wrong]
            found[candidates[evidence[candidates].argsort()[: abs(excess)]]] = instead
        return found

    def _options(self, anchor: int) -> Iterator[Tensor]:
        first = self.gt_index[anchor]
        yield first
        for option in sorted(self.choices[anchor] - {int(first)}):
            yield torch.full_like(first, option)


def combinations_of(ways: Sequence[Callable[[], Iterator[Tensor]]]) -> Iterator[tuple[Tensor, ...]]:
    """One tensor from each of several iterators, in every combination; the last varies fastest, and none is stored.

    Examples
    --------
    >>> coin = lambda: iter(torch.tensor([0, 1]))
    >>> [[int(side) for side in pair] for pair in combinations_of([coin, coin])]
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    running = [way() for way in ways]
    picks = [next(options, None) for options in running]
    while not any(pick is None for pick in picks):
        yield tuple(pick for pick in picks if pick is not None)
        for place in reversed(range(len(ways))):
            picks[place] = next(running[place], None)
            if picks[place] is not None:
                break
            running[place] = ways[place]()
            picks[place] = next(running[place])
        else:
            return


@dataclass(frozen=True, eq=False)
class Explanation:
    """All images' worlds, and the quality that a given assignment must have.

    Attributes
    ----------
    worlds : tuple of tuple of World
        Per image, at least one world; the first is the float64 outcome.
    quality : callable
        Maps a ``gt_index`` (B, A) to the `Bounded` quality (B, A) that it implies.
    targets : callable
        Maps a ``gt_index`` (B, A) to the other documented outputs that it implies, `Bounded` or exact, by name.
    """

    worlds: tuple[tuple[World, ...], ...]
    quality: Callable[[Tensor], Bounded]
    targets: Callable[[Tensor], Mapping[str, Bounded | Tensor]] = lambda _gt_index: {}

    @property
    def gt_index(self) -> Tensor:
        """The float64 outcome, (B, A) int64."""
        return torch.stack([worlds[0].gt_index for worlds in self.worlds])

    @property
    def margin(self) -> Tensor:
        """Smallest margin over all worlds, (B, A) float64."""
        return torch.stack([torch.stack([w.margin for w in worlds]).amin(0) for worlds in self.worlds])

    @property
    def ambiguous(self) -> Tensor:
        """Anchors (B, A) bool with more than one right outcome."""
        return torch.stack([_open_anchors(worlds) for worlds in self.worlds])

    def wrong_k(self, dynamic_k: Tensor) -> Tensor:
        """Ground truths (B, G) bool whose given number of claims no world admits."""
        wrong = torch.zeros_like(dynamic_k, dtype=torch.bool)
        for image, worlds in enumerate(self.worlds):
            ranges = [world.k_range for world in worlds if world.k_range is not None]
            if ranges:
                low, high = torch.stack([r[0] for r in ranges]).amin(0), torch.stack([r[1] for r in ranges]).amax(0)
                wrong[image] = (dynamic_k[image] < low) | (dynamic_k[image] > high)
        return wrong

    def wrong(self, gt_index: Tensor) -> Tensor:
        """Anchors (B, A) bool at which no world admits the given outcome (judged by the most lenient world)."""
        images = []
        for image, worlds in enumerate(self.worlds):
            verdicts = [world.wrong(gt_index[image]) for world in worlds]
            images.append(min(verdicts, key=lambda v: int(v.sum())))
        return torch.stack(images)

    def options(self, gt_index: Tensor) -> Tensor:
        """Other outcomes of open anchors (K, B, A), near a given assignment (B, A); no change where there are fewer."""
        changes: list[Tensor] = []
        for image, worlds in enumerate(self.worlds):
            merged: dict[int, set[int]] = {}
            for world in worlds:
                for anchor, outcomes in world.options(gt_index[image]).items():
                    merged.setdefault(anchor, set()).update(outcomes)
            for anchor in _open_anchors(worlds).nonzero().flatten().tolist():
                merged.setdefault(anchor, set()).update(int(world.gt_index[anchor]) for world in worlds)
            for anchor, others in merged.items():
                for number, outcome in enumerate(sorted(others - {int(gt_index[image, anchor])})):
                    if number == len(changes):
                        changes.append(gt_index.clone())
                    changes[number][image, anchor] = outcome
        return torch.stack(changes) if changes else gt_index[None][:0]

    def nearest(self, gt_index: Tensor, evidence: Tensor) -> Tensor:
        """Change what joint constraints rule out in an assignment (B, A), where `evidence` (B, A) is least."""
        images = []
        for worlds, outcome, known in zip(self.worlds, gt_index, evidence, strict=True):
            repaired = [world.nearest(outcome, known) for world in worlds]
            images.append(min(repaired, key=lambda other: float(known[other != outcome].sum())))
        return torch.stack(images)

    def alternatives(self, limit: int) -> Iterator[Tensor]:
        """Right assignments (B, A), the float64 one first: at most `limit`, fewer if there are fewer, none twice."""
        seen: set[bytes] = set()
        for gt_index in itertools.islice(self._alternatives(), _MOST_REPEATS * limit):
            key = gt_index.cpu().numpy().tobytes()
            if key not in seen:
                seen.add(key)
                yield gt_index
            if len(seen) == limit:
                return

    def _alternatives(self) -> Iterator[Tensor]:
        for worlds in itertools.product(*self.worlds):
            for images in combinations_of([world.outcomes for world in worlds]):
                yield torch.stack(images)


def _open_anchors(worlds: Sequence[World]) -> Tensor:
    open_ = torch.zeros_like(worlds[0].gt_index, dtype=torch.bool)
    for world in worlds:
        open_ |= world.gt_index != worlds[0].gt_index
        if world.choices:
            open_[torch.tensor(sorted(world.choices), device=open_.device)] = True
    return open_


def background_world(num_anchors: int, device: torch.device) -> World:
    """World of an image in which nothing can be assigned.

    Examples
    --------
    >>> background_world(2, torch.device("cpu")).gt_index.tolist()
    [-1, -1]
    """
    empty = torch.full((num_anchors,), BACKGROUND, device=device)
    return World(empty, torch.full((num_anchors,), math.inf, dtype=torch.float64, device=device))


def worlds_of(decision: Decision, world: Callable[[Tensor], World], *, most: int = _MOST_OPEN) -> tuple[World, ...]:
    """Build a world for every way in which the ambiguous elements of a decision can fall.

    Of more than `most` ambiguous elements, those with the same margin hang on the same numbers, such as anchors in line
    with an edge, and flip together; of more than `most` such groups, one at a time flips, not all combinations.

    Examples
    --------
    >>> far = Decision(torch.tensor([True]), torch.tensor([9.0]))
    >>> len(worlds_of(far, lambda inside: background_world(1, inside.device)))
    1
    """
    open_ = decision.ambiguous.nonzero().tolist()
    groups: dict[object, list[list[int]]] = {}
    for number, element in enumerate(open_):
        together = float(decision.margin[tuple(element)]) if len(open_) > most else number
        groups.setdefault(together, []).append(element)
    together_at_most = len(groups) if len(groups) <= most else 1
    worlds = []
    for flip in (c for n in range(together_at_most + 1) for c in itertools.combinations(groups.values(), n)):
        settled = decision.value.clone()
        for element in itertools.chain(*flip):
            settled[tuple(element)] ^= True
        worlds.append(world(settled))
    return tuple(worlds)
