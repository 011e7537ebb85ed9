"""Test oracles for the label assignment and training losses of object detectors.

The rooms: `detoracle.reference` (what is right), `detoracle.implementations` (what is fast), `detoracle.properties`
(what must hold) and `detoracle.reports` (what is shown). The command line is ``detoracle --help``; pytest gets the
option ``--detoracle`` and the decorator `conforms`.
"""

from __future__ import annotations

from detoracle.conformance import conforms
from detoracle.implementations.registry import implements
from detoracle.reference.assignment import Assignment
from detoracle.reference.errors import DetoracleError, InputError, UpstreamRaises

__all__ = ["Assignment", "DetoracleError", "InputError", "UpstreamRaises", "__version__", "conforms", "implements"]

__version__ = "0.1.0"
