from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import anchor_head as batched
from detoracle.implementations.registry import marked_in
from detoracle.properties.anchor_head import HEADS
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
from detoracle.implementations.triton import anchor_head, anchor_head_kernels, anchor_head_loss_kernels, arithmetic

# Interpreted kernels compute with NumPy, which warns of what floats do on a GPU without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a function that must be compiled")

SYSTEM = system_of("anchor_head")
OPERATIONS = {operation.name: operation for operation in SYSTEM.operations}
MINE: dict[str, Callable[..., Any]] = {one.operation: one.load() for one in marked_in(anchor_head)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE = {scene.name: scene for scene in edge_cases()}
FOCAL = [name for name, head in HEADS.items() if head["class_loss"] == "focal"]
ASSIGNED = [
    "empty-all",
    "identical-other-class",
    "outside-mixed",
    "zero-row-first",
    "degenerate-pair",
    "inverted-only",
    "symmetric",
    "tiny-and-huge",
    "four-anchors",
    "one-anchor",
]


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype) -> list[tuple[Case, Callable[[], Expectation]]]:
    found = cases(SYSTEM, OPERATIONS[operation], scene, dtype=dtype, device=DEVICE)
    return [(case, cache(partial(expect, SYSTEM, OPERATIONS[operation], case.arguments))) for case in found]


def wrong_cases(
    operation: str, scene: Scene, settings: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], MINE[operation])
    judged = [(c, right) for c, right in expected(operation, scene, dtype) if settings is None or c.setting in settings]
    results = [judge_case(case, right(), perform_) for case, right in judged]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("name", ASSIGNED)
def test_assigns_rightly(name: str) -> None:
    assert wrong_cases("anchor_head.assign", EDGE[name]) == []


@pytest.mark.parametrize("head", FOCAL)
@pytest.mark.parametrize("name", ["one-anchor", "four-anchors"])
def test_loss_is_right(name: str, head: str) -> None:
    assert wrong_cases("anchor_head.loss", EDGE[name], [head]) == []


def test_assigns_rightly_on_a_random_scene() -> None:
    scene = list(random_scenes(5, seed=5))[4]
    assert int(scene.num_images) > 0
    assert wrong_cases("anchor_head.assign", scene, ["retina", "ignored regions"]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", MINE)
def test_right_in_half_precision(operation: str, dtype: torch.dtype) -> None:
    assert wrong_cases(operation, EDGE["four-anchors"], ["retina"], dtype) == []


# --------------------------------------------------------------------------------------------------- to the last anchor
RULES: dict[str, dict[str, Any]] = {
    "published": {},
    "first anchor": {"gt_max_assign_all": False},
    "zeros claimed": {"min_pos_iou": -0.5},
    "high": {"pos_iou_thr": 0.7, "neg_iou_thr": (0.1, 0.3), "min_pos_iou": 0.3},
    "thresholds": {"match_low_quality": False},
}


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_assigns_as_batched_does(rules: str, partly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image has several blocks, the last of which is not full."""
    monkeypatch.setattr(anchor_head, "_ANCHORS", 256)
    given = dict(next(cases(SYSTEM, OPERATIONS["anchor_head.assign"], EDGE["ragged-full"], device=DEVICE)).arguments)
    given |= RULES[rules]
    given["anchors"], given["inside"] = given["anchors"][:700], given["inside"][:, :700]
    given["gt_boxes"] = given["gt_boxes"].clone()
    given["gt_boxes"][1, 2] += 1000  # overlaps nothing
    if partly:
        given["inside"] = given["inside"] & (torch.arange(700, device=DEVICE) % 5 > 0)
        regions = {"ignore_boxes": given["gt_boxes"][:, :2], "ignore_valid": given["gt_valid"][:, :2]}
        given |= {**regions, "ignore_iof_thr": 0.5, "ignore_wrt_candidates": rules != "high"}
    found, want = anchor_head.assign(**given), batched.assign(**given)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)


def loss_arguments(scene: str, **settings: Any) -> dict[str, Any]:
    [given, *_] = cases(SYSTEM, OPERATIONS["anchor_head.loss"], EDGE[scene], device=DEVICE)
    return {**given.arguments, **settings}


def gradients_of(call: Callable[..., Any], given: dict[str, Any], part: str = "total") -> tuple[Tensor, ...]:
    leaves = {name: [level.detach().requires_grad_() for level in given[name]] for name in ("cls_scores", "bbox_preds")}
    wanted = call(**{**given, **leaves})[part]
    scale = torch.arange(1, wanted.numel() + 1, device=wanted.device)
    inputs = [*leaves["cls_scores"], *leaves["bbox_preds"]]
    return torch.autograd.grad((wanted * scale).sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("finite", [False, True])
def test_every_box_loss_is_that_of_batched(box_loss: str, decoded: bool, finite: bool) -> None:
    """A number that is not finite is NaN in the loss wherever it stands, but not in each gradient."""
    coder = {"means": (0.0, 0.1, -0.1, 0.2), "stds": (0.1, 0.1, 0.2, 0.2), "beta": 1 / 9, "reg_decoded_bbox": decoded}
    given = loss_arguments("four-anchors", box_loss=box_loss, **coder, gamma=1.5, alpha=0.4, pos_weight=2.0)
    if not finite:
        given["bbox_preds"] = [level.clone() for level in given["bbox_preds"]]
        given["bbox_preds"][0][0, :2, 0, 0] = torch.tensor([torch.nan, torch.inf])
    found, want = (call(**given) for call in (anchor_head.loss, batched.loss))
    torch.testing.assert_close(found, want, equal_nan=True)
    torch.testing.assert_close(
        *(gradients_of(call, given) for call in (anchor_head.loss, batched.loss)), equal_nan=True, check_dtype=True
    )


@pytest.mark.parametrize("part", ["classification", "box"])
def test_every_part_of_every_level_trains(part: str) -> None:
    given = loss_arguments("single", class_loss_weight=0.5, box_loss_weight=3.0)
    torch.testing.assert_close(*(gradients_of(call, given, part) for call in (anchor_head.loss, batched.loss)))


@pytest.mark.parametrize("name", [name for name in HEADS if name not in FOCAL])
def test_heads_of_other_class_losses_are_left_to_batched(name: str) -> None:
    found = cases(SYSTEM, OPERATIONS["anchor_head.loss"], EDGE["single"], device=DEVICE)
    [given] = [case.arguments for case in found if case.setting == name]
    torch.testing.assert_close(anchor_head.loss(**given), batched.loss(**given))


def test_a_gradient_is_there_again_and_cannot_be_differentiated() -> None:
    given = loss_arguments("one-anchor")
    leaves = [level.requires_grad_() for level in given["cls_scores"]]
    total = anchor_head.loss(**given)["total"] * torch.ones((), device=DEVICE, requires_grad=True)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(again[0].sum())


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("operation", MINE)
def test_float64_is_refused(operation: str) -> None:
    case = next(cases(SYSTEM, OPERATIONS[operation], EDGE["single"], dtype=torch.float64))
    with pytest.raises(InputError, match=rf"{operation}: .*: expected float32, bfloat16 or float16, got torch.float64"):
        MINE[operation](**case.arguments)


def test_more_rows_than_can_be_addressed_are_refused() -> None:
    given = dict(next(cases(SYSTEM, OPERATIONS["anchor_head.assign"], EDGE["single"], device=DEVICE)).arguments)
    many = {name: given[name][:, :1] for name in ("gt_boxes", "gt_valid")}
    many = {name: tensor.expand(1, 2**29, *tensor.shape[2:]) for name, tensor in many.items()}
    with pytest.raises(InputError, match=r"gt_boxes: expected at most 65535 images, and 536870911 rows in all"):
        anchor_head.assign(**{**given, **many})


# ------------------------------------------------------------------------------------------------------------- the host
class Launched:
    """Stands for a kernel; remembers its launches, and does nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_arguments, **_settings: None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launched]:
    kernels = {name: Launched() for name in ("best_anchors", "assign", "sums", "gradients")}
    for name, kernel in kernels.items():
        module = anchor_head_kernels if hasattr(anchor_head_kernels, name) else anchor_head_loss_kernels
        monkeypatch.setattr(module, name, kernel)
    return kernels


@pytest.mark.parametrize("scene", ["single", "crowd"])
def test_the_host_never_waits_and_launches_as_much_for_any_scene(scene: str, launches: dict[str, Launched]) -> None:
    given = loss_arguments(scene)
    _, counters = count(lambda: gradients_of(anchor_head.loss, given))
    assert counters.host_syncs == 0
    assert {name: len(kernel.grids) for name, kernel in launches.items()} == {
        "best_anchors": 1,
        "assign": 1,
        "sums": 3,
        "gradients": 3,
    }
    assert launches["assign"].grids == launches["best_anchors"].grids


@pytest.mark.usefixtures("launches")
def test_memory_does_not_grow_with_the_ground_truths() -> None:
    few, many = (_peak(scene) for scene in ("crowd", "crowd-150"))
    ground_truths = 150 * 4 * 40  # what belongs to a ground truth: boxes, masks, keys; nowhere near its anchors
    assert many - few < ground_truths


def _peak(scene: str) -> int:
    arguments = next(cases(SYSTEM, OPERATIONS["anchor_head.assign"], EDGE[scene], device=DEVICE)).arguments
    return int(count(lambda: anchor_head.assign(**arguments))[1].peak_live_bytes)


# ------------------------------------------------------------------------------------------------------- wrong variants
def _larger_overlap(keys: Any) -> Any:
    """No anchor has the overlap that a ground truth's best one is said to have."""
    value, index = KEY_VALUE(keys)
    return value * 2.0, index


def _smaller_overlaps(a: Any, b: Any, least: Any) -> Any:
    """Overlaps of boxes that share less."""
    return OVERLAP(a, b, least) * 0.75


KEY_VALUE, OVERLAP = arithmetic.key_value, arithmetic.overlap_mmdet


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "scene"),
    [("key_value", _larger_overlap, "tiny-and-huge"), ("overlap_mmdet", _smaller_overlaps, "identical-other-class")],
)
def test_a_broken_kernel_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, scene: str) -> None:
    monkeypatch.setattr(anchor_head_kernels, name, wrong)
    assert wrong_cases("anchor_head.assign", EDGE[scene], ["retina"])


def _half_a_slope(logit: Any, present: Any, settings: Any, square: Any) -> Any:
    """Half of the slope is missing."""
    loss, slope = FOCAL_TERM(logit, present, settings, square)
    return loss, slope * 0.5


def _sides_fixed(slope: Any, by_delta: Any) -> Any:
    """Sides do not depend on deltas."""
    return THROUGH(slope, by_delta * 0.0)


FOCAL_TERM, THROUGH = anchor_head_loss_kernels._focal, anchor_head_loss_kernels._through


@interpreted
@pytest.mark.parametrize(
    ("name", "wrong", "head"), [("_focal", _half_a_slope, "retina"), ("_through", _sides_fixed, "giou")]
)
def test_a_broken_gradient_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, head: str) -> None:
    monkeypatch.setattr(anchor_head_loss_kernels, name, wrong)
    assert wrong_cases("anchor_head.loss", EDGE["one-anchor"], [head])


# ------------------------------------------------------------------------------------------------------------- on a GPU
@on_gpu
@pytest.mark.parametrize("operation", MINE)
def test_a_gpu_is_right_on_all_edge_cases(operation: str) -> None:
    settings = FOCAL if operation == "anchor_head.loss" else None
    assert [wrong for scene in EDGE.values() for wrong in wrong_cases(operation, scene, settings)] == []


@on_gpu
def test_a_gpu_holds_no_pairs() -> None:
    case = next(cases(SYSTEM, OPERATIONS["anchor_head.assign"], EDGE["crowd-520"], device="cuda"))
    memory = []
    for call in (anchor_head.assign, batched.assign):
        call(**case.arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(**case.arguments)
        memory.append(torch.cuda.max_memory_allocated() - before)
    assert memory[0] < memory[1] / 10


@on_gpu
def test_a_gpu_is_never_waited_for() -> None:
    given = loss_arguments("crowd")
    gradients_of(anchor_head.loss, given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients_of(anchor_head.loss, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_gpu_repeats_to_the_last_bit() -> None:
    given = loss_arguments("crowd-150")
    runs = [gradients_of(anchor_head.loss, given) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@on_gpu
def test_a_graph_replays_it() -> None:
    given = loss_arguments("crowd")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain = anchor_head.loss(**given)["total"]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = anchor_head.loss(**given)["total"]
    graph.replay()
    assert torch.equal(captured, plain)
