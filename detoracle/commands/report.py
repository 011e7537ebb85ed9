"""``report``: make the page of a finished run again, or one of a history."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detoracle.properties.scenefile import write_atomically
from detoracle.reference.errors import InputError
from detoracle.reports.history import read
from detoracle.reports.history_page import render_history
from detoracle.reports.sheets import read_tables, with_tables
from detoracle.reports.writing import read_report, write_report

__all__ = ["report"]


def report(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="With a results.json.")] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of 'detoracle faults' or a drift atlas, shown as tables; may be repeated."),
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="A history that 'detoracle gate' wrote; its page is written beside it.")
    ] = None,
) -> None:
    """Write the page and tables of a folder again from its results.json. Exit code 1 if it has findings."""
    if folder is None and (add or history is None):
        raise InputError("DIR", expected="a folder with a results.json, or --history FILE", got="neither")
    if history is not None:
        page = history.with_suffix(".html")
        write_atomically(page, render_history(read(history), history.name))
        print(f"history: {page}")
    if folder is not None:
        found = with_tables(read_report(folder), [table for path in add or () for table in read_tables(path)])
        print(f"report: {write_report(found, folder)}")
        if found.findings:
            raise typer.Exit(1)
