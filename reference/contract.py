"""What an operation is: one thing with one right answer, typed by its oracle's own docstring.

The *Parameters* and *Returns* sections of a public oracle function are the machine-readable contract. A line reads
``name : Tensor (B, A, 5+C) float`` (or ``list of Tensor (...) kind``, ``sequence of int``, ``float``, ``bool``,
``int``, ``str``, ``{"one", "two"}``, each with ``or None``), so that what people read is what `check_arguments` checks
and what ``describe`` prints. Dimensions are names, numbers or sums; one name has one size throughout a call, but for
those that end in a lower-case ``l``, which vary from level to level. A leading ``...`` stands for any dimensions, none
included.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from detoracle.reference.errors import InputError

__all__ = [
    "Argument",
    "Kind",
    "Operation",
    "arguments_of",
    "check_arguments",
    "operation",
    "operations_in",
    "rank_fits",
    "returns_of",
    "unchecked",
]

Kind = Literal["values", "assignment", "loss"]
P = ParamSpec("P")
R = TypeVar("R")

_FIELD = re.compile(r"^(?P<name>\w+) : (?P<type>.+)$")
_TENSOR = re.compile(r"^(?P<list>list of )?Tensor \((?P<shape>[^)]*)\) (?P<dtype>float|int|bool)$")


@dataclass(frozen=True)
class Argument:
    """One input or output, as its docstring line states it.

    Attributes
    ----------
    name : str
    type : str
        The whole type as written.
    meaning : str
        The text below the line: units and explanation.
    optional : bool
        May be None.
    """

    name: str
    type: str
    meaning: str
    optional: bool

    @property
    def tensor(self) -> tuple[tuple[str, ...], str, bool] | None:
        """Shape, dtype kind and whether it is a list of tensors; None when it is no tensor."""
        match = _TENSOR.match(self.type)
        if match is None:
            return None
        shape = tuple(d.strip() for d in match["shape"].split(",") if d.strip())
        return shape, match["dtype"], match["list"] is not None


@dataclass(frozen=True)
class Operation:
    """One thing with one right answer.

    Attributes
    ----------
    name : str
        ``system.operation``.
    oracle : callable
        Takes the documented arguments by keyword.
    kind : {"values", "assignment", "loss"}
        How results are compared.
    gradients : tuple of str
        Inputs that receive a gradient from the first output (for a loss: from ``total``).
    explain : callable or None
        For an assignment: same arguments, returns an `Explanation`.
    source : str
        Whose published behaviour it states.
    """

    name: str
    oracle: Callable[..., Any]
    kind: Kind
    gradients: tuple[str, ...]
    explain: Callable[..., Any] | None
    source: str

    @property
    def system(self) -> str:
        """Part of the name before the dot."""
        return self.name.partition(".")[0]


def operation(
    name: str, *, kind: Kind, source: str, gradients: tuple[str, ...] = (), explain: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a public oracle function an operation and check its arguments at every call.

    Examples
    --------
    >>> from detoracle.reference import yolox
    >>> [op.name for op in operations_in(yolox)][0]
    'yolox.decode'
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            check_arguments(function, bound.arguments, where=name)
            return function(*args, **kwargs)

        checked.operation = Operation(name, checked, kind, gradients, explain, source)  # type: ignore[attr-defined]
        return checked

    return declare


def operations_in(module: ModuleType) -> tuple[Operation, ...]:
    """Public operations of a module, in the order in which it defines them.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> "boxes.iou_yolox" in [op.name for op in operations_in(boxes)]
    True
    """
    functions = (value for name, value in vars(module).items() if name in module.__all__)
    return tuple(f.operation for f in functions if isinstance(getattr(f, "operation", None), Operation))


def unchecked(function: Callable[P, R]) -> Callable[P, R]:
    """Function behind an operation, for arguments that are checked already or that are bounded.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> from detoracle.reference.rounding import Bounded
    >>> corners = Bounded.exact(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.float32)
    >>> unchecked(boxes.iou_yolox)(corners, corners, form="xyxy").value.tolist()
    [[1.0]]
    """
    plain: Callable[P, R] = vars(function)["__wrapped__"]
    return plain


def arguments_of(function: Callable[..., Any]) -> tuple[Argument, ...]:
    """Inputs of a public oracle function, read from its docstring.

    Examples
    --------
    >>> from detoracle.reference import yolox
    >>> arguments_of(yolox.decode)[0].type
    'list of Tensor (B, 5+C, Hl, Wl) float'
    """
    return _section(inspect.unwrap(function), "Parameters")


def returns_of(function: Callable[..., Any]) -> tuple[Argument, ...]:
    """Outputs of a public oracle function, read from its docstring.

    Examples
    --------
    >>> from detoracle.reference import yolox
    >>> [r.name for r in returns_of(yolox.assign)]
    ['gt_index', 'quality', 'dynamic_k']
    """
    return _section(inspect.unwrap(function), "Returns")


@cache
def _section(function: Callable[..., Any], title: str) -> tuple[Argument, ...]:
    lines = inspect.cleandoc(function.__doc__ or "").splitlines()
    try:
        start = lines.index(title) + 2
    except ValueError:
        return ()
    found: list[tuple[str, str, list[str]]] = []
    for number in range(start, len(lines)):
        line = lines[number]
        if number + 1 < len(lines) and line and set(lines[number + 1]) == {"-"}:
            break
        match = _FIELD.match(line)
        if match:
            found.append((match["name"], match["type"], []))
        elif found and line.strip():
            found[-1][2].append(line.strip())
    return tuple(
        Argument(name, type_.removesuffix(" or None"), " ".join(text), type_.endswith(" or None"))
        for name, type_, text in found
    )


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], *, where: str) -> dict[str, int]:
    """Check arguments against the function's documented contract.

    Parameters
    ----------
    function : callable
        A public oracle function.
    given : mapping of str to object
        Arguments by name.
    where : str
        Operation named in the error.

    Returns
    -------
    dict of str to int
        Size of every named dimension.

    Raises
    ------
    InputError
        If a shape, dtype, device, type or choice is not as documented.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> check_arguments(
    ...     boxes.iou_yolox, {"boxes_a": torch.zeros(2, 4), "boxes_b": torch.zeros(3, 4), "form": "xyxy"}, where="here"
    ... )
    {'G': 2, 'N': 3}
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    for argument in arguments_of(function):
        if argument.name not in given:
            raise InputError(argument.name, expected=argument.type, got="nothing", where=where)
        value = given[argument.name]
        if value is None and argument.optional:
            continue
        if argument.tensor is None:
            _check_plain(argument, value, where)
            continue
        shape, kind, is_list = argument.tensor
        if is_list and (not isinstance(value, Sequence) or not value):
            raise InputError(argument.name, expected=f"a non-empty {argument.type}", got=_shown(value), where=where)
        for number, tensor in enumerate(value if is_list else [value]):
            name = f"{argument.name}[{number}]" if is_list else argument.name
            _check_tensor(name, tensor, shape, kind, sizes, where)
            if device is not None and tensor.device != device:
                raise InputError(
                    name, expected=f"device {device}, like the others", got=str(tensor.device), where=where
                )
            device = tensor.device
            sizes = {n: s for n, s in sizes.items() if not n.endswith("l")}
    return sizes


def _check_tensor(
    name: str, tensor: object, shape: tuple[str, ...], kind: str, sizes: dict[str, int], where: str
) -> None:
    expected = f"a {kind} Tensor of shape ({', '.join(shape)})"
    known = {n: s for n, s in sizes.items() if any(n in d for d in shape)}
    if known:
        expected += f" with {', '.join(f'{n}={s}' for n, s in known.items())}"
    if not isinstance(tensor, Tensor):
        raise InputError(name, expected=expected, got=_shown(tensor), where=where)
    right_kind = {
        "float": tensor.is_floating_point(),
        "bool": tensor.dtype == torch.bool,
        "int": tensor.dtype in (torch.int64, torch.int32),
    }[kind]
    if not right_kind or not rank_fits(shape, tensor.ndim):
        raise InputError(name, expected=expected, got=_shown(tensor), where=where)
    trailing = [dimension for dimension in shape if dimension != "..."]
    for dimension, size in zip(trailing, tensor.shape[tensor.ndim - len(trailing) :], strict=True):
        if not _fits(dimension, size, sizes):
            raise InputError(name, expected=expected, got=_shown(tensor), where=where)


def rank_fits(shape: Sequence[str], ndim: int) -> bool:
    """Is a number of dimensions right for a documented shape?

    Examples
    --------
    >>> rank_fits(("...", "4"), 3), rank_fits(("B", "4"), 3)
    (True, False)
    """
    return ndim >= len(shape) - 1 if "..." in shape else ndim == len(shape)


def _fits(dimension: str, size: int, sizes: dict[str, int]) -> bool:
    """Does a size fit ``4``, ``A``, ``5+C`` or ``4*R+C``? A single unknown name is learnt from it."""
    unknown = [n for n in re.findall(r"[A-Za-z]\w*", dimension) if n not in sizes]
    if not unknown:
        return _evaluate(dimension, sizes) == size
    if len(unknown) > 1:
        return True
    offset = _evaluate(dimension, {**sizes, unknown[0]: 0})
    factor = _evaluate(dimension, {**sizes, unknown[0]: 1}) - offset
    solved, rest = divmod(size - offset, factor)
    if rest or solved < 0:
        return False
    sizes[unknown[0]] = solved
    return True


def _evaluate(dimension: str, sizes: Mapping[str, int]) -> int:
    total = 0
    for term in dimension.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.strip().isdigit() else sizes[factor.strip()]
        total += product
    return total


def _check_plain(argument: Argument, value: object, where: str) -> None:
    if not _is_plain(argument.type, value):
        raise InputError(argument.name, expected=argument.type, got=_shown(value), where=where)


def _is_plain(kind: str, value: object) -> bool:
    """Is a value what a type that is no tensor says? Sequences may be nested; unknown types take anything."""
    if kind.startswith("{"):
        return value in [choice.strip().strip("\"'") for choice in kind.strip("{}").split(",")]
    if kind.startswith("sequence of "):
        inner = kind.removeprefix("sequence of ")
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_plain(inner, v) for v in value)
    numbers: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    return kind not in numbers or isinstance(value, numbers[kind])


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} Tensor of shape {tuple(value.shape)}"
    return f"{value!r:.80} ({type(value).__name__})"
