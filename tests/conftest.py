"""Seeds and Hypothesis profiles: every run of the suite repeats the one before, except `--hypothesis-profile=deep`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

SEED = 0

# Where CI=true, Hypothesis loads a derandomised profile without a database, and a profile registered later inherits
# from it: a nightly run of "deep" would then replay one set of examples for ever. So both set the two themselves.
_ANY_MACHINE = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("suite", _ANY_MACHINE, max_examples=50, derandomize=True, database=None)
settings.register_profile(
    "deep",
    _ANY_MACHINE,
    max_examples=2000,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
)
settings.load_profile("suite")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # a sum's order, and so its last bits, depends on the number of threads


def pytest_report_header(config: pytest.Config) -> str:
    examples = "derandomised" if settings().derandomize else "random, or --hypothesis-seed"
    return f"seeds: random, numpy, torch {SEED} before each test; hypothesis {examples}; torch {torch.__version__}"


def pytest_runtest_setup() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the legacy global generator is the one a careless test would draw from
    torch.manual_seed(SEED)
