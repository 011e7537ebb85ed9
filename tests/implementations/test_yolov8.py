from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.implementations.batched import yolov8 as batched
from detoracle.implementations.loop import yolov8 as loop
from detoracle.implementations.registry import marked_in
from detoracle.properties.checking import cases, judge_case
from detoracle.properties.comparison import Verdict, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.realistic import realistic
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import system_of
from detoracle.reference.contract import Operation
from detoracle.reports.counters import count

YOLOV8 = system_of("yolov8")
OPERATIONS = {operation.name: operation for operation in YOLOV8.operations}
KINDS = {"batched": batched, "loop": loop}
EDGE = {scene.name: scene for scene in edge_cases()}
CHOSEN = [
    "ragged-full",
    "empty-first",
    "empty-all",
    "crowd",
    "identical-other-class",
    "many-claims-few-anchors",
    "tiny-several",
    "beyond-bins",
    "outside-far-negative",
    "degenerate-pair",
    "inverted-both",
    "no-overlap",
    "one-anchor",
    "extreme-logits-200",
    "nan-box",
    "nan-class",
    "inf-box",
    "inf-class",
    "label-minus-one",
]
SCENES = [*(EDGE[name] for name in CHOSEN), *random_scenes(3, seed=3)]
TARGETS = ("gt_boxes", "gt_labels", "gt_valid")


def implementation(module: ModuleType, operation: str) -> Callable[..., Any]:
    [found] = [one for one in marked_in(module) if one.operation == operation]
    return found.load()


def verdict(operation: str, call: Callable[..., Any], arguments: dict[str, Any]) -> Verdict:
    one = OPERATIONS[operation]
    return expect(YOLOV8, one, arguments).judge(perform(one, call, arguments))


def wrong_cases(
    operation: Operation, scene: Scene, *calls: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> list[str]:
    wrong = []
    for case in cases(YOLOV8, operation, scene, dtype=dtype):
        expectation = expect(YOLOV8, operation, case.arguments)
        for call in calls:
            found = judge_case(case, expectation, partial(perform, operation, call)).verdict
            if found.wrong:
                wrong.append(f"{call}, {case.name}: {found.findings}")
    return wrong


def arguments_of(scene: str | Scene, operation: str) -> dict[str, Any]:
    given = EDGE[scene] if isinstance(scene, str) else scene
    return dict(next(cases(YOLOV8, OPERATIONS[operation], given)).arguments)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_right(operation: Operation) -> None:
    both = [implementation(module, operation.name) for module in KINDS.values()]
    assert [wrong for scene in SCENES for wrong in wrong_cases(operation, scene, *both)] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scene", ["single", "whole-image"])
def test_right_in_other_dtypes(scene: str, dtype: torch.dtype) -> None:
    for operation in YOLOV8.operations:
        both = [implementation(module, operation.name) for module in KINDS.values()]
        assert wrong_cases(operation, EDGE[scene], *both, dtype=dtype) == []


@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_padding_may_come_first(module: ModuleType) -> None:
    given = arguments_of("ragged-full", "yolov8.assign")
    turned = {name: value.flip(1) if name in TARGETS else value for name, value in given.items()}
    assert bool((~turned["gt_valid"][:, 0]).any())
    assert verdict("yolov8.assign", module.assign, turned).status == "equal"


@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_half_precision_maps_go_with_single_precision_boxes(module: ModuleType) -> None:
    given = arguments_of("ragged-full", "yolov8.loss")
    half = [level.bfloat16() for level in given["raw"]]
    parts = module.loss(**{**given, "raw": half})
    assert {part.dtype for part in parts.values()} == {torch.float32}


@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_rows_outside_the_batch_are_dropped_but_counted(module: ModuleType) -> None:
    image = torch.tensor([5, 0, -1, 5, 5])
    rows = {"batch_index": image, "labels": image.abs(), "boxes": torch.full((5, 4), 0.5)}
    given = {**rows, "batch_size": 2, "image_size": [64, 32]}
    assert verdict("yolov8.pad_targets", module.pad_targets, given).status == "equal"


# ----------------------------------------------------------------------------------------- where the oracle raises
@pytest.mark.parametrize("module", KINDS.values(), ids=KINDS)
def test_few_anchors_are_all_claimed(module: ModuleType) -> None:
    given = arguments_of("one-anchor", "yolov8.assign")
    inside = module.align(**given)[2] & given["gt_valid"][..., None]
    assert torch.equal(module.assign(**given).positive, inside.any(1))


def test_class_that_does_not_exist_takes_no_part() -> None:
    given = arguments_of("ragged-full", "yolov8.assign")
    labels, valid = given["gt_labels"].clone(), given["gt_valid"].clone()
    labels[1, 0], valid[1, 0] = given["scores"].shape[-1], False
    with_it, without = batched.assign(**{**given, "gt_labels": labels}), batched.assign(**{**given, "gt_valid": valid})
    assert torch.equal(with_it.gt_index, without.gt_index)
    assert torch.equal(with_it.quality, without.quality)


@pytest.mark.parametrize(("target", "nearest"), [(-2.0, 0.0), (15.0, 15.0), (99.0, 15.0)])
def test_distance_without_a_bin_counts_as_the_nearest(target: float, nearest: float) -> None:
    logits = torch.randn(3, 64)
    wanted = -logits.reshape(3, 4, 16).log_softmax(-1)[..., int(nearest)].mean(-1)
    assert torch.equal(batched.dfl_loss(logits, torch.full((3, 4), target)), wanted)


# --------------------------------------------------------------------------------------------------------------- cost
def host_syncs(scene: str, operation: str) -> set[int]:
    call = implementation(batched, operation)
    calls = [partial(call, **case.arguments) for case in cases(YOLOV8, OPERATIONS[operation], EDGE[scene])]
    return {count(one)[1].host_syncs for one in calls}


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - {"yolov8.pad_targets"}))
def test_batched_never_waits_for_the_device(operation: str) -> None:
    assert host_syncs("crowd", operation) == {0}


def test_batched_waits_once_for_the_width_of_the_padding() -> None:
    assert host_syncs("crowd", "yolov8.pad_targets") == {1}


def test_batched_loss_without_ground_truth_never_waits() -> None:
    assert host_syncs("empty-all", "yolov8.loss") == {0}


@pytest.mark.parametrize("operation", ["yolov8.loss", "yolov8.dfl_loss", "yolov8.dfl_decode", "boxes.iou_ultralytics"])
def test_batched_never_waits_backward(operation: str) -> None:
    call = implementation(batched, operation)
    for case in cases(YOLOV8, OPERATIONS[operation], EDGE["crowd"]):
        _, counters = count(partial(perform_backward, call, dict(case.arguments), OPERATIONS[operation].gradients))
        assert counters.host_syncs == 0


def perform_backward(call: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...]) -> None:
    given = {n: v.detach() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    given |= {"raw": [level.detach() for level in arguments["raw"]]} if "raw" in arguments else {}
    leaves = [leaf for name in names for leaf in (given[name] if isinstance(given[name], list) else [given[name]])]
    for leaf in leaves:
        leaf.requires_grad_()
    result = call(**given)
    torch.autograd.grad((result["total"] if isinstance(result, dict) else result).sum(), leaves)


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - {"yolov8.pad_targets"}))
def test_batched_is_one_graph(operation: str) -> None:
    call = implementation(batched, operation)

    def compiled(**given: Any) -> Any:
        torch.compiler.reset()  # every setting is another graph, and their number is limited
        return torch.compile(call, fullgraph=True, backend="eager")(**given)

    assert wrong_cases(OPERATIONS[operation], EDGE["ragged-full"], compiled) == []
    torch.compiler.reset()


def test_batched_never_holds_a_value_for_every_pair_and_class() -> None:
    given = arguments_of(realistic("coco", num_images=2, seed=0, image_size=(128, 128), num_classes=300), "yolov8.loss")
    pairs = given["gt_valid"].numel() * sum(level[0, 0].numel() for level in given["raw"])
    _, counters = count(partial(batched.loss, **given))
    assert counters.peak_live_bytes < 4 * pairs * 300


# ------------------------------------------------------------------------------------------------------ wrong variants
def conflict_by_metric(**given: Any) -> Any:
    """A contested anchor goes to the largest metric."""
    metric, overlap, in_gt = batched.align(**given)
    gt_index, _ = batched._match(metric, metric, in_gt & given["gt_valid"][..., None], 10)
    return gt_index, batched._match(metric, overlap, in_gt, 10)[1]


def unscaled(**given: Any) -> Any:
    """The best metric of a ground truth becomes 1, not its best overlap."""
    metric, overlap, in_gt = batched.align(**given)
    return batched._match(metric, (overlap > 0).float(), in_gt & given["gt_valid"][..., None], 10)


def with_targets(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **given: Any) -> Any:
    """The right assignment with other targets."""
    right = batched.assign(**given)
    extra = dict(right.extra)
    return {"gt_index": right.gt_index, "quality": right.quality, **extra, **change(extra)}


def alpha_trained(boxes_a: Tensor, boxes_b: Tensor, **given: Any) -> Tensor:
    """The CIoU, whose weight of the shape is no constant for the gradient."""
    ciou = batched.iou_ultralytics(boxes_a, boxes_b, **given)
    if given["mode"] != "ciou" or given["form"] != "xyxy":
        return ciou
    iou, size_a, size_b = (
        batched.iou_ultralytics(boxes_a, boxes_b),
        *(b[..., 2:] - b[..., :2] for b in (boxes_a, boxes_b)),
    )
    angle = torch.atan(size_a[..., :1] / size_a[..., 1:]) - torch.atan(size_b[..., :1] / size_b[..., 1:])
    shape = 4 / math.pi**2 * angle**2
    penalty = shape * shape / (shape - iou + 1) - shape * (shape / (shape - iou + 1)).detach()
    return ciou - (penalty - penalty.detach())


def image_first(batch_index: Tensor, **given: Any) -> Any:
    """Ground truths are taken to come in the images' order."""
    return batched.pad_targets(batch_index.sort()[0], **given)


def whole_dataset(**given: Any) -> Any:
    """The total is not multiplied by the number of images."""
    parts = batched.loss(**given)
    return {**parts, "total": parts["box"] + parts["cls"] + parts["dfl"]}


def trains_the_assignment(**given: Any) -> Any:
    """The right loss, whose gradient also reaches all class logits through the normaliser."""
    parts = batched.loss(**given)
    scores = torch.cat([level.flatten(2) for level in given["raw"]], dim=2)[:, 64:].sigmoid().mean()
    return {**parts, "total": parts["total"] * (1 + scores - scores.detach())}


@pytest.mark.parametrize(
    ("operation", "scene", "variant"),
    [
        ("yolov8.anchor_points", "single", lambda **given: [part - 0.5 for part in batched.anchor_points(**given)]),
        ("yolov8.pad_targets", "ragged-full", image_first),
        ("yolov8.align", "ragged-full", partial(batched.align, alpha=1.0)),
        ("yolov8.align", "ragged-full", partial(batched.align, beta=5.9)),
        ("yolov8.assign", "crowd", partial(batched.assign, topk=9)),
        ("yolov8.assign", "ragged-full", partial(batched.assign, topk=13)),
        ("yolov8.assign", "crowd", conflict_by_metric),
        ("yolov8.assign", "single", unscaled),
        ("yolov8.assign", "single", partial(with_targets, lambda extra: {"labels": extra["labels"] + 1})),
        ("yolov8.assign", "single", partial(with_targets, lambda extra: {"boxes": extra["boxes"] + 1})),
        ("yolov8.assign", "single", partial(with_targets, lambda extra: {"scores": (extra["scores"] > 0).float()})),
        ("yolov8.dfl_decode", "single", lambda box_logits: batched.dfl_decode(box_logits).round()),
        ("yolov8.bbox2dist", "beyond-bins", lambda **given: batched.bbox2dist(**{**given, "reg_max": 17})),
        ("yolov8.dfl_loss", "single", lambda box_logits, distances: batched.dfl_loss(box_logits, distances.floor())),
        ("yolov8.loss", "ragged-full", partial(batched.loss, beta=5.0)),
        ("yolov8.loss", "ragged-full", partial(batched.loss, dfl_gain=1.0)),
        ("yolov8.loss", "ragged-full", whole_dataset),
        ("yolov8.loss", "ragged-full", trains_the_assignment),
        ("boxes.iou_ultralytics", "single", alpha_trained),
        ("boxes.iou_ultralytics", "degenerate-pair", partial(batched.iou_ultralytics, eps=1e-9)),
    ],
)
def test_wrong_is_judged_wrong(operation: str, scene: str, variant: Callable[..., Any]) -> None:
    assert wrong_cases(OPERATIONS[operation], EDGE[scene], variant)
