"""The command line. Exit codes: 0 all is well, 1 there are findings, 2 the call or the environment is at fault."""

from __future__ import annotations

import sys
import traceback

import typer

from detoracle.commands.bench import bench
from detoracle.commands.certify import certify
from detoracle.commands.check import check
from detoracle.commands.compare import compare
from detoracle.commands.explain import explain
from detoracle.commands.faults import faults
from detoracle.commands.gate import gate
from detoracle.commands.golden import golden
from detoracle.commands.inspecting import describe, env, list_
from detoracle.commands.replay import replay
from detoracle.commands.report import report
from detoracle.reference.errors import DetoracleError

__all__ = ["app", "main"]

_INTERRUPTED = 130  # how typer ends on Ctrl-C

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
app.command("list")(list_)
for _command in (describe, env, compare, check, certify, bench, gate, golden, replay, explain, faults, report):
    app.command()(_command)


def main() -> None:
    """Entry point: every error of ours becomes one line and exit code 2, never a traceback or a finding."""
    try:
        app()
    except DetoracleError as error:
        print(f"detoracle: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("detoracle: interrupted; what is finished is kept, go on with --resume", file=sys.stderr)
            sys.exit(2)
        raise
    except Exception:
        traceback.print_exc()
        print("detoracle: this is a defect of detoracle; please report it with the lines above", file=sys.stderr)
        sys.exit(2)
