"""The statistics of paired timings, on recorded and on made-up times: no test waits, and none trusts the clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from detoracle.reference.errors import InputError
from detoracle.reports import timing
from detoracle.reports.timing import Timing, paired, summarise


class Clock:
    """Time passes only where a call says so; the log keeps who was called when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0, list[tuple[str, int]]()
        monkeypatch.setattr(timing, "perf_counter_ns", lambda: self.now)

    def call(self, name: str, duration: Callable[[int], int]) -> Callable[[int], None]:
        def advance(number: int) -> None:
            self.log.append((name, number))
            self.now += duration(number)

        return advance


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_known_ratio_is_found_exactly() -> None:
    assert summarise([0.5] * 8, [0.25] * 8) == Timing(0.25, (0.25,) * 8, times_faster=2.0, low=2.0, high=2.0)
    assert summarise([0.25] * 8, [0.5] * 8) == Timing(0.5, (0.5,) * 8, times_faster=0.5, low=0.5, high=0.5)


def test_a_drift_common_to_both_cancels() -> None:
    drift = 2.0 ** np.random.default_rng(0).integers(-9, 9, 20)
    slow, fast = (4 * drift).tolist(), drift.tolist()
    found = summarise(slow, fast)
    assert (found.times_faster, found.low, found.high) == (4.0, 4.0, 4.0)
    unpaired = summarise(slow, fast[::-1])  # the same times, of other rounds
    assert unpaired.low < 4.0 < unpaired.high


def test_a_few_disturbed_rounds_move_nothing_but_the_interval() -> None:
    times = [1.0] * 7 + [64.0, 64.0]
    found = summarise([2.0] * 9, times)
    assert (found.median, found.times_faster, found.high) == (1.0, 2.0, 2.0)
    assert summarise([2.0] * 9, [1.0] * 4 + [4.0] * 5).low == 0.5


def test_exchanging_the_two_gives_the_reciprocal() -> None:
    first, second = (2.0 ** np.random.default_rng(0).integers(-3, 3, (2, 10))).tolist()  # an even number of rounds
    there, back = summarise(first, second), summarise(second, first)
    assert (there.times_faster, there.low, there.high) == (1 / back.times_faster, 1 / back.high, 1 / back.low)
    assert there.low < there.times_faster < there.high


def test_the_median_of_two_ratios_is_their_geometric_mean() -> None:
    assert summarise([1.0, 16.0], [1.0, 1.0]).times_faster == 4.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    trials, noise = 400, np.random.default_rng(0)
    covered = excluded = 0
    for seed in range(trials):
        slow, fast = noise.lognormal([[math.log(2)], [0.0]], 0.3, (2, 25)).tolist()
        found = summarise(slow, fast, seed)
        covered += found.low <= 2.0 <= found.high
        excluded += not found.low <= 1.0 <= found.high
    # The number covered is binomial: within four standard deviations of 95 % of the trials.
    expected, deviation = 0.95 * trials, math.sqrt(0.95 * 0.05 * trials)
    assert abs(covered - expected) <= 4 * deviation
    assert excluded == trials  # and it is narrow enough to tell twice as fast from equally fast


def test_the_seed_decides_the_interval() -> None:
    first, second = np.random.default_rng(0).lognormal(0, 1, (2, 25)).tolist()
    assert summarise(first, second, 1) == summarise(first, second, 1)
    bounds = {(found.low, found.high) for found in (summarise(first, second, seed) for seed in range(8))}
    assert len(bounds) > 1


@pytest.mark.parametrize("rounds", [1, 5])
def test_too_few_rounds_claim_nothing(rounds: int) -> None:
    found = summarise([0.5] * rounds, [0.25] * rounds)
    assert (found.times_faster, found.low, found.high, found.rounds) == (2.0, 0.0, math.inf, rounds)
    assert summarise([0.5] * 6, [0.25] * 6).high == 2.0


@pytest.mark.parametrize(
    ("baseline", "samples", "message"),
    [
        ([], [], "samples: expected one or more, as many as of the baseline, got 0 and 0"),
        ([1.0, 1.0], [1.0], "samples: expected one or more, as many as of the baseline, got 1 and 2"),
        ([1.0], [0.0], "samples: expected positive numbers of seconds, got 0.0"),
        ([-1.0], [1.0], "samples: expected positive numbers of seconds, got -1.0"),
        ([math.nan], [1.0], "samples: expected positive numbers of seconds, got nan"),
        ([1.0], [math.inf], "samples: expected positive numbers of seconds, got inf"),
    ],
)
def test_samples_that_mean_nothing_are_refused(baseline: list[float], samples: list[float], message: str) -> None:
    with pytest.raises(InputError, match=f"summarise: {message}"):
        summarise(baseline, samples)


def test_calls_are_timed_against_the_baseline(clock: Clock) -> None:
    calls = {"slow": clock.call("slow", lambda n: 4 << n), "fast": clock.call("fast", lambda n: 1 << n)}
    timings = paired(calls, baseline="slow", rounds=9, warmup=2)
    assert list(timings) == ["slow", "fast"]
    assert timings["fast"].samples == tuple((1 << n) / 1e9 for n in range(2, 11))
    assert timings["fast"].median == (1 << 6) / 1e9
    found = replace(timings["fast"], median=0.0, samples=())
    assert found == Timing(0.0, (), times_faster=4.0, low=4.0, high=4.0)
    assert timings["slow"].times_faster == timings["slow"].low == timings["slow"].high == 1.0


def test_calls_take_turns_in_an_order_that_the_seed_shuffles(clock: Clock) -> None:
    calls = {name: clock.call(name, lambda n: 1) for name in "abc"}

    def order(seed: int) -> list[tuple[str, int]]:
        clock.log.clear()
        paired(calls, baseline="a", rounds=20, warmup=1, seed=seed)
        return list(clock.log)

    turns = order(0)
    assert [number for _, number in turns] == [number for number in range(21) for _ in calls]
    by_round = [tuple(name for name, _ in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert {frozenset(names) for names in by_round} == {frozenset("abc")}
    assert {names[0] for names in by_round} == {names[2] for names in by_round} == set("abc")
    assert order(0) == turns != order(1)


def test_another_clock_is_asked_instead(clock: Clock) -> None:
    """Such as a GPU's: a call there returns before it is done."""

    def late(call: Callable[[int], object], number: int) -> tuple[float, object]:
        call(number)
        return 8.0, number

    inspected: list[tuple[str, int, object]] = []
    given = {"a": clock.call("a", lambda n: 1)}
    timings = paired(given, baseline="a", rounds=2, warmup=0, clock=late, inspect=lambda *seen: inspected.append(seen))
    assert timings["a"].samples == (8.0, 8.0)
    assert inspected == [("a", 0, 0), ("a", 1, 1)]


@pytest.mark.parametrize(
    ("baseline", "rounds", "warmup", "message"),
    [
        ("b", 1, 1, "paired: baseline: expected one of a, got 'b'"),
        ("a", 0, 1, "paired: rounds, warmup: expected at least 1 and at least 0, got 0 and 1"),
        ("a", 1, -1, "paired: rounds, warmup: expected at least 1 and at least 0, got 1 and -1"),
    ],
)
def test_nothing_to_time_is_refused(clock: Clock, baseline: str, rounds: int, warmup: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        paired({"a": clock.call("a", lambda n: 1)}, baseline=baseline, rounds=rounds, warmup=warmup)
    assert clock.log == []
