"""A page that steps through an assignment, stage by stage: teaching material that stands on its own."""

from __future__ import annotations

from collections import Counter

from detoracle.reports.layout import laid_out
from detoracle.reports.scenery import STYLE
from detoracle.reports.stage_picture import draw_stage
from detoracle.reports.stages import Story

__all__ = ["render_story"]

_MOST_GTS = 24  # that can be chosen: each has drawings of its own
_MOST_LINES = 200  # of a stage's table


def render_story(story: Story, command: str) -> str:
    """The page.

    Parameters
    ----------
    story : Story
    command : str
        As a person would type it to make the page again.

    Returns
    -------
    str
        HTML, self-contained. Without its script all stages are seen, one below the other.

    Examples
    --------
    >>> from detoracle.properties.checking import cases
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> from detoracle.properties.systems import find_operation
    >>> from detoracle.reports.stages import story_of
    >>> case = next(cases(*find_operation("yolox.assign"), edge_cases()[0]))
    >>> page = render_story(story_of("yolox.assign", case.arguments, scene=case.name), "detoracle explain")
    >>> page.count("<svg")
    6
    """
    taken = Counter(gt for gt in story.picture.expected if gt >= 0)
    every = {
        int(line[0]) for stage in story.stages if stage.table for line in stage.table.lines if _of_gts(stage.table)
    }
    shown = sorted(sorted(every, key=lambda gt: (-taken[gt], gt))[:_MOST_GTS])
    chosen = max(shown, key=lambda gt: (taken[gt], -gt), default=None)
    drawings = [draw_stage(story.picture, stage, shown, chosen) for stage in story.stages]
    return laid_out(
        "explain",
        "explain",
        {"of_gts": _of_gts},
        title=f"{story.operation} on {story.scene}, image {story.picture.image}",
        story=story,
        steps=list(zip(story.stages, drawings, strict=True)),
        shown=shown,
        chosen=chosen,
        left_out=len(every) - len(shown),
        command=command,
        picture_style=STYLE,
        most_lines=_MOST_LINES,
    )


def _of_gts(table: object) -> bool:
    """Does a table have a line for each ground truth?"""
    columns: tuple[str, ...] = getattr(table, "columns", ())
    return columns[:1] == ("ground truth",)
