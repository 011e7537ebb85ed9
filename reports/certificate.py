"""Certificates: exactly what was run of one callable, so that anybody can run it again and see the same.

There is one only of a whole run without a failure that was not expected: a call that timed out, or a clause that was
never judged, leaves none. It speaks for the bytes of the file that the callable's module is, not for what that imports.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from detoracle.properties.examination import examine, scenes_of_examination
from detoracle.properties.known_failures import KnownFailure, problems
from detoracle.properties.scenes import Scene
from detoracle.properties.systems import find_operation
from detoracle.properties.trials import Subject
from detoracle.reference.errors import InputError
from detoracle.reports.environment import environment, source_hash
from detoracle.reports.evidence import ClauseEvidence, Evidence, WatchedWorker
from detoracle.reports.layout import laid_out
from detoracle.reports.plain import from_plain, to_plain

__all__ = ["FORMAT", "Asked", "Certificate", "certify", "differences", "from_json", "page_of", "source_of", "to_json"]

FORMAT = "detoracle-certificate/1"

_TIME_LIMIT = 60.0  # seconds of one call
_MOST_SHORTFALLS = 20


@dataclass(frozen=True)
class Asked:
    """What is to be run.

    Attributes
    ----------
    operation : str
    implementation : str
        ``package.module:callable``.
    examples, seed : int
        Random scenes beside the edge-case catalogue, and what decides them.
    device : str
    known_failures : tuple of KnownFailure
        Failures to expect.
    """

    operation: str
    implementation: str
    examples: int
    seed: int
    device: str
    known_failures: tuple[KnownFailure, ...] = ()


@dataclass(frozen=True)
class Certificate:
    """What was run, and what came of it.

    Attributes
    ----------
    asked : Asked
    source, suite : str
        SHA-256 of the callable's module file, and of the suite's own source.
    scenes, cases, checks : int
        Scenes; calls judged for themselves; these and all laws and trials.
    verdicts, dtypes, refused : mapping of str to int
        Checks by verdict, and by dtype; of those of a dtype, the ones that the callable refused.
    compile_modes : tuple of str
        How the callable was called.
    positives, ambiguous : int
        Assigned anchors, and anchors of more than one right outcome.
    clauses : tuple of ClauseEvidence
    environment : mapping
        From `environment`.
    started : str
        UTC, ISO 8601.
    seconds : float
    """

    asked: Asked
    source: str
    suite: str
    scenes: int
    cases: int
    checks: int
    verdicts: Mapping[str, int]
    dtypes: Mapping[str, int]
    refused: Mapping[str, int]
    compile_modes: tuple[str, ...]
    positives: int
    ambiguous: int
    clauses: tuple[ClauseEvidence, ...]
    environment: Mapping[str, str | int | bool]
    started: str
    seconds: float

    @property
    def ambiguity_share(self) -> float:
        """Anchors of more than one right outcome, for each assigned one."""
        return self.ambiguous / self.positives if self.positives else 0.0

    def clauses_by_verdict(self) -> dict[str, int]:
        """How many clauses were passed, skipped, and expected to fail."""
        kinds = ("passed", "expected to fail", "skipped")
        return {kind: sum(clause.verdict == kind for clause in self.clauses) for kind in kinds}


def certify(
    asked: Asked, track: Callable[[Sequence[Scene]], Iterable[Scene]] = iter
) -> tuple[Certificate | None, list[str]]:
    """Run everything, and certify it if nothing is missing and nothing is wrong.

    Parameters
    ----------
    asked : Asked
    track : callable
        Passes the scenes on, and may show progress.

    Returns
    -------
    certificate : Certificate or None
    shortfalls : list of str
        Why there is no certificate; empty if there is one.

    Raises
    ------
    DetoracleError
        If there is no such operation, or the callable cannot be imported.
    """
    clock, started = time.monotonic(), datetime.datetime.now(datetime.UTC)
    system, operation = find_operation(asked.operation)
    before = source_of(asked.implementation), source_hash()
    evidence = Evidence(system, operation, asked.device, asked.known_failures)
    scenes = scenes_of_examination(asked.examples, asked.seed)
    worker = WatchedWorker(time_limit=_TIME_LIMIT)
    with worker:
        worker.require(asked.implementation)
        subject = Subject(system, operation, asked.implementation, worker, _TIME_LIMIT)
        for result in examine(subject, track(scenes), seed=asked.seed, device=asked.device):
            evidence.add(result, worker.last)
    found = _shortfalls(evidence, started.date())
    if before != (source_of(asked.implementation), source_hash()):
        found.append("the source changed while it was run")
    if found:
        return None, found
    return Certificate(
        asked=asked,
        source=before[0],
        suite=before[1],
        scenes=len(scenes),
        cases=evidence.cases,
        checks=evidence.verdicts.total(),
        verdicts=dict(evidence.verdicts),
        dtypes=dict(evidence.dtypes),
        refused={dtype: number for dtype, number in evidence.refused.items() if number},
        compile_modes=("as given",),  # the suite compiles nothing; what compiles itself is called compiled
        positives=evidence.positives,
        ambiguous=evidence.ambiguous,
        clauses=evidence.clauses(),
        environment=environment(),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - clock, 1),
    ), []


def _shortfalls(evidence: Evidence, today: datetime.date) -> list[str]:
    """What keeps the evidence from being a certificate."""
    found = [f"{number} calls ran into the time limit" for number in [evidence.verdicts["timeout"]] if number]
    for result in evidence.unexpected()[:_MOST_SHORTFALLS]:
        first = result.verdict.findings[0]
        found.append(f"{first.clause} fails on {result.case.name}: {first.where} {first.message}")
    never = [clause.id for clause in evidence.clauses() if clause.verdict == "never judged"]
    found += [f"{clause} was never judged: more --examples may do it" for clause in never]
    return found + problems(evidence.entries, evidence.failures(), today)


def source_of(target: str) -> str:
    """SHA-256 of a callable's module file, which is found without running any of it.

    Parameters
    ----------
    target : str
        ``package.module:callable``.

    Raises
    ------
    InputError
        If there is no such module, or it is no file.

    Examples
    --------
    >>> len(source_of("json.decoder:JSONDecoder"))
    64
    """
    path: Sequence[str] | None = None
    origin: str | None = None
    parts = target.partition(":")[0].split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, path)) is not None), None)
        path, origin = (None, None) if spec is None else (spec.submodule_search_locations, spec.origin)
        if spec is None or (end < len(parts) and path is None):
            break
    else:
        if origin is not None and Path(origin).is_file():
            return hashlib.sha256(Path(origin).read_bytes()).hexdigest()
    raise InputError(
        "implementation",
        expected="package.module:callable whose module is a file",
        got=repr(target),
        fix="Check the spelling, and that its folder is on PYTHONPATH.",
    )


# ------------------------------------------------------------------------------------------------------- as a document
def to_json(certificate: Certificate) -> str:
    """The certificate as a document, of the same bytes whenever it is the same."""
    body = {"format": FORMAT, **to_plain(certificate), "ambiguity_share": certificate.ambiguity_share}
    return json.dumps(body, indent=1, sort_keys=True, default=str) + "\n"


def from_json(text: str) -> Certificate:
    """Certificate from what `to_json` gave.

    Raises
    ------
    InputError
        If it is none.

    Examples
    --------
    >>> from_json("{}")
    Traceback (most recent call last):
    detoracle.reference.errors.InputError: certificate: expected detoracle-certificate/1, got ValueError: None.
    """
    try:
        body: dict[str, Any] = json.loads(text)
        if body.get("format") != FORMAT:
            raise ValueError(repr(body.get("format")))
        for entry in body["asked"]["known_failures"]:
            entry["expires"] = datetime.date.fromisoformat(entry["expires"])
        return from_plain(Certificate, body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("certificate", expected=FORMAT, got=f"{type(error).__name__}: {error}") from error


def differences(certificate: Certificate, again: Certificate) -> list[str]:
    """What another run of the same found otherwise; where and when it ran may differ.

    Parameters
    ----------
    certificate, again : Certificate

    Returns
    -------
    list of str
        Empty if every verdict, count and hash is the same.
    """
    free = ("environment", "started", "seconds", "clauses")
    found = [
        f"{field.name}: {getattr(certificate, field.name)}, now {getattr(again, field.name)}"
        for field in fields(Certificate)
        if field.name not in free and getattr(certificate, field.name) != getattr(again, field.name)
    ]
    was, now = ({clause.id: clause for clause in one.clauses} for one in (certificate, again))
    for id_ in dict.fromkeys([*was, *now]):
        if was.get(id_) != now.get(id_):
            found.append(f"{id_}: {_brief(was.get(id_))}, now {_brief(now.get(id_))}")
    return found


def _brief(clause: ClauseEvidence | None) -> str:
    return "no clause" if clause is None else f"{clause.verdict}, {clause.failures} of {clause.judged} failed"


def page_of(certificate: Certificate) -> str:
    """The certificate as one HTML page that opens from disk, without a network."""
    asked = certificate.asked
    title = f"{asked.operation} by {asked.implementation}"
    return laid_out("certificate", "tables", {}, title=title, certificate=certificate, asked=asked)
