"""Texts from elsewhere in Markdown."""

from __future__ import annotations

import re

__all__ = ["escape_markdown"]


_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#!]|:(?=\w))")


def escape_markdown(text: str) -> str:
    r"""A text that Markdown shows as it is, on one line.

    >>> escape_markdown("two  lines <i> ![](x)")
    'two lines \\<i\\> \\!\\[\\](x)'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
