"""Run a stranger's callable in a process of its own: whatever it does, the run goes on.

The child imports the callable and answers one call after the other; the parent waits for each answer only so long. A
child that hangs is killed (verdict ``timeout``), one that dies is reported (``raised``), and a fresh one serves the
next call.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from detoracle.implementations.registry import load
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import find_operation
from detoracle.reference.contract import Operation
from detoracle.reference.errors import DetoracleError

__all__ = ["Worker"]

_IMPORT_LIMIT = 120.0  # seconds for starting the process, and for importing a callable; neither is part of a call


class Worker:
    """A process that calls callables.

    Parameters
    ----------
    time_limit : float
        Seconds one call may take.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> with Worker(time_limit=60) as worker:
    ...     outcome = worker.perform(boxes.iou_yolox.operation, "detoracle.reference.boxes:iou_yolox", pair)
    >>> outcome.outputs["iou"].tolist()
    [[1.0]]
    """

    def __init__(self, *, time_limit: float) -> None:
        self._time_limit = time_limit
        self._imported: set[str] = set()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        """Start the process."""
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._stop()

    def require(self, target: str) -> None:
        """Import a callable in the process.

        Parameters
        ----------
        target : str
            ``package.module:callable``.

        Raises
        ------
        DetoracleError
            If it cannot be imported, or importing it takes too long or ends the process.
        """
        answer = self._import(target)
        if isinstance(answer, DetoracleError):
            raise answer
        if isinstance(answer, Outcome):
            raise DetoracleError(target, expected="to be importable", got=answer.message)

    def perform(self, operation: Operation, target: str, arguments: Mapping[str, Any]) -> Outcome:
        """Make one call.

        Parameters
        ----------
        operation : Operation
        target : str
            ``package.module:callable``.
        arguments : mapping
            Keyword arguments of the operation.

        Returns
        -------
        Outcome
        """
        answer = self._import(target) or self._ask(
            ("perform", operation.name, target, dict(arguments)), limit=self._time_limit
        )
        if isinstance(answer, DetoracleError):
            return Outcome(problem="raised", message=str(answer))
        assert isinstance(answer, Outcome)
        return answer

    def _import(self, target: str) -> object:
        """Import a callable in the process, unless it has; None if all went well."""
        if target in self._imported:
            return None
        answer = self._ask(("require", target), limit=_IMPORT_LIMIT)
        if answer is None:
            self._imported.add(target)
        return answer

    def _ask(self, question: tuple[Any, ...], *, limit: float) -> object:
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(_packed(question))
            if not self._pipe.poll(limit):
                self._stop()
                return Outcome(problem="timeout", message=f"no answer within {limit:g} s")
            answer: object = _unpacked(self._pipe.recv_bytes())
        except (EOFError, OSError):
            code = None
            if self._process is not None:
                self._process.join(1)  # its pipe closes a moment before it has an exit code
                code = self._process.exitcode
            self._stop()
            return Outcome(problem="raised", message=f"the process died (exit code {code})")
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads(), list(sys.path)), daemon=True
        )
        self._process.start()
        theirs.close()

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._pipe = self._process = None
        self._imported.clear()


def _serve(pipe: Connection, threads: int, path: list[str]) -> None:
    """Body of the child: answer questions until the pipe closes."""
    sys.path[:] = path
    torch.set_num_threads(threads)
    while True:
        try:
            question = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            pipe.send_bytes(_packed(_answer(*question)))
        except DetoracleError as error:
            pipe.send_bytes(_packed(error))


def _answer(kind: str, *rest: Any) -> Outcome | None:
    if kind == "require":
        load(rest[0])
        return None
    operation_name, target, arguments = rest
    return perform(find_operation(operation_name)[1], load(target), arguments)


def _packed(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
