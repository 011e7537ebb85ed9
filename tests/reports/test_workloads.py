from __future__ import annotations

import pytest
import torch

from detoracle.properties.systems import NAMES, find_operation, system_of
from detoracle.reference.errors import InputError
from detoracle.reports.workloads import STANDARD_ANCHORS, Workload, images_of, rolled, sides, workload_case

SMALL = {"yolox": 84, "rtmdet": 84, "yolov8": 84}


@pytest.mark.parametrize("name", ["yolox", "rtmdet", "yolov8"])
def test_a_workload_has_the_sizes_it_says(name: str) -> None:
    system, operation = find_operation(f"{name}.loss")
    case = workload_case(system, operation, Workload(2, 7, SMALL[name], 5))
    assert case.arguments["gt_valid"].shape == (2, 7)
    assert case.arguments["gt_valid"].all()
    assert int(case.arguments["gt_labels"].max()) < 5
    maps = case.arguments.get("raw") or case.arguments["class_logits"]
    assert sum(level[0, 0].numel() for level in maps) == SMALL[name]


def test_ssd_has_8732_priors_and_background() -> None:
    case = workload_case(*find_operation("ssd.loss"), Workload(1, 60, 8732, 20))
    assert case.arguments["conf"].shape == (1, 8732, 21)
    assert "crowd" in case.scene.tags


@pytest.mark.parametrize(("gts", "scenes"), [(60, "realistic"), (3, "crowd")])
def test_the_kind_of_scenes_can_be_chosen_whatever_the_number(gts: int, scenes: str) -> None:
    case = workload_case(*find_operation("ssd.loss"), Workload(1, gts, 8732, 20), scenes=scenes)
    assert ("crowd" in case.scene.tags) == (scenes == "crowd")
    assert case.arguments["gt_valid"].shape == (1, gts)


def test_unknown_scenes_are_refused() -> None:
    with pytest.raises(InputError, match="one of realistic, crowd"):
        workload_case(*find_operation("ssd.loss"), Workload(1, 3, 8732, 20), scenes="edge")


def test_a_large_anchor_head_is_retinanets() -> None:
    case = workload_case(*find_operation("anchor_head.assign"), Workload(1, 3, 76_725, 80))
    assert case.arguments["anchors"].shape == (76_725, 4)


@pytest.mark.parametrize("name", NAMES)
def test_standard_sizes_can_be_had(name: str) -> None:
    assert STANDARD_ANCHORS[name] in sides(name)


def test_an_impossible_number_of_anchors_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"such as .*8400"):
        workload_case(*find_operation("yolox.loss"), Workload(1, 1, 8401, 80))


def test_an_unknown_setting_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="'tutorial', 'official'"):
        workload_case(*find_operation("yolox.assign"), Workload(1, 1, 84, 3), setting="latest")


@pytest.mark.parametrize("name", ["yolox.loss", "anchor_head.loss", "rtmdet.assign"])
def test_rolling_moves_images_and_shares_nothing(name: str) -> None:
    system, operation = find_operation(name)
    anchors = 21 * 9 if name.startswith("anchor_head") else 84
    if name.startswith("anchor_head"):
        anchors = min(sides("anchor_head"))
    given = workload_case(system, operation, Workload(3, 2, anchors, 4)).arguments
    moved = rolled(operation, given, 1)
    torch.testing.assert_close(moved["gt_boxes"][0], given["gt_boxes"][2], rtol=0, atol=0)
    assert not any(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(given.values(), moved.values(), strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.numel()
    )
    one = list(images_of(operation, given))[2]
    assert torch.equal(one["gt_boxes"], given["gt_boxes"][2:])
    for shared in system_of(operation.system).shared & given.keys():
        assert one[shared] is given[shared]
