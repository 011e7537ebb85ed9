"""YOLOv8, whose class loss is one compiled loop over all logits.

Arguments, results and what differs from the oracle: as in `detoracle.implementations.sparse.yolov8`, whose code all the
rest is. What it trades: `detoracle.implementations.compiled` says it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detoracle.implementations.compiled.background import background_loss
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse import yolov8 as sparse

__all__ = ["loss"]


@implements("yolov8.loss", name="compiled")
def loss(**arguments: Any) -> dict[str, Tensor]:
    """Training loss of a batch: total, box, cls, dfl; the operation's arguments, by keyword.

    Examples
    --------
    >>> import torch
    >>> gt, one = torch.tensor([[[8.0, 8, 24, 24]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> truths = {"gt_boxes": gt, "gt_labels": torch.zeros(1, 1, dtype=torch.int64), "gt_valid": one}
    >>> parts = loss(raw=[torch.zeros(1, 65, 4, 4)], strides=[8], **truths)
    >>> {name: round(float(part), 4) for name, part in parts.items()}
    {'total': 5.5567, 'box': 0.0073, 'cls': 5.5452, 'dfl': 0.0041}
    """
    return sparse.loss(**arguments, background=background_loss)
