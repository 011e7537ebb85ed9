from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.comparison import expect
from detoracle.properties.gradients import in_float64
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.rearranged import Rearranged
from detoracle.properties.systems import find_operation

LOGITS = torch.tensor([[150.0, 146.0, -3.0], [0.5, -0.25, 0.125], [-9.0, 9.0, 0.0]])
ONE_HOT = torch.eye(3)
LABELS = torch.tensor([0, 2, -1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.softmax(x, dim=-1),
        lambda x: x.softmax(1),
        lambda x: torch.log_softmax(x, dim=-1),
        lambda x: F.cross_entropy(x, LABELS, ignore_index=-1, reduction="none"),
        lambda x: F.cross_entropy(x, LABELS, torch.tensor([1.0, 2, 3]).to(x), ignore_index=-1, reduction="none"),
        lambda x: F.binary_cross_entropy_with_logits(x, ONE_HOT.to(x), reduction="none"),
        lambda x: F.binary_cross_entropy_with_logits(x, ONE_HOT.to(x), pos_weight=x.detach().abs(), reduction="none"),
    ],
)
def test_it_is_another_formula_for_the_same(function: Callable[[Tensor], Tensor]) -> None:
    usual, other = both(function, torch.float64)
    coarse, otherwise = both(function, torch.float32)
    assert not outside(other, usual, gradient_bound(usual, coarse)).any()
    assert not torch.equal(coarse, otherwise)


def both(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients by the usual formula, and by the other."""
    logits = LOGITS.to(dtype).requires_grad_()
    usual = torch.autograd.grad(function(logits).square().sum(), logits)[0]
    with Rearranged():
        loss = function(logits).square().sum()
    return usual, torch.autograd.grad(loss, logits)[0]


def judged(operation: str, *, off: float) -> str:
    """Verdict on a right loss written another way, its gradient off by a factor."""
    system, found = find_operation(operation)
    arguments = {"logits": LOGITS, "labels": LABELS.clamp(min=0), "reduction": "none"}
    with Rearranged():
        outcome = perform(found, found.oracle, arguments)
    gradient = outcome.gradients["logits"]
    assert gradient is not None
    return expect(system, found, arguments).judge(Outcome(outcome.outputs, {"logits": gradient * off})).status


@pytest.mark.parametrize("operation", ["anchor_head.cross_entropy", "anchor_head.sigmoid_cross_entropy"])
@pytest.mark.parametrize(("off", "status"), [(1.0, "equal"), (1.001, "different")])
def test_a_loss_may_be_written_another_way(operation: str, off: float, status: str) -> None:
    assert judged(operation, off=off) == status


def test_logits_of_hundreds_leave_an_error_that_the_published_formula_does_not_make() -> None:
    system, operation = find_operation("anchor_head.cross_entropy")
    arguments = {"logits": LOGITS[:1], "labels": torch.tensor([0]), "reduction": "none"}
    usual = perform(operation, operation.oracle, arguments).gradients["logits"]
    with Rearranged():
        rearranged = perform(operation, operation.oracle, arguments)
    gradient = rearranged.gradients["logits"]
    assert usual is not None
    assert gradient is not None
    exact = perform(operation, operation.oracle, in_float64(arguments)).gradients["logits"]
    assert exact is not None
    assert outside(gradient, exact, gradient_bound(exact, usual)).any()
    assert expect(system, operation, arguments).judge(rearranged).status == "equal"
