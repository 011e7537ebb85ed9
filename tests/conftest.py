"""Seeds and Hypothesis profiles: every run of the suite repeats the one before, except `--hypothesis-profile=deep`."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from detoracle.properties.profiles import register_profiles

SEED = 0

register_profiles()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run on the CPU; read when triton is first imported


def pytest_configure() -> None:
    torch.set_num_threads(1)  # a sum's order, and so its last bits, depends on the number of threads


def pytest_report_header(config: pytest.Config) -> str:
    examples = "derandomised" if settings().derandomize else "random, or --hypothesis-seed"
    return f"seeds: random, numpy, torch {SEED} before each test; hypothesis {examples}; torch {torch.__version__}"


def pytest_runtest_setup() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the legacy global generator is the one a careless test would draw from
    torch.manual_seed(SEED)
