from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from detoracle.implementations.registry import (
    ENTRY_POINTS,
    Implementation,
    discover,
    implements,
    load,
    marked_in,
    preferred,
    unavailable,
)
from detoracle.reference.errors import InputError

MODULE = """
from detoracle.implementations.registry import implements

@implements("yolox.assign", name="{name}")
@implements("yolox.loss", name="{name}")
def both(**arguments):
    return arguments

def unmarked(**arguments):
    return None
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "adopter_one.py").write_text(MODULE.format(name="ours"))
    (tmp_path / "adopter_two.py").write_text(MODULE.format(name="ours"))
    (tmp_path / "adopter_three.py").write_text("from adopter_one import both\nboth = both\n")
    (tmp_path / "adopter_broken.py").write_text("1 / 0")
    return tmp_path


def test_a_mark_is_an_attribute_and_several_add_up() -> None:
    @implements("a.b", name="x")
    @implements("a.c", name="x")
    def function() -> None: ...

    assert vars(function)["implements"] == (("a.c", "x"), ("a.b", "x"))


@pytest.mark.parametrize("target", ["", "math", "math:", ":sqrt", "math.sqrt"])
def test_a_target_names_module_and_callable(target: str) -> None:
    with pytest.raises(InputError, match=r"implementation: expected package.module:callable"):
        load(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("math:no", "AttributeError"),
        ("math:pi", "to be callable, got float"),
        ("adopter_broken:f", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_loaded_is_named(target: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(target)


def test_names_after_the_colon_may_be_dotted() -> None:
    assert load("pathlib:Path.cwd")() == Path.cwd()


def test_only_functions_of_the_module_itself_count(folder: Path) -> None:
    import adopter_one  # type: ignore[import-not-found]
    import adopter_three  # type: ignore[import-not-found]

    assert marked_in(adopter_three) == ()
    found = marked_in(adopter_one)
    assert {one.operation for one in found} == {"yolox.assign", "yolox.loss"}
    assert {one.target for one in found} == {"adopter_one:both"}
    assert found[0].load()(a=1) == {"a": 1}


def project(folder: Path, text: str) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(text)
    return path


def test_a_pyproject_names_modules(folder: Path) -> None:
    named = discover(project(folder, '[tool.detoracle]\nimplementations = ["adopter_one"]'))
    assert set(named) - set(discover()) == {
        Implementation(operation, "ours", "adopter_one:both") for operation in ("yolox.assign", "yolox.loss")
    }
    assert discover(project(folder, "")) == discover(folder / "missing.toml") == discover()


@pytest.mark.parametrize(
    "text",
    [
        "[tool",
        "tool = 3",
        "[tool]\ndetoracle = 3",
        '[tool.detoracle]\nimplementations = "adopter_one"',
        "[tool.detoracle]\nimplementations = [3]",
    ],
)
def test_a_wrong_pyproject_is_refused(text: str, folder: Path) -> None:
    with pytest.raises(InputError, match=r"^pyproject.toml: expected TOML whose \[tool.detoracle\]"):
        discover(project(folder, text))


def test_two_of_one_name_are_refused(folder: Path) -> None:
    path = project(folder, '[tool.detoracle]\nimplementations = ["adopter_one", "adopter_two"]')
    with pytest.raises(
        InputError, match=r"one implementation named 'ours' of yolox.*two, adopter_one:both and adopter_two"
    ):
        discover(path)


def test_a_module_named_twice_counts_once_or_is_no_conflict(folder: Path) -> None:
    discover(project(folder, '[tool.detoracle]\nimplementations = ["adopter_one", "adopter_one"]'))


def test_a_module_that_cannot_be_imported_is_named(folder: Path) -> None:
    path = project(folder, '[tool.detoracle]\nimplementations = ["adopter_broken"]')
    with pytest.raises(InputError, match="module 'adopter_broken' to be importable, got ZeroDivisionError"):
        discover(path)


def test_entry_points_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("adopter", "adopter_one", ENTRY_POINTS)

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if group == ENTRY_POINTS else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert "adopter_one:both" in {one.target for one in discover()}


def test_every_built_in_can_be_loaded_and_is_unique() -> None:
    found = discover()
    assert all(callable(one.load()) for one in found)
    assert len({(one.operation, one.name) for one in found}) == len(found)


# ----------------------------------------------------------------------------------------- what cannot run everywhere
def test_kernels_for_a_gpu_are_not_listed_for_a_cpu() -> None:
    assert "triton" not in {one.name for one in discover()}
    assert unavailable("cpu")["triton"] == "needs a GPU"
    assert preferred("yolox.loss", device="cpu").name == "sparse"


def test_kernels_are_listed_for_a_gpu() -> None:
    pytest.importorskip("triton")
    assert unavailable("cuda") == {"compiled": "is for a CPU"}
    assert "triton" in {one.name for one in discover(device="cuda") if one.operation == "yolox.assign"}
    assert preferred("yolox.loss", device="cuda").name == "triton"
    assert preferred("yolox.cost", device="cuda").name == "batched"


def test_without_triton_plain_pytorch_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    needs = "needs the package triton: pip install detoracle[triton]"
    assert unavailable("cuda") == {"compiled": "is for a CPU", "triton": needs}
    assert preferred("yolox.loss", device="cuda").name == "batched"


def test_what_nobody_implements_is_named() -> None:
    with pytest.raises(InputError, match=r"operation: expected one that is implemented, got 'yolox\.guess'"):
        preferred("yolox.guess", device="cpu")
