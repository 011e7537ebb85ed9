"""What goes wrong around a run: killed at any moment, a full disk, a folder that is read-only or taken.

One process imports the suite once and then forks for every run, which saves most of the time; in it, `compare` has few
scenes and calls the implementations itself, but for the test that says otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked run: needs os.fork")

FILES = ["badge.svg", "junit.xml", "measurements.csv", "report.html", "results.csv", "results.json", "summary.md"]
OPERATIONS = ["yolox.decode", "boxes.iou_yolox"]
COMPARE = ["compare", "--scenes", "edge", "--out", "report", *(f"--operation={name}" for name in OPERATIONS)]
WRITES = [*OPERATIONS, *FILES]  # in some order, the files that a run puts into place, one after the other
HOST = r"""
import json, os, resource, signal, sys, torch
from pathlib import Path
import detoracle.commands.compare as command
from detoracle.cli import main
from detoracle.implementations.registry import discover, load
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.worker import Worker

torch.set_num_threads(1)
few = edge_cases()[:3]
command.scenes_named = lambda name, seed: few
discover()  # imports them all, here and not in each run, as does the next line what gradients need
import torch._dynamo

class InProcess(Worker):
    def __enter__(self):
        return self
    def perform(self, operation, target, arguments):
        return perform(operation, load(target), arguments)

class Noted(Worker):
    def _start(self):
        super()._start()
        Path("worker").write_text(str(self._process.pid))

class HalfWritten:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

def killed(number, moment):
    # Die at the number-th file that is put into place: when it is half written, whole but not in place, or in place.
    replace, fdopen, count = Path.replace, os.fdopen, {"replace": 0, "fdopen": 0}
    def counted(self, target):
        count["replace"] += 1
        if (count["replace"], moment) == (number, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(self, target)
        if (count["replace"], moment) == (number, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
    def opened(*arguments, **more):
        count["fdopen"] += "newline" in more  # the lock has none
        file = fdopen(*arguments, **more)
        found = (count["fdopen"], moment, "newline" in more)
        return HalfWritten(file) if found == (number, "half", True) else file
    Path.replace, os.fdopen = counted, opened

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.chdir(asked["place"])
        for stream in (1, 2):
            os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        command.Worker = Noted if asked.get("workers") else InProcess
        if "kill" in asked:
            killed(*asked["kill"])
        if "room" in asked:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["room"], asked["room"]))
        if asked.get("stranger") and os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        sys.argv = ["detoracle", *asked["arguments"]]
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        else:
            code = 0
        finally:
            sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
"""


class Ran(NamedTuple):
    code: int
    printed: str


class Host:
    """The process that forks."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", HOST]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, place: Path, arguments: list[str], **how: Any) -> int:
        """Start a run in a folder; its process number."""
        (place / "printed").unlink(missing_ok=True)
        return self._answer(place=str(place), arguments=arguments, **how)

    def wait(self, process: int) -> int:
        """Wait for a run to its end; its exit code."""
        return self._answer(wait=process)

    def run(self, place: Path, *arguments: str, **how: Any) -> Ran:
        """Start a run and wait for it."""
        return Ran(self.wait(self.start(place, list(arguments), **how)), (place / "printed").read_text("utf-8"))

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self, **question: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    one = Host()
    yield one
    one.close()


@pytest.fixture(scope="module")
def whole(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run came to its end."""
    place = tmp_path_factory.mktemp("whole")
    ran = host.run(place, *COMPARE)
    assert ran.code == 0, ran.printed
    assert _names(place) == FILES
    return place


def _names(place: Path) -> list[str]:
    return sorted(file.name for file in (place / "report").iterdir() if file.is_file())


def _same_rows(place: Path, whole: Path) -> bool:
    rows = [json.loads((one / "report" / "results.json").read_text("utf-8"))["rows"] for one in (place, whole)]
    tables = [(one / "report" / "results.csv").read_bytes() for one in (place, whole)]
    return rows[0] == rows[1] and tables[0] == tables[1]


def _assert_whole(folder: Path) -> None:
    """Every file that can be seen is a whole one."""
    for file in folder.rglob("*"):
        if file.is_dir() or file.name.startswith("."):
            continue
        text = file.read_text("utf-8")
        if file.suffix == ".json":
            json.loads(text)
        elif file.suffix in {".xml", ".svg"}:
            ET.fromstring(text)
        else:
            assert text.endswith("</html>\n" if file.suffix == ".html" else "\n"), file.name


# ---------------------------------------------------------------------------------------------------------- killed
@pytest.mark.parametrize(
    ("number", "moment"),
    [(1, "half"), (2, "half"), (3, "half"), (len(WRITES), "half"), (1, "before"), (1, "after"), (5, "after")],
)
def test_a_killed_run_leaves_nothing_half_and_goes_on(
    number: int, moment: str, host: Host, whole: Path, tmp_path: Path
) -> None:
    killed = host.run(tmp_path, *COMPARE, kill=[number, moment])
    assert killed.code == -signal.SIGKILL, killed.printed
    _assert_whole(tmp_path / "report")
    finished = {file.name.removesuffix(".json") for file in (tmp_path / "report" / "parts").glob("[!.]*.json")}
    assert len(finished) == min(number - (moment != "after"), len(OPERATIONS))
    resumed = host.run(tmp_path, *COMPARE, "--resume")
    assert resumed.code == 0, resumed.printed
    assert _same_rows(tmp_path, whole)
    assert set(FILES) <= set(_names(tmp_path))


def test_a_run_that_is_killed_while_it_writes_over_another_keeps_the_other(
    host: Host, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "report", tmp_path / "report")
    killed = host.run(tmp_path, *COMPARE, "--seed", "7", kill=[len(OPERATIONS) + 1, "half"])
    assert killed.code == -signal.SIGKILL
    for name in FILES:
        assert (tmp_path / "report" / name).read_bytes() == (whole / "report" / name).read_bytes()


def test_workers_end_with_a_killed_run(host: Host, whole: Path, tmp_path: Path) -> None:
    """With the real workers, killed from outside as soon as one operation is finished."""
    run = host.start(tmp_path, [*COMPARE, "--implementation", "loop"], workers=True)
    first = tmp_path / "report" / "parts" / f"{OPERATIONS[0]}.json"
    _wait(first.exists)
    os.kill(run, signal.SIGKILL)
    assert host.wait(run) == -signal.SIGKILL
    worker = int((tmp_path / "worker").read_text())
    _wait(lambda: not _runs(worker))
    _assert_whole(tmp_path / "report")
    resumed = host.run(tmp_path, *COMPARE, "--implementation", "loop", "--resume")
    assert resumed.code == 0, resumed.printed
    rows = json.loads((tmp_path / "report" / "results.json").read_text("utf-8"))["rows"]
    all_rows = json.loads((whole / "report" / "results.json").read_text("utf-8"))["rows"]
    assert rows == [row for row in all_rows if row["implementation"] == "loop"]


def _wait(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _runs(process: int) -> bool:
    """Does it run? One that ended and that nobody has asked about yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ------------------------------------------------------------------------------------------------- no place to write to
def test_a_disk_that_fills_up_is_a_clear_error(host: Host, whole: Path, tmp_path: Path) -> None:
    full = host.run(tmp_path, *COMPARE, room=500)
    assert full.code == 2
    assert full.printed.splitlines()[-1].startswith(
        "detoracle: yolox.decode.json: expected a place that can be written to"
    )
    assert "File too large. Choose another folder, or make room" in full.printed
    assert "Traceback" not in full.printed
    _assert_whole(tmp_path / "report")
    assert _names(tmp_path) == []
    assert host.run(tmp_path, *COMPARE, "--resume").code == 0
    assert _same_rows(tmp_path, whole)


def test_a_read_only_folder_is_a_clear_error_at_once(host: Host) -> None:
    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, which only its owner may enter
        place = Path(name)
        place.chmod(0o755)
        (place / "report").mkdir(mode=0o555)
        ran = host.run(place, *COMPARE, stranger=True)
    assert ran.code == 2
    assert ran.printed == (
        "detoracle: report: expected a folder that can be written to, got PermissionError: Permission denied. "
        "Choose another folder, or make room and allow writing there.\n"
    )


def test_a_folder_that_another_run_writes_to_is_a_clear_error(host: Host, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / ".lock").write_text(f"{os.getpid()}\n")
    for arguments in (COMPARE, [*COMPARE, "--resume"]):
        ran = host.run(tmp_path, *arguments)
        assert ran.code == 2
        assert f"got one that process {os.getpid()} is writing to. Wait for it, choose another folder" in ran.printed
    assert _names(tmp_path) == [".lock"]


def test_report_makes_everything_again(host: Host, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    shutil.copy(whole / "report" / "results.json", tmp_path / "report")
    assert host.run(tmp_path, "report", "report").code == 0
    for name in FILES:
        assert (tmp_path / "report" / name).read_bytes() == (whole / "report" / name).read_bytes()
