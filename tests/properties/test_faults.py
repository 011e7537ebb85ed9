from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detoracle.properties.checking import Case, cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.faults import exam as sitting
from detoracle.properties.faults import ledger as keeping
from detoracle.properties.faults.exam import exam, sit_operation
from detoracle.properties.faults.fault import Fault, build, examined, faults_of
from detoracle.properties.faults.ledger import Ledger, fault_sittings, work
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation
from detoracle.reference.errors import DetoracleError

SYSTEMS = examined()
FAULTS = [fault for system in SYSTEMS for fault in faults_of(system)]
YOLOX = faults_of("yolox")


@pytest.mark.parametrize("operation", dict.fromkeys(fault.operation for fault in FAULTS))
def test_every_fault_is_caught(operation: str) -> None:
    faults = [fault for fault in FAULTS if fault.operation == operation]
    kills = exam(faults, examples=4, seeds=[1])
    assert [kill.fault.id for kill in kills] == [fault.id for fault in faults]
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


def test_what_is_not_wrong_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitting, "edge_cases", lambda: edge_cases()[:3])
    (kill,) = exam([harmless()], examples=1)
    assert not kill.caught
    assert (kill.clause, kill.scene, kill.examples) == ("", "", 4)


def harmless() -> Fault:
    return replace(YOLOX[0], id="yolox.harmless", new=f"{YOLOX[0].old}  # the same")


def test_the_catalogue_is_sat_once_for_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(system: System, operation: Operation, scene: Scene) -> Iterator[Case]:
        asked.append(scene.name)
        return cases(system, operation, scene)

    monkeypatch.setattr(sitting, "edge_cases", lambda: edge_cases()[:3])
    monkeypatch.setattr(sitting, "cases", watched)
    kills = list(sit_operation([harmless()], {0: [harmless()], 1: [harmless()]}, examples=1))
    assert [(kill.seed, kill.examples) for kill in kills] == [(0, 4), (1, 4)]
    assert asked == ["random 0-0", "random 1-0", *(s.name for s in sorted(edge_cases()[:3], key=lambda s: s.max_gts))]


def test_an_exam_is_taken_up_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [kill for kills in sat(tmp_path, [0]) for kill in kills]
    assert [kill["seed"] for kill in first] == [0, 0]
    with (tmp_path / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"fault": "unfinished')
    ledger = Ledger(tmp_path)
    (again,) = [sitting() for sitting in fault_sittings(YOLOX[:2], [0, 1], 1, ledger)]
    assert [kill["seed"] for kill in again] == [1, 1]
    assert [{**kill, "source": ""} for kill in ledger.kept] == [{**kill, "source": ""} for kill in first]
    list(sat(tmp_path, [1]))
    assert fault_sittings(YOLOX[:2], [0, 1], 1, Ledger(tmp_path)) == []
    monkeypatch.setattr(keeping, "_fingerprint", lambda: "of other sources")
    assert len([kill for kills in sat(tmp_path, [0]) for kill in kills]) == 2


def test_other_scenes_are_another_exam(tmp_path: Path) -> None:
    list(sat(tmp_path, [0]))
    assert fault_sittings(YOLOX[:2], [0], 1, Ledger(tmp_path)) == []
    assert len(fault_sittings(YOLOX[:2], [0], 2, Ledger(tmp_path))) == 1


def sat(folder: Path, seeds: list[int]) -> Iterator[list[dict[str, Any]]]:
    ledger = Ledger(folder)
    return work(fault_sittings(YOLOX[:2], seeds, 1, ledger), ledger, jobs=1)


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    mine = [next(fault for fault in YOLOX if fault.operation == name) for name in ("yolox.decode", "yolox.cost")]
    ledger = Ledger(tmp_path)
    found = [kill for kills in work(fault_sittings(mine, [0], 1, ledger), ledger, jobs=2) for kill in kills]
    expected = {kill.fault.id: kill.clause for kill in exam(mine, examples=1)}
    assert {kill["fault"]: kill["clause"] for kill in found} == expected
    lines = (tmp_path / "results.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["fault"] for line in lines if line} == expected.keys()
