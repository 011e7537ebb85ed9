"""The gate: what changed between two runs, and which of it a release must not do.

========== =========================================================================================================
changed    fails when
========== =========================================================================================================
verdict    it is worse than the baseline's, or the check was not run any more: a run that checked less is never green
counter    it rose; one that fell asks to make the run the new baseline
timing     the ratio to its own baseline fell, the interval of the change clears the threshold, and it does so again in
           a fresh process
========== =========================================================================================================

Runs are comparable only where what was measured is the same, bit for bit; timings only on the same machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from detoracle.reference.errors import InputError
from detoracle.reports.record import Measurement, Report, Row
from detoracle.reports.tally import badness
from detoracle.reports.timing import Timing

__all__ = ["COUNTERS", "Change", "Timed", "changes", "environment_key", "same_machine", "timing_change"]

COUNTERS = ("operations", "host_syncs", "bytes_read", "bytes_written", "peak_live_bytes")
"""Fields of a `Measurement` that must not rise."""

_SOFTWARE = ("torch", "python", "system", "gpu")
_MACHINE = ("machine", "cpu", "threads", "deterministic", "gpu_driver")

Timed = Timing | Measurement
Outcome = Literal[
    "worse", "missing", "better", "more", "fewer", "slower", "faster", "same", "inconclusive", "not compared"
]
_RIGHT = frozenset({"equal", "ambiguous"})  # which of them it is, is a matter of rounding, not of the implementation


@dataclass(frozen=True)
class Change:
    """One difference between the runs.

    Attributes
    ----------
    kind : {"verdict", "counter", "timing"}
    operation, implementation, where : str
        Scene and setting, or workload.
    outcome : str
        ``worse``, ``missing``, ``better``; ``more``, ``fewer``; ``slower``, ``faster``, ``same``, ``inconclusive``,
        ``not compared``.
    before, after : str
    fails : bool
    """

    kind: Literal["verdict", "counter", "timing"]
    operation: str
    implementation: str
    where: str
    outcome: Outcome
    before: str
    after: str
    fails: bool


def environment_key(environment: Mapping[str, Any]) -> str:
    """Name of the baseline that fits an environment: the software that decides verdicts and counters.

    Examples
    --------
    >>> environment_key({"torch": "2.6.0", "python": "3.11.7", "system": "Linux"}).split("-")[:2]
    ['torch2.6.0', 'python3.11']
    """
    python = ".".join(str(environment.get("python", "")).split(".")[:2])
    facts = [str({**environment, "python": python}.get(name, "")) for name in _SOFTWARE]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    return f"torch{facts[0]}-python{python}-{digest}"


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """May timings of two environments be compared?

    Examples
    --------
    >>> same_machine({"cpu": "a", "threads": 2}, {"cpu": "a", "threads": 4})
    False
    """
    return all(one.get(name) == other.get(name) for name in _MACHINE)


def changes(
    baseline: Report,
    current: Report,
    *,
    threshold: Callable[[str], float],
    again: Callable[[Measurement], Timed | None],
) -> tuple[Change, ...]:
    """Compare a run with its baseline.

    Parameters
    ----------
    baseline, current : Report
    threshold : callable
        Maps an operation's name to the factor that a timing may fall by, above 1.
    again : callable
        Takes a measurement once more in a fresh process; None where that cannot be done.

    Returns
    -------
    tuple of Change
        Verdicts, then counters, then timings; equal ones are left out but for timings.

    Raises
    ------
    InputError
        If the runs measured different things under one name.

    Examples
    --------
    >>> from dataclasses import replace
    >>> report = Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}, rows=(Row("o", "mine", "s", "", "equal"),))
    >>> [c.outcome for c in changes(report, replace(report, rows=()), threshold=lambda _: 1.1, again=lambda m: None)]
    ['missing']
    """
    found = [*_verdicts(baseline.rows, current.rows)]
    before, after = _by_name(baseline.measurements), _by_name(current.measurements)
    found += [_missing("counter", m, m.workload) for name, m in before.items() if name not in after]
    pairs = [(m, after[name]) for name, m in before.items() if name in after]
    _refuse_stale(pairs)
    found += [change for old, new in pairs for change in _counters(old, new)]
    comparable = same_machine(baseline.environment, current.environment)
    found += [_timing(old, new, threshold(old.operation), again, comparable) for old, new in pairs if new.batch]
    return tuple(found)


def _verdicts(before: Sequence[Row], after: Sequence[Row]) -> Iterator[Change]:
    def name(row: Row) -> tuple[str, ...]:
        return row.operation, row.implementation, row.scene, row.setting, row.law

    now = {name(row): row for row in after}
    for row in before:
        found = now.get(name(row))
        if found is None:
            yield _missing("verdict", row, row.place)
        elif found.status != row.status and not {found.status, row.status} <= _RIGHT:
            worse = badness(found.status) > badness(row.status)
            outcome: Outcome = "worse" if worse else "better"
            now_is = f"{found.status} {found.clause}".strip()
            facts = row.operation, row.implementation, row.place, outcome, row.status, now_is
            yield Change("verdict", *facts, fails=worse)


def _missing(kind: Literal["verdict", "counter"], one: Row | Measurement, where: str) -> Change:
    before = one.status if isinstance(one, Row) else "measured"
    return Change(kind, one.operation, one.implementation, where, "missing", before, "not run", fails=True)


def _by_name(measurements: Sequence[Measurement]) -> dict[tuple[str, ...], Measurement]:
    return {(m.operation, m.implementation, m.workload, m.phase): m for m in measurements}


def _refuse_stale(pairs: Sequence[tuple[Measurement, Measurement]]) -> None:
    stale = [new for old, new in pairs if old.inputs != new.inputs]
    if stale:
        names = ", ".join(sorted({f"{m.operation} on {m.workload}" for m in stale})[:3])
        raise InputError(
            "baseline",
            expected="measurements of the same inputs",
            got=f"others for {names}",
            fix="The workload's inputs changed since: make a new baseline with --accept.",
        )


def _counters(old: Measurement, new: Measurement) -> Iterator[Change]:
    for name in COUNTERS:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            more = after > before
            outcome: Outcome = "more" if more else "fewer"
            texts = f"{before:,} {name}", f"{after:,}"
            yield Change("counter", old.operation, old.implementation, old.workload, outcome, *texts, fails=more)


def _timing(
    old: Measurement, new: Measurement, threshold: float, again: Callable[[Measurement], Timed | None], comparable: bool
) -> Change:
    def change(outcome: Outcome, *, fails: bool = False) -> Change:
        texts = f"{old.times_faster:.3g} times {old.baseline}", f"{new.times_faster:.3g} times"
        return Change("timing", old.operation, old.implementation, old.workload, outcome, *texts, fails)

    if not comparable or old.baseline != new.baseline:
        return change("not compared")
    outcome = timing_change(old, new, threshold)
    if outcome != "slower":
        return change(outcome)
    repeated = again(new)
    if repeated is None or timing_change(old, repeated, threshold) != "slower":
        return change("inconclusive")
    return change("slower", fails=True)


def timing_change(old: Timed, new: Timed, threshold: float) -> Literal["slower", "faster", "same", "inconclusive"]:
    """Did a ratio change by more than a threshold, beyond doubt?

    Parameters
    ----------
    old, new : Timed
    threshold : float
        Factor above 1.

    Returns
    -------
    str
        ``slower`` or ``faster`` if the 95 % interval of the change lies beyond the threshold; ``same`` if it lies
        within; ``inconclusive`` otherwise.

    Examples
    --------
    >>> from detoracle.reports.timing import Timing
    >>> was = Timing(1.0, (), 10.0, 9.8, 10.2)
    >>> timing_change(was, Timing(1.0, (), 7.5, 7.3, 7.7), 1.1), timing_change(was, was, 1.1)
    ('slower', 'same')
    """
    if not all(0 < t.low <= t.times_faster <= t.high < math.inf for t in (old, new)):
        return "inconclusive"
    (was, was_low, was_high), (now, now_low, now_high) = (
        tuple(math.log(ratio) for ratio in (t.times_faster, t.low, t.high)) for t in (old, new)
    )
    change = now - was
    low = change - math.hypot(now - now_low, was_high - was)
    high = change + math.hypot(now_high - now, was - was_low)
    limit = math.log(threshold)
    if high < -limit:
        return "slower"
    if low > limit:
        return "faster"
    return "same" if -limit <= low and high <= limit else "inconclusive"
