from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from detoracle.properties.anchor_head_settings import HEADS
from tests.implementations.triton_trials import (
    CALLS,
    EDGE,
    LOSSES,
    arguments_of,
    gradients_of,
    on_gpu,
    wrong_cases,
)

pytestmark = on_gpu
FOCAL = [name for name, head in HEADS.items() if head["class_loss"] == "focal"]  # others are left to batched
ASSIGNMENTS = ["yolox.assign", "ssd.match", "anchor_head.assign", "rtmdet.assign", "yolov8.assign"]


@pytest.mark.parametrize("operation", CALLS)
def test_all_edge_cases_are_right(operation: str) -> None:
    settings = FOCAL if operation == "anchor_head.loss" else None
    asserted = operation.startswith(("yolox", "ssd"))  # classes that do not exist end the use of the device
    scenes = (name for name in EDGE if not (asserted and name.startswith("label-")))
    assert [wrong for name in scenes for wrong in wrong_cases(operation, name, settings)] == []


@pytest.mark.parametrize("operation", ASSIGNMENTS)
def test_no_pairs_are_held(operation: str) -> None:
    given = arguments_of(operation, "crowd-520")
    system, _, name = operation.partition(".")
    batched = getattr(importlib.import_module(f"detoracle.implementations.batched.{system}"), name)
    assert 10 * _peak(CALLS[operation], given) < _peak(batched, given)


def _peak(call: Callable[..., Any], given: dict[str, Any]) -> int:
    call(**given)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(**given)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("operation", LOSSES)
def test_the_device_is_never_waited_for(operation: str) -> None:
    given = arguments_of(operation, "crowd")
    gradients_of(operation, given)  # compiles, and chooses tiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients_of(operation, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("operation", LOSSES)
def test_a_call_repeats_to_the_last_bit(operation: str) -> None:
    given = arguments_of(operation, "crowd-150")
    runs = [gradients_of(operation, given) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("operation", LOSSES)
def test_tiles_do_not_change_a_bit(operation: str) -> None:
    """Whichever tile was fastest."""
    kernel = importlib.import_module(f"detoracle.implementations.triton.{operation[:-5]}_loss_kernels").gradients
    if not hasattr(kernel, "configs"):
        pytest.skip("its gradients have one fixed tile, so that no order of adding hangs on a timing")
    given, tiles = arguments_of(operation, "crowd"), kernel.configs
    found = []
    try:
        for tile in tiles:
            kernel.configs = [tile]
            found.append(gradients_of(operation, given))
    finally:
        kernel.configs = tiles
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(run, found[0], strict=True))


@pytest.mark.parametrize("operation", LOSSES)
def test_a_graph_replays_it_forward_and_backward(operation: str) -> None:
    given = arguments_of(operation, "crowd")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain = gradients_of(operation, given)  # chooses tiles, which a graph cannot hold
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients_of(operation, given)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))
