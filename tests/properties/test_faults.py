from __future__ import annotations

import pkgutil
from dataclasses import replace

import pytest

from detoracle.properties import faults
from detoracle.properties.faults.fault import build, exam, faults_of
from detoracle.reference.errors import DetoracleError

SYSTEMS = sorted(module.name for module in pkgutil.iter_modules(faults.__path__) if module.name != "fault")
FAULTS = [fault for system in SYSTEMS for fault in faults_of(system)]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_fault_is_caught(system: str) -> None:
    kills = exam(faults_of(system), examples=10, seed=1)
    assert [kill.fault.id for kill in kills] == [fault.id for fault in faults_of(system)]
    assert [kill.fault.id for kill in kills if not kill.caught] == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_fault_can_be_built(system: str) -> None:
    for fault in faults_of(system):
        assert fault.system == system
        assert callable(build(fault)), fault.id


def test_ids_are_unique() -> None:
    ids = [fault.id for fault in FAULTS]
    assert sorted(set(ids)) == sorted(ids)


def test_changes_are_unique() -> None:
    changes = [(fault.system, fault.operation, fault.old, fault.new) for fault in FAULTS]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "no such text"}, "got 0 times"),
        ({"old": "return"}, "got [0-9]+ times"),
        ({"new": FAULTS[0].old}, "got 1 times"),
        ({"operation": "no.such"}, "expected a loop implementation of no.such, got none"),
    ],
)
def test_a_fault_that_tests_nothing_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(DetoracleError, match=message):
        build(replace(FAULTS[0], **change))


def test_what_is_not_wrong_survives() -> None:
    harmless = replace(FAULTS[0], new=f"{FAULTS[0].old}  # the same")
    (kill,) = exam([harmless], examples=1)
    assert not kill.caught
    assert (kill.clause, kill.scene) == ("", "")
