"""Timings that survive a shared, noisy machine: always ratios, always paired.

Absolute times drift by a factor of two from one hour to the next, and what drifts does so for every call alike. So the
calls take turns, in a fresh order each round, and each is compared with the baseline of the *same* round. The median
of these ratios shrugs off rounds that something else disturbed; a bootstrap interval says how far to trust it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, TypeVar

import numpy as np

from detoracle.reference.errors import InputError

__all__ = ["Clock", "Timing", "paired", "summarise", "timed"]

T = TypeVar("T")

Clock = Callable[[Callable[[Any], object], Any], tuple[float, object]]
"""Calls a call with its argument; gives seconds and result."""

_RESAMPLES = 2001  # the 2.5 % and 97.5 % quantiles of so many are two of them: nothing is interpolated

# Every round falls on either side of the true median with probability 1/2: all n on one side with 2 / 2**n. Even the
# interval from the smallest to the largest ratio reaches 95 % only from n = 6 on.
_FEWEST_ROUNDS = 6


@dataclass(frozen=True)
class Timing:
    """How long one call took, and how many times faster than the baseline it was.

    Attributes
    ----------
    median : float
        Median time, in seconds.
    samples : tuple of float
        All times, in seconds, in the order of the rounds.
    times_faster : float
        Median over the rounds of baseline time / this time: 2.0 is twice as fast, 0.5 half as fast. Of an even number
        of rounds it is the geometric mean of the middle two, so that exchanging the two calls gives the reciprocal.
    low, high : float
        95 % confidence interval of `times_faster`; 0 and infinity, which claim nothing, below six rounds, where no
        interval can reach that confidence.
    """

    median: float
    samples: tuple[float, ...]
    times_faster: float
    low: float
    high: float

    @property
    def rounds(self) -> int:
        """Number of timed rounds."""
        return len(self.samples)


def paired(
    calls: Mapping[str, Callable[[Any], object]],
    *,
    baseline: str,
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    clock: Clock | None = None,
    prepare: Callable[[int], Any] = lambda number: number,
    inspect: Callable[[str, int, Any], object] = lambda name, number, result: None,
) -> dict[str, Timing]:
    """Time several calls against one of them, turn by turn.

    Parameters
    ----------
    calls : mapping of str to callable
        Each is called with the number of the round, counted from 0 and warm-up rounds included, so that it can take
        an input that it has not seen: prepare ``warmup + rounds`` of them beforehand.
    baseline : str
        The call that the others are compared with.
    rounds : int
        Timed rounds, at least 1. Every call runs once a round, in an order shuffled anew.
    warmup : int
        Untimed rounds that go first.
    seed : int
        Seed of the shuffling and of the bootstrap.
    clock : callable, optional
        Calls a call with its argument, and gives seconds and result: `timed` unless given, for a GPU
        `detoracle.reports.device.Gpu.timed`.
    prepare : callable, optional
        Makes a call's argument from the number of the round, outside the time.
    inspect : callable, optional
        Is given name, number of the round and result after every call, outside the time.

    Returns
    -------
    dict of str to Timing
        In the order of `calls`, the baseline included.

    Raises
    ------
    InputError
        If there is no round to time, or no such baseline.

    Examples
    --------
    >>> import torch
    >>> inputs = torch.rand(9, 1000)
    >>> timings = paired(
    ...     {"sort": lambda i: inputs[i].sort(), "max": lambda i: inputs[i].max()}, baseline="sort", rounds=8
    ... )
    >>> list(timings), timings["max"].rounds, timings["sort"].times_faster
    (['sort', 'max'], 8, 1.0)
    """
    if baseline not in calls:
        raise InputError("baseline", expected=f"one of {', '.join(calls)}", got=repr(baseline), where="paired")
    if rounds < 1 or warmup < 0:
        got = f"{rounds} and {warmup}"
        raise InputError("rounds, warmup", expected="at least 1 and at least 0", got=got, where="paired")
    names = list(calls)
    clock = clock or timed
    generator = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        for turn in generator.permutation(len(names)):
            name = names[turn]
            seconds, result = clock(calls[name], prepare(number))
            inspect(name, number, result)
            del result  # nothing of one call is alive in the next
            if number >= warmup:
                samples[name].append(seconds)
    return {name: summarise(samples[baseline], samples[name], seed) for name in names}


def summarise(baseline_samples: Sequence[float], samples: Sequence[float], seed: int = 0) -> Timing:
    """Compare recorded times, pair by pair.

    Parameters
    ----------
    baseline_samples, samples : sequence of float
        Seconds that the baseline and the call took, of the same rounds in the same order.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Timing
        Of the call.

    Raises
    ------
    InputError
        If there are no samples, their numbers differ, or one is not a positive number of seconds.

    Examples
    --------
    >>> summarise([4.0, 6.0, 40.0], [2.0, 3.0, 40.0])
    Timing(median=3.0, samples=(2.0, 3.0, 40.0), times_faster=2.0, low=0.0, high=inf)
    """
    if not len(samples) == len(baseline_samples) > 0:
        got = f"{len(samples)} and {len(baseline_samples)}"
        raise InputError("samples", expected="one or more, as many as of the baseline", got=got, where="summarise")
    for sample in (*baseline_samples, *samples):
        if not 0 < sample < math.inf:
            raise InputError("samples", expected="positive numbers of seconds", got=f"{sample}", where="summarise")
    # Logarithms make twice as fast and half as fast lie equally far from 1.
    ratios = np.log2(np.divide(baseline_samples, samples))
    low, high = -math.inf, math.inf
    if len(ratios) >= _FEWEST_ROUNDS:
        resampled = np.random.default_rng(seed).choice(ratios, (_RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    times_faster, low, high = (float(np.exp2(ratio)) for ratio in (np.median(ratios), low, high))
    return Timing(float(np.median(samples)), tuple(map(float, samples)), times_faster, low, high)


def timed(call: Callable[[Any], T], argument: Any) -> tuple[float, T]:
    """Time one call by the host's clock.

    Parameters
    ----------
    call : callable
    argument : object
        Its only argument.

    Returns
    -------
    seconds : float
    result : object

    Examples
    --------
    >>> seconds, result = timed(sum, [1, 2])
    >>> seconds > 0, result
    (True, 3)
    """
    start = perf_counter_ns()
    result = call(argument)
    return (perf_counter_ns() - start) / 1e9, result
