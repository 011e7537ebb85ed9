"""The anchor head with focal loss, whose class loss is one compiled loop over all logits.

Arguments, results and what differs from the oracle: as in `detoracle.implementations.sparse.anchor_head`, whose code
all the rest is. What it trades: `detoracle.implementations.compiled` says it. Heads with another class loss, and box
deltas that are not finite, are left to `batched`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detoracle.implementations.compiled.background import focal_background_loss
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse import anchor_head as sparse

__all__ = ["loss"]


@implements("anchor_head.loss", name="compiled")
def loss(**arguments: Any) -> dict[str, Tensor]:
    """Loss per level: total, classification, box; the operation's arguments, by keyword.

    Examples
    --------
    >>> import torch
    >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 1, dtype=torch.bool)
    >>> maps = {"cls_scores": [torch.zeros(1, 1, 1, 1)], "bbox_preds": [torch.zeros(1, 4, 1, 1)]}
    >>> truths = {"gt_boxes": boxes[None], "gt_labels": torch.zeros(1, 1, dtype=torch.int64), "gt_valid": one}
    >>> shapes = dict.fromkeys(("image_shapes", "pad_shapes"), torch.tensor([[8, 8]]))
    >>> parts = loss(**maps, **truths, **shapes, anchors=boxes, strides=[8])
    >>> [round(float(parts[name]), 4) for name in ("classification", "box")]
    [0.0433, 0.0]
    """
    return sparse.loss(**arguments, background=focal_background_loss)
