"""The drift atlas: which release of a genuine package changed what an operation does.

It is made of what ``detoracle check --json`` wrote, one file for each release and operation, in folders
``package/release/operation.json``. A release drifts where it violates other clauses of an operation than the release
before it; the oracle is the yardstick that both are held against, not the judge of which of them is better. A release
that could not be had has a folder with ``absent.txt`` instead, which says why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from detoracle.properties.scenefile import write_atomically
from detoracle.reference.errors import InputError

__all__ = ["Change", "Checked", "changes", "markdown", "read_absent", "read_checks", "write_atlas"]


_INTRODUCTION = """\
# Drift atlas

Which release of a genuine package does what its oracle does, and where it departs. `nox -s drift` renews it: every row
is `detoracle check OPERATION ADAPTER --examples 3`, where `upstream/releases.toml` names the adapter, in an environment
with that release.

A `[returns]` clause is an exception; `NotImplementedError` there is the adapter's own, where a release lacks
a variant that the operation asks for, and says nothing about the release. Laws, other dtypes and other processes
are tried only where the plain answer is right: what is told to begin there may have been hidden before.
"""

_LARGEST = 2**16  # bytes of a scene or a picture; what is larger is not kept, but made again with the atlas


@dataclass(frozen=True)
class Checked:
    """What a check of one operation found in one release.

    Attributes
    ----------
    package, release, operation : str
    counts : dict of str to int
        Verdicts by status.
    failures : tuple of dict
        As in the check's JSON: clause, smallest scene, its file (below the folder of packages, or empty if it is not
        kept), findings, times.
    """

    package: str
    release: str
    operation: str
    counts: dict[str, int]
    failures: tuple[dict[str, Any], ...]

    @property
    def clauses(self) -> frozenset[str]:
        """Clauses that the release violates."""
        return frozenset(failure["clause"] for failure in self.failures)


@dataclass(frozen=True)
class Change:
    """Between two releases, the clauses of an operation that began or ceased to be violated.

    Attributes
    ----------
    package, operation, before, after : str
        The last two are releases.
    began, ceased : tuple of str
        Clauses.
    """

    package: str
    operation: str
    before: str
    after: str
    began: tuple[str, ...]
    ceased: tuple[str, ...]


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())


def read_checks(folder: Path) -> tuple[Checked, ...]:
    """Read all checks under a folder, by package, operation and release.

    Parameters
    ----------
    folder : Path
        With files ``package/release/operation.json``.

    Returns
    -------
    tuple of Checked

    Raises
    ------
    InputError
        If a file is not what ``detoracle check --json`` writes, or there is none.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "yolox" / "0.3.0" / "yolox.assign.json"
    >>> file.parent.mkdir(parents=True)
    >>> _ = file.write_text('{"operation": "yolox.assign", "counts": {"equal": 9}, "failures": []}')
    >>> read_checks(file.parents[2])[0].release
    '0.3.0'
    """
    found = []
    for file in folder.glob("*/*/*.*.json"):  # an operation's name has a dot; the check's own report lies beside it
        if file.name.endswith(".scene.json"):
            continue
        try:
            body = json.loads(file.read_text("utf-8"))
            facts = body["operation"], body["counts"], tuple(body["failures"])
        except (ValueError, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise InputError(file.name, expected="what 'detoracle check --json' writes", got=got) from error
        package, release = file.parts[-3:-1]
        operation, counts, failures = facts
        scenes = [{**failure, "file": f"{package}/{release}/{Path(failure['file']).name}"} for failure in failures]
        found.append(Checked(package, release, operation, counts, tuple(scenes)))
    if not found:
        raise InputError(str(folder), expected="files package/release/operation.json", got="none")
    return tuple(sorted(found, key=lambda one: (one.package, one.operation, _version(one.release))))


def _histories(checks: Sequence[Checked]) -> Iterator[list[Checked]]:
    """Checks of one operation of one package, release after release."""
    histories: dict[tuple[str, str], list[Checked]] = {}
    for one in checks:
        histories.setdefault((one.package, one.operation), []).append(one)
    yield from histories.values()


def changes(checks: Sequence[Checked]) -> tuple[Change, ...]:
    """Find the releases that changed something.

    Parameters
    ----------
    checks : sequence of Checked
        In `read_checks`'s order.

    Returns
    -------
    tuple of Change

    Examples
    --------
    >>> failure = {"clause": "a[b]"}
    >>> old, new = Checked("p", "1.0", "a", {}, ()), Checked("p", "1.1", "a", {}, (failure,))
    >>> changes((old, new))[0].began
    ('a[b]',)
    """
    return tuple(
        Change(
            old.package,
            old.operation,
            old.release,
            new.release,
            tuple(sorted(new.clauses - old.clauses)),
            tuple(sorted(old.clauses - new.clauses)),
        )
        for history in _histories(checks)
        for old, new in pairwise(history)
        if old.clauses != new.clauses
    )


def read_absent(folder: Path) -> dict[str, str]:
    r"""Why some releases could not be had, by package and release.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "yolox" / "0.1.0" / "absent.txt"
    >>> file.parent.mkdir(parents=True)
    >>> _ = file.write_text("not in the registry\n")
    >>> read_absent(file.parents[2])
    {'yolox 0.1.0': 'not in the registry'}
    """
    files = sorted(folder.glob("*/*/absent.txt"), key=lambda file: (file.parts[-3], _version(file.parts[-2])))
    return {" ".join(file.parts[-3:-1]): file.read_text("utf-8").strip() for file in files}


def markdown(checks: Sequence[Checked], pictures: Collection[str] = (), absent: Mapping[str, str] | None = None) -> str:
    """Write the atlas as Markdown: what changed when, then every release's departures with their smallest scenes.

    Parameters
    ----------
    checks : sequence of Checked
        In `read_checks`'s order.
    pictures : collection of str
        Files of scenes that have a picture beside them.
    absent : mapping of str to str, optional
        From `read_absent`.

    Returns
    -------
    str

    Examples
    --------
    >>> print(markdown([Checked("p", "1.0", "a", {"equal": 3}, ())]).splitlines()[0])
    # Drift atlas
    """
    lines = [_INTRODUCTION, "## What changed when", ""]
    for change in changes(checks):
        told = [f"began to depart in {', '.join(map(_code, change.began))}"] if change.began else []
        told += [f"no longer departs in {', '.join(map(_code, change.ceased))}"] if change.ceased else []
        span = f"{change.package} {change.before} → {change.after}"
        lines.append(f"- **{span}**, `{change.operation}`: {'; '.join(told)}.")
    for package in dict.fromkeys(one.package for one in checks):
        lines += ["", f"## {package}", "", "| operation | release | cases | departs in |", "| --- | --- | ---: | --- |"]
        mine = [one for one in checks if one.package == package]
        for one in mine:
            departs = ", ".join(f"{_code(f['clause'])} ({f['times']})" for f in one.failures) or "nothing"
            lines.append(f"| `{one.operation}` | {one.release} | {sum(one.counts.values())} | {departs} |")
        lines += ["", *(line for one in mine for failure in one.failures for line in _told(one, failure, pictures))]
    if absent:
        lines += ["", "## What could not be had", "", *(f"- {name}: {why}." for name, why in absent.items())]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`"


def _told(one: Checked, failure: dict[str, Any], pictures: Collection[str]) -> Iterator[str]:
    """A failure's smallest scene, and what was found there."""
    file = failure["file"]
    links = [f"[scene]({file})" if file else "scene too large to keep"]
    links += [f"[picture]({_picture(file)})"] * (file in pictures)
    yield f"- {one.release}, `{failure['clause']}` on *{failure['scene']}* ({', '.join(links)}):"
    yield from (f"  - {finding}" for finding in failure["findings"])


def _picture(scene: str) -> str:
    return scene.removesuffix(".scene.json") + ".svg"


def _kept(folder: Path, checks: Sequence[Checked]) -> tuple[Checked, ...]:
    """The checks, with files of small scenes only, and of equal ones once."""
    first: dict[str, str] = {}

    def file_of(name: str) -> str:
        text = (folder / name).read_text("utf-8")
        return first.setdefault(text, name) if len(text) <= _LARGEST else ""

    return tuple(
        replace(one, failures=tuple({**failure, "file": file_of(failure["file"])} for failure in one.failures))
        for one in checks
    )


def write_atlas(folder: Path, out: Path) -> None:
    """Write ``atlas.json`` and ``atlas.md``, and beside them every scene and picture that they name, and no others.

    Parameters
    ----------
    folder : Path
        As for `read_checks`; a scene's picture is the ``.svg`` of its name.
    out : Path
        Made if it is not there.
    """
    checks, absent = _kept(folder, read_checks(folder)), read_absent(folder)
    scenes = dict.fromkeys(failure["file"] for one in checks for failure in one.failures if failure["file"])
    drawn = {file: folder / _picture(file) for file in scenes}
    pictures = {file for file, path in drawn.items() if path.is_file() and path.stat().st_size <= _LARGEST}
    for stale in [*out.glob("*/*/*.scene.json"), *out.glob("*/*/*.svg")]:
        stale.unlink()
    for name in [*scenes, *map(_picture, pictures)]:
        write_atomically(out / name, (folder / name).read_text("utf-8"))
    body = {"checks": [asdict(one) for one in checks], "changes": [asdict(change) for change in changes(checks)]}
    write_atomically(out / "atlas.json", json.dumps({**body, "absent": absent}, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out / "atlas.md", markdown(checks, pictures, absent))


if __name__ == "__main__":
    write_atlas(Path(sys.argv[1]), Path(sys.argv[2]))
