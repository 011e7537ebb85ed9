"""The gate: every rule with a change that breaks it; the clock is never asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from detoracle.cli import app
from detoracle.reference.errors import InputError
from detoracle.reports.characteristics import measure_gate
from detoracle.reports.gate import COUNTERS, Change, Timed, changes, environment_key, same_machine, timing_change
from detoracle.reports.history import append, read
from detoracle.reports.record import Measurement, Report, Row
from detoracle.reports.timing import Timing
from detoracle.reports.writing import write_report

MACHINE: dict[str, str | int | bool] = {
    "torch": "2.13.0",
    "python": "3.11.7",
    "system": "Linux",
    "cpu": "one",
    "threads": 2,
}
MEASURED = Measurement(
    operation="yolox.loss",
    implementation="mine",
    workload="16x20",
    milliseconds=2.0,
    times_faster=10.0,
    low=9.9,
    high=10.1,
    baseline="loop",
    rounds=20,
    operations=100,
    host_syncs=0,
    bytes_read=10,
    bytes_written=10,
    peak_live_bytes=10,
    phase="forward",
    batch=16,
    gts=20,
    anchors=8400,
    classes=80,
    inputs="abc",
)
ROWS = (
    Row("yolox.loss", "mine", "one box", "tutorial", "equal"),
    Row("yolox.loss", "mine", "crowd", "", "undefined"),
)
REPORT = Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, MACHINE, rows=ROWS, measurements=(MEASURED,))


def found(current: Report, baseline: Report = REPORT, again: Timed | None = None) -> tuple[Change, ...]:
    return changes(baseline, current, threshold=lambda _: 1.05, again=lambda _: again)


def failures(current: Report, again: Timed | None = None) -> list[str]:
    return [change.outcome for change in found(current, again=again) if change.fails]


def with_status(status: str) -> Report:
    return replace(REPORT, rows=(replace(REPORT.rows[0], status=status), REPORT.rows[1]))


def measured(**changed: float | int | str) -> Report:
    return replace(REPORT, measurements=(replace(MEASURED, **changed),))  # type: ignore[arg-type]


def test_nothing_changed_passes() -> None:
    assert [change.outcome for change in found(REPORT)] == ["same"]
    assert failures(REPORT) == []


@pytest.mark.parametrize("status", ["different", "raised", "timeout", "mutated-input", "undefined"])
def test_a_worse_verdict_fails(status: str) -> None:
    assert failures(with_status(status)) == ["worse"]


def test_equal_or_ambiguous_is_a_matter_of_rounding() -> None:
    assert failures(with_status("ambiguous")) == []
    assert changes(with_status("ambiguous"), REPORT, threshold=lambda _: 2.0, again=lambda _: None)[0].kind == "timing"


def test_a_better_verdict_is_shown() -> None:
    shown = found(REPORT, baseline=with_status("different"))
    assert [(change.outcome, change.fails) for change in shown if change.kind == "verdict"] == [("better", False)]


def test_a_run_that_checked_less_fails() -> None:
    assert failures(replace(REPORT, rows=REPORT.rows[:1])) == ["missing"]
    assert failures(replace(REPORT, measurements=())) == ["missing"]


def test_more_checks_are_no_change() -> None:
    more = (*REPORT.rows, Row("yolox.loss", "mine", "another", "", "different"))
    assert failures(replace(REPORT, rows=more)) == []


@pytest.mark.parametrize("counter", COUNTERS)
def test_counters_are_exact(counter: str) -> None:
    more = found(measured(**{counter: getattr(MEASURED, counter) + 1}))
    assert [(c.outcome, c.fails) for c in more if c.kind == "counter"] == [("more", True)]
    fewer = found(measured(**{counter: getattr(MEASURED, counter) - 1}))
    assert [(c.outcome, c.fails) for c in fewer if c.kind == "counter"] == [("fewer", False)]


def test_other_inputs_under_the_same_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"same inputs.*--accept"):
        found(measured(inputs="abd"))


def test_a_slower_one_fails_only_if_it_is_slower_again() -> None:
    slow = Timing(1.0, (), 8.0, 7.9, 8.1)
    report = measured(times_faster=8.0, low=7.9, high=8.1)
    assert failures(report, again=slow) == ["slower"]
    assert failures(report, again=MEASURED) == []
    assert failures(report, again=None) == []


def test_timings_of_another_machine_or_baseline_are_not_compared() -> None:
    slow = measured(times_faster=1.0, low=0.9, high=1.1)
    elsewhere = replace(slow, environment={**MACHINE, "cpu": "another"})
    assert [change.outcome for change in found(elsewhere)] == ["not compared"]
    rival = measured(times_faster=1.0, low=0.9, high=1.1, baseline="rival")
    assert [change.outcome for change in found(rival)] == ["not compared"]


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict"),
    [
        (8.0, 7.9, 8.1, "slower"),
        (12.0, 11.9, 12.1, "faster"),
        (10.1, 10.0, 10.2, "same"),
        (8.0, 5.0, 12.0, "inconclusive"),
        (9.5, 9.4, 9.6, "inconclusive"),
        (8.0, 0.0, float("inf"), "inconclusive"),
    ],
)
def test_only_an_interval_beyond_the_threshold_decides(ratio: float, low: float, high: float, verdict: str) -> None:
    assert timing_change(MEASURED, Timing(1.0, (), ratio, low, high), 1.05) == verdict


def test_the_key_names_software_and_leaves_the_machine_out() -> None:
    assert environment_key(MACHINE) == environment_key({**MACHINE, "cpu": "another", "python": "3.11.9"})
    assert environment_key(MACHINE) != environment_key({**MACHINE, "torch": "2.6.0"})
    assert not same_machine(MACHINE, {**MACHINE, "threads": 4})


def test_counters_of_the_gate_itself_are_never_wrong() -> None:
    rates = {(rate.what, rate.slowdown): rate.share for rate in measure_gate(3, threshold=1.05, rounds=1)}
    assert rates["counters", 0.0] == 0
    assert rates["counters", 1.0] == 1


# ------------------------------------------------------------------------------------------------------- command
def gate(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["gate", *arguments])
    if isinstance(result.exception, InputError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_accept_then_pass_then_fail(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path / "run")
    folders = "--baseline", str(tmp_path / "base"), "--run", str(tmp_path / "run")
    assert gate(*folders)[0] == 2
    assert gate(*folders, "--accept")[0] == 0
    assert gate(*folders) == (0, gate(*folders)[1])
    write_report(with_status("different"), tmp_path / "run")
    code, text = gate(*folders, "--json", str(tmp_path / "changes.json"))
    assert code == 1
    assert "FAILS" in text
    assert json.loads((tmp_path / "changes.json").read_text())["changes"][0]["outcome"] == "worse"
    assert len(read(tmp_path / "base" / "history.jsonl")) == 4


def test_a_known_failure_that_matches_nothing_fails(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path / "run")
    known = tmp_path / "known.toml"
    known.write_text('[[known-failure]]\nclause="a"\nreason="b"\nlink="c"\nexpires=2099-01-31\n')
    folders = "--baseline", str(tmp_path / "base"), "--run", str(tmp_path / "run")
    gate(*folders, "--accept")
    code, text = gate(*folders, "--known-failures", str(known))
    assert code == 1
    assert "matches no failure" in text


def test_without_a_baseline_it_says_what_to_do() -> None:
    assert "--self-test" in gate()[1]


def test_thresholds_come_from_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(REPORT, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("[tool.detoracle.gate]\nthreshold = 0.5\n")
    assert "factors above 1" in gate("--baseline", "base")[1]


# ------------------------------------------------------------------------------------------------------- history
def test_a_torn_line_is_skipped_and_another_format_is_not(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    append(REPORT, file)
    with file.open("a") as stream:
        stream.write('{"format": "detor\n')
    append(REPORT, file)
    assert [entry.verdicts for entry in read(file)] == [{"equal": 1, "undefined": 1}] * 2
    file.write_text('{"format": "another"}\n')
    with pytest.raises(InputError, match="line 1"):
        read(file)
