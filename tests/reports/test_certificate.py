"""Certificates: they state what was run, a run again confirms them, and nothing partial or wrong gets one."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from detoracle.cli import main
from detoracle.implementations.registry import load
from detoracle.properties.checking import cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import find_operation
from detoracle.properties.worker import Manner
from detoracle.reference.contract import Operation
from detoracle.reference.errors import InputError
from detoracle.reports.certificate import (
    Asked,
    Certificate,
    certify,
    differences,
    from_json,
    page_of,
    source_of,
    to_json,
)
from detoracle.reports.evidence import WatchedWorker

STRANGER = """
import torch
from detoracle.reference import boxes, yolox

right = boxes.iou_yolox

def wrong(boxes_a, boxes_b, **settings):
    return right(boxes_a, boxes_b, **settings) * 2

def no_bfloat16(boxes_a, **rest):
    if boxes_a.dtype == torch.bfloat16:
        raise TypeError("no bfloat16")
    return right(boxes_a=boxes_a, **rest)

def picky(boxes_a, boxes_b, **rest):
    found = right(boxes_a, boxes_b, **rest)
    return found + 1 if boxes_a.sum().item() + boxes_b.sum().item() == SUM else found

def two_outputs(**arguments):
    found = yolox.assign(**arguments)
    return found.gt_index, found.quality
"""
LISTED = '[[known-failure]]\nclause = "boxes.iou_yolox[iou]"\nreason = "twice"\nlink = "l"\nexpires = {}\n'


class InProcess(WatchedWorker):
    """A worker that makes the calls here, which saves most of the time of a test."""

    def __enter__(self) -> InProcess:
        self._two: deque[Outcome] = deque([Outcome(), Outcome()], maxlen=2)
        return self

    def require(self, target: str) -> None:
        load(target)

    def perform(
        self, operation: Operation, target: str, arguments: Mapping[str, Any], *, manner: Manner = "plain"
    ) -> Outcome:
        self.last = perform(operation, load(target), arguments, grad=manner != "no-grad")
        self._two.append(self.last)
        return self.last

    def held(self) -> Outcome:
        return self._two[0]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder where `stranger` can be imported; few edge cases; a suite that nobody edits."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    few = edge_cases()[:12]
    monkeypatch.setattr("detoracle.properties.examination.edge_cases", lambda: few)
    monkeypatch.setattr("detoracle.reports.certificate.source_hash", lambda: "0" * 64)
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process."""

    def bare(
        operation: Operation, target: str, calls: Sequence[Mapping[str, Any]], *, time_limit: float
    ) -> list[Outcome]:
        return [perform(operation, load(target), arguments, grad=False) for arguments in calls]

    monkeypatch.setattr("detoracle.reports.certificate.WatchedWorker", InProcess)
    monkeypatch.setattr("detoracle.properties.trials.perform_bare", bare)


def _asked(name: str = "right", examples: int = 4, operation: str = "boxes.iou_yolox") -> Asked:
    return Asked(operation, f"stranger:{name}", examples, 0, "cpu")


def _certificate(**more: Any) -> Certificate:
    certificate, shortfalls = certify(_asked(**more))
    assert certificate is not None, shortfalls
    return certificate


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["detoracle", "certify", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0
    return 0


# ---------------------------------------------------------------------------------------------------- what it states
def test_certified_and_confirmed_in_processes_of_their_own(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "boxes.iou_yolox", "stranger:right", "--examples", 4, "--out", "c.json") == 0
    clauses = len(_read(place).clauses)
    assert f"clauses: {clauses} passed, 0 expected to fail, 0 skipped" in capsys.readouterr().out
    assert "<title>boxes.iou_yolox by stranger:right" in (place / "c.html").read_text("utf-8")
    assert _run(monkeypatch, "--verify", "c.json") == 0
    assert "c.json: confirmed" in capsys.readouterr().out
    with (place / "stranger.py").open("a") as file:
        file.write("# one more line\n")
    assert _run(monkeypatch, "--verify", "c.json") == 1
    out = capsys.readouterr().out
    assert ("source: " in out, "c.json: differs" in out) == (True, True)


def _read(place: Path) -> Certificate:
    return from_json((place / "c.json").read_text("utf-8"))


@pytest.mark.usefixtures("here")
def test_it_states_what_was_run() -> None:
    found = _certificate()
    assert (found.scenes, found.checks) == (16, sum(found.verdicts.values()))
    assert found.cases < found.checks == sum(found.dtypes.values())
    assert set(found.dtypes) == {"float32", "float64", "bfloat16"}
    assert {clause.verdict for clause in found.clauses} == {"passed"}
    assert all(clause.judged for clause in found.clauses)
    assert {"boxes.iou_yolox[iou]", "boxes.iou_yolox[keeps-results]"} <= {clause.id for clause in found.clauses}
    assert found.environment["torch"] == torch.__version__
    assert (found.refused, found.compile_modes) == ({}, ("as given",))
    assert differences(found, _certificate()) == []


@pytest.mark.usefixtures("here")
def test_a_dtype_that_is_refused_is_said_to_be() -> None:
    found = _certificate(name="no_bfloat16")
    assert found.refused == {"bfloat16": found.dtypes["bfloat16"]}


@pytest.mark.usefixtures("here")
def test_an_optional_output_that_never_came_is_skipped() -> None:
    found = _certificate(name="two_outputs", operation="yolox.assign", examples=6)
    skipped = [(clause.id, clause.reason) for clause in found.clauses if clause.verdict == "skipped"]
    assert skipped == [("yolox.assign[dynamic_k]", "the output is optional, and was never returned")]
    assert found.positives > 0


@pytest.mark.usefixtures("here")
def test_failures_may_be_expected(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(scene for scene in edge_cases()[:12] if scene.max_gts)
    case = next(cases(*find_operation("boxes.iou_yolox"), scene))
    with (place / "stranger.py").open("a") as file:
        file.write(f"SUM = {sum(case.arguments[name].sum().item() for name in ('boxes_a', 'boxes_b'))!r}\n")
    (place / "known.toml").write_text(LISTED.format("2999-01-31") + f'scene = "{scene.name}"\n')
    call = ("boxes.iou_yolox", "stranger:picky", "--examples", 4, "--out", "c.json")
    assert _run(monkeypatch, *call) == 1
    assert _run(monkeypatch, *call, "--known-failures", "known.toml") == 0
    (failing,) = [clause for clause in _read(place).clauses if clause.verdict == "expected to fail"]
    assert (failing.id, failing.reason) == ("boxes.iou_yolox[iou]", "twice (l)")
    assert 0 < failing.failures < failing.judged
    assert "expected to fail</bdi>: <bdi>twice (l)" in (place / "c.html").read_text("utf-8")
    assert _run(monkeypatch, "--verify", "c.json") == 0


# ------------------------------------------------------------------------------------------------ what there is none of
@pytest.mark.usefixtures("here")
def test_a_wrong_one_gets_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "boxes.iou_yolox", "stranger:wrong", "--examples", 2, "--out", "c.json") == 1
    out = capsys.readouterr().out
    assert "boxes.iou_yolox[iou] fails on " in out
    assert out.endswith("boxes.iou_yolox by stranger:wrong: no certificate\n")
    assert sorted(file.name for file in place.iterdir() if file.suffix in {".json", ".html"}) == []


@pytest.mark.usefixtures("here")
def test_a_clause_that_was_never_judged_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detoracle.properties.examination.edge_cases", tuple)
    certificate, shortfalls = certify(_asked(examples=1))
    assert certificate is None
    assert all("was never judged: more --examples may do it" in text for text in shortfalls)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("calls", [1, 30])
def test_a_call_that_timed_out_leaves_none(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = InProcess.perform
    made = 0

    def perform(self: InProcess, *arguments: Any, **manner: Any) -> Outcome:
        nonlocal made
        made += 1
        if made == calls:
            return Outcome(problem="timeout", message="no answer within 60 s")
        return ordinary(self, *arguments, **manner)

    monkeypatch.setattr(InProcess, "perform", perform)
    certificate, shortfalls = certify(_asked())
    assert (certificate, shortfalls[0]) == (None, "1 calls ran into the time limit")


@pytest.mark.usefixtures("here")
def test_an_interrupted_run_leaves_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(InProcess, "perform", interrupted)
    assert _run(monkeypatch, "boxes.iou_yolox", "stranger:right", "--out", "c.json") not in (0, 1)
    assert not (place / "c.json").exists()


@pytest.mark.usefixtures("here")
def test_a_source_that_changes_meanwhile_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["a", "b"])
    monkeypatch.setattr("detoracle.reports.certificate.source_hash", lambda: next(hashes))
    assert certify(_asked()) == (None, ["the source changed while it was run"])


@pytest.mark.usefixtures("here")
def test_a_list_of_known_failures_that_is_stale_leaves_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "known.toml").write_text(LISTED.format("2999-01-31"))
    call = ("boxes.iou_yolox", "stranger:right", "--examples", 4, "--known-failures", "known.toml", "--out", "c.json")
    assert _run(monkeypatch, *call) == 1
    assert not (place / "c.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["boxes.iou_yolox"],
        ["no.such", "stranger:right"],
        ["boxes.iou_yolox", "no_such_module:f"],
        ["boxes.iou_yolox", "stranger:right", "--examples", "0"],
        ["boxes.iou_yolox", "stranger:right", "--device", "tpu"],
        ["boxes.iou_yolox", "stranger:right", "--out", "c.txt"],
        ["boxes.iou_yolox", "stranger:right", "--verify", "c.json"],
        ["--verify", "missing.json"],
        ["--verify", "stranger.py"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.strip()
    assert "defect of detoracle" not in err


# --------------------------------------------------------------------------------------------------- as a document
@pytest.fixture(scope="module")
def one() -> Certificate:
    body: dict[str, Any] = {
        "asked": Asked("yolox.assign", "mine:f", 1, 0, "cpu"), "source": "1", "suite": "2", "scenes": 1, "cases": 1,
        "checks": 1, "verdicts": {"equal": 1}, "dtypes": {"float32": 1}, "refused": {}, "compile_modes": ("as given",),
        "positives": 8, "ambiguous": 2, "clauses": (), "environment": {"torch": "2.6"}, "started": "s", "seconds": 1.0,
    }  # fmt: skip
    return Certificate(**body)


def test_what_is_written_is_read_back(one: Certificate) -> None:
    assert from_json(to_json(one)) == one
    assert json.loads(to_json(one))["ambiguity_share"] == 2 / 8


@pytest.mark.parametrize(
    "change",
    [
        lambda one: replace(one, source="3"),
        lambda one: replace(one, suite="3"),
        lambda one: replace(one, checks=2),
        lambda one: replace(one, verdicts={"ambiguous": 1}),
        lambda one: replace(one, ambiguous=3),
    ],
)
def test_every_verdict_count_and_hash_counts(change: Callable[[Certificate], Certificate], one: Certificate) -> None:
    assert len(differences(one, change(one))) == 1


def test_where_and_when_it_ran_may_differ(one: Certificate) -> None:
    assert differences(one, replace(one, environment={"torch": "9"}, started="t", seconds=2.0)) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "detoracle-certificate/2"}', None])
def test_what_is_no_certificate_is_refused(text: str | None, one: Certificate) -> None:
    with pytest.raises(InputError, match="expected detoracle-certificate/1"):
        from_json(to_json(one).replace('"cases": 1', '"cases": "1"') if text is None else text)


def test_a_module_is_found_without_being_run(place: Path) -> None:
    (place / "pack").mkdir()
    (place / "pack" / "__init__.py").write_text("raise RuntimeError")
    (place / "pack" / "mine.py").write_text("raise RuntimeError")
    first = source_of("pack.mine:f")
    (place / "pack" / "mine.py").write_text("raise RuntimeError()")
    assert source_of("pack.mine:f") != first
    for target in ("pack.missing:f", "missing:f", "stranger.deeper:f", "sys:exit"):
        with pytest.raises(InputError, match="whose module is a file"):
            source_of(target)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a\x00b\u202e", "\"' onload=", "n" * 4000])
def test_hostile_names_are_text_on_the_page(text: str, one: Certificate) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.found.append(tag)

    def tags(name: str) -> list[str]:
        asked = replace(one.asked, operation=name, implementation=name, device=name)
        page = page_of(replace(one, asked=asked, environment={name: name}, verdicts={name: 1}, dtypes={name: 1}))
        assert "\x00" not in page
        assert "\u202e" not in page
        parser = Tags()
        parser.feed(page)
        return parser.found

    assert tags(text) == tags("plain")
