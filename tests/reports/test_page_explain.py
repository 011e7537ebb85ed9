"""The page that steps through an assignment: all stages, nothing from outside, harmless names, small."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from detoracle.cli import app
from detoracle.properties.checking import cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.scenefile import SavedScene, write_scene
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.explain_page import render_story
from detoracle.reports.page import MOST_BYTES
from detoracle.reports.stages import EXPLAINED, Story, story_of


def _story(operation: str, scene: str) -> Story:
    (found,) = [one for one in edge_cases() if one.name == scene]
    return story_of(operation, next(cases(*find_operation(operation), found)).arguments, scene=scene)


CROWD = _story("yolox.assign", "crowd")


@pytest.mark.parametrize("operation", EXPLAINED)
def test_every_stage_has_its_heading_picture_and_link(operation: str) -> None:
    story = _story(operation, "crowd")
    page = render_story(story, "detoracle explain crowd")
    names = [f"{number} {stage.name}" for number, stage in enumerate(story.stages, start=1)]
    assert re.findall(r"<h2 [^>]*>(.*?)</h2>", page) == names
    assert re.findall(r'<a href="#stage-\d">(.*?)</a>', page) == names
    assert page.count("<svg") == len(names)
    ids = re.findall(r'id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_nothing_comes_from_outside() -> None:
    page = render_story(CROWD, "detoracle explain crowd")
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|\bsrc=|<link|<iframe|fetch\(| on\w+=", page)


def test_one_ground_truth_is_chosen_everywhere() -> None:
    page = render_story(CROWD, "")
    (chosen,) = re.findall(r'<option value="(\d+)" selected>', page)
    assert set(re.findall(r'<g class="of chosen" data-gt="(\d+)"', page)) == {chosen}
    assert set(re.findall(r'<tr data-gt="(\d+)" class="chosen">', page)) == {chosen}


def test_a_crowd_of_hundreds_is_a_small_page() -> None:
    page = render_story(_story("yolox.assign", "crowd-520"), "")
    assert len(page.encode()) < MOST_BYTES
    assert "ground truths with fewer anchors cannot be chosen" in page
    assert "Here are the first 200 of" in page


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\"' onload=x", "a\x00b\u202ec", "n" * 4000])
def test_hostile_names_are_harmless(text: str) -> None:
    story = replace(CROWD, scene=text, picture=replace(CROWD.picture, scene=text))
    page, plain = (render_story(one, command) for one, command in ((story, text), (CROWD, "plain")))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert re.findall(r"<[a-z]+", page) == re.findall(r"<[a-z]+", plain)


def test_the_command_takes_names_and_files(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["explain", "ragged", "--operation", "yolov8.assign", "--image", "2", "-o", str(page)]
    )
    assert done.exit_code == 0, done.output
    assert "yolov8.assign on ragged" in page.read_text("utf-8")
    (found,) = [one for one in edge_cases() if one.name == "single"]
    *_, case = cases(*find_operation("yolox.assign"), found)
    saved = tmp_path / "a.scene.json"
    write_scene(saved, SavedScene("yolox.assign", case.name, case.arguments, "mine", ()))
    assert CliRunner().invoke(app, ["explain", str(saved), "-o", str(page)]).exit_code == 0
    assert "single (official)" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--operation", "yolox.assign"], "SCENE: expected the name of an edge case"),
        (["single"], "--operation: expected one of yolox.assign, "),
        (["single", "--operation", "yolox.assign", "--image", "1"], "--image: expected 0 to 0, got 1"),
        (["single", "--operation", "yolox.assign", "--setting", "x"], "--setting: expected one of tutorial, official"),
    ],
)
def test_what_is_not_there_is_refused(arguments: list[str], said: str) -> None:
    error = CliRunner().invoke(app, ["explain", *arguments]).exception
    assert isinstance(error, InputError)
    assert said in str(error)
