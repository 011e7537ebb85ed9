"""The house itself: what is installed, who may import whom, and what the repository promises about itself."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import FunctionType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ROOMS = ["reference", "implementations", "properties", "reports"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
PACKAGE_FILES = sorted(file for top in ["detoracle", *ROOMS] for file in (ROOT / top).rglob("*.py"))
TEXT_FILES = [
    file
    for top in ["detoracle", *ROOMS, "tests", ".ci", ".github", "docs"]
    for file in sorted((ROOT / top).rglob("*"))
    if file.is_file() and file.suffix not in {".npz", ".pyc", ".png", ".jpg"}
] + [file for pattern in ["*.md", "*.py", "*.toml", "*.txt", "*.ini"] for file in ROOT.glob(pattern)]


def _relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _import_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("detoracle") else f"detoracle.{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy of the tree, so that nothing is left behind in it and nothing stale gets in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for top in ["detoracle", *ROOMS]:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    built = subprocess.run([*pip_wheel, str(target), str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(target.glob("detoracle-*.whl"))


@pytest.fixture
def unpacked(wheel: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def _lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on an unpacked wheel: it walks folders, and only there do they stand as they are imported."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--no-logo", "--config", ROOT / "pyproject.toml"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tree)},
    )


def test_imports_point_one_way(unpacked: Path) -> None:
    linted = _lint_imports(unpacked)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("reference", "import detoracle.properties", "Imports point one way through the rooms"),
        ("implementations", "from detoracle import reports", "Imports point one way through the rooms"),
        ("properties", "from detoracle import assign", "No room imports the front door"),
        ("implementations", "from detoracle.reference import yolox", "Optimised code never imports the oracle"),
    ],
)
def test_import_against_the_way_is_caught(unpacked: Path, module: str, line: str, contract: str) -> None:
    (unpacked / "detoracle" / module / "planted.py").write_text(f"{line}\n", "utf-8")
    linted = _lint_imports(unpacked)
    assert linted.returncode == 1
    assert re.search(rf"{contract}.* BROKEN", linted.stdout), linted.stdout


def test_wheel_installs_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"detoracle"}


def test_wheel_holds_every_file_of_the_packages(unpacked: Path) -> None:
    expected = {
        file.relative_to(ROOT) if top == "detoracle" else Path("detoracle", file.relative_to(ROOT))
        for top in ["detoracle", *ROOMS]
        for file in (ROOT / top).rglob("*")
        if file.is_file() and file.suffix != ".pyc" and "published" not in file.parts  # recorded results stay here
    }
    assert Path("detoracle/py.typed") in expected
    assert {file.relative_to(unpacked) for file in (unpacked / "detoracle").rglob("*") if file.is_file()} == expected


def test_every_package_is_listed() -> None:
    names = [_import_name(file) for file in PACKAGE_FILES if file.name == "__init__.py"]
    assert sorted(PACKAGES) == sorted(names)


def test_every_folder_of_modules_is_a_package() -> None:
    assert [_relative(file.parent) for file in PACKAGE_FILES if not (file.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", [_import_name(file) for file in PACKAGE_FILES])
def test_module_names_its_api(name: str) -> None:
    """What a module defines is either private or in `__all__`, and what `__all__` promises is there."""
    module = importlib.import_module(name)
    members = [(key, value) for key, value in vars(module).items() if isinstance(value, type | FunctionType)]
    defined = {key for key, value in members if value.__module__ == name}
    exported = set(getattr(module, "__all__", ()))
    assert {key for key in defined if not key.startswith("_")} <= exported
    assert exported <= vars(module).keys()


def test_no_machine_paths() -> None:
    machine = re.compile(r"(?<![\w.<])/(?:home|root|work|tmp|Users|farm)/\w|\b[A-Z]:\\\w")
    assert [_relative(file) for file in TEXT_FILES if machine.search(file.read_text("utf-8"))] == []


def test_ci_runs_what_the_readme_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    (command,) = (line for line in ci if line.startswith("python3 -m venv .venv") and "pytest" in line)
    assert f"\n{command}\n" in (ROOT / "README.md").read_text("utf-8")


def test_requirements_are_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = PYPROJECT["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in map(Requirement, project["dependencies"] + extras):
        assert requirement.name == "detoracle" or requirement.specifier.contains(pins[requirement.name]), requirement


def test_deep_profile_draws_anew_on_ci() -> None:
    program = """if True:
        import conftest
        deep = conftest.settings.get_profile("deep")
        print(deep.derandomize, deep.database is None)
    """
    environment = os.environ | {"CI": "true", "PYTHONPATH": str(ROOT / "tests")}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.split() == ["False", "False"]
