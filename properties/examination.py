"""Everything that a stranger's callable is asked: the catalogue, random scenes, laws in turn, and the trials."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from detoracle.properties.checking import Result, check_scene
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import Outcome
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.scenes import Scene
from detoracle.properties.trials import Subject, trials

__all__ = ["MOST_TIMEOUTS", "examine", "scenes_of_examination"]

MOST_TIMEOUTS = 3
"""Calls that may run into the time limit before a callable is not asked again."""


def scenes_of_examination(examples: int, seed: int) -> tuple[Scene, ...]:
    """The edge-case catalogue, then random scenes.

    Examples
    --------
    >>> len(scenes_of_examination(7, seed=0)) - len(edge_cases())
    7
    """
    return tuple(chain(edge_cases(), random_scenes(examples, seed=seed)))


def examine(
    subject: Subject,
    scenes: Iterable[Scene],
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Result]:
    """Examine a callable.

    Parameters
    ----------
    subject : Subject
    scenes : iterable of Scene
        From `scenes_of_examination`.
    seed : int
        Decides the scenes of the trials.
    device : str
        Where the tensors are put.
    dtype : torch.dtype
        Of all floating tensors.

    Yields
    ------
    Result
        Of every case, of the law beside it and of every trial. It ends early after `MOST_TIMEOUTS`.

    Examples
    --------
    >>> from detoracle.properties.systems import find_operation
    >>> from detoracle.properties.worker import Worker
    >>> with Worker(time_limit=60) as worker:
    ...     target = "detoracle.implementations.loop.yolox:iou_yolox"
    ...     subject = Subject(*find_operation("boxes.iou_yolox"), target, worker, time_limit=60)
    ...     {result.verdict.status for result in examine(subject, scenes_of_examination(0, 0)[:2])}
    {'equal'}
    """
    timeouts = 0

    def call(arguments: Mapping[str, Any]) -> Outcome:
        return subject.worker.perform(subject.operation, subject.target, arguments)

    for number, scene in enumerate(scenes):
        for result in check_scene(
            subject.system, subject.operation, scene, call, number=number, device=device, dtype=dtype
        ):
            yield result
            timeouts += result.verdict.status == "timeout"
        if timeouts >= MOST_TIMEOUTS:
            return
    yield from trials(subject, seed=seed, device=device, dtype=dtype)
