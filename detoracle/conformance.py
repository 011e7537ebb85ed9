"""The mark that makes pytest judge what a fixture returns; `detoracle.pytest_plugin` acts on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["conforms"]

T = TypeVar("T")


def conforms(operation: str) -> Callable[[T], T]:
    """Judge the callable that a fixture returns: one test for each clause of an operation.

    Put it on a fixture, above or below ``@pytest.fixture``, in any test file, ``conftest.py`` excepted. A fixture
    ``assigner`` gets the tests ``assigner_conforms[yolov8.assign[outcome]]`` and so on, of each of its parameters if it
    has some, and remains a fixture that other tests may request.

    Parameters
    ----------
    operation : str
        Such as ``yolov8.assign``; ``detoracle list`` names them, ``detoracle describe`` says what a callable takes and
        returns.

    Returns
    -------
    callable
        Marks the fixture and returns it.

    Examples
    --------
    >>> import pytest
    >>> @conforms("yolox.decode")
    ... @pytest.fixture
    ... def decoder():
    ...     return lambda *, raw, strides: ...
    >>> decoder.conforms
    ('yolox.decode',)
    """

    def mark(fixture: T) -> T:
        fixture.conforms = (*getattr(fixture, "conforms", ()), operation)  # type: ignore[attr-defined]
        return fixture

    return mark
