"""The pages in headless Chromium: filters, sorts and steps work, links lead on, nothing is fetched, all is readable.

Screenshots lie in the folder that the environment variable ``DETORACLE_SCREENSHOTS`` names, if there is one.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from detoracle.properties.checking import cases
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.systems import every_operation, find_operation
from detoracle.reports.bench import growth
from detoracle.reports.explain_page import render_story
from detoracle.reports.history import append, read
from detoracle.reports.history_page import render_history
from detoracle.reports.record import Measurement, Report
from detoracle.reports.sheets import law_table, with_tables
from detoracle.reports.stages import story_of
from detoracle.reports.writing import read_report, write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)

FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars",
)  # fmt: skip
WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")
HOSTILE = (
    "<script>document.title='taken'</script>\"'><img src=x onerror=document.title='taken'>" + "n" * 4000 + "\u202e"
)
RUN = "from detoracle.cli import main; main()"
WRONG = """
from detoracle.reference import yolox
def assign(**arguments):
    found = yolox.assign(**arguments)
    index = found.gt_index.clone()
    index[:, 0] = 0
    return index, found.quality, found.extra["dynamic_k"]
"""


# ------------------------------------------------------------------------------------------------------- the pages
@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real report with findings and pictures, extended by what a bench measures; a history; a story."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "wrong.py").write_text(WRONG)
    scenes = folder / "scenes.json"
    scenes.write_text(_coco())
    command = ["compare", "--operation", "yolox.assign", "--implementation", "loop", "--implementation", "wrong:assign"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command, "--scenes", str(scenes), "--out", str(folder / "run")],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # findings
    report = _extended(read_report(folder / "run"))
    page = write_report(report, folder / "run")
    for _ in range(4):
        append(report, folder / "h.jsonl")
    history = folder / "history.html"
    history.write_text(render_history(read(folder / "h.jsonl"), "h.jsonl"), "utf-8")
    story = folder / "story.html"
    (scene,) = [one for one in edge_cases() if one.name == "crowd"]
    case = next(cases(*find_operation("yolox.assign"), scene))
    story.write_text(render_story(story_of("yolox.assign", case.arguments, scene=HOSTILE), HOSTILE), "utf-8")
    return {"report": page, "history": history, "story": story}


def _coco() -> str:
    return (
        '{"images": [{"id": 1, "width": 640, "height": 480, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": '
        '"a"}], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [100, 90, 200, 150], "area": 30000, '
        '"iscrowd": 0}, {"id": 2, "image_id": 1, "category_id": 1, "bbox": [130, 90, 200, 190], "area": 38000, '
        '"iscrowd": 0}]}'
    )


def _extended(report: Report) -> Report:
    """With a row of hostile names, a bench's measurements, and a table."""
    row = report.findings[0]
    hostile = replace(row, implementation=HOSTILE, scene=HOSTILE, message=HOSTILE, scene_file=HOSTILE, tags=HOSTILE)
    measured = tuple(
        Measurement(
            "yolox.assign", name, f"16x{gts}", gts * slow, 9 / slow, 8 / slow, 10 / slow, "loop", 8, gts, 1, gts, gts,
            gts * 1000, "forward", 16, gts, 8400, 80, 3.0, 0.1, 8,
        )
        for name, slow in (("loop", 9.0), ("mine", 2.0), (HOSTILE, 3.0)) for gts in (5, 10, 20, 40)
    )  # fmt: skip
    report = replace(report, rows=(*report.rows, hostile), measurements=measured, growth=growth(measured))
    return with_tables(report, [law_table([operation for _, operation in every_operation()])])


# ----------------------------------------------------------------------------------------------------- the browser
@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium that writes down what it asks the network for."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def _opened(browser: Any, page: Path, width: int = 1280, scheme: str = "light", script: str = "") -> Any:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    return partial(browser.execute_script)


@pytest.mark.parametrize("name", ["report", "history", "story"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_opens_without_errors_or_requests_and_fits(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    run = _opened(browser, pages[name], width, scheme)
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert all(pages[name].as_uri() in message or "about:blank" in message for message in asked), asked
    assert run("return document.title").endswith("· detoracle")
    assert run("return document.documentElement.scrollWidth") <= width
    assert run("return document.querySelectorAll('script').length") == 1
    # Everything wider than the window scrolls by itself, and can be reached with the keyboard.
    wide = run(
        "return [...document.querySelectorAll('.scroll, figure[role]')].filter(e => e.scrollWidth > e.clientWidth + 1"
        " && e.tabIndex < 0).length"
    )
    assert wide == 0
    small = run(
        "return [...document.querySelectorAll('p, td, th, dd, li, label, h2, h3')].filter(e => e.offsetParent &&"
        " parseFloat(getComputedStyle(e).fontSize) < 11).length"
    )
    assert small == 0
    _keep(browser, f"{name}-{width}-{scheme}", width, run)


def _keep(browser: Any, name: str, width: int, run: Any) -> None:
    folder = os.environ.get("DETORACLE_SCREENSHOTS")
    if folder:
        height = min(run("return document.documentElement.scrollHeight"), 6000)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


@pytest.mark.parametrize("name", ["report", "history", "story"])
def test_text_stands_out_from_its_background_in_both_schemes(browser: Any, pages: dict[str, Path], name: str) -> None:
    for scheme in SCHEMES:
        run = _opened(browser, pages[name], scheme=scheme)
        assert run(_CONTRAST) == []


_CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
  .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if ((c[3] ?? 1) > 0) return c; } return [255, 255, 255]; };
const low = new Set();
const text = 'p, td, th, dd, dt, li, label, h1, h2, h3, h4, a, span, button, summary, code';
for (const e of document.querySelectorAll(text)) {
  if (!e.offsetParent || !e.textContent.trim() || e.disabled) continue;
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
  if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5) low.add(e.tagName + '.' + e.className);
}
return [...low];
"""  # the ratio that WCAG 2 asks for at level AA


def test_the_filters_narrow_and_say_how_many_are_left(browser: Any, pages: dict[str, Path]) -> None:
    run = _opened(browser, pages["report"])
    forms = run("return document.querySelectorAll('form.filter').length")
    assert forms == 3
    for number in range(forms):
        form = f"document.querySelectorAll('form.filter')[{number}]"
        items = f"[...document.getElementById({form}.dataset.target).querySelectorAll('[data-status]')]"
        shown = f"return {items}.filter(item => item.offsetParent).length"
        every = run(shown)
        assert every > 0
        run(f"const i = {form}.querySelector('input'); i.value = 'no such thing'; {_INPUT}")
        assert run(shown) == 0
        assert run(f"return {form}.querySelector('output').textContent").startswith("0 of ")
        run(f"const i = {form}.querySelector('input'); i.value = ''; {_INPUT}")
        assert run(shown) == every
        for status in run(f"return [...({form}.querySelector('select')?.options ?? [])].map(o => o.value)"):
            run(f"const i = {form}.querySelector('select'); i.value = arguments[0]; {_INPUT}", status)
            having = run(
                f"return {items}.filter(i => i.dataset.status.split(' ').includes(arguments[0])).length", status
            )
            assert run(shown) == (having if status else every)
            run(f"const i = {form}.querySelector('select'); i.value = ''; {_INPUT}")


_INPUT = "i.dispatchEvent(new Event('input', {bubbles: true}));"


def test_every_column_sorts_both_ways(browser: Any, pages: dict[str, Path]) -> None:
    run = _opened(browser, pages["report"])
    widths = run(f"{_ALL} return tables.map(t => t.tHead.rows[0].cells.length)")
    assert len(widths) >= 6
    press = f"{_ALL} tables[arguments[0]].tHead.rows[0].cells[arguments[1]].querySelector('button').click()"
    cells = (
        f"{_ALL} return [...tables[arguments[0]].tBodies[0].rows].filter(r => !r.classList.contains('group'))"
        ".map(r => r.cells[arguments[1]]).map(c => c.dataset.value ?? c.textContent.trim())"
    )
    for table, width in enumerate(widths):
        for column in range(width):
            run(press, table, column)
            up = run(cells, table, column)
            run(press, table, column)
            down = run(cells, table, column)
            assert sorted(up) == sorted(down)
            assert up == down[::-1] or len(set(up)) < len(up)
            if all(_is_number(cell) for cell in up):
                assert [float(cell) for cell in up] == sorted(float(cell) for cell in up)


_ALL = "const tables = [...document.querySelectorAll('table.sortable')];"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ["report", "history", "story"])
def test_every_link_leads_to_something_that_is_seen(browser: Any, pages: dict[str, Path], name: str) -> None:
    run = _opened(browser, pages[name])
    links = run("return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) > 3
    for link in dict.fromkeys(links):
        if link.startswith("#"):
            run("document.querySelector(`a[href='${arguments[0]}']`).click()", link)
            assert run("return Boolean(document.getElementById(arguments[0]).offsetParent)", link[1:]), link
            assert run("return location.hash") == link
        else:
            assert (pages[name].parent / link).is_file()


def test_the_story_goes_on_and_back_and_another_ground_truth_can_be_chosen(
    browser: Any, pages: dict[str, Path]
) -> None:
    run = _opened(browser, pages["story"])
    seen = "return [...document.querySelectorAll('section.stage')].filter(s => s.offsetParent).map(s => s.id)"
    assert run(seen) == ["stage-1"]
    for number in range(2, 7):
        run("document.querySelectorAll('form.controls button')[1].click()")
        assert run(seen) == [f"stage-{number}"]
    assert run("return document.querySelectorAll('form.controls button')[1].disabled")
    run("document.querySelectorAll('form.controls button')[0].click()")
    assert run(seen) == ["stage-5"]
    run("document.querySelector('form.controls input').click()")
    assert len(run(seen)) == 6
    drawn = (
        "return [...new Set([...document.querySelectorAll('g.of')]"
        ".filter(g => getComputedStyle(g).display != 'none').map(g => g.dataset.gt))]"
    )
    (first,) = run(drawn)
    other = run("return [...document.querySelector('form.controls select').options].map(o => o.value)")
    wanted = next(value for value in other if value != first)
    run(
        "const s = document.querySelector('form.controls select'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change', {bubbles: true}));",
        wanted,
    )
    assert run(drawn) == [wanted]
    marked = run("return [...new Set([...document.querySelectorAll('tr.chosen')].map(r => r.dataset.gt))]")
    assert marked == [wanted]


def test_the_keyboard_reaches_filters_headings_and_pictures(browser: Any, pages: dict[str, Path]) -> None:
    run = _opened(browser, pages["report"])
    reached = []
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(run("return document.activeElement.tagName"))
        style = run("return getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none", reached
    assert reached[0] == "A"  # skip to the results
    assert {"A", "INPUT", "SELECT", "DIV", "BUTTON"} <= set(reached)
