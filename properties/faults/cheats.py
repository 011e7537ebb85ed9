"""Cheats: callables that try to fool the harness, and the clause that catches each.

They go the way of any stranger's callable in ``check``: scenes and laws through a `Worker`, then the trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detoracle.properties.checking import Result, cases, check_scene, judge_case
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.faults.exam import Kill
from detoracle.properties.outputs import Outcome
from detoracle.properties.random_scenes import random_scenes
from detoracle.properties.systems import find_operation
from detoracle.properties.trials import Subject, trials
from detoracle.properties.worker import Worker

__all__ = ["CHEATS", "Cheat", "sit"]

_TIME_LIMIT = 5.0  # seconds; a right call of these takes milliseconds
_MEMORY_LIMIT = 4 << 30
_SCENES = 4  # random ones before the trials
_IOU, _LOSS, _ASSIGN, _DECODE = "boxes.iou_yolox", "boxes.iou_loss_yolox", "yolox.assign", "yolox.decode"


@dataclass(frozen=True)
class Cheat:
    """One attempt.

    Attributes
    ----------
    name : str
        Of the callable in `detoracle.properties.faults.cheating`.
    operation : str
        What it claims to do.
    clause : str
        That which is to catch it, without the operation's name.
    origin : str
        What it does, in one sentence.
    """

    name: str
    operation: str
    clause: str
    origin: str

    @property
    def id(self) -> str:
        """Such as ``cheat.by-pointer``."""
        return f"cheat.{self.name.replace('_', '-')}"

    @property
    def target(self) -> str:
        """The callable, as ``check`` takes it."""
        return f"detoracle.properties.faults.cheating:{self.name}"


def sit(cheat: Cheat, *, seed: int = 0) -> Kill:
    """Let the suite find a cheat.

    Parameters
    ----------
    cheat : Cheat
    seed : int
        Decides the random scenes.

    Returns
    -------
    Kill
        Its ``examples`` count scenes; one more stands for the trials.

    Examples
    --------
    >>> sit(CHEATS[0]).clause
    'boxes.iou_yolox[iou]'
    """
    number = 0
    with Worker(time_limit=_TIME_LIMIT, memory_limit=_MEMORY_LIMIT) as worker:
        for number, results in enumerate(_course(cheat, worker, seed), start=1):
            for result in results:
                if result.verdict.wrong:
                    return Kill(cheat, seed, result.verdict.findings[0].clause, result.case.name, number)
    return Kill(cheat, seed, "", "", number)


def _course(cheat: Cheat, worker: Worker, seed: int) -> Iterator[Iterator[Result]]:
    """Results of a few random scenes, of the trials, and then of the catalogue with its laws."""
    system, operation = find_operation(cheat.operation)

    def call(arguments: Mapping[str, Any]) -> Outcome:
        return worker.perform(operation, cheat.target, arguments)

    for scene in random_scenes(_SCENES, seed=seed):
        of_scene = cases(system, operation, scene)
        yield (judge_case(case, expect(system, operation, case.arguments), call) for case in of_scene)
    yield trials(Subject(system, operation, cheat.target, worker, _TIME_LIMIT), seed=seed)
    for number, scene in enumerate(edge_cases()):
        yield check_scene(system, operation, scene, call, number=number)


CHEATS: tuple[Cheat, ...] = (
    Cheat("zeros", _IOU, "iou", "Returns zeros."),
    Cheat("constant", _IOU, "iou", "Returns a constant."),
    Cheat("uninitialised", _IOU, "iou", "Returns memory as it finds it, in the hope of an old answer."),
    Cheat("shuffled", _IOU, "iou", "Returns the right numbers in another order."),
    Cheat("background", _ASSIGN, "outcome", "Assigns nothing."),
    Cheat("swallows_errors", _ASSIGN, "outcome", "Turns an error into background for the whole batch."),
    Cheat("extra_rows", _IOU, "iou", "Returns more rows than there are boxes."),
    Cheat("extra_outputs", _IOU, "contract", "Returns more than is documented."),
    Cheat("float_indices", _ASSIGN, "contract", "Returns indices as floats."),
    Cheat("other_device", _IOU, "iou", "Returns a tensor of a device that holds no numbers."),
    Cheat("tiny_noise", _IOU, "repeatable", "Is right, with another last bit each time."),
    Cheat("large_noise", _IOU, "iou", "Adds noise of a hundred roundings."),
    Cheat("random_choice", _ASSIGN, "outcome", "Drops a tenth of the anchors at random."),
    Cheat("value_without_gradient", _LOSS, "gradient predicted", "Returns the right loss, detached."),
    Cheat("first_call_only", _IOU, "iou", "Is right on the first call alone."),
    Cheat("even_calls_only", _IOU, "iou", "Is right on every second call."),
    Cheat("last_result", _IOU, "iou", "Returns the answer of the call before."),
    Cheat("by_pointer", _IOU, "other-numbers", "Remembers answers by the address of the inputs."),
    Cheat("by_shape", _IOU, "other-numbers", "Remembers answers by the shapes of the inputs."),
    Cheat("by_first_number", _IOU, "permute-gts", "Remembers answers by one number of the inputs."),
    Cheat("one_output_buffer", _IOU, "keeps-results", "Returns the same memory each time."),
    Cheat("result_in_an_input", _DECODE, "inputs-unmodified", "Returns its answer in the memory of an input."),
    Cheat("float32_only", _IOU, "other-dtype", "Is right in float32 alone."),
    Cheat("computes_in_float32", _IOU, "other-dtype", "Computes float64 in float32."),
    Cheat("with_gradients_only", _IOU, "no-grad", "Is right only where gradients are on."),
    Cheat("without_gradients_only", _IOU, "iou", "Is right only where gradients are off."),
    Cheat("behaves_while_watched", _IOU, "any-process", "Is right where this suite is imported."),
    Cheat("behaves_under_the_worker", _IOU, "any-process", "Is right where the harness calls it."),
    Cheat("lazy", _IOU, "contract", "Returns a tensor that computes when it is read."),
    Cheat("finishes_later", _IOU, "iou", "Returns before its work is done."),
    Cheat("reads_the_stack", _IOU, "iou", "Looks for what is expected among the callers' variables."),
    Cheat("reads_the_heap", _IOU, "iou", "Looks for what is expected among all objects."),
    Cheat("replaces_the_oracle", _IOU, "iou", "Replaces the oracle, and the judge, by ones that agree."),
    Cheat("replaces_torch", _IOU, "iou", "Replaces the functions of PyTorch that compare."),
    Cheat("replaces_the_watch", _IOU, "read-only", "Writes, and replaces what would notice."),
    Cheat("answers_itself", _IOU, "returns", "Sends an answer of its own to the harness."),
    Cheat("speaks_for_the_suite", _IOU, "iou", "Prints megabytes that say it is right."),
    Cheat("writes", _IOU, "inputs-unmodified", "Writes to an input."),
    Cheat("writes_and_restores", _IOU, "inputs-unmodified", "Writes to an input and restores it."),
    Cheat("writes_behind_and_restores", _IOU, "read-only", "Does so behind the version counter."),
    Cheat("writes_by_numpy_and_restores", _IOU, "read-only", "Does so outside PyTorch."),
    Cheat("default_dtype", _IOU, "contract", "Leaves another default dtype behind."),
    Cheat("grad_mode", _IOU, "contract", "Leaves gradients switched off."),
    Cheat("hangs", _IOU, "returns", "Does not return."),
    Cheat("exits", _IOU, "returns", "Ends the process, with success."),
    Cheat("leaves", _IOU, "returns", "Raises SystemExit."),
    Cheat("interrupts", _IOU, "returns", "Raises KeyboardInterrupt."),
    Cheat("recurses", _IOU, "returns", "Calls itself without end."),
    Cheat("hogs", _IOU, "returns", "Takes all memory."),
)
