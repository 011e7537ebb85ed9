"""Losses of the anchor head, per level and per image: worked examples, plain loops, sampling, mining, errors."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import outside
from detoracle.reference import anchor_head_box_terms, anchor_head_terms
from detoracle.reference.anchor_head import assign, sample, targets
from detoracle.reference.anchor_head_boxes import anchors as make_anchors
from detoracle.reference.anchor_head_coder import decode
from detoracle.reference.anchor_head_loss import Options, loss
from detoracle.reference.anchor_head_ssd import ssd_loss
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.explain.anchor_head_loss import explain_loss, explain_ssd_loss, loss_given, ssd_loss_given

EPS = torch.finfo(torch.float32).eps
SIZES, STRIDES = [(4, 5), (2, 3)], [8, 16]


def head(
    seed: int = 0, *, columns: int = 3, classes: int = 3, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> dict[str, Any]:
    """Two images of 40 x 32 pixels on two levels with three anchors a cell; the second has a gap in its padding."""
    generator = torch.Generator().manual_seed(seed)
    corner = 30 * torch.rand(2, 4, 2, generator=generator)
    boxes = torch.cat([corner, corner + 4 + 16 * torch.rand(2, 4, 2, generator=generator)], dim=-1)
    shapes = torch.tensor([[32, 40], [27, 33]])
    return {
        "cls_scores": [(spread * torch.randn(2, 3 * columns, *s, generator=generator)).to(dtype) for s in SIZES],
        "bbox_preds": [torch.randn(2, 12, *s, generator=generator).to(dtype) for s in SIZES],
        "anchors": make_anchors(SIZES, strides=STRIDES, ratios=[0.25, 1.0, 4.0], scales=[2.0], like=boxes.to(dtype)),
        "gt_boxes": boxes.to(dtype),
        "gt_labels": torch.randint(classes, (2, 4), generator=generator),
        "gt_valid": torch.tensor([[True] * 4, [True, False, True, True]]),
        "image_shapes": shapes,
        "pad_shapes": shapes,
        "strides": STRIDES,
    }


def one_cell(**settings: Any) -> dict[str, Any]:
    """One image of 2 x 2 cells of 8 pixels, one anchor a cell, one class; the first cell is the ground truth."""
    shape = torch.tensor([[16, 16]])
    return {
        "cls_scores": [torch.zeros(1, 1, 2, 2)],
        "bbox_preds": [torch.zeros(1, 4, 2, 2)],
        "anchors": torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]]),
        "gt_boxes": torch.tensor([[[0.0, 0, 8, 8]]]),
        "gt_labels": torch.zeros(1, 1, dtype=torch.int64),
        "gt_valid": torch.ones(1, 1, dtype=torch.bool),
        "image_shapes": shape,
        "pad_shapes": shape,
        "strides": [8],
        **settings,
    }


def rows(level: Tensor, columns: int) -> Tensor:
    """Scores or deltas of a level by plain loops: image, row, column, anchor."""
    images, _, height, width = level.shape
    found = [
        level[i, k * columns : (k + 1) * columns, y, x]
        for i, y, x, k in itertools.product(range(images), range(height), range(width), range(3))
    ]
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------- worked examples
def test_focal_loss_of_four_cells_by_hand() -> None:
    parts = loss(**one_cell())
    bounded = loss_given(torch.tensor([[0, -1, -1, -1]]), **one_cell())
    expected = (0.25 + 3 * 0.75) * 0.25 * math.log(2)
    assert abs(expected - float(bounded["total"].value)) <= float(bounded["total"].error)
    assert not outside(parts["total"], bounded["total"].value, bounded["total"].error)
    assert parts["box"].tolist() == [0.0]


def test_box_loss_is_of_positives_alone() -> None:
    given = one_cell(box_loss_weight=3.0)
    given["bbox_preds"][0][:] = torch.tensor([0.5, -0.25, 0.0, 1.0])[None, :, None, None]
    assert torch.equal(loss(**given)["box"], 3 * (torch.tensor([1.75]) / (1 + EPS)))


def test_the_random_sampler_counts_its_background() -> None:
    given = one_cell(class_loss="sigmoid_cross_entropy", num=3)
    given["bbox_preds"][0][:] = 1.0
    for sampler, divisor in (("pseudo", 1), ("random", 3)):
        assert torch.equal(loss(**given, sampler=sampler)["box"], torch.tensor([4.0]) / (divisor + EPS))


def test_every_image_counts_at_least_one_positive() -> None:
    given = one_cell()
    given["bbox_preds"][0][:] = 1.0
    double: dict[str, Any] = {
        n: t.repeat(2, *[1] * (t.ndim - 1)) if isinstance(t, Tensor) and n != "anchors" else t for n, t in given.items()
    }
    double |= {name: [given[name][0].repeat(2, 1, 1, 1)] for name in ("cls_scores", "bbox_preds")}
    double["gt_valid"] = torch.tensor([[True], [False]])
    assert loss(**double)["box"].tolist() == [2.0]


def test_hard_negatives_by_hand() -> None:
    given = one_cell(cls_scores=[torch.tensor([[[[0.0, 3.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])])
    entropy = torch.nn.functional.softplus(torch.tensor([0.0, 3.0, 2.0, 1.0]).double())
    for ratio in (0, 1, 2, 3, 9):
        result = ssd_loss(**given, neg_pos_ratio=ratio)["classification"]
        outcome = torch.tensor([[0, *([-1] * ratio + [-2] * 3)[:3]]])
        bounded = ssd_loss_given(outcome, **given, neg_pos_ratio=ratio)["classification"]
        assert not outside(result, bounded.value, bounded.error).any()
        expected = entropy[: 1 + ratio].sum()
        assert abs(expected - bounded.value[0]) <= bounded.error[0]


def test_negatives_are_mined_image_by_image() -> None:
    given = head(columns=4)
    parts = ssd_loss(**given)
    assert parts["classification"].shape == parts["box"].shape == (2,)
    for image in range(2):
        alone = {
            **given,
            **{
                n: given[n][image : image + 1]
                for n in ("gt_boxes", "gt_labels", "gt_valid", "image_shapes", "pad_shapes")
            },
            **{n: [level[image : image + 1] for level in given[n]] for n in ("cls_scores", "bbox_preds")},
        }
        share = ssd_loss(**alone)
        counts = [int((explain_ssd_loss(**g, dtype=torch.float64).gt_index >= 0).sum()) for g in (given, alone)]
        difference = parts["classification"][image] * counts[0] - share["classification"][0] * counts[1]
        bounded = ssd_loss_given(explain_ssd_loss(**alone, dtype=torch.float64).gt_index, **alone, dtype=torch.float64)
        assert abs(difference) <= 2 * bounded["classification"].error[0] * counts[0]


# --------------------------------------------------------------------------------------------------- whole losses
HEADS: dict[str, dict[str, Any]] = {
    "retina": {},
    "rpn": {
        "class_loss": "sigmoid_cross_entropy",
        "box_loss": "smooth_l1",
        "beta": 1 / 9,
        "sampler": "random",
        "num": 24,
    },
    "softmax": {
        "class_loss": "cross_entropy",
        "box_loss": "smooth_l1",
        "stds": (0.1, 0.1, 0.2, 0.2),
        "pos_weight": 2.0,
    },
    "giou": {"box_loss": "giou", "reg_decoded_bbox": True, "box_loss_weight": 2.0, "gamma": 1.5, "alpha": 0.6},
    "weighted": {"class_loss": "sigmoid_cross_entropy", "class_weight": [1.0, 2.0, 0.5], "class_loss_weight": 0.3},
    "bordered": {
        "allowed_border": 4.0,
        "ignore_index": 1,
        "class_loss": "cross_entropy",
        "sampler": "random",
        "seed": 3,
    },
}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_its_terms_level_by_level(name: str) -> None:
    settings = HEADS[name]
    softmax = settings.get("class_loss") == "cross_entropy"
    columns = 4 if softmax else 3
    given = head(1, columns=columns)
    options = Options(**{n: v for n, v in settings.items() if n != "allowed_border"})
    inside = torch.ones(2, 78, dtype=torch.bool)
    rights, bottoms = given["image_shapes"][:, 1, None], given["image_shapes"][:, 0, None]
    level = torch.tensor([8] * 60 + [16] * 18)
    cell_x, cell_y = ((given["anchors"][:, i] + given["anchors"][:, i + 2]) / 2 for i in (0, 1))
    inside &= (cell_x < (rights / level).ceil() * level) & (cell_y < (bottoms / level).ceil() * level)
    if "allowed_border" in settings:
        far = given["image_shapes"].flip(1)[:, None] + 4.0
        inside &= (given["anchors"][:, :2] >= -4).all(-1) & (given["anchors"][:, 2:] < far).all(-1)
    gt_index = assign(given["anchors"], given["gt_boxes"], given["gt_valid"], inside).gt_index
    drawing = options.sampler == "random" and options.class_loss != "focal"
    positive, negative, _ = sample(
        gt_index, sampler="random" if drawing else "pseudo", seed=options.seed, num=options.num
    )
    made = targets(
        given["anchors"], gt_index, given["gt_boxes"], given["gt_labels"], positive, negative,
        num_classes=3, reg_decoded_bbox=options.reg_decoded_bbox, pos_weight=options.pos_weight, stds=options.stds,
    )  # fmt: skip
    divisor = int(made[4] + made[5]) if drawing else int(made[4])
    parts = loss(**given, **settings)
    for number, part in enumerate((slice(0, 60), slice(60, 78))):
        labels, label_weights, box_targets, box_weights = (t[:, part].flatten(0, 1) for t in made[:4])
        scores, deltas = rows(given["cls_scores"][number], columns), rows(given["bbox_preds"][number], 4)
        common: dict[str, Any] = {"avg_factor": divisor, "loss_weight": options.class_loss_weight}
        if options.class_loss == "focal":
            common |= {"gamma": options.gamma, "alpha": options.alpha}
        else:
            common |= {"class_weight": options.class_weight, "ignore_index": options.ignore_index}
        term = {"focal": "sigmoid_focal_loss"}.get(options.class_loss, options.class_loss)
        expected = getattr(anchor_head_terms, term)(scores, labels, label_weights, **common)
        assert torch.equal(parts["classification"][number], expected)
        if options.reg_decoded_bbox:
            deltas = decode(given["anchors"][part].repeat(2, 1), deltas, stds=options.stds)
        boxing: dict[str, Any] = {"avg_factor": divisor, "loss_weight": options.box_loss_weight}
        boxing |= {"beta": options.beta} if options.box_loss == "smooth_l1" else {}
        expected = getattr(anchor_head_box_terms, f"{options.box_loss}_loss")(
            deltas, box_targets, box_weights, **boxing
        )
        assert torch.equal(parts["box"][number], expected)
    assert torch.equal(parts["total"], parts["classification"].sum() + parts["box"].sum())


@pytest.mark.parametrize("name", HEADS)
def test_gradients_equal_finite_differences(name: str) -> None:
    columns = 4 if HEADS[name].get("class_loss") == "cross_entropy" else 3
    given = head(2, columns=columns)
    maps = [level.requires_grad_() for levels in ("cls_scores", "bbox_preds") for level in given[levels]]

    def total(*levels: Tensor) -> Tensor:
        return loss(**{**given, "cls_scores": list(levels[:2]), "bbox_preds": list(levels[2:])}, **HEADS[name])["total"]

    assert torch.autograd.gradcheck(total, maps, fast_mode=True)


def test_gradients_of_the_mined_loss_equal_finite_differences() -> None:
    given = head(3, columns=4, spread=3.0)
    maps = [level.requires_grad_() for levels in ("cls_scores", "bbox_preds") for level in given[levels]]

    def total(*levels: Tensor) -> Tensor:
        return ssd_loss(**{**given, "cls_scores": list(levels[:2]), "bbox_preds": list(levels[2:])})["total"]

    assert torch.autograd.gradcheck(total, maps, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_bounds_hold(name: str, dtype: torch.dtype) -> None:
    columns = 4 if HEADS[name].get("class_loss") == "cross_entropy" else 3
    given = head(4, columns=columns, dtype=dtype)
    for part in ("anchors", "gt_boxes"):
        given[part] = head(4, dtype=torch.float32)[part]
    parts = loss(**given, **HEADS[name])
    explanation = explain_loss(**given, **HEADS[name], dtype=dtype)
    bounded = loss_given(explanation.gt_index, **given, **HEADS[name], dtype=dtype)
    for part, value in parts.items():
        assert not outside(value, bounded[part].value, bounded[part].error).any()


def test_inputs_stay_as_they_are() -> None:
    given = head(5, columns=4)
    before = copy.deepcopy(given)
    loss(**given, class_loss="cross_entropy")
    ssd_loss(**given)
    for name, value in before.items():
        levels = value if isinstance(value, list) and isinstance(value[0], Tensor) else []
        assert all(torch.equal(a, b) for a, b in zip(levels, given[name], strict=bool(levels)))
        assert not isinstance(value, Tensor) or torch.equal(value, given[name])


def test_anchors_outside_train_nothing() -> None:
    given = head(6)
    given["pad_shapes"] = torch.tensor([[32, 40], [8, 8]])
    maps = [level.requires_grad_() for level in given["cls_scores"]]
    gradients = torch.autograd.grad(loss(**given)["total"], maps)
    assert gradients[0][1, :, 0, 0].any()
    assert not gradients[0][1, :, 1:].any()
    assert not gradients[0][1, :, :, 1:].any()


# --------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("function", [loss, ssd_loss])
def test_no_anchor_inside_raises(function: Any) -> None:
    given = one_cell(allowed_border=0.0, image_shapes=torch.tensor([[4, 4]]), cls_scores=[torch.zeros(1, 2, 2, 2)])
    with pytest.raises(UpstreamRaises) as caught:
        function(**given)
    assert caught.value.behaviour == "anchor_head.no-anchor-inside"
    assert "anchor_head.loss, image 0" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cls_scores", [torch.zeros(1, 1, 2, 3)]),
        ("cls_scores", [torch.zeros(1, 1, 2, 2)] * 2),
        ("bbox_preds", [torch.zeros(1, 3, 2, 2)]),
        ("bbox_preds", [torch.zeros(1, 6, 2, 2)]),
        ("bbox_preds", [torch.zeros(1, 8, 2, 2)]),
        ("anchors", torch.zeros(5, 4)),
    ],
)
def test_maps_and_anchors_must_fit(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"per level K\*C and K\*4 channels of one size H, W, and H\*W\*K anchors"):
        loss(**one_cell(**{name: value}))


def test_adding_ground_truths_raises_in_a_head() -> None:
    given = one_cell(class_loss="sigmoid_cross_entropy", sampler="random", add_gt_as_proposals=True)
    with pytest.raises(UpstreamRaises, match=r"anchor_head\.added-gt-needs-labels"):
        loss(**given)
    assert loss(**{**given, "class_loss": "focal"})["total"].isfinite()


def test_choices_are_checked() -> None:
    with pytest.raises(InputError, match=r"anchor_head.loss: class_loss: expected \{"):
        loss(**one_cell(class_loss="hinge"))
