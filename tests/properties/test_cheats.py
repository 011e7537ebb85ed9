"""The whole exam of the cheats is `detoracle faults`; here sits one of each kind, and those the trials are for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from detoracle.implementations.registry import load
from detoracle.properties import trials as trying
from detoracle.properties.faults.cheats import CHEATS, Cheat, sit
from detoracle.properties.systems import find_operation
from detoracle.properties.trials import TRIALS, Subject, trials
from detoracle.properties.worker import Worker

BY_NAME = {cheat.name: cheat for cheat in CHEATS}
TRIED = [cheat for cheat in CHEATS if cheat.clause in TRIALS and not cheat.name.startswith("replaces")]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(time_limit=20) as running:
        yield running


def test_there_are_cheats_of_every_trial() -> None:
    assert {cheat.clause for cheat in CHEATS} >= TRIALS.keys()
    assert len(CHEATS) >= 20
    assert len({cheat.id for cheat in CHEATS}) == len(CHEATS)
    for cheat in CHEATS:
        assert callable(load(cheat.target))
        assert find_operation(cheat.operation)


@pytest.mark.parametrize("name", ["replaces_the_oracle", "answers_itself", "lazy", "leaves", "grad_mode"])
def test_a_cheat_is_caught_by_its_clause(name: str) -> None:
    cheat = BY_NAME[name]
    assert sit(cheat).clause == f"{cheat.operation}[{cheat.clause}]"


@pytest.mark.parametrize("cheat", TRIED, ids=lambda cheat: cheat.name)
def test_a_trial_catches_what_it_is_for(cheat: Cheat, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "_MOST_CASES", 4)
    results = trials(Subject(*find_operation(cheat.operation), cheat.target, worker, 20))
    wrong = (result.verdict.findings[0].clause for result in results if result.verdict.wrong)
    assert list(islice(wrong, 1)) == [f"{cheat.operation}[{cheat.clause}]"]


def test_what_is_right_passes_and_may_refuse_a_dtype(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "_MOST_CASES", 4)
    for name in ("right.iou_yolox", "in_float32_or_not_at_all"):
        target = f"detoracle.properties.faults.cheating:{name}"
        results = list(trials(Subject(*find_operation("boxes.iou_yolox"), target, worker, 20)))
        assert not [result.verdict for result in results if result.verdict.wrong]
        refused = [result for result in results if "refuses" in result.verdict.note]
        assert bool(refused) == (name == "in_float32_or_not_at_all")
