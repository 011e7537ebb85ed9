"""Faults of RTMDet's priors, boxes and assignment, and of what comes after."""

from __future__ import annotations

from detoracle.properties.faults import rtmdet_cost, rtmdet_loss, rtmdet_terms
from detoracle.properties.faults.fault import Fault

__all__ = ["FAULTS"]

_ASSIGNMENT: tuple[Fault, ...] = (
    # --------------------------------------------------------------------------------------------------- priors, boxes
    Fault(
        "rtmdet.priors-cells-and-pixels",
        "rtmdet.priors",
        "x = (column + offset) * stride_x",
        "x = column * stride_x + offset",
        "stage 1: the offset is in cells",
    ),
    Fault(
        "rtmdet.priors-columns-first",
        "rtmdet.priors",
        "for row in range(height):\n            for column in range(width):\n                x =",
        "for column in range(width):\n            for row in range(height):\n                x =",
        "C3: rows and columns swapped",
    ),
    Fault(
        "rtmdet.priors-one-stride",
        "rtmdet.priors",
        "y = (row + offset) * stride_y",
        "y = (row + offset) * stride_x",
        "stage 1: a stride along each axis",
    ),
    Fault(
        "rtmdet.priors-without-strides",
        "rtmdet.priors",
        "rows.append((x, y, stride_x, stride_y))",
        "rows.append((x, y, 1.0, 1.0))",
        "L9: wrong columns in the priors",
    ),
    Fault(
        "rtmdet.priors-stale",
        "rtmdet.priors",
        "return torch.tensor(rows) if like is None else like.new_tensor(rows)",
        "fresh = torch.tensor(rows) if like is None else like.new_tensor(rows)\n"
        "    return priors.__dict__.setdefault(len(sizes), fresh)",
        "L9: cached for another image size",
    ),
    Fault(
        "rtmdet.decode-widths",
        "rtmdet.decode",
        "right = points[:, 0] + distances[..., 2]",
        "right = left + distances[..., 2]",
        "C1: distances taken for a size",
    ),
    Fault(
        "rtmdet.decode-top-first",
        "rtmdet.decode",
        "left = points[:, 0] - distances[..., 0]\n    top = points[:, 1] - distances[..., 1]",
        "left = points[:, 0] - distances[..., 1]\n    top = points[:, 1] - distances[..., 0]",
        "stage 3: left before top",
    ),
    Fault(
        "rtmdet.decode-clip-swapped",
        "rtmdet.decode",
        "height, width = max_shape",
        "width, height = max_shape",
        "C3: height and width swapped",
    ),
    Fault(
        "rtmdet.decode-always-clipped",
        "rtmdet.decode",
        "left = points[:, 0] - distances[..., 0]\n",
        "left = (points[:, 0] - distances[..., 0]).clamp(min=0)\n",
        "stage 3: clipped only if asked for",
    ),
    Fault(
        "rtmdet.decode-half",
        "rtmdet.decode",
        "bottom = points[:, 1] + distances[..., 3]",
        "bottom = points[:, 1] + distances[..., 3].half().to(distances)",
        "D12: distances rounded to half precision",
    ),
    Fault(
        "rtmdet.decode-in-place",
        "rtmdet.decode",
        "    left = points[:, 0] - distances[..., 0]\n",
        "    distances.data.clamp_(max=16)\n    left = points[:, 0] - distances[..., 0]\n",
        "A1: the input is overwritten",
    ),
    Fault(
        "rtmdet.decode-detached",
        "rtmdet.decode",
        "top = points[:, 1] - distances[..., 1]\n",
        "top = points[:, 1] - distances[..., 1].detach()\n",
        "A4: no gradient to a side",
    ),
    Fault(
        "rtmdet.encode-no-lower-limit",
        "rtmdet.encode",
        "distances.clamp(min=0, max=max_distance - eps)",
        "distances.clamp(max=max_distance - eps)",
        "stage 3: 0 at least",
    ),
    Fault(
        "rtmdet.encode-margin",
        "rtmdet.encode",
        "max=max_distance - eps",
        "max=max_distance - 0.01",
        "C8: the margin of another system",
    ),
    Fault(
        "rtmdet.encode-always-limited",
        "rtmdet.encode",
        "distances = torch.stack([left, top, right, bottom], dim=-1)",
        "distances = torch.stack([left, top, right, bottom], dim=-1).clamp(min=0)",
        "stage 3: limited only if asked for",
    ),
    Fault(
        "rtmdet.encode-centre-form",
        "rtmdet.encode",
        "right = boxes[..., 2] - points[:, 0]",
        "right = boxes[..., 0] + boxes[..., 2] / 2 - points[:, 0]",
        "C1: centre form for corner form",
    ),
    # ------------------------------------------------------------------------------------------------------ candidates
    Fault(
        "rtmdet.candidates-edge",
        "rtmdet.candidates",
        "(x > left) & (y > top)",
        "(x >= left) & (y >= top)",
        "stage 4: strictly inside",
    ),
    Fault(
        "rtmdet.candidates-centre-form",
        "rtmdet.candidates",
        "(x < right) & (y < bottom)",
        "(x < left + right / 2) & (y < top + bottom / 2)",
        "C1: centre form for corner form",
    ),
    Fault(
        "rtmdet.candidates-swapped",
        "rtmdet.candidates",
        "x, y = priors[:, 0], priors[:, 1]",
        "x, y = priors[:, 1], priors[:, 0]",
        "C3: axes swapped",
    ),
    Fault(
        "rtmdet.candidates-of-last",
        "rtmdet.candidates",
        "candidate[image] |= ",
        "candidate[image] = ",
        "stage 4: inside any ground truth",
    ),
    Fault(
        "rtmdet.candidates-in-padding",
        "rtmdet.candidates",
        "candidate[image] &= inside[image]",
        "candidate[image] &= inside[image].any()",
        "C12: priors in the padding take part",
    ),
    Fault(
        "rtmdet.candidates-of-first-image",
        "rtmdet.candidates",
        "candidate[image] &= inside[image]",
        "candidate[image] &= inside[0]",
        "C12: every image has its own padding",
    ),
    # -------------------------------------------------------------------------------------------------------- matching
    Fault(
        "rtmdet.match-top-10",
        "rtmdet.dynamic_k_matching",
        "gt_valid: Tensor, *, topk: int = 13",
        "gt_valid: Tensor, *, topk: int = 10",
        "P5: the top-k of another system",
    ),
    Fault(
        "rtmdet.match-topk-fixed",
        "rtmdet.dynamic_k_matching",
        ".values[:topk]",
        ".values[:13]",
        "stage 4: the top-k that was asked for",
    ),
    Fault(
        "rtmdet.match-worst",
        "rtmdet.dynamic_k_matching",
        "sort(descending=True).values",
        "sort().values",
        "stage 4: the largest IoUs",
    ),
    Fault(
        "rtmdet.match-k-rounded",
        "rtmdet.dynamic_k_matching",
        "max(int(best), 1)",
        "max(round(float(best)), 1)",
        "N10: truncated",
    ),
    Fault(
        "rtmdet.match-k-zero",
        "rtmdet.dynamic_k_matching",
        "max(int(best), 1)",
        "int(best)",
        "stage 4: one claim at least",
    ),
    Fault(
        "rtmdet.match-nan-left-out",
        "rtmdet.dynamic_k_matching",
        "best = iou[image, g, anchors].sort",
        "best = iou[image, g, anchors].nan_to_num().sort",
        "N8: a NaN among the IoUs makes it one claim",
    ),
    Fault(
        "rtmdet.match-costliest",
        "rtmdet.dynamic_k_matching",
        "argsort(stable=True)[:k]",
        "argsort(stable=True, descending=True)[:k]",
        "stage 4: the smallest costs",
    ),
    Fault(
        "rtmdet.match-by-iou",
        "rtmdet.dynamic_k_matching",
        "cheapest = cost[image, g, anchors].argsort(stable=True)[:k]",
        "cheapest = iou[image, g, anchors].argsort(stable=True, descending=True)[:k]",
        "stage 4: claims by cost, not by IoU",
    ),
    Fault(
        "rtmdet.match-claimants-only",
        "rtmdet.dynamic_k_matching",
        "cheapest_of_all = cost[image, present, anchor].argmin()\n"
        "                gt_index[image, anchor] = present[int(cheapest_of_all)]",
        "cheapest = cost[image, claimants, anchor].argmin()\n"
        "                gt_index[image, anchor] = claimants[int(cheapest)]",
        "T4: over all ground truths, as published",
    ),
    Fault(
        "rtmdet.match-claims-counted-in-a-byte",
        "rtmdet.dynamic_k_matching",
        "if len(claimants) == 1:",
        "if (len(claimants) + 128) % 256 - 128 <= 1:",
        "T4: 128 claims on an anchor are -128 in eight bits",
    ),
    Fault(
        "rtmdet.match-conflict-by-iou",
        "rtmdet.dynamic_k_matching",
        "cost[image, present, anchor].argmin()",
        "iou[image, present, anchor].argmax()",
        "stage 4: the smallest cost",
    ),
    Fault(
        "rtmdet.match-first-wins",
        "rtmdet.dynamic_k_matching",
        "if len(claimants) == 1:",
        "if len(claimants) >= 1:",
        "stage 4: the smallest cost, not the first claim",
    ),
    Fault(
        "rtmdet.match-always-cheapest",
        "rtmdet.dynamic_k_matching",
        "if len(claimants) == 1:",
        "if len(claimants) == 0:",
        "stage 4: only what several claim goes to the cheapest",
    ),
    Fault(
        "rtmdet.match-padding-claims",
        "rtmdet.dynamic_k_matching",
        "present = _present(gt_valid[image])",
        "present = list(range(len(gt_valid[image])))",
        "L7: padding claims priors",
    ),
    Fault(
        "rtmdet.match-crowd-cut",
        "rtmdet.dynamic_k_matching",
        "present = _present(gt_valid[image])",
        "present = _present(gt_valid[image])[:128]",
        "M5: past a fixed number ground truths are lost",
    ),
    Fault(
        "rtmdet.match-arbitrary",
        "rtmdet.dynamic_k_matching",
        "anchors = candidate[image].nonzero().flatten()",
        "anchors = candidate[image].nonzero().flatten()\n"
        "        anchors = anchors if len(anchors) else torch.arange(candidate.shape[1])",
        "S14: without a candidate, an arbitrary prior",
    ),
    # ------------------------------------------------------------------------------------------------------ assignment
    Fault(
        "rtmdet.assign-padding-is-background",
        "rtmdet.assign",
        "gt_index[~inside] = IGNORED",
        "pass",
        "C12: priors in the padding train nothing",
    ),
    Fault(
        "rtmdet.assign-best-iou",
        "rtmdet.assign",
        "matched_iou = iou[image, gt_index[image, anchor], anchor]",
        "matched_iou = iou[image, :, anchor].max()",
        "stage 4: the IoU with the ground truth that it is given to",
    ),
    Fault(
        "rtmdet.assign-overlap-zero",
        "rtmdet.assign",
        "max_overlaps[image] = -1e8",
        "max_overlaps[image] = 0",
        "stage 4: -1e8 where nothing is matched",
    ),
    Fault(
        "rtmdet.assign-overlap-of-empty",
        "rtmdet.assign",
        "if candidate[image].any():",
        "if True:",
        "stage 4: 0 on the early return",
    ),
    Fault(
        "rtmdet.assign-masks-dropped",
        "rtmdet.assign",
        "gt_labels,\n        gt_valid,\n        gt_masks=gt_masks,\n        soft_center_radius",
        "gt_labels,\n        gt_valid,\n        soft_center_radius",
        "quirk: the mask's centre of mass, if there are masks",
    ),
    Fault(
        "rtmdet.assign-topk-dropped",
        "rtmdet.assign",
        "candidate, gt_valid, topk=topk)",
        "candidate, gt_valid)",
        "stage 4: the top-k that was asked for",
    ),
)

FAULTS: tuple[Fault, ...] = (*_ASSIGNMENT, *rtmdet_cost.FAULTS, *rtmdet_terms.FAULTS, *rtmdet_loss.FAULTS)
