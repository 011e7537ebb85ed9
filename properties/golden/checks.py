"""Comparing one recorded array with what an oracle stage gives for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from detoracle.properties.bounds import gradient_bound, outside
from detoracle.properties.golden.vectors import Recorded
from detoracle.reference.errors import UpstreamRaises
from detoracle.reference.rounding import Bounded, value_of

__all__ = ["StageCheck", "discrete", "gradient", "raised", "uncovered", "within"]

Status = Literal["equal", "ambiguous", "different", "unchecked", "flavour"]


@dataclass(frozen=True)
class StageCheck:
    """Outcome of one recorded array.

    Attributes
    ----------
    stage : str
        Name of the recorded output, such as ``cost.0``; ``raises`` for an exception.
    status : {"equal", "ambiguous", "different", "unchecked", "flavour"}
        ``ambiguous``: differs only where rounding decides. ``unchecked``: no oracle stage, for the reason given.
        ``flavour``: differs, in a recording of another release than the oracle's.
    detail : str
        What differs, where and by how much; the named behaviour; or the reason.
    """

    stage: str
    status: Status
    detail: str = ""


def discrete(stage: str, got: Tensor, recorded: Tensor, *, open_: Tensor | None = None) -> StageCheck:
    """Compare choices (masks, indices, counts) exactly, but for elements that rounding leaves open.

    Parameters
    ----------
    stage : str
    got, recorded : Tensor
        Same shape; dtypes may differ.
    open_ : Tensor bool, optional
        Elements that may differ.

    Returns
    -------
    StageCheck

    Examples
    --------
    >>> discrete("k.0", torch.tensor([1, 2]), torch.tensor([1, 3])).detail
    '1 of 2 elements, first at (1,): 2, recorded 3'
    """
    got, recorded = value_of(got).detach(), recorded.detach()
    if got.shape != recorded.shape:
        return StageCheck(stage, "different", f"shape {tuple(got.shape)}, recorded {tuple(recorded.shape)}")
    unequal = got.double() != recorded.double()
    if not unequal.any():
        return StageCheck(stage, "equal")
    if open_ is not None and not (unequal & ~open_.expand_as(unequal)).any():
        return StageCheck(stage, "ambiguous", f"{int(unequal.sum())} of {unequal.numel()} elements, all tied")
    return StageCheck(stage, "different", _first(unequal, got, recorded))


def within(stage: str, recorded: Tensor, bounded: Bounded) -> StageCheck:
    """Compare floats: recorded must lie within the rounding bound of the float64 result.

    Parameters
    ----------
    stage : str
    recorded : Tensor
        Same shape as `bounded`.
    bounded : Bounded
        The oracle stage, run on `Bounded` inputs of the recorded dtype.

    Returns
    -------
    StageCheck

    Examples
    --------
    >>> third = Bounded.exact(torch.tensor([1.0]), torch.float32) / 3
    >>> within("x", torch.tensor([1 / 3]), third).status, within("x", torch.tensor([0.34]), third).status
    ('equal', 'different')
    """
    if bounded.shape != recorded.shape:
        return StageCheck(stage, "different", f"shape {tuple(bounded.shape)}, recorded {tuple(recorded.shape)}")
    wrong = outside(recorded, bounded.value, bounded.error)
    if not wrong.any():
        return StageCheck(stage, "equal")
    return StageCheck(stage, "different", _first(wrong, bounded.value, recorded))


def gradient(stage: str, recorded: Tensor, exact: Tensor, plain: Tensor, *, row: int = 1) -> StageCheck:
    """Compare a gradient, by the error that the plain oracle in the recorded dtype makes.

    Parameters
    ----------
    stage : str
    recorded, exact, plain : Tensor
        Recorded, the oracle's in float64, the oracle's in the recorded dtype; one shape.
    row : int
        Dimension over which one anchor's channels lie; errors are compared with the largest of the row.

    Returns
    -------
    StageCheck

    Examples
    --------
    >>> g = torch.ones(1, 2)
    >>> gradient("g", g * 1.01, g.double(), g).status
    'different'
    """
    bound = gradient_bound(exact, plain, row=row)
    exact = torch.where(plain.isfinite(), exact, plain.double())  # what overflows there cannot in float64
    wrong = outside(recorded, exact, bound)
    return StageCheck(stage, "different", _first(wrong, exact, recorded)) if wrong.any() else StageCheck(stage, "equal")


def raised(scene: Recorded, error: UpstreamRaises | None) -> StageCheck:
    """Compare exceptions: the oracle must raise a named behaviour exactly where the genuine code raised.

    Parameters
    ----------
    scene : Recorded
    error : UpstreamRaises or None
        What the oracle raised.

    Returns
    -------
    StageCheck

    Examples
    --------
    >>> scene = Recorded("s", "yolox", "yolox_doc", {}, {"raises": "IndexError: x"}, {})
    >>> raised(scene, None).detail
    'the oracle returns, recorded IndexError: x'
    """
    if error is None and scene.raises is None:
        return StageCheck("raises", "equal", "neither raises")
    if error is not None and scene.raises is not None:
        return StageCheck("raises", "equal", f"{error.behaviour} for {scene.raises}")
    if error is not None:
        return StageCheck("raises", "different", f"the oracle raises {error}, recorded none")
    return StageCheck("raises", "different", f"the oracle returns, recorded {scene.raises}")


def uncovered(scene: Recorded, checked: set[str], reasons: Mapping[str, str]) -> Iterator[StageCheck]:
    """Account for recorded outputs that no check has covered.

    Parameters
    ----------
    scene : Recorded
    checked : set of str
        Stages that were checked.
    reasons : mapping of str to str
        Why arrays of a name (a shell pattern) have no oracle stage.

    Yields
    ------
    StageCheck
        ``unchecked`` with the reason; ``different`` where there is none.
    """
    for name in scene.outputs:
        if name in checked:
            continue
        reason = next((text for pattern, text in reasons.items() if fnmatchcase(name, pattern)), None)
        if reason is None:
            yield StageCheck(name, "different", "recorded, but no oracle stage is compared with it")
        else:
            yield StageCheck(name, "unchecked", reason)


def _first(wrong: Tensor, got: Tensor, recorded: Tensor) -> str:
    where = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements, first at {where}: "
        f"{got[where].item():.9g}, recorded {recorded[where].item():.9g}"
    )
