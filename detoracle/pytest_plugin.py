"""The pytest plugin: ``--detoracle OPERATION=package.module:callable``, and tests of fixtures that `conforms` marks.

Either makes one test of each clause. Nothing heavy is imported, and nothing done, in a run that uses neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from detoracle.reference.errors import DetoracleError, InputError

__all__ = [
    "ClauseTest",
    "Target",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_pycollect_makeitem",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("detoracle", "conformance to detoracle's oracles")
    group.addoption(
        "--detoracle",
        action="append",
        default=[],
        metavar="OPERATION=MODULE:CALLABLE",
        help="Judge a callable: one test for each clause of the operation. May be repeated.",
    )
    group.addoption(
        "--detoracle-examples", type=int, default=20, metavar="N", help="Random scenes beside the catalogue (20)."
    )
    group.addoption("--detoracle-seed", type=int, default=0, metavar="N", help="Decides the random scenes (0).")
    group.addoption(
        "--detoracle-known-failures", type=Path, metavar="FILE", help="TOML list of failures to expect; see the README."
    )
    group.addoption(
        "--detoracle-out", type=Path, default=Path(".detoracle"), metavar="DIR", help="For failing scenes (.detoracle)."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what ``--detoracle`` names and does not exist before anything is collected."""
    if config.getoption("detoracle"):
        try:
            for operation, target in _targets(config):
                _clauses(config, operation)
                _load(target)
        except DetoracleError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)  # before -k, -m and xdist's groups look at the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests of callables that the command line names."""
    for operation, target in _targets(config):
        node = Target.from_parent(session, name=target, nodeid=target, operation=operation)
        items.extend(session.genitems(node))


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> list[pytest.Item | pytest.Collector] | None:
    """Make the tests of a fixture that `conforms` marks."""
    operations = vars(obj).get("conforms") if hasattr(obj, "__dict__") and callable(obj) else None
    if not operations or inspect.isclass(obj):
        return None
    if inspect.isfunction(obj) and not hasattr(obj, "_pytestfixturefunction"):  # how pytest 8.2 and 8.3 mark fixtures
        raise collector.CollectError(f"{name}: expected a fixture under detoracle.conforms, got a function.")
    try:
        test = _test_of(name, [clause for operation in operations for clause in _clauses(collector.config, operation)])
    except DetoracleError as error:
        raise collector.CollectError(f"{name}: {error}") from error
    made = f"{name}_conforms"
    setattr(collector.obj, made, staticmethod(test) if isinstance(collector, pytest.Class) else test)
    test.__test__ = True  # whatever names of functions the project collects
    items = collector.ihook.pytest_pycollect_makeitem(collector=collector, name=made, obj=test)
    test.__test__ = False  # and not once more under its own name
    _group(items, f"{collector.nodeid}::{name}")
    return list(items)


class Target(pytest.Collector):
    """A callable that the command line names, by ``package.module:callable``.

    Parameters
    ----------
    operation : str
    **arguments
        Of every node.
    """

    def __init__(self, *, operation: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._operation = operation

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        """One test for each clause."""
        items = [ClauseTest.from_parent(self, name=clause) for clause in _clauses(self.config, self._operation)]
        _group(items, self.name)
        return list(items)


class ClauseTest(pytest.Item):
    """The test of one clause of a `Target`."""

    def runtest(self) -> None:
        """Judge."""
        from detoracle.clause_tests import judge_clause

        __tracebackhide__ = True
        assert self.parent is not None
        judge_clause(self, self.name, _load(self.parent.name), self.parent.name)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where it is, which is in no file, and the headline of a failure."""
        return self.path, None, f"{self.name} by {self.parent.name if self.parent else ''}"


def _targets(config: pytest.Config) -> list[tuple[str, str]]:
    pairs = []
    for given in dict.fromkeys(config.getoption("detoracle")):
        operation, equals, target = given.partition("=")
        if not (operation and equals and target):
            raise InputError("--detoracle", expected="OPERATION=package.module:callable", got=repr(given))
        pairs.append((operation, target))
    return pairs


def _clauses(config: pytest.Config, operation: str) -> tuple[str, ...]:
    from detoracle.clause_tests import clauses_named, known_failures

    known_failures(config.getoption("detoracle_known_failures"))
    return clauses_named(operation)


def _load(target: str) -> Callable[..., Any]:
    from detoracle.implementations.registry import load

    return load(target)


def _test_of(fixture: str, clauses: list[str]) -> Any:
    @pytest.mark.usefixtures(fixture)  # so that the fixture's own parameters make tests
    @pytest.mark.parametrize("clause", clauses)
    def test(request: pytest.FixtureRequest, clause: str) -> None:
        from detoracle.clause_tests import judge_clause

        __tracebackhide__ = True
        judge_clause(request.node, clause, request.getfixturevalue(fixture))

    return test


def _group(items: Iterable[pytest.Item | pytest.Collector], name: str) -> None:
    """Keep tests that share a run of the implementation on one worker of xdist, if it distributes by group."""
    for item in items:
        if item.config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(name=name))
