"""The command line in process: what it prints, and 0, 1 or 2 as it is right, wrong, or wrongly called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from detoracle.cli import main
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.faults.fault import faults_of
from detoracle.properties.scenefile import SavedScene, read_scene, write_scene
from detoracle.reports.writing import read_report

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ["list", "describe", "env", "compare", "check", "certify", "bench", "gate", "golden", "replay", "explain"]
COMMANDS += ["faults", "report"]
STRANGER = """
from detoracle.reference import yolox

right = yolox.decode

def wrong(raw, strides):
    return right(raw, strides) * 2

def raises(**_):
    raise RuntimeError("on purpose")
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Calls the command line in a folder of its own, where `stranger` can be imported."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    few = edge_cases()[:8]  # for speed; all are its job
    monkeypatch.setattr("detoracle.properties.examination.edge_cases", lambda: few)

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["detoracle", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    return call


def written(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(command: str, run: Run) -> None:
    found = run(command, "--help")
    assert found.code == 0
    assert f"detoracle {command}" in found.out
    assert "Traceback" not in found.err


def test_help_lists_every_command(run: Run) -> None:
    found = run("--help")
    assert found.code == 0
    assert [name for name in COMMANDS if f"\n  {name} " not in found.out] == []
    assert run().code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["list", "--no-such-option"],
        ["describe"],
        ["describe", "yolox.asign"],
        ["check", "yolox.assign"],
        ["check", "yolox.decode", "no_such_module:f"],
        ["check", "yolox.decode", "stranger:missing"],
        ["check", "yolox.decode", "stranger"],
        ["check", "yolox.decode", "stranger:right", "--dtype", "int8"],
        ["check", "yolox.decode", "stranger:right", "--device", "tpu"],
        ["check", "yolox.decode", "stranger:right", "--examples", "-1"],
        ["check", "yolox.decode", "stranger:right", "--known-failures", "missing.toml"],
        ["golden", "missing.npz"],
        ["replay", "missing.scene.json"],
        ["report", "missing"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_2_and_no_traceback(arguments: list[str], run: Run) -> None:
    found = run(*arguments)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert "defect of detoracle" not in found.err
    assert found.err.strip()


def test_a_misspelt_operation_suggests_the_right_one(run: Run) -> None:
    assert "yolox.assign" in run("describe", "yolox.asign").err


def test_list_names_operations_and_implementations(run: Run, tmp_path: Path) -> None:
    found = run("list", "--json", "list.json")
    body = written(tmp_path / "list.json")
    assert found.code == 0
    assert isinstance(body, list)
    assert {"yolox.assign", "yolox.loss", "boxes.iou_yolox"} <= {entry["operation"] for entry in body}
    assert all(entry["operation"] in found.out for entry in body)


def test_list_counts_what_the_projects_own_file_names(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adopter.py").write_text(
        "from detoracle.implementations.registry import implements\n"
        "@implements('yolox.decode', name='adopters-own')\ndef decode(**_): ...\n"
    )
    (tmp_path / "pyproject.toml").write_text('[tool.detoracle]\nimplementations = ["adopter"]\n')
    assert "adopters-own" in run("list").out
    (tmp_path / "pyproject.toml").write_text("[tool.detoracle")
    found = run("list")
    assert (found.code, "pyproject.toml" in found.err) == (2, True)


def test_env_names_versions(run: Run, tmp_path: Path) -> None:
    found = run("env", "--json", "deep/env.json")
    assert found.code == 0
    assert torch.__version__ in found.out
    assert isinstance(written(tmp_path / "deep" / "env.json"), dict)


def test_describe_states_the_contract(run: Run, tmp_path: Path) -> None:
    found = run("describe", "yolox.assign", "--json", "d.json")
    assert found.code == 0
    for text in (
        "Inputs",
        "predictions : Tensor (B, A, 5+C) float",
        "Outputs",
        "dynamic_k",
        "Quirks",
        "Source: ",
        "def my_assign(*,",
    ):
        assert text in found.out
    body = written(tmp_path / "d.json")
    assert isinstance(body, dict)
    assert [entry["name"] for entry in body["outputs"]] == ["gt_index", "quality", "dynamic_k"]


def test_golden_replays_and_finds_an_altered_recording(run: Run, tmp_path: Path) -> None:
    import numpy as np

    with np.load(GOLDEN / "yolox_doc.npz") as file:
        arrays = {key: file[key] for key in file.files if key.startswith(("single/", "many/"))}
    description = json.loads((GOLDEN / "yolox_doc.json").read_text())
    description["scenes"] = {name: description["scenes"][name] for name in ("single", "many")}
    (tmp_path / "few.json").write_text(json.dumps(description))
    np.savez(tmp_path / "few.npz", **arrays)
    found = run("golden", "few.npz", "--json", "g.json")
    assert found.code == 0
    body = written(tmp_path / "g.json")
    assert isinstance(body, list)
    assert {check["status"] for check in body} == {"equal"}
    np.savez(tmp_path / "few.npz", **{**arrays, "many/out/cost.0": arrays["many/out/cost.0"] + 1})
    found = run("golden", "few.npz")
    assert found.code == 1
    assert "different: yolox_doc/many cost.0" in found.out
    shutil.copy(tmp_path / "stranger.py", tmp_path / "few.npz")
    assert run("golden", "few.npz").code == 2


def test_check_replay_and_known_failures(run: Run, tmp_path: Path) -> None:
    """Wrong, saved, replayed, accepted for a while, and right once more."""
    found = run("check", "yolox.decode", "stranger:wrong", "--examples", 1, "--out", "failing", "--json", "c.json")
    assert found.code == 1
    body = written(tmp_path / "c.json")
    assert isinstance(body, dict)
    assert body["verdict"] == "wrong"
    assert {failure["clause"] for failure in body["failures"]} == {"yolox.decode[predictions]"}
    [file] = (tmp_path / "failing").glob("*.scene.json")
    finding = read_report(tmp_path / "failing").findings[0]
    assert (finding.scene_file, finding.ulps > 1) == (file.name, True)
    assert f"detoracle replay {body['failures'][0]['file']}" in found.out
    assert read_scene(file).implementation == "stranger:wrong"

    again = run("replay", file, "--json", "r.json")
    assert (again.code, written(tmp_path / "r.json")["status"]) == (1, "different")  # type: ignore[index]
    assert "yolox.decode[predictions]" in again.out
    assert run("replay", file, "--implementation", "stranger:right").code == 0
    raised = run("replay", file, "--implementation", "stranger:raises")
    assert (raised.code, "RuntimeError: on purpose" in raised.out) == (1, True)


def test_a_known_failure_is_accepted_until_it_expires_or_is_gone(run: Run, tmp_path: Path) -> None:
    listed = '[[known-failure]]\nclause = "yolox.decode[predictions]"\nreason = "r"\nlink = "l"\nexpires = {}\n'
    (tmp_path / "known.toml").write_text(listed.format("2999-01-31"))
    (tmp_path / "old.toml").write_text(listed.format("1999-01-31"))
    check = ["check", "yolox.decode", "stranger:wrong", "--examples", 0]
    assert run(*check, "--known-failures", "known.toml", "--out", "known").code == 0
    report = read_report(tmp_path / "known")
    assert {row.status for row in report.rows if row.clause} == {"known-failure"}
    assert len({row.place for row in report.rows}) == len(report.rows)
    expired = run(*check, "--known-failures", "old.toml")
    assert (expired.code, "expired on 1999-01-31" in expired.out) == (1, True)
    assert read_report(tmp_path / "detoracle-check").findings  # the page says so too
    gone = run("check", "yolox.decode", "stranger:right", "--examples", 0, "--known-failures", "known.toml")
    assert (gone.code, "matches no failure" in gone.out) == (1, True)
    assert "matches no failure" in read_report(tmp_path / "detoracle-check").notes[0]
    (tmp_path / "other.toml").write_text(listed.format("2999-01-31") + 'setting = "official"\n')
    other = run(*check, "--known-failures", "other.toml")
    assert (other.code, "on '*' (official) matches no failure" in other.out) == (1, True)


def test_a_right_one_is_0(run: Run, tmp_path: Path) -> None:
    found = run("check", "yolox.decode", "stranger:right", "--examples", 2)
    assert found.code == 0
    assert "yolox.decode by stranger:right: right" in found.out
    assert not list((tmp_path / "detoracle-check").glob("*.scene.json"))


def test_a_scene_that_names_no_implementation_asks_for_one(run: Run, tmp_path: Path) -> None:
    write_scene(
        tmp_path / "s.json", SavedScene("yolox.decode", "n", {"raw": [torch.zeros(1, 6, 1, 1)], "strides": [8]})
    )
    found = run("replay", "s.json")
    assert (found.code, "--implementation" in found.err) == (2, True)
    write_scene(tmp_path / "s.json", SavedScene("no.such", "n", {}, "stranger:right"))
    assert run("replay", "s.json").code == 2
    write_scene(tmp_path / "s.json", SavedScene("yolox.decode", "n", {"strides": [8]}, "stranger:right"))
    assert run("replay", "s.json").code == 2


def test_compare_writes_a_report_and_resumes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"edge": edge_cases()[:3]}
    monkeypatch.setattr("detoracle.commands.compare.scenes_named", lambda name, seed: few[name])
    call = ("compare", "--operation", "yolox.decode", "--scenes", "edge", "--out", "report")
    found = run(*call, "--json", "copy.json")
    assert found.code == 0, found.err
    assert "6 checks, 0 findings" in found.out
    assert written(tmp_path / "copy.json") == written(tmp_path / "report" / "results.json")
    assert "<html" in (tmp_path / "report" / "report.html").read_text("utf-8")

    def refused(*_: object) -> None:
        raise AssertionError("a finished operation was compared again")

    monkeypatch.setattr("detoracle.commands.compare.compare_operation", refused)
    resumed = run(*call, "--resume")
    assert resumed.code == 0, resumed.err
    assert "6 checks, 0 findings" in resumed.out
    assert run("report", "report").code == 0


def test_compare_finds_a_stranger_wrong_and_keeps_the_others(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detoracle.commands.compare.scenes_named", lambda name, seed: edge_cases()[:2])
    call = ("compare", "--operation", "yolox.decode", "--scenes", "edge", "--out", "report")
    found = run(*call, "--implementation", "stranger:wrong", "--implementation", "batched")
    assert found.code == 1
    rows = (tmp_path / "report" / "results.csv").read_text("utf-8")
    assert rows.count("batched") == 2
    assert rows.count("different") == 2
    scene = next((tmp_path / "report" / "scenes").glob("*.scene.json"))
    assert run("replay", scene).code == 1


def test_faults_prints_the_kill_matrix(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detoracle.commands.faults.faults_of", lambda name: faults_of(name)[:3])
    found = run("faults", "--system", "yolox", "--examples", 2, "--json", "kills.json")
    assert found.code == 0
    assert "3 of 3 faults caught" in found.out
    assert run("faults", "--system", "nonsense").code == 2


def test_the_package_is_a_program_too() -> None:
    done = subprocess.run([sys.executable, "-m", "detoracle", "--help"], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout
