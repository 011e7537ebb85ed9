from __future__ import annotations

import torch

from detoracle.properties.sampling import box_with_iou, quantile
from detoracle.reference.boxes import iou_yolox


def test_box_has_the_iou_asked_for() -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.tensor([[-30.0, 12, 50, 31]], dtype=torch.float64).expand(2000, 4)
    wanted = torch.linspace(0.02, 1, 2000, dtype=torch.float64)
    boxes = box_with_iou(target, wanted, generator=generator)
    got = iou_yolox(target[:1], boxes, form="xyxy")[0]
    roundings = 64  # operations between the IoU asked for and the one measured, the widest box included
    assert ((got - wanted).abs() <= roundings * torch.finfo(torch.float64).eps).all()
    size, wanted_size = boxes[:, 2:] - boxes[:, :2], target[:, 2:] - target[:, :2]
    assert (size > wanted_size).any(0).all()
    assert (size < wanted_size).any(0).all()
    assert (boxes[:-1] != target[:-1]).any(1).all()


def test_quantile_meets_its_knots() -> None:
    knots = ((0.0, 0.25, 1.0), (-4.0, 8.0, 11.0))
    assert quantile(knots, torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0])).tolist() == [-4.0, 2.0, 8.0, 9.0, 11.0]
