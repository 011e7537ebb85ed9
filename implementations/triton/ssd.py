"""SSD in Triton kernels: no tensor of pairs, no sort, no wait for the device, and shapes that never depend on the data.

Arguments, results and their meaning are those of the operations in `detoracle.reference.ssd`. Matching and mining are
in `detoracle.implementations.triton.ssd_kernels`, the sums and the gradient of the loss in
`detoracle.implementations.triton.ssd_loss_kernels`. Everything is computed and summed in float32, from priors, boxes
and predictions of float32, bfloat16 or float16. Sums have a fixed order, and what programs combine out of order are
integers: a call repeats to the last bit. It reads nothing back and no shape depends on the data, so that a CUDA graph
can hold it.

What it trades: priors may be any boxes, so that each ground truth walks them all, in registers; mining has one program
an image, which walks its losses six times. Memory is some fifty bytes a prior beside the gradients, whatever the ground
truths and classes. Block sizes are fixed. Predictions are copied if they are not contiguous. Limits: fewer
than 2**16 images, fewer than 2**29 ground truths in all, padding included, and fewer than 2**29 priors in all.

Ties are broken as in the oracle. What differs from it: an image without ground truth is background and has no hard
negatives, and a batch without any costs 0; a class that does not exist fails in an assertion on the device; float64 is
refused. Losses are ranked as float32 numbers in half precision too; only where a row vanishes depends on the dtype.
The gradient cannot be differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from detoracle.implementations.registry import implements
from detoracle.implementations.triton import ssd_kernels as kernels
from detoracle.implementations.triton import ssd_loss_kernels as loss_kernels
from detoracle.implementations.triton.launching import AS_WRITTEN, check_runs, check_size
from detoracle.implementations.triton.ssd_kernels import Matching, Terms
from detoracle.implementations.triton.ssd_loss_kernels import Targets
from detoracle.reference.assignment import BACKGROUND, IGNORED, Assignment

__all__ = ["hard_negatives", "loss", "match"]

_VARIANCES = (0.1, 0.2)  # of centre offsets, of logarithms of sizes
_PRIORS, _MATCHED, _ROWS, _CLASSES = 1024, 128, 32, 32  # of one program at a time


# --------------------------------------------------------------------------------------------------------------- match
@implements("ssd.match", name="triton")
@torch.no_grad()
def match(
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    variances: Sequence[float] = _VARIANCES,
) -> Assignment:
    """Which ground truth each prior is trained towards.

    Raises
    ------
    InputError
        If the kernels cannot run where the priors are, or on their dtype, or there are more rows than can be addressed.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    ...     gt, label = torch.tensor([[[0.0, 0, 0.5, 0.4]]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> match(boxes, gt, label, label == 0).gt_index.tolist()
    [[0, -1]]
    """
    check_runs(priors, "priors", where="ssd.match")
    found = _match(priors, gt_boxes, gt_labels, gt_valid, threshold, variances, where="ssd.match")
    extra = {**found.extra, "loc_target": found.extra["loc_target"].to(priors.dtype)}
    return Assignment(found.gt_index, found.quality.to(priors.dtype), extra)


def _match(
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    threshold: float,
    variances: Sequence[float],
    *,
    where: str,
) -> Assignment:
    """Match in float32."""
    shape = images, number = len(gt_valid), len(priors)
    check_size(gt_boxes, "gt_boxes", images=images, rows=gt_valid.numel(), where=where)
    check_size(priors, "priors", images=images, rows=images * number, where=where)
    gt_index = torch.full(shape, BACKGROUND, device=priors.device)
    quality = priors.new_empty(shape, dtype=torch.float32)
    targets = {"loc_target": quality.new_empty(*shape, 4), "class_target": gt_index.new_zeros(shape)}
    if images and number:
        claimed = gt_index.int()
        given = Matching(
            priors.float().contiguous(), gt_boxes.float().contiguous(), gt_labels.contiguous(), gt_valid.contiguous(),
            number, gt_valid.shape[1],
        )  # fmt: skip
        if gt_valid.shape[1]:
            kernels.best_priors[gt_valid.numel(),](given, claimed, PRIORS=_PRIORS, **AS_WRITTEN)
        kernels.match[triton.cdiv(number, _MATCHED), images](
            given, claimed, gt_index, quality, targets["class_target"], targets["loc_target"], threshold, *variances,
            PRIORS=_MATCHED, **AS_WRITTEN,
        )  # fmt: skip
    return Assignment(gt_index, quality, targets)


# ------------------------------------------------------------------------------------------------------ hard negatives
@implements("ssd.hard_negatives", name="triton")
@torch.no_grad()
def hard_negatives(conf: Tensor, gt_index: Tensor, gt_labels: Tensor, *, neg_pos: int = 3) -> Assignment:
    """Background priors that train the class.

    Raises
    ------
    InputError
        If the kernels cannot run where the logits are, or on their dtype, or there are more rows than can be addressed.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     conf = torch.tensor([[[0.0, 9], [5, 0], [0, 5], [0, 1], [0, 2]]])
    ...     positive, label = torch.tensor([[0, -1, -1, -1, -1]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> hard_negatives(conf, positive, label, neg_pos=2).gt_index.tolist()
    [[0, -2, -1, -2, -1]]
    """
    check_runs(conf, "conf", where="ssd.hard_negatives")
    check_size(conf, "conf", images=len(conf), rows=gt_index.numel(), where="ssd.hard_negatives")
    class_target = F.pad(gt_labels.long() + 1, (1, 0)).gather(1, gt_index.long() + 1)
    _, negative, mining_loss = _mined(conf.contiguous(), class_target, neg_pos)
    others = torch.where(negative, BACKGROUND, IGNORED)
    return Assignment(gt_index.long().where(class_target > 0, others), mining_loss.to(conf.dtype))


def _mined(conf: Tensor, class_target: Tensor, neg_pos: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies of all priors, who is hardest, and the losses by which they are, 0 elsewhere; each (B, P)."""
    images, number, classes = conf.shape
    torch._assert_async(((class_target >= 0) & (class_target < classes)).all(), f"gt_labels: from -1 to {classes - 2}")
    entropy, mining_loss = (torch.empty_like(class_target, dtype=torch.float32) for _ in range(2))
    negative = torch.zeros_like(class_target, dtype=torch.bool)
    if conf.numel():
        terms, rows = Terms(torch.empty_like(entropy), entropy, class_target.contiguous()), images * number
        kernels.entropies[triton.cdiv(rows, _ROWS),](
            conf, terms, rows, classes, ROWS=_ROWS, CLASSES=_CLASSES, **AS_WRITTEN
        )
        kernels.mine[images,](
            terms, terms.largest.amax(), negative, mining_loss, _lowest(conf.dtype), neg_pos, number,
            PRIORS=_PRIORS, **AS_WRITTEN,
        )  # fmt: skip
    return entropy, negative, mining_loss


def _lowest(dtype: torch.dtype) -> float:
    """Logarithm of half the smallest number of a dtype: an exponential below it is nothing."""
    finfo = torch.finfo(dtype)
    return math.log(finfo.tiny) + math.log(finfo.eps / 2)


# ---------------------------------------------------------------------------------------------------------------- loss
@implements("ssd.loss", name="triton")
def loss(
    loc: Tensor,
    conf: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    threshold: float = 0.5,
    neg_pos: int = 3,
    variances: Sequence[float] = _VARIANCES,
) -> dict[str, Tensor]:
    """MultiBox loss: total, localisation, classification.

    Raises
    ------
    InputError
        If the kernels cannot run where the tensors are, or on their dtype, or there are more rows than can
        be addressed.

    Examples
    --------
    >>> with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    ...     boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    ...     gt, label = torch.tensor([[[0.0, 0, 0.5, 0.5]]]), torch.zeros(1, 1, dtype=torch.int64)
    ...     loc, conf = torch.zeros(1, 2, 4), torch.zeros(1, 2, 2)
    >>> parts = loss(loc, conf, boxes, gt, label, label == 0)
    >>> round(float(parts["classification"]), 4)
    1.3863
    """
    for name, tensor in (("loc", loc), ("conf", conf), ("priors", priors)):
        check_runs(tensor, name, where="ssd.loss")
    with torch.no_grad():
        matched = _match(priors, gt_boxes, gt_labels, gt_valid, threshold, variances, where="ssd.loss").extra
        entropy, negative, _ = _mined(conf.detach().contiguous(), matched["class_target"], neg_pos)
    targets = Targets(matched["loc_target"], matched["class_target"], negative)
    distance, entropies, positives = _Loss.apply(targets, entropy, loc, conf)  # type: ignore[no-untyped-call]
    positives = positives.where(gt_valid.any(), 1.0)
    localisation, classification = distance / positives, entropies / positives
    parts = {"total": localisation + classification, "localisation": localisation, "classification": classification}
    return {name: part.to(conf.dtype) for name, part in parts.items()}


class _Loss(torch.autograd.Function):
    """Sums of smooth L1 and cross entropies, and the number of positives, (3,); writes the gradients once."""

    @staticmethod
    def forward(ctx: Any, targets: Targets, entropy: Tensor, loc: Tensor, conf: Tensor) -> Tensor:
        """Sum."""
        ctx.save_for_backward(*targets, loc, conf)
        programs = triton.cdiv(entropy.numel(), _MATCHED)
        parts = entropy.new_zeros(programs, 3)
        if programs:
            loss_kernels.sums[programs,](
                loc.contiguous(), targets, entropy, parts, entropy.numel(), ROWS=_MATCHED, **AS_WRITTEN
            )
        return parts.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_sums: Tensor) -> tuple[None, None, Tensor, Tensor]:
        """Write."""
        *targets, loc, conf = ctx.saved_tensors
        to_loc, to_conf = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (loc, conf))
        rows, classes = len(conf.flatten(0, 1)), conf.shape[2]
        if rows:
            loss_kernels.gradients[triton.cdiv(rows, _ROWS),](
                loc.contiguous(), conf.contiguous(), Targets(*targets), to_sums.float().contiguous(), to_loc, to_conf,
                rows, classes, ROWS=_ROWS, CLASSES=_CLASSES, **AS_WRITTEN,
            )  # fmt: skip
        return None, None, to_loc, to_conf
