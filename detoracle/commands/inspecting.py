"""``list``, ``describe`` and ``env``: what there is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from detoracle.commands.common import write_json
from detoracle.implementations.registry import discover, unavailable
from detoracle.properties.systems import every_operation, find_operation
from detoracle.reference.contract import Argument, Operation, arguments_of, returns_of
from detoracle.reference.quirks.ledger import ledger
from detoracle.reports.environment import environment

__all__ = ["describe", "env", "list_"]

Json = Annotated[Path | None, typer.Option("--json", help="Also write what is printed to this file.")]


def list_(json: Json = None) -> None:
    """List all operations and who implements them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = discover(Path("pyproject.toml"), device=device)
    table = Table("operation", "kind", "gradients to", "implementations", box=None)
    body = []
    for _, operation in every_operation():
        names = [one.name for one in found if one.operation == operation.name]
        table.add_row(operation.name, operation.kind, " ".join(operation.gradients), " ".join(names))
        body.append({"operation": operation.name, "kind": operation.kind, "implementations": names})
    Console(soft_wrap=True).print(table)
    for kind, reason in unavailable(device).items():
        print(f"{kind}: not available: {reason}")
    write_json(json, body)


def env(json: Json = None) -> None:
    """Say what machine, versions and settings a report from here would name."""
    facts = environment()
    for name, value in facts.items():
        print(f"{name}: {value}")
    write_json(json, facts)


def describe(operation: Annotated[str, typer.Argument(help="Such as yolox.assign.")], json: Json = None) -> None:
    """Describe an operation: inputs, outputs, quirks, source, and the least that conforms."""
    _, found = find_operation(operation)
    quirks = [quirk for quirk in ledger() if quirk.operation == found.name]
    print(f"{found.name}  ({found.kind})\n")
    print(inspect.getdoc(inspect.unwrap(found.oracle)).partition("\n\nParameters")[0])  # type: ignore[union-attr]
    for title, arguments in (("Inputs", arguments_of(found.oracle)), ("Outputs", returns_of(found.oracle))):
        print(f"\n{title}")
        for argument in arguments:
            print(f"  {argument.name} : {argument.type}{', may be left out' if _optional(argument, title) else ''}")
            if argument.meaning:
                print(f"      {argument.meaning}")
    if found.gradients:
        print(f"\nGradients flow to: {', '.join(found.gradients)}")
    if quirks:
        print("\nQuirks of the published code, kept by the oracle")
        for quirk in quirks:
            print(f"  {quirk.id}: {quirk.statement}")
    print(f"\nSource: {found.source}")
    print("\nThe least that conforms: any callable that takes these by keyword and returns the outputs in this order")
    print("(or as a mapping by name):\n")
    print("\n".join(f"    {line}" for line in _least(found).splitlines()))
    print(f"\nCheck yours: detoracle check {found.name} package.module:callable")
    body = {
        "operation": found.name,
        "kind": found.kind,
        "source": found.source,
        "gradients": found.gradients,
        "inputs": [_plain(a) for a in arguments_of(found.oracle)],
        "outputs": [_plain(a) for a in returns_of(found.oracle)],
        "quirks": [{"id": q.id, "statement": q.statement} for q in quirks],
    }
    write_json(json, body)


def _optional(argument: Argument, title: str) -> bool:
    return argument.optional and title == "Outputs"


def _plain(argument: Argument) -> dict[str, Any]:
    return {"name": argument.name, "type": argument.type, "meaning": argument.meaning, "optional": argument.optional}


def _least(operation: Operation) -> str:
    """A conforming callable's outline, with the oracle's own defaults."""
    parameters = []
    for parameter in inspect.signature(operation.oracle).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        parameters.append(parameter.name + default)
    outputs = [output.name for output in returns_of(operation.oracle) if not output.optional]
    name = operation.name.partition(".")[2]
    return f"def my_{name}(*, {', '.join(parameters)}):\n    ...\n    return {', '.join(outputs)}"
