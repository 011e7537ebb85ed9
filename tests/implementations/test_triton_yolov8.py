from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import yolov8 as batched
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference import yolov8 as oracle
from detoracle.reference.errors import InputError
from detoracle.reports.counters import count

pytest.importorskip("triton")
from detoracle.implementations.triton import arithmetic, yolov8, yolov8_boxes, yolov8_kernels, yolov8_loss_kernels

# Interpreted kernels compute with NumPy, which warns of what floats do on a GPU without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what stands for a compiled function must be one too"
)

YOLOV8 = system_of("yolov8")
OPERATIONS = {operation.name: operation for operation in YOLOV8.operations}
MINE: dict[str, Callable[..., Any]] = {"yolov8.assign": yolov8.assign, "yolov8.loss": yolov8.loss}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE = {scene.name: scene for scene in edge_cases()}
FEW = [
    "empty-one",
    "identical-other-class",
    "crowded-cell",
    "many-claims-few-anchors",
    "outside-mixed",
    "no-overlap",
    "degenerate-pair",
    "perfect-2",
    "four-anchors",
    "nan-box",
    "nan-class",
    "label-minus-one",
]


def wrong_cases(
    operation: str,
    scene: Scene,
    call: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.float32,
    settings: int | None = None,
) -> list[str]:
    """What is wrong under the default settings and others, or only the first of them."""
    found = list(cases(YOLOV8, OPERATIONS[operation], scene, dtype=dtype, device=DEVICE))[:settings]
    perform_ = partial(perform, OPERATIONS[operation], call or MINE[operation])
    results = [judge_case(case, expect(YOLOV8, OPERATIONS[operation], case.arguments), perform_) for case in found]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("name", FEW)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("yolov8.assign", EDGE[name]) == []


@pytest.mark.parametrize("name", ["empty-single", "degenerate-point", "perfect-2", "one-anchor"])
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("yolov8.loss", EDGE[name]) == []


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
    return dict(list(cases(YOLOV8, OPERATIONS[operation], EDGE[scene], device=DEVICE))[setting].arguments)


def test_points_in_another_order_are_assigned_alike() -> None:
    given = arguments_of("yolov8.assign", "identical-other-class")
    order = torch.randperm(len(given["anchor_points"]), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    other = given | {name: given[name][:, order] for name in ("scores", "boxes")}
    other["anchor_points"] = given["anchor_points"][order]
    assert torch.equal(yolov8.assign(**other).positive, yolov8.assign(**given).positive[:, order])


def far(given: dict[str, Any]) -> dict[str, Any]:
    """Most predictions overlap nothing: fewer do than a ground truth claims."""
    away = torch.arange(len(given["anchor_points"]), device=DEVICE) % 20 > 0
    return {**given, "boxes": given["boxes"] + 300 * away[:, None]}


@pytest.mark.parametrize("style", ["tied", "far", "spoilt"])
def test_assigns_as_the_oracle_does(style: str) -> None:
    """Where overlaps are 0, the first anchors of all are claimed; the oracle decides ties by index, as this does."""
    given = arguments_of("yolov8.assign", "whole-image" if style == "far" else "best-for-a-third")
    if style == "tied":
        given["scores"], given["boxes"] = torch.ones_like(given["scores"]), given["boxes"].round(decimals=-1)
    elif style == "far":
        given = far(given)
    else:
        given["boxes"][0, ::5] = torch.nan
    found, want = yolov8.assign(**given), oracle.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    torch.testing.assert_close(found.quality, want.quality, equal_nan=True)


@pytest.mark.parametrize("topk", [0, 40])
def test_any_top_k_claims_as_many(topk: int) -> None:
    given = far(arguments_of("yolov8.assign", "whole-image"))
    assert torch.equal(yolov8.assign(**given, topk=topk).gt_index, oracle.assign(**given, topk=topk).gt_index)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (7, 9)], ids=str)
def test_cells_are_walked_as_points_without_a_grid(size: tuple[int, int]) -> None:
    """Boxes of all kinds, far off and without a number too, on maps of all shapes."""
    draw = torch.Generator().manual_seed(sum(size))
    raw = [torch.randn(1, 4 * 16 + 3, *shape, generator=draw).to(DEVICE) for shape in (size, (2, 2))]
    corners = torch.rand(1, 12, 2, generator=draw) * 400 - 50
    gt_boxes = torch.cat([corners, corners + torch.rand(1, 12, 2, generator=draw) * 200 - 20], dim=-1)
    gt_boxes[0, 0], gt_boxes[0, 1, 0] = torch.tensor([-1e5, -1e5, 2e5, 2e5]), torch.nan
    labels = torch.zeros(1, 12, dtype=torch.int64, device=DEVICE)
    given: dict[str, Any] = {"raw": raw, "strides": [8, 16], "gt_boxes": gt_boxes.to(DEVICE), "gt_labels": labels}
    found, want = (call(**given, gt_valid=labels == 0) for call in (yolov8.loss, batched.loss))
    torch.testing.assert_close(found, want)


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("operation", MINE)
def test_float64_is_refused(operation: str) -> None:
    case = next(cases(YOLOV8, OPERATIONS[operation], EDGE["single"], dtype=torch.float64))
    with pytest.raises(InputError, match=rf"{operation}: .*: expected float32, bfloat16 or float16, got torch.float64"):
        MINE[operation](**case.arguments)


def test_more_ground_truths_than_can_be_addressed_are_refused() -> None:
    given = arguments_of("yolov8.assign", "single")
    many = {name: given[name][:, :1] for name in ("gt_boxes", "gt_labels", "gt_valid")}
    many = {name: tensor.expand(len(tensor), 2**29, *tensor.shape[2:]) for name, tensor in many.items()}
    with pytest.raises(InputError, match=r"gt_valid: expected at most 65535 images, and 536870911 rows"):
        yolov8.assign(**{**given, **many})


def test_a_top_k_that_no_program_holds_is_refused() -> None:
    given = arguments_of("yolov8.assign", "single")
    with pytest.raises(InputError, match=r"topk: expected 0 to 128, got 129"):
        yolov8.assign(**given, topk=129)


def test_exponents_that_make_pairs_outside_count_are_refused() -> None:
    given = arguments_of("yolov8.assign", "single")
    with pytest.raises(InputError, match=r"alpha and beta: expected exponents of 0 or more, not both 0, got al"):
        yolov8.assign(**given, alpha=0, beta=0)


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
    kernels = {name: Launched() for name in ("decode", "claim", "resolve", "scale", "sums", "gradients")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(yolov8_kernels if hasattr(yolov8_kernels, name) else yolov8_loss_kernels, name, kernel)
    return kernels


def gradient(given: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [level.requires_grad_() for level in given["raw"]]
    return torch.autograd.grad(yolov8.loss(**given)["total"], leaves)


@pytest.mark.parametrize("scene", ["single", "crowd"])
def test_the_host_never_waits_and_launches_as_much_for_any_scene(scene: str, launches: dict[str, Launched]) -> None:
    given = arguments_of("yolov8.loss", scene, -1)
    _, counters = count(lambda: gradient(given))
    assert counters.host_syncs == 0
    assert {name: len(kernel.grids) for name, kernel in launches.items()} == {
        "decode": 3,
        "claim": 1,
        "resolve": 1,
        "scale": 1,
        "sums": 3,
        "gradients": 3,
    }
    assert launches["claim"].grids == [(given["gt_valid"].numel(),)]


def test_memory_does_not_grow_with_the_ground_truths(launches: dict[str, Launched]) -> None:
    few, many = (_peak(scene) for scene in ("crowd", "crowd-150"))
    ground_truths = 150 * 4 * 60  # what belongs to a ground truth: boxes, labels, masks, bests; nothing for each anchor
    assert many - few < ground_truths


def _peak(scene: str) -> int:
    arguments = arguments_of("yolov8.assign", scene)
    return int(count(lambda: yolov8.assign(**arguments))[1].peak_live_bytes)


# ------------------------------------------------------------------------------------------------------ wrong variants
def _one_claim_too_few(best: Any, most: Any) -> Any:
    return BEFORE(best, most - 1)


def _first_of_all(contested: Any, winner: Any, lowest: Any, ground_truth: Any, cost: Any) -> Any:
    return CHEAPER(contested, winner, lowest, ground_truth, cost * 0.0)


def _no_zero_is_claimed(batch: Any, foremost: Any, left: Any, gt: Any, image: Any, lanes: Any) -> Any:
    return ZEROS(batch, foremost, left * 0, gt, image, lanes)


def _edges_count(x: Any, y: Any, box: Any) -> Any:
    return (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])


def _without_the_shape(a: Any, b: Any) -> Any:
    iou, _, squares, _ = yolov8_boxes._parts(a, b)
    return iou - squares[0] / squares[1]


BEFORE, CHEAPER, ZEROS = arithmetic.before, arithmetic.cheaper, yolov8_kernels._zeros


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [
        ("before", _one_claim_too_few, "single"),
        ("cheaper", _first_of_all, "best-for-a-third"),
        ("inside", _edges_count, "edge-through-centres"),
        ("ciou", _without_the_shape, "nearly-equal"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(yolov8_kernels, name, wrong)
    assert wrong_cases("yolov8.assign", EDGE[scene])


@interpreted
def test_zeros_that_nobody_claims_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolov8_kernels, "_zeros", _no_zero_is_claimed)
    given = far(arguments_of("yolov8.assign", "whole-image"))
    assert not torch.equal(yolov8.assign(**given).gt_index, oracle.assign(**given).gt_index)


def _one_side_too_steep(a: Any, b: Any) -> Any:
    overlap, (left, top, right, bottom) = SLOPES(a, b)
    return overlap, (left, top * 1.01, right, bottom)


def _no_bin_is_wanted(logits: Any, log_sum: Any, wanted: Any, reg_max: Any, bins: Any) -> Any:
    loss, weights = DFL(logits, log_sum, wanted, reg_max, bins)
    return loss, weights * 0.0


def _as_background(logit: Any, target: Any) -> Any:
    loss, derivative = BCE(logit, target)
    return loss, derivative + target


SLOPES, DFL, BCE = yolov8_boxes.ciou_slopes, yolov8_loss_kernels._dfl, arithmetic.bce_with_logits


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("ciou_slopes", _one_side_too_steep), ("_dfl", _no_bin_is_wanted), ("bce_with_logits", _as_background)],
)
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(yolov8_loss_kernels, name, wrong)
    assert wrong_cases("yolov8.loss", EDGE["single"], settings=1)


# ------------------------------------------------------------------------------------------------------------- on a GPU
@on_gpu
@pytest.mark.parametrize("operation", MINE)
def test_a_gpu_is_right_on_all_edge_cases(operation: str) -> None:
    assert [wrong for scene in EDGE.values() for wrong in wrong_cases(operation, scene)] == []


@on_gpu
def test_a_gpu_holds_no_pairs() -> None:
    case = next(cases(YOLOV8, OPERATIONS["yolov8.assign"], EDGE["crowd-520"], device="cuda"))
    memory = []
    for call in (yolov8.assign, batched.assign):
        call(**case.arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(**case.arguments)
        memory.append(torch.cuda.max_memory_allocated() - before)
    assert memory[0] < memory[1] / 10


@on_gpu
def test_a_gpu_is_never_waited_for() -> None:
    given = arguments_of("yolov8.loss", "crowd")
    gradient(given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_gpu_repeats_to_the_last_bit() -> None:
    given = arguments_of("yolov8.loss", "crowd-150")
    runs = [gradient(given) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@on_gpu
def test_a_graph_replays_it() -> None:
    given = arguments_of("yolov8.loss", "crowd")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain = yolov8.loss(**given)["total"]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = yolov8.loss(**given)["total"]
    graph.replay()
    assert torch.equal(captured, plain)
