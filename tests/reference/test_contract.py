"""The docstring is the contract: what is read from it, and what a call is held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detoracle.reference.contract import arguments_of, check_arguments, operation, rank_fits, returns_of
from detoracle.reference.errors import InputError

BOXES, LABELS, MASK = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
RAW = [torch.zeros(2, 9, 4, 5), torch.zeros(2, 9, 1, 1)]


@operation("test.one", kind="values", source="here", gradients=("raw",))
def one(
    raw: list[Tensor],
    boxes: Tensor,
    labels: Tensor,
    mask: Tensor,
    sizes: Any,
    *,
    scale: float = 1.0,
    count: int = 2,
    name: str = "a",
    fast: bool = False,
    mode: str = "first",
    extra: Tensor | None = None,
    any_rank: Tensor | None = None,
) -> Tensor:
    """Do one thing.

    Parameters
    ----------
    raw : list of Tensor (B, 5+C, Hl, Wl) float
        Maps: one
        a level.
    boxes : Tensor (B, G, 4) float
    labels : Tensor (B, G) int
    mask : Tensor (B, G) bool
    sizes : sequence of sequence of int
    scale : float
    count : int
    name : str
    fast : bool
    mode : {"first", "second"}
    extra : Tensor (2*C+1,) float or None
    any_rank : Tensor (..., 4) float or None

    Returns
    -------
    total : Tensor () float
    aside : Tensor (B,) int or None
        Not always.

    Raises
    ------
    Nothing : at all
    """
    return boxes.sum()


GIVEN: dict[str, Any] = {"raw": RAW, "boxes": BOXES, "labels": LABELS, "mask": MASK, "sizes": [(4, 5), (1, 1)]}


def test_inputs_and_outputs_are_read_in_order() -> None:
    found = arguments_of(one)
    assert [a.name for a in found] == [
        "raw",
        "boxes",
        "labels",
        "mask",
        "sizes",
        "scale",
        "count",
        "name",
        "fast",
        "mode",
        "extra",
        "any_rank",
    ]
    assert found[0].tensor == (("B", "5+C", "Hl", "Wl"), "float", True)
    assert found[0].meaning == "Maps: one a level."
    assert [a.optional for a in found[-3:]] == [False, True, True]
    assert [(r.name, r.optional, r.meaning) for r in returns_of(one)] == [
        ("total", False, ""),
        ("aside", True, "Not always."),
    ]
    assert arguments_of(test_inputs_and_outputs_are_read_in_order) == ()


def test_an_operation_keeps_what_it_declares() -> None:
    declared = one.operation  # type: ignore[attr-defined]
    assert (declared.name, declared.system, declared.kind, declared.gradients) == (
        "test.one",
        "test",
        "values",
        ("raw",),
    )
    assert declared.oracle is one


def test_sizes_are_solved_for() -> None:
    sizes = check_arguments(
        one,
        {
            **GIVEN,
            **dict.fromkeys(("extra", "any_rank")),
            "scale": 1,
            "count": 2,
            "name": "",
            "fast": True,
            "mode": "second",
        },
        where="w",
    )
    assert sizes == {"B": 2, "C": 4, "G": 3}


GOOD: list[dict[str, Any]] = [
    {},
    {"labels": LABELS.int()},
    {"boxes": BOXES.half()},
    {"raw": tuple(RAW)},
    {"extra": torch.zeros(9)},
    {"scale": 3},
    {"any_rank": torch.zeros(4)},
    {"any_rank": torch.zeros(7, 1, 4)},
    {"sizes": []},
]


@pytest.mark.parametrize("change", GOOD)
def test_right_calls_go_through(change: dict[str, Any]) -> None:
    assert one(**{**GIVEN, **change}) == 0


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"boxes": BOXES[0]},
        r"boxes: expected a float Tensor of shape \(B, G, 4\) with B=2, got float32 Tensor of shape \(3, 4\)",
    ),
    ({"boxes": BOXES.int()}, "got int32 Tensor"),
    ({"boxes": BOXES[..., :3]}, r"got float32 Tensor of shape \(2, 3, 3\)"),
    ({"boxes": BOXES[:1]}, "with B=2"),
    ({"boxes": BOXES.tolist()}, r"boxes: expected a float Tensor of shape .* \(list\)"),
    ({"labels": LABELS[:, :2]}, r"labels: expected a int Tensor of shape \(B, G\) with B=2, G=3"),
    ({"labels": LABELS.bool()}, "bool Tensor"),
    ({"mask": MASK.int()}, "mask: expected a bool Tensor"),
    ({"raw": RAW[0]}, "raw: expected a non-empty list of Tensor"),
    ({"raw": []}, "non-empty list"),
    (
        {"raw": [RAW[0], RAW[1][:, :8]]},
        r"raw\[1\]: expected .* with B=2, C=4, got float32 Tensor of shape \(2, 8, 1, 1\)",
    ),
    ({"raw": [RAW[0][:, :4]]}, r"raw\[0\]: expected"),
    ({"extra": torch.zeros(8)}, r"extra: expected .* with C=4"),
    ({"any_rank": torch.zeros(3)}, "any_rank"),
    ({"any_rank": torch.tensor(1.0)}, "any_rank"),
    ({"sizes": [4, 5]}, "sizes: expected sequence of sequence of int"),
    ({"sizes": ["ab"]}, "sizes"),
    ({"scale": "1"}, r"scale: expected float, got '1' \(str\)"),
    ({"count": 1.0}, "count: expected int"),
    ({"name": 3}, "name: expected str"),
    ({"fast": 1}, "fast: expected bool"),
    ({"mode": "third"}, 'mode: expected {"first", "second"}, got \'third\''),
    ({"boxes": None}, "boxes: expected a float Tensor"),
    ({"boxes": BOXES.to("meta")}, "boxes: expected device cpu, like the others, got meta"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_calls_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^test.one: .*{message}" if not message.startswith("got") else message):
        one(**{**GIVEN, **change})


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(InputError, match=r"w: boxes: expected Tensor \(B, G, 4\) float, got nothing"):
        check_arguments(one, {"raw": RAW}, where="w")


@pytest.mark.parametrize(
    ("shape", "ndim", "fits"),
    [(("...", "4"), 1, True), (("...", "4"), 0, False), (("B",), 1, True), ((), 0, True), ((), 1, False)],
)
def test_ranks(shape: tuple[str, ...], ndim: int, fits: bool) -> None:
    assert rank_fits(shape, ndim) is fits
