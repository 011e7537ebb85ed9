"""The CI templates that third parties copy: valid, and in step with the command line and with what a run writes."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from typer.main import get_command

from detoracle.cli import app
from detoracle.reports.record import Report
from detoracle.reports.writing import write_report

TEMPLATES = {name: Path(__file__).parents[1] / "docs" / "ci" / f"{name}.yml" for name in ("github", "gitlab")}
NAMES = {"OPERATION": "yolox.assign", "CALLABLE": "mypackage.assign:simota"}


def _jobs(name: str) -> dict[str, list[str]]:
    """Shell scripts of each job, step by step."""
    body: dict[str, Any] = yaml.safe_load(TEMPLATES[name].read_text("utf-8"))
    if name == "github":
        return {job: [s["run"] for s in settings["steps"] if "run" in s] for job, settings in body["jobs"].items()}
    jobs = {job: settings for job, settings in body.items() if job != "variables" and not job.startswith(".")}
    shared = body[".detoracle"]["before_script"]
    return {job: [*shared, *body_["script"], *body_.get("after_script", [])] for job, body_ in jobs.items()}


def _commands(scripts: list[str]) -> Iterator[list[str]]:
    """Calls of our command line, as words."""
    for script in scripts:
        for line in script.replace("\\\n", " ").splitlines():
            if line.strip().startswith("detoracle "):
                words = shlex.split(line.partition("||")[0])
                yield [NAMES.get(word.removeprefix("$"), word) for word in words[1:]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_command_is_one_of_ours(name: str) -> None:
    command = get_command(app)
    found = [words for scripts in _jobs(name).values() for words in _commands(scripts)]
    assert {words[0] for words in found} == {"check", "compare", "gate"}
    for words in found:
        chosen = command.get_command(None, words[0])  # type: ignore[attr-defined]
        assert chosen is not None
        chosen.make_context(words[0], list(words[1:]))  # parses, and raises on what it does not know


def test_what_the_command_line_does_not_know_is_caught() -> None:
    command = get_command(app)
    chosen = command.get_command(None, "gate")  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="No such option"):
        chosen.make_context("gate", ["--base", "detoracle-baseline"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_installs_checks_gates_comments_and_keeps_a_baseline(name: str) -> None:
    asked, released = _jobs(name).values()
    assert asked[0] == released[0] == "pip install detoracle -e ."
    assert [words[0] for words in _commands(asked)] == ["check", "compare", "gate"]
    assert [words[0] for words in _commands(released)] == ["compare", "gate"]
    assert [words[-1] for words in _commands(released)][-1] == "--accept"
    assert any("detoracle-report/summary.md" in script for script in asked)
    written = [
        words[words.index("--out") + 1] for words in (*_commands(asked), *_commands(released)) if "--out" in words
    ]
    gated = [words[words.index("--run") + 1] for words in (*_commands(asked), *_commands(released)) if "--run" in words]
    assert set(gated) <= set(written)


@pytest.mark.parametrize("name", TEMPLATES)
def test_files_that_it_names_are_written_by_a_run(name: str, tmp_path: Path) -> None:
    write_report(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}), tmp_path)
    named = set(re.findall(r"detoracle-report/([\w.]+\.\w+)", TEMPLATES[name].read_text("utf-8")))
    assert named
    assert named <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_its_scripts_are_shell(name: str) -> None:
    for scripts in _jobs(name).values():
        checked = subprocess.run(["bash", "-n"], input="\n".join(scripts), capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_no_expression_is_pasted_into_a_script() -> None:
    """What a pull request's author chooses reaches a shell by the environment, or it could run there."""
    for scripts in _jobs("github").values():
        assert not [script for script in scripts if "${{" in script]
