"""``explain``: step through an assignment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from detoracle.commands.common import scenes_named, written_command
from detoracle.properties.checking import cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.scenefile import read_scene, write_atomically
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.explain_page import render_story
from detoracle.reports.stages import EXPLAINED, story_of

__all__ = ["explain"]


def explain(
    scene: Annotated[
        str, typer.Argument(help="Name of an edge case, realistic, crowd, or a scene or annotation file.")
    ],
    operation: Annotated[
        str, typer.Option(help="Such as yolox.assign; for a *.scene.json, the one it was saved for.")
    ] = "",
    image: Annotated[int, typer.Option(min=0, help="Image of the scene; over all scenes of a file.")] = 0,
    setting: Annotated[str | None, typer.Option(help="One of its argument sets, such as a flavour.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the predictions.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("explain.html"),
) -> None:
    """Show how the oracle assigns anchors on one image, stage by stage, as one HTML page."""
    if scene.endswith(".scene.json"):
        saved = read_scene(Path(scene))
        if operation not in ("", saved.operation):
            raise InputError("--operation", expected=f"{saved.operation}, which was saved", got=operation)
        story = story_of(saved.operation, saved.arguments, scene=saved.name, image=image)
    else:
        if operation not in EXPLAINED:
            raise InputError("--operation", expected=f"one of {', '.join(EXPLAINED)}", got=operation or "none")
        found, place = _image(_scenes(scene, seed), image)
        name, arguments = _arguments(operation, found, setting)
        story = story_of(operation, arguments, scene=name, image=place)
    write_atomically(out, render_story(story, written_command(sys.argv)))
    print(f"page: {out}")


def _scenes(name: str, seed: int) -> tuple[Scene, ...]:
    named = tuple(scene for scene in edge_cases() if scene.name == name)
    if named or name in ("realistic", "crowd") or Path(name).exists():
        return named or scenes_named(name, seed=seed)
    raise InputError(
        "SCENE",
        expected="the name of an edge case, realistic, crowd, or a file that exists",
        got=repr(name),
        fix=f"Edge cases are {', '.join(scene.name for scene in edge_cases())}.",
    )


def _image(scenes: tuple[Scene, ...], image: int) -> tuple[Scene, int]:
    """The scene that holds an image, counted over all, and its place there."""
    place = image
    for scene in scenes:
        if place < scene.num_images:
            return scene, place
        place -= scene.num_images
    raise InputError("--image", expected=f"0 to {image - place - 1}", got=str(image))


def _arguments(operation: str, scene: Scene, setting: str | None) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of the first case, or of the one with this setting."""
    known = []
    for case in cases(*find_operation(operation), scene):
        if setting in (None, case.setting):
            return case.name, case.arguments
        known.append(case.setting)
    raise InputError("--setting", expected=f"one of {', '.join(known)}", got=repr(setting), where=operation)
