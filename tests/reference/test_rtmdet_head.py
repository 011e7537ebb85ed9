from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.properties.bounds import VALUE_FACTOR, outside
from detoracle.reference.errors import InputError
from detoracle.reference.explain.rtmdet import explain_joint_logits
from detoracle.reference.rtmdet_head import RTMDetSepBNHead, joint_logits

SMALL: dict[str, Any] = {"num_classes": 3, "in_channels": 4, "feat_channels": 6}


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, side, side + 1, generator=generator) for side in (8, 4, 2)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"with_objectness": True, "exp_on_reg": False},
        {"share_conv": False, "use_depthwise": True, "pred_kernel_size": 3, "stacked_convs": 1},
    ],
)
def test_shapes(settings: dict[str, Any]) -> None:
    logits, distances = RTMDetSepBNHead(**SMALL, **settings)(features())
    assert [tuple(t.shape) for t in logits] == [(2, 3, 8, 9), (2, 3, 4, 5), (2, 3, 2, 3)]
    assert [tuple(t.shape) for t in distances] == [(2, 4, 8, 9), (2, 4, 4, 5), (2, 4, 2, 3)]


def test_convolutions_are_shared_and_normalisations_are_not() -> None:
    head = RTMDetSepBNHead(**SMALL)
    for towers in (head.cls_convs, head.reg_convs):
        first, second, third = (dict(tower.named_parameters()) for tower in towers)
        for name, parameter in first.items():
            assert (second[name] is parameter) == (third[name] is parameter) == ("conv" in name)
    names = set(dict(head.named_parameters()))
    assert "cls_convs.0.1.conv.weight" in names
    assert "cls_convs.2.1.conv.weight" not in names
    assert "cls_convs.2.1.conv.weight" in head.state_dict()


def test_separate_convolutions() -> None:
    head = RTMDetSepBNHead(**SMALL, share_conv=False)
    names = set(dict(head.named_parameters()))
    assert {f"cls_convs.{level}.1.conv.weight" for level in range(3)} <= names


def test_one_convolution_trains_with_the_gradients_of_all_levels() -> None:
    head = RTMDetSepBNHead(**SMALL).eval()
    weight = dict(head.named_parameters())["reg_convs.0.0.conv.weight"]
    _, distances = head(features())
    parts = [torch.autograd.grad(level.log().sum(), weight, retain_graph=True)[0] for level in distances]
    assert all(part.any() for part in parts)
    (whole,) = torch.autograd.grad(sum(level.log().sum() for level in distances), weight)
    rounding = torch.finfo(torch.float32).eps * sum(level.numel() for level in distances)
    assert ((whole - torch.stack(parts).sum(0)).abs() <= rounding * torch.stack(parts).abs().sum(0)).all()


def test_distances_are_in_pixels() -> None:
    linear = RTMDetSepBNHead(**SMALL, exp_on_reg=False).eval()
    exponential = RTMDetSepBNHead(**SMALL, exp_on_reg=True).eval()
    exponential.load_state_dict(linear.state_dict())
    for stride, raw, distance in zip((8, 16, 32), linear(features())[1], exponential(features())[1], strict=True):
        assert torch.equal(distance, torch.exp(raw / stride) * stride)


def test_a_block_by_hand() -> None:
    """One 1-channel level of ones: each tower is a sum over 3 x 3 neighbours, normalised, and through SiLU."""
    head = RTMDetSepBNHead(
        num_classes=1, in_channels=1, feat_channels=1, stacked_convs=1, strides=(8,), exp_on_reg=False
    ).double()
    state = {name: torch.ones_like(tensor) for name, tensor in head.state_dict().items()}
    state |= {name: 0 * t for name, t in state.items() if "bias" in name or "mean" in name}
    state |= {name: t - 0.001 for name, t in state.items() if "var" in name}  # to which 0.001 is added
    head.load_state_dict(state)
    [logits], [distances] = head.eval()([torch.ones(1, 1, 3, 3, dtype=torch.float64)])
    neighbours = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]], dtype=torch.float64)
    assert torch.equal(logits[0, 0], torch.nn.functional.silu(neighbours))
    assert torch.equal(distances[0, 3], 8 * torch.nn.functional.silu(neighbours))


def test_a_fresh_head_predicts_one_percent() -> None:
    head = RTMDetSepBNHead(**SMALL)
    expected = torch.tensor(-math.log(99))
    biases = [parameter for name, parameter in head.rtm_cls.named_parameters() if "bias" in name]
    assert [torch.equal(bias, expected.expand(3)) for bias in biases] == [True] * 3


def test_statistics_move_slowly() -> None:
    head = RTMDetSepBNHead(**SMALL)
    norms = [m for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 0.001)}
    assert len(norms) == 2 * 2 * 3


@pytest.mark.parametrize("settings", [{"use_depthwise": True}, {"pred_kernel_size": 2}])
def test_settings_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"RTMDetSepBNHead: settings: expected an odd pred_kernel_size, and not both"):
        RTMDetSepBNHead(**SMALL, **settings)


def test_features_must_be_one_a_stride() -> None:
    with pytest.raises(InputError, match=r"features: expected 3 maps, one a stride, got 2"):
        RTMDetSepBNHead(**SMALL)(features()[:2])


# -------------------------------------------------------------------------------------------------- joint logits
def test_joint_logits_by_hand() -> None:
    x, y = torch.tensor([0.0, 2.0, -1.0, 3.0]), torch.tensor([0.0, 2.0, 1.0, -4.0])
    mean = ((1 / (1 + torch.exp(-x.double()))) * (1 / (1 + torch.exp(-y.double())))) ** 0.5
    bounded = explain_joint_logits(x, y)
    assert not outside(joint_logits(x, y), torch.log(mean / (1 - mean)), VALUE_FACTOR * bounded.error).any()


def test_joint_logits_saturate() -> None:
    far = torch.tensor([20.0, 1e4])
    limit = torch.log(torch.tensor(1.0) / torch.tensor(1e-5))
    assert torch.equal(joint_logits(far, far), limit.expand(2))
    assert torch.equal(joint_logits(-far, -far), -limit.expand(2))


def test_gradients_of_joint_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(joint_logits, (x, y))
    assert torch.autograd.gradcheck(joint_logits, (x, y[:, :1].detach().requires_grad_()))


def test_gradients_stay_finite_where_a_sigmoid_underflows() -> None:
    x = torch.tensor([200.0, -200.0, 100.0, -100.0], requires_grad=True)
    y = torch.tensor([-200.0, -200.0, 100.0, 100.0], requires_grad=True)
    gradients = torch.autograd.grad(joint_logits(x, y).sum(), (x, y))
    assert all(bool(g.isfinite().all()) for g in gradients)
