"""Every example in a docstring, and in README.md, runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import io
from pathlib import Path

import pytest

from detoracle.implementations.compiled import unavailable

ROOT = Path(__file__).parents[1]
ROOMS = ["detoracle", "detoracle.reference", "detoracle.implementations", "detoracle.properties", "detoracle.reports"]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _modules() -> set[str]:
    names = set()
    for room in ROOMS:
        folder = Path(importlib.import_module(room).__path__[0])
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            names.add(".".join([room, *parts]).removesuffix(".__init__"))
    return names


def _tests() -> list[doctest.DocTest]:
    # Pytest's own collection would import the rooms' files a second time, under their folders' names.
    readme = ROOT / "README.md"
    tests = [doctest.DocTestParser().get_doctest(readme.read_text("utf-8"), {}, readme.name, str(readme), 0)]
    for name in sorted(_modules()):
        tests += doctest.DocTestFinder().find(importlib.import_module(name), name)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("test", [pytest.param(test, id=test.name) for test in _tests()])
def test_example(test: doctest.DocTest) -> None:
    if ".compiled" in test.name and (why := unavailable("cpu")):
        pytest.skip(why)
    report = io.StringIO()
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.write)
    assert not result.failed, report.getvalue()
