"""What ``detoracle replay`` makes of a saved scene: a verdict, a drawing, a program that stands alone."""

from __future__ import annotations

import importlib
import math
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from detoracle.commands.replay import replay
from detoracle.implementations.registry import load
from detoracle.properties.checking import cases
from detoracle.properties.comparison import Finding, expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.scenefile import SavedScene, write_scene
from detoracle.properties.systems import find_operation
from detoracle.reference.contract import Operation
from detoracle.reference.errors import InputError
from detoracle.reports.script import script_of

STRANGER = """
import torch
from detoracle.reference import boxes, yolox

def decode(raw, strides):
    return 2 * yolox.decode(raw, strides)

def wrong_gradient(raw, strides):
    found = yolox.decode(raw, strides)
    return found.detach() + 3 * (found - found.detach())

def in_place(raw, strides):
    for level in raw:
        level.data.add_(1)
    return yolox.decode(raw, strides)

def raises(**_):
    raise RuntimeError("on purpose")

def everybody(**arguments):
    found = yolox.assign(**arguments)
    return found.gt_index + 1, found.quality

def one_more(**arguments):
    found = yolox.assign(**arguments)
    return {"gt_index": found.gt_index, "quality": found.quality, "dynamic_k": found.extra["dynamic_k"] + 1}

def half_sure(**arguments):
    found = yolox.assign(**arguments)
    found.quality.mul_(0.5)
    return found

CALLS = []

def every_other(boxes_a, boxes_b, **form):
    CALLS.append(1)
    return boxes.iou_yolox(boxes_a, boxes_b, **form) * (1 + 1e-7 * (1 - len(CALLS) % 2))

class Namespace:
    decode = staticmethod(decode)
"""


@pytest.fixture(autouse=True)
def _adopter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def arguments_of(operation: str, scene: int = 0) -> dict[str, Any]:
    return dict(next(cases(*find_operation(operation), edge_cases()[scene])).arguments)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], Path]:
    """Judges one of the stranger's callables in this process, and writes the finding as a program."""

    def write(operation_name: str, callable_: str) -> Path:
        system, operation = find_operation(operation_name)
        module = type(sys)("stranger")
        exec((tmp_path / "stranger.py").read_text(), vars(module))
        call: Any = module
        for name in callable_.split("."):
            call = getattr(call, name)
        arguments = arguments_of(operation_name)
        verdict = expect(system, operation, arguments).judge(perform(operation, call, arguments))
        program = tmp_path / "program.py"
        program.write_text(script_of(operation, arguments, f"stranger:{callable_}", verdict.findings[0]))
        return program

    return write


@pytest.mark.parametrize(
    ("operation", "callable_", "mended", "shows"),
    [
        ("yolox.decode", "decode", "yolox.decode", "predictions["),
        ("yolox.decode", "Namespace.decode", "", "predictions["),
        ("yolox.decode", "wrong_gradient", "yolox.decode", "gradient raw[0]["),
        ("yolox.decode", "in_place", "yolox.decode", "raw[0] was written to"),
        ("yolox.decode", "raises", "yolox.decode", "on purpose"),
        ("yolox.assign", "everybody", "yolox.assign", "gt_index[0][0]: expected -1, returned 0"),
        ("yolox.assign", "one_more", "yolox.assign", "dynamic_k[0][0]: expected "),
        ("yolox.assign", "half_sure", "yolox.assign", "quality["),
    ],
)
def test_a_program_shows_what_is_wrong_until_it_is_mended(
    operation: str,
    callable_: str,
    mended: str,
    shows: str,
    written: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = written(operation, callable_)
    assert "detoracle" not in program.read_text()
    assert len(program.read_text().splitlines()) <= 32
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        runpy.run_path(str(program))
    assert shows in f"{capsys.readouterr().out}{raised.value}"
    if mended:
        program.with_name("stranger.py").write_text(f"{STRANGER}\n{callable_} = {mended}\n")
        monkeypatch.delitem(sys.modules, "stranger")
        importlib.invalidate_caches()
        runpy.run_path(str(program))


def test_a_program_runs_on_its_own(written: Callable[[str, str], Path]) -> None:
    program = [sys.executable, "-W", "error", str(written("yolox.decode", "decode"))]
    found = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stdout.startswith("predictions[")
    assert found.stderr.rstrip().endswith("AssertionError")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 4), (2, 3), (5, 7, 11)])
def test_tensors_stand_in_a_program_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    numbers = torch.randn(math.prod(shape), dtype=torch.float64)
    numbers[:3] = torch.tensor([math.nan, -math.inf, -0.0], dtype=torch.float64)[: numbers.numel()]
    value = (numbers if dtype.is_floating_point else numbers.nan_to_num(0, 0, 0)).to(dtype).reshape(shape)
    operation = find_operation("yolox.decode")[1]
    finding = Finding("yolox.decode[returns]", "", "as the test wants it")
    text = script_of(operation, {"raw": [value], "strides": value}, "builtins:dict", finding)
    (tmp_path / "program.py").write_text(text)
    found = runpy.run_path(str(tmp_path / "program.py"))["returned"]
    for given in (found["raw"][0], found["strides"]):
        assert (given.dtype, given.shape) == (value.dtype, value.shape)
        assert torch.equal(given.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_a_finding_about_several_calls_or_a_shape_is_no_program() -> None:
    operation = find_operation("yolox.decode")[1]
    arguments = arguments_of("yolox.decode")
    for clause, message in [
        ("split", "[predictions] expected 1 +- 0, got 2"),
        ("predictions", "expected shape, got one"),
    ]:
        with pytest.raises(InputError, match="one number of one call"):
            script_of(operation, arguments, "stranger:decode", Finding(f"yolox.decode[{clause}]", "", message))


class _InProcess:
    """A worker without a process, for speed."""

    def __init__(self, *, time_limit: float) -> None:
        assert time_limit > 0

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def require(self, target: str) -> None:
        load(target)

    def perform(self, operation: Operation, target: str, arguments: Mapping[str, Any]) -> Outcome:
        return perform(operation, load(target), arguments)


@pytest.fixture
def replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Saves a call and replays it: exit code and what was printed."""
    monkeypatch.setattr("detoracle.commands.replay.Worker", _InProcess)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)

    def call(operation: str, target: str, findings: tuple[str, ...] = (), **options: Path) -> tuple[int, str]:
        write_scene(tmp_path / "s.json", SavedScene(operation, "mine", arguments_of(operation), target, findings))
        try:
            replay(tmp_path / "s.json", **options)  # type: ignore[arg-type]
        except typer.Exit as ended:
            return ended.exit_code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


def test_a_drawing_shows_both_assignments(replayed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.svg", tmp_path / "right.svg"
    assert replayed("yolox.assign", "stranger:everybody", svg=wrong)[0] == 1
    assert replayed("yolox.assign", "detoracle.reference.yolox:assign", svg=right)[0] == 0
    for file, rings in ((wrong, True), (right, False)):
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert ('class="ring"' in file.read_text()) == rings
        assert file.read_text().count('class="paper"') == 2


def test_a_call_that_fails_is_drawn_as_the_oracle_alone(
    replayed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert replayed("yolox.assign", "stranger:raises", svg=tmp_path / "one.svg")[0] == 1
    assert (tmp_path / "one.svg").read_text().count('class="paper"') == 1


def test_an_operation_without_a_picture_is_an_error(replayed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--svg: expected an operation that assigns .* got yolox.decode"):
        replayed("yolox.decode", "stranger:decode", svg=tmp_path / "no.svg")
    assert not (tmp_path / "no.svg").exists()


def test_a_program_is_written_of_what_is_wrong_only(replayed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert replayed("yolox.decode", "stranger:decode", script=tmp_path / "p.py")[0] == 1
    assert "from stranger import decode" in (tmp_path / "p.py").read_text()
    with pytest.raises(InputError, match="still wrong, got equal"):
        replayed("yolox.decode", "detoracle.reference.yolox:decode", script=tmp_path / "p.py")


def test_a_violated_law_is_asked_again(replayed: Callable[..., tuple[int, str]]) -> None:
    """The call alone is right."""
    assert replayed("boxes.iou_yolox", "stranger:every_other")[0] == 0
    code, out = replayed("boxes.iou_yolox", "stranger:every_other", ("boxes.iou_yolox[deterministic] : other bits",))
    assert (code, "boxes.iou_yolox[deterministic]" in out) == (1, True)
