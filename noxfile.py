"""The checks a change must pass; `nox --list` shows them."""

from __future__ import annotations

import itertools
import shutil
import tomllib
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
ROOMS = ["reference", "implementations", "properties", "reports"]
GENUINE = tomllib.loads((ROOT / "upstream" / "releases.toml").read_text("utf-8"))

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "tests"]


def _install(session: nox.Session, *requirements: str) -> None:
    session.install("-c", "constraints.txt", *requirements)


def _house(session: nox.Session) -> Path:
    """Link the rooms under their import names: mypy and import-linter walk folders, they do not read package-dir."""
    house = Path(session.create_tmp()).resolve() / "house"
    shutil.rmtree(house, ignore_errors=True)
    (house / "detoracle").mkdir(parents=True)
    for path in [*(ROOT / "detoracle").iterdir(), *(ROOT / room for room in ROOMS)]:
        (house / "detoracle" / path.name).symlink_to(path)
    return house


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and the direction of imports."""
    _install(session, "ruff", "import-linter")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    with session.chdir(_house(session)):
        session.run("lint-imports", "--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml"))


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy, strict, over the packages, the tests and this file."""
    _install(session, "-e", ".[dev]")
    house = _house(session)
    session.run("mypy", str(house / "detoracle"), "tests", "noxfile.py", env={"MYPYPATH": str(house)})


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite."""
    _install(session, "-e", ".[test]")
    session.run("pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadscope", *session.posargs)


@nox.session(name="docs-examples")
def docs_examples(session: nox.Session) -> None:
    """The examples in docstrings and in README.md."""
    _install(session, "-e", ".[test]")
    session.run("pytest", "tests/test_doctests.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The pages in headless Chromium, if it is installed; screenshots lie in build/screenshots."""
    _install(session, "-e", ".[test]")
    shown = {"DETORACLE_SCREENSHOTS": str(ROOT / "build" / "screenshots")}
    session.run("pytest", "tests/browser", *session.posargs, env=shown)


@nox.session
def compare(session: nox.Session) -> None:
    """Our implementations against the oracles on realistic scenes."""
    _install(session, "-e", ".")
    session.run("detoracle", "compare", "--scenes", "realistic", *session.posargs)


@nox.session
def deep(session: nox.Session) -> None:
    """The whole suite with many more Hypothesis examples, drawn anew each time."""
    _install(session, "-e", ".[test]")
    session.run("pytest", "--hypothesis-profile=deep", "--timeout=0", *session.posargs)


def _bench_on_gpu(session: nox.Session, operation: str, *options: str, part: str = "") -> None:
    """Tables of an operation over all sizes, under the GPU's name."""
    name = session.run("python", "-c", "import torch; print(torch.cuda.get_device_name())", silent=True)
    folder = ROOT / "reports" / "published" / str(name).strip().replace(" ", "-").lower()
    sizes = [f"--batch={batch}" for batch in (1, 16, 64)] + [f"--gts={gts}" for gts in (5, 20, 100, 500)]
    for dtype in ("float32", "bfloat16"):
        out = str(folder / "-".join(filter(None, (operation, dtype, part))))
        # Where an output was wrong the table says so; the other tables are wanted all the same.
        bench = ["detoracle", "bench", operation, "--device", "cuda", "--dtype", dtype, "--out", out, "--resume"]
        session.run(*bench, *sizes, *options, success_codes=[0, 1])


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU, and tables of what every implementation costs on it, under its name."""
    _install(session, "-e", ".[test]")
    session.run("pytest", "tests/implementations", "-k", "triton", *session.posargs)
    for system, stage in itertools.product(("yolox", "ssd", "anchor_head", "rtmdet", "yolov8"), ("assign", "loss")):
        _bench_on_gpu(session, "ssd.match" if (system, stage) == ("ssd", "assign") else f"{system}.{stage}")


@nox.session(name="gpu-upstream")
@nox.parametrize("package", list(GENUINE))
def gpu_upstream(session: nox.Session, package: str) -> None:
    """Tables of what the genuine packages cost on a GPU, next to every implementation."""
    _install_genuine(session, package, GENUINE[package]["recorded"][-1])
    for operation, adapter in GENUINE[package]["operations"].items():
        if operation.partition(".")[2] in ("assign", "match", "loss"):
            _bench_on_gpu(session, operation, "--rival", f"detoracle.adapters.{adapter}", part=package)


def _install_genuine(session: nox.Session, package: str, release: str) -> None:
    """A release and what its loss imports; without its own dependencies, for these bring another torch."""
    entry = GENUINE[package]
    _install(session, "-e", ".")
    session.install("-c", "constraints.txt", "--upgrade-strategy", "only-if-needed", *entry["needs"])
    if entry["apart"]:
        session.install("--no-deps", *entry["apart"])
    wanted = [f"{package}=={release}", *entry["releases"][release]]
    session.install("--no-deps", "--no-build-isolation", *wanted, env={"MMCV_WITH_OPS": "0"})


def _check_genuine(
    session: nox.Session, package: str, release: str, out: Path, *options: str, known: bool = False
) -> list[str]:
    """Check every operation that the release has; the names of those that are wrong."""
    entry = GENUINE[package]
    lacks = entry.get("lacks", {}).get(release, [])
    wrong = []
    for operation, adapter in entry["operations"].items():
        if operation.partition(".")[0] in lacks:
            continue
        target = f"detoracle.adapters.{adapter}"
        command = ["detoracle", "check", operation, target, "--out", str(out), "--json", str(out / f"{operation}.json")]
        command += ["--time-limit", "300"]  # the first call imports the package
        failures = ROOT / "upstream" / "known-failures" / f"{package}-{release}" / f"{operation}.toml"
        if known and failures.is_file():
            command += ["--known-failures", str(failures)]
        settings = {"YOLO_CONFIG_DIR": session.create_tmp()}
        answer = session.run(*command, *options, *session.posargs, success_codes=[0, 1, 2], silent=True, env=settings)
        session.log(str(answer).strip())
        if f"{operation} by {target}: right" not in str(answer):
            wrong.append(f"{package} {release}: {operation}")
    return wrong


def _absent(folder: Path, why: str) -> None:
    """Tell the drift atlas why it lacks a release."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "absent.txt").write_text(why + "\n", "utf-8")


@nox.session
@nox.parametrize("package", list(GENUINE))
def upstream(session: nox.Session, package: str) -> None:
    """The genuine packages, in the releases that our oracles describe, against the oracles."""
    wrong = []
    for release in GENUINE[package]["recorded"]:
        _install_genuine(session, package, release)
        out = Path(session.create_tmp()) / f"{package}-{release}"
        wrong += _check_genuine(session, package, release, out, known=True)
    if wrong:
        session.error("neither right nor known: " + ", ".join(wrong))


@nox.session
@nox.parametrize("package", [name for name in GENUINE if name != "torchvision"])
def drift(session: nox.Session, package: str) -> None:
    """Releases of the genuine packages, one after the other: which changed what; renews the drift atlas."""
    found = Path(session.cache_dir) / "drift"
    for release, why in GENUINE[package].get("absent", {}).items():
        _absent(found / package / release, why)
    for release in GENUINE[package]["releases"]:
        out = found / package / release
        shutil.rmtree(out, ignore_errors=True)
        try:
            _install_genuine(session, package, release)
        except CommandFailed:
            session.warn(f"{package} {release} could not be installed here")
            _absent(out, "could not be installed where this atlas was made")
            continue
        _check_genuine(session, package, release, out, "--examples", "3")
        for scene in itertools.chain(
            *(out.glob(f"*.{stage}-*.scene.json") for stage in ("assign", "loss", "ssd_loss"))
        ):
            picture = scene.with_name(scene.name.replace(".scene.json", ".svg"))
            session.run("detoracle", "replay", str(scene), "--svg", str(picture), success_codes=[0, 1], silent=True)
    session.run("python", "-m", "detoracle.reports.drift", str(found), "reports/published/drift")
