"""Failures that an adopter knows about: each with a reason, a link and a day on which it must be gone.

The list is the adopter's own TOML file::

    [[known-failure]]
    clause = "yolox.assign[outcome]"
    scene = "identical*"            # optional shell pattern; default "*"
    setting = "official"            # likewise; the part of a case's name in brackets
    reason = "ties are broken by score on purpose"
    link = "our-tracker/17"
    expires = 2027-01-31

An entry that is out of date, or that matches no failure, is itself a failure: lists do not rot in silence. An entry
for random scenes alone (``scene = "random *"``) may match none, for another seed draws other scenes.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from detoracle.reference.errors import InputError

__all__ = ["KnownFailure", "problems", "read_known_failures"]


@dataclass(frozen=True)
class KnownFailure:
    """One entry of the list.

    Attributes
    ----------
    clause, scene, setting : str
        What fails where; scene and setting are shell patterns.
    reason, link : str
    expires : datetime.date
        Last day on which the failure is accepted.
    """

    clause: str
    reason: str
    link: str
    expires: datetime.date
    scene: str = "*"
    setting: str = "*"

    @property
    def by_chance(self) -> bool:
        """Is it the seed that decides whether a scene like this is drawn at all?"""
        return self.scene.startswith("random") and "*" in self.scene

    def covers(self, clause: str, scene: str, setting: str = "") -> bool:
        """Is this failure the one meant?"""
        where = fnmatchcase(scene, self.scene) and fnmatchcase(setting, self.setting)
        return clause == self.clause and where


def read_known_failures(path: Path) -> tuple[KnownFailure, ...]:
    r"""Read the list.

    Raises
    ------
    InputError
        If the file is no TOML, or an entry lacks a field or has an unknown one.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "known.toml"
    >>> _ = file.write_text('[[known-failure]]\nclause="a"\nreason="b"\nlink="c"\nexpires=2027-01-31\n')
    >>> read_known_failures(file)[0].scene
    '*'
    """
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = tuple(KnownFailure(**entry) for entry in body["known-failure"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            path.name,
            expected="TOML with [[known-failure]] entries of clause, reason, link, expires and maybe scene, setting",
            got=f"{type(error).__name__}: {error}",
        ) from error
    for entry in entries:
        for name in ("clause", "scene", "setting", "reason", "link"):
            if not isinstance(getattr(entry, name), str) or not getattr(entry, name).strip():
                raise InputError(path.name, expected=f"a text as '{name}'", got=repr(getattr(entry, name)))
        if type(entry.expires) is not datetime.date:  # TOML has times too, which are dates to isinstance
            raise InputError(path.name, expected="a date as 'expires', like 2027-01-31", got=repr(entry.expires))
    return entries


def problems(
    entries: tuple[KnownFailure, ...], failures: Sequence[tuple[str, str] | tuple[str, str, str]], today: datetime.date
) -> list[str]:
    """Say which entries are out of date or match nothing.

    Parameters
    ----------
    entries : tuple of KnownFailure
    failures : sequence of (str, str) or (str, str, str)
        Clause and scene of everything that failed, and the setting where there are any.
    today : datetime.date

    Returns
    -------
    list of str

    Examples
    --------
    >>> entry = KnownFailure("a[b]", "because", "here", datetime.date(2027, 1, 31))
    >>> problems((entry,), [], datetime.date(2026, 1, 1))
    ["known failure 'a[b]' on '*' matches no failure: remove it"]
    """
    found = []
    for entry in entries:
        setting = f" ({entry.setting})" if entry.setting != "*" else ""
        name = f"known failure '{entry.clause}' on '{entry.scene}'{setting}"
        if today > entry.expires:
            found.append(f"{name} expired on {entry.expires}: {entry.reason} ({entry.link})")
        if not entry.by_chance and not any(entry.covers(*failure) for failure in failures):
            found.append(f"{name} matches no failure: remove it")
    return found
