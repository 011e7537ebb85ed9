"""The drift atlas: what changed between releases, and that it holds every scene it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detoracle.reference.errors import InputError
from detoracle.reports.drift import changes, read_checks, write_atlas


def _failure(clause: str, file: str = "somewhere/a-1.scene.json") -> dict[str, Any]:
    return {"clause": clause, "scene": "many", "file": file, "findings": [f"{clause} anchor 3"], "times": 2}


def _write(folder: Path, release: str, *failures: dict[str, Any]) -> None:
    target = folder / "package" / release
    target.mkdir(parents=True)
    body = {"operation": "a.assign", "counts": {"equal": 5, "different": 2}, "failures": failures}
    (target / "a.assign.json").write_text(json.dumps(body), "utf-8")
    for failure in failures:
        (target / Path(failure["file"]).name).write_text(json.dumps(failure), "utf-8")
    (target / "results.json").write_text("{}", "utf-8")  # the check's own report


def test_changes_follow_releases_not_names(tmp_path: Path) -> None:
    for release in ["8.10.0", "8.2.0", "8.9.0"]:
        _write(tmp_path, release, *([_failure("a.assign[outcome]")] if release == "8.10.0" else []))
    (change,) = changes(read_checks(tmp_path))
    assert (change.before, change.after) == ("8.9.0", "8.10.0")
    assert (change.began, change.ceased) == (("a.assign[outcome]",), ())


def test_a_release_that_departs_as_the_one_before_it_changed_nothing(tmp_path: Path) -> None:
    for release in ["1.0", "1.1"]:
        _write(tmp_path, release, _failure("a.assign[outcome]"))
    assert changes(read_checks(tmp_path)) == ()


def test_atlas_holds_the_scenes_and_pictures_that_it_names(tmp_path: Path) -> None:
    _write(tmp_path / "in", "1.0", _failure("a.assign[outcome]"), _failure("a.assign[quality]", "b/a-2.scene.json"))
    (tmp_path / "in" / "package" / "1.0" / "a-1.svg").write_text("<svg/>", "utf-8")
    (tmp_path / "out" / "package" / "0.9").mkdir(parents=True)
    (tmp_path / "out" / "package" / "0.9" / "a-1.scene.json").write_text("of an earlier atlas", "utf-8")
    write_atlas(tmp_path / "in", tmp_path / "out")
    files = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    scenes = {"package/1.0/a-1.scene.json", "package/1.0/a-1.svg", "package/1.0/a-2.scene.json"}
    assert files == {"atlas.json", "atlas.md"} | scenes
    text = (tmp_path / "out" / "atlas.md").read_text("utf-8")
    assert "| `a.assign` | 1.0 | 7 | `a.assign[outcome]` (2), `a.assign[quality]` (2) |" in text
    assert "([scene](package/1.0/a-1.scene.json), [picture](package/1.0/a-1.svg)):" in text
    assert "([scene](package/1.0/a-2.scene.json)):" in text


def test_equal_scenes_are_kept_once_and_large_ones_not(tmp_path: Path) -> None:
    for release in ["1.0", "1.1"]:
        _write(
            tmp_path / "in", release, _failure("a.assign[outcome]"), _failure("a.assign[quality]", "b/a-2.scene.json")
        )
    for release in ["1.0", "1.1"]:
        (tmp_path / "in" / "package" / release / "a-2.scene.json").write_text(" " * 2**16 + "{}", "utf-8")
    write_atlas(tmp_path / "in", tmp_path / "out")
    kept = [str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.scene.json")]
    assert kept == ["package/1.0/a-1.scene.json"]
    text = (tmp_path / "out" / "atlas.md").read_text("utf-8")
    assert text.count("([scene](package/1.0/a-1.scene.json)):") == 2
    assert text.count("(scene too large to keep):") == 2


def test_atlas_names_releases_that_could_not_be_had(tmp_path: Path) -> None:
    _write(tmp_path / "in", "1.0")
    for release in ["0.10", "0.9"]:
        (tmp_path / "in" / "package" / release).mkdir()
        (tmp_path / "in" / "package" / release / "absent.txt").write_text("not in the registry\n", "utf-8")
    write_atlas(tmp_path / "in", tmp_path / "out")
    absent = json.loads((tmp_path / "out" / "atlas.json").read_text("utf-8"))["absent"]
    assert list(absent.items()) == [("package 0.9", "not in the registry"), ("package 0.10", "not in the registry")]
    text = (tmp_path / "out" / "atlas.md").read_text("utf-8")
    assert text.endswith("- package 0.9: not in the registry.\n- package 0.10: not in the registry.\n")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_file_that_is_no_check_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "p" / "1.0").mkdir(parents=True)
    (tmp_path / "p" / "1.0" / "x.y.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"x.y\.json: expected what 'detoracle check --json' writes"):
        read_checks(tmp_path)


def test_empty_folder_is_no_atlas(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got none"):
        read_checks(tmp_path)
