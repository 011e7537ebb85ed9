"""The page: right numbers, sound structure, nothing from outside, and whatever strangers wrote is text."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from detoracle.reports.page import render
from detoracle.reports.record import Growth, Measurement, Picture, Report, Row, Table
from detoracle.reports.tally import Tally

CELLS = {"td", "th", "dt", "dd", "h4", "p"}  # what stands apart from what follows
VOID = {"meta", "input", "link", "br", "img", "hr"}
STATUSES = ("equal", "ambiguous", "undefined", "known-failure", "different", "mutated-input", "raised", "timeout")
EMPTY = Report("a title", "detoracle compare --seed 7", "2026-01-01T00:00:00Z", 75.0, 7, {"torch": "2.6", "threads": 2})
MEASURED = Measurement("yolox.assign", "batched", "coco", 12.345, 2.0, 1.5, 2.5, "oracle", 8, 1234, 5, 6, 7, 8)


@dataclass
class Node:
    """An element, its attributes, and all text below it."""

    tag: str
    attributes: dict[str, str]
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Text below it with single blanks."""
        return " ".join("".join(self.pieces).split())

    def all(self, tag: str = "", **attributes: str) -> list[Node]:
        """Elements below it."""
        found = [n for child in self.children for n in [child, *child.all()]]
        return [
            node
            for node in found
            if tag in ("", node.tag)
            and all(value in node.attributes.get(name.strip("_"), "").split() for name, value in attributes.items())
        ]

    def has_above(self, tag: str) -> bool:
        """Is it inside such an element?"""
        return self.parent is not None and (self.parent.tag == tag or self.parent.has_above(tag))


class _Parser(HTMLParser):
    """Builds the tree, and fails where a tag is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.node = Node("", {}, None)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> occurs twice: {names}"
        node = Node(tag, {name: value or "" for name, value in attributes}, self.node)
        self.node.children.append(node)
        if tag not in VOID:
            self.node = node

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in CELLS:
            self.handle_data(" ")
        assert self.node.tag == tag, f"</{tag}> inside <{self.node.tag}>"
        assert self.node.parent is not None
        self.node = self.node.parent

    def handle_data(self, data: str) -> None:
        node: Node | None = self.node
        while node is not None:
            node.pieces.append(data)
            node = node.parent


def _parsed(page: str) -> Node:
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.node is parser.root, f"<{parser.node.tag}> is not closed"
    return parser.root


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


def _full() -> Report:
    """Three systems, three implementations, all statuses, measurements, a picture."""
    rows = [
        _row(
            f"{system}.{stage}",
            implementation,
            STATUSES[number % 8 if implementation == "triton" else number % 4],
            number,
        )
        for system in ("yolox", "ssd", "boxes")
        for stage in ("assign", "loss")
        for implementation in ("batched", "loop", "triton")
        for number in range(1 + len(system + stage + implementation))
        if (system, implementation) != ("ssd", "triton")
    ]
    rows = [replace(row, positives=100, ambiguous=3) if row.operation == "yolox.assign" else row for row in rows]
    rows[1] = replace(rows[1], note="rounding leaves two open")
    finding = next(number for number, row in enumerate(rows) if row.wrong)
    rows[finding] = replace(
        rows[finding], scene_file="scenes/yolox assign-1.scene.json", where="image 3, anchor 0", count=1234, ulps=56.0
    )
    baseline = replace(MEASURED, implementation="oracle", times_faster=1.0, low=1.0, high=1.0)
    measurements = (baseline, MEASURED, replace(MEASURED, implementation="loop", low=0.0, high=math.inf, rounds=4))
    return replace(
        EMPTY,
        rows=tuple(rows),
        measurements=measurements,
        pictures=(_picture(rows[finding]),),
        notes=("3 boxes ignored",),
    )


FULL = _full()
PAGE = _parsed(render(FULL))


def _by_id(page: Node, name: str) -> Node:
    (found,) = page.all(id=name)
    return found


# ------------------------------------------------------------------------------------------------------- the numbers
def test_the_verdict_counts_all_rows() -> None:
    counts = Counter(row.status for row in FULL.rows)
    findings = sum(counts[status] for status in STATUSES[4:])
    (verdict,) = PAGE.all("div", class_="verdict")
    assert verdict.text == (
        f"✗ {findings} findings 6 operations × 3 implementations, {len(FULL.rows)} checks: {counts['equal']} equal, "
        f"{counts['ambiguous']} ambiguous, {counts['undefined']} undefined, "
        f"{counts['known-failure']} expected to fail, {findings} findings."
    )
    assert findings == len(FULL.findings) > 0


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ([], "○ Nothing was checked"),
        (["undefined"], "○ Nothing could be judged"),
        (["equal"], "✓ No findings"),
        (["equal", "raised"], "✗ 1 finding"),
    ],
)
def test_only_judged_checks_are_good_news(statuses: list[str], verdict: str) -> None:
    page = _parsed(render(replace(EMPTY, rows=tuple(_row("yolox.assign", "mine", status) for status in statuses))))
    assert page.all("strong")[0].text == verdict


def test_the_matrix_shows_each_cell_of_the_rows() -> None:
    table = _by_id(PAGE, "matrix-table")
    implementations = [th.text for th in table.all("thead")[0].all("th")[1:]]
    assert implementations == ["batched", "loop", "triton"]
    shown: dict[tuple[str, str], str] = {}
    for line in table.all("tr"):
        cells = line.all("td")
        if cells:
            assert line.attributes["data-text"] == line.all("th")[0].text
            shown |= {(line.all("th")[0].text, one): td.text for one, td in zip(implementations, cells, strict=True)}
    expected = {}
    for operation in dict.fromkeys(row.operation for row in FULL.rows):
        for implementation in implementations:
            statuses = [r.status for r in FULL.rows if (r.operation, r.implementation) == (operation, implementation)]
            worst = max(statuses, key=STATUSES.index, default="")
            bad = sum(s in STATUSES[4:] for s in statuses) or (statuses.count(worst) if worst != "equal" else 0)
            symbol = {"equal": "✓", "ambiguous": "≈", "undefined": "○", "known-failure": "△"}.get(worst, "✗")
            checks = f"{f'{bad} of ' if bad else ''}{len(statuses)} checks"
            expected[operation, implementation] = f"{symbol} {worst} {checks}" if statuses else "not run"
    assert shown == expected
    assert [th.text for th in table.all("th", scope="rowgroup")] == ["yolox", "ssd", "boxes"]


def test_each_cell_leads_to_its_evidence() -> None:
    for line in _by_id(PAGE, "matrix-table").all("tr"):
        for number, cell in enumerate(line.all("td")):
            for link in cell.all("a"):
                target = _by_id(PAGE, link.attributes["href"].removeprefix("#"))
                assert f"{line.all('th')[0].text} " in f"{target.text} "
                assert ("batched", "loop", "triton")[number] in target.text
                assert target.tag == ("h3" if "✗" in cell.text else "tr")


def test_evidence_counts_by_status() -> None:
    tally = Tally(FULL.rows)
    for (operation, implementation), cell in tally.cells.items():
        line = _by_id(PAGE, cell.id)
        rows = [row for row in FULL.rows if (row.operation, row.implementation) == (operation, implementation)]
        counts = [sum(row.status == status for row in rows) for status in STATUSES]
        assert [td.text for td in line.all("td")] == [implementation, *map(str, [len(rows), len(rows), *counts])]


def test_a_finding_tells_all_it_knows() -> None:
    article = _by_id(PAGE, "findings").all("article")[0]
    finding = FULL.findings[0]
    for part in (
        finding.clause,
        finding.message,
        finding.scene,
        finding.setting,
        finding.status,
        "image 3, anchor 0",
        "1,234",
        "56 units in the last place",
    ):
        assert part in article.text
    assert article.all("code")[0].text == "detoracle replay 'scenes/yolox assign-1.scene.json'"
    assert len(article.all("svg", class_="detoracle-picture")) == 1
    assert len(PAGE.all("svg", class_="detoracle-picture")) == 1
    assert len(PAGE.all("article")) == len(FULL.findings)


def test_ambiguity_is_a_share_of_the_positives() -> None:
    (line,) = _by_id(PAGE, "ambiguity").all("tbody")[0].all("tr")
    checks = sum(row.operation == "yolox.assign" for row in FULL.rows)
    assert line.text.split() == ["yolox.assign", f"{100 * checks:,}", f"{3 * checks}", "3.00%"]


def test_cost_says_faster_only_with_an_interval_that_clears_one() -> None:
    def verdicts(*measurements: Measurement) -> list[str]:
        time_table = _parsed(render(replace(EMPTY, measurements=measurements))).all("table")[0]
        return [line.all("td")[5].text for line in time_table.all("tbody")[0].all("tr")]

    slow = replace(MEASURED, times_faster=0.5, low=0.4, high=0.9)
    unclear = replace(MEASURED, times_faster=1.1, low=0.9, high=1.5)
    assert verdicts(MEASURED, slow, unclear) == ["▲ faster", "▼ slower", "○ inconclusive"]
    time_table, counters = _by_id(PAGE, "cost").all("table")
    baseline, batched, loop = time_table.all("tbody")[0].all("tr")
    assert baseline.text.endswith("12.3 1.00 × · baseline 8")
    assert batched.text == "yolox.assign batched coco 12.3 2.00 × 1.50 to 2.50 ▲ faster 8"
    assert loop.text.endswith("none from 4 rounds ○ inconclusive 4")
    assert counters.all("tbody")[0].all("tr")[1].text == "yolox.assign batched coco 1,234 5 6 7 8"


BENCHED = [
    replace(MEASURED, implementation=name, phase="forward", batch=2, gts=gts, anchors=84, classes=3,
            milliseconds=gts * slow, peak_live_bytes=gts * gts, first_call=7.25, floor_share=0.125)
    for name, slow in (("mine", 1.0), ("loop", 9.0))
    for gts in (5, 10, 20)
]  # fmt: skip


def test_a_bench_tells_phase_first_call_and_share_of_the_floor() -> None:
    time_table = _by_id(_parsed(render(replace(EMPTY, measurements=tuple(BENCHED)))), "cost").all("table")[0]
    heads = [th.text for th in time_table.all("th", scope="col")]
    cells = dict(zip(heads[1:], (td.text for td in time_table.all("tbody")[0].all("tr")[0].all("td")), strict=True))
    assert (cells["timed"], cells["first call, ms"], cells["of the floor"]) == ("forward", "7.25", "12.5%")
    assert "timed" not in [th.text for th in PAGE.all("th")]


def test_a_bench_on_a_gpu_tells_replays_launches_and_memory() -> None:
    plain = BENCHED[0]
    replayed = replace(plain, launches=12, device_peak_bytes=3456, replay_milliseconds=1.5)
    cost = _by_id(_parsed(render(replace(EMPTY, measurements=(plain, replayed)))), "cost")
    time_table, counters = cost.all("table")
    for table, name, cells in (
        (time_table, "from a CUDA graph, ms", ["–", "1.50"]),
        (counters, "launches", ["0", "12"]),
        (counters, "peak bytes of the GPU", ["0", "3,456"]),
    ):
        place = [th.text for th in table.all("th", scope="col")].index(name)
        assert [row.all("td")[place - 1].text for row in table.all("tbody")[0].all("tr")] == cells
    assert "launches" not in [th.text for th in PAGE.all("th")]


def test_growth_is_plotted_with_its_exponents() -> None:
    fits = tuple(
        Growth("yolox.assign", name, "forward", "gts", "2 batch, 84 anchors, 3 classes", 3, 1.0, 2.0)
        for name in ("mine", "loop")
    )
    cost = _by_id(_parsed(render(replace(EMPTY, measurements=tuple(BENCHED), growth=fits))), "cost")
    time_plot, bytes_plot = cost.all("svg", class_="detoracle-plot")
    for drawing, exponent in ((time_plot, "1.00"), (bytes_plot, "2.00")):
        marks = [path for path in drawing.all("path", class_="mark") if path.all("title")]
        assert len(marks) == 6
        assert [f"{name}: grows as gts^{exponent}" in drawing.text for name in ("mine", "loop")] == [True, True]
        assert len(drawing.all("path", class_="dashed")) == 2
    # The points lie on their fitted lines, which are straight.
    for drawing, name in ((time_plot, "mine"), (bytes_plot, "loop")):
        places = [_place(path) for path in drawing.all("path", class_="mark") if name in path.text][:3]
        (x1, y1), (x2, y2), (x3, y3) = places
        assert abs((y2 - y1) * (x3 - x1) - (y3 - y1) * (x2 - x1)) <= (abs(x3 - x1) + abs(y3 - y1)) * _DRAWN
    assert [line.text for line in cost.all("table")[1].all("tbody")[0].all("tr")] == [
        "mine 1.00 2.00 3",
        "loop 1.00 2.00 3",
    ]


_DRAWN = 0.3  # pixels by which places, rounded to tenths, can be off


def _place(path: Node) -> tuple[float, float]:
    """Where a mark's path begins."""
    x, y = re.findall(r"M([\d.]+) ([\d.]+)", path.attributes["d"])[0]
    return float(x), float(y)


def test_tables_are_shown_where_the_run_has_them() -> None:
    table = Table("Laws", "what changes", ("law", "obeyed by"), [["mirror", "all"], ["scale", "some"]])
    page = _parsed(render(replace(EMPTY, tables=(table,))))
    shown = _by_id(page, "table-1")
    assert [tr.text for tr in shown.all("tr")] == ["law obeyed by", "mirror all", "scale some"]
    (verdict,) = page.all("div", class_="verdict")
    assert verdict.text == "○ No implementation was checked; these are the tables what changes"
    assert [form.attributes["data-target"] for form in _by_id(page, "tables").all("form")] == ["table-1"]
    assert PAGE.all(id="tables") == []
    long = replace(table, lines=[["mirror", str(number)] for number in range(700)])
    assert "Here are the first 500 of 700 lines; all are in results.json." in render(replace(EMPTY, tables=(long,)))


def test_the_rest_of_the_run_is_told() -> None:
    header = PAGE.all("header")[0].text
    assert "Run on 2026-01-01T00:00:00Z, took 1 min 15 s, seed 7." in header
    assert header.endswith("detoracle compare --seed 7")
    assert [line.text for line in _by_id(PAGE, "environment").all("tr")] == ["torch 2.6", "threads 2"]
    assert [item.text for item in _by_id(PAGE, "notes").all("li")] == ["3 boxes ignored"]
    remarks = [line.text for line in _by_id(PAGE, "evidence").all("table")[1].all("tbody")[0].all("tr")]
    assert remarks == ["yolox.assign batched ≈ ambiguous rounding leaves two open 1"]


def test_an_empty_run_says_so_everywhere() -> None:
    page = _parsed(render(replace(EMPTY, environment={})))
    for section in ("matrix", "findings", "evidence", "ambiguity", "cost", "environment", "notes"):
        assert len(_by_id(page, section).all("p")[-1].text) > 10
        assert _by_id(page, section).all("table") == []


# ------------------------------------------------------------------------------------------------------- the structure
def test_nothing_comes_from_outside() -> None:
    page = render(FULL)
    addresses = re.findall(
        r"[\w-]*[\"'= (]*(?:https?:|ftp:|file:|data:|javascript:|//)[^\"' ]*", page.partition("<script>")[0]
    )
    assert set(addresses) == {'xmlns="http://www.w3.org/2000/svg'}
    assert not re.search(
        r"@import|url\(|\bsrc=|<link|<iframe|<object|<img|<base|fetch\(|XMLHttp|import\(|WebSocket", page
    )
    for node in PAGE.all():
        assert not [name for name in node.attributes if name.startswith("on")]
    hrefs = {link.attributes["href"] for link in PAGE.all("a") if not link.attributes["href"].startswith("#")}
    assert hrefs == {"results.json", "results.csv", "measurements.csv"}


def test_the_policy_allows_our_script_alone() -> None:
    (script,) = PAGE.all("script")
    digest = base64.b64encode(hashlib.sha256("".join(script.pieces).encode()).digest()).decode()
    (policy,) = [m.attributes["content"] for m in PAGE.all("meta") if "Policy" in m.attributes.get("http-equiv", "")]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


def test_ids_are_unique_and_links_lead_somewhere() -> None:
    ids = [node.attributes["id"] for node in PAGE.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    referred = {link.attributes["href"][1:] for link in PAGE.all("a") if link.attributes["href"].startswith("#")}
    referred |= {name for n in PAGE.all() for name in n.attributes.get("aria-labelledby", "").split()}
    referred |= {form.attributes["data-target"] for form in PAGE.all("form")}
    assert referred <= set(ids)
    assert PAGE.all("a")[0].attributes["href"] == "#main"


@pytest.mark.parametrize("report", [FULL, EMPTY], ids=["full", "empty"])
def test_headings_go_down_one_level_at_a_time(report: Report) -> None:
    levels = [int(node.tag[1]) for node in _parsed(render(report)).all() if re.fullmatch(r"h\d", node.tag)]
    assert levels[0] == 1 == levels.count(1)
    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_tables_are_tables_to_a_screen_reader() -> None:
    assert len(PAGE.all("table")) == 7
    for table in PAGE.all("table"):
        assert table.children[0].tag == "caption"
        assert all(th.attributes["scope"] in {"col", "row", "rowgroup"} for th in table.all("th"))
        region = table.parent
        assert region is not None
        assert (region.attributes["role"], region.attributes["tabindex"]) == ("region", "0")
        widths = {sum(int(c.attributes.get("colspan", 1)) for c in tr.children) for tr in table.all("tr")}
        assert len(widths) == 1


def test_every_control_has_a_label_and_every_status_a_word() -> None:
    for control in PAGE.all("input") + PAGE.all("select"):
        assert control.has_above("label")
    for badge in PAGE.all("span", class_="status"):
        assert badge.text.split()[-1] in STATUSES
        assert badge.children[0].attributes == {"aria-hidden": "true"}


def test_both_colour_schemes_and_paper_are_provided_for() -> None:
    (style,) = [node.text for node in PAGE.all("style") if not node.has_above("svg")]
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert ":focus-visible" in style
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in style.split("prefers-color-scheme: dark")[:2])
    assert dark == light


def test_the_same_report_gives_the_same_page() -> None:
    assert render(FULL) == render(FULL)


# ----------------------------------------------------------------------------------------------------------- strangers
@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "</script></style></title><img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)" x=\'',
        "{{ 7 * 7 }}{% raw %}",
        "javascript:alert(1)",
        "https://example.org/x.js",
        "a\x00b\x1b\ud800",
        "abc\u202efed\u2067",
        "one\r\ntwo\u2028three",
        "]]>--><!--",
    ],
)
def test_hostile_text_changes_no_structure(text: str) -> None:
    def tags(name: str) -> list[tuple[str, list[str]]]:
        strings: dict[str, Any] = {field.name: name for field in fields(Row) if field.type == "str"}
        row = Row(**strings, findings=2)
        rows = (row, replace(row, status="undefined"))
        measured = replace(MEASURED, operation=name, implementation=name, workload=name)
        facts, pictures = {name: name}, (_picture(row),)
        table = Table(name, name, (name, name), [[name, name]])
        sizes = [replace(measured, phase=name, gts=gts, milliseconds=float(gts)) for gts in (1, 2, 4)]
        growth = (Growth(name, name, name, "gts", "0 batch, 0 anchors, 0 classes", 3, 1.0, 1.0),)
        report = Report(name, name, name, 1.0, 0, facts, rows, (measured, *sizes), pictures, (name,), (), growth)
        page = render(replace(report, tables=(table,)))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\u2067\ud800]", page)
        return [(node.tag, sorted(set(node.attributes) - {"title"})) for node in _parsed(page).all()]

    assert tags(text) == tags("plain.name")


def test_a_long_name_is_cut_and_whole_in_its_tooltip() -> None:
    name = "n" * 4000
    page = _parsed(render(replace(EMPTY, rows=(_row("yolox.assign", name, "raised", scene_file=name, message=name),))))
    shown = [node for node in page.all("bdi") if "n" * 50 in node.text]
    assert len(shown) >= 5
    for node in shown:
        assert node.text.endswith("…")
        assert len(node.text) == 200
        assert name in node.attributes["title"]
