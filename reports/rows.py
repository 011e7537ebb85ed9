"""A judged call as a line of a report."""

from __future__ import annotations

from collections.abc import Sequence

from detoracle.properties.checking import Result
from detoracle.properties.known_failures import KnownFailure
from detoracle.reports.record import KNOWN_FAILURE, Row

__all__ = ["row_of"]


def row_of(operation: str, implementation: str, result: Result, known: Sequence[KnownFailure] = ()) -> Row:
    """Row of a result.

    Parameters
    ----------
    operation, implementation : str
    result : Result
        Of a case, a law or a trial.
    known : sequence of KnownFailure
        A failure that one of them covers is expected.

    Returns
    -------
    Row

    Examples
    --------
    >>> from detoracle.properties.checking import Case
    >>> from detoracle.properties.comparison import Finding, Verdict
    >>> from detoracle.properties.edge_cases import edge_cases
    >>> finding = Finding("yolox.loss[total]", "", "expected 2, got 1", ulps=8388608.0)
    >>> case = Case(edge_cases()[0], {}, "tutorial", {})
    >>> row = row_of("yolox.loss", "mine", Result(case, Verdict("different", (finding,)), trial="repeatable"))
    >>> row.setting, row.law, row.ulps
    ('tutorial', 'repeatable', 8388608.0)
    """
    verdict, case = result.verdict, result.case
    first = verdict.findings[0] if verdict.findings else None
    expected = first and next((e for e in known if e.covers(first.clause, case.scene.name, case.setting)), None)
    return Row(
        operation=operation,
        implementation=implementation,
        scene=case.scene.name,
        setting=case.setting,
        status=KNOWN_FAILURE if expected else verdict.status,
        clause=first.clause if first else "",
        where=first.where if first else "",
        message=first.message if first else "",
        count=first.count if first else 0,
        findings=len(verdict.findings),
        positives=verdict.positives,
        ambiguous=verdict.ambiguous,
        note=f"{expected.reason} ({expected.link})" if expected else verdict.note,
        tags=" ".join(sorted(case.scene.tags)),
        law=result.law.id if result.law else result.trial,
        ulps=first.ulps if first else 0.0,
    )
