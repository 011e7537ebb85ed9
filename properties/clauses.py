"""Clauses: every statement that the suite judges about an operation, under the id that findings carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from detoracle.properties.laws.catalogue import laws_of
from detoracle.properties.systems import System
from detoracle.reference.contract import Operation, returns_of

__all__ = ["Clause", "clauses_of"]


@dataclass(frozen=True)
class Clause:
    """One statement about an operation.

    Attributes
    ----------
    id : str
        Such as ``yolox.assign[outcome]``: what `Finding.clause` says.
    statement : str
        One sentence.
    """

    id: str
    statement: str


def clauses_of(system: System, operation: Operation) -> tuple[Clause, ...]:
    """All clauses of an operation: those of every call first, then the laws it obeys.

    Parameters
    ----------
    system : System
    operation : Operation

    Returns
    -------
    tuple of Clause

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> [clause.id for clause in clauses_of(*find_operation("yolox.assign"))][:6]  # doctest: +NORMALIZE_WHITESPACE
    ['yolox.assign[returns]', 'yolox.assign[contract]', 'yolox.assign[inputs-unmodified]', 'yolox.assign[outcome]',
     'yolox.assign[quality]', 'yolox.assign[dynamic_k]']
    """
    laws = ((law.id, law.statement) for law in laws_of(operation))
    return tuple(Clause(f"{operation.name}[{id_}]", text) for id_, text in (*_of_every_call(system, operation), *laws))


def _of_every_call(system: System, operation: Operation) -> Iterator[tuple[str, str]]:
    yield "returns", "It returns, in time, wherever the oracle does."
    yield "contract", "It returns what the contract documents, each a tensor of that kind and shape."
    yield "inputs-unmodified", "It writes to none of its inputs."
    for output in returns_of(operation.oracle):
        if operation.kind == "assignment" and output.name == "gt_index":
            yield "outcome", "Each anchor gets a ground truth, background or ignored, as rightly decided."
        elif operation.kind == "assignment" and output.name == "dynamic_k":
            yield "dynamic_k", "Each ground truth claims a right number of anchors."
        else:
            yield output.name, f"Output {output.name} is within the bounds of rounding."
    for name in operation.gradients:
        yield f"gradient {name}", f"The gradient to {name} errs no more than the oracle's in the same dtype."
    if operation.name in system.explain and operation.kind != "values":
        yield "ambiguity", "Of generic scenes, rounding leaves few assignments open."
