"""Run a callable on fresh copies of its arguments, and put whatever it returns into the contract's form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.memory import Place, fresh, laid_out
from detoracle.reference.assignment import Assignment
from detoracle.reference.contract import Argument, Operation, rank_fits, returns_of
from detoracle.reference.errors import InputError

__all__ = ["Outcome", "cotangent", "listed", "normalised", "perform"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one call did.

    Attributes
    ----------
    outputs : dict of str to Tensor
        By the contract's names, detached.
    gradients : dict of str to Tensor or None
        By input name (``raw[0]`` for lists); None where no gradient arrived.
    problem : str
        ``raised``, ``timeout``, ``contract`` or ``mutated-input``; empty if the call went well.
    message : str
        What the problem was.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    problem: str = ""
    message: str = ""


def perform(
    operation: Operation,
    call: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    place: Place = fresh,
    grad: bool = True,
) -> Outcome:
    """Call an implementation on copies of the arguments; gather outputs and gradients; watch what it must not touch.

    Parameters
    ----------
    operation : Operation
    call : callable
    arguments : mapping
        By the oracle's parameter names.
    place : callable
        Copies each input, flattened.
    grad : bool
        Ask for gradients; else the call is made under `torch.no_grad`.

    Returns
    -------
    Outcome
        Whatever the callable raises becomes the outcome ``raised``.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> perform(boxes.iou_yolox.operation, boxes.iou_yolox, pair).outputs["iou"].tolist()
    [[1.0]]
    >>> perform(boxes.iou_yolox.operation, lambda **_: 1 / 0, pair).message
    'ZeroDivisionError: division by zero'
    """
    given = {name: _copied(value, place) for name, value in arguments.items()}
    watched = dict(_tensors(given))
    before = {name: (tensor.clone(), tensor._version) for name, tensor in watched.items()}
    lists = [(name, value, list(value)) for name, value in given.items() if isinstance(value, list)]
    leaves = {name: t for name, t in watched.items() if grad and name.partition("[")[0] in operation.gradients}
    for tensor in leaves.values():
        tensor.requires_grad_()
    try:
        with torch.set_grad_enabled(grad), _torch_untouched():
            outputs = normalised(operation, call(**given))
        gradients = _gradients(operation, outputs, leaves)
    except InputError as error:
        return Outcome(problem="contract" if error.where == "output" else "raised", message=str(error))
    except Exception as error:  # a stranger's code may raise anything; it is this call's outcome, not ours
        return Outcome(problem="raised", message=f"{type(error).__name__}: {error}"[:2000])
    for name, tensor in watched.items():
        original, version = before[name]
        if tensor._version != version or not _same(tensor.detach(), original):
            return Outcome(problem="mutated-input", message=f"{name} was written to")
    for name, value, before_call in lists:
        if len(value) != len(before_call) or any(new is not old for new, old in zip(value, before_call, strict=True)):
            return Outcome(problem="mutated-input", message=f"the list {name} was written to")
    return Outcome({name: output.detach() for name, output in outputs.items()}, gradients)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, lambda d: torch.set_default_device(None if d.type == "cpu" else d)),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}
"""PyTorch's process-wide settings, and how each is read and set."""


@contextmanager
def _torch_untouched() -> Iterator[None]:
    """Undo changes of PyTorch's settings, and refuse a call that leaves one."""
    before = {name: read() for name, (read, _) in _SETTINGS.items()}
    try:
        yield
    finally:
        after = {name: read() for name, (read, _) in _SETTINGS.items()}
        changed = [name for name in _SETTINGS if after[name] != before[name]]
        for name in changed:
            _SETTINGS[name][1](before[name])
    if changed:
        name = changed[0]
        raise InputError(f"PyTorch's {name}", expected=str(before[name]), got=str(after[name]), where="output")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _copied(value: Any, place: Place) -> Any:
    if isinstance(value, Tensor):
        return laid_out(value, place)
    return [_copied(v, place) for v in value] if isinstance(value, list) else copy.deepcopy(value)


def _tensors(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, list):
            found += [(f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, Tensor)]
    return found


def cotangent(output: Tensor) -> Tensor:
    """Fixed weights for the gradient of a tensor output: no two elements alike, so that swapped ones show.

    Examples
    --------
    >>> cotangent(torch.zeros(3)).tolist()
    [0.5, 1.0, 1.5]
    """
    return torch.linspace(0.5, 1.5, max(output.numel(), 1), device=output.device, dtype=output.dtype)[
        : output.numel()
    ].reshape(output.shape)


def _gradients(
    operation: Operation, outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    if not leaves:
        return {}
    first = outputs[returns_of(operation.oracle)[0].name]
    if not first.requires_grad:
        return dict.fromkeys(leaves)
    grads = torch.autograd.grad(
        first, list(leaves.values()), cotangent(first) if first.ndim else None, allow_unused=True
    )
    return dict(zip(leaves, grads, strict=True))


def normalised(operation: Operation, returned: Any) -> dict[str, Tensor]:
    """Name an implementation's outputs.

    It may return an `Assignment`, a mapping, a tensor, a tuple in the documented order, or any object with such
    attributes; of a single documented list, its items are named ``anchors[0]``, ``anchors[1]``, ...

    Raises
    ------
    InputError
        With ``where="output"``, if something documented is missing, unknown, or no tensor of the documented kind.

    Examples
    --------
    >>> from detoracle.reference import yolox
    >>> pair = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
    >>> sorted(normalised(yolox.assign.operation, pair))
    ['gt_index', 'quality']
    """
    documented = returns_of(operation.oracle)
    names = [output.name for output in documented]
    if (items := listed(operation, returned)) is not None:
        for name, item in items.items():
            _check_output(replace(documented[0], name=name, type=documented[0].type.removeprefix("list of ")), item)
        return items
    found = _named(returned, names)
    wanted = ", ".join(f"{o.name}: {o.type}" for o in documented if not o.optional)
    for output in documented:
        if found.get(output.name) is None:
            if not output.optional:
                raise InputError(
                    output.name, expected=wanted, got=f"{type(returned).__name__} without it", where="output"
                )
            found.pop(output.name, None)
        else:
            _check_output(output, found[output.name])
    return found


def listed(operation: Operation, returned: Any) -> dict[str, Any] | None:
    """Items of an output that is documented as one list, by name; None if it is not, or no list came.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> listed(boxes.iou_yolox.operation, [1, 2]) is None
    True
    """
    documented = returns_of(operation.oracle)
    if len(documented) != 1 or not documented[0].type.startswith("list of ") or not isinstance(returned, list | tuple):
        return None
    return {f"{documented[0].name}[{number}]": item for number, item in enumerate(returned)}


def _named(returned: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(returned, Assignment):
        return {name: value for name, value in {**returned.extra, **_fields(returned)}.items() if name in names}
    if isinstance(returned, Tensor):
        return {names[0]: returned}
    if isinstance(returned, Mapping):
        unknown = sorted(set(map(str, returned)) - set(names))
        if unknown:
            raise InputError(
                "outputs", expected=f"only {', '.join(names)}", got=f"also {', '.join(unknown)}", where="output"
            )
        return dict(returned)
    if isinstance(returned, tuple | list):
        if len(returned) > len(names):
            raise InputError("outputs", expected=f"at most {len(names)}", got=str(len(returned)), where="output")
        return dict(zip(names, returned, strict=False))
    return {name: getattr(returned, name) for name in names if hasattr(returned, name)}


def _fields(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _check_output(output: Argument, value: Any) -> None:
    shape, kind, _ = output.tensor or ((), "float", False)
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        # A subclass could still be working, or answer as it is asked; a plain tensor is what it is.
        got = f"{type(value).__name__}{f' of layout {value.layout}' if isinstance(value, Tensor) else ''}"
        raise InputError(output.name, expected=output.type, got=got, where="output")
    right = {
        "float": value.is_floating_point(),
        "bool": value.dtype == torch.bool,
        "int": value.dtype in (torch.int64, torch.int32),
    }[kind]
    if not right or not rank_fits(shape, value.ndim):
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise InputError(output.name, expected=output.type, got=got, where="output")
