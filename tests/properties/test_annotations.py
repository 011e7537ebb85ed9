from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from detoracle.properties.annotations import read_coco, read_voc
from detoracle.reference.errors import InputError

COCO: dict[str, Any] = {
    "images": [
        {"id": 9, "width": 320, "height": 160},
        {"id": 4, "width": 640, "height": 1280},
        {"id": 5, "width": 64, "height": 64},
    ],
    "annotations": [
        {"image_id": 9, "bbox": [10, 20, 30.5, 40], "category_id": 90, "iscrowd": 0},
        {"image_id": 4, "bbox": [0, 0, 640, 1280], "category_id": 3},
        {"image_id": 9, "bbox": [0, 0, 320, 160], "category_id": 3, "iscrowd": 1},
        {"image_id": 9, "bbox": [1, 2, 3, 4], "category_id": 3},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
}


def _write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_coco(tmp_path: Path) -> None:
    found = read_coco(_write(tmp_path, COCO))
    assert found.num_classes == 2
    assert [image.name for image in found.images] == ["9", "4", "5"]
    assert found.images[0].boxes.tolist() == [[20, 40, 81, 120], [2, 4, 8, 12]]
    assert found.images[0].labels.tolist() == [1, 0]
    assert found.images[1].boxes.tolist() == [[0, 0, 320, 640]]
    assert found.images[2].boxes.shape == (0, 4)
    assert [image.dropped for image in found.images] == [1, 0, 0]


def test_coco_limit(tmp_path: Path) -> None:
    assert [image.name for image in read_coco(_write(tmp_path, COCO), 2).images] == ["9", "4"]


def _changed(part: str, row: int, **changes: object) -> dict[str, Any]:
    content = deepcopy(COCO)
    content[part][row].update(changes)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "instances.json: content: expected JSON text, got JSONDecodeError: Expecting property name"),
        pytest.param('{"a":' * 100_000, "content: expected JSON text, got RecursionError", id="deep"),
        ("[]", "categories: expected an object with a list, got []."),
        ({**COCO, "images": {}}, "images: expected a list, got {}."),
        ({"images": [], "categories": []}, "annotations: expected a list, got no such entry."),
        ({**COCO, "categories": [{"id": "car"}]}, "id: expected a whole number, got 'car'."),
        ({**COCO, "annotations": [7]}, "image_id: expected an object with a whole number or text, got 7."),
        (_changed("images", 1, id=9), "id: expected another for each image, got 9 twice."),
        (_changed("images", 1, width=0), "image 4: size: expected width and height above 0, got 0 x 1280."),
        (_changed("images", 1, width=None), "image 4: width: expected a number, got None."),
        (_changed("images", 1, width=True), "image 4: width: expected a number, got True."),
        (_changed("images", 1, height=float("nan")), "image 4: size: expected width and height above 0, got 640 x n"),
        (_changed("images", 1, height=10**400), "image 4: size: expected width and height above 0, got 640 x inf."),
        (_changed("annotations", 0, image_id=77), "image_id: expected an image of the file, got 77."),
        (_changed("annotations", 0, category_id=4), "image 9: category_id: expected a category of the file, got 4."),
        (_changed("annotations", 0, bbox=[1, 2, 3]), "image 9: bbox: expected four finite numbers: x, y, width, hei"),
        (_changed("annotations", 0, bbox=[1, 2, 3, float("inf")]), "image 9: bbox: expected four finite numbers"),
        (_changed("annotations", 0, bbox=[1, 2, 3, 10**400]), "image 9: bbox: expected four finite numbers"),
        (_changed("annotations", 0, bbox=[1, 2, 3, "4"]), "image 9: bbox: expected four finite numbers"),
        (_changed("annotations", 0, bbox=[0, 0, 1e300, 4]), "s.json, image 9: box 0: expected finite coordinates"),
    ],
)  # fmt: skip
def test_coco_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_coco(_write(tmp_path, content))
    assert message in str(caught.value)


def _xml(objects: str, size: str = "<width>320</width><height>160</height>") -> str:
    return f"<annotation><size>{size}<depth>3</depth></size>{objects}</annotation>"


def _object(name: str, left: object, top: object, right: object, bottom: object) -> str:
    sides = f"<xmax>{right}</xmax><xmin>{left}</xmin><ymin>{top}</ymin><ymax>{bottom}</ymax>"
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


def test_voc(tmp_path: Path) -> None:
    (tmp_path / "000002.xml").write_text(_xml(_object("dog", 1, 1, 320, 160) + _object("cat", 11, 21, 40.5, 60)))
    (tmp_path / "000001.xml").write_text(_xml(""))
    (tmp_path / "000002.jpg").write_bytes(b"no annotation")
    found = read_voc(tmp_path)
    assert found.num_classes == 2
    assert [image.name for image in found.images] == ["000001", "000002"]
    assert found.images[0].boxes.shape == (0, 4)
    assert found.images[1].boxes.tolist() == [[0, 0, 640, 320], [20, 40, 81, 120]]
    assert found.images[1].labels.tolist() == [1, 0]
    assert len(read_voc(tmp_path, 1).images) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><size>", "image 1: content: expected XML text, got ParseError: no element found"),
        ("<html></html>", "image 1: content: expected an <annotation>, got a <html>."),
        ("<annotation></annotation>", "image 1: size/width: expected a number, got no such element."),
        (
            _xml("", "<width>0</width><height>5</height>"),
            "image 1: size: expected width and height above 0, got 0 x 5.",
        ),
        (_xml(_object("", 1, 2, 3, 4)), "image 1, object 0: name: expected the class of the object, got none."),
        (_xml(_object("cat", 1, "two", 3, 4)), "image 1, object 0: bndbox/ymin: expected a number, got 'two'."),
        (
            _xml(_object("cat", 1, "nan", 3, 4)),
            "image 1: box 0: expected finite coordinates, got [0.0, nan, 3.0, 4.0].",
        ),
    ],
)
def test_voc_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "1.xml").write_text(content)
    with pytest.raises(InputError) as caught:
        read_voc(tmp_path)
    assert str(caught.value).startswith(tmp_path.name)
    assert message in str(caught.value)


def test_voc_without_files(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(
        InputError, match=r"expected a folder with \.xml files, got none\. Give the folder that holds them"
    ):
        read_voc(tmp_path)
