"""Text made safe for HTML and SVG."""

from __future__ import annotations

import html
import re
from typing import NewType

Markup = NewType("Markup", str)
"""A string that is already HTML or SVG; a plain `str` is text and has to pass through `escape`."""

# Not allowed in XML at all, or (surrogates) not encodable: a caption from a damaged JSON can hold any of them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(text: str, *, longest: int = 400) -> Markup:
    """The text for element content or a quoted attribute, cut with an ellipsis at `longest` characters."""
    clean = _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
    return Markup(html.escape(clean if len(clean) <= longest else clean[: longest - 1] + "…"))


def join(parts: list[Markup]) -> Markup:
    """The parts one after another."""
    return Markup("\n".join(parts))
