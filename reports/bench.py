"""The bench: several implementations of one operation on one workload, turn by turn, every output checked.

Every call gets tensors that it has not seen: the same images in another order, at other addresses, so that what is
right is known and nothing can be remembered. All run in this process, and a rival among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detoracle.properties.outputs import Outcome, cotangent, normalised
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation, returns_of
from detoracle.reports.agreement import Agreement, agreement
from detoracle.reports.counters import Counters, count
from detoracle.reports.device import Gpu, copied_into
from detoracle.reports.record import Growth, Measurement, Row, measurement
from detoracle.reports.timing import paired, timed
from detoracle.reports.workloads import Workload, hash_of, rolled, workload_case

__all__ = ["Bench", "copy_speed", "growth", "measure"]

_AXES = ("batch", "gts", "anchors", "classes")
_COPIED = {"cpu": 1 << 26, "cuda": 1 << 28}  # bytes, several times what caches hold


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes
    ----------
    device : str
    dtype : torch.dtype
    seed : int
    rounds : int
        Timed calls of each implementation.
    forward : bool
        Time the forward pass alone.
    setting : str or None
        The operation's argument set; the first if None.
    scenes : str
        What the images look like, for `workload_case`.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    rounds: int = 8
    forward: bool = False
    setting: str | None = None
    scenes: str = ""

    def gpu(self) -> Gpu | None:
        """The GPU to measure on, if it is one."""
        return Gpu() if self.device == "cuda" else None


def measure(
    system: System,
    operation: Operation,
    calls: Mapping[str, Callable[..., Any]],
    workload: Workload,
    bench: Bench,
    *,
    baseline: str,
    bytes_a_second: float,
) -> tuple[tuple[Row, ...], tuple[Measurement, ...]]:
    """Measure implementations on one workload.

    Parameters
    ----------
    system : System
    operation : Operation
    calls : mapping of str to callable
        Implementations by name.
    workload : Workload
    bench : Bench
    baseline : str
        The one that the others are compared with; it is timed even if its outputs are not right.
    bytes_a_second : float
        From `copy_speed`.

    Returns
    -------
    rows : tuple of Row
        One verdict an implementation, over all calls.
    measurements : tuple of Measurement
        Of those that are right, and of the baseline; none if the baseline raises.
    """
    case = workload_case(
        system,
        operation,
        workload,
        seed=bench.seed,
        scenes=bench.scenes,
        setting=bench.setting,
        device=bench.device,
        dtype=bench.dtype,
    )
    label = ", ".join(filter(None, (str(workload), bench.scenes)))
    trial = _Trial(operation, agreement(system, operation, case.arguments), bench.forward, workload.batch)
    gpu = bench.gpu()
    clock = gpu.timed if gpu else timed
    runs = {name: trial.run(call) for name, call in calls.items()}
    first: dict[str, float] = {}
    for name, run in runs.items():
        try:
            first[name], result = clock(run, trial.fresh(case.arguments, 1))
            trial.inspect(name, 1, result)
        except Exception as error:  # a stranger's code may raise anything; the others go on
            trial.problems[name] = f"{type(error).__name__}: {error}"[:500]
    able = {name: run for name, run in runs.items() if name in first}
    able = {name: run for name, run in able.items() if name not in trial.problems or name == baseline}
    measurements: tuple[Measurement, ...] = ()
    if baseline in able:
        counters = {name: _counted(run, trial.fresh(case.arguments, 0)) for name, run in able.items()}
        timings = paired(
            able,
            baseline=baseline,
            rounds=bench.rounds,
            seed=bench.seed,
            clock=clock,
            prepare=lambda number: trial.fresh(case.arguments, number),
            inspect=trial.inspect,
        )
        floor = trial.bytes_to_move(case.arguments) / bytes_a_second
        fresh = partial(trial.fresh, case.arguments)
        of_gpu: dict[str, dict[str, Any]] = {name: {} for name in able}
        if gpu:
            rounds = {name: 0 if counters[name].host_syncs else bench.rounds for name in able}  # no graph can wait
            of_gpu = {name: _on_gpu(gpu, trial, name, run, fresh, rounds[name]) for name, run in able.items()}
        measurements = tuple(
            replace(
                measurement(operation.name, name, timing, counters[name], baseline=baseline),
                workload=f"{label} ({case.setting})" if case.setting else label,
                phase="forward" if bench.forward or not operation.gradients else "forward and backward",
                **asdict(workload),
                first_call=first[name] * 1e3,
                floor_share=floor / timing.median,
                checked=bench.rounds + 2,
                setting=case.setting,
                inputs=hash_of(case.arguments),
                **of_gpu[name],
            )
            for name, timing in timings.items()
            if name not in trial.problems or name == baseline
        )
    rows = tuple(
        Row(
            operation=operation.name,
            implementation=name,
            scene=label,
            setting=case.setting,
            status="different" if name in trial.problems else "equal",
            clause=f"{operation.name}[bench]" if name in trial.problems else "",
            message=trial.problems.get(name, ""),
            count=int(name in trial.problems),
            findings=int(name in trial.problems),
            tags="bench",
        )
        for name in calls
    )
    return rows, measurements


def _counted(run: Callable[[dict[str, Any]], object], given: dict[str, Any]) -> Counters:
    return count(lambda: run(given))[1]


def _on_gpu(
    gpu: Gpu,
    trial: _Trial,
    name: str,
    run: Callable[[dict[str, Any]], tuple[dict[str, Any], Outcome]],
    fresh: Callable[[int], dict[str, Any]],
    rounds: int,
) -> dict[str, Any]:
    """What a GPU tells of an implementation: kernels, memory, and time of replays, if any, every output checked."""
    found = {"launches": gpu.launches(run, fresh(0)), "device_peak_bytes": gpu.peak_bytes(run, fresh(0))}
    captured = gpu.captured(run, fresh(0)) if rounds else None
    if captured is None:
        return found
    seconds = []
    for number in range(rounds):
        copied_into(captured.argument, fresh(number))
        took, (_, outcome) = gpu.timed(captured.replay, None)
        seconds.append(took)
        if problem := trial.right.problem(outcome, trial.shift(number)):
            trial.problems.setdefault(name, f"replayed from a CUDA graph: {problem}")
    return {**found, "replay_milliseconds": float(np.median(seconds)) * 1e3}


@dataclass(eq=False)
class _Trial:
    """One operation on one input: how it is called, and what was wrong with what came back."""

    operation: Operation
    right: Agreement
    forward: bool
    batch: int

    def __post_init__(self) -> None:
        self.problems: dict[str, str] = {}

    def shift(self, number: int) -> int:
        """Places by which images move in a round; none where a gradient is taken of each element by itself."""
        return 0 if self.operation.kind == "values" else number % self.batch

    def fresh(self, arguments: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Copy the arguments for one call."""
        given = rolled(self.operation, arguments, self.shift(number))
        for tensor in _leaves(self.operation, given).values():
            tensor.requires_grad_(not self.forward)
        return given

    def run(self, call: Callable[..., Any]) -> Callable[[dict[str, Any]], tuple[dict[str, Any], Outcome]]:
        """The call to time, backward pass included."""

        def timed_call(given: dict[str, Any]) -> tuple[dict[str, Any], Outcome]:
            outputs = normalised(self.operation, call(**given))
            first = outputs[returns_of(self.operation.oracle)[0].name] if outputs.keys() else None
            leaves = _leaves(self.operation, given)
            gradients: dict[str, Tensor | None] = {}
            if leaves and not self.forward and first is not None and first.requires_grad:
                weights = cotangent(first) if first.ndim else None
                found = torch.autograd.grad(first, list(leaves.values()), weights, allow_unused=True)
                gradients = dict(zip(leaves, found, strict=True))
            return given, Outcome({name: output.detach() for name, output in outputs.items()}, gradients)

        return timed_call

    def inspect(self, name: str, number: int, result: tuple[dict[str, Any], Outcome]) -> None:
        """Check what a call returned, and that it left its input alone."""
        given, outcome = result
        problem = self.right.problem(outcome, self.shift(number))
        if not problem and any(t._version for t in _leaves(self.operation, given).values()):
            problem = "an input was written to"
        if problem:
            self.problems.setdefault(name, problem)

    def bytes_to_move(self, arguments: Mapping[str, Any]) -> int:
        """Bytes of all inputs read once, and of all outputs and gradients written once."""
        read = [t for value in arguments.values() for t in (value if isinstance(value, list) else [value])]
        written = [] if self.forward else list(_leaves(self.operation, arguments).values())
        outputs = self.right.exact.outputs.values()
        size = sum(o.numel() for o in outputs) * 4 + sum(t.nbytes for t in [*read, *written] if isinstance(t, Tensor))
        return size


def _leaves(operation: Operation, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs that get a gradient, as `Outcome` names them."""
    found: dict[str, Tensor] = {}
    for name in operation.gradients:
        value = given[name]
        items = {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {key: tensor for key, tensor in items.items() if isinstance(tensor, Tensor)}
    return found


def copy_speed(device: str = "cpu", rounds: int = 9) -> float:
    """Bytes that a copy reads and writes a second: what no implementation can move its data faster than.

    Parameters
    ----------
    device : str
    rounds : int
        Copies; the median counts.

    Returns
    -------
    float

    Examples
    --------
    >>> copy_speed(rounds=1) > 1e6
    True
    """
    source = torch.zeros(_COPIED[device], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    clock = Gpu().timed if device == "cuda" else timed
    seconds = [clock(target.copy_, source)[0] for _ in range(rounds)]
    return float(2 * source.nbytes / np.median(seconds))


def growth(measurements: Sequence[Measurement]) -> tuple[Growth, ...]:
    """Fit how cost grows, along every axis with at least three sizes while the others stay.

    Parameters
    ----------
    measurements : sequence of Measurement
        Of one or more operations.

    Returns
    -------
    tuple of Growth

    Examples
    --------
    >>> growth([])
    ()
    """
    return tuple(found for axis in _AXES for found in _along(axis, measurements))


def _along(axis: str, measurements: Sequence[Measurement]) -> Iterator[Growth]:
    others = [other for other in _AXES if other != axis]

    def key(m: Measurement) -> tuple[Any, ...]:
        return (m.operation, m.implementation, m.phase, *(getattr(m, other) for other in others))

    for (operation, implementation, phase, *fixed), group in groupby(sorted(measurements, key=key), key):
        members = {getattr(m, axis): m for m in group if getattr(m, axis)}
        if len(members) < 3:
            continue
        sizes = [math.log(size) for size in members]
        times = [math.log(m.milliseconds) for m in members.values()]
        peaks = [math.log(max(m.peak_live_bytes, 1)) for m in members.values()]
        text = ", ".join(f"{number} {other}" for other, number in zip(others, fixed, strict=True))
        slopes = (float(np.polyfit(sizes, costs, 1)[0]) for costs in (times, peaks))
        yield Growth(operation, implementation, phase, axis, text, len(members), *slopes)
