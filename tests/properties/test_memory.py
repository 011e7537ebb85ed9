from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from detoracle.properties.memory import Place, Reused, can_protect, fresh, laid_out, read_only

LAYOUTS = {
    "plain": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6).view(2, 3).T,
    "expanded": torch.ones(1, 3).expand(2, 3),
    "slice": torch.arange(12.0).view(3, 4)[1:, 1:3],
    "scalar": torch.tensor(2.0, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "mask": torch.tensor([True, False]),
}


@pytest.mark.parametrize("place", [fresh, Reused(), read_only])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_has_values_shape_and_strides(layout: str, place: Place) -> None:
    original = LAYOUTS[layout]
    copied = laid_out(original, place)
    assert torch.equal(copied, original)
    assert (copied.shape, copied.dtype) == (original.shape, original.dtype)
    if original.numel():
        assert copied.stride() == original.stride()
        assert copied.data_ptr() != original.data_ptr()


def test_memory_is_reused_by_the_next_call_alone() -> None:
    place = Reused()
    first, second = place(torch.zeros(3)), place(torch.ones(3))
    assert first.data_ptr() != second.data_ptr()
    place.next_call()
    assert place(torch.ones(3)).data_ptr() == first.data_ptr()
    assert place(torch.ones(4)).data_ptr() not in (first.data_ptr(), second.data_ptr())
    assert place(torch.ones(3).int()).data_ptr() not in (first.data_ptr(), second.data_ptr())


WAYS = {
    "tensor.data.add_(1)": -signal.SIGSEGV,
    "tensor.numpy()[0] = 1": -signal.SIGSEGV,
    "assert tensor.sum() == 0": 0,
}


@pytest.mark.skipif(not can_protect("cpu"), reason="memory is write-protected by POSIX's mprotect")
@pytest.mark.parametrize("way", WAYS)
def test_writing_to_read_only_memory_ends_the_process(way: str) -> None:
    lines = ["import torch", "from detoracle.properties.memory import read_only", "tensor = read_only(torch.zeros(3))"]
    ended = subprocess.run([sys.executable, "-c", "\n".join([*lines, way])], check=False)
    assert ended.returncode == WAYS[way]
