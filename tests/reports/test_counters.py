"""Counters are exact: every number here follows from shapes and dtypes, by hand."""

from __future__ import annotations

import gc
import operator
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detoracle.reports.counters import Counters, count

X = torch.arange(-5.0, 7.0).reshape(3, 4)  # 48 bytes
MASK = X > 0
ROWS = torch.tensor([2, 0])
REPEATS = torch.tensor([1, 0, 2])


def _counters(call: Callable[[], object]) -> Counters:
    return count(call)[1]


def _normalised(scores: Tensor) -> Tensor:
    exponentials = (scores - scores.amax(1, keepdim=True)).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def test_every_number_follows_from_the_shapes() -> None:
    result, counters = count(lambda: _normalised(X))
    assert torch.equal(result, _normalised(X))
    # amax, sub, exp, sum, div over 48-byte matrices and 12-byte columns
    assert counters == Counters(
        operations=5,
        host_syncs=0,
        bytes_read=48 + (48 + 12) + 48 + 48 + (48 + 12),
        bytes_written=12 + 48 + 48 + 12 + 48,
        peak_live_bytes=12 + 48 + 48,  # the column of maxima is in use by the expression until `exp` has returned
    )


def test_a_second_run_counts_the_same() -> None:
    assert _counters(lambda: _normalised(X)) == _counters(lambda: _normalised(X))


def test_the_first_count_of_a_process_is_like_any_other() -> None:
    code = """
from detoracle.implementations.batched.yolox import assign
from detoracle.properties.systems import find_operation
from detoracle.reports.counters import count
from detoracle.reports.workloads import Workload, workload_case
given = workload_case(*find_operation("yolox.assign"), Workload(1, 2, 84, 3)).arguments
first, second = (count(lambda: assign(**given))[1] for _ in range(2))
assert first == second, (first, second)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_size_of_the_input_decides_and_its_values_do_not() -> None:
    others, fewer = torch.full_like(X, -7.0), X[:2]
    assert _counters(lambda: _normalised(others)) == _counters(lambda: _normalised(X))
    assert _counters(lambda: _normalised(fewer)) != _counters(lambda: _normalised(X))


def test_one_more_item_is_one_more_synchronisation() -> None:
    plain = _counters(lambda: _normalised(X).sum())
    hidden = _counters(lambda: _normalised(X).sum().item())
    assert hidden == replace(
        plain, operations=plain.operations + 1, host_syncs=plain.host_syncs + 1, bytes_read=plain.bytes_read + 4
    )


def _hold_one_more(scores: Tensor) -> Tensor:
    kept = scores.neg()
    result = _normalised(scores)
    del kept
    return result


def _drop_one_more(scores: Tensor) -> Tensor:
    scores.neg()
    return _normalised(scores)


def test_one_more_dense_temporary_raises_the_peak_by_its_bytes() -> None:
    plain, held, dropped = (_counters(partial(f, X)) for f in (_normalised, _hold_one_more, _drop_one_more))
    assert held == replace(dropped, peak_live_bytes=dropped.peak_live_bytes + 48)
    assert dropped == replace(
        plain, operations=plain.operations + 1, bytes_read=plain.bytes_read + 48, bytes_written=plain.bytes_written + 48
    )


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(view, id=name)
        for name, view in {
            "nothing": lambda: None,
            "shape": lambda: X.shape,
            "slice": lambda: X[1:, ::2],
            "select": lambda: X[0],
            "transpose": lambda: X.t(),
            "reshape": lambda: X.reshape(2, 6),
            "expand": lambda: X.expand(9, 3, 4),
            "detach": lambda: X.detach(),
            "unbind": lambda: X.unbind(0),
            "chunk": lambda: X.chunk(2),
            "in-place": lambda: X.t().t_(),
            "same-dtype": lambda: X.to(torch.float32).contiguous(),
            "no-element": lambda: X[:0],
        }.items()
    ],
)
def test_views_cost_nothing(view: Callable[[], object]) -> None:
    assert _counters(view) == Counters(0, 0, 0, 0, 0)


def test_a_reshape_that_has_to_copy_is_no_view() -> None:
    assert _counters(lambda: X.t().reshape(-1)) == Counters(1, 0, 48, 48, 48)


def test_an_allocation_costs_only_its_memory() -> None:
    assert _counters(lambda: torch.empty(3, 4)) == Counters(0, 0, 0, 0, 48)
    assert _counters(lambda: torch.tensor([1.0, 2.0])) == Counters(0, 0, 0, 0, 8)
    assert _counters(lambda: torch.zeros(3, 4)) == Counters(1, 0, 0, 48, 48)


def test_a_broadcast_dimension_is_read_once() -> None:
    assert _counters(lambda: X.expand(9, 3, 4) + 1) == Counters(1, 0, 48, 9 * 48, 9 * 48)
    assert _counters(lambda: X[0, 0].expand(5, 6) + 1) == Counters(1, 0, 4, 5 * 24, 5 * 24)
    assert _counters(lambda: X.as_strided((2, 11), (1, 1)).neg()).bytes_read == 48  # overlapping windows
    assert _counters(lambda: X.expand(0, 3, 4) + 1) == Counters(1, 0, 0, 0, 0)


def test_in_place_reads_and_writes_its_destination_and_out_only_writes_it() -> None:
    target = X.clone()
    assert _counters(lambda: target.add_(X)) == Counters(1, 0, 48 + 48, 48, 0)
    assert _counters(lambda: torch.add(X, X, out=target)) == Counters(1, 0, 48 + 48, 48, 0)
    assert _counters(lambda: torch._foreach_add_([target, target.clone()], 1.0)) == Counters(2, 0, 48 + 96, 48 + 96, 48)


def test_an_out_tensor_that_grows_is_held_at_its_new_size() -> None:
    assert _counters(lambda: torch.add(X, X, out=torch.empty(0))).peak_live_bytes == 48


def test_a_view_keeps_all_of_its_storage() -> None:
    def keep(*, view: bool) -> Tensor:
        kept = X.neg()[:1] if view else X[:1].neg()
        return kept + X.neg().sum()

    # kept, 48 negated bytes, 4 of their sum
    assert _counters(lambda: keep(view=True)).peak_live_bytes == 48 + 48 + 4
    assert _counters(lambda: keep(view=False)).peak_live_bytes == 16 + 48 + 4


def test_memory_from_before_the_call_is_not_given_back_in_it() -> None:
    before = [X.clone()]

    def replace_it() -> None:
        before.pop()
        before.append(X.neg())

    assert _counters(replace_it).peak_live_bytes == 48


def test_the_backward_pass_counts() -> None:
    leaf = X.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        torch.autograd.backward(leaf.exp().sum())

    assert _counters(step) == Counters(
        operations=4,  # exp, sum, ones_like for the first gradient, mul
        host_syncs=0,
        bytes_read=48 + 48 + 4 + (4 + 48),  # the gradient of the sum is one element, expanded
        bytes_written=48 + 4 + 4 + 48,
        peak_live_bytes=48 + 4 + 4 + 48,  # the graph keeps what exp returned
    )


def test_a_mask_is_expanded_again_by_the_backward_pass() -> None:
    leaf = X.clone().requires_grad_()
    assert _counters(lambda: torch.autograd.grad(leaf[MASK].sum(), leaf)).host_syncs == 2


def test_a_synchronisation_where_autograd_calls_back_counts() -> None:
    leaf = X.clone().requires_grad_()

    def step() -> None:
        doubled = leaf * 2
        doubled.register_hook(lambda g: g if g.any() else None)  # type: ignore[no-untyped-call]  # PyTorch's own
        torch.autograd.backward(doubled.sum())

    assert _counters(step).host_syncs == 1


SYNCHRONISING = {
    "item": lambda: X[0, 0].item(),
    "float": lambda: float(X[0, 0]),
    "int": lambda: int(ROWS[0]),
    "index": lambda: operator.index(ROWS[0]),
    "if": lambda: "some" if MASK.any() else "none",
    "while": lambda: max(X[0, :2]),
    "in": lambda: 3.0 in X,
    "slice-end": lambda: X[: ROWS[1]],
    "k": lambda: X.topk(int(ROWS[0]), dim=1),
    "is_nonzero": lambda: torch.is_nonzero(X[0, 0]),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(MASK),
    "argwhere": lambda: torch.argwhere(MASK),
    "mask": lambda: X[MASK],
    "mask-rows": lambda: X[MASK[:, 0]],
    "mask-assigned": lambda: X.clone().index_put_((MASK,), X.flatten()[:6]),
    "mask-of-one-assigned": lambda: X.clone().index_put_((X > 5,), X[0, :1]),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: torch.unique(X),
    "unique-rows": lambda: torch.unique(X, dim=0),
    "unique_consecutive": lambda: torch.unique_consecutive(X),
    "bincount": lambda: REPEATS.bincount(),
    "repeat_interleave": lambda: X.repeat_interleave(REPEATS, 0),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "cpu-tolist": lambda: X.detach().tolist(),
    "tensor-of-tensors": lambda: torch.tensor([1.0, X[0, 0]]),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in SYNCHRONISING.items()])
def test_the_host_waits_once(call: Callable[[], object]) -> None:
    counters = _counters(call)
    assert counters.host_syncs == 1
    assert counters.operations >= 1


ASYNCHRONOUS = {
    "rows": lambda: X[ROWS],
    "rows-assigned": lambda: X.clone().index_put_((ROWS,), X[:2]),
    "masked_fill": lambda: X.masked_fill(MASK, 0.0),
    "mask-filled": lambda: X.clone().__setitem__(MASK, 0.0),
    "where": lambda: torch.where(MASK, X, 0.0),
    "any": lambda: MASK.any(),
    "repeat_interleave": lambda: X.repeat_interleave(REPEATS, 0, output_size=3),
    "repeat_interleave-by-3": lambda: X.repeat_interleave(3, 0),
    "nonzero_static": lambda: X.nonzero_static(size=12),
    "cast": lambda: X.to(torch.float64),
    "tensor-of-numbers": lambda: torch.tensor([1.0, 2.0]) + X[0, :2],
}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in ASYNCHRONOUS.items()])
def test_the_host_does_not_wait(call: Callable[[], object]) -> None:
    counters = _counters(call)
    assert counters.host_syncs == 0
    assert counters.operations >= 1


def test_a_mask_of_bytes_is_a_mask() -> None:
    with pytest.warns(UserWarning, match="uint8"):
        assert _counters(lambda: X[MASK.to(torch.uint8)]).host_syncs == 1


def test_a_tensor_of_a_tensor_is_copied_where_it_is() -> None:
    with pytest.warns(UserWarning, match="clone"):
        assert _counters(lambda: torch.tensor(X)).host_syncs == 0


def test_a_mark_for_a_profiler_is_no_operation() -> None:
    def marked() -> Tensor:
        with torch.profiler.record_function("assign"):
            return X + 1

    assert _counters(marked) == _counters(lambda: X + 1)


@pytest.mark.parametrize(
    ("copy", "syncs"),
    [
        pytest.param(lambda x: x.cpu(), 1, id="cpu"),
        pytest.param(lambda x: x.to("cpu"), 1, id="to-cpu"),
        pytest.param(lambda x: torch.empty(3, 4).copy_(x), 1, id="copy-to-cpu"),
        pytest.param(lambda x: x.to(torch.float64), 0, id="cast"),
        pytest.param(lambda x: torch.empty_like(x, device="cpu").to(x.device), 0, id="from-cpu"),
    ],
)
def test_only_copies_to_the_host_wait(copy: Callable[[Tensor], object], syncs: int) -> None:
    with FakeTensorMode():  # tensors of any device, without the device
        elsewhere = torch.empty(3, 4, device="cuda")
        assert _counters(lambda: copy(elsewhere)).host_syncs == syncs


def test_a_host_read_is_one_operation() -> None:
    assert _counters(lambda: X.tolist()) == Counters(1, 1, 48, 0, 0)
    assert _counters(lambda: torch.tensor([X[0, 0], X[0, 1]])).host_syncs == 2


def test_what_follows_a_host_read_counts_again() -> None:
    def read_and_go_on() -> Tensor:
        X.tolist()
        with torch._C.DisableTorchFunction():
            return X + 1

    assert _counters(read_and_go_on) == Counters(2, 1, 48 + 48, 48, 48)
    with pytest.raises(RuntimeError, match="requires grad"):
        count(lambda: X.clone().requires_grad_().numpy())
    assert _counters(lambda: X + 1) == Counters(1, 0, 48, 48, 48)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_rests_and_is_left_as_it_was(enabled: bool) -> None:
    def cycle() -> bool:
        kept: list[object] = [X.neg()]
        kept.append(kept)
        return gc.isenabled()

    (gc.enable if enabled else gc.disable)()
    try:
        assert count(lambda: [cycle() for _ in range(1000)]) == ([False] * 1000, Counters(1000, 0, 48000, 48000, 48000))
        with pytest.raises(ZeroDivisionError):
            count(lambda: 1 / 0)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_compiled_function_counts_in_its_eager_form() -> None:
    fused = []

    def fuse(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def run(*args: object) -> object:
            fused.append(1)
            return graph(*args)

        return run

    compiled = torch.compile(_normalised, backend=fuse)
    compiled(X)
    assert fused == [1]
    assert _counters(lambda: compiled(X)) == _counters(lambda: _normalised(X))
    assert fused == [1]


def test_a_count_inside_a_count_agrees_with_it() -> None:
    (_, inner), outer = count(lambda: count(lambda: _normalised(X)))
    assert inner == outer
