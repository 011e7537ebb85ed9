from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import ssd as batched
from detoracle.implementations.registry import marked_in
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
from detoracle.implementations.triton import arithmetic, ssd, ssd_kernels, ssd_loss_kernels

# Interpreted kernels compute with NumPy, which warns of what floats do on a GPU without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a function that must be compiled")

SSD = system_of("ssd")
OPERATIONS = {operation.name: operation for operation in SSD.operations}
MINE: dict[str, Callable[..., Any]] = {one.operation: one.load() for one in marked_in(ssd)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGE = {scene.name: scene for scene in edge_cases()}
USUAL = {"ssd.match": ["threshold 0.5"], "ssd.hard_negatives": ["3:1"], "ssd.loss": ["threshold 0.5, 3:1"]}
MATCHED = [
    "empty-one",
    "empty-all",
    "identical-other-class",
    "outside-mixed",
    "zero-row-first",
    "degenerate-pair",
    "inverted-only",
    "symmetric",
    "equal-several",
    "no-overlap",
    "label-minus-one",
]
MINED = {
    "overlapping": ["3:1", "372:1", "logits far apart", "background labels"],
    "equal-one": ["3:1", "1:1"],
    "nan-class": ["3:1"],
    "inf-class": ["3:1"],
}
TRAINED = {
    "identical-other-class": ["logits far apart", "background labels"],
    "inverted-only": ["threshold 0.35, 1:1, other variances"],
    "degenerate-point": ["all negatives"],
    "nan-class": ["threshold 0.5, 3:1"],
    "nan-box": ["threshold 0.5, 3:1"],
    "empty-all": ["threshold 0.5, 3:1"],
}


@cache
def expected(operation: str, scene: Scene, dtype: torch.dtype) -> list[tuple[Case, Callable[[], Expectation]]]:
    found = cases(SSD, OPERATIONS[operation], scene, dtype=dtype, device=DEVICE)
    return [(case, cache(partial(expect, SSD, OPERATIONS[operation], case.arguments))) for case in found]


def wrong_cases(
    operation: str, scene: Scene, settings: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> list[str]:
    perform_ = partial(perform, OPERATIONS[operation], MINE[operation])
    judged = [(c, right) for c, right in expected(operation, scene, dtype) if settings is None or c.setting in settings]
    results = [judge_case(case, right(), perform_) for case, right in judged]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("name", MATCHED)
def test_matches_rightly(name: str) -> None:
    assert wrong_cases("ssd.match", EDGE[name]) == []


@pytest.mark.parametrize("name", MINED)
def test_mines_rightly(name: str) -> None:
    assert wrong_cases("ssd.hard_negatives", EDGE[name], MINED[name]) == []


@pytest.mark.parametrize("name", TRAINED)
def test_loss_is_right(name: str) -> None:
    assert wrong_cases("ssd.loss", EDGE[name], TRAINED[name]) == []


@pytest.mark.parametrize("operation", MINE)
def test_right_on_a_random_scene(operation: str) -> None:
    scene = list(random_scenes(5, seed=5))[4]
    assert int(scene.num_images) > 0
    assert wrong_cases(operation, scene, USUAL[operation]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", MINE)
def test_right_in_half_precision(operation: str, dtype: torch.dtype) -> None:
    settings = [*USUAL[operation], "logits far apart"] if operation != "ssd.loss" else USUAL[operation]
    assert wrong_cases(operation, EDGE["overlapping"], settings, dtype) == []


# ---------------------------------------------------------------------------------------------------- to the last prior
@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image has several, the last of which is not full."""
    monkeypatch.setattr(ssd, "_PRIORS", 16)
    monkeypatch.setattr(ssd, "_MATCHED", 16)


def random_rows(number: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(number, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
def test_matches_as_batched_does(threshold: float) -> None:
    corners, places = random_rows(6, 4).view(2, 3, 4) * 0.5, torch.arange(3, device=DEVICE)
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 0.1], dim=-1)
    boxes[1, 2] = boxes[1, 0]  # shares its best prior
    valid = torch.tensor([[True, False, True], [True] * 3], device=DEVICE)
    given = (random_rows(45, 4, 1) + 2**-10, boxes, places.expand(2, 3) - 1, valid)
    found, want = ssd.match(*given, threshold=threshold), batched.match(*given, threshold=threshold)
    assert torch.equal(found.gt_index, want.gt_index)
    assert torch.equal(found.quality, want.quality)
    assert torch.equal(found.extra["class_target"], want.extra["class_target"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("neg_pos", [0, 1, 3, 50])
def test_ranks_as_a_stable_sort_does(neg_pos: int) -> None:
    """Logits of one class beside the background: the other's exceeds it by what orders the losses."""
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(-2, 5, (3, 40), generator=generator).float()
    other[1] = 0
    other[2] += torch.rand(40, generator=generator)
    conf = torch.stack([torch.zeros_like(other), other], dim=-1).to(DEVICE)
    positive = torch.where(torch.rand(3, 40, generator=generator) < 0.2, 0, -1)
    positive[0] = -1
    given = (conf, positive.to(DEVICE), torch.zeros(3, 1, dtype=torch.int64, device=DEVICE))
    found, want = (module.hard_negatives(*given, neg_pos=neg_pos) for module in (ssd, batched))
    assert torch.equal(found.gt_index, want.gt_index)


@pytest.mark.parametrize(
    ("logits", "neg_pos", "hardest"),
    [
        ([[torch.nan, 0.0], [0.0, 9.0], [0.0, 5.0]], 1, [-1, 0, -2]),
        ([[-400.0, -400.0], [0.0, 50.0], [0.0, 0.0]], 1, [-2, 0, -1]),
        ([[-400.0, -400.0], [0.0, 200.0], [-400.0, -400.0]], 50, [-1, 0, -2]),
    ],
    ids=["NaN first", "underflow last", "positive before underflow, and at most all but one"],
)
def test_ranks_what_is_no_ordinary_number(logits: list[list[float]], neg_pos: int, hardest: list[int]) -> None:
    positive, label = torch.tensor([[-1, 0, -1]], device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    found = ssd.hard_negatives(torch.tensor([logits], device=DEVICE), positive, label, neg_pos=neg_pos)
    want = batched.hard_negatives(torch.tensor([logits], device=DEVICE), positive, label, neg_pos=neg_pos)
    assert found.gt_index.tolist() == want.gt_index.tolist()
    assert found.gt_index.tolist() == [hardest]


def loss_arguments(scene: str) -> dict[str, Any]:
    return dict(next(cases(SSD, OPERATIONS["ssd.loss"], EDGE[scene], device=DEVICE)).arguments)


def gradient(given: dict[str, Any], part: str = "total") -> tuple[Tensor, ...]:
    leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
    return torch.autograd.grad(ssd.loss(**given)[part], leaves)


@pytest.mark.parametrize("part", ["localisation", "classification"])
def test_each_part_has_its_own_gradient(part: str) -> None:
    found = gradient(loss_arguments("single"), part)
    assert [bool(to_input.any()) for to_input in found] == [part == "localisation", part == "classification"]


def test_a_gradient_is_there_again_and_cannot_be_differentiated() -> None:
    given = loss_arguments("single")
    leaves = [given[name].requires_grad_() for name in ("loc", "conf")]
    total = ssd.loss(**given)["total"]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(again[0].sum())


def test_batch_without_ground_truth_costs_nothing() -> None:
    given = loss_arguments("empty-single")
    assert float(ssd.loss(**given)["total"].detach()) == 0
    assert not any(to_input.any() for to_input in gradient(given))


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("operation", MINE)
def test_float64_is_refused(operation: str) -> None:
    case = next(cases(SSD, OPERATIONS[operation], EDGE["single"], dtype=torch.float64))
    with pytest.raises(InputError, match=rf"{operation}: .*: expected float32, bfloat16 or float16, got torch.float64"):
        MINE[operation](**case.arguments)


@pytest.mark.parametrize("operation", MINE)
def test_more_rows_than_can_be_addressed_are_refused(operation: str) -> None:
    given = dict(next(cases(SSD, OPERATIONS[operation], EDGE["single"], device=DEVICE)).arguments)
    if operation == "ssd.hard_negatives":
        many = {"gt_index": given["gt_index"][:, :1].expand(1, 2**29)}
    else:
        many = {name: given[name][:, :1] for name in ("gt_boxes", "gt_labels", "gt_valid")}
        many = {name: tensor.expand(1, 2**29, *tensor.shape[2:]) for name, tensor in many.items()}
    with pytest.raises(InputError, match=rf"{operation}: .*: expected at most 65535 images, and 536870911 rows"):
        MINE[operation](**{**given, **many})


@interpreted
def test_a_class_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RuntimeError, match="gt_labels: from -1 to 3"):
        ssd.loss(**loss_arguments("label-beyond"))


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
    kernels = {name: Launched() for name in ("best_priors", "match", "entropies", "mine", "sums", "gradients")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(ssd_kernels if hasattr(ssd_kernels, name) else ssd_loss_kernels, name, kernel)
    return kernels


@pytest.mark.parametrize("scene", ["single", "crowd"])
def test_the_host_never_waits_and_launches_as_much_for_any_scene(scene: str, launches: dict[str, Launched]) -> None:
    given = loss_arguments(scene)
    _, counters = count(lambda: gradient(given))
    assert counters.host_syncs == 0
    assert {name: len(kernel.grids) for name, kernel in launches.items()} == dict.fromkeys(launches, 1)
    assert launches["best_priors"].grids == [(given["gt_valid"].numel(),)]


@pytest.mark.usefixtures("launches")
def test_memory_does_not_grow_with_the_ground_truths() -> None:
    few, many = (_peak(scene) for scene in ("crowd", "crowd-150"))
    ground_truths = 150 * 4 * 40  # what belongs to a ground truth: boxes, labels, masks; nowhere near its priors
    assert many - few < ground_truths


def _peak(scene: str) -> int:
    arguments = next(cases(SSD, OPERATIONS["ssd.match"], EDGE[scene], device=DEVICE)).arguments
    return int(count(lambda: ssd.match(**arguments))[1].peak_live_bytes)


# ------------------------------------------------------------------------------------------------------- wrong variants
def _another_prior(keys: Any) -> Any:
    """Keys name the prior before or after."""
    value, index = KEY_VALUE(keys)
    return value, index ^ 1


def _half_shared(a: Any, b: Any) -> Any:
    """Overlaps are too small."""
    return SHARED_AREA(a, b) * 0.5


def _without_the_last_bits(terms: Any, highest: Any, lowest: Any, at: Any, there: Any) -> Any:
    """Losses that are nearly alike tie."""
    loss, order = RANKED(terms, highest, lowest, at, there)
    return loss, (order >> 16) << 16


def _never_underflows(terms: Any, highest: Any, _lowest: Any, at: Any, there: Any) -> Any:
    """A maximum of each row."""
    return RANKED(terms, highest, float("-inf"), at, there)


KEY_VALUE, SHARED_AREA, RANKED = arithmetic.key_value, arithmetic.shared_area, ssd_kernels._ranked


@interpreted
@pytest.mark.parametrize(
    ("operation", "name", "wrong", "setting"),
    [
        ("ssd.match", "key_value", _another_prior, "threshold 0.5"),
        ("ssd.match", "shared_area", _half_shared, "threshold 0.5"),
        ("ssd.hard_negatives", "_ranked", _without_the_last_bits, "3:1"),
        ("ssd.hard_negatives", "_ranked", _never_underflows, "logits far apart"),
    ],
)
def test_a_broken_kernel_is_judged_wrong(
    monkeypatch: pytest.MonkeyPatch, operation: str, name: str, wrong: Any, setting: str
) -> None:
    monkeypatch.setattr(ssd_kernels, name, wrong)
    assert wrong_cases(operation, EDGE["untrained"], [setting])


def _of_all(targets: Any, row: Any, there: Any) -> Any:
    """Every prior is trained."""
    label, positive, _ = TARGET(targets, row, there)
    return label, positive, there


def _farther(loc: Any, targets: Any, row: Any, positive: Any) -> Any:
    """Offsets are twice as far off."""
    at, distance = DISTANCES(loc, targets, row, positive)
    return at, distance * 2.0


TARGET, DISTANCES = ssd_loss_kernels._target, ssd_loss_kernels._distances


@interpreted
@pytest.mark.parametrize(("name", "wrong"), [("_target", _of_all), ("_distances", _farther)])
def test_a_broken_loss_is_judged_wrong(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(ssd_loss_kernels, name, wrong)
    assert wrong_cases("ssd.loss", EDGE["identical-other-class"], ["logits far apart"])


# ------------------------------------------------------------------------------------------------------------- on a GPU
@on_gpu
@pytest.mark.parametrize("operation", MINE)
def test_a_gpu_is_right_on_all_edge_cases(operation: str) -> None:
    scenes = (scene for name, scene in EDGE.items() if not name.startswith("label-"))
    assert [wrong for scene in scenes for wrong in wrong_cases(operation, scene)] == []


@on_gpu
def test_a_gpu_holds_no_pairs() -> None:
    case = next(cases(SSD, OPERATIONS["ssd.match"], EDGE["crowd-520"], device="cuda"))
    memory = []
    for call in (ssd.match, batched.match):
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
        plain = ssd.loss(**given)["total"]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ssd.loss(**given)["total"]
    graph.replay()
    assert torch.equal(captured, plain)
