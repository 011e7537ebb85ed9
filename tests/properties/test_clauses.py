"""Clauses are those that findings carry, each once and stated in a sentence."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from detoracle.properties.checking import check_scene
from detoracle.properties.clauses import clauses_of
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.laws.catalogue import LAWS
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import System, every_operation, find_operation
from detoracle.reference.contract import Operation

OPERATIONS = every_operation()
NAMES = [operation.name for _, operation in OPERATIONS]


@pytest.mark.parametrize(("system", "operation"), OPERATIONS, ids=NAMES)
def test_each_clause_has_an_id_of_its_own_and_a_sentence(system: System, operation: Operation) -> None:
    clauses = clauses_of(system, operation)
    assert len({clause.id for clause in clauses}) == len(clauses)
    assert all(clause.id.startswith(f"{operation.name}[") and clause.id.endswith("]") for clause in clauses)
    assert all(clause.statement.endswith(".") for clause in clauses)


def test_an_assignment_a_loss_and_plain_values_have_their_clauses() -> None:
    assign, loss, decode = (
        {clause.id.partition("[")[2][:-1] for clause in clauses_of(*find_operation(name))}
        for name in ("yolox.assign", "yolox.loss", "yolox.decode")
    )
    every_call = {"returns", "contract", "inputs-unmodified", "deterministic"}
    assert every_call | {"outcome", "quality", "dynamic_k", "ambiguity", "permute-gts"} <= assign
    assert every_call | {"total", "box", "gradient raw", "ambiguity", "padding"} <= loss
    assert every_call | {"predictions", "gradient raw"} <= decode
    assert not {"outcome", "ambiguity", "padding"} & decode


def test_a_law_that_an_operation_breaks_everywhere_is_no_clause_of_it() -> None:
    assert "ssd.match[empty-image]" not in {clause.id for clause in clauses_of(*find_operation("ssd.match"))}


@pytest.mark.parametrize("name", ["yolox.assign", "yolox.loss", "yolox.decode", "ssd.match", "yolov8.align"])
def test_findings_carry_clauses_of_the_operation(name: str) -> None:
    system, operation = find_operation(name)
    ids = {clause.id for clause in clauses_of(system, operation)}
    seen: set[str] = set()
    for number, wrong in enumerate((_shifted, _without_outputs, _raising, _without_gradients)):
        scene = next(scene for scene in edge_cases() if scene.name == "ragged-full")
        call = partial(wrong, operation)
        for result in check_scene(system, operation, scene, call, number=number):
            seen |= {re.sub(r"\[\d+\]\]$", "]", finding.clause) for finding in result.verdict.findings}
    assert seen
    assert seen <= ids


def _shifted(operation: Operation, arguments: dict[str, object]) -> Outcome:
    outcome = perform(operation, operation.oracle, arguments)
    return Outcome({n: ~v if v.dtype == torch.bool else v + 1 for n, v in outcome.outputs.items()}, outcome.gradients)


def _without_outputs(operation: Operation, arguments: dict[str, object]) -> Outcome:
    return perform(operation, lambda **_: {}, arguments)


def _raising(operation: Operation, arguments: dict[str, object]) -> Outcome:
    return perform(operation, lambda **_: 1 / 0, arguments)


def _without_gradients(operation: Operation, arguments: dict[str, object]) -> Outcome:
    outcome = perform(operation, operation.oracle, arguments)
    return Outcome(outcome.outputs)


def test_laws_have_ids_of_their_own() -> None:
    assert len({law.id for law in LAWS}) == len(LAWS)
