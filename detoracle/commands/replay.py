"""``replay``: run one saved scene again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from detoracle.commands.common import write_json
from detoracle.properties.comparison import Verdict, expect
from detoracle.properties.laws.catalogue import follow_up_of, laws_of
from detoracle.properties.laws.law import Question
from detoracle.properties.outputs import Outcome
from detoracle.properties.scenefile import SavedScene, read_scene, write_atomically
from detoracle.properties.systems import find_operation
from detoracle.properties.worker import Worker
from detoracle.reference.errors import InputError
from detoracle.reports.picture import draw, draw_assignment
from detoracle.reports.picturing import picture_of
from detoracle.reports.record import Row
from detoracle.reports.script import script_of

__all__ = ["replay"]


def replay(
    file: Annotated[Path, typer.Argument(metavar="SCENE.json", help="As written by check, compare or pytest.")],
    implementation: Annotated[
        str, typer.Option(help="package.module:callable; without it, the one the scene was saved for.")
    ] = "",
    svg: Annotated[Path | None, typer.Option(help="Draw ground truths, anchors and assignments to this file.")] = None,
    script: Annotated[
        Path | None, typer.Option(help="Write the finding as a program that needs PyTorch and the callable only.")
    ] = None,
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

        def call(arguments: Mapping[str, Any]) -> Outcome:
            return worker.perform(operation, target, arguments)

        question = Question(
            system,
            operation,
            scene.arguments,
            expect(system, operation, scene.arguments),
            call(scene.arguments),
        )
        verdict = _judged(question, scene, call)
    print(
        f"{operation.name} by {target} on {scene.name}: {verdict.status}{f' ({verdict.note})' if verdict.note else ''}"
    )
    for finding in verdict.findings:
        print(f"  {finding.clause} {finding.where}: {finding.message} ({finding.count} wrong)")
    body = {"operation": operation.name, "implementation": target, "status": verdict.status}
    write_json(json, {**body, "findings": [vars(finding) for finding in verdict.findings]})
    if svg:
        write_atomically(svg, _drawing(question, scene, target))
    if script:
        if not verdict.wrong:
            raise InputError("--script", expected="a scene that is still wrong", got=verdict.status)
        write_atomically(script, script_of(operation, scene.arguments, target, verdict.findings[0]))
    if verdict.wrong:
        raise typer.Exit(1)


def _judged(question: Question, scene: SavedScene, call: Callable[[Mapping[str, Any]], Outcome]) -> Verdict:
    """Verdict on the call, or if that is right, on the law that the scene was saved for."""
    verdict = question.expectation.judge(question.answer)
    for law in laws_of(question.operation):
        clause = f"{question.operation.name}[{law.id}] "
        if not verdict.wrong and any(text.startswith(clause) for text in scene.findings):
            follow_up = follow_up_of(law, question)
            verdict = verdict if follow_up is None else law.judge(question, follow_up, call)
    return verdict


def _drawing(question: Question, scene: SavedScene, target: str) -> str:
    """The oracle's assignment, and beside it the implementation's if it returned one."""
    operation, explanation = question.operation, question.expectation.explanation
    canvas = question.system.canvas(operation.name, dict(scene.arguments))
    if canvas is None or explanation is None:
        raise InputError("--svg", expected="an operation that assigns anchors in an image", got=operation.name)
    given = question.answer.outputs.get("gt_index")
    row = Row(operation.name, target, scene.name, "", "")
    if given is None or given.shape != explanation.gt_index.shape:
        return draw_assignment(picture_of(row, canvas, explanation, None))
    return draw(picture_of(row, canvas, explanation, given))
