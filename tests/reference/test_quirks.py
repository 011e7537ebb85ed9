"""Every entry of the quirk ledger shows when the oracle runs on its scene."""

from __future__ import annotations

import pytest

from detoracle.properties.systems import NAMES, find_operation
from detoracle.reference.contract import arguments_of
from detoracle.reference.quirks.ledger import ledger
from detoracle.reference.quirks.quirk import Quirk

QUIRKS = ledger()


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda quirk: quirk.id)
def test_quirk_shows(quirk: Quirk) -> None:
    assert quirk.check()


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda quirk: quirk.id)
def test_scene_is_a_call_of_its_operation(quirk: Quirk) -> None:
    _, operation = find_operation(quirk.operation)
    documented = {argument.name for argument in arguments_of(operation.oracle)}
    assert set(quirk.scene()) <= documented


def test_ids_are_unique() -> None:
    ids = [quirk.id for quirk in QUIRKS]
    assert len(ids) == len(set(ids))


def test_every_system_has_quirks() -> None:
    assert {quirk.system for quirk in QUIRKS} == set(NAMES)
