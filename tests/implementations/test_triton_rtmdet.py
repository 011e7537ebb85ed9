from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import rtmdet as batched
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference.errors import InputError
from detoracle.reports.counters import count

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, rtmdet, rtmdet_kernels, rtmdet_loss_kernels

# Interpreted kernels compute with NumPy, which warns of what floats do on a GPU without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what stands for a compiled function must be one too"
)

RTMDET = system_of("rtmdet")
OPERATIONS = {operation.name: operation for operation in RTMDET.operations}
MINE: dict[str, Callable[..., Any]] = {"rtmdet.assign": rtmdet.assign, "rtmdet.loss": rtmdet.loss}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE = {scene.name: scene for scene in edge_cases()}
FEW = [
    "empty-one",
    "identical-other-class",
    "crowded-cell",
    "many-claims-few-anchors",
    "outside-mixed",
    "degenerate-pair",
    "perfect-2",
    "one-anchor",
    "nan-box",
    "label-beyond",
]


def wrong_cases(
    operation: str,
    scene: Scene,
    call: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.float32,
    settings: int | None = None,
) -> list[str]:
    """What is wrong under the default settings and others, or only the first of them."""
    found = list(cases(RTMDET, OPERATIONS[operation], scene, dtype=dtype, device=DEVICE))[:settings]
    perform_ = partial(perform, OPERATIONS[operation], call or MINE[operation])
    results = [judge_case(case, expect(RTMDET, OPERATIONS[operation], case.arguments), perform_) for case in found]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("name", FEW)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("rtmdet.assign", EDGE[name]) == []


@pytest.mark.parametrize("name", ["empty-single", "degenerate-point", "perfect-2", "four-anchors"])
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("rtmdet.loss", EDGE[name]) == []


@pytest.mark.parametrize("operation", MINE)
def test_right_on_a_random_scene(operation: str) -> None:
    scene = list(random_scenes(5, seed=5))[4]
    assert int(scene.num_images) > 0
    assert wrong_cases(operation, scene, settings=1) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", MINE)
def test_right_in_half_precision(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["identical-other-class"], dtype=dtype, settings=1) == []


def arguments_of(operation: str, scene: str, setting: int = 0) -> dict[str, Any]:
    """Arguments of an operation under the default settings, the first, or others."""
    return dict(list(cases(RTMDET, OPERATIONS[operation], EDGE[scene], device=DEVICE))[setting].arguments)


def test_points_in_another_order_are_assigned_alike() -> None:
    given = arguments_of("rtmdet.assign", "identical-other-class")
    order = torch.randperm(len(given["priors"]), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    other = given | {name: given[name][:, order] for name in ("class_logits", "boxes", "inside")}
    other["priors"] = given["priors"][order]
    assert torch.equal(rtmdet.assign(**other).positive, rtmdet.assign(**given).positive[:, order])


@pytest.mark.parametrize("topk", [0, 40])
def test_any_top_k_counts_claims(topk: int) -> None:
    given = arguments_of("rtmdet.assign", "many-claims-few-anchors")
    found, want = rtmdet.assign(**given, topk=topk), batched.assign(**given, topk=topk)
    assert torch.equal(found.extra["dynamic_k"], want.extra["dynamic_k"])


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("operation", MINE)
def test_float64_is_refused(operation: str) -> None:
    case = next(cases(RTMDET, OPERATIONS[operation], EDGE["single"], dtype=torch.float64))
    with pytest.raises(InputError, match=rf"{operation}: .*: expected float32, bfloat16 or float16, got torch.float64"):
        MINE[operation](**case.arguments)


def test_more_ground_truths_than_can_be_addressed_are_refused() -> None:
    given = arguments_of("rtmdet.assign", "single")
    many = {name: given[name][:, :1] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    many = {name: tensor.expand(len(tensor), 2**29, *tensor.shape[2:]) for name, tensor in many.items()}
    with pytest.raises(InputError, match=r"gt_boxes: expected at most 65535 images, and 536870911 rows"):
        rtmdet.assign(**{**given, **many})


def test_a_top_k_that_no_program_holds_is_refused() -> None:
    given = arguments_of("rtmdet.assign", "single")
    with pytest.raises(InputError, match=r"topk: expected 0 to 128, got 129"):
        rtmdet.assign(**given, topk=129)


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
        monkeypatch.setattr(rtmdet_kernels if hasattr(rtmdet_kernels, name) else rtmdet_loss_kernels, name, kernel)
    return kernels


def gradient(given: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [level.requires_grad_() for level in (*given["class_logits"], *given["distances"])]
    return torch.autograd.grad(rtmdet.loss(**given)["total"], leaves)


@pytest.mark.parametrize("scene", ["single", "crowd"])
def test_the_host_never_waits_and_launches_as_much_for_any_scene(scene: str, launches: dict[str, Launched]) -> None:
    given = arguments_of("rtmdet.loss", scene, -1)
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
    ground_truths = 150 * 4 * 60  # what belongs to a ground truth: boxes, centres, labels; nothing for each prior
    assert many - few < ground_truths


def _peak(scene: str) -> int:
    arguments = arguments_of("rtmdet.assign", scene)
    return int(count(lambda: rtmdet.assign(**arguments))[1].peak_live_bytes)


# ------------------------------------------------------------------------------------------------------ wrong variants
def _one_claim_too_few(best: Any, most: Any) -> Any:
    return BEFORE(best, most - 1)


def _dearest_of_all(contested: Any, winner: Any, lowest: Any, ground_truth: Any, cost: Any) -> Any:
    return CHEAPER(contested, winner, lowest, ground_truth, -cost)


def _as_far_everywhere(x: Any) -> Any:
    return POWER_OF_TEN(x * 0.0)


def _other_classes_are_free(costs: Any, channel: Any, others: Any, largest: Any, largest_class: Any) -> Any:
    return others, largest, largest_class


BEFORE, CHEAPER, POWER_OF_TEN = arithmetic.before, arithmetic.cheaper, arithmetic.power_of_ten


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [
        ("before", _one_claim_too_few, "many-claims-few-anchors"),
        ("cheaper", _dearest_of_all, "identical-other-class"),
        ("power_of_ten", _as_far_everywhere, "single"),
        ("apart", _other_classes_are_free, "best-for-a-third"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(rtmdet_kernels, name, wrong)
    assert wrong_cases("rtmdet.assign", EDGE[scene])


def _slope_of_the_entropy_alone(logit: Any, target: Any, beta: Any, square: Any) -> Any:
    loss, _ = FOCAL(logit, target, beta, square)
    entropy, away = arithmetic.bce_with_logits(logit, target)
    return loss, away * (away * away) + 0.0 * entropy


def _enclosure_is_a_constant(a: Any, b: Any, eps: Any) -> Any:
    giou, slopes = GIOU(a, b, eps)
    return giou, tuple(slope * (slope > 0.0) for slope in slopes)


FOCAL, GIOU = rtmdet_loss_kernels._focal, rtmdet_loss_kernels._giou


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong"), [("_focal", _slope_of_the_entropy_alone), ("_giou", _enclosure_is_a_constant)]
)
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(rtmdet_loss_kernels, name, wrong)
    assert wrong_cases("rtmdet.loss", EDGE["single"], settings=1)


# ------------------------------------------------------------------------------------------------------------- on a GPU
@on_gpu
@pytest.mark.parametrize("operation", MINE)
def test_a_gpu_is_right_on_all_edge_cases(operation: str) -> None:
    assert [wrong for scene in EDGE.values() for wrong in wrong_cases(operation, scene)] == []


@on_gpu
def test_a_gpu_holds_no_pairs() -> None:
    case = next(cases(RTMDET, OPERATIONS["rtmdet.assign"], EDGE["crowd-520"], device="cuda"))
    memory = []
    for call in (rtmdet.assign, batched.assign):
        call(**case.arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(**case.arguments)
        memory.append(torch.cuda.max_memory_allocated() - before)
    assert memory[0] < memory[1] / 10


@on_gpu
def test_a_gpu_is_never_waited_for() -> None:
    given = arguments_of("rtmdet.loss", "crowd")
    gradient(given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_gpu_repeats_to_the_last_bit() -> None:
    given = arguments_of("rtmdet.loss", "crowd-150")
    runs = [gradient(given) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@on_gpu
def test_a_graph_replays_it() -> None:
    given = arguments_of("rtmdet.loss", "crowd")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain = rtmdet.loss(**given)["total"]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rtmdet.loss(**given)["total"]
    graph.replay()
    assert torch.equal(captured, plain)
