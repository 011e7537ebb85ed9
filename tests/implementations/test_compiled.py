from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from detoracle.implementations.compiled import anchor_head, background, rtmdet, unavailable, yolov8
from detoracle.implementations.compiled.kernels import compiled_kernel
from detoracle.implementations.registry import discover, marked_in
from detoracle.implementations.sparse import background as sparse_background
from detoracle.implementations.sparse import focal as sparse_focal
from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import find_operation
from detoracle.reports.counters import count

pytestmark = pytest.mark.skipif(bool(unavailable("cpu")), reason=unavailable("cpu"))

LOSSES = {one.operation: one.load() for module in (anchor_head, rtmdet, yolov8) for one in marked_in(module)}
EDGE = {scene.name: scene for scene in edge_cases()}
SIDES = [(1, 1, 1), (1, 1, 5), (1, 2, 5), (1, 7, 3), (1, 80, 9), (4, 1, 1), (5, 3, 1), (3, 3, 3), (2, 80, 4100)]


def wrong_cases(name: str, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32) -> list[str]:
    """First argument set alone, which is the published one."""
    system, operation = find_operation(name)
    case = next(cases(system, operation, scene, dtype=dtype))
    result = judge_case(case, expect(system, operation, case.arguments), partial(perform, operation, call))
    return [f"{result.case.name}: {result.verdict.findings}"] if result.verdict.wrong else []


@pytest.mark.parametrize("scene", ["ragged", "empty-one", "one-class", "nan-class", "inf-class"])
@pytest.mark.parametrize("operation", LOSSES)
def test_right_on_edge_cases(operation: str, scene: str) -> None:
    assert wrong_cases(operation, EDGE[scene], LOSSES[operation]) == []


@pytest.mark.parametrize("operation", LOSSES)
def test_right_in_bfloat16(operation: str) -> None:
    assert wrong_cases(operation, EDGE["ragged"], LOSSES[operation], torch.bfloat16) == []


@pytest.mark.parametrize("operation", LOSSES)
def test_a_pass_that_is_wrong_is_seen(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_steep(*given: Any, **settings: Any) -> torch.Tensor:
        total: torch.Tensor = passes(*given, **settings)
        if settings["gradient"] is not None:
            settings["gradient"].mul_(1.001)
        return total

    name = "background_loss" if operation == "yolov8.loss" else "focal_background_loss"
    passes = getattr(background, name)
    module = {"anchor_head.loss": anchor_head, "rtmdet.loss": rtmdet, "yolov8.loss": yolov8}[operation]
    monkeypatch.setattr(module, name, too_steep)
    assert wrong_cases(operation, EDGE["ragged"], LOSSES[operation])


# --------------------------------------------------------------------------------------------------------- the kernel
def logits(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread - 1).to(dtype)


def test_one_kernel_for_maps_of_all_sizes_even_if_it_is_counted_first() -> None:
    weight, room = torch.ones(2, 3), torch.empty(2, 2, 3)
    compiled_kernel.cache_clear()
    count(lambda: background.focal_background_loss(torch.zeros(2, 2, 3), weight, gradient=room))
    background.focal_background_loss(torch.zeros(2, 2, 3), weight, gradient=room)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    assert not counters["frames"].keys() - {"total", "ok"}
    for shape in [*SIDES, (36, 80, 25), (9, 20, 20), (18, 5, 9000)]:
        x, weight = logits(shape, torch.float32), torch.rand(shape[0], shape[2])
        rooms = torch.empty(shape), torch.empty(shape)
        found, want = (
            module.focal_background_loss(x, weight, gradient=room)
            for module, room in zip((background, sparse_focal), rooms, strict=True)
        )
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(*rooms)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.fixture
def eagerly() -> Iterator[None]:
    """The same formulas without a compiler, which would take seconds for each."""
    compiled_kernel.cache_clear()
    with torch.compiler.set_stance("force_eager"):
        yield
    compiled_kernel.cache_clear()


def exact_enough(shape: tuple[int, ...], dtype: torch.dtype, gamma: float, spread: float) -> None:
    x = logits(shape, dtype, spread)
    wide = torch.promote_types(dtype, torch.float32)
    weight, room = torch.rand(shape[0], shape[2], dtype=wide), torch.empty(shape, dtype=wide)
    found = background.focal_background_loss(x, weight, gamma=gamma, gradient=room)
    total, slope = plainly(x.double(), weight.double(), gamma)
    # Every term is right to some units in the last place, whatever its size, and all are positive.
    assert abs(float(found) - total) <= 32 * torch.finfo(wide).eps * total
    assert not outside(room, slope, gradient_bound(slope, plainly(x.to(wide), weight, gamma)[1], row=1)).any()


def plainly(x: torch.Tensor, weight: torch.Tensor, gamma: float) -> tuple[float, torch.Tensor]:
    x = x.requires_grad_()
    total = (x.sigmoid() ** gamma * F.softplus(x, threshold=800) * weight[:, None]).sum()
    return float(total.detach()), torch.autograd.grad(total, x)[0]


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_formulas_are_exact(dtype: torch.dtype, gamma: float, spread: float) -> None:
    for shape in SIDES:
        exact_enough(shape, dtype, gamma, spread)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_compiled_formulas_are_exact(gamma: float) -> None:
    for spread in (0.1, 3.0, 30.0):
        exact_enough((3, 80, 65), torch.float32, gamma, spread)


@pytest.mark.parametrize("columns", [1, 6])
def test_cross_entropy_is_scaled(columns: int) -> None:
    x = logits((4, columns), torch.float32)
    rooms = torch.empty(4, columns), torch.empty(4, columns)
    found, want = (
        module.background_loss(x, scale=3.0, gradient=room)
        for module, room in zip((background, sparse_background), rooms, strict=True)
    )
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*rooms)


@pytest.mark.usefixtures("eagerly")
def test_of_nothing_and_without_room() -> None:
    x = logits((3, 4, 5), torch.float32)
    total = background.focal_background_loss(x, torch.ones(3, 5))
    assert torch.equal(total, background.focal_background_loss(x, torch.ones(3, 5), gradient=torch.empty(3, 4, 5)))
    assert float(background.focal_background_loss(x[:, :, :0], torch.ones(3, 0))) == 0
    assert float(background.background_loss(torch.full((4, 5), -torch.inf))) == 0


def test_counts_as_one_pass_and_a_cast_of_its_sum() -> None:
    x, weight, room = torch.zeros(2, 3, 4), torch.ones(2, 4), torch.empty(2, 3, 4)
    counted = count(lambda: background.focal_background_loss(x, weight, gradient=room))[1]
    assert (counted.operations, counted.host_syncs) == (2, 0)
    assert counted.bytes_read == x.nbytes + weight.nbytes + room.nbytes + 8
    assert counted.bytes_written == room.nbytes + 8 + 4


# ------------------------------------------------------------------------------------------------------ where it runs
def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert unavailable("cuda") == "is for a CPU"
    monkeypatch.setattr("detoracle.implementations.compiled.sysconfig.get_path", lambda name: str(tmp_path))
    assert "headers" in unavailable("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler, here no-such-compiler" in unavailable("cpu")
    assert "compiled" not in {one.name for one in discover()}
