"""How far the gate itself can be trusted, measured: how often it cries wolf, and how often it sleeps.

Each trial is what a gate does: a baseline, a run, and a second run where the first looks slower. In an A/A trial all
are of the same call; otherwise the runs are of a call that takes a known share longer, by waiting. The second run is
in this process too: a fresh one would only differ more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch

from detoracle.implementations.batched.yolox import assign
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.counters import count
from detoracle.reports.gate import timing_change
from detoracle.reports.timing import Timing, paired
from detoracle.reports.workloads import Workload, workload_case

__all__ = ["SLOWDOWNS", "Rate", "measure_gate"]

Call = Callable[[Any], object]

SLOWDOWNS = (0.02, 0.05, 0.10, 0.25)
"""Planted shares by which a call takes longer."""

_SIZE = Workload(2, 5, 1344, 20)


@dataclass(frozen=True)
class Rate:
    """How often the gate failed a run.

    Attributes
    ----------
    what : str
        ``timing`` or ``counters``.
    slowdown : float
        Planted share; 0 for A/A. Of counters, 1 stands for one operation more.
    failed, trials : int
    """

    what: str
    slowdown: float
    failed: int
    trials: int

    @property
    def share(self) -> float:
        """Of the trials that failed."""
        return self.failed / self.trials


def measure_gate(trials: int, *, threshold: float, rounds: int = 30, seed: int = 0) -> tuple[Rate, ...]:
    """Measure false alarms and power on this machine.

    Parameters
    ----------
    trials : int
        A/A trials; each planted slow-down gets as many.
    threshold : float
        As the gate's.
    rounds : int
        Timed calls of each run, as ``detoracle bench --rounds`` makes.
    seed : int

    Returns
    -------
    tuple of Rate
        Timing at 0 and at each of `SLOWDOWNS`, then counters with nothing and with one operation added.

    Examples
    --------
    >>> [rate.what for rate in measure_gate(1, threshold=1.1, rounds=1)].count("counters")
    2
    """
    if trials < 1:
        raise InputError("--trials", expected="at least 1", got=str(trials))
    given = workload_case(*find_operation("yolox.assign"), _SIZE, seed=seed).arguments

    def call(_: int) -> object:
        return assign(**given)

    rates = []
    for slowdown in (0.0, *SLOWDOWNS):
        slowed = _slowed(call, slowdown)
        failed = sum(_fails(call, slowed, threshold, rounds, seed + trial) for trial in range(trials))
        rates.append(Rate("timing", slowdown, failed, trials))
    once = count(lambda: call(0))[1]
    for planted in (0.0, 1.0):
        failed = sum(count(lambda: (call(0), _extra(planted)))[1] != once for _ in range(trials))  # noqa: B023
        rates.append(Rate("counters", planted, failed, trials))
    return tuple(rates)


def _extra(planted: float) -> object:
    return torch.ones(1) + 1 if planted else None


def _slowed(call: Call, share: float) -> Call:
    def slowed(argument: Any) -> object:
        start = perf_counter_ns()
        result = call(argument)
        end = perf_counter_ns()
        until = end + (end - start) * share
        while perf_counter_ns() < until:
            pass
        return result

    return slowed


def _fails(
    call: Callable[[Any], object], slowed: Callable[[Any], object], threshold: float, rounds: int, seed: int
) -> bool:
    def ratio(candidate: Callable[[Any], object], number: int) -> Timing:
        calls = {"baseline": call, "candidate": candidate}
        return paired(calls, baseline="baseline", rounds=rounds, seed=3 * seed + number)["candidate"]

    before = ratio(_slowed(call, 0.0), 0)
    return all(timing_change(before, ratio(slowed, number), threshold) == "slower" for number in (1, 2))
