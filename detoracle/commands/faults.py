"""``faults``: the suite sits its own exam."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from detoracle.commands.common import write_json
from detoracle.properties.faults.fault import exam, examined, faults_of
from detoracle.reference.errors import InputError

__all__ = ["faults"]


def faults(
    system: Annotated[list[str] | None, typer.Option(help="Only this system; may be repeated.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Random scenes before the edge-case catalogue.")] = 20,
    seed: Annotated[int, typer.Option(help="Decides the random scenes.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the kill matrix to this file.")] = None,
) -> None:
    """Let the suite find planted faults, and print which clause caught which after how many scenes.

    Exit code 1 if a fault survives.
    """
    if unknown := [name for name in system or [] if name not in examined()]:
        raise InputError("--system", expected=f"one of {', '.join(examined())}", got=", ".join(unknown))
    kills = [kill for name in system or examined() for kill in exam(faults_of(name), examples=examples, seed=seed)]
    table = Table("fault", "caught by", "on scene", "scenes needed", "origin", box=None)
    for kill in kills:
        caught = kill.clause if kill.caught else "SURVIVES"
        table.add_row(kill.fault.id, caught, kill.scene, str(kill.examples), kill.fault.origin)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    survivors = [kill.fault.id for kill in kills if not kill.caught]
    print(f"{len(kills) - len(survivors)} of {len(kills)} faults caught with seed {seed}")
    body = [{"fault": k.fault.id, "clause": k.clause, "scene": k.scene, "scenes": k.examples} for k in kills]
    write_json(json, body)
    if survivors:
        raise typer.Exit(1)
