"""The one exception family: what was expected, what came, where, and what to do."""

from __future__ import annotations

__all__ = ["DetoracleError", "InputError", "UpstreamRaises"]


class DetoracleError(Exception):
    """Base of every error this package raises on purpose.

    Parameters
    ----------
    what : str
        The argument, file or implementation that is at fault.
    expected, got : str
        What was expected there and what came instead.
    where : str, optional
        Operation, stage, image, anchor or file position.
    fix : str, optional
        What the caller can do about it.

    Examples
    --------
    >>> print(DetoracleError("gt_boxes", expected="shape (B, G, 4)", got="shape (2, 4)", where="yolox.assign"))
    yolox.assign: gt_boxes: expected shape (B, G, 4), got shape (2, 4).
    """

    def __init__(self, what: str, *, expected: str, got: str, where: str = "", fix: str = "") -> None:
        self.what, self.expected, self.got, self.where, self.fix = what, expected, got, where, fix
        prefix = f"{where}: " if where else ""
        suffix = f" {fix}" if fix else ""
        super().__init__(f"{prefix}{what}: expected {expected}, got {got}.{suffix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by keyword, so that the error survives a process boundary."""
        state = (self.what, self.expected, self.got, self.where, self.fix)
        return _rebuild, (type(self), state)


def _rebuild(kind: type[DetoracleError], state: tuple[str, str, str, str, str]) -> DetoracleError:
    """Make the error again from its five facts."""
    error = kind.__new__(kind)
    DetoracleError.__init__(error, state[0], expected=state[1], got=state[2], where=state[3], fix=state[4])
    return error


class InputError(DetoracleError, ValueError):
    """An argument or a file does not meet its contract."""


class UpstreamRaises(DetoracleError):  # noqa: N818  it reports no mistake, but what the published code does
    """The published code raises here, and so does the oracle: a named behaviour, not an accident.

    Parameters
    ----------
    behaviour : str
        Identifier of the behaviour, for instance ``"yolox.no-candidate"``.
    expected, got, where : str
        As for `DetoracleError`.

    Examples
    --------
    >>> error = UpstreamRaises("yolox.no-candidate", expected="a candidate anchor", got="none", where="image 0")
    >>> error.behaviour
    'yolox.no-candidate'
    """

    @property
    def behaviour(self) -> str:
        """Identifier of the behaviour."""
        return self.what
