"""CSV: one line a row, columns as the schema names them, safe to open in a spreadsheet.

A cell of text that a spreadsheet would run as a formula starts with an apostrophe; numbers stay numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import pandas as pd

from detoracle.reports.record import Measurement, Row
from detoracle.reports.text import visible

__all__ = ["csv_of"]

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")  # full-width signs act in some locales


def csv_of(kind: type[Row] | type[Measurement], records: Iterable[Row | Measurement]) -> str:
    r"""Records of one kind as CSV, with a header even if there are none.

    Parameters
    ----------
    kind : type
        `Row` or `Measurement`; its fields are the columns.
    records : iterable

    Returns
    -------
    str
        Lines end in a newline. NaN and infinity are ``nan``, ``inf`` and ``-inf``.

    Examples
    --------
    >>> print(csv_of(Row, [Row("yolox.assign", "=cmd()", "a\nb", "", "equal", count=-1)]).splitlines()[1])
    yolox.assign,'=cmd(),a\nb,,equal,,,,-1,0,0,0,,,,,0.0
    """
    columns = [field.name for field in fields(kind)]
    frame = pd.DataFrame.from_records([vars(record) for record in records], columns=columns)
    for field in fields(kind):
        if field.type == "str":
            frame[field.name] = [_cell(text) for text in frame[field.name]]
    return frame.to_csv(index=False, lineterminator="\n", na_rep="nan")


def _cell(text: str) -> str:
    """Text of a cell that is one line and no formula."""
    return ("'" if text.lstrip(" ").startswith(_FORMULA) else "") + visible(text)
