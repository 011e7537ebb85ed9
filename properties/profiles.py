"""Hypothesis profiles for property-based tests: ``fast``, ``ci`` and ``deep``.

Each sets everything that decides how many examples are run and which. Where ``CI=true``, Hypothesis loads a profile of
its own that is derandomised and has no database, and a profile registered later inherits from it: one that says only
how many examples it wants would then replay the same ones for ever.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

__all__ = ["register_profiles"]


def register_profiles() -> None:
    """Register the profiles and load ``fast``; ``--hypothesis-profile`` and ``settings.load_profile`` choose another.

    ``fast`` (50 examples) and ``ci`` (200) repeat theirs; ``deep`` (2000) draws anew and remembers what failed. Call it
    in ``conftest.py``; it replaces profiles of the same names, Hypothesis's own ``ci`` among them.

    Examples
    --------
    >>> before = settings.default
    >>> register_profiles()
    >>> [settings.get_profile(name).max_examples for name in ("fast", "ci", "deep")]
    [50, 200, 2000]
    >>> settings.register_profile("before", before)
    >>> settings.load_profile("before")
    """
    # The time one example takes says nothing here: the oracles are loops, and machines are shared.
    any_machine = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("fast", any_machine, max_examples=50, derandomize=True, database=None)
    settings.register_profile("ci", any_machine, max_examples=200, derandomize=True, database=None)
    remembered = DirectoryBasedExampleDatabase(".hypothesis/examples")
    settings.register_profile("deep", any_machine, max_examples=2000, derandomize=False, database=remembered)
    settings.load_profile("fast")
