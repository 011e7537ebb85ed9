"""A run as JUnit XML, which every CI system shows as tests: one test case a row."""

from __future__ import annotations

from collections import defaultdict
from xml.etree import ElementTree as ET

from detoracle.reports.record import KNOWN_FAILURE, Report, Row
from detoracle.reports.text import short, visible

__all__ = ["junit_of"]

_SKIPPED = ("undefined", KNOWN_FAILURE)
# XML cannot hold these two at all; all else that it cannot hold, `visible` escapes.
_NO_XML = str.maketrans({0xFFFE: r"\ufffe", 0xFFFF: r"\uffff"})


def junit_of(report: Report) -> str:
    r"""All rows as test cases, a suite for each implementation.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        XML. A case has its operation as class name, and ``clause/scene (setting)`` as name; without a finding there is
        no clause to name. Findings are failures, whose type is the status; undefined cases and known failures are
        skipped; an ambiguous one passes, and says so in its output.

    Examples
    --------
    >>> rows = (Row("yolox.assign", "mine", "one box", "", "equal"), Row("yolox.loss", "mine", "<b>", "", "raised"))
    >>> xml = junit_of(Report("t", "c", "2026-01-01T00:00:00Z", 1.0, 0, {}, rows))
    >>> suite = ET.fromstring(xml)[0]
    >>> suite.get("tests"), suite.get("failures"), [case.get("name") for case in suite.iter("testcase")]
    ('2', '1', ['one box', '<b>'])
    """
    suites: defaultdict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        suites[row.implementation].append(row)
    root = ET.Element("testsuites", {"name": _text(report.title), **_counts(report.rows)})
    for implementation, rows in suites.items():
        attributes = {"name": _text(implementation), "timestamp": _text(report.started), **_counts(rows)}
        suite = ET.SubElement(root, "testsuite", attributes)
        for row in rows:
            _add(suite, row)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(rows: list[Row] | tuple[Row, ...]) -> dict[str, str]:
    failures, skipped = sum(row.wrong for row in rows), sum(row.status in _SKIPPED for row in rows)
    return {"tests": str(len(rows)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}


def _add(suite: ET.Element, row: Row) -> None:
    name = f"{row.clause}/{row.place}" if row.clause else row.place
    case = ET.SubElement(suite, "testcase", {"classname": _text(row.operation), "name": _text(name)})
    case.tail = "\n"
    if row.wrong:
        failure = ET.SubElement(case, "failure", {"type": _text(row.status), "message": _text(row.message)})
        replay = f"detoracle replay {row.scene_file}" if row.scene_file else ""
        lines = (row.clause, row.where, row.message, f"{row.count} wrong elements" if row.count else "", replay)
        failure.text = "\n".join(_text(line) for line in lines if line)
    elif row.status in _SKIPPED:
        ET.SubElement(case, "skipped", {"message": _text(row.note or row.status)})
    elif row.status == "ambiguous":
        output = ET.SubElement(case, "system-out")
        output.text = _text(f"ambiguous: {row.ambiguous} of {row.positives} positives {row.note}".strip())


def _text(text: str) -> str:
    """A stranger's text as XML can hold it and people can read it: one line, cut where it is long."""
    return short(visible(text).translate(_NO_XML))
