"""Calls in a process in which nothing tells of this suite: for callables that behave while they are watched."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from detoracle.properties.outputs import Outcome, normalised
from detoracle.reference.contract import Operation, returns_of
from detoracle.reference.errors import InputError

__all__ = ["perform_bare"]

_IMPORT_LIMIT = 120.0  # seconds for starting the process and importing the callable


def perform_bare(
    operation: Operation, target: str, calls: Sequence[Mapping[str, Any]], *, time_limit: float
) -> list[Outcome]:
    """Make several calls in one fresh process that imports nothing of this suite but what the callable does.

    Parameters
    ----------
    operation : Operation
    target : str
        ``package.module:callable``.
    calls : sequence of mapping
        Arguments of each call.
    time_limit : float
        Seconds one call may take.

    Returns
    -------
    list of Outcome
        One for each call, without gradients.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> target = "detoracle.implementations.loop.yolox:iou_yolox"
    >>> perform_bare(boxes.iou_yolox.operation, target, [pair], time_limit=60)[0].outputs["iou"].tolist()
    [[1.0]]
    """
    names = [output.name for output in returns_of(operation.oracle)]
    request = {
        "path": list(sys.path),
        "threads": torch.get_num_threads(),
        "target": target,
        "names": names,
        "calls": [dict(arguments) for arguments in calls],
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked"), Path(folder, "answered")
        torch.save(request, asked)
        lines = (
            "from __future__ import annotations",
            inspect.getsource(_bare),
            f"_bare({str(asked)!r}, {str(answered)!r})",
        )
        script = "\n".join(lines)
        limit = _IMPORT_LIMIT + time_limit * len(calls)
        try:
            ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=limit, check=False)
            answers = torch.load(answered, weights_only=True)
        except subprocess.TimeoutExpired:
            return [Outcome(problem="timeout", message=f"no answers within {limit:g} s")] * len(calls)
        except Exception:  # no file, or one that is no plain data
            last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2][:2000]
            message = f"the process died (exit code {ended.returncode}): {last}"
            return [Outcome(problem="raised", message=message)] * len(calls)
    return [_outcome(operation, answer) for answer in answers]


def _outcome(operation: Operation, answer: Any) -> Outcome:
    raised, returned = answer
    if raised:
        return Outcome(problem="raised", message=raised)
    try:
        return Outcome({name: output.detach() for name, output in normalised(operation, returned).items()})
    except InputError as error:
        return Outcome(problem="contract", message=str(error))


def _bare(asked: str, answered: str) -> None:
    """Body of the process: its text is all that runs there, so it imports what it needs itself."""
    import importlib
    import sys
    from collections.abc import Mapping

    import torch

    request = torch.load(asked, weights_only=False)
    sys.path[:] = request["path"]
    torch.set_num_threads(request["threads"])

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, torch.Tensor):
            return value if value is None else value.detach()
        if isinstance(value, Mapping):
            return {str(name): plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        found = {**getattr(value, "extra", {}), **{n: getattr(value, n) for n in request["names"] if hasattr(value, n)}}
        return {name: plain(item) for name, item in found.items() if name in request["names"]}

    module, _, path = request["target"].partition(":")
    call: Any = importlib.import_module(module)
    for part in path.split("."):
        call = getattr(call, part)
    answers = []
    for arguments in request["calls"]:
        try:
            answers.append(("", plain(call(**arguments))))
        except Exception as error:
            answers.append((f"{type(error).__name__}: {error}"[:2000], None))
    torch.save(answers, answered)
