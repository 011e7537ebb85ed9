"""One stage of an assignment as a reader steps through it: what it says, what it draws, what it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from detoracle.reference.explain.explanation import Explanation
from detoracle.reports.record import Table

__all__ = ["Layer", "Run", "Stage", "by_ground_truth", "indices", "listed", "number", "result_stage", "shade"]

_SHADED = 60  # places down the ranking at which the shading ends
_TOLD = 40  # anchors of a ground truth that explain themselves


@dataclass(frozen=True)
class Layer:
    """Something drawn over boxes and anchors.

    Attributes
    ----------
    kind : str
        ``shade``: values from 0 to 1, the best; ``mark``: values are ground truths, or -2 for left out; ``ring``:
        values are not read; ``area``: boxes alone.
    values : mapping of int to float
        By anchor.
    told : mapping of int to str
        What single anchors say of themselves.
    gt : int or None
        Drawn only while this ground truth is the chosen one; always, if None.
    areas : tuple of list of float
        xyxy pixels.
    """

    kind: Literal["shade", "mark", "ring", "area"]
    values: Mapping[int, float] = field(default_factory=dict)
    told: Mapping[int, str] = field(default_factory=dict)
    gt: int | None = None
    areas: tuple[list[float], ...] = ()


@dataclass(frozen=True)
class Stage:
    """A step of the algorithm.

    Attributes
    ----------
    name : str
    text : str
        What happens and why, in sentences.
    legend : str
        What the drawing shows.
    layers : tuple of Layer
    table : Table or None
        Where the first column is a ground truth's number, the chosen one's line is marked.
    """

    name: str
    text: str
    legend: str
    layers: tuple[Layer, ...]
    table: Table | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One image of an operation's call, and what was right for it.

    Attributes
    ----------
    arguments : mapping
        Of the whole batch.
    image : int
    explanation : Explanation
        Of the whole batch.
    strides : list of float
        Of each anchor, for what it says of itself.
    """

    arguments: Mapping[str, Any]
    image: int
    explanation: Explanation
    strides: Sequence[float]

    def of(self, name: str) -> Any:
        """An argument's part that belongs to the image, with the images' axis kept: (1, ...)."""
        return self.arguments[name][self.image : self.image + 1]

    def settings(self, *names: str) -> dict[str, Any]:
        """Those of the named arguments that are given."""
        return {name: self.arguments[name] for name in names if name in self.arguments}

    def named(self, anchor: int) -> str:
        """An anchor, as a tooltip begins."""
        return f"anchor {anchor}, stride {self.strides[anchor]:g}"


def indices(mask: Tensor) -> list[int]:
    """Where a mask (N,) is true.

    Examples
    --------
    >>> import torch
    >>> indices(torch.tensor([False, True]))
    [1]
    """
    return [int(index) for index in mask.nonzero().flatten()]


def number(value: float | Tensor) -> str:
    """A number as tables and tooltips show it.

    Examples
    --------
    >>> number(0.123456), number(1e5 + 3)
    ('0.123', '100,003')
    """
    plain = float(value)
    return f"{plain:,.0f}" if 1e3 <= abs(plain) < 1e7 else f"{plain:.3g}"


def listed(values: Sequence[object], most: int = 13) -> str:
    """Values in one cell, cut where there are many.

    Examples
    --------
    >>> listed([1, 2, 3], 2)
    '1, 2, … (3)'
    """
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown}, … ({len(values)})"


def by_ground_truth(columns: Sequence[str], lines: Mapping[int, Sequence[str]], note: str) -> Table:
    """A table with a line for each ground truth.

    Examples
    --------
    >>> by_ground_truth(["anchors"], {3: ["7"]}, "").lines
    [['3', '7']]
    """
    found = [[str(gt), *cells] for gt, cells in lines.items()]
    return Table("by ground truth", note, ("ground truth", *columns), found)


def shade(run: Run, gt: int, values: Tensor, anchors: Tensor, told: Mapping[str, Tensor], *, largest: bool) -> Layer:
    """Shading of how well some anchors suit a ground truth: the darkest suits best.

    Parameters
    ----------
    run : Run
    gt : int
    values : Tensor (A,) float
        What ranks the anchors.
    anchors : Tensor (A,) bool
        Those to shade.
    told : mapping of str to Tensor (A,)
        What tooltips say of the best ones.
    largest : bool
        The largest value is best, not the smallest.

    Returns
    -------
    Layer
        Its scale ends with the sixtieth best.

    Examples
    --------
    >>> import torch
    >>> nothing = Run({}, 0, None, [8.0, 8.0, 8.0])
    >>> layer = shade(nothing, 0, torch.tensor([1.0, 9.0, 5.0]), torch.ones(3).bool(), {}, largest=False)
    >>> [layer.values[anchor] for anchor in range(3)]
    [1.0, 0.0, 0.5]
    """
    columns = anchors.nonzero().flatten()
    columns = columns[values[columns].isfinite()]
    ranked = columns[values[columns].argsort(descending=largest, stable=True)]
    if not len(ranked):
        return Layer("shade", gt=gt)
    best, last = values[ranked[0]].double(), values[ranked[min(_SHADED, len(ranked)) - 1]].double()
    scaled = ((last - values[ranked].double()) / (last - best)).clamp(0, 1).nan_to_num(nan=1.0)
    says = {
        anchor: ", ".join([run.named(anchor), *(f"{what} {number(tensor[anchor])}" for what, tensor in told.items())])
        for anchor in ranked[:_TOLD].tolist()
    }
    return Layer("shade", dict(zip(ranked.tolist(), scaled.tolist(), strict=True)), says, gt)


def result_stage(run: Run, gt_index: Tensor, quality: Tensor, measure: str) -> Stage:
    """The last stage of every system: who got what, and how far rounding is from changing it.

    Parameters
    ----------
    run : Run
    gt_index : Tensor (A,) int
    quality : Tensor (A,) float
    measure : str
        What the quality is.

    Returns
    -------
    Stage
    """
    margin, open_ = (t[run.image] for t in (run.explanation.margin, run.explanation.ambiguous))
    told = {}
    for anchor in indices((gt_index >= 0) | open_):
        outcome = f"ground truth {int(gt_index[anchor])}" if gt_index[anchor] >= 0 else "nobody"
        far = f"margin {number(margin[anchor])}" if bool(margin[anchor].isfinite()) else "no rounding can change it"
        told[anchor] = f"{run.named(anchor)}: {outcome}, {measure} {number(quality[anchor])}, {far}"
    lines = {}
    for gt in sorted(set(gt_index[gt_index >= 0].tolist()) | set(indices(run.of("gt_valid")[0]))):
        own = gt_index == gt
        some = bool(own.any())
        lines[gt] = [
            str(int(own.sum())),
            number(quality[own].mean()) if some else "–",
            number(margin[own].min()) if some else "–",
            str(int((own & open_).sum())),
        ]
    table = by_ground_truth(
        ["anchors", f"mean {measure}", "smallest margin", "open"],
        lines,
        "A margin is the distance to the nearest other decision, in units of the rounding error there: up to 1, "
        "rounding may decide, and more than one outcome is right.",
    )
    outcomes = {anchor: float(gt_index[anchor]) for anchor in indices(gt_index != -1)}
    return Stage(
        "Result",
        "What training sees: every marked anchor is trained towards its ground truth; all others are background, or "
        "take no part where they are crossed out.",
        "Colour, shape and number tell the ground truths. A dashed ring: rounding leaves this anchor open.",
        (Layer("mark", outcomes, told), Layer("ring", dict.fromkeys(indices(open_), 0.0), told)),
        table,
    )
