"""Adapters, with stand-ins for the genuine packages: what is handed over, and what is made of the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import detoracle.adapters
from detoracle.adapters import mmdet_anchor_head, torchvision, ultralytics, yolox
from detoracle.adapters.genuine import genuine
from detoracle.reference import boxes as oracle_boxes
from detoracle.reference.errors import InputError

GENUINE = ("ultralytics", "yolox", "mmdet", "mmengine", "mmcv", "torchvision")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a module of a package that is not there."""

    def install(name: str, **content: Any) -> None:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                module = ModuleType(path)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
        for key, value in content.items():
            setattr(sys.modules[name], key, value)

    monkeypatch.setattr("detoracle.adapters.genuine._stand_in_for_compiled_operators", lambda: ())
    return install


def test_importing_adapters_imports_no_package() -> None:
    folder = Path(detoracle.adapters.__path__[0])
    for file in folder.glob("*.py"):
        __import__(f"detoracle.adapters.{file.stem}")
    installed = [name for name in GENUINE if name in sys.modules]
    assert installed == []


def test_older_home_of_a_module_is_found(package: Callable[..., None]) -> None:
    package("old_home.tal", here=True)
    assert genuine("no_such_package.tal", "old_home.tal").here


def test_release_without_any_home_is_named() -> None:
    with pytest.raises(InputError, match=r"expected a release with no_such_a or no_such_b, got none of them"):
        genuine("no_such_a", "no_such_b")


def test_missing_dependency_is_not_taken_for_an_older_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        genuine("needs_more", "math")


def test_ultralytics_assignment(package: Callable[..., None]) -> None:
    seen: dict[str, Any] = {}

    class TaskAlignedAssigner:
        def __init__(self, **settings: Any) -> None:
            seen.update(settings)

        def __call__(
            self, scores: Tensor, boxes: Tensor, points: Tensor, labels: Tensor, gts: Tensor, mask: Tensor
        ) -> Any:
            seen.update(labels=labels, gts=gts, mask=mask)
            foreground = torch.tensor([[True, False]])
            return labels[:, :, 0], gts, scores * foreground[..., None], foreground, torch.tensor([[1, 0]])

    package("ultralytics.utils.tal", TaskAlignedAssigner=TaskAlignedAssigner)
    found = ultralytics.assign(
        scores=torch.tensor([[[0.25, 0.5], [1.0, 1.0]]]),
        boxes=torch.ones(1, 2, 4),
        anchor_points=torch.ones(2, 2),
        gt_boxes=torch.ones(1, 3, 4),
        gt_labels=torch.tensor([[5, 1, -7]]),
        gt_valid=torch.tensor([[False, True, False]]),
        topk=3,
    )
    assert (seen["topk"], seen["num_classes"], seen["alpha"], seen["beta"]) == (3, 2, 0.5, 6.0)
    assert seen["mask"].tolist() == [[[False], [True], [False]]]
    assert seen["labels"].tolist() == [[[5], [1], [0]]]  # only padding that cannot be read is zeros
    assert seen["gts"].sum(-1).tolist() == [[4.0, 4.0, 0.0]]
    assert found["gt_index"].tolist() == [[1, -1]]
    assert found["quality"].tolist() == [[0.75, 0.0]]


def test_yolox_assignment_numbers_the_rows_of_the_batch(package: Callable[..., None]) -> None:
    class YOLOXHead:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def get_assignments(self, batch_idx: int, num_gt: int, gt_classes: Tensor, x_shifts: Tensor) -> Any:
            assert (num_gt, gt_classes.tolist(), x_shifts.tolist()) == (1, [2.0], [[0.0, 1.0]])
            return None, torch.tensor([False, True]), torch.tensor([0.5]), torch.tensor([0]), 1

    package("yolox.models.yolo_head", YOLOXHead=YOLOXHead)
    yolox._head.cache_clear()
    gt_index, quality = yolox.assign(
        predictions=torch.zeros(1, 2, 8),
        anchor_points=torch.tensor([[4.0, 4.0], [12.0, 4.0]]),
        anchor_strides=torch.tensor([8.0, 8.0]),
        gt_boxes=torch.ones(1, 2, 4),
        gt_labels=torch.tensor([[0, 2]]),
        gt_valid=torch.tensor([[False, True]]),
    )
    assert gt_index.tolist() == [[-1, 1]]
    assert quality.tolist() == [[0.0, 0.5]]
    with pytest.raises(NotImplementedError, match="tutorial flavour"):
        yolox._head(3, (8,), "official")
    yolox._head.cache_clear()


def test_mmdet_assignment_keeps_anchors_that_take_no_part_apart(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class MaxIoUAssigner:
        def __init__(self, **settings: Any) -> None:
            assert settings["pos_iou_thr"] == 0.7

        def assign(self, anchors: Tensor, gts: Tensor, ignored: Tensor | None, labels: Tensor) -> Any:
            assert (len(anchors), len(gts), ignored) == (3, 1, None)
            found = ModuleType("result")
            found.__dict__["gt_inds"] = torch.tensor([1, 0, -1])
            return found

    package("mmdet.core.bbox.assigners", MaxIoUAssigner=MaxIoUAssigner)
    monkeypatch.setattr(mmdet_anchor_head, "release", lambda _: (2, 28, 2))
    gt_index = mmdet_anchor_head.assign(
        anchors=torch.zeros(4, 4),
        gt_boxes=torch.zeros(1, 2, 4),
        gt_valid=torch.tensor([[False, True]]),
        inside=torch.tensor([[True, False, True, True]]),
        pos_iou_thr=0.7,
    )
    assert gt_index.tolist() == [[1, -2, -1, -2]]


def test_torchvision_reduction_is_the_operations(package: Callable[..., None]) -> None:
    package("torchvision.ops", generalized_box_iou_loss=lambda a, b, eps: (a - b).sum(1))
    given: dict[str, Any] = {"predicted": torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]]), "target": torch.zeros(2, 4)}
    assert torchvision.giou_loss(**given, reduction="none").tolist() == [1.0, 3.0]
    assert torchvision.giou_loss(**given, reduction="sum", loss_weight=2.0).item() == 8.0
    assert torchvision.giou_loss(**given, weight=torch.tensor([0.0, 1.0])).item() == 1.5


@pytest.mark.parametrize(("mode", "flag"), [("iou", {}), ("ciou", {"CIoU": True})])
def test_ultralytics_iou_names_the_variant(package: Callable[..., None], mode: str, flag: dict[str, bool]) -> None:
    def bbox_iou(a: Tensor, b: Tensor, *, xywh: bool, eps: float, **flags: bool) -> Tensor:
        assert (xywh, flags) == (False, flag)
        return oracle_boxes.iou_ultralytics(a, b, eps=eps, mode=mode)

    package("ultralytics.utils.metrics", bbox_iou=bbox_iou)
    one = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    found = ultralytics.iou(boxes_a=one, boxes_b=one + 1, mode=mode)
    assert torch.equal(found, oracle_boxes.iou_ultralytics(one, one + 1, mode=mode))
