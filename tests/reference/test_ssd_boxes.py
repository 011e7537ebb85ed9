from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from detoracle.properties.bounds import VALUE_FACTOR, outside
from detoracle.reference import ssd, ssd_boxes
from detoracle.reference.errors import InputError
from detoracle.reference.rounding import Bounded

ONE_CELL: dict[str, Any] = {
    "image_size": 100,
    "feature_maps": [1],
    "steps": [100],
    "min_sizes": [20],
    "max_sizes": [45],
}
ONE_MAP: dict[str, Any] = {"image_size": 64, "feature_maps": [4], "steps": [16], "min_sizes": [22], "max_sizes": [36]}


# ------------------------------------------------------------------------------------------------------- priors
def test_priors_of_one_cell_are_small_square_large_square_then_ratios() -> None:
    cell: dict[str, Any] = {"image_size": 64, "feature_maps": [1], "steps": [64], "min_sizes": [16], "max_sizes": [64]}
    boxes = ssd.priors(**cell, aspect_ratios=[[4, 16]])
    sides = [[0.25, 0.25], [0.5, 0.5], [0.5, 0.125], [0.125, 0.5], [1.0, 0.0625], [0.0625, 1.0]]
    assert boxes.tolist() == [[0.5, 0.5, *side] for side in sides]


def test_priors_go_map_by_map_row_by_row_column_by_column() -> None:
    maps: dict[str, Any] = {
        "image_size": 64,
        "feature_maps": [2, 1],
        "steps": [32, 64],
        "min_sizes": [8, 16],
        "max_sizes": [16, 32],
    }
    boxes = ssd.priors(**maps, aspect_ratios=[[], []])
    assert boxes[::2, :2].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5]]
    assert boxes[::2, 2].tolist() == [0.125] * 4 + [0.25]


def test_published_settings_give_the_published_number_of_priors() -> None:
    voc, coco = ssd.priors(**ssd.VOC_SSD300), ssd.priors(**ssd.COCO_SSD300)
    assert len(voc) == len(coco) == 38**2 * 4 + (19**2 + 10**2 + 5**2) * 6 + (3**2 + 1) * 4
    assert torch.equal(voc, ssd.priors())
    assert torch.equal(voc[:, :2], coco[:, :2])
    assert voc[0, 2].item() == torch.tensor(30 / 300).item()
    assert coco[0, 2].item() == torch.tensor(21 / 300).item()


def test_the_step_and_not_the_map_divides_the_image() -> None:
    centres = ssd.priors(
        image_size=300, feature_maps=[3], steps=[128], min_sizes=[30], max_sizes=[60], aspect_ratios=[[]]
    )
    assert centres[::2, 0].tolist() == torch.tensor([64 / 300, 192 / 300, 1.0] * 3).tolist()


def test_clip_acts_on_centre_and_size() -> None:
    settings: dict[str, Any] = {**ONE_CELL, "min_sizes": [100], "max_sizes": [400], "aspect_ratios": [[4]]}
    assert ssd.priors(**settings).tolist() == [[0.5, 0.5, 1.0, 1.0]] * 2 + [[0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.5, 1.0]]
    assert ssd.priors(**settings, clip=False)[:, 2:].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 0.5], [0.5, 2.0]]


def test_like_gives_the_dtype() -> None:
    assert ssd.priors(like=torch.zeros((), dtype=torch.float64)).dtype == torch.float64
    assert ssd.priors().dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ overlap
def test_jaccard_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 4, 1]])
    b = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [2, 0, 4, 2], [1, 1, 3, 3]])
    third = torch.tensor(1.0) / 3
    assert ssd.jaccard(a, b).tolist() == [
        [1.0, 0.5, 0.0, (torch.tensor(1.0) / 7).item()],
        [third.item(), 0.5, third.item(), 0.0],
    ]


def test_swapped_corners_give_a_negative_area() -> None:
    box, swapped = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[4.0, 0, 3, 1], [4, 1, 3, 0]])
    assert ssd.jaccard(box, swapped).tolist() == [[0.0, 0.0]]
    assert ssd.jaccard(torch.tensor([[0.0, 0, 1, 1]]), swapped)[0].isnan().tolist() == [True, False]


def test_zero_areas_give_nan_only_together() -> None:
    point, box = torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[0.0, 0, 2, 2]])
    assert ssd.jaccard(point, point).isnan().item()
    assert ssd.jaccard(point, box).item() == 0.0


# ------------------------------------------------------------------------------------------------------- coding
def test_encode_by_hand() -> None:
    gt, prior = torch.tensor([[0.25, 0.5, 0.75, 1.0]]), torch.tensor([[0.25, 0.5, 0.25, 0.5]])
    assert ssd.encode(gt, prior, variances=(0.5, 0.25)).tolist() == [
        [2.0, 1.0, (torch.tensor(2.0).log() * 4).item(), 0.0]
    ]


def test_decode_inverts_encode() -> None:
    priors = ssd.priors(**ONE_MAP, aspect_ratios=[[2, 3]])
    generator = torch.Generator().manual_seed(1)
    centre, size = torch.rand(len(priors), 2, generator=generator), torch.rand(len(priors), 2, generator=generator)
    gt = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    exact_gt, exact_priors = (Bounded.exact(t, torch.float32) for t in (gt, priors))
    there: Any = ssd_boxes._encode(exact_gt, exact_priors, ssd_boxes.VARIANCES)
    back: Any = ssd_boxes._decode(there, priors, ssd_boxes.VARIANCES)
    offsets = ssd.encode(gt, priors)[None]
    assert not outside(ssd.decode(offsets, priors)[0], gt.double(), VALUE_FACTOR * back.error).any()
    rescaled = ssd.decode(offsets, priors, variances=(0.2, 0.2))[0]
    assert outside(rescaled, gt.double(), VALUE_FACTOR * back.error).any()


def test_an_overflowing_size_leaves_no_right_bottom_corner() -> None:
    left, top, right, bottom = ssd.decode(
        torch.tensor([[[0.0, 0.0, 500.0, 0.0]]]), torch.tensor([[0.25, 0.25, 0.5, 0.5]])
    )[0, 0].tolist()
    assert (left, top, bottom) == (-math.inf, 0.0, 0.5)
    assert math.isnan(right)  # the left corner plus the size


def test_degenerate_boxes_encode_to_infinity_and_nan() -> None:
    prior = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).expand(2, 4)
    line, swapped = ssd.encode(torch.tensor([[0.5, 0.25, 0.5, 0.75], [0.75, 0.25, 0.25, 0.75]]), prior)
    assert line[2].item() == -math.inf
    assert swapped[2].isnan().item()


def error_of_priors(**settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        ssd.priors(**settings)
    return caught.value


def test_bad_settings_of_priors_are_refused() -> None:
    lengths = error_of_priors(**{**ONE_CELL, "steps": [8, 16]}, aspect_ratios=[[2]])
    assert str(lengths) == "ssd.priors: feature_maps: expected settings one a map, got lengths [1, 2, 1, 1, 1]."
    negative = error_of_priors(**ONE_CELL, aspect_ratios=[[0.0]])
    assert str(negative) == "ssd.priors: settings: expected positive numbers, got 0.0."
    flat = error_of_priors(**ONE_CELL, aspect_ratios=[2])
    assert str(flat) == "ssd.priors: aspect_ratios: expected sequence of sequence of float, got [2] (list)."


@pytest.mark.parametrize("variances", [(0.1,), (0.1, -0.2)])
def test_bad_variances_are_refused(variances: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"ssd\.encode: variances: expected two positive numbers"):
        ssd.encode(torch.zeros(1, 4), torch.ones(1, 4), variances=variances)
    with pytest.raises(InputError, match=r"ssd\.decode: variances: expected two positive numbers"):
        ssd.decode(torch.zeros(1, 1, 4), torch.ones(1, 4), variances=variances)
