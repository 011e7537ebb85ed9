"""Files of recorded vectors, whole and broken, and the comparison of one recorded array."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detoracle.properties.golden.checks import discrete, gradient, raised, uncovered, within
from detoracle.properties.golden.vectors import Recorded, read_vectors
from detoracle.reference.errors import InputError, UpstreamRaises
from detoracle.reference.rounding import Bounded

GOLDEN = Path(__file__).parents[1] / "golden" / "yolox_doc.npz"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for suffix in (".npz", ".json"):
        shutil.copy(GOLDEN.with_suffix(suffix), tmp_path / f"copy{suffix}")
    return tmp_path / "copy.npz"


def test_a_file_is_read_in_the_order_of_its_description(copy: Path) -> None:
    scenes = read_vectors(copy)
    assert [scene.name for scene in scenes] == list(json.loads(copy.with_suffix(".json").read_text())["scenes"])
    assert {(scene.system, scene.recording) for scene in scenes} == {("yolox", "yolox_doc")}
    assert len(scenes[0].tensors("in/raw")) == 3
    assert scenes[0].tensors("in/nothing") == []
    with pytest.raises(InputError, match="recorded scene 'empty-one': out/x: expected an array of that name, got none"):
        scenes[0].tensor("out/x")


def test_a_tensor_is_the_callers_own(copy: Path) -> None:
    scene = read_vectors(copy)[0]
    before = scene.tensor("in/raw.0")
    scene.tensor("in/raw.0").zero_()
    assert torch.equal(scene.tensor("in/raw.0"), before)


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def save(path: Path, **arrays: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": rewritten(lambda _: b""),
    "truncated": rewritten(lambda content: content[: len(content) // 2]),
    "overwritten": rewritten(lambda content: content[:60] + bytes(200) + content[260:]),
    "text": rewritten(lambda _: b"not an archive"),
    "single array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "pickled": lambda path: save(path, **{"single/in/x": np.array([{}], dtype=object)}),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_archive_is_refused(how: str, copy: Path) -> None:
    BROKEN[how](copy)
    with pytest.raises(InputError, match=r"^copy.npz: expected a readable .npz of recorded vectors, got "):
        read_vectors(copy)


def test_an_array_of_no_described_scene_is_refused(copy: Path) -> None:
    for key in ("elsewhere/in/x", "single/inside/x", "single"):
        save(copy, **{key: np.zeros(3)})
        with pytest.raises(InputError, match=f"of a described scene, got {key}"):
            read_vectors(copy)


@pytest.mark.parametrize(
    "description",
    [
        None,
        "",
        "{",
        "[]",
        "3",
        '{"system": "yolox_doc"}',
        '{"scenes": {}}',
        '{"system": "other", "scenes": {}}',
        '{"system": "yolox", "scenes": ["single"]}',
        '{"system": "yolox", "scenes": {"single": 3}}',
        '{"system": "yolox", "scenes": {}, "config": 3}',
        "[" * 100_000,
    ],
)
def test_a_broken_description_is_refused(description: str | None, copy: Path) -> None:
    described = copy.with_suffix(".json")
    described.unlink() if description is None else described.write_text(description)
    with pytest.raises(
        InputError, match=r"^copy.json: expected JSON beside the .npz with 'system' \(one of yolox, ssd"
    ):
        read_vectors(copy)


# ----------------------------------------------------------------------------------------------------- comparisons
def test_choices_are_compared_exactly_but_for_open_ones() -> None:
    got, recorded = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    assert discrete("k", got, got.double()).status == "equal"
    assert discrete("k", got, recorded).status == "different"
    assert discrete("k", got, recorded, open_=torch.tensor([False, True, False])).status == "ambiguous"
    assert discrete("k", got, recorded, open_=torch.tensor([True, False, True])).status == "different"
    assert discrete("k", got, recorded[:2]).detail == "shape (3,), recorded (2,)"


@pytest.mark.parametrize(
    "change", [torch.zeros_like, lambda x: x.flip(0), torch.ones_like, lambda x: x[:2], lambda x: x * 1.0001]
)
def test_floats_are_compared_within_their_bound(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values = torch.tensor([0.3, 7.0, -2.0])
    bounded = Bounded.exact(values, torch.float32) / 3
    assert within("x", values / 3, bounded).status == "equal"
    assert within("x", change(values / 3), bounded).status == "different"


def test_nan_and_infinity_must_be_recorded_too() -> None:
    values = torch.tensor([1.0, torch.inf, -torch.inf])
    bounded = Bounded.exact(values, torch.float32)
    assert within("x", values, bounded).status == "equal"
    for other in (torch.nan, 3e38, 0.0):
        assert within("x", torch.tensor([1.0, other, -torch.inf]), bounded).status == "different"


def test_gradients_are_compared_by_the_error_of_the_plain_oracle() -> None:
    exact = torch.tensor([[1.0, 100.0], [2.0, 3.0]]).double()
    plain = exact.float()
    assert gradient("g", plain, exact, plain).status == "equal"
    assert gradient("g", plain * 1.001, exact, plain).status == "different"
    assert gradient("g", plain.flip(0), exact, plain).status == "different"
    assert gradient("g", plain * 1.001, exact, plain * 1.001).status == "equal"
    overflown = torch.tensor([[torch.nan, 100.0], [2.0, 3.0]])
    assert gradient("g", overflown, exact, overflown).status == "equal"


def scene(info: dict[str, Any] | None = None, **outputs: Any) -> Recorded:
    return Recorded("s", "yolox", "yolox_doc", {}, info or {}, {f"out/{n}": np.asarray(v) for n, v in outputs.items()})


@pytest.mark.parametrize("upstream", [None, "IndexError: x"])
@pytest.mark.parametrize("ours", [None, UpstreamRaises("yolox.a", expected="b", got="c")])
def test_both_or_neither_raise(upstream: str | None, ours: UpstreamRaises | None) -> None:
    status = raised(scene({"raises": upstream}), ours).status
    assert status == ("equal" if (upstream is None) == (ours is None) else "different")


def test_what_no_check_has_covered_is_accounted_for() -> None:
    found = list(uncovered(scene(a=1, derived_b=2, c=3), {"a"}, {"derived_*": "a hint"}))
    assert [(check.stage, check.status) for check in found] == [("derived_b", "unchecked"), ("c", "different")]
