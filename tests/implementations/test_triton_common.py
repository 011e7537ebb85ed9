"""What holds of every operation in Triton kernels; what is particular to a system is in a file of its own."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch

from detoracle.properties.checking import cases, judge_law
from detoracle.properties.comparison import expect
from detoracle.properties.laws.catalogue import laws_of
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.counters import count
from tests.implementations.triton_trials import (
    CALLS,
    DEVICE,
    EDGE,
    LOSSES,
    arguments_of,
    gradients_of,
    interpreted,
    launches_of,
    warnings_of_numpy,
    wrong_cases,
)

pytest.importorskip("triton")
import triton

from detoracle.implementations.triton import matching
from detoracle.implementations.triton.launching import tiles, tuned

pytestmark = warnings_of_numpy
FIRST = {  # of the settings, of which others are tried on edge cases
    "yolox": ["tutorial"],
    "ssd": ["threshold 0.5", "3:1", "threshold 0.5, 3:1"],
    "anchor_head": ["retina"],
    "rtmdet": [""],
    "yolov8": [""],
}
SMALL = {"ssd": "overlapping", "anchor_head": "four-anchors"}
ASSIGNMENTS = {"yolox.assign": 40, "ssd.match": 40, "anchor_head.assign": 40, "rtmdet.assign": 60, "yolov8.assign": 60}
LAUNCHES = {
    "yolox": {"candidates": 1, "claim": 1, "resolve": 1, "sums": 3, "gradients": 3},
    "ssd": {"best_priors": 1, "match": 1, "entropies": 1, "mine": 1, "sums": 1, "gradients": 1},
    "anchor_head": {"best_anchors": 1, "assign": 1, "sums": 3, "gradients": 3},
    "rtmdet": {"candidates": 1, "claim": 1, "resolve": 1, "sums": 3, "gradients": 3},
    "yolov8": {"decode": 3, "claim": 1, "resolve": 1, "scale": 1, "sums": 3, "gradients": 3},
}


def system_of(operation: str) -> str:
    return operation.partition(".")[0]


@pytest.mark.parametrize(
    "operation", sorted(CALLS.keys() - {"anchor_head.loss"})
)  # which has too many anchors to interpret
def test_right_on_a_random_scene(operation: str) -> None:
    scene = list(random_scenes(5, seed=5))[4]
    assert int(scene.num_images) > 0
    assert wrong_cases(operation, scene, FIRST[system_of(operation)]) == []


@pytest.mark.parametrize("operation", CALLS)
def test_right_in_half_precision(operation: str) -> None:
    system, dtype = system_of(operation), torch.bfloat16 if operation in LOSSES else torch.float16
    assert wrong_cases(operation, SMALL.get(system, "identical-other-class"), FIRST[system], dtype) == []


@pytest.mark.parametrize("operation", CALLS)
def test_every_law_holds_but_that_of_float64(operation: str) -> None:
    """Which the kernels refuse."""
    system, found = find_operation(operation)
    case = next(iter(cases(system, found, EDGE["identical-other-class"], device=DEVICE)))
    call = partial(perform, found, CALLS[operation])
    right, first = expect(system, found, case.arguments), call(case.arguments)
    assert not right.judge(first).wrong
    judged = {law.id: judge_law(system, found, law, case, right, first, call) for law in laws_of(found)}
    wrong = {name for name, result in judged.items() if result is not None and result.verdict.wrong}
    assert wrong == {"float64"}
    assert sum(result is not None for result in judged.values()) >= 5


def _own_term_is_left_in(terms: Any, at: Any, there: Any, label: Any, own: Any) -> Any:
    return matching.without(terms, at, there, label, own * 0.0)


@interpreted
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    ("operation", "name", "first"), [("yolox.assign", "predictions", 4), ("rtmdet.assign", "class_logits", 0)]
)
def test_classes_far_apart_are_matched_as_batched_does(
    operation: str, name: str, first: int, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a class is sure, its cost as "another class" is large: the sum over the others must not hold it."""
    system, given = system_of(operation), arguments_of(operation, "best-for-a-third")
    logits = given[name][..., first:]
    logits.copy_(6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)))
    if broken:
        monkeypatch.setattr(kernels_of(system)[0], "without", _own_term_is_left_in)
    batched = importlib.import_module(f"detoracle.implementations.batched.{system}").assign
    assert torch.equal(CALLS[operation](**given).gt_index, batched(**given).gt_index) != broken


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("operation", CALLS)
def test_float64_is_refused(operation: str) -> None:
    given = arguments_of(operation, "single", dtype=torch.float64)
    with pytest.raises(InputError, match=rf"{operation}: .*: expected float32, bfloat16 or float16, got torch.float64"):
        CALLS[operation](**given)


@pytest.mark.parametrize("operation", [*ASSIGNMENTS, "ssd.hard_negatives"])
def test_more_rows_than_can_be_addressed_are_refused(operation: str) -> None:
    given = arguments_of(operation, "single")
    names = {"gt_index"} if operation == "ssd.hard_negatives" else {"gt_boxes", "gt_labels", "gt_valid"} & given.keys()
    many = {name: given[name][:, :1] for name in names}
    many = {name: tensor.expand(len(tensor), 2**29, *tensor.shape[2:]) for name, tensor in many.items()}
    with pytest.raises(InputError, match=rf"{operation}: .*: expected at most 65535 images, and 536870911 rows"):
        CALLS[operation](**{**given, **many})


@interpreted
@pytest.mark.parametrize(("operation", "message"), [("yolox.assign", "expected 0 to"), ("ssd.loss", "from -1 to 3")])
def test_a_class_that_does_not_exist_is_refused(operation: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"gt_labels: {message}"):
        CALLS[operation](**arguments_of(operation, "label-beyond"))


@pytest.mark.parametrize("operation", ["rtmdet.assign", "yolov8.assign"])
def test_a_top_k_that_no_program_holds_is_refused(operation: str) -> None:
    with pytest.raises(InputError, match=rf"{operation}: topk: expected 0 to 128, got 129"):
        CALLS[operation](**arguments_of(operation, "single"), topk=129)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    given = {name: _on_cpu(value) for name, value in arguments_of("yolox.loss", "single").items()}
    with pytest.raises(InputError, match=r"expected to be on a GPU, got cpu\. Set TRITON_INTERPRET=1"):
        CALLS["yolox.loss"](**given)


def _on_cpu(value: Any) -> Any:
    return [_on_cpu(item) for item in value] if isinstance(value, list) else getattr(value, "cpu", lambda: value)()


# ------------------------------------------------------------------------------------------------------------- the host
def kernels_of(system: str) -> list[Any]:
    return [importlib.import_module(f"detoracle.implementations.triton.{system}{end}_kernels") for end in ("", "_loss")]


@pytest.mark.parametrize("scene", ["single", "crowd"])
@pytest.mark.parametrize("operation", LOSSES)
def test_the_host_never_waits_and_launches_as_much_for_any_scene(
    operation: str, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, given = system_of(operation), arguments_of(operation, scene)
    launches = launches_of(monkeypatch, *kernels_of(system))
    _, counters = count(lambda: gradients_of(operation, given))
    assert counters.host_syncs == 0
    assert {name: len(kernel.grids) for name, kernel in launches.items() if kernel.grids} == LAUNCHES[system]
    if "claim" in launches:
        assert launches["claim"].grids == [(given["gt_valid"].numel(),)]


@pytest.mark.parametrize("operation", ASSIGNMENTS)
def test_memory_does_not_grow_with_the_ground_truths(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (arguments_of(operation, scene) for scene in ("crowd", "crowd-150"))
    launches_of(monkeypatch, *kernels_of(system_of(operation)))
    peaks = [count(partial(CALLS[operation], **given))[1].peak_live_bytes for given in (few, many)]
    # What belongs to a ground truth: boxes, centres, labels, masks, keys; nothing for each of its anchors.
    assert peaks[1] - peaks[0] < 150 * 4 * ASSIGNMENTS[operation]


# ---------------------------------------------------------------------------------------------------------------- tiles
@pytest.mark.parametrize("operation", ["yolox.loss", "anchor_head.loss", "rtmdet.loss"])
def test_tiles_do_not_change_a_bit(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, given = kernels_of(system_of(operation))[1].gradients, arguments_of(operation, "one-anchor")
    found = []
    for cells, classes in ((128, 16), (16, 2)):
        monkeypatch.setattr(kernel, "configs", [triton.Config({"CELLS": cells, "CLASSES": classes})])
        found.append(gradients_of(operation, given))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Kernel:
    """Stands for a compiled kernel; remembers the tiles of its runs."""

    arg_names = ("out", "size", "CELLS", "CLASSES")

    def __init__(self) -> None:
        self.tiles: list[tuple[int, int]] = []

    @staticmethod
    def fn() -> None:
        """Triton looks for a function."""

    def run(self, *_: Any, CELLS: int, CLASSES: int, **__: Any) -> None:  # noqa: N803
        self.tiles.append((CELLS, CLASSES))


def test_tiles_are_timed_once_a_size_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    plain = Kernel()
    kernel = tuned("size")(plain)
    assert kernel.cache_results
    seconds = iter(range(100, 0, -1))
    kernel.cache_results = False  # the disk's key names a device
    kernel._do_bench = lambda call, quantiles: (call(), [next(seconds)] * len(quantiles))[1]
    runs = []
    for size, dtype in ((32, torch.float32), (32, torch.float32), (64, torch.float32), (32, torch.bfloat16)):
        kernel[tiles(300)](torch.zeros(1, dtype=dtype), size)
        runs.append(len(plain.tiles))
    tried = len(kernel.configs)
    assert runs == [tried + 1, tried + 2, 2 * tried + 3, 3 * tried + 4]
    assert plain.tiles[tried] == plain.tiles[tried - 1]  # the last one, which took the shortest time


# ------------------------------------------------------------------------------------------------------- once and again
@pytest.mark.parametrize("operation", LOSSES)
def test_a_gradient_is_there_again_and_cannot_be_differentiated(operation: str) -> None:
    given = arguments_of(operation, "one-anchor")
    leaf = next(given[name] for name in ("raw", "class_logits", "cls_scores", "conf") if name in given)
    leaf = (leaf[0] if isinstance(leaf, list) else leaf).requires_grad_()
    total = CALLS[operation](**given)["total"] * torch.ones((), device=leaf.device, requires_grad=True)
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(total, leaf, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(again.sum())
