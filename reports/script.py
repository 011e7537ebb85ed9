"""A finding as a short Python program that needs PyTorch and the implementation, and nothing of ours, to be seen.

All tensors stand in it bit for bit: small ones as numbers, large ones as compressed bytes.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detoracle.properties.comparison import Finding
from detoracle.reference.contract import Operation, returns_of
from detoracle.reference.errors import InputError

__all__ = ["script_of"]

_MOST_NUMBERS = 24  # of a tensor that is written as numbers
_NUMBER = r"-?(?:\d[\d.]*(?:e[-+]?\d+)?|inf|nan)"
_MESSAGE = re.compile(
    rf"expected (?:ground truth )?(?P<right>{_NUMBER}(?: (?:or|to) {_NUMBER})*)"
    rf"(?: \+- (?P<bound>{_NUMBER}))?, got {_NUMBER}"
)
_UNPACK = """
def unpack(text, dtype, shape):
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=dtype).reshape(shape)

"""


def script_of(operation: Operation, arguments: Mapping[str, Any], target: str, finding: Finding) -> str:
    """Write a finding as a program that shows what is wrong, and fails until it is mended.

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
        If the finding is about anything but one number, a changed input or a failed call: a law, which takes several
        calls, or an output of another shape or type.

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
    if isinstance(returned, (tuple, list)):
        output = returned[0]
    elif isinstance(returned, torch.Tensor):
        output = returned
    else:
        all_ = returned if isinstance(returned, dict) else {**vars(returned), **vars(returned).get('extra', {})}
        output = all_['iou']
    given = output[0][0].item()
    print('iou[0][0]: expected 1 +- 0, returned', given)
    assert abs(given - 1) <= 0
    <BLANKLINE>
    """
    module, _, path = target.partition(":")
    title = f"{operation.name} by {target}: {finding.clause.removeprefix(operation.name)} {finding.where}"
    given = "".join(f"    {name!r}: {_literal(value)},\n" for name, value in arguments.items())
    body = "\n".join(_body(operation, f"returned = {path}(**arguments)", finding))
    packed = "unpack(" in given
    lines = [
        repr(f"{title}: {finding.message}"),
        *(["import base64", "import zlib"] if packed else []),
        *(["import copy"] if "copy." in body else []),
        *(["from math import inf, nan"] if re.search(r"\b(inf|nan)\b", given + body) else []),
        "import torch",
        f"from {module} import {path.partition('.')[0]}",
        _UNPACK if packed else "",
        f"arguments = {{\n{given}}}",
        body,
    ]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    shape = tuple(value.shape)
    if value.numel() == 0:
        return f"torch.zeros({shape}, dtype={value.dtype})"
    if value.numel() <= _MOST_NUMBERS:
        return f"torch.tensor({value.tolist()}, dtype={value.dtype})"
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"unpack({base64.b85encode(zlib.compress(data, 9)).decode()!r}, {value.dtype}, {shape})"


def _body(operation: Operation, call: str, finding: Finding) -> list[str]:
    """The call, and what is wrong with it."""
    clause = finding.clause.removeprefix(operation.name)[1:-1]
    if clause == "returns":
        return [f"{call}  # {finding.message.partition(chr(10))[0]}", "print('returned', returned)"]
    if clause == "inputs-unmodified":
        return _unmodified(call, finding.message)
    kind, _, named = clause.rpartition(" ")
    named = {"outcome": "gt_index"}.get(named, named)
    name, documented = named.partition("[")[0], [output.name for output in returns_of(operation.oracle)]
    wanted = _MESSAGE.fullmatch(finding.message.partition(" (")[0])
    if wanted is None or (kind != "gradient" and name not in documented):
        raise InputError(
            "--script",
            expected="a finding about one number of one call",
            got=f"{finding.clause}: {finding.message}",
            fix="Use 'detoracle replay' alone.",
        )
    index = "".join(re.findall(r"\[\d+\]", named + finding.where)[:1])  # of a list
    position = "".join(f"[{n}]" for n in re.findall(r"\d+", re.sub(r"\[\d+\]", "", finding.where)))
    if kind == "gradient":
        leaf = f"arguments[{name!r}]{index}"
        lines = [f"{leaf}.requires_grad_()", call, *_picked(documented[0], 0), *_BACKWARD, f"output = {leaf}.grad"]
    elif index:
        lines = [call, f"output = returned{index}"]
    else:
        lines = [call, *_picked(name, documented.index(name))]
    shown = f"{kind} {name}{index}{position}".strip()
    return [*lines, f"given = output{position}.item()", *_asserted(shown, wanted["right"], wanted["bound"])]


_BACKWARD = [
    "weights = torch.linspace(0.5, 1.5, max(output.numel(), 1), dtype=output.dtype)",  # as `cotangent` has them
    "output.backward(weights[: output.numel()].reshape(output.shape) if output.ndim else None)",
]


def _picked(name: str, number: int) -> list[str]:
    """How an output is taken from whatever an implementation may return."""
    return [
        "if isinstance(returned, (tuple, list)):",
        f"    output = returned[{number}]",
        "elif isinstance(returned, torch.Tensor):",
        "    output = returned",
        "else:",
        "    all_ = returned if isinstance(returned, dict) else {**vars(returned), **vars(returned).get('extra', {})}",
        f"    output = all_[{name!r}]",
    ]


def _asserted(shown: str, right: str, bound: str | None) -> list[str]:
    """What is right: a number and how far from it, a range of whole numbers, or one of several."""
    low, _, high = right.partition(" to ")
    if right == "nan":
        test = "given != given"
    elif bound and not right.endswith("inf"):
        test = f"abs(given - {right}) <= {bound}"
    elif high:
        test = f"{low} <= given <= {high}"
    else:
        test = f"given in ({right.replace(' or ', ', ')},)"
    return [f"print('{shown}: expected {right}{f' +- {bound}' if bound else ''}, returned', given)", f"assert {test}"]


def _unmodified(call: str, message: str) -> list[str]:
    value = re.sub(r"^(?:the list )?(\w+)((?:\[\d+\])?).*", r"arguments['\1']\2", message)
    return [
        f"before = copy.deepcopy({value})",
        call,
        f"print({message!r}, 'before:', before, 'after:', {value}, sep='\\n')",
        f"torch.testing.assert_close({value}, before, rtol=0, atol=0, equal_nan=True)",
    ]
