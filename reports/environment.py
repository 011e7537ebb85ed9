"""The environment a measurement was taken in: what decides the numbers, and nothing that tells whose machine it was."""

from __future__ import annotations

import hashlib
import importlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

__all__ = ["CLOCKS", "environment", "source_hash"]

CLOCKS = ("cpu_mhz", "gpu_mhz")
"""Facts of `environment` that differ from one moment to the next."""


_CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, str | int | bool]:
    """Describe the software and hardware that measurements depend on.

    Returns
    -------
    dict
        Always ``detoracle``, ``python``, ``torch``, ``numpy`` (versions), ``system``, ``machine``, ``cpu`` (its model
        name), ``threads`` (that one operation may use) and ``deterministic`` (whether only deterministic algorithms
        are allowed, which can be several times slower). Where the system tells, ``cpu_mhz``, the clocks seen just now.
        Where there is a CUDA device, ``gpu`` and, if the driver tells, ``gpu_driver`` and ``gpu_mhz``. Where the
        package runs from a git checkout, ``commit`` and ``dirty`` (whether files differ from that commit). No host
        name, no user name, no path.

    Examples
    --------
    >>> described = environment()
    >>> described["torch"] == torch.__version__, described["threads"] == torch.get_num_threads()
    (True, True)
    """
    return {
        "detoracle": version("detoracle"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **_cpu_clock(),
        **_gpu(),
        **_revision(Path(__file__).resolve().parents[1]),
    }


def source_hash() -> str:
    """Hash of the suite's own source, which decides what a result means.

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> len(source_hash())
    64
    """
    digest = hashlib.sha256()
    for name in ("reference", "implementations", "properties", "reports"):
        room = importlib.import_module(f"detoracle.{name}")
        for file in sorted(Path(room.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _cpu_told(fact: str) -> list[str]:
    """What Linux tells of each core; nothing elsewhere."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(fact)]


def _cpu_name() -> str:
    """Model name of the processor, or its architecture where the system does not tell."""
    names = _cpu_told("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_clock() -> dict[str, str]:
    """Slowest and fastest clock of all cores just now."""
    clocks = [float(clock) for clock in _cpu_told("cpu MHz")]
    return {"cpu_mhz": f"{min(clocks):.0f} to {max(clocks):.0f}"} if clocks else {}


def _gpu() -> dict[str, str]:
    """Name, driver version and clock of the current CUDA device."""
    if not torch.cuda.is_available():
        return {}
    told = _answer("nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader,nounits")
    driver, _, clock = (told or "").partition("\n")[0].partition(", ")
    found = {"gpu": torch.cuda.get_device_name(), "gpu_driver": driver, "gpu_mhz": clock}
    return {name: value for name, value in found.items() if value}


def _revision(root: Path) -> dict[str, str | bool]:
    """Commit of a checkout, and whether its files differ from it; nothing where there is no checkout or no git."""
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's checkout
        return {}
    git = ("git", "--no-optional-locks", "-C", str(root))
    commit = _answer(*git, "rev-parse", "--verify", "HEAD")
    changes = _answer(*git, "status", "--porcelain")
    return {"commit": commit, "dirty": changes != ""} if commit else {}


def _answer(*command: str) -> str | None:
    """Return what a command prints, or nothing if it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
