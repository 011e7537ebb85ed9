"""Run a stranger's callable in a process of its own: whatever it does, the run goes on.

The child imports the callable and answers one call after the other; the parent waits for each answer only so long. A
child that hangs is killed (verdict ``timeout``), one that dies is reported (``raised``), and a fresh one serves the
next call. The child never sees what is expected. It may do to itself what it likes; what it sends is read as plain
data, and what it prints to standard output is dropped, so that it can neither run code in the parent nor speak for it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from detoracle.implementations.registry import load
from detoracle.properties.memory import Reused, read_only
from detoracle.properties.outputs import Outcome, perform
from detoracle.properties.systems import find_operation
from detoracle.reference.contract import Operation
from detoracle.reference.errors import DetoracleError

__all__ = ["Manner", "Worker"]

Manner = Literal["plain", "no-grad", "read-only"]
"""How a call is made: with gradients, without, or with inputs that end the process when written to."""

_IMPORT_LIMIT = 120.0  # seconds for starting the process, and for importing a callable; neither is part of a call


class Worker:
    """A process that calls callables.

    Parameters
    ----------
    time_limit : float
        Seconds one call may take.
    memory_limit : int, optional
        Bytes that the process may hold; asking for more raises there. Three quarters of the machine's memory if None.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> with Worker(time_limit=60) as worker:
    ...     outcome = worker.perform(boxes.iou_yolox.operation, "detoracle.reference.boxes:iou_yolox", pair)
    >>> outcome.outputs["iou"].tolist()
    [[1.0]]
    """

    def __init__(self, *, time_limit: float, memory_limit: int | None = None) -> None:
        self._time_limit, self._memory_limit = time_limit, memory_limit
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

    def perform(
        self, operation: Operation, target: str, arguments: Mapping[str, Any], *, manner: Manner = "plain"
    ) -> Outcome:
        """Make one call.

        Parameters
        ----------
        operation : Operation
        target : str
            ``package.module:callable``.
        arguments : mapping
            Keyword arguments of the operation.
        manner : Manner

        Returns
        -------
        Outcome
        """
        question = ("perform", operation.name, target, dict(arguments), manner)
        answer = self._import(target) or self._ask(question, limit=self._time_limit)
        if isinstance(answer, DetoracleError):
            return Outcome(problem="raised", message=str(answer))
        assert isinstance(answer, Outcome)
        return answer

    def held(self) -> Outcome:
        """Look again at what the call before the last one returned: the same tensors, as they are by now."""
        answer = self._ask(("held",), limit=self._time_limit)
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
            return _read(self._pipe.recv_bytes())
        except (EOFError, OSError):
            code = None
            if self._process is not None:
                self._process.join(1)  # its pipe closes a moment before it has an exit code
                code = self._process.exitcode
            self._stop()
            return Outcome(problem="raised", message=f"the process died (exit code {code})")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads(), list(sys.path), self._memory_limit), daemon=True
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


def _serve(pipe: Connection, threads: int, path: list[str], memory_limit: int | None) -> None:
    """Body of the child: answer questions until the pipe closes."""
    sys.path[:] = path
    torch.set_num_threads(threads)
    _confine(memory_limit)
    answers = _Answers()
    while True:
        try:
            question = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)  # the parent is trusted
        except EOFError:
            return
        try:
            answer: Outcome | DetoracleError | None = answers.to(*question)
        except DetoracleError as error:
            answer = error
        except (SystemExit, KeyboardInterrupt) as error:  # a call may not end the process, nor pass for Ctrl-C
            answer = Outcome(problem="raised", message=f"{type(error).__name__}: {error}")
        pipe.send_bytes(_written(answer))


def _confine(memory_limit: int | None) -> None:
    """Drop what is printed, and bound the memory where the system can."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        import resource
    except ImportError:
        return
    limit = memory_limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


class _Answers:
    """The child's side of the questions, and the memory of its last two calls."""

    def __init__(self) -> None:
        self._place = Reused()
        self._last = self._before_last = Outcome()

    def to(self, kind: str, *rest: Any) -> Outcome | None:
        if kind == "require":
            load(rest[0])
            return None
        if kind == "held":
            return self._before_last
        operation_name, target, arguments, manner = rest
        self._place.next_call()
        place = read_only if manner == "read-only" else self._place
        _, operation = find_operation(operation_name)
        outcome = perform(operation, load(target), arguments, place=place, grad=manner != "no-grad")
        self._before_last, self._last = self._last, outcome
        return outcome


_ERROR = ("what", "expected", "got", "where", "fix")


def _written(answer: Outcome | DetoracleError | None) -> bytes:
    """An answer as plain data: the parent reads nothing else from a process that it does not trust."""
    if isinstance(answer, DetoracleError):
        return _packed({"error": [getattr(answer, name) for name in _ERROR]})
    return _packed(None if answer is None else vars(answer))


def _read(data: bytes) -> Outcome | DetoracleError | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            body = torch.load(io.BytesIO(data), weights_only=True)
        if body is None:
            return None
        if "error" in body:
            what, expected, got, where, fix = map(str, body["error"])
            return DetoracleError(what, expected=expected, got=got, where=where, fix=fix)
        found = Outcome(**body)
    except Exception:  # there is no end of ways to be no answer
        return Outcome(problem="raised", message="the process sent something that is no answer")
    tensors = [*found.outputs.values(), *(g for g in found.gradients.values() if g is not None)]
    if not all(type(tensor) is Tensor for tensor in tensors) or not isinstance(found.problem, str):
        return Outcome(problem="raised", message="the process sent something that is no answer")
    return found


def _packed(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()
