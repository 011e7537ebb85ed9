"""Profiles decide how many examples are run and which, whatever profile the machine loaded before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """if True:
    from hypothesis import settings
    from detoracle.properties.profiles import register_profiles
    register_profiles()
    assert settings().max_examples == settings.get_profile("fast").max_examples
    for name in ("fast", "ci", "deep"):
        settings.load_profile(name)
        chosen = settings()
        print(name, chosen.max_examples, chosen.derandomize, chosen.database is not None, chosen.deadline)
"""
SHOWN = "fast 50 True False None\nci 200 True False None\ndeep 2000 False True None\n"


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_profile_is_the_same_on_any_machine(ci: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | ({"CI": ci} if ci else {})
    program = [sys.executable, "-W", "error", "-c", PROGRAM]
    run = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (0, SHOWN), run.stderr
