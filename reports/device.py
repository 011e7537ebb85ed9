"""What a bench on a GPU adds: a clock of events behind a cold cache, memory, launches, and replay from a CUDA graph.

All of it goes through PyTorch's module `torch.cuda`, or through what a test puts in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Captured", "Gpu", "copied_into"]

T = TypeVar("T")

_FLUSHED = 1 << 28  # bytes, several times what the largest cache holds
_IDLE = 1e-4  # seconds, longer than it takes to wait for a device that has nothing to do


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A CUDA graph of one call.

    Attributes
    ----------
    graph : torch.cuda.CUDAGraph
    argument : object
        That was captured; every replay reads its tensors.
    result : object
        Which every replay writes anew.
    """

    graph: Any
    argument: Any
    result: T

    def replay(self, _: object = None) -> T:
        """Do the call's work again."""
        self.graph.replay()
        return self.result


@dataclass
class Gpu:
    """A GPU that calls are timed on.

    Attributes
    ----------
    cuda : module
        `torch.cuda`.
    profiler : callable
        `torch.profiler.profile`.
    device : str
        Where the memory lies that is written to empty the cache.
    """

    cuda: Any = torch.cuda
    profiler: Callable[..., Any] = profile
    device: str = "cuda"
    _cache: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Take the memory that empties the cache."""
        self._cache = torch.empty(_FLUSHED, dtype=torch.uint8, device=self.device)

    def timed(self, call: Callable[[Any], T], argument: Any) -> tuple[float, T]:
        """Time one call on the device's own clock, from a cold cache.

        Returns
        -------
        seconds : float
            From when the device takes up the first of the call's work until the last is done; a device that waits for
            its host in between waits on the clock. What is left on another stream then is waited for, and counts.
        result : object
        """
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        self.cuda.synchronize()
        start.record()
        result = call(argument)
        end.record()
        end.synchronize()
        done = perf_counter_ns()
        self.cuda.synchronize()
        late = (perf_counter_ns() - done) / 1e9
        return start.elapsed_time(end) / 1e3 + (late if late > _IDLE else 0.0), result

    def peak_bytes(self, call: Callable[[Any], object], argument: Any) -> int:
        """Most memory that the allocator held for one call, beyond what was held before it."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        call(argument)
        self.cuda.synchronize()
        return int(self.cuda.max_memory_allocated()) - int(before)

    def launches(self, call: Callable[[Any], object], argument: Any) -> int:
        """Kernels that one call launches, copies and fills included, as the profiler sees them."""
        with self.profiler(activities=[ProfilerActivity.CUDA]) as profiler:
            call(argument)
            self.cuda.synchronize()
        return sum(event.device_type.name == "CUDA" for event in profiler.events())

    def captured(self, call: Callable[[Any], T], argument: Any) -> Captured[T] | None:
        """Capture one call in a CUDA graph; None if a graph cannot hold it."""
        try:
            stream = self.cuda.Stream()
            stream.wait_stream(self.cuda.current_stream())
            with self.cuda.stream(stream):
                call(argument)  # compiles, and chooses tiles
            self.cuda.current_stream().wait_stream(stream)
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph):
                result = call(argument)
        except RuntimeError:  # what waits for the device, or asks it for anything else, cannot be captured
            return None
        return Captured(graph, argument, result)


def copied_into(target: Any, source: Any) -> None:
    """Copy all tensors of a value into those at the same places of another, whatever mappings and lists they lie in.

    Parameters
    ----------
    target, source : Tensor, mapping, list or tuple of such, or anything else
        Of the same shape; what is no tensor stays.

    Examples
    --------
    >>> given = {"raw": [torch.zeros(2)], "flavour": "official"}
    >>> copied_into(given, {"raw": [torch.ones(2)], "flavour": "official"})
    >>> given["raw"][0].tolist()
    [1.0, 1.0]
    """
    if isinstance(target, Tensor):
        with torch.no_grad():
            target.copy_(source)
    elif isinstance(target, Mapping):
        for name, value in target.items():
            copied_into(value, source[name])
    elif isinstance(target, list | tuple):
        for value, other in zip(target, source, strict=True):
            copied_into(value, other)
