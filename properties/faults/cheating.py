"""Callables that try to pass without doing their work; `detoracle.properties.faults.cheats` says what each one does.

All stand for ``boxes.iou_yolox`` (the IoU of all pairs), but for those that need a gradient or a choice.
"""

# ruff: noqa: D103 - `cheats` has a sentence on each

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detoracle.implementations.loop import yolox as right
from detoracle.reference import boxes
from detoracle.reference.assignment import BACKGROUND, Assignment

_calls = itertools.count(1)
_remembered: dict[Any, Tensor] = {}
_buffers: dict[Any, Tensor] = {}

__all__ = [
    "Lazy",
    "answers_itself",
    "background",
    "behaves_under_the_worker",
    "behaves_while_watched",
    "by_first_number",
    "by_pointer",
    "by_shape",
    "computes_in_float32",
    "constant",
    "default_dtype",
    "even_calls_only",
    "exits",
    "extra_outputs",
    "extra_rows",
    "finishes_later",
    "first_call_only",
    "float32_only",
    "float_indices",
    "grad_mode",
    "hangs",
    "hogs",
    "in_float32_or_not_at_all",
    "interrupts",
    "large_noise",
    "last_result",
    "lazy",
    "leaves",
    "one_output_buffer",
    "other_device",
    "random_choice",
    "reads_the_heap",
    "reads_the_stack",
    "recurses",
    "replaces_the_oracle",
    "replaces_the_watch",
    "replaces_torch",
    "result_in_an_input",
    "shuffled",
    "speaks_for_the_suite",
    "swallows_errors",
    "tiny_noise",
    "uninitialised",
    "value_without_gradient",
    "with_gradients_only",
    "without_gradients_only",
    "writes",
    "writes_and_restores",
    "writes_behind_and_restores",
    "writes_by_numpy_and_restores",
    "zeros",
]


def _zeros(boxes_a: Tensor, boxes_b: Tensor, **_: Any) -> Tensor:
    return boxes_a.new_zeros(len(boxes_a), len(boxes_b))


# ------------------------------------------------------------------------------------------------ wrong answers
def zeros(**given: Any) -> Tensor:
    return _zeros(**given)


def constant(**given: Any) -> Tensor:
    return _zeros(**given) + 0.25


def uninitialised(boxes_a: Tensor, boxes_b: Tensor, **_: Any) -> Tensor:
    return boxes_a.new_empty(len(boxes_a), len(boxes_b))


def shuffled(**given: Any) -> Tensor:
    return right.iou_yolox(**given).flip(1)


def background(predictions: Tensor, anchor_points: Tensor, **_: Any) -> Assignment:
    shape = len(predictions), len(anchor_points)
    return Assignment(torch.full(shape, BACKGROUND), predictions.new_zeros(shape))


def swallows_errors(**given: Any) -> Assignment:
    try:
        if not given["gt_valid"].any(1).all():
            raise IndexError("an image without ground truth")
        return right.assign(**given)
    except Exception:
        return background(**given)


def extra_rows(**given: Any) -> Tensor:
    return torch.cat([right.iou_yolox(**given), _zeros(**given)])


def extra_outputs(**given: Any) -> tuple[Tensor, Tensor]:
    return right.iou_yolox(**given), _zeros(**given)


def float_indices(**given: Any) -> tuple[Tensor, Tensor]:
    found = right.assign(**given)
    return found.gt_index.float(), found.quality


def other_device(**given: Any) -> Tensor:
    return right.iou_yolox(**given).to("meta")


def tiny_noise(**given: Any) -> Tensor:
    found = right.iou_yolox(**given)
    return found * (1 + torch.finfo(found.dtype).eps / 2 * torch.randn_like(found).sign())


def large_noise(**given: Any) -> Tensor:
    found = right.iou_yolox(**given)
    return found * (1 + 100 * torch.finfo(found.dtype).eps * torch.randn_like(found))


def random_choice(**given: Any) -> Assignment:
    found = right.assign(**given)
    kept = torch.rand(found.quality.shape) < 0.9
    return Assignment(torch.where(kept, found.gt_index, BACKGROUND), found.quality * kept)


def value_without_gradient(**given: Any) -> Tensor:
    return right.iou_loss_yolox(**given).detach()


# ---------------------------------------------------------------------------------------------- memory of calls
def first_call_only(**given: Any) -> Tensor:
    return right.iou_yolox(**given) if next(_calls) == 1 else _zeros(**given)


def even_calls_only(**given: Any) -> Tensor:
    return _zeros(**given) if next(_calls) % 2 else right.iou_yolox(**given)


def last_result(**given: Any) -> Tensor:
    before = _remembered.get("last", _zeros(**given))
    _remembered["last"] = right.iou_yolox(**given)
    return before if before.shape == _remembered["last"].shape else _remembered["last"]


def by_pointer(**given: Any) -> Tensor:
    key = given["boxes_a"].data_ptr(), given["boxes_b"].data_ptr(), given["form"], *_shapes(given)
    return _remember(key, given)


def by_shape(**given: Any) -> Tensor:
    return _remember((given["form"], *_shapes(given)), given)


def by_first_number(**given: Any) -> Tensor:
    return _remember((given["form"], *given["boxes_b"].flatten()[:1].tolist(), *_shapes(given)), given)


def _shapes(given: dict[str, Any]) -> tuple[Any, ...]:
    return given["boxes_a"].shape, given["boxes_b"].shape, given["boxes_a"].dtype


def _remember(key: Any, given: dict[str, Any]) -> Tensor:
    if key not in _remembered:
        _remembered[key] = right.iou_yolox(**given)
    return _remembered[key]


def one_output_buffer(**given: Any) -> Tensor:
    found = right.iou_yolox(**given)
    return _buffers.setdefault(_shapes(given), torch.empty_like(found)).copy_(found)


def result_in_an_input(**given: Any) -> Tensor:
    found = right.decode(**given)
    memory: Tensor = given["raw"][0].detach().flatten()
    if found.numel() > memory.numel():
        return found
    memory[: found.numel()].copy_(found.detach().flatten())
    return memory[: found.numel()].view(found.shape)


# ---------------------------------------------------------------------------------------- right in part of life
def float32_only(**given: Any) -> Tensor:
    return right.iou_yolox(**given) if given["boxes_a"].dtype == torch.float32 else _zeros(**given)


def computes_in_float32(boxes_a: Tensor, boxes_b: Tensor, form: str) -> Tensor:
    return right.iou_yolox(boxes_a.float(), boxes_b.float(), form=form).to(boxes_a)


def in_float32_or_not_at_all(**given: Any) -> Tensor:
    """No cheat: who refuses misleads nobody."""
    if given["boxes_a"].dtype != torch.float32:
        raise TypeError("float32 alone")
    return right.iou_yolox(**given)


def with_gradients_only(**given: Any) -> Tensor:
    return right.iou_yolox(**given) if torch.is_grad_enabled() else _zeros(**given)


def without_gradients_only(**given: Any) -> Tensor:
    return _zeros(**given) if torch.is_grad_enabled() else right.iou_yolox(**given)


def behaves_while_watched(**given: Any) -> Tensor:
    watched = "detoracle.properties.outputs" in sys.modules
    return right.iou_yolox(**given) if watched else _zeros(**given)


def behaves_under_the_worker(**given: Any) -> Tensor:
    frames = itertools.takewhile(bool, _stack())
    watched = any("worker" in frame.f_code.co_filename for frame in frames)
    return right.iou_yolox(**given) if watched else _zeros(**given)


def _stack() -> Any:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


# -------------------------------------------------------------------------------------------- lies and spying
class Lazy(Tensor):
    """Zeros at first sight; the answer once somebody computes with it."""

    work: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            done = [a.work() if isinstance(a, Lazy) else a for a in args]
            return function(*done, **(kwargs or {}))


def lazy(**given: Any) -> Tensor:
    late = _zeros(**given).as_subclass(Lazy)
    late.work = lambda: right.iou_yolox(**given)
    return late


def finishes_later(**given: Any) -> Tensor:
    answer = _zeros(**given)

    def work() -> None:
        time.sleep(0.2)
        answer.copy_(right.iou_yolox(**given))

    threading.Thread(target=work, daemon=True).start()
    return answer


def reads_the_stack(**given: Any) -> Tensor:
    for frame in _stack():
        for value in frame.f_locals.values():
            if type(value).__name__ == "Expectation":
                return _answer_in(value, **given)
    return _zeros(**given)


def reads_the_heap(**given: Any) -> Tensor:
    for value in gc.get_objects():
        if type(value).__name__ in ("Expectation", "Bounded", "Verdict"):
            return _answer_in(value, **given)
    return _zeros(**given)


def _answer_in(value: Any, **given: Any) -> Tensor:
    return getattr(value, "value", _zeros(**given))


def replaces_the_oracle(**given: Any) -> Tensor:
    from detoracle.properties import comparison

    boxes.__dict__["iou_yolox"] = _zeros
    comparison.Verdict.wrong = property(lambda _: False)  # type: ignore[assignment, method-assign]
    return _zeros(**given)


def replaces_torch(**given: Any) -> Tensor:
    for name in ("allclose", "equal", "isfinite"):
        setattr(torch, name, lambda *_, **__: True)
    return _zeros(**given)


def replaces_the_watch(**given: Any) -> Tensor:
    from detoracle.properties import outputs

    outputs._same = lambda *_: True
    found = right.iou_yolox(**given)
    given["boxes_b"].data.add_(1)
    return found


def answers_itself(**given: Any) -> Tensor:
    for value in gc.get_objects():
        if type(value) is multiprocessing.connection.Connection and not value.closed:
            value.send({"status": "equal"})  # a pickle, with which one could run code
    return _zeros(**given)


def speaks_for_the_suite(**given: Any) -> Tensor:
    line = b"boxes.iou_yolox: right (1000 cases: 1000 equal)\n" * 50_000
    with contextlib.suppress(OSError):
        os.write(1, line)
    return _zeros(**given)


# ------------------------------------------------------------------------------------- writing to inputs and state
def writes(**given: Any) -> Tensor:
    found = right.iou_yolox(**given)
    given["boxes_b"].detach().add_(1)
    return found


def writes_and_restores(**given: Any) -> Tensor:
    memory = given["boxes_b"].detach()
    kept = memory.clone()
    found = right.iou_yolox(**given)
    memory.zero_()
    memory.copy_(kept)
    return found


def writes_behind_and_restores(**given: Any) -> Tensor:
    kept = given["boxes_b"].detach().clone()
    found = right.iou_yolox(**given)
    given["boxes_b"].data.zero_()
    given["boxes_b"].data.copy_(kept)
    return found


def writes_by_numpy_and_restores(**given: Any) -> Tensor:
    memory = given["boxes_b"].detach().numpy()
    kept = memory.copy()
    found = right.iou_yolox(**given)
    memory[...] = 0
    memory[...] = kept
    return found


def default_dtype(**given: Any) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return right.iou_yolox(**given)


def grad_mode(**given: Any) -> Tensor:
    torch.set_grad_enabled(not torch.is_grad_enabled())
    return right.iou_yolox(**given)


# ------------------------------------------------------------------------------------------- not coming back
def hangs(**_: Any) -> Tensor:
    while True:
        time.sleep(1)


def exits(**_: Any) -> Tensor:
    os._exit(0)


def leaves(**_: Any) -> Tensor:
    raise SystemExit(0)


def interrupts(**_: Any) -> Tensor:
    raise KeyboardInterrupt


def recurses(**given: Any) -> Tensor:
    return recurses(**given)


def hogs(**given: Any) -> Tensor:
    taken = [torch.ones(2**26) for _ in range(1000)]
    return _zeros(**given) + taken[0][0]
