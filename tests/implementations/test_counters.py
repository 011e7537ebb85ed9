"""What every implementation costs, to the unit: a new host synchronisation or a new dense temporary fails here.

``counters.csv`` beside this file is the record. To accept a change, delete its lines (or the file) and run this test
twice: it writes what is missing, and fails until somebody has looked at it.
"""

from __future__ import annotations

import csv
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from detoracle.implementations.registry import Implementation, discover
from detoracle.properties.checking import Case
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.compare import prepared
from detoracle.reports.counters import count
from detoracle.reports.gate import COUNTERS
from detoracle.reports.workloads import Workload, sides, workload_case

RECORD = Path(__file__).with_name("counters.csv")
TORCH = "2.13"  # other releases dispatch other operations; what the host waits for is the same
FEW, MANY = 3, 12
WAITING = ("yolov8.pad_targets",)  # the shapes of its outputs depend on the data


@cache
def recorded() -> dict[tuple[str, str, str], dict[str, int]]:
    if not RECORD.exists():
        return {}
    with RECORD.open(newline="") as file:
        return {
            (row["operation"], row["implementation"], row["gts"]): {name: int(row[name]) for name in COUNTERS}
            for row in csv.DictReader(file)
        }


def _case(operation: str, gts: int) -> Case | None:
    system, found = find_operation(operation)
    anchors = min(sides(system.name), key=lambda number: abs(number - 84))
    try:
        return workload_case(system, found, Workload(2, gts, anchors, 4))
    except InputError:
        return None


def _counted(one: Implementation, gts: int) -> dict[str, int]:
    case = _case(one.operation, gts)
    assert case is not None, f"no workload of {one.operation}"
    operation = find_operation(one.operation)[1]
    prepared(operation, one.load(), case.arguments)()  # fills caches
    return asdict(count(prepared(operation, one.load(), case.arguments))[1])


IMPLEMENTATIONS = [one for one in discover() if one.name != "triton"]  # the interpreter's own operations are no cost


@pytest.mark.parametrize("one", IMPLEMENTATIONS, ids=lambda one: f"{one.operation}-{one.name}")
def test_the_cost_is_the_recorded_one(one: Implementation) -> None:
    found = {(one.operation, one.name, str(gts)): _counted(one, gts) for gts in (FEW, MANY)}
    if missing := found.keys() - recorded().keys():
        _record({key: found[key] for key in sorted(missing)})
        pytest.fail(f"not recorded before: look at the new lines of {RECORD.name}")
    for key, counters in found.items():
        expected = recorded()[key]
        if not torch.__version__.startswith(TORCH):
            counters, expected = ({"host_syncs": c["host_syncs"]} for c in (counters, expected))
        assert counters == expected
    if one.name == "batched":
        assert {c["host_syncs"] for c in found.values()} == {0} or one.operation in WAITING


def _record(found: dict[tuple[str, str, str], dict[str, int]]) -> None:
    with RECORD.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(["operation", "implementation", "gts", *COUNTERS])
        writer.writerows([*key, *counters.values()] for key, counters in found.items())


def test_the_record_has_no_line_too_many() -> None:
    known = {(one.operation, one.name) for one in IMPLEMENTATIONS}
    assert {(operation, name) for operation, name, _ in recorded()} <= known
