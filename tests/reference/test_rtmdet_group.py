"""RTMDet's loss in real groups of processes, each with a batch of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.golden.checks import gradient, within
from detoracle.properties.golden.rtmdet_losses import arguments_of_loss
from detoracle.properties.golden.vectors import read_vectors
from detoracle.reference import rtmdet_loss
from detoracle.reference.explain.rtmdet import explain_loss, levels_given, loss_given

TESTS = Path(__file__).parents[1]
SCENES = {scene.name: scene for scene in read_vectors(TESTS / "golden" / "rtmdet.npz")}
GROUP = [scene for scene in SCENES.values() if "ddp" in scene.info["tags"]]
Batch = dict[str, Any]


@pytest.fixture(scope="module")
def full() -> Batch:
    return arguments_of_loss(SCENES["random-b2_0"])


def without_ground_truths(batch: Batch) -> Batch:
    return {**batch, "gt_valid": torch.zeros_like(batch["gt_valid"])}


def ran_together(folder: Path, batches: list[Batch]) -> list[Batch]:
    """Each batch's loss in a process of its own, all in one gloo group."""
    processes, found = [], []
    for rank, batch in enumerate(batches):
        given, out = folder / f"given{rank}.pt", folder / f"found{rank}.pt"
        torch.save(batch, given)
        script = [sys.executable, str(TESTS / "reference" / "rtmdet_rank.py")]
        arguments = [folder / "rendezvous", rank, len(batches), given, out]
        processes.append(subprocess.Popen([*script, *map(str, arguments)], stderr=subprocess.PIPE, text=True))
        found.append(out)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(batches), errors
    return [torch.load(out) for out in found]


def local_factor(batch: Batch) -> float:
    levels = levels_given(explain_loss(**batch).gt_index, **batch)
    return float(sum(level.class_part.value for level in levels))


def gradients_of(batch: Batch, factors: tuple[float, float], dtype: torch.dtype) -> tuple[Tensor, ...]:
    names = ("class_logits", "distances")
    leaves = {name: [level.to(dtype).requires_grad_() for level in batch[name]] for name in names}
    given = {**batch, **leaves, "gt_boxes": batch["gt_boxes"].to(dtype)}
    total: Any = loss_given(explain_loss(**batch).gt_index, **given, average_factors=factors, dtype=None)["total"]
    return torch.autograd.grad(total, [leaf for name in names for leaf in leaves[name]])


def assert_trained_with(batch: Batch, result: Batch, factors: tuple[float, float]) -> None:
    """Do a process's losses and gradients follow from these average factors?"""
    expected = loss_given(explain_loss(**batch).gt_index, **batch, average_factors=factors)
    for name in ("total", "classification", "box"):
        assert within(name, result[name], expected[name]).status == "equal"
    exact, plain = (gradients_of(batch, factors, dtype) for dtype in (torch.float64, torch.float32))
    for found, fine, coarse in zip(result["gradients"], exact, plain, strict=True):
        assert gradient("gradient", found, fine, coarse).status == "equal"


def test_a_group_equals_the_recorded_one(tmp_path: Path) -> None:
    batches = [arguments_of_loss(scene) for scene in GROUP]
    for scene, batch, result in zip(GROUP, batches, ran_together(tmp_path, batches), strict=True):
        factors = (float(scene.tensor("out/cls_avg_factor")), float(scene.tensor("out/bbox_avg_factor")))
        assert_trained_with(batch, result, factors)
        alone = rtmdet_loss.loss(**batch)["total"]
        expected = loss_given(explain_loss(**batch).gt_index, **batch, average_factors=factors)["total"]
        assert within("loss_total", scene.tensor("out/loss_total"), expected).status == "equal"
        assert within("loss_total", alone, expected).status == "different"


def test_a_rank_without_positives_takes_part(tmp_path: Path, full: Batch) -> None:
    batches = [full, without_ground_truths(full)]
    results = ran_together(tmp_path, batches)
    assert [float(result["mean"]) for result in results] == [0.5, 0.5]
    mean = local_factor(full) / 2
    assert mean > 1
    for batch, result in zip(batches, results, strict=True):
        assert_trained_with(batch, result, (mean, mean))
    boxes = results[1]["gradients"][len(full["distances"]) :]
    assert not results[1]["box"].any()
    assert not any(bool(level.any()) for level in boxes)


def test_the_factor_is_limited_after_the_mean(tmp_path: Path) -> None:
    few = {
        "class_logits": [torch.zeros(1, 2, 8, 8)],
        "distances": [torch.full((1, 4, 8, 8), 8.0)],
        "strides": [8],
        "gt_boxes": torch.tensor([[[16.0, 16.0, 32.0, 32.0], [41.0, 41.0, 55.0, 55.0]]]),
        "gt_labels": torch.zeros(1, 2, dtype=torch.int64),
        "gt_valid": torch.ones(1, 2, dtype=torch.bool),
    }
    # More than 1 in one process, yet less on average: a limit before the mean would give (1.77 + 1) / 2.
    assert local_factor(few) == 1 + 14**2 / 16**2
    batches = [few, without_ground_truths(few)]
    for batch, result in zip(batches, ran_together(tmp_path, batches), strict=True):
        assert_trained_with(batch, result, (1.0, 1.0))


def test_alone_no_group_is_needed() -> None:
    number = torch.tensor(3.0)
    assert rtmdet_loss.mean_over_ranks(number) is number
