from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from detoracle.properties.scenefile import SavedScene, read_scene, write_atomically, write_scene
from detoracle.reference.errors import InputError

NASTY = [0.1, -0.0, math.nan, math.inf, -math.inf, 1e-45, 1 / 3, 3e38]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCENE = SavedScene(
    "yolox.loss",
    "unicode é",
    {
        "strides": [8, 16],
        "raw": [torch.randn(1, 6, 2, 2, generator=torch.Generator().manual_seed(0))],
        "flavour": "official",
        "eps": 0.1,
        "use_l1": True,
        "weight": None,
        "gt_valid": torch.tensor([[True, False]]),
    },
    "mine:f",
    ("a[b] : c",),
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_return_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor(NASTY, dtype=torch.float64).to(dtype).reshape(2, 4)
    write_scene(tmp_path / "s.json", SavedScene("o", "n", {"x": values}))
    found = read_scene(tmp_path / "s.json").arguments["x"]
    assert found.dtype == dtype
    assert found.shape == values.shape
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    same = found.view(integer) == values.view(integer)
    assert (same | (found.isnan() & values.isnan())).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_whole_numbers_return(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0, 1, -5, 2**31 - 1 if dtype == torch.int32 else 2**62]).to(dtype)
    write_scene(tmp_path / "s.json", SavedScene("o", "n", {"x": values, "empty": torch.zeros(0, 4, dtype=dtype)}))
    found = read_scene(tmp_path / "s.json").arguments
    assert torch.equal(found["x"], values)
    assert (found["x"].dtype, found["empty"].shape) == (dtype, (0, 4))


def test_everything_else_returns_too(tmp_path: Path) -> None:
    write_scene(tmp_path / "s.json", SCENE)
    found = read_scene(tmp_path / "s.json")
    assert (found.operation, found.name, found.implementation, found.findings) == (
        SCENE.operation,
        SCENE.name,
        SCENE.implementation,
        SCENE.findings,
    )
    assert torch.equal(found.arguments["raw"][0], SCENE.arguments["raw"][0])
    for name in ("strides", "flavour", "eps", "use_l1", "weight"):
        assert found.arguments[name] == SCENE.arguments[name]
        assert type(found.arguments[name]) is type(SCENE.arguments[name])


def test_the_same_scene_gives_the_same_bytes(tmp_path: Path) -> None:
    turned = SavedScene(
        SCENE.operation, SCENE.name, dict(reversed(list(SCENE.arguments.items()))), SCENE.implementation, SCENE.findings
    )
    for name, scene in (("a", SCENE), ("b", turned), ("c", read_scene_of(tmp_path, SCENE))):
        write_scene(tmp_path / name, scene)
    contents = {(tmp_path / name).read_bytes() for name in "abc"}
    assert len(contents) == 1
    assert contents.pop().isascii()


def read_scene_of(folder: Path, scene: SavedScene) -> SavedScene:
    write_scene(folder / "again", scene)
    return read_scene(folder / "again")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    write_scene(path, SCENE)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"^s.json: expected a scene file \(detoracle-scene/1\)"):
            read_scene(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "detoracle-scene/2"),
        (["operation"], 5),
        (["implementation"], None),
        (["findings"], 3),
        (["findings"], [3]),
        (["arguments"], 3),
        (["arguments", "raw", 0, "shape"], [9]),
        (["arguments", "eps", "float"], "0x1p9999"),
        (["arguments", "raw", 0, "tensor"], "float8"),
        (["arguments", "raw", 0, "values"], ["x"] * 24),
        (["arguments", "raw", 0], {}),
        (["arguments", "raw", 0, "values"], ["0x1p9999"] * 24),
    ],
)
def test_an_altered_file_is_refused(path: list[str], value: object, tmp_path: Path) -> None:
    write_scene(tmp_path / "s.json", SCENE)
    body = json.loads((tmp_path / "s.json").read_text())
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "s.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"^s.json: expected a scene file"):
        read_scene(tmp_path / "s.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(InputError, match="expected a place that can be written to"):
        write_atomically(path / "below", "x")
