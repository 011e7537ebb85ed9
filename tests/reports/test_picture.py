"""Drawings of assignments: well-formed whatever is drawn, small, and saying the same by mark, ring and word."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.systems import system_of
from detoracle.reference import yolox
from detoracle.reports.picture import draw, draw_assignment
from detoracle.reports.record import Picture
from detoracle.reports.shapes import colour_of, dots, mark_of

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "]]>&amp;\x00\ud800",
    "a\u202eb\n\u2028c",
    "x" * 4000,
]


def _grid(side: int, stride: float) -> list[list[float]]:
    return [[(x + 0.5) * stride, (y + 0.5) * stride] for y in range(side) for x in range(side)]


def _picture(expected: list[int], given: list[int], *, boxes: list[list[float]], size: float = 64.0) -> Picture:
    side, count = math.isqrt(len(expected)), len(expected)
    margin = [0.5 if anchor % 2 else 9.0 for anchor in range(count)]
    return Picture(
        "yolox.assign", "mine", "a scene", "", 0, (size, size), boxes, list(range(len(boxes))),
        _grid(side, size / side), [size / side] * count, expected, given, margin,
    )  # fmt: skip


TWO = _picture([0, 0, 1, -1], [0, 1, 1, -2], boxes=[[0, 0, 40, 30], [30, 30, 60, 64]])


def _all(drawing: str, name: str, kind: str = "") -> list[ET.Element]:
    """Elements of a name, and of a class if one is given."""
    found = ET.fromstring(drawing).iter(SVG + name)
    return [element for element in found if not kind or kind in element.get("class", "").split()]


def _marks(drawing: str) -> dict[str, int]:
    """Marks on the image by colour: legend marks at the boxes' corners are stamped once each and come last."""
    counts: dict[str, int] = {}
    for path in _all(drawing, "path", "mark"):
        counts[path.get("fill", "")] = counts.get(path.get("fill", ""), 0) + path.get("d", "").count("M")
    return counts


def _titles(drawing: str, kind: str) -> list[str]:
    return [path.findtext(SVG + "title", "") for path in _all(drawing, "path", kind)]


def test_marks_are_the_assignments() -> None:
    # One mark beside each box's number in either panel, and one for each assigned anchor.
    assert _marks(draw(TWO)) == {colour_of(0): 2 + 2 + 1, colour_of(1): 2 + 1 + 2}
    assert _marks(draw_assignment(TWO)) == {colour_of(0): 1 + 2, colour_of(1): 1 + 1}


def test_rings_are_the_differences_and_say_so() -> None:
    expected = [
        "anchor 1, stride 32: expected ground truth 0, given ground truth 1, margin 0.5",
        "anchor 3, stride 32: expected background, given ignored, margin 0.5",
    ]
    assert _titles(draw(TWO), "ring") == expected * 2
    assert _titles(draw(TWO), "open") == expected * 2  # rounding could decide both
    assert _titles(draw(replace(TWO, margin=[9.0] * 4)), "open") == []
    assert _titles(draw_assignment(TWO), "ring") == []


def test_the_description_says_it_in_words() -> None:
    (description,) = _all(draw(TWO), "desc")
    assert description.text is not None
    assert description.text.startswith("64 by 64 pixels, 2 ground truths, 4 anchors. Oracle and implementation assign ")
    assert (
        "assign 3 and 3 anchors and differ at 2. anchor 1, stride 32: expected ground truth 0, given"
        in description.text
    )
    root = ET.fromstring(draw(TWO))
    assert root.get("role") == "img"
    assert [child.tag for child in root][:2] == [SVG + "title", SVG + "desc"]
    assert root.findtext(SVG + "title") == "yolox.assign by mine on a scene, image 0"


def test_ground_truths_are_numbered_with_their_label() -> None:
    texts = [text.text for text in _all(draw(replace(TWO, gt_labels=[999, -1])), "text", "number")]
    assert texts == ["0: label 999", "1: label -1"] * 2


def test_colour_and_shape_differ_together() -> None:
    assert len({(colour_of(gt), mark_of(gt, 4)) for gt in range(42)}) == 42
    assert len({colour_of(gt) for gt in range(42)}) == 7


def test_ignored_and_impossible_outcomes_have_marks_of_their_own() -> None:
    odd = replace(TWO, given=[-2, 7, -9, -1])
    titles = _titles(draw(odd), "plain")
    assert titles == ["", "assigned to a ground truth that is not there"]
    assert "given ground truth 7, which is not there" in _titles(draw(odd), "ring")[1]


def test_a_regular_grid_is_one_line_a_row() -> None:
    path, step = dots((x * 5.0, y * 5.0) for y in range(80) for x in range(80))
    assert (path.count("M"), step) == (80, 5.0)
    scattered, _ = dots([(0.0, 0.0), (1.0, 0.0), (7.5, 0.0), (3.0, 9.0)])
    assert scattered == "M0 0h1.2M7.5 0h0.2M3 9h0.2"


def test_a_large_image_stays_small() -> None:
    levels = [(80, 8.0), (40, 16.0), (20, 32.0)]
    points = [point for side, stride in levels for point in _grid(side, stride)]
    strides = [stride for side, stride in levels for _ in range(side * side)]
    everywhere = Picture(
        "yolox.assign", "mine", "all differ", "", 0, (640.0, 640.0), [[0.0, 0.0, 640.0, 640.0]], [0],
        points, strides, [-1] * 8400, [-1] * 8400, [9.0] * 8400,
    )  # fmt: skip
    assert len(_all(draw(everywhere), "path", "dots")) == 2 * 3
    assert len(draw(everywhere)) < 10_000
    worst = draw(replace(everywhere, given=[0] * 8400))
    assert len(worst) < 750_000
    (description,) = _all(worst, "desc")
    assert str(description.text).endswith("the first 150 are ringed, and the others have a grey halo")
    assert len(_titles(worst, "ring")) == 2 * 150
    assert len(_all(worst, "path", "halo")) == 2
    assert not _all(draw(TWO), "path", "halo")


def test_anchors_that_share_a_point_are_one_dot() -> None:
    picture = replace(TWO, anchor_points=[[8.0, 8.0]] * 4)
    assert [path.get("d", "").count("M") for path in _all(draw(picture), "path", "dots")] == [1, 1]


def test_boxes_without_area_are_dashed_and_those_without_a_place_named() -> None:
    boxes = [[10.0, 10.0, 10.0, 10.0], [50.0, 40.0, 20.0, 10.0], [math.nan, 0.0, 1.0, 1.0], [0.0, 0.0, 8.0, 8.0]]
    drawing = draw(_picture([-1], [-1], boxes=boxes))
    assert len(_titles(drawing, "bad")) == 2 * 2
    assert len(_titles(drawing, "box")) == 2 * 3
    (description,) = _all(drawing, "desc")
    assert str(description.text).endswith("Not drawn, for lack of a place: ground truth 2.")


@pytest.mark.parametrize("size", [(0.0, 0.0), (64.0, 0.0), (-3.0, 64.0), (math.nan, math.inf)])
def test_an_image_without_a_size_shows_its_content(size: tuple[float, float]) -> None:
    drawing = draw(replace(TWO, size=size))
    assert len(_titles(drawing, "box")) == 4
    assert _marks(drawing) == _marks(draw(TWO))


def test_nothing_at_all_is_still_a_drawing() -> None:
    nothing = Picture("yolox.assign", "mine", "empty", "", 0, (0.0, 0.0), [], [], [], [], [], [], [])
    for drawing in (draw(nothing), draw_assignment(nothing)):
        assert _all(drawing, "path", "paper")
        assert not _all(drawing, "path", "dots")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    picture = replace(TWO, operation=name, implementation=name, scene=name)
    plain = [element.tag for element in ET.fromstring(draw(TWO)).iter()]
    for drawing, usual in ((draw(picture), plain), (draw_assignment(picture), None)):
        assert not re.search(r"[\x00-\x1f\u202e\u2028\ud800]", drawing)
        assert usual is None or [element.tag for element in ET.fromstring(drawing).iter()] == usual
        assert all(len(title.text or "") <= 200 for title in _all(drawing, "title"))


def test_a_file_of_its_own() -> None:
    drawing = draw_assignment(TWO)
    assert drawing.startswith('<svg class="detoracle-picture" xmlns="http://www.w3.org/2000/svg"')
    assert not re.search(r"\bid=|href|url\(|<script|\bon\w+=", drawing)


def test_a_real_assignment() -> None:
    scene = next(scene for scene in edge_cases() if scene.name == "nested-concentric")
    system = system_of("yolox")
    _, arguments = next(iter(system.arguments("yolox.assign", system.native(scene))))
    canvas = system.canvas("yolox.assign", arguments)
    assert canvas is not None
    expected = yolox.assign(**arguments).gt_index[0].tolist()
    picture = Picture(
        "yolox.assign", "mine", scene.name, "", 0, canvas.size,
        canvas.gt_boxes[0].tolist(), canvas.gt_labels[0].tolist(),
        canvas.anchor_points.tolist(), canvas.anchor_strides.tolist(),
        expected, expected, [9.0] * len(expected),
    )  # fmt: skip
    counts = torch.tensor([index for index in expected if index >= 0]).bincount(minlength=4).tolist()
    assert sum(counts) > 0
    assert _marks(draw_assignment(picture)) == {colour_of(gt): 1 + count for gt, count in enumerate(counts)}


any_float = st.floats(width=32) | st.floats() | st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324])
indices = st.integers(-5, 9)


@st.composite
def _any_pictures(draws: st.DrawFn) -> Picture:
    anchors, gts = draws(st.integers(0, 6)), draws(st.integers(0, 5))

    def rows(count: int, width: int) -> list[list[float]]:
        return [[draws(any_float) for _ in range(width)] for _ in range(count)]

    def some(element: st.SearchStrategy[int], count: int) -> list[int]:
        return [draws(element) for _ in range(count)]

    return Picture(
        draws(st.text()), draws(st.text()), draws(st.text()), "", 0, (draws(any_float), draws(any_float)),
        rows(gts, 4), some(st.integers(), gts), rows(anchors, 2), [draws(any_float) for _ in range(anchors)],
        some(indices, anchors), some(indices, anchors), [draws(any_float) for _ in range(anchors)],
    )  # fmt: skip


def _numbers(elements: Iterable[ET.Element]) -> Iterable[float]:
    for element in elements:
        for name, value in element.attrib.items():
            if name in {"d", "x", "y", "width", "height", "viewBox", "stroke-width", "stroke-dasharray", "font-size"}:
                yield from map(float, re.findall(r"-?(?:\d[\d.]*(?:e[+-]?\d+)?|nan|inf)", value))


@given(_any_pictures())
def test_any_numbers_and_names_give_a_drawing_that_fits_its_frame(picture: Picture) -> None:
    for drawing in (draw(picture), draw_assignment(picture)):
        numbers = list(_numbers(ET.fromstring(drawing).iter()))
        assert all(abs(number) <= 1000 for number in numbers)
