from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.implementations.batched import rtmdet as batched
from detoracle.implementations.batched import rtmdet_loss as batched_loss
from detoracle.implementations.loop import rtmdet as loop
from detoracle.implementations.loop import rtmdet_loss as loop_loss
from detoracle.implementations.registry import marked_in
from detoracle.properties.bounds import VALUE_FACTOR, outside
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference.contract import Operation
from detoracle.reference.explain.rtmdet import explain_loss, levels_given, loss_given
from detoracle.reports.counters import count

RTMDET = system_of("rtmdet")
OPERATIONS = {operation.name: operation for operation in RTMDET.operations}
KINDS = {
    kind: {one.operation: one.load() for module in modules for one in marked_in(module)}
    for kind, modules in {"batched": (batched, batched_loss), "loop": (loop, loop_loss)}.items()
}
EDGE = {scene.name: scene for scene in edge_cases()}
CHOSEN = [
    "ragged-full",
    "empty-first",
    "empty-all",
    "crowd",
    "identical-same-class",
    "best-for-a-third",
    "outside-far",
    "outside-mixed",
    "degenerate-point",
    "inverted-width",
    "edge-through-corners",
    "perfect-3",
    "no-overlap",
    "many-classes-overconfident",
    "extreme-boxes-50",
    "extreme-logits-200",
    "nan-box",
    "nan-class",
    "inf-class",
    "label-minus-one",
]
SCENES = [*(EDGE[name] for name in CHOSEN), *random_scenes(4, seed=3)]
LOSS = OPERATIONS["rtmdet.loss"]


def verdict_on(operation: Operation, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return expect(RTMDET, operation, arguments).judge(perform(operation, call, arguments))


def wrong_cases(
    operation: Operation, scene: Scene, call: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    results = [
        judge_case(case, expect(RTMDET, operation, case.arguments), partial(perform, operation, call))
        for case in cases(RTMDET, operation, scene, dtype=dtype)
    ]
    return [f"{result.case.name}: {result.verdict.findings}" for result in results if result.verdict.wrong]


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_is_implemented(kind: str) -> None:
    assert KINDS[kind].keys() == OPERATIONS.keys()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_right(kind: str, operation: Operation) -> None:
    call = KINDS[kind][operation.name]
    assert [wrong for scene in SCENES for wrong in wrong_cases(operation, scene, call)] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_right_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    for operation in RTMDET.operations:
        assert wrong_cases(operation, EDGE["ragged-full"], KINDS[kind][operation.name], dtype) == []


# --------------------------------------------------------------------------------------- arguments of users, not scenes
def native(scene: str) -> dict[str, Any]:
    return dict(RTMDET.native(EDGE[scene]))


def masks(scene: str) -> Tensor:
    """Instance masks whose centres of mass are far from the boxes' centres."""
    shape = (*native(scene)["gt_valid"].shape, *EDGE[scene].image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.7


SIZES = torch.tensor([[64, 40], [20, 64], [31, 33]])
SETTINGS: dict[str, dict[str, Any]] = {
    "masks": {"gt_masks": masks("ragged-full")},
    "padded": {"pad_shapes": SIZES},
    "border": {"pad_shapes": SIZES, "image_shapes": SIZES - 3, "allowed_border": 0},
    "weights": {"pos_weight": 2.0, "beta": 1.5, "class_loss_weight": 0.5, "box_loss_weight": 3.0, "giou_eps": 1e-3},
    "centres": {"offset": 0.5, "iou_weight": 1.0},
    "one claim": {"topk": 1},
    "all IoUs": {"topk": 99},
    "ignored": {"ignored_boxes": torch.zeros(3, 1, 4)},
    "pairs": {"strides": [(8, 8), (16, 16), (32, 32)]},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_takes_all_settings(kind: str, setting: str) -> None:
    arguments = {**native("ragged-full"), **SETTINGS[setting]}
    assert verdict_on(LOSS, KINDS[kind]["rtmdet.loss"], arguments).status == "equal"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_come_first(kind: str) -> None:
    given = native("outside-batch")  # all costs of the second image's only ground truth are infinite
    padded = {name: torch.cat([value, value], dim=1) for name, value in given.items() if name.startswith("gt_")}
    padded["gt_valid"][:, : given["gt_valid"].shape[1]] = False
    assert verdict_on(LOSS, KINDS[kind]["rtmdet.loss"], {**given, **padded}).status == "equal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_half_maps_under_autocast(kind: str, dtype: torch.dtype) -> None:
    given = native("ragged-full")
    halved = {name: [level.to(dtype) for level in given[name]] for name in ("class_logits", "distances")}
    with torch.autocast("cpu", dtype):
        assert not verdict_on(LOSS, KINDS[kind]["rtmdet.loss"], {**given, **halved}).wrong


ROWS = torch.Generator().manual_seed(0)
CORNER = torch.rand(9, 2, generator=ROWS) * 20
BOXES = torch.cat([CORNER, CORNER + torch.rand(9, 2, generator=ROWS) * 20 - 2], dim=1)
LOGITS, QUALITIES = torch.randn(9, 4, generator=ROWS) * 6, torch.rand(9, 4, generator=ROWS)
TERMS: list[tuple[str, dict[str, Any]]] = [
    ("rtmdet.qfl", {"predicted": LOGITS, "quality": QUALITIES}),
    ("rtmdet.qfl", {"predicted": LOGITS, "quality": QUALITIES, "weight": QUALITIES[:, 0], "reduction": "none"}),
    ("rtmdet.qfl", {"predicted": LOGITS, "quality": QUALITIES[:, 1], "labels": torch.arange(-2, 7)}),
    ("rtmdet.qfl", {"predicted": LOGITS.sigmoid() / 2, "quality": QUALITIES, "activated": True, "loss_weight": 2.0}),
    *(
        ("rtmdet.giou_loss", {"predicted": BOXES, "target": BOXES.flip(0), "weight": weight, "average_factor": 3.0})
        for weight in (QUALITIES, QUALITIES[:, 0], -QUALITIES, -QUALITIES[:, 0], None)
    ),
    ("rtmdet.decode", {"points": CORNER, "distances": BOXES, "max_shape": (12, 16)}),
    ("rtmdet.priors", {"sizes": [(3, 5), (2, 2)], "strides": [(8, 4), 16]}),
]


@pytest.mark.parametrize(("operation", "arguments"), TERMS)
@pytest.mark.parametrize("kind", KINDS)
def test_terms_take_all_settings(kind: str, operation: str, arguments: dict[str, Any]) -> None:
    assert verdict_on(OPERATIONS[operation], KINDS[kind][operation], arguments).status == "equal"


# ------------------------------------------------------------------------------------------------- numbers that spoil
def one_box() -> dict[str, Any]:
    """One ground truth, about a prior of the finer of two levels, and about none of the coarser."""
    return {
        "class_logits": [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)],
        "distances": [torch.full((1, 4, 4, 4), 6.0), torch.full((1, 4, 2, 2), 6.0)],
        "strides": [8, 16],
        "gt_boxes": torch.tensor([[[2.0, 2, 14, 14]]]),
        "gt_labels": torch.ones(1, 1, dtype=torch.int64),
        "gt_valid": torch.ones(1, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    "cells",
    [
        {(1, 1, 1): torch.inf},  # in a level without positives, whose loss is NaN then
        {(0, 3, 3): torch.inf},  # beside the positive
        {(0, 3, 3): torch.inf, (0, 1, 1): -1.0},  # beside a positive without overlap
        {(0, 1, 1): 1e25},  # at the positive, whose area overflows
        {(0, 1, 1): torch.nan},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_predictions_spoil_no_more_than_the_oracles(kind: str, cells: dict[tuple[int, int, int], float]) -> None:
    given = one_box()
    for (level, row, column), distance in cells.items():
        given["distances"][level][0, :, row, column] = distance
    assert verdict_on(LOSS, KINDS[kind]["rtmdet.loss"], given).status == "equal"


@pytest.mark.parametrize("kind", KINDS)
def test_huge_boxes_without_weight_have_no_gradient(kind: str) -> None:
    arguments = {"predicted": torch.full((1, 4), 1e25).cumsum(1), "target": BOXES[:1], "weight": torch.zeros(1)}
    operation = OPERATIONS["rtmdet.giou_loss"]
    assert verdict_on(operation, KINDS[kind]["rtmdet.giou_loss"], arguments).status == "equal"


@pytest.mark.parametrize("kind", KINDS)
def test_a_ground_truth_may_claim_thirteen_priors(kind: str) -> None:
    given = one_box() | {"gt_boxes": torch.tensor([[[-4.0, -4, 36, 36]]])}
    points = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1) * 8.0
    distances = torch.cat([points + 4, 36 - points], dim=1).T.reshape(1, 4, 4, 4)
    call = KINDS[kind]["rtmdet.loss"]
    assert verdict_on(LOSS, call, given | {"distances": [distances, given["distances"][1]]}).status == "equal"
    assert int(explain_loss(**given | {"distances": [distances, given["distances"][1]]}).gt_index.ge(0).sum()) == 13


INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("costs", "ious", "expected"),
    [
        # candidates are dear, unknown, cheap and, last, no candidate: k is 1, 2, 3
        ([[INF, NAN, 1, INF]], [[0.5, 0.5, 0.5, 0]], [-1, -1, 0, -1]),
        ([[INF, NAN, 1, INF]], [[0.7, 0.7, 0.7, 9]], [0, -1, 0, -1]),
        ([[INF, NAN, 1, 0]], [[1, 1, 1, NAN]], [0, 0, 0, -1]),
        # several claim one: who is unknown gets it, or else the cheapest, or else the first
        ([[INF, NAN, NAN, INF], [INF, NAN, NAN, 0]], [[0.9, 0, 0, 0], [0.9, 0, 0, 0]], [0, -1, -1, -1]),
        ([[INF, INF, 1, INF], [INF, 2, 3, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]], [0, 1, 0, -1]),
        ([[5, 6, 7, INF], [NAN, 8, 9, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]], [1, 1, 1, -1]),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_costs_that_are_no_numbers(
    kind: str, costs: list[list[float]], ious: list[list[float]], expected: list[int], first: int
) -> None:
    cost, iou = (F.pad(torch.tensor([rows]).float(), (0, 0, first, 0)) for rows in (costs, ious))
    valid = torch.arange(cost.shape[1])[None] >= first
    candidate = torch.tensor([[True, True, True, False]])
    gt_index, _ = KINDS[kind]["rtmdet.dynamic_k_matching"](cost, iou, candidate, valid)
    assert gt_index[0].tolist() == [index + first if index >= 0 else index for index in expected]


# --------------------------------------------------------------------------------------------------- no oracle's answer
def test_batched_ground_truth_without_a_class_takes_no_part() -> None:
    given = native("label-beyond")
    without = {**given, "gt_valid": given["gt_labels"] < EDGE["label-beyond"].num_classes}
    assert bool((without["gt_valid"] != given["gt_valid"]).any())
    found, expected = batched_loss.loss(**given), batched_loss.loss(**without)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_image_without_a_valid_prior_trains_nothing(kind: str) -> None:
    given = native("ragged-full")
    call, ignoring = KINDS[kind]["rtmdet.loss"], {**given, "pad_shapes": torch.tensor([[64, 64], [0, 0], [64, 64]])}
    leaves = [level.requires_grad_() for name in ("class_logits", "distances") for level in given[name]]
    gradients = torch.autograd.grad(call(**ignoring)["total"], leaves)
    trained = torch.stack([gradient.flatten(1).any(1) for gradient in gradients]).any(0)
    assert trained.tolist() == [True, False, True]


# ------------------------------------------------------------------------------------------------------------ processes
def test_average_factor_is_a_mean_over_processes(tmp_path: Path) -> None:
    full = native("overlapping")
    batches = [full, {**full, "gt_valid": torch.zeros_like(full["gt_valid"])}]
    script, processes = Path(__file__).with_name("rtmdet_rank.py"), []
    for rank, batch in enumerate(batches):
        torch.save(batch, tmp_path / f"given{rank}.pt")
        files = (tmp_path / name for name in (f"given{rank}.pt", f"found{rank}.pt"))
        command = [sys.executable, script, tmp_path / "rendezvous", rank, len(batches), *files]
        processes.append(subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(batches), errors

    gt_indices = [explain_loss(**batch).gt_index for batch in batches]
    mean = sum(float(level.class_part.value) for level in levels_given(gt_indices[0], **full)) / 2
    assert mean > 1
    for rank, (batch, gt_index) in enumerate(zip(batches, gt_indices, strict=True)):
        expected = loss_given(gt_index, **batch, average_factors=(mean, mean))
        for parts in torch.load(tmp_path / f"found{rank}.pt").values():
            for name, part in expected.items():
                assert not outside(parts[name], part.value, VALUE_FACTOR * part.error).any()


# ----------------------------------------------------------------------------------------------------------------- cost
def calls(scene: str, operation: Operation) -> list[Callable[[], Any]]:
    call = KINDS["batched"][operation.name]
    return [partial(call, **case.arguments) for case in cases(RTMDET, operation, EDGE[scene])]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("scene", ["crowd", "empty-all"])
def test_batched_never_waits_for_the_device(scene: str, operation: Operation) -> None:
    assert [count(call)[1].host_syncs for call in calls(scene, operation)] == [0] * len(calls(scene, operation))


def test_batched_loss_never_waits_with_all_arguments_nor_backward() -> None:
    given = {**native("ragged-full"), **SETTINGS["masks"], **SETTINGS["border"]}
    leaves = [level.requires_grad_() for name in ("class_logits", "distances") for level in given[name]]
    _, counters = count(lambda: torch.autograd.grad(batched_loss.loss(**given)["total"], leaves))
    assert counters.host_syncs == 0


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_batched_is_one_graph(operation: Operation) -> None:
    compiled = torch.compile(KINDS["batched"][operation.name], fullgraph=True, backend="eager")
    assert wrong_cases(operation, EDGE["ragged-full"], compiled) == []
    torch.compiler.reset()


def test_batched_has_no_tensor_of_all_pairs_and_classes() -> None:
    given = native("many-classes-overconfident")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        batched_loss.loss(**given)
    shapes = [shape for event in profile.events() for shape in event.input_shapes]
    (_, ground_truths), classes = given["gt_valid"].shape, given["class_logits"][0].shape[1]
    priors = sum(level[0, 0].numel() for level in given["class_logits"])
    assert any(classes in shape and priors in shape for shape in shapes)
    assert not any({ground_truths, classes, priors} <= set(shape) for shape in shapes)


# ------------------------------------------------------------------------------------------------------- wrong variants
def or_on_edge(priors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> Tensor:
    """A prior on the edge counts as inside."""
    wider = gt_boxes + gt_boxes.new_tensor([-1, -1, 1, 1]) / 1024
    return batched.candidates(priors, inside, wider, gt_valid)


def own_class_cost(logits: Tensor, gt_labels: Tensor, iou: Tensor) -> Tensor:
    """The class cost of the ground truth's own class only, as in a published batched port."""
    own = logits.gather(1, gt_labels.clamp(min=0)[..., None].expand_as(iou))
    entropy = F.binary_cross_entropy_with_logits(own, iou.clone(), reduction="none")
    return entropy * (iou - own.sigmoid()) ** 2


def cheapest_claimant(cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor, topk: int = 13) -> Any:
    """A contested prior goes to the cheapest of those that claim it."""
    claimed = torch.stack(
        [
            batched.dynamic_k_matching(
                cost, iou, candidate, gt_valid & (torch.arange(gt_valid.shape[1]) == g), topk=topk
            )[0]
            == g
            for g in range(gt_valid.shape[1])
        ],
        dim=1,
    )
    return cost.masked_fill(~claimed, torch.inf).argmin(1).where(claimed.any(1), -1)


def of_all_priors(cost: Tensor, iou: Tensor, candidate: Tensor, gt_valid: Tensor, topk: int = 13) -> Any:
    """Dynamic k from the mean over all top-k, where it is the sum."""
    return batched.dynamic_k_matching(cost, iou / topk, candidate, gt_valid, topk=topk)


def background_is_zero(**given: Any) -> Any:
    """Background has label 0."""
    labels, *others = batched_loss.targets(**given)
    return labels.where(labels < given["num_classes"], 0), *others


def modulation_is_constant(predicted: Tensor, quality: Tensor, labels: Tensor, **given: Any) -> Tensor:
    """The right loss, whose gradient does not flow through the distance from the quality."""
    right = batched_loss.qfl(predicted.detach(), quality, labels, **given)
    target = F.one_hot(labels, predicted.shape[1] + 1)[:, :-1] * quality[:, None]
    entropy = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
    part = (entropy * (target - predicted.detach().sigmoid()).abs() ** given.get("beta", 2.0)).sum()
    changed: Tensor = right + part - part.detach()
    return changed


def never_nothing(**given: Any) -> Tensor:
    """Boxes are not returned in place of the loss where no weight is above 0: here, the loss starts at its weight."""
    weight = given.pop("weight", None)
    return batched_loss.giou_loss(**given, weight=None if weight is None else weight + 1 / 1024)


def each_level_by_itself(**given: Any) -> Any:
    """Each level is averaged over its own positives."""
    levels = [
        batched_loss.loss(**{**given, **{name: [given[name][i]] for name in ("class_logits", "distances", "strides")}})
        for i in range(len(given["strides"]))
    ]
    parts = {name: torch.cat([level[name] for level in levels]) for name in ("classification", "box")}
    return {"total": parts["classification"].sum() + parts["box"].sum(), **parts}


def mean_over_images(**given: Any) -> Any:
    """Each loss is divided by the number of images too."""
    return {name: part / len(given["gt_valid"]) for name, part in batched_loss.loss(**given).items()}


def gradient_everywhere(**given: Any) -> Any:
    """The right loss, whose gradient reaches the boxes of all priors."""
    parts, everything = batched_loss.loss(**given), sum(level.sum() for level in given["distances"])
    return {**parts, "total": parts["total"] + everything - everything.detach()}


def saturates_late(**given: Any) -> Tensor:
    """The logit of the mean, but that it saturates only where the dtype does."""
    mean: Tensor = (given["class_logits"].sigmoid() * given["objectness_logits"].sigmoid()).sqrt()
    return mean.logit()


@pytest.mark.parametrize(
    ("operation", "scene", "variant"),
    [
        ("rtmdet.priors", "ragged-full", lambda **given: batched.priors(**{**given, "offset": 0.25})),
        ("rtmdet.decode", "ragged-full", lambda **given: -batched.decode(**given)),
        ("rtmdet.encode", "ragged-full", lambda **given: batched.encode(**{**given, "eps": 0.0})),
        ("rtmdet.candidates", "edge-through-corners", or_on_edge),
        ("rtmdet.cost", "ragged-full", partial(batched.cost, soft_center_radius=2.5)),
        ("rtmdet.cost", "ragged-full", partial(batched.cost, iou_weight=1.0)),
        ("rtmdet.dynamic_k_matching", "best-for-a-third", cheapest_claimant),
        ("rtmdet.dynamic_k_matching", "ragged-full", of_all_priors),
        ("rtmdet.assign", "ragged-full", partial(batched.assign, topk=1)),
        ("rtmdet.targets", "ragged-full", background_is_zero),
        ("rtmdet.qfl", "ragged-full", modulation_is_constant),
        ("rtmdet.giou_loss", "ragged-full", partial(batched_loss.giou_loss, eps=4096.0)),
        ("rtmdet.giou_loss", "no-overlap", never_nothing),
        ("rtmdet.loss", "ragged-full", each_level_by_itself),
        ("rtmdet.loss", "ragged-full", mean_over_images),
        ("rtmdet.loss", "ragged-full", gradient_everywhere),
        ("rtmdet.loss", "ragged-full", partial(batched_loss.loss, offset=0.5)),
        ("rtmdet.joint_logits", "extreme-logits-50", saturates_late),
    ],
)
def test_wrong_is_judged_wrong(operation: str, scene: str, variant: Callable[..., Any]) -> None:
    assert wrong_cases(OPERATIONS[operation], EDGE[scene], variant)


@pytest.mark.parametrize("operation", ["rtmdet.cost", "rtmdet.assign", "rtmdet.loss"])
def test_cost_of_the_own_class_alone_is_judged_wrong(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "_class_cost", own_class_cost)
    assert wrong_cases(OPERATIONS[operation], EDGE["crowd"], KINDS["batched"][operation])


def test_class_cost_keeps_the_largest_out_of_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(logits: Tensor, gt_labels: Tensor, iou: Tensor) -> Tensor:
        as_other = F.softplus(logits) * logits.sigmoid() ** 2
        own = as_other.gather(1, gt_labels[..., None].expand_as(iou))
        return own_class_cost(logits, gt_labels, iou) + (as_other.sum(1, keepdim=True) - own)

    one, box = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[[0.0, 0, 16, 16]]])
    confident = {
        "class_logits": torch.tensor([[[1000.0, -1, -2]]]),
        "boxes": box,
        "priors": torch.tensor([[8.0, 8, 8, 8]]),
        "candidate": one,
        "gt_boxes": box,
        "gt_labels": torch.zeros(1, 1, dtype=torch.int64),
        "gt_valid": one,
    }
    assert not verdict_on(OPERATIONS["rtmdet.cost"], batched.cost, confident).wrong
    monkeypatch.setattr(batched, "_class_cost", careless)
    assert verdict_on(OPERATIONS["rtmdet.cost"], batched.cost, confident).wrong
