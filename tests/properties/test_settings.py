"""Every option of every operation takes another value than its default somewhere: code that ignores one is seen."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import Tensor

from detoracle.properties.checking import cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.systems import System, every_operation
from detoracle.reference.contract import Operation

SCENES = [scene for scene in edge_cases() if scene.name in ("single", "empty-one", "ragged-full")]
LEFT_OUT = {"anchor_head.loss": {"add_gt_as_proposals"}}  # the published loss passes no labels on, and raises


def same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor | list) and value == default)


@pytest.mark.parametrize(
    ("system", "operation"), every_operation(), ids=[operation.name for _, operation in every_operation()]
)
def test_every_option_is_set_somewhere(system: System, operation: Operation) -> None:
    parameters = inspect.signature(inspect.unwrap(operation.oracle)).parameters.values()
    options = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    given = [case.arguments for scene in SCENES for case in cases(system, operation, scene)]
    unset = {
        name
        for name, default in options.items()
        if all(same(arguments.get(name, default), default) for arguments in given)
    }
    assert unset == LEFT_OUT.get(operation.name, set())
