"""``replay``: run one saved scene again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detoracle.commands.common import write_json
from detoracle.properties.comparison import expect
from detoracle.properties.scenefile import read_scene
from detoracle.properties.systems import find_operation
from detoracle.properties.worker import Worker
from detoracle.reference.errors import InputError

__all__ = ["replay"]


def replay(
    file: Annotated[Path, typer.Argument(metavar="SCENE.json", help="As written by check or compare.")],
    implementation: Annotated[
        str, typer.Option(help="package.module:callable; without it, the one the scene was saved for.")
    ] = "",
    time_limit: Annotated[float, typer.Option(help="Seconds the call may take.")] = 60.0,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the verdict to this file.")] = None,
) -> None:
    """Run a saved scene again, and judge the implementation afresh. Exit code 1 if it is still wrong."""
    scene = read_scene(file)
    target = implementation or scene.implementation
    if not target:
        raise InputError(
            "--implementation", expected="package.module:callable", got="nothing, nor does the scene name one"
        )
    system, operation = find_operation(scene.operation)
    with Worker(time_limit=time_limit) as worker:
        worker.require(target)
        verdict = expect(system, operation, scene.arguments).judge(worker.perform(operation, target, scene.arguments))
    print(
        f"{operation.name} by {target} on {scene.name}: {verdict.status}{f' ({verdict.note})' if verdict.note else ''}"
    )
    for finding in verdict.findings:
        print(f"  {finding.clause} {finding.where}: {finding.message} ({finding.count} wrong)")
    body = {"operation": operation.name, "implementation": target, "status": verdict.status}
    write_json(json, {**body, "findings": [vars(finding) for finding in verdict.findings]})
    if verdict.wrong:
        raise typer.Exit(1)
