"""The page on the laws: which of the five systems obey which, and where they depart."""

from __future__ import annotations

from collections.abc import Iterator

from detoracle.properties.laws.catalogue import LAWS, departures_of
from detoracle.properties.laws.departures import DEPARTURES, Departure
from detoracle.properties.laws.law import Law
from detoracle.properties.systems import System, every_system

__all__ = ["laws_page"]

_HEAD = """\
# Laws

How a right answer changes when the question does. Each law needs no second oracle run: what an implementation returns
for the changed arguments is mapped back, and judged by what was right for the original ones, margins included. Only
`float64` and `translate`, which round otherwise, are judged by an expectation of their own.
`detoracle check` judges one law in turn beside every case, under clauses such as `yolox.assign[permute-gts]`.

This page is generated: `python -m detoracle.properties.laws > docs/laws.md`.

## Laws and systems

Operations of each system that a law concerns: how many obey it everywhere, in part (see below), or not at all.
"""

_TAIL = """\
## Not laws of a single call

- Inputs are left as they were: judged at every call, under `[inputs-unmodified]`.
- bfloat16 and float16: `detoracle check --dtype`, with the bounds of that dtype.
- Gradients agree with finite differences in float64, and two processes give the loss of one: tests of the oracles.
"""


def laws_page() -> str:
    """The page, in Markdown.

    Examples
    --------
    >>> laws_page().splitlines()[0]
    '# Laws'
    """
    systems = every_system()
    rows = [["law", *(system.name for system in systems)], ["---"] * (len(systems) + 1)]
    rows += [[f"`{law.id}`", *(_cell(law, system) for system in systems)] for law in LAWS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    statements = "\n".join(f"- `{law.id}`: {law.statement}" for law in LAWS)
    departures = "\n".join(_lines())
    return "\n".join([_HEAD, table, "\n## What they say\n", statements, "\n## Departures\n", departures, "", _TAIL])


def _cell(law: Law, system: System) -> str:
    concerned = [operation for operation in system.operations if law.concerns(operation)]
    found = [departures_of(law, operation) for operation in concerned]
    none = sum(any(departure.whole for departure in departures) for departures in found)
    part = sum(bool(departures) for departures in found) - none
    counts = {"obey": len(concerned) - none - part, "in part": part, "not": none}
    return ", ".join(f"{number} {word}" for word, number in counts.items() if number) or "-"


def _lines() -> Iterator[str]:
    for departure in DEPARTURES:
        laws, operations = (
            ", ".join(f"`{name}`" for name in names) for names in (departure.laws, departure.operations)
        )
        yield f"- {laws} of {operations}{_extent(departure)}: {departure.reason} (scene `{departure.scene}`)."


def _extent(departure: Departure) -> str:
    if departure.outputs:
        return f", outputs {', '.join(f'`{name}`' for name in departure.outputs)}"
    return "" if departure.whole else ", in part"
