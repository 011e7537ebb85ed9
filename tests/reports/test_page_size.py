"""The page stays small and is soon made, however much a run found."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from typing import Any

from detoracle.reports.page import MOST_BYTES, MOST_FINDINGS, render
from detoracle.reports.record import Measurement, Picture, Report, Row

STATUSES = ("equal", "ambiguous", "undefined", "known-failure", "different", "mutated-input", "raised", "timeout")
EMPTY = Report("a title", "detoracle compare --seed 7", "2026-01-01T00:00:00Z", 75.0, 7, {"torch": "2.6", "threads": 2})
MEASURED = Measurement("yolox.assign", "batched", "coco", 12.345, 2.0, 1.5, 2.5, "oracle", 8, 1234, 5, 6, 7, 8)


def _row(operation: str, implementation: str, status: str, number: int = 0, **more: Any) -> Row:
    wrong = status not in STATUSES[:4]
    facts: dict[str, Any] = {"clause": f"{operation}[outcome]", "message": f"message {number}"} if wrong else {}
    return Row(operation, implementation, f"scene {number}", "official", status, **{**facts, **more})


def _picture(row: Row, anchors: int = 4) -> Picture:
    side = math.isqrt(anchors)
    points = [[8.0 * x + 4, 8.0 * y + 4] for y in range(side) for x in range(side)]
    return Picture(
        row.operation, row.implementation, row.scene, row.setting, 3, (8.0 * side, 8.0 * side), [[0.0, 0.0, 9.0, 9.0]],
        [1], points, [8.0] * anchors, [0] * anchors, [-1] * anchors, [9.0] * anchors,
    )  # fmt: skip


def test_findings_beyond_the_limit_are_counted_and_every_kind_is_shown() -> None:
    rows = [_row("yolox.assign", "mine", "different", number) for number in range(MOST_FINDINGS + 50)]
    rows += [_row("yolox.loss", "mine", "raised", number, clause=f"yolox.loss[{number}]") for number in range(3)]
    page = render(replace(EMPTY, rows=tuple(rows)))
    assert page.count("<article") == MOST_FINDINGS
    assert "200 are shown, of every kind some, and 53 more are in results.csv." in page
    assert [re.sub("<.*?>", "", heading) for heading in re.findall(r'<h3 id="f-.*?</h3>', page)] == [
        "yolox.assign by mine: 250 findings, 197 shown",
        "yolox.loss by mine: 3 findings",
    ]


def test_a_hundred_thousand_rows_are_a_small_page_soon() -> None:
    rows = tuple(
        _row(
            f"yolox.stage{number % 40}",
            f"implementation {number % 5}",
            STATUSES[number % 8],
            number,
            note=f"note {number}",
        )
        for number in range(100_000)
    )
    start = time.process_time()
    page = render(replace(EMPTY, rows=rows))
    assert time.process_time() - start < 10
    assert len(page) < 500_000
    assert "100,000 checks: 12,500 equal" in page
    assert "the 50 most frequent of" in page


def test_long_names_everywhere_show_fewer_findings() -> None:
    rows = tuple(_row(f"o{n % 9}.x", "mine", "raised", n, message='"' * 4000, tags='"' * 4000) for n in range(1000))
    page = render(replace(EMPTY, rows=rows))
    assert len(page.encode()) < MOST_BYTES
    assert 0 < page.count("<article") < MOST_FINDINGS


def test_pictures_fill_their_share_and_the_others_are_named() -> None:
    rows = tuple(_row("yolox.assign", "mine", "different", number) for number in range(12))
    page = render(replace(EMPTY, rows=rows, pictures=tuple(_picture(row, anchors=4900) for row in rows)))
    assert len(page.encode()) < MOST_BYTES
    drawn, left_out = page.count('<svg class="detoracle-picture"'), page.count("The picture of image 3 is left out")
    assert drawn > 0
    assert left_out > 0
    assert drawn + left_out == 12


def test_a_full_run_is_small() -> None:
    rows, pictures = [], []
    for operation in range(60):
        for implementation in ("batched", "loop", "triton"):
            for number in range(150):
                status = "different" if implementation == "triton" and number < 20 else "equal"
                rows.append(_row(f"yolox.stage{operation}", implementation, status, number))
                if rows[-1].wrong:
                    pictures.append(_picture(rows[-1], anchors=400))
    measurements = [replace(MEASURED, operation=f"yolox.stage{n // 4}", implementation=f"i{n % 4}") for n in range(240)]
    page = render(replace(EMPTY, rows=tuple(rows), pictures=tuple(pictures), measurements=tuple(measurements)))
    assert len(page.encode()) < MOST_BYTES
    assert page.count("<article") == MOST_FINDINGS
