"""Verdicts and findings: what is wrong with a tensor, where, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from detoracle.properties.bounds import outside, ulps_between, value_bound
from detoracle.properties.gradients import RightGradient
from detoracle.properties.outputs import Outcome
from detoracle.reference.rounding import Bounded, Decision

__all__ = ["Finding", "Status", "Verdict", "compare", "compare_gradients"]

Status = Literal["equal", "ambiguous", "different", "raised", "mutated-input", "timeout", "undefined"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes
    ----------
    clause : str
        Such as ``yolox.assign[outcome]``.
    where : str
        Position of the wrong element, and of the worst one where several numbers are wrong.
    message : str
        What was expected, what came.
    count : int
        Number of wrong elements.
    ulps : float
        Error of that element in units in the last place; infinite where one of both is not finite, 0 if it is no
        number.
    """

    clause: str
    where: str
    message: str
    count: int = 1
    ulps: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Judgement of one call.

    Attributes
    ----------
    status : str
        ``equal``; ``ambiguous`` (right, but not the float64 oracle's choice); ``different``; ``raised``;
        ``mutated-input``; ``timeout``; ``undefined`` (the oracle itself raises a named behaviour here, and nothing is
        asked).
    findings : tuple of Finding
        What is wrong; empty unless the status is a finding.
    note : str
        What an ``undefined`` or ``ambiguous`` is about.
    positives, ambiguous : int
        Assigned anchors, and how many of all anchors had more than one right outcome.
    """

    status: Status
    findings: tuple[Finding, ...] = ()
    note: str = ""
    positives: int = 0
    ambiguous: int = 0

    @property
    def wrong(self) -> bool:
        """Is this a finding?"""
        return self.status not in ("equal", "ambiguous", "undefined")


def compare(clause: str, given: Tensor, want: Any) -> list[Finding]:
    """Compare one output with a `Bounded`, a `Decision` or an exact tensor.

    Parameters
    ----------
    clause : str
        Of the finding, if there is one.
    given : Tensor
    want : Bounded, Decision or Tensor

    Returns
    -------
    list of Finding
        At most one.

    Examples
    --------
    >>> import torch
    >>> compare("yolox.loss[total]", torch.tensor(1.0), torch.tensor(2.0))[0].message
    'expected 2, got 1'
    """
    exact = want.value if isinstance(want, Bounded | Decision) else want
    if given.shape != exact.shape or given.device != exact.device:
        expected, got = (f"shape {tuple(t.shape)} on {t.device}" for t in (exact, given))
        return [Finding(clause, "", f"expected {expected}, got {got}")]
    if isinstance(want, Bounded):
        bound = value_bound(exact, want.error, given.dtype)
        wrong = outside(given, exact, bound)
    elif isinstance(want, Decision):
        wrong = (given != exact) & ~want.ambiguous
    else:
        wrong = given.double() != exact.double()
    if not wrong.any():
        return []
    position, ulps = _worst(wrong, given, exact)
    if isinstance(want, Bounded):
        message = _apart(exact[position], bound[position], given[position])
    else:
        message = f"expected {exact[position].item():.9g}, got {given[position].item():.9g}"
    return [Finding(clause, f"at {position}" if position else "", message, int(wrong.sum()), ulps)]


def _apart(exact: Tensor, bound: Tensor, given: Tensor) -> str:
    """What was expected, within what, and what came, all of as many digits as the bound asks for."""
    full = abs(float(f"{exact.item():.9g}") - exact.item()) > bound.item() / 16
    expected, got = (repr(n.item()) if full else f"{n.item():.9g}" for n in (exact, given))
    return f"expected {expected} +- {bound.item():.3g}, got {got}"


def _worst(wrong: Tensor, given: Tensor, exact: Tensor) -> tuple[tuple[int, ...], float]:
    """Position of the largest error among the wrong elements, and that error in units in the last place, if any."""
    if not given.is_floating_point():
        return tuple(wrong.nonzero()[0].tolist()), 0.0
    errors = ulps_between(given, exact).where(wrong, -1.0)
    place = int(errors.argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), wrong.shape)), float(errors.flatten()[place])


def compare_gradients(clauses: str, outcome: Outcome, expected: Mapping[str, RightGradient]) -> list[Finding]:
    """Compare all gradients of an outcome; those to the levels of a list share a clause.

    Parameters
    ----------
    clauses : str
        What the clauses begin with: the operation's name.
    outcome : Outcome
    expected : mapping of str to RightGradient
        By input name, ``raw[0]`` for lists.

    Returns
    -------
    list of Finding
        At most one for each tensor.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> right = {"raw[0]": RightGradient(one, one / 8, one > 0)}
    >>> [finding] = compare_gradients("yolox.loss", Outcome(gradients={"raw[0]": torch.zeros(1)}), right)
    >>> finding.clause, finding.where
    ('yolox.loss[gradient raw]', '[0] at (0,)')
    """
    findings = []
    for name, right in expected.items():
        base, bracket, index = name.partition("[")
        found = _gradient_finding(f"{clauses}[gradient {base}]", outcome.gradients.get(name), right)
        if found is not None:
            findings.append(replace(found, where=f"{bracket}{index} {found.where}".strip()))
    return findings


def _gradient_finding(clause: str, given: Tensor | None, right: RightGradient) -> Finding | None:
    if given is None:
        return Finding(clause, "", "expected a gradient, got none") if right.exact.nan_to_num().any() else None
    if given.shape != right.exact.shape:
        return Finding(clause, "", f"expected shape {tuple(right.exact.shape)}, got {tuple(given.shape)}")
    wrong = right.wrong(given)
    if not wrong.any():
        return None
    at, ulps = _worst(wrong, given, right.exact)
    message = _apart(right.exact[at], right.bound[at], given[at])
    return Finding(clause, f"at {at}" if at else "", message, int(wrong.sum()), ulps)
