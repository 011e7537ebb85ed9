"""One process of a gloo group: its own batch's loss and gradients, saved for the test that started it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from detoracle.reference import rtmdet_loss


def main(rendezvous: str, rank: str, size: str, given: str, found: str) -> None:
    torch.set_num_threads(1)
    arguments = torch.load(given)
    leaves = [*arguments["class_logits"], *arguments["distances"]]
    for leaf in leaves:
        leaf.requires_grad_()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(size))
    try:
        mean = rtmdet_loss.mean_over_ranks(torch.tensor(float(rank)))
        parts = rtmdet_loss.loss(**arguments)
        gradients = torch.autograd.grad(parts["total"], leaves)
    finally:
        dist.destroy_process_group()
    torch.save({"mean": mean, "gradients": gradients, **{n: t.detach() for n, t in parts.items()}}, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
