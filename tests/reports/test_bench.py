"""The bench on tiny workloads: what it checks, counts and fits; never how long anything took."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from detoracle.cli import app
from detoracle.implementations.batched import yolox as batched
from detoracle.implementations.loop import yolox as loop
from detoracle.properties.outputs import perform
from detoracle.properties.systems import find_operation
from detoracle.reference.errors import InputError
from detoracle.reports.agreement import agreement
from detoracle.reports.bench import Bench, copy_speed, growth, measure
from detoracle.reports.record import Measurement, Row
from detoracle.reports.workloads import Workload, rolled, workload_case

TINY = Workload(2, 3, 84, 4)
LOSS = find_operation("yolox.loss")


def run(calls: dict[str, Callable[..., Any]], **changes: Any) -> tuple[tuple[Row, ...], tuple[Measurement, ...]]:
    bench = Bench(rounds=2, **changes)
    return measure(*LOSS, calls, TINY, bench, baseline=next(iter(calls)), bytes_a_second=1e9)


def halved(**given: Any) -> Any:
    return {name: value / 2 for name, value in loop.loss(**given).items()}


def raising(**given: Any) -> Any:
    raise RuntimeError("no")


class Remembers:
    """Right on the first call, which it answers ever after."""

    def __call__(self, **given: Any) -> Any:
        if not hasattr(self, "answer"):
            self.answer = loop.loss(**given)
        return {name: value + 0 * sum(level.sum() for level in given["raw"]) for name, value in self.answer.items()}


def writing(**given: Any) -> Any:
    result = loop.loss(**given)
    given["raw"][0].data.zero_()
    return result


def test_right_ones_are_measured_and_counted() -> None:
    rows, measurements = run({"loop": loop.loss, "batched": batched.loss})
    assert [row.status for row in rows] == ["equal", "equal"]
    slow, fast = measurements
    assert slow.baseline == fast.baseline == "loop"
    assert (fast.batch, fast.gts, fast.anchors, fast.classes) == (2, 3, 84, 4)
    assert fast.host_syncs == 0 < slow.host_syncs
    assert fast.phase == "forward and backward"
    assert fast.checked == 4
    assert fast.floor_share > 0


def test_chosen_scenes_are_named() -> None:
    rows, (measured,) = run({"loop": loop.loss}, scenes="crowd")
    assert rows[0].scene == "2x3, 84 anchors, 4 classes, crowd"
    assert measured.workload == "2x3, 84 anchors, 4 classes, crowd (tutorial)"


def test_a_workload_without_an_answer_is_refused() -> None:
    large = Workload(1, 20, 2100, 4)  # in bfloat16 the last bin's limit rounds up to a bin that does not exist
    with pytest.raises(InputError, match=r"on which the published system has an answer.*dfl-target-out-of-range"):
        measure(*find_operation("yolov8.loss"), {}, large, Bench(dtype=torch.bfloat16), baseline="", bytes_a_second=1e9)


def test_counters_do_not_move_between_runs() -> None:
    names = ("operations", "host_syncs", "bytes_read", "bytes_written", "peak_live_bytes")
    first, second = (
        [tuple(getattr(m, name) for name in names) for m in run({"loop": loop.loss, "batched": batched.loss})[1]]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("wrong", [halved, raising, Remembers()])
def test_a_wrong_one_is_a_finding_and_not_timed(wrong: Callable[..., Any]) -> None:
    rows, measurements = run({"loop": loop.loss, "wrong": wrong})
    assert [row.status for row in rows] == ["equal", "different"]
    assert [m.implementation for m in measurements] == ["loop"]


def test_a_wrong_rival_is_a_finding_and_still_the_baseline() -> None:
    rows, measurements = run({"rival": halved, "loop": loop.loss})
    assert [row.status for row in rows] == ["different", "equal"]
    assert [m.implementation for m in measurements] == ["rival", "loop"]


def test_forward_alone_costs_less() -> None:
    _, (both,) = run({"loop": loop.loss})
    _, (forward,) = run({"loop": loop.loss}, forward=True)
    assert forward.phase == "forward"
    assert forward.operations < both.operations


def test_growth_is_the_slope_of_the_logarithms() -> None:
    (one,) = run({"loop": loop.loss})[1]
    sizes = [replace(one, gts=gts, milliseconds=gts**1.5, peak_live_bytes=1000 * gts) for gts in (2, 8, 32)]
    (fit,) = growth(sizes)
    assert (fit.axis, fit.points) == ("gts", 3)
    assert round(fit.time_exponent, 6) == 1.5
    assert round(fit.bytes_exponent, 3) == 1.0
    assert growth(sizes[:2]) == ()


def test_a_copy_has_a_speed() -> None:
    assert copy_speed(rounds=1) > 0


@pytest.mark.parametrize(
    "name", ["yolox.loss", "yolov8.loss", "rtmdet.loss", "ssd.loss", "yolox.assign", "rtmdet.assign"]
)
def test_agreement_accepts_the_oracle_in_any_order_and_no_other_answer(name: str) -> None:
    system, operation = find_operation(name)
    workload = replace(TINY, anchors=8732) if name.startswith("ssd") else TINY
    given = workload_case(system, operation, workload).arguments
    right = agreement(system, operation, given)
    outcome = perform(operation, operation.oracle, rolled(operation, given, 1))
    assert right.problem(outcome, 1) == ""
    if not all(torch.equal(output, output.roll(1, 0)) for output in outcome.outputs.values() if output.ndim):
        assert right.problem(outcome, 0) != ""  # images swapped
    for output in outcome.outputs:
        changed = {**outcome.outputs, output: outcome.outputs[output] + 1}
        assert right.problem(replace(outcome, outputs=changed), 1) != ""
    for gradient, value in outcome.gradients.items():
        assert value is not None
        changed_gradients = {**outcome.gradients, gradient: value * 1.001}
        assert (right.problem(replace(outcome, gradients=changed_gradients), 1) != "") == bool(value.any())
        assert right.problem(replace(outcome, gradients={**outcome.gradients, gradient: None}), 1) != ""


def test_the_command_writes_a_report_and_goes_on(tmp_path: Path) -> None:
    arguments = ["bench", "yolox.assign", "--batch", "1", "--gts", "2", "--gts", "4", "--gts", "8", "--anchors", "84"]
    arguments += ["--rounds", "1", "--out", str(tmp_path), "--json", str(tmp_path / "again.json")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    body = json.loads((tmp_path / "results.json").read_text())
    assert {m["gts"] for m in body["measurements"]} == {2, 4, 8}
    assert {fit["axis"] for fit in body["growth"]} == {"gts"}
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "results.json").read_text())["measurements"] == body["measurements"]


def test_the_command_refuses_what_is_not_there() -> None:
    result = CliRunner().invoke(app, ["bench", "yolox.assign", "--implementation", "nobody"])
    assert result.exit_code != 0
    assert "batched" in str(result.exception)
