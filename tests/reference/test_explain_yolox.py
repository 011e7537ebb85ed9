"""Explanations of YOLOX: every right float32 arrangement is admitted, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.yolox import native
from detoracle.reference import yolox, yolox_cost, yolox_loss
from detoracle.reference.boxes import iou_yolox
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.explain import yolox as explain

FLAVOURS = tuple(yolox_cost.FLAVOURS)
SCENES = {s.name: s for s in (*edge_cases(), *random_scenes(12, seed=5)) if s.max_gts < 20}


def on_grid(
    boxes: Tensor, *, size: int = 64, stride: int = 8, seed: int = 0, side: float = 16.0, valid: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of `yolox.assign` for one level of cells whose predictions are `side` px wide."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(len(boxes), 7, size // stride, size // stride, generator=generator) / 8
    raw[:, :2] += 0.5
    raw[:, 2:4] += torch.tensor(side / stride).log()
    _, points, strides = yolox.anchor_grid([(size // stride,) * 2], [stride], like=boxes)
    return {
        "predictions": yolox.decode([raw], [stride]),
        "anchor_points": points,
        "anchor_strides": strides,
        "gt_boxes": boxes,
        "gt_labels": torch.zeros(boxes.shape[:2], dtype=torch.int64),
        "gt_valid": torch.ones(boxes.shape[:2], dtype=torch.bool) if valid is None else valid,
    }


def calls() -> Iterator[dict[str, Any]]:
    for scene in SCENES.values():
        given = native(scene)
        predictions = yolox.decode(given["raw"], given["strides"])
        sizes = [tuple(level.shape[2:]) for level in given["raw"]]
        _, points, strides = yolox.anchor_grid(sizes, given["strides"], like=predictions)
        ground_truths = {name: given[name] for name in ("gt_boxes", "gt_labels", "gt_valid")}
        for flavour in FLAVOURS:
            yield {
                "predictions": predictions,
                "anchor_points": points,
                "anchor_strides": strides,
                **ground_truths,
                "flavour": flavour,
            }


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}


def test_the_oracle_in_float32_and_in_float64_is_always_admitted() -> None:
    judged = 0
    for arguments in calls():
        try:
            explanation = explain.explain_assign(**arguments)
        except UpstreamRaises as behaviour:
            with pytest.raises(UpstreamRaises, match=behaviour.behaviour.replace(".", r"\.")):
                yolox.assign(**arguments)
            continue
        for given in (arguments, in_double(arguments)):
            found = yolox.assign(**given)
            assert not explanation.wrong(found.gt_index).any()
            assert not explanation.wrong_k(found.extra["dynamic_k"]).any()
            quality = explanation.quality(found.gt_index)
            far = (found.quality.double() - quality.value).abs() > quality.error
            assert not far[quality.value.isfinite()].any()
        assert torch.equal(explanation.gt_index, yolox.assign(**in_double(arguments)).gt_index) or (
            explanation.ambiguous.any()
        )
        judged += 1
    assert judged > len(SCENES)


def test_of_generic_scenes_hardly_anything_is_ambiguous() -> None:
    positives = ambiguous = 0
    for scene in random_scenes(15, seed=2):
        given = native(scene)
        explanation = explain.explain_loss(**given)
        positives += int((explanation.gt_index >= 0).sum())
        ambiguous += int(explanation.ambiguous.sum())
    assert positives > 150
    assert ambiguous <= positives // 100


def test_any_other_outcome_of_a_clear_anchor_is_refused() -> None:
    arguments = on_grid(torch.tensor([[[20.0, 20, 16, 16], [41, 43, 20, 16]]]))
    explanation = explain.explain_assign(**arguments)
    right = yolox.assign(**arguments).gt_index
    assert not explanation.ambiguous.any()
    assert len(list(explanation.alternatives(9))) == 1
    for anchor in range(right.shape[1]):
        for outcome in {-2, -1, 0, 1, 2} - {int(right[0, anchor])}:
            changed = right.clone()
            changed[0, anchor] = outcome
            assert explanation.wrong(changed).nonzero().tolist() == [[0, anchor]]


def test_a_whole_column_of_anchors_that_rounding_moves_together_is_admitted() -> None:
    """The square's right edge lies a millionth of a pixel beyond a column of anchor points: float32 puts it on them."""
    centre = torch.tensor(16.0).nextafter(torch.tensor(17.0)).item()
    arguments = on_grid(torch.tensor([[[centre, 66.0, 8, 180]]]), size=128, side=40.0)
    column = arguments["anchor_points"][:, 0] == 36
    arguments["predictions"][0, column, :4] = torch.tensor([centre, 66.0, 8, 180])
    # Only those in the column overlap well; there are too many to try them in all combinations.
    near, _ = explain.explain_candidates(
        *(arguments[n] for n in ("anchor_points", "anchor_strides", "gt_boxes", "gt_valid"))
    )
    inside = yolox_cost.candidates(
        *(arguments[n] for n in ("anchor_points", "anchor_strides", "gt_boxes", "gt_valid"))
    )[0]
    assert near.ambiguous[0].sum() > 4
    assert (near.ambiguous[0] <= column).all()
    assert torch.equal(near.value != inside, near.ambiguous)
    coarse, fine = yolox.assign(**arguments).gt_index, yolox.assign(**in_double(arguments)).gt_index
    assert int((coarse != fine).sum()) > 1
    explanation = explain.explain_assign(**arguments)
    assert not explanation.wrong(coarse).any()
    assert not explanation.wrong(fine).any()


def test_candidates_on_an_exact_edge_are_not_ambiguous() -> None:
    arguments = on_grid(torch.tensor([[[20.0, 20, 16, 32]]]))
    near, preferred = explain.explain_candidates(
        *(arguments[n] for n in ("anchor_points", "anchor_strides", "gt_boxes", "gt_valid"))
    )
    assert not near.ambiguous.any()
    assert not preferred.ambiguous.any()
    assert near.margin.isinf().all()


def test_equal_costs_leave_open_who_is_claimed_but_not_how_many() -> None:
    cost, iou = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 3.0]]]), torch.tensor([[[0.9, 0.9, 0.3, 0.0, 0.0]]])
    every = torch.ones(1, 5, dtype=torch.bool)
    explanation = explain.explain_dynamic_k_matching(cost, iou, every, every[:, :1])
    right = {tuple(a[0].tolist()) for a in explanation.alternatives(99)}
    assert right == {(0, 0, -1, -1, -1), (0, -1, 0, -1, -1), (0, -1, -1, 0, -1)}
    for wrong in ([0, 0, 0, -1, -1], [0, -1, -1, -1, -1], [0, -1, -1, -1, 0]):
        assert explanation.wrong(torch.tensor([wrong])).any()


def test_an_iou_sum_next_to_an_integer_leaves_k_open() -> None:
    below = torch.tensor(2.0).nextafter(torch.tensor(0.0)).item() / 4
    cost, iou = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.full((1, 1, 4), below)
    every = torch.ones(1, 4, dtype=torch.bool)
    explanation = explain.explain_dynamic_k_matching(cost, iou, every, every[:, :1])
    assert {tuple(a[0].tolist()) for a in explanation.alternatives(9)} == {(0, -1, -1, -1), (0, 0, -1, -1)}
    assert explanation.wrong_k(torch.tensor([[1], [2], [3], [0]])[:1]).item() is False
    assert [explanation.wrong_k(torch.tensor([[k]])).item() for k in range(4)] == [True, False, False, True]


def test_a_sum_that_is_an_integer_only_in_float64_leaves_k_open() -> None:
    """Exact IoUs whose sum is 2, but whose partial sums float32 cannot hold."""
    tiny = 2.0**-26
    iou = torch.tensor([[[1.0, 1.0 - 2.0**-24, tiny, tiny, tiny, tiny]]])
    cost, every = torch.arange(6.0)[None, None], torch.ones(1, 6, dtype=torch.bool)
    assert iou.double().sum() == 2
    sums = {float(sum(order)) for order in (list(iou[0, 0]), list(iou[0, 0].flip(0)))}
    explanation = explain.explain_dynamic_k_matching(cost, iou, every, every[:, :1])
    for total in sums:
        assert not explanation.wrong_k(torch.tensor([[int(total)]])).any()
    assert {tuple(a[0].tolist()).count(0) for a in explanation.alternatives(99)} == {1, 2}


def test_quality_follows_the_assignment_that_is_given() -> None:
    arguments = on_grid(torch.tensor([[[20.0, 20, 16, 16], [24, 20, 16, 16]]]))
    explanation = explain.explain_assign(**arguments)
    given = explanation.gt_index.clone()
    anchor = int((given[0] == 0).nonzero()[0])
    given[0, anchor] = 1
    expected = iou_yolox(arguments["gt_boxes"][0, 1:].double(), arguments["predictions"][0, :, :4].double())
    assert explanation.quality(given).value[0, anchor] == expected[0, anchor]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bounded_loss_holds_the_float32_loss_and_is_sharp(flavour: str) -> None:
    for scene in random_scenes(4, seed=3):
        given = native(scene)
        parts = yolox_loss.loss(**given, flavour=flavour, use_l1=True)
        matched = yolox.assign(
            yolox.decode(given["raw"], given["strides"]),
            *yolox.anchor_grid([tuple(m.shape[2:]) for m in given["raw"]], given["strides"], like=given["raw"][0])[1:],
            given["gt_boxes"],
            given["gt_labels"],
            given["gt_valid"],
            flavour=flavour,
        ).gt_index
        bounded = explain.loss_given(matched, **given, flavour=flavour, use_l1=True)
        assert list(bounded) == list(parts)
        for name, part in parts.items():
            assert (part.double() - bounded[name].value).abs() <= bounded[name].error
            terms = matched.numel() * given["raw"][0].shape[1]
            assert bounded[name].error <= torch.finfo(torch.float32).eps * terms * (1 + bounded[name].value.abs())
