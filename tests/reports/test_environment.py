"""What a measurement says of the machine it was taken on, and what it keeps to itself."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from detoracle.reports import environment as module
from detoracle.reports.environment import CLOCKS, environment


@pytest.fixture(autouse=True)
def _outside_any_git_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a hook, git's own variables point every command at the repository of the hook."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a repository with one commit."""
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
    return tmp_path


def _private(described: dict[str, str | int | bool]) -> list[str]:
    """Words that tell whose machine it was, and anything that looks like a path."""
    text = json.dumps(described)
    names = {platform.node(), getpass.getuser()} & set(re.split(r"[^\w.-]+", text))
    return [*names, *re.findall(r'(?:[\s"=]/|\w:\\|~/)\S+', text)]


def test_names_what_the_numbers_depend_on() -> None:
    described = environment()
    assert described["torch"] == torch.__version__
    assert described["machine"] == platform.machine()
    assert described["cpu"]
    assert described["threads"] == torch.get_num_threads()
    required = {"detoracle", "python", "torch", "numpy", "system", "machine", "cpu", "threads", "deterministic"}
    assert required <= set(described) <= required | {"gpu", "gpu_driver", *CLOCKS, "commit", "dirty"}
    assert json.loads(json.dumps(described)) == described


def test_tells_the_clocks_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("model name\t: made up\ncpu MHz\t\t: 1200.4\nmodel name\t: made up\ncpu MHz\t\t: 3600.0\n")
    monkeypatch.setattr(module, "_CPU_INFO", told)
    assert {name: environment()[name] for name in ("cpu", "cpu_mhz")} == {"cpu": "made up", "cpu_mhz": "1200 to 3600"}


def test_keeps_host_user_and_paths_to_itself() -> None:
    assert _private(environment()) == []


@pytest.mark.parametrize("leak", [platform.node, getpass.getuser, os.getcwd, lambda: "read from /proc/cpuinfo"])
def test_a_leak_would_be_noticed(leak: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cpu_name", leak)
    assert len(_private(environment())) == 1


def test_the_deterministic_switch_shows() -> None:
    assert environment()["deterministic"] is False
    torch.use_deterministic_algorithms(True)
    try:
        assert environment()["deterministic"] is True
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_commit_and_whether_files_differ_from_it(checkout: Path) -> None:
    clean = module._revision(checkout)
    assert re.fullmatch(r"[0-9a-f]{40}", str(clean["commit"]))
    assert clean["dirty"] is False
    (checkout / "new.py").write_text("")
    assert module._revision(checkout) == {**clean, "dirty": True}


def test_no_commit_outside_a_checkout_or_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / "site-packages"  # inside somebody's checkout, but none of its own
    installed.mkdir()
    assert module._revision(installed) == {}
    monkeypatch.setenv("PATH", "")
    assert module._revision(checkout) == {}
    assert "commit" not in environment()


def test_no_commit_before_the_first_one(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert module._revision(tmp_path) == {}


def test_the_processor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.00GHz\nmodel name\t: another core\n")
    monkeypatch.setattr(module, "_CPU_INFO", told)
    assert module._cpu_name() == "Example CPU @ 2.00GHz"
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "missing")
    assert module._cpu_name() in {platform.processor(), platform.machine()}


def test_the_gpu_is_named_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module._gpu() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Example GPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._gpu() == {"gpu": "Example GPU"}
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    tool.chmod(0o755)
    assert module._gpu() == {"gpu": "Example GPU", "gpu_driver": "570.1"}
