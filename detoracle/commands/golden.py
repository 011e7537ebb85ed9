"""``golden``: replay recorded vectors through the oracles."""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detoracle.commands.common import write_json
from detoracle.properties.golden.checks import StageCheck
from detoracle.properties.golden.vectors import Recorded, read_vectors

__all__ = ["golden"]

_STATUSES = ("equal", "ambiguous", "different", "flavour", "unchecked")


def golden(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.npz...", help="Each with its .json beside it.")],
    json: Annotated[Path | None, typer.Option("--json", help="Write every check to this file.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also list ambiguous stages, flavours and named behaviours.")
    ] = False,
) -> None:
    """Replay recorded vectors of the genuine code through the oracles, stage by stage.

    Prints stages checked, equal, ambiguous and different per system; exit code 1 if any is different.
    """
    console = Console(soft_wrap=True)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    body: list[dict[str, Any]] = []
    scenes = [scene for file in files for scene in read_vectors(file)]
    for scene in track(
        scenes, "replaying", console=Console(stderr=True), disable=not console.is_terminal, transient=True
    ):
        counts[scene.recording]["scenes"] += 1
        for check in _replay(scene):
            counts[scene.recording][check.status] += 1
            body.append({"recording": scene.recording, "scene": scene.name, **vars(check)})
            if check.status == "unchecked":
                reasons[f"{scene.recording}: {check.detail}"] += 1
            if check.status == "different" or (
                verbose and (check.status in ("ambiguous", "flavour") or check.stage == "raises")
            ):
                print(f"{check.status}: {scene.recording}/{scene.name} {check.stage}: {check.detail}")
    table = Table("recording", "scenes", "stages checked", *_STATUSES, box=None)
    for recording, count in counts.items():
        checked = count.total() - count["scenes"] - count["unchecked"]
        table.add_row(recording, *(str(n) for n in (count["scenes"], checked, *(count[s] for s in _STATUSES))))
    console.print(table)
    for reason, number in reasons.items():
        print(f"unchecked: {number} of {reason}")
    for recording in (r for r, count in counts.items() if count["flavour"]):
        print(f"flavour: {recording} is of another flavour than the oracle's; --verbose lists what it does otherwise")
    write_json(json, body)
    if any(count["different"] for count in counts.values()):
        raise typer.Exit(1)


def _replay(scene: Recorded) -> list[StageCheck]:
    """Checks of one scene; an oracle that breaks on it is a difference, and the rest goes on."""
    replay = importlib.import_module(f"detoracle.properties.golden.{scene.system}").replay
    checks: list[StageCheck] = []
    try:
        checks.extend(replay(scene))
    except Exception as error:  # a scene nobody has seen may break the replay; the others still count
        checks.append(StageCheck("replay", "different", f"{type(error).__name__}: {error}"))
    return checks
