"""RTMDet's head: the network that predicts class logits and distances from feature maps.

Per level, a classification and a regression tower of 3x3 convolutions, each followed by batch normalisation and SiLU,
and a predictor at the end of each. All levels share the *convolutions* of the towers; normalisations and predictors are
their own. Parameters carry the published names, so that published weights load. Distances come out in pixels.

Source: OpenMMLab mmdetection 3.x ``RTMDetSepBNHead`` (Apache-2.0), described from its observed behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detoracle.reference.contract import operation
from detoracle.reference.errors import InputError
from detoracle.reference.rtmdet_points import SOURCE

__all__ = ["RTMDetSepBNHead", "joint_logits"]

_CLASS_PRIOR = 0.01  # class probability that a fresh head predicts
_LOGIT_EPS = 1e-5


@operation("rtmdet.joint_logits", kind="values", gradients=("class_logits", "objectness_logits"), source=SOURCE)
def joint_logits(class_logits: Tensor, objectness_logits: Tensor) -> Tensor:
    """Logit of the geometric mean of class and objectness probability.

    The probability and its complement are each limited to 1e-5 at least: the logit saturates at +-11.5129, and beyond
    that gradients vanish.

    Parameters
    ----------
    class_logits : Tensor (...) float
    objectness_logits : Tensor (...) float
        Broadcasts with the class logits.

    Returns
    -------
    logits : Tensor (...) float

    Examples
    --------
    >>> [round(v, 4) for v in joint_logits(torch.tensor([0.0, 2.0, 99.0]), torch.tensor([0.0, 2.0, 99.0])).tolist()]
    [0.0, 2.0, 11.5129]
    """
    mean: Tensor = _GeometricMean.apply(class_logits, objectness_logits)  # type: ignore[no-untyped-call]
    return _inverse_sigmoid(mean)


def _geometric_mean(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(torch.sigmoid(x) * torch.sigmoid(y))


def _inverse_sigmoid(probability: Tensor) -> Tensor:
    inner = torch.clamp(probability, min=0, max=1)
    return torch.log(torch.clamp(inner, min=_LOGIT_EPS) / torch.clamp(1 - inner, min=_LOGIT_EPS))


class _GeometricMean(torch.autograd.Function):
    """sqrt(sigmoid(x) * sigmoid(y)), whose own gradient stays finite where a sigmoid underflows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """Values."""
        mean = _geometric_mean(x, y)
        ctx.save_for_backward(x, y, mean)
        return mean

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients: that to x is mean * (1 - sigmoid(x)) / 2."""
        x, y, mean = ctx.saved_tensors
        half = grad_outputs[0] * mean / 2
        to_x, to_y = half * (1 - torch.sigmoid(x)), half * (1 - torch.sigmoid(y))
        return to_x.sum_to_size(x.shape), to_y.sum_to_size(y.shape)


def _block(in_channels: int, out_channels: int, kernel_size: int, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, SiLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out_channels, eps=0.001, momentum=0.03)
    return _named(conv=conv, bn=norm, activate=nn.SiLU())


def _named(**modules: nn.Module) -> nn.Sequential:
    block = nn.Sequential()
    for name, module in modules.items():
        block.add_module(name, module)
    return block


def _tower(in_channels: int, channels: int, depth: int, use_depthwise: bool) -> nn.Sequential:
    blocks = []
    for number in range(depth):
        width = channels if number else in_channels
        if use_depthwise:
            depthwise, pointwise = _block(width, width, 3, groups=width), _block(width, channels, 1)
            blocks.append(_named(depthwise_conv=depthwise, pointwise_conv=pointwise))
        else:
            blocks.append(_block(width, channels, 3))
    return nn.Sequential(*blocks)


class RTMDetSepBNHead(nn.Module):
    """Head of RTMDet, with batch normalisation separate for each level.

    Parameters
    ----------
    num_classes : int
        C.
    in_channels, feat_channels : int
        Channels of the feature maps and of the towers.
    stacked_convs : int
        Blocks of a tower.
    strides : sequence of int
        Pixels a cell, one a level.
    share_conv : bool
        All levels use the convolutions of the first; not with `use_depthwise`.
    with_objectness : bool
        Predict an objectness too, and combine it with the class logits (`joint_logits`).
    exp_on_reg : bool
        Distances are the exponential of the prediction, times the stride; otherwise the prediction times the stride.
    pred_kernel_size : int
        Kernel of the predictors, odd.
    use_depthwise : bool
        Blocks are a depthwise and a pointwise convolution.

    Raises
    ------
    InputError
        If settings do not go together.

    Notes
    -----
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` turns the normalisations into those of the published configuration.

    Examples
    --------
    >>> head = RTMDetSepBNHead(num_classes=3, in_channels=8, feat_channels=8)
    >>> logits, distances = head([torch.zeros(1, 8, n, n) for n in (8, 4, 2)])
    >>> logits[0].shape, distances[2].shape
    (torch.Size([1, 3, 8, 8]), torch.Size([1, 4, 2, 2]))
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 256,
        feat_channels: int = 256,
        stacked_convs: int = 2,
        strides: Sequence[int] = (8, 16, 32),
        share_conv: bool = True,
        with_objectness: bool = False,
        exp_on_reg: bool = True,
        pred_kernel_size: int = 1,
        use_depthwise: bool = False,
    ) -> None:
        super().__init__()
        if (share_conv and use_depthwise) or pred_kernel_size % 2 == 0:
            expected = "an odd pred_kernel_size, and not both share_conv and use_depthwise"
            got = f"pred_kernel_size={pred_kernel_size}, share_conv={share_conv}, use_depthwise={use_depthwise}"
            raise InputError("settings", expected=expected, got=got, where="RTMDetSepBNHead")
        self.strides, self.with_objectness, self.exp_on_reg = tuple(strides), with_objectness, exp_on_reg

        def towers() -> nn.ModuleList:
            levels = [_tower(in_channels, feat_channels, stacked_convs, use_depthwise) for _ in self.strides]
            if share_conv:
                for tower in levels[1:]:
                    for block, first in zip(tower, levels[0], strict=True):
                        block.conv = first.conv
            return nn.ModuleList(levels)

        def predictors(channels: int) -> nn.ModuleList:
            padding = pred_kernel_size // 2
            return nn.ModuleList(
                nn.Conv2d(feat_channels, channels, pred_kernel_size, padding=padding) for _ in self.strides
            )

        self.cls_convs, self.reg_convs = towers(), towers()
        self.rtm_cls, self.rtm_reg = predictors(num_classes), predictors(4)
        if with_objectness:
            self.rtm_obj = predictors(1)
        for name, parameter in self.rtm_cls.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, -math.log((1 - _CLASS_PRIOR) / _CLASS_PRIOR))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict from feature maps.

        Parameters
        ----------
        features : list of Tensor (B, in_channels, Hl, Wl)
            One a level.

        Returns
        -------
        class_logits : list of Tensor (B, C, Hl, Wl)
        distances : list of Tensor (B, 4, Hl, Wl)
            To the left, top, right and bottom side, in pixels.
        """
        if len(features) != len(self.strides):
            expected = f"{len(self.strides)} maps, one a stride"
            raise InputError("features", expected=expected, got=str(len(features)), where="RTMDetSepBNHead")
        class_logits, distances = [], []
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            regressed = self.reg_convs[level](feature)
            logits = self.rtm_cls[level](self.cls_convs[level](feature))
            if self.with_objectness:
                logits = joint_logits(logits, self.rtm_obj[level](regressed))
            distance = self.rtm_reg[level](regressed)
            class_logits.append(logits)
            distances.append((torch.exp(distance) if self.exp_on_reg else distance) * stride)
        return class_logits, distances
