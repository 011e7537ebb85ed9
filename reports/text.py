"""Names that strangers chose, made harmless and readable before they are shown anywhere."""

from __future__ import annotations

import unicodedata

__all__ = ["MOST_SHOWN", "short", "visible"]

MOST_SHOWN = 200
"""Characters of a name or message that are shown; the rest is in its tooltip."""

# Control, format (bidirectional overrides, zero-width characters), surrogate, private, line and paragraph separator.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Write characters that act but are not seen as escapes: the text stays one line, in one direction.

    Examples
    --------
    >>> print(visible("crowd\n2\x00"), visible("box\u202egpj"), visible("größe 7"))
    crowd\n2\x00 box\u202egpj größe 7
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if unicodedata.category(c) not in _UNSEEN else repr(c)[1:-1] for c in text)


def short(text: str, most: int = MOST_SHOWN) -> str:
    """The text as it is shown, cut where it is long.

    Examples
    --------
    >>> short("a" * 300).count("a"), short("abcdef", 4)
    (199, 'abc…')
    """
    shown = visible(text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
