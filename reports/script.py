"""A finding as a short Python program that needs PyTorch and the implementation, and nothing of ours, to be seen.

All tensors stand in it bit for bit: small ones as numbers, large ones as compressed bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from detoracle.properties.comparison import Finding
from detoracle.reference.contract import Operation, returns_of
from detoracle.reference.errors import InputError

__all__ = ["script_of"]

_MOST_NUMBERS = 24  # of a tensor that is written as numbers
_MESSAGE = re.compile(
    r"expected (?:ground truth )?(?P<expected>.+?)(?: \+- (?P<bound>\S+))?, got (?P<given>[^,(]+?)(?: \(margin .*\))?"
)
_UNPACK = """\

def unpack(text, dtype, shape):
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=dtype).reshape(shape)

"""


def script_of(operation: Operation, arguments: Mapping[str, Any], target: str, finding: Finding) -> str:
    """Write a finding as a program that shows it, and fails until it is mended.

    Parameters
    ----------
    operation : Operation
    arguments : mapping
        Of the call, by name.
    target : str
        ``package.module:callable``.
    finding : Finding
        What the call got wrong.

    Returns
    -------
    str

    Raises
    ------
    InputError
        If the finding is about more than one call.

    Examples
    --------
    >>> from detoracle.reference import boxes
    >>> pair = {"boxes_a": torch.ones(1, 4), "boxes_b": torch.ones(1, 4), "form": "cxcywh"}
    >>> finding = Finding("boxes.iou_yolox[iou]", "at (0, 0)", "expected 1 +- 0, got 0.5")
    >>> print(script_of(boxes.iou_yolox.operation, pair, "mine:iou", finding))
    'boxes.iou_yolox by mine:iou: [iou] at (0, 0): expected 1 +- 0, got 0.5'
    import torch
    from mine import iou
    <BLANKLINE>
    arguments = {
        'boxes_a': torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float32),
        'boxes_b': torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float32),
        'form': 'cxcywh',
    }
    returned = iou(**arguments)
    match returned:
        case tuple() | list():
            output = returned[0]
        case dict():
            output = returned['iou']
        case torch.Tensor():
            output = returned
        case _:
            output = vars(getattr(returned, "extra", returned)).get('iou', getattr(returned, 'iou', None))
    given = output[0, 0].item()
    print(f'iou[0, 0]: expected 1 +- 0, returned {given!r}')
    assert abs(given - 1) <= 0
    <BLANKLINE>
    """
    clause = finding.clause.removeprefix(operation.name)[1:-1]
    module, _, path = target.partition(":")
    title = f"{operation.name} by {target}: [{clause}] {finding.where}: {finding.message}"
    values = [f"    {name!r}: {_literal(value)},\n" for name, value in arguments.items()]
    packed = any("unpack(" in value for value in values)
    special = any(re.search(r"\b(inf|nan)\b", value) for value in values)
    head = [
        f"{title!r}\n",
        "import base64\nimport zlib\n" if packed else "",
        "from math import inf, nan\n" if special else "",
    ]
    head += ["import torch\n", f"from {module} import {path.partition('.')[0]}\n", _UNPACK if packed else "\n"]
    body = _body(operation, clause, path, finding)
    return "".join([*head, "arguments = {\n", *values, "}\n", *(f"{line}\n" for line in body)])


def _body(operation: Operation, clause: str, path: str, finding: Finding) -> list[str]:
    """The call, and what is wrong with it."""
    call = f"returned = {path}(**arguments)"
    if clause == "returns":
        return [f"{call}  # {finding.message.splitlines()[0]}", "print('returned', returned)"]
    if clause == "contract":
        text = f"{finding.message}; returned"
        return [call, f"print({text!r}, returned)", f"assert False, {finding.message!r}"]
    if clause == "inputs-unmodified":
        return _unmodified(call, finding)
    index = "".join(f"[{n}]" for n in re.findall(r"\[(\d+)\]", clause))
    name = clause.removeprefix("gradient ").partition("[")[0]
    documented = [output.name for output in returns_of(operation.oracle)]
    output = "gt_index" if clause == "outcome" else name
    if clause.startswith("gradient "):
        leaf = f"arguments[{name!r}]{index}"
        shown, lines = f"gradient to {name}{index}", [f"{leaf}.requires_grad_()", call, *_picked(documented[0], 0)]
        lines += ["output.backward(torch.linspace(0.5, 1.5, max(output.numel(), 1), dtype=output.dtype)"
                  "[: output.numel()].reshape(output.shape) if output.ndim else None)", f"output = {leaf}.grad"]  # fmt: skip
    elif output in documented:
        shown, lines = f"{output}{index}", [call, *_picked(output, documented.index(output))]
        if index and operation is not None:
            lines = [call, f"output = list(returned){index}"]
    else:
        raise InputError(
            "--script",
            expected="a finding about one call",
            got=f"the law '{clause}', which is about several",
            fix="Use 'detoracle replay' without it.",
        )
    return [*lines, *_asserted(shown, finding)]


def _unmodified(call: str, finding: Finding) -> list[str]:
    name, index = re.match(r"(?:the list )?(\w+)((?:\[\d+\])?)", finding.message).groups()  # type: ignore[union-attr]
    value = f"arguments[{name!r}]{index}"
    return [
        "import copy",
        f"before = copy.deepcopy({value})",
        call,
        f"print({finding.message!r}, before, {value}, sep='\\n')",
        f"torch.testing.assert_close({value}, before, rtol=0, atol=0, equal_nan=True)",
    ]


def _picked(name: str, number: int) -> list[str]:
    """How an output is taken from what an implementation may return."""
    return [
        "match returned:",
        "    case tuple() | list():",
        f"        output = returned[{number}]",
        "    case dict():",
        f"        output = returned[{name!r}]",
        "    case torch.Tensor():",
        "        output = returned",
        "    case _:",
        f"        output = getattr(returned, {name!r}, None)",
    ]


def _asserted(shown: str, finding: Finding) -> list[str]:
    found = _MESSAGE.fullmatch(finding.message)
    if found is None:
        return [f"print({finding.message!r}, output)", "assert False"]
    expected, bound = found["expected"], found["bound"]
    return [expected, bound]


def _literal(value: Any) -> str:
    return repr(value)
