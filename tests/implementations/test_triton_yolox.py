from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import yolox as batched
from detoracle.properties.checking import Case, cases, judge_case
from detoracle.properties.comparison import Expectation, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference.errors import InputError
from detoracle.reports.counters import count

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, yolox, yolox_kernels, yolox_loss_kernels

# Interpreted kernels compute with NumPy, which warns of what floats do on a GPU without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")

YOLOX = system_of("yolox")
OPERATIONS = {operation.name: operation for operation in YOLOX.operations}
MINE: dict[str, Callable[..., Any]] = {"yolox.assign": yolox.assign, "yolox.loss": yolox.loss}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAVOURS = ["tutorial", "official"]
EDGE = {scene.name: scene for scene in edge_cases()}
FEW = [
    "empty-one",
    "empty-all",
    "identical-other-class",
    "crowded-cell",
    "outside-far",
    "outside-mixed",
    "negative-row",
    "zero-row-first",
    "degenerate-pair",
    "edge-of-centre-square",
    "equal-several",
    "perfect-2",
    "one-anchor",
    "four-anchors",
    "nan-box",
]


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype) -> list[tuple[Case, Expectation]]:
    found = cases(YOLOX, OPERATIONS[operation], scene, dtype=dtype, device=DEVICE)
    return [(case, expect(YOLOX, OPERATIONS[operation], case.arguments)) for case in found]


def wrong_cases(
    operation: str,
    scene: Scene,
    call: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.float32,
    flavours: list[str] = FLAVOURS,
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], call or MINE[operation])
    judged = [(c, right) for c, right in expected(operation, scene, dtype) if c.setting in flavours]
    results = [judge_case(case, right, perform_) for case, right in judged]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("name", FEW)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("yolox.assign", EDGE[name]) == []


@pytest.mark.parametrize("name", ["empty-all", "degenerate-point", "perfect-2", "four-anchors"])
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("yolox.loss", EDGE[name]) == []


@pytest.mark.parametrize("operation", MINE)
def test_right_on_a_random_scene(operation: str) -> None:
    scene = list(random_scenes(5, seed=5))[4]
    assert int(scene.num_images) > 0
    assert wrong_cases(operation, scene, flavours=["tutorial"]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", MINE)
def test_right_in_half_precision(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["best-for-a-third"], dtype=dtype, flavours=["official"]) == []


def test_contested_anchors_go_to_the_cheapest_of_all() -> None:
    assert wrong_cases("yolox.assign", EDGE["best-for-a-third"], flavours=["tutorial"]) == []


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("operation", MINE)
def test_float64_is_refused(operation: str) -> None:
    case = next(cases(YOLOX, OPERATIONS[operation], EDGE["single"], dtype=torch.float64))
    with pytest.raises(InputError, match=rf"{operation}: .*: expected float32, bfloat16 or float16, got torch.float64"):
        MINE[operation](**case.arguments)


def test_more_ground_truths_than_can_be_addressed_are_refused() -> None:
    given = dict(next(cases(YOLOX, OPERATIONS["yolox.assign"], EDGE["single"], device=DEVICE)).arguments)
    many = {name: given[name][:, :1] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    many = {name: tensor.expand(1, 2**29, *tensor.shape[2:]) for name, tensor in many.items()}
    with pytest.raises(InputError, match=r"gt_boxes: expected at most 65535 images, and 536870911 ground truths"):
        yolox.assign(**{**given, **many})


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    case = next(cases(YOLOX, OPERATIONS["yolox.loss"], EDGE["single"], device="cpu"))
    with pytest.raises(InputError, match=r"expected to be on a GPU, got cpu\. Set TRITON_INTERPRET=1"):
        yolox.loss(**case.arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion on a device ends its use by the process")
def test_a_class_that_does_not_exist_is_refused() -> None:
    case = next(cases(YOLOX, OPERATIONS["yolox.assign"], EDGE["label-beyond"]))
    with pytest.raises(RuntimeError, match="gt_labels: expected 0 to"):
        yolox.assign(**case.arguments)


# ------------------------------------------------------------------------------------------------------------ the host
class Launched:
    """Stands for a kernel; remembers its launches, and does nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_arguments, **_settings: None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launched]:
    kernels = {name: Launched() for name in ("candidates", "claim", "resolve", "sums", "gradients")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(yolox_kernels if hasattr(yolox_kernels, name) else yolox_loss_kernels, name, kernel)
    return kernels


def loss_arguments(scene: str) -> dict[str, Any]:
    return dict(next(cases(YOLOX, OPERATIONS["yolox.loss"], EDGE[scene], device=DEVICE)).arguments)


def gradient(given: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [level.requires_grad_() for level in given["raw"]]
    return torch.autograd.grad(yolox.loss(**given)["total"], leaves)


@pytest.mark.parametrize("scene", ["single", "crowd"])
def test_the_host_never_waits_and_launches_as_much_for_any_scene(scene: str, launches: dict[str, Launched]) -> None:
    given = loss_arguments(scene)
    _, counters = count(lambda: gradient(given))
    assert counters.host_syncs == 0
    assert {name: len(kernel.grids) for name, kernel in launches.items()} == {
        "candidates": 1,
        "claim": 1,
        "resolve": 1,
        "sums": 3,
        "gradients": 3,
    }
    assert launches["claim"].grids == [(given["gt_valid"].numel(),)]


def test_memory_does_not_grow_with_the_ground_truths(launches: dict[str, Launched]) -> None:
    few, many = (_peak(scene) for scene in ("crowd", "crowd-150"))
    ground_truths = 150 * 4 * 40  # what belongs to a ground truth: boxes, labels, masks; nowhere near its anchors
    assert many - few < ground_truths


def _peak(scene: str) -> int:
    arguments = next(cases(YOLOX, OPERATIONS["yolox.assign"], EDGE[scene], device=DEVICE)).arguments
    return int(count(lambda: yolox.assign(**arguments))[1].peak_live_bytes)


# ------------------------------------------------------------------------------------------------------ wrong variants
def _only_a_threshold(best: Any, most: Any) -> Any:
    """One claim too few."""
    return BEFORE(best, most - 1)


def _own_class_not_taken_off(logit: Any) -> Any:
    """All are as likely."""
    return SIGMOID(logit * 0.0)


def _as_if_alone(keys: Any) -> Any:
    """Keys name the anchor before."""
    value, index = KEY_VALUE(keys)
    return value, index ^ 1


BEFORE, SIGMOID, KEY_VALUE = arithmetic.before, arithmetic.sigmoid, arithmetic.key_value


@pytest.mark.skipif(torch.cuda.is_available(), reason="what stands for a compiled function must be one too")
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [
        ("before", _only_a_threshold, "many-claims-few-anchors"),
        ("sigmoid", _own_class_not_taken_off, "best-for-a-third"),
        ("key_value", _as_if_alone, "identical-other-class"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(yolox_kernels, name, wrong)
    assert wrong_cases("yolox.assign", EDGE[scene], flavours=["tutorial"])


def _no_difference(logit: Any, target: Any) -> Any:
    """The gradient of an entropy towards 0."""
    loss, derivative = arithmetic.bce_with_logits(logit, target)
    return loss, derivative + target


def _whole_at_ties(low: Any, high: Any, gt_low: Any, gt_high: Any) -> Any:
    """Sides that ends of the ground truth bound have a gradient too."""
    length, by_low, by_high = SIDE(low, high, gt_low, gt_high)
    return length, by_low - 0.5, by_high + 0.5


SIDE = yolox_loss_kernels._side


@pytest.mark.skipif(torch.cuda.is_available(), reason="what stands for a compiled function must be one too")
@pytest.mark.parametrize(("name", "wrong"), [("bce_with_logits", _no_difference), ("_side", _whole_at_ties)])
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(yolox_loss_kernels, name, wrong)
    assert wrong_cases("yolox.loss", EDGE["single"], flavours=["tutorial"])


# ------------------------------------------------------------------------------------------------------------- on a GPU
@on_gpu
@pytest.mark.parametrize("operation", MINE)
def test_a_gpu_is_right_on_all_edge_cases(operation: str) -> None:
    scenes = (scene for name, scene in EDGE.items() if not name.startswith("label-"))
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene)] == []


@on_gpu
def test_a_gpu_holds_no_pairs() -> None:
    case = next(cases(YOLOX, OPERATIONS["yolox.assign"], EDGE["crowd-520"], device="cuda"))
    memory = []
    for call in (yolox.assign, batched.assign):
        call(**case.arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(**case.arguments)
        memory.append(torch.cuda.max_memory_allocated() - before)
    assert memory[0] < memory[1] / 10


@on_gpu
def test_a_gpu_is_never_waited_for() -> None:
    given = loss_arguments("crowd")
    gradient(given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_gpu_repeats_to_the_last_bit() -> None:
    given = loss_arguments("crowd-150")
    runs = [gradient(given) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@on_gpu
def test_a_graph_replays_it() -> None:
    given = loss_arguments("crowd")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain = yolox.loss(**given)["total"]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = yolox.loss(**given)["total"]
    graph.replay()
    assert torch.equal(captured, plain)
