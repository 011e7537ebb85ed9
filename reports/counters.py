"""Counters: what a call costs, in units that do not depend on the machine, its load or its clock.

Timings on a shared machine are noise with a trend in it. The numbers here are exact: the same call gives the same
numbers, to the unit, so that a gate can demand equality. They are read off the dispatcher, one tensor operation at a
time, and follow a simple model: every operation reads the whole of its inputs and writes the whole of its outputs.

What the model leaves out:

- scratch memory inside a kernel, caches, and that a gather or a scatter may touch only a part of a large tensor;
- copies from host to device, which wait for the device but depend on none of its results;
- what other threads do (the backward pass is counted, on whichever thread autograd runs it);
- `tolist`, `numpy` and `cpu` of a CPU tensor where autograd calls back into Python, in a custom backward or a hook
  (``item`` and ``if tensor:`` are counted there too);
- compiled functions: operations fused by `torch.compile` cannot be seen. PyTorch runs such a function eagerly while
  its operations are counted, so that the counters always describe the eager form.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counters", "count"]

T = TypeVar("T")

_aten = torch.ops.aten

# Bring a storage into being, or into sight, without a kernel that works on it.
_ALLOCATIONS = frozenset(
    {
        _aten.empty,
        _aten.empty_like,
        _aten.empty_permuted,
        _aten.empty_strided,
        _aten.lift_fresh,  # how `torch.tensor` and `torch.from_numpy` hand over what they built
        _aten.new_empty,
        _aten.new_empty_strided,
    }
)
_INDEXING = frozenset({_aten.index, _aten.index_put, _aten.index_put_})
_COPIES = frozenset({_aten._to_copy, _aten.copy_})
_DATA_DEPENDENT = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

# Methods that read a tensor on the host; where the tensor lives on the CPU they never reach the dispatcher.
_HOST_READS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu})


@dataclass(frozen=True)
class Counters:
    """What one call cost.

    Attributes
    ----------
    operations : int
        Tensor operations that do work, a stand-in for kernel launches. Views and bare allocations are none.
    host_syncs : int
        Operations at which the host must wait for the device, because a Python value or the shape of a tensor depends
        on the data: ``item``, ``if tensor:``, ``tolist``, ``nonzero``, indexing with a mask, ``unique``, ...
    bytes_read, bytes_written : int
        Bytes of all inputs, and of all outputs, of these operations. A broadcast dimension counts once; a tensor
        changed in place is both read and written; an ``out=`` tensor is only written.
    peak_live_bytes : int
        Largest sum of the storages that the call allocated and had not yet freed. Views share a storage.
    """

    operations: int
    host_syncs: int
    bytes_read: int
    bytes_written: int
    peak_live_bytes: int


def count(call: Callable[[], T]) -> tuple[T, Counters]:
    """Run a call once and count what it costs.

    The cyclic garbage collector rests meanwhile: memory is freed where its last reference goes, and nowhere else.

    Parameters
    ----------
    call : callable
        Called once without arguments. A backward pass inside it is counted too. If it caches anything, call it once
        beforehand.

    Returns
    -------
    result : object
        What the call returned.
    counters : Counters
        Its cost. Equal on every device, except where PyTorch itself takes another path there: ``F.one_hot`` checks its
        input on the CPU only, and ``to("cpu")`` is a copy, and a synchronisation, only where the tensor is elsewhere.
        ``x[mask] = value`` is a masked fill, without synchronisation, for a number; on the CPU a 0-dim tensor cannot
        be told from one.

    Examples
    --------
    >>> import torch
    >>> scores = torch.arange(1000.0)
    >>> count(lambda: scores.mul(2).sum().item())
    (999000.0, Counters(operations=3, host_syncs=1, bytes_read=8004, bytes_written=4004, peak_live_bytes=4004))
    """
    import_module("torch._dynamo")  # PyTorch would at first need: frames of that import keep the caller's tensors alive
    meter = _Meter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _HostReads(meter), meter:
            result = call()
    finally:
        if collecting:
            gc.enable()
    return result, meter.counters()


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch leaves the base untyped
    """Adds up every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # ditto
        self.reading = False  # a host read is under way and already counted
        self._operations = self._host_syncs = self._bytes_read = self._bytes_written = 0
        self._live_bytes = self._peak_live_bytes = 0
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def counters(self) -> Counters:
        """Freeze the sums."""
        return Counters(
            self._operations, self._host_syncs, self._bytes_read, self._bytes_written, self._peak_live_bytes
        )

    def add(self, read: Sequence[Tensor], written: Sequence[Tensor], *, synchronises: bool) -> None:
        """Add one operation."""
        self._operations += 1
        self._host_syncs += synchronises
        self._bytes_read += sum(map(_touched_bytes, read))
        self._bytes_written += sum(map(_touched_bytes, written))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.reading:
            return func(*args, **kwargs)
        schema = func._schema.arguments
        given = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema)}
        before = {_identity(tensor) for tensor in _tensors(given)}

        result = func(*args, **kwargs)

        allocates = func.overloadpacket in _ALLOCATIONS
        returned = list(_tensors(result))
        fresh = [t for t in returned if allocates or _identity(t) not in before]
        changed = [t for a in schema if a.alias_info and a.alias_info.is_write for t in _tensors(given[a.name])]
        self._hold(fresh + [t for t in changed if _identity(t) in self._held])  # an `out=` tensor may have grown

        only_views = returned and not fresh and not changed
        touches_nothing = not returned and not before  # a mark for a profiler
        if not (allocates or only_views or touches_nothing or torch.Tag.inplace_view in func.tags):
            read = [t for a in schema if not a.is_out for t in _tensors(given[a.name])]
            self.add(read, fresh + changed, synchronises=_synchronises(func, given, returned))
        return result

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        """Add the storages to the live ones, each until it is freed."""
        for tensor in tensors:
            storage, key = tensor.untyped_storage(), _identity(tensor)
            self._release(key)
            # PyTorch keeps a storage's Python object for as long as its memory, so the reference dies with the memory.
            self._held[key] = weakref.ref(storage, partial(self._release, key)), storage.nbytes()
            self._live_bytes += storage.nbytes()
        self._peak_live_bytes = max(self._peak_live_bytes, self._live_bytes)

    def _release(self, key: int, _: object = None) -> None:
        """Take a storage, if it is held, off the live ones."""
        _, size = self._held.pop(key, (None, 0))
        self._live_bytes -= size


class _HostReads(TorchFunctionMode):
    """Counts the host reads that a CPU tensor answers without the dispatcher: alike, wherever the tensor lives."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read: list[Tensor] = []
        if func in _HOST_READS:
            read = [args[0]]
        elif func is torch.tensor and args and not isinstance(args[0], Tensor):
            read = list(_tensors(args[0]))  # `torch.tensor([x, y])` fetches x, then y
        for tensor in read:
            self._meter.add([tensor], [], synchronises=True)
        self._meter.reading = bool(read)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._meter.reading = False


def _synchronises(func: Any, given: Mapping[str, Any], returned: Sequence[Tensor]) -> bool:
    """Whether the host has to wait for this operation's result."""
    packet = func.overloadpacket
    if packet in _COPIES:
        return returned[0].is_cpu and not all(tensor.is_cpu for tensor in _tensors(given))
    if packet in _INDEXING:
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(given["indices"]))
        fills = packet is not _aten.index and given["values"].dim() == 0  # becomes a masked fill
        return masked and not fills
    if packet is _aten.repeat_interleave:
        return given["output_size"] is None
    return not _DATA_DEPENDENT.isdisjoint(func.tags)


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a value, in order: operations take and return tensors and lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _identity(tensor: Tensor) -> int:
    """Address of the storage's record: the same for all views, and taken by no other storage while this one lives."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _touched_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: a dimension of stride 0 repeats the same ones."""
    distinct = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return min(distinct * tensor.element_size(), tensor.untyped_storage().nbytes())
