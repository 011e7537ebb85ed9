"""What the bench measures on a GPU, on one that is made up: its clock, its memory, and graphs that are tapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from detoracle.implementations.batched import yolox as batched
from detoracle.implementations.loop import yolox as loop
from detoracle.properties.systems import find_operation
from detoracle.reports.bench import Bench, measure
from detoracle.reports.device import Gpu, copied_into
from detoracle.reports.record import Measurement, Row
from detoracle.reports.workloads import Workload

LOSS = find_operation("yolox.loss")
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_TOLD = {torch.ops.aten.repeat_interleave, torch.ops.aten.index}  # here with the size of their output, and no mask


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands for a CUDA graph: remembers every operation, and does them again on the same memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _WAITS & set(func.tags) and func.overloadpacket not in _TOLD:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.steps:
                given = {_memory(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if _memory(old) not in given:  # neither a view nor changed in place
                        old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.now += 1.0
        self.time = self.cuda.now

    def synchronize(self) -> None:
        self.cuda.log.append("waited")

    def elapsed_time(self, end: Event) -> float:
        return end.time - self.time


class Cuda:
    """Stands for `torch.cuda`: a call takes the milliseconds that it adds to `now`, and one more."""

    CUDAGraph = Tape

    def __init__(self) -> None:
        self.now, self.held, self.peak = 0.0, 100, 100
        self.log: list[str] = []

    def Event(self, *, enable_timing: bool) -> Event:  # noqa: N802
        assert enable_timing
        return Event(self)

    def synchronize(self) -> None:
        self.log.append("waited")

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.held

    def memory_allocated(self) -> int:
        return self.held

    def max_memory_allocated(self) -> int:
        return self.peak

    def Stream(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: self.log.append("streams"))

    current_stream = Stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, tape: Tape) -> Iterator[None]:
        with tape:
            yield


@contextmanager
def profiler(activities: Sequence[object]) -> Iterator[Any]:
    kinds = [SimpleNamespace(name=name) for name in ("CUDA", "CPU", "CUDA", "CUDA", "CPU")]
    yield SimpleNamespace(events=lambda: [SimpleNamespace(device_type=kind) for kind in kinds])


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def gpu(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setattr("detoracle.reports.device._FLUSHED", 16)
    return Gpu(cuda, profiler, "cpu")


def test_the_clock_is_the_devices_and_the_cache_is_cold(gpu: Gpu, cuda: Cuda) -> None:
    gpu._cache.fill_(7)

    def call(argument: int) -> str:
        assert cuda.log == ["waited"]
        assert not gpu._cache.any()
        cuda.now += argument
        return "done"

    assert gpu.timed(call, 249) == (0.25, "done")
    assert cuda.log == ["waited"] * 3


@pytest.mark.parametrize(("microseconds", "seconds"), [(20, 0.25), (300_000, 0.55)])
def test_work_left_on_another_stream_counts(
    microseconds: int, seconds: float, gpu: Gpu, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0, 1000 * microseconds])
    monkeypatch.setattr("detoracle.reports.device.perf_counter_ns", lambda: next(times))

    def call(argument: int) -> None:
        cuda.now += argument

    assert gpu.timed(call, 249)[0] == seconds


def test_memory_is_that_of_the_call_alone(gpu: Gpu, cuda: Cuda) -> None:
    cuda.peak = 9999

    def call(argument: int) -> None:
        cuda.peak = cuda.held + argument

    assert gpu.peak_bytes(call, 24) == 24


def test_only_what_runs_on_the_device_is_a_launch(gpu: Gpu) -> None:
    called: list[int] = []
    assert gpu.launches(called.append, 1) == 3
    assert called == [1]


def test_a_graph_reads_what_is_copied_into_its_argument(gpu: Gpu) -> None:
    captured = gpu.captured(lambda given: given["x"].mul(2).add_(1), {"x": torch.tensor([1.0])})
    assert captured is not None
    copied_into(captured.argument, {"x": torch.tensor([5.0])})
    assert captured.replay().tolist() == [11.0]


def test_what_waits_for_the_device_is_not_captured(gpu: Gpu) -> None:
    assert gpu.captured(lambda x: x * float(x.sum()), torch.ones(2)) is None


# ------------------------------------------------------------------------------------------------------------ the bench
def run(
    calls: dict[str, Callable[..., Any]], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Row, ...], tuple[Measurement, ...]]:
    monkeypatch.setattr(Bench, "gpu", lambda bench: gpu)
    return measure(*LOSS, calls, Workload(2, 3, 84, 4), Bench(rounds=2), baseline="loop", bytes_a_second=1e9)


def test_a_bench_replays_what_can_be_captured(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, (slow, fast) = run({"loop": loop.loss, "batched": batched.loss}, gpu, monkeypatch)
    assert [row.status for row in rows] == ["equal", "equal"]
    assert (slow.replay_milliseconds > 0, fast.replay_milliseconds > 0) == (False, True)
    assert slow.launches == fast.launches == 3


def test_a_replay_that_is_wrong_is_a_finding(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer depends on what was captured, not on what is in its argument now."""
    last: list[Tensor] = []

    def remembers(**given: Any) -> Any:
        if not isinstance(_get_current_dispatch_mode(), Tape):
            last[:] = [given["gt_boxes"].clone()]
        return batched.loss(**{**given, "gt_boxes": last[0]})

    rows, measurements = run({"loop": loop.loss, "remembers": remembers}, gpu, monkeypatch)
    assert [row.status for row in rows] == ["equal", "different"]
    assert rows[1].message.startswith("replayed from a CUDA graph: ")
    assert [m.implementation for m in measurements] == ["loop"]
