"""The verdict of a run as a small flat picture, for the top of a README."""

from __future__ import annotations

from markupsafe import Markup

from detoracle.reports.record import Report
from detoracle.reports.tally import Tally

__all__ = ["badge_of"]

_GOOD, _BAD, _NEITHER = "#2e7d32", "#c62828", "#616161"  # white text on each has a contrast above 4.5
_CHARACTER = 6.6  # pixels of 11 px Verdana, on average; textLength makes any other font fit
_PADDING = 12
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="detoracle: {verdict}">
<title>detoracle: {verdict}</title>
<rect width="{name}" height="20" fill="#424242"/>
<rect x="{name}" width="{rest}" height="20" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="6" y="14" textLength="{name_text}">detoracle</text>
<text x="{verdict_x}" y="14" textLength="{verdict_text}">{verdict}</text>
</g>
</svg>
"""


def badge_of(report: Report) -> str:
    """The badge.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        SVG of 20 pixels' height. It holds numbers only, and nothing that a stranger named.

    Examples
    --------
    >>> from detoracle.reports.record import Row
    >>> rows = (Row("yolox.assign", "mine", "one box", "", "equal"),)
    >>> "detoracle: 1 check equal" in badge_of(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}, rows))
    True
    """
    verdict, colour = _verdict(Tally(report.rows))
    name_text, verdict_text = (round(_CHARACTER * len(text)) for text in ("detoracle", verdict))
    name, rest = name_text + _PADDING, verdict_text + _PADDING
    return Markup(_SVG).format(
        width=name + rest,
        name=name,
        rest=rest,
        name_text=name_text,
        verdict_text=verdict_text,
        verdict_x=name + _PADDING // 2,
        verdict=verdict,
        colour=colour,
    )


def _verdict(tally: Tally) -> tuple[str, str]:
    """What the badge says, and in which colour."""
    equal, ambiguous = tally.counts["equal"], tally.counts["ambiguous"]
    if tally.findings:
        return f"{tally.findings:,} finding{'' if tally.findings == 1 else 's'}", _BAD
    if not equal + ambiguous:
        return "nothing judged", _NEITHER
    others = f", {ambiguous:,} ambiguous" if ambiguous else ""
    return f"{equal:,} check{'' if equal == 1 else 's'} equal{others}", _GOOD
