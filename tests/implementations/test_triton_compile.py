from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("triton_compile.py")


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter runs need not compile; the compiler needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(sizes) == 10 + 7 + 11 + 6 + 8  # YOLOX, RTMDet, YOLOv8, SSD, anchor head: kernels, and their choices
    assert min(sizes) > 0
