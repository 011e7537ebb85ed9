"""One process of a gloo group: losses of its batch by both implementations, saved for the test that started it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from detoracle.implementations.batched import rtmdet_loss as batched
from detoracle.implementations.loop import rtmdet_loss as loop


def main(rendezvous: str, rank: str, size: str, given: str, found: str) -> None:
    torch.set_num_threads(1)
    arguments = torch.load(given)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(size))
    try:
        losses = {"batched": batched.loss(**arguments), "loop": loop.loss(**arguments)}
    finally:
        dist.destroy_process_group()
    torch.save(losses, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
