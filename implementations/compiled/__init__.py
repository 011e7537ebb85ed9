"""The losses with one C++ kernel for every class logit, which `torch.compile` writes; the rest is as in `sparse`.

Every logit that is no positive's is trained towards 0, and that pass takes most of a loss's time. Here it reads each
logit once and writes its gradient in the same loop (`detoracle.implementations.compiled.background`), where `sparse`
makes some ten passes over pieces that fit a cache.

What it trades: the first call of a process compiles, which takes seconds, or a fraction of one where PyTorch's cache on
disk has the kernel; `detoracle bench` shows that call apart. There is one kernel a dtype and a number of threads, for
maps of all sizes. It needs a C++ compiler and Python's headers at run time, and suits a CPU alone. What differs from
the oracle, and memory: as in `sparse`.

YOLOX and SSD are not here, for neither has such a pass: YOLOX trains the classes of positives alone, SSD those of the
rows it mines. Nor are assignments: `sparse` looks at few pairs, whose number depends on the data, and shapes that
depend on data are compiled anew.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

__all__ = ["unavailable"]


def unavailable(device: str) -> str:
    """Why this kind cannot run on a device; empty if it can.

    Parameters
    ----------
    device : str
        Such as ``cpu``.

    Returns
    -------
    str

    Examples
    --------
    >>> unavailable("cuda")
    'is for a CPU'
    """
    if not device.startswith("cpu"):
        return "is for a CPU"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile chooses
    if not shutil.which(compiler):
        return f"needs a C++ compiler, here {compiler}; another is named by CXX in the environment"
    has_headers = os.access(Path(sysconfig.get_path("include"), "Python.h"), os.R_OK)
    return "" if has_headers else "needs the headers of Python, such as those of the package python3-dev"
