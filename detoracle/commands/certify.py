"""``certify``: what a third party may show of its callable, and ``--verify``: what anybody may ask of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from detoracle.commands.common import device_named
from detoracle.properties.known_failures import read_known_failures
from detoracle.properties.scenefile import write_atomically
from detoracle.reference.errors import InputError
from detoracle.reports.certificate import Asked, Certificate, differences, from_json, page_of, to_json
from detoracle.reports.certificate import certify as run_and_certify
from detoracle.reports.environment import CLOCKS

__all__ = ["certify"]


def certify(
    operation: Annotated[str, typer.Argument(help="Such as yolox.assign; see 'detoracle list'.")] = "",
    implementation: Annotated[str, typer.Argument(metavar="package.module:callable")] = "",
    out: Annotated[Path, typer.Option(help="The certificate; its page is written beside it.")] = Path(
        "detoracle-certificate.json"
    ),
    examples: Annotated[int, typer.Option(min=1, help="Random scenes beside the edge-case catalogue.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides the random scenes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    known_failures: Annotated[Path | None, typer.Option(help="TOML list of failures to expect.")] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run what a certificate states again, and compare.")
    ] = None,
) -> None:
    """Certify a third party's callable: exactly what was run, as JSON and as a page; or verify a certificate.

    Exit code 1, and no file, if anything failed unexpectedly, timed out or was never judged; with --verify, if any
    verdict, count or hash differs.
    """
    if verify is not None:
        if operation or implementation:
            raise InputError("--verify", expected="no operation beside it", got=operation)
        _verify(verify)
        return
    if not (operation and implementation):
        raise InputError("certify", expected="OPERATION and package.module:callable", got=operation or "neither")
    if out.suffix != ".json":
        raise InputError("--out", expected="a file that ends in .json", got=out.name)
    entries = read_known_failures(known_failures) if known_failures else ()
    certificate = _run(Asked(operation, implementation, examples, seed, device_named(device), entries))
    write_atomically(out, to_json(certificate))
    write_atomically(out.with_suffix(".html"), page_of(certificate))
    clauses = ", ".join(f"{number} {verdict}" for verdict, number in certificate.clauses_by_verdict().items())
    print(f"{operation} by {implementation}: {certificate.checks} checks; clauses: {clauses}")
    print(f"certificate: {out}")


def _run(asked: Asked) -> Certificate:
    console = Console(stderr=True)
    certificate, shortfalls = run_and_certify(
        asked,
        lambda scenes: track(scenes, asked.operation, console=console, disable=not console.is_terminal, transient=True),
    )
    if certificate is None:
        for text in shortfalls:
            print(text)
        print(f"{asked.operation} by {asked.implementation}: no certificate")
        raise typer.Exit(1)
    return certificate


def _verify(file: Path) -> None:
    try:
        certificate = from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(file.name, expected="a certificate", got=type(error).__name__) from error
    device_named(certificate.asked.device)
    again = _run(certificate.asked)
    for name, value in certificate.environment.items():
        if name not in CLOCKS and again.environment.get(name) != value:
            print(f"ran elsewhere: {name} was {value}, is {again.environment.get(name, 'none')}")
    found = differences(certificate, again)
    for text in found:
        print(text)
    print(f"{file.name}: {'differs' if found else 'confirmed'}")
    if found:
        raise typer.Exit(1)
