"""RTMDet, whose class loss is one compiled loop over all logits.

Arguments, results and what differs from the oracle: as in `detoracle.implementations.sparse.rtmdet`, whose code all the
rest is. What it trades: `detoracle.implementations.compiled` says it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detoracle.implementations.compiled.background import focal_background_loss
from detoracle.implementations.registry import implements
from detoracle.implementations.sparse import rtmdet as sparse

__all__ = ["loss"]


@implements("rtmdet.loss", name="compiled")
def loss(**arguments: Any) -> dict[str, Tensor]:
    """Training loss of a batch: total, and classification and box of each level; the operation's arguments, by keyword.

    Examples
    --------
    >>> import torch
    >>> gt, one = torch.tensor([[[1.0, 1, 15, 15]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> truths = {"gt_boxes": gt, "gt_labels": torch.zeros(1, 1, dtype=torch.int64), "gt_valid": one}
    >>> maps = {"class_logits": [torch.zeros(1, 1, 2, 2)], "distances": [torch.full((1, 4, 2, 2), 8.0)]}
    >>> [round(float(part), 4) for part in loss(**maps, strides=[8], **truths).values()]
    [0.9277, 0.5688, 0.3589]
    """
    return sparse.loss(**arguments, background=focal_background_loss)
