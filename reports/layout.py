"""What all pages have in common: one file, no network, no script but their own, harmless names, the same look.

Names are strangers' and are made harmless twice over: by Jinja2's autoescape for HTML, by `detoracle.reports.text` for
characters that act unseen. And by its content security policy a page forbids itself the network and foreign scripts.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from detoracle.reports.text import short, visible

__all__ = ["laid_out"]


def laid_out(
    template: str, script: str, filters: Mapping[str, Callable[..., Any]], *, title: str, **values: Any
) -> str:
    """Fill a template of ``templates/`` in.

    Parameters
    ----------
    template, script : str
        Names of an ``.html.jinja`` file and of a ``.js`` file, the only script that the page runs.
    filters : mapping of str to callable
        Beside those that all pages have.
    title : str
        Of the window.
    **values
        What the template speaks of.

    Returns
    -------
    str
        HTML.

    Examples
    --------
    >>> page = laid_out("history", "tables", {}, title="<a> & b", number=0, runs=[], groups=[], changes=[], more=0)
    >>> "<title>&lt;a&gt; &amp; b · detoracle</title>" in page
    True
    """
    environment = Environment(
        loader=PackageLoader("detoracle.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "name": _name,
        "short": short,
        "visible": visible,
        "number": lambda value: f"{value:,}",
        "decimal": _decimal,
        "duration": _duration,
        **filters,
    }
    text, _, _ = environment.loader.get_source(environment, f"{script}.js")  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    page = environment.get_template(f"{template}.html.jinja")
    return page.render(title=title, script=Markup(text), script_hash=digest, **values)


def _name(text: str) -> Markup:
    """A stranger's text, isolated from the direction of the text around it; cut with the whole in its tooltip."""
    whole, shown = visible(text), short(text)
    title = "" if shown == whole else Markup(' title="{}"').format(whole)
    return Markup("<bdi{}>{}</bdi>").format(title, escape(shown))


def _decimal(value: float) -> str:
    """Three digits, or more of a large number."""
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if not 60 <= seconds < math.inf:
        return f"{_decimal(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
