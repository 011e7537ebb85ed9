from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from detoracle.properties.known_failures import KnownFailure, problems, read_known_failures
from detoracle.reference.errors import InputError

DAY = datetime.date(2027, 1, 31)
ENTRY = '[[known-failure]]\nclause = "a[b]"\nreason = "because"\nlink = "ours/1"\nexpires = 2027-01-31\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "known.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_are_read(tmp_path: Path) -> None:
    found = read_known_failures(
        write(tmp_path, ENTRY + ENTRY.replace("a[b]", "c") + 'scene = "crowd-*"\nsetting = "top ?"\n')
    )
    assert found == (
        KnownFailure("a[b]", "because", "ours/1", DAY),
        KnownFailure("c", "because", "ours/1", DAY, "crowd-*", "top ?"),
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('reason = "because"\n', ""),
        ('link = "ours/1"\n', ""),
        ("expires = 2027-01-31\n", ""),
        ("2027-01-31", '"2027-01-31"'),
        ("2027-01-31", "2027-01-31T10:00:00"),
        ("2027-01-31", "10:00:00"),
        ('"because"', "3"),
        ('"because"', '"  "'),
        ('"a[b]"', '""'),
        ("reason", "setting = 3\nreason"),
        ("reason", 'setting = ""\nreason'),
        ("clause", "claus"),
        ("[[known-failure]]", "[known-failure]"),
        ("[[known-failure]]", "[[known_failure]]"),
        (ENTRY, "known-failure = 3"),
        (ENTRY, "known-failure = [3]"),
        (ENTRY, "["),
        (ENTRY, ""),
        ("reason", 'owner = "me"\nreason'),
    ],
)
def test_a_wrong_entry_is_refused(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^known.toml: expected"):
        read_known_failures(write(tmp_path, ENTRY.replace(old, new)))


def test_a_missing_or_undecodable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_known_failures(tmp_path / "known.toml")
    (tmp_path / "known.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UnicodeDecodeError"):
        read_known_failures(tmp_path / "known.toml")


def test_a_scene_is_a_pattern_and_a_clause_is_not() -> None:
    entry = KnownFailure("a[b]", "r", "l", DAY, "crowd-*")
    assert entry.covers("a[b]", "crowd-150")
    assert not entry.covers("a[b]", "Crowd-150")
    assert not entry.covers("ab", "crowd-150")
    assert not entry.covers("a[b]", "a crowd-150")


def test_a_setting_is_a_pattern_and_needs_the_scene_too() -> None:
    entry = KnownFailure("a[b]", "r", "l", DAY, "crowd-*", "offic*")
    assert entry.covers("a[b]", "crowd-150", "official")
    assert not entry.covers("a[b]", "crowd-150", "tutorial")
    assert not entry.covers("a[b]", "crowd-150")
    assert not entry.covers("a[b]", "ragged", "official")
    assert KnownFailure("a[b]", "r", "l", DAY).covers("a[b]", "crowd-150", "tutorial")


def test_a_setting_that_never_fails_is_named() -> None:
    entry = KnownFailure("a[b]", "because", "ours/1", DAY, setting="official")
    assert problems((entry,), [("a[b]", "any", "official")], DAY) == []
    found = problems((entry,), [("a[b]", "any", "tutorial")], DAY)
    assert found == ["known failure 'a[b]' on '*' (official) matches no failure: remove it"]


@pytest.mark.parametrize(("today", "expired"), [(DAY, False), (DAY + datetime.timedelta(1), True)])
@pytest.mark.parametrize("fails", [True, False])
def test_stale_entries_are_problems(today: datetime.date, expired: bool, fails: bool) -> None:
    failures = [("a[b]", "any"), ("other", "any")] if fails else [("other", "any")]
    found = problems((KnownFailure("a[b]", "because", "ours/1", DAY),), failures, today)
    assert len(found) == expired + (not fails)
    if expired:
        assert "expired on 2027-01-31: because (ours/1)" in found[0]


@pytest.mark.parametrize(("scene", "problem"), [("random *", False), ("random 0-1", True), ("*", True)])
def test_an_entry_for_scenes_that_a_seed_may_not_draw_may_match_nothing(scene: str, problem: bool) -> None:
    entry = KnownFailure("a[b]", "because", "ours/1", DAY, scene)
    assert bool(problems((entry,), [("a[b]", "crowd")] * (scene != "*"), DAY)) is problem
