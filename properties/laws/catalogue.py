"""The laws that an operation obeys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from detoracle.properties.laws import batch, classes, geometry, memory, order, padding
from detoracle.properties.laws.departures import DEPARTURES, Departure
from detoracle.properties.laws.law import FollowUp, Law, Question
from detoracle.properties.outputs import Outcome
from detoracle.reference.contract import Operation

__all__ = ["LAWS", "departures_of", "follow_up_of", "laws_of"]

LAWS: tuple[Law, ...] = (
    *order.LAWS, *classes.LAWS, *padding.LAWS, *batch.LAWS, *geometry.LAWS, *memory.LAWS
)  # fmt: skip
"""All laws, in the order of rotation."""


def departures_of(law: Law, operation: Operation) -> tuple[Departure, ...]:
    """Where an operation departs from a law that concerns it.

    Examples
    --------
    >>> from detoracle.reference import ssd
    >>> empty = next(law for law in LAWS if law.id == "empty-image")
    >>> [departure.whole for departure in departures_of(empty, ssd.match.operation)]
    [True]
    """
    return tuple(d for d in DEPARTURES if law.id in d.laws and operation.name in d.operations)


def laws_of(operation: Operation) -> tuple[Law, ...]:
    """Laws that an operation obeys, if not everywhere.

    Examples
    --------
    >>> from detoracle.reference import yolox
    >>> [law.id for law in laws_of(yolox.assign.operation)][:3]
    ['permute-images', 'permute-gts', 'permute-anchors']
    """
    return tuple(
        law for law in LAWS if law.concerns(operation) and not any(d.whole for d in departures_of(law, operation))
    )


def follow_up_of(law: Law, question: Question) -> FollowUp | None:
    """What a law makes of a question; None where it has nothing to say, or the operation departs from it."""
    departures = departures_of(law, question.operation)
    here = [d for d in departures if d.where is None or d.where(question)]
    if any(not departure.outputs for departure in here) or not law.concerns(question.operation):
        return None
    follow_up = law.follow_up(question)
    if follow_up is None or follow_up.back is None or not here:
        return follow_up
    back, left_out = follow_up.back, {name for departure in here for name in departure.outputs}

    def judged(outcomes: Sequence[Outcome]) -> Outcome:
        outcome = back(outcomes)
        return replace(outcome, outputs={n: output for n, output in outcome.outputs.items() if n not in left_out})

    return replace(follow_up, back=judged)
