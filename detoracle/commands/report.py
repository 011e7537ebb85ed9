"""``report``: make the page of a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detoracle.reports.writing import read_report, write_report

__all__ = ["report"]


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="With a results.json.")]) -> None:
    """Write the page and tables of a folder again from its results.json. Exit code 1 if it has findings."""
    found = read_report(folder)
    print(f"report: {write_report(found, folder)}")
    if found.findings:
        raise typer.Exit(1)
