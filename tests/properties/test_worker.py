"""A stranger's callable in a process of its own: it may hang, die, raise or cheat, and the run goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from detoracle.properties.outputs import Outcome
from detoracle.properties.worker import Worker
from detoracle.reference import yolox
from detoracle.reference.errors import DetoracleError

STRANGER = """
import os, sys, time
import torch
from detoracle.reference.yolox import decode as right

def process(**_):
    return torch.full((1, 1, 6), float(os.getpid()), dtype=torch.float64)

def hangs(**_):
    while True:
        time.sleep(60)

def dies(**_):
    os._exit(3)

def leaves(**_):
    sys.exit(0)

def raises(**_):
    raise RuntimeError("on purpose")

def unpicklable(**_):
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__("odd")
    raise Odd(1, 2)

def mistyped(**_):
    return "0.5"

def writes(raw, strides):
    found = right(raw, strides)
    raw[0].data += 1
    return found

def counts(seen=[], **_):
    seen.append(0)
    return torch.full((1, 1, 6), float(len(seen)))

def buffer(raw, strides, made=[]):
    made.append(right(raw, strides).detach())
    return made[0].copy_(made[-1])

def speaks(raw, strides):
    print("all is well", flush=True)
    os.write(1, b"all is well")
    return right(raw, strides)

def hoards(**_):
    torch.ones(2**30)

def gradients(**_):
    return torch.full((1, 1, 6), float(torch.is_grad_enabled()))

def forges(**_):
    import gc, multiprocessing.connection
    class Runs:
        def __reduce__(self):
            return exec, ("import torch; torch.forged = True",)
    for found in gc.get_objects():
        if type(found) is multiprocessing.connection.Connection:
            found.send(Runs())

def threads(**_):
    return torch.full((1, 1, 6), float(torch.get_num_threads()))
"""
HEAD: dict[str, Any] = {"raw": [torch.zeros(1, 6, 1, 1)], "strides": [8]}
RIGHT = [[[0.0, 0, 8, 8, 0, 0]]]
DECODE = yolox.decode.operation  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One process for all that do not end it; the limit is one that only a call that hangs can reach."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "stranger.py").write_text(STRANGER)
    (folder / "broken_stranger.py").write_text("raise ImportError('a library is missing')")
    (folder / "dying_stranger.py").write_text("import os\nos._exit(7)")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with Worker(time_limit=20) as running:
            yield running


def call(worker: Worker, name: str) -> Outcome:
    return worker.perform(DECODE, f"stranger:{name}", HEAD)


def number(worker: Worker, name: str) -> float:
    return call(worker, name).outputs["predictions"][0, 0, 0].item()


def test_results_and_gradients_cross_the_border(worker: Worker) -> None:
    outcome = call(worker, "right")
    assert outcome.outputs["predictions"].tolist() == RIGHT
    assert outcome.gradients["raw[0]"] is not None
    assert number(worker, "process") != os.getpid()


def test_one_process_serves_many_calls(worker: Worker) -> None:
    first = number(worker, "counts")
    assert number(worker, "counts") == first + 1
    assert number(worker, "threads") == torch.get_num_threads()


@pytest.mark.parametrize(
    ("name", "problem", "message"),
    [
        ("raises", "raised", "RuntimeError: on purpose"),
        ("leaves", "raised", "SystemExit: 0"),
        ("unpicklable", "raised", "Odd: odd"),
        ("mistyped", "contract", "predictions: expected"),
        ("writes", "mutated-input", "raw[0] was written to"),
        ("missing", "raised", "has no attribute 'missing'"),
    ],
)
def test_problems_are_reported(name: str, problem: str, message: str, worker: Worker) -> None:
    outcome = call(worker, name)
    assert outcome.problem == problem
    assert message in outcome.message
    assert not HEAD["raw"][0].any()


def test_what_a_call_returned_can_be_seen_again(worker: Worker) -> None:
    other = {"raw": [torch.ones(1, 6, 1, 1)], "strides": [8]}
    for name, kept in (("right", True), ("buffer", False)):
        first = call(worker, name).outputs["predictions"]
        worker.perform(DECODE, f"stranger:{name}", other)
        assert torch.equal(worker.held().outputs["predictions"], first) == kept


def test_a_call_is_made_in_its_manner(worker: Worker) -> None:
    outcome = worker.perform(DECODE, "stranger:gradients", HEAD, manner="no-grad")
    assert outcome.outputs["predictions"][0, 0, 0] == 0
    assert outcome.gradients == {}
    assert number(worker, "gradients") == 1
    assert worker.perform(DECODE, "stranger:right", HEAD, manner="read-only").outputs["predictions"].tolist() == RIGHT
    assert "the process died" in worker.perform(DECODE, "stranger:writes", HEAD, manner="read-only").message


def test_what_it_prints_is_dropped(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(worker, "speaks").outputs["predictions"].tolist() == RIGHT
    assert capfd.readouterr().out == ""


def test_what_it_sends_runs_no_code_here(worker: Worker) -> None:
    with Worker(time_limit=20, memory_limit=2 << 30) as running:  # `worker` is here for its folder
        assert call(running, "forges").message == "the process sent something that is no answer"
        assert not hasattr(torch, "forged")
        running._stop()
        assert call(running, "hoards").message.startswith("RuntimeError")


def test_a_module_that_cannot_be_imported_is_the_callers_fault(worker: Worker) -> None:
    with pytest.raises(DetoracleError, match="ImportError: a library is missing"):
        worker.require("broken_stranger:f")
    assert worker.perform(DECODE, "broken_stranger:f", HEAD).problem == "raised"
    worker.require("stranger:right")


@pytest.mark.parametrize(
    ("name", "problem", "message"),
    [
        ("dies", "raised", "the process died (exit code 3)"),
        ("hangs", "timeout", "no answer within 20 s"),
    ],
)
def test_after_the_end_of_a_process_a_fresh_one_serves(name: str, problem: str, message: str, worker: Worker) -> None:
    outcome = call(worker, name)
    assert (outcome.problem, outcome.message) == (problem, message)
    assert call(worker, "right").outputs["predictions"].tolist() == RIGHT


def test_importing_may_end_the_process(worker: Worker) -> None:
    with pytest.raises(DetoracleError, match=r"dying_stranger:f: expected to be importable, got the process died"):
        worker.require("dying_stranger:f")


def test_nothing_is_left_running() -> None:
    with Worker(time_limit=2) as running:
        process = running._process
        assert process is not None
        assert process.is_alive()
    assert not process.is_alive()
