"""The checks a change must pass; `nox --list` shows them."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
ROOMS = ["reference", "implementations", "properties", "reports"]

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "tests"]


def _install(session: nox.Session, *requirements: str) -> None:
    session.install("-c", "constraints.txt", *requirements)


def _house(session: nox.Session) -> Path:
    """Link the rooms under their import names: mypy and import-linter walk folders, they do not read package-dir."""
    house = Path(session.create_tmp()).resolve() / "house"
    shutil.rmtree(house, ignore_errors=True)
    (house / "detoracle").mkdir(parents=True)
    for path in [*(ROOT / "detoracle").iterdir(), *(ROOT / room for room in ROOMS)]:
        (house / "detoracle" / path.name).symlink_to(path)
    return house


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and the direction of imports."""
    _install(session, "ruff", "import-linter")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    with session.chdir(_house(session)):
        session.run("lint-imports", "--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml"))


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy, strict, over the packages, the tests and this file."""
    _install(session, "-e", ".[dev]")
    house = _house(session)
    session.run("mypy", str(house / "detoracle"), "tests", "noxfile.py", env={"MYPYPATH": str(house)})


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite."""
    _install(session, "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(name="docs-examples")
def docs_examples(session: nox.Session) -> None:
    """The examples in docstrings and in README.md."""
    _install(session, "-e", ".[test]")
    session.run("pytest", "tests/test_doctests.py", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """Our implementations against the oracles on realistic scenes."""
    _install(session, "-e", ".")
    session.run("detoracle", "compare", "--scenes", "realistic", *session.posargs)


@nox.session
def deep(session: nox.Session) -> None:
    """The whole suite with many more Hypothesis examples, drawn anew each time."""
    _install(session, "-e", ".[test]")
    session.run("pytest", "--hypothesis-profile=deep", "--timeout=0", *session.posargs)
