"""Dataclasses as nested plain objects, which strict JSON can hold, and back: each value as its field is declared."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

__all__ = ["from_plain", "to_plain"]

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, numbers that JSON lacks as ``NaN``, ``Infinity`` and ``-Infinity``.

    Examples
    --------
    >>> to_plain({"sizes": (1, math.inf)})
    {'sizes': [1, 'Infinity']}
    """
    if is_dataclass(value):
        return {name: to_plain(item) for name, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def from_plain(kind: type[T], body: Mapping[str, Any]) -> T:
    """A dataclass from what `to_plain` gave; names that are no fields are left out.

    Parameters
    ----------
    kind : type
        Its fields are of strings, integers, floats, dataclasses, and lists, tuples and mappings of these.
    body : mapping

    Raises
    ------
    TypeError, ValueError, AttributeError
        If a value is of another type, or a field without default is missing.

    Examples
    --------
    >>> from detoracle.reports.record import Growth
    >>> body = to_plain(Growth("yolox.loss", "mine", "", "gts", "", 3, 1.0, math.inf))
    >>> from_plain(Growth, body).bytes_exponent
    inf
    """
    readers = _readers(cast(Hashable, kind))
    return kind(**{name: readers[name](value) for name, value in body.items() if name in readers})


@cache
def _readers(kind: Any) -> Mapping[str, Callable[[Any], Any]]:
    """How each field is read."""
    types = get_type_hints(kind)
    return {field.name: _reader(types[field.name]) for field in fields(kind)}


def _reader(declared: Any) -> Callable[[Any], Any]:
    kind, items = get_origin(declared), get_args(declared)
    if declared is float:
        return _number
    if is_dataclass(declared):
        return lambda value: from_plain(cast(type, declared), value)
    if kind is list:
        return _list(_reader(items[0]))
    if kind is tuple:
        every = _list(_reader(items[0]))
        return lambda value: tuple(every(value))
    return _exactly(dict if kind is not None else declared)


def _exactly(kind: type[T]) -> Callable[[Any], T]:
    def read(value: Any) -> T:
        if type(value) is not kind:
            raise TypeError(f"{value!r:.80} for {kind.__name__}")
        return value

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{value!r} for a number")
    return float(value)


def _list(item: Callable[[Any], T]) -> Callable[[Any], list[T]]:
    return lambda value: [item(one) for one in _exactly(list)(value)]
