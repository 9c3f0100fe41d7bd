"""HTML and SVG as strings that are always escaped: only `tag` makes markup, and it escapes everything else."""

from __future__ import annotations

import html
import re

__all__ = ["Safe", "clean", "escape", "join", "tag"]


_VOID = {"br", "hr", "input", "link", "meta"}
# What no document may hold: control characters, and halves of surrogate pairs, which UTF-8 cannot write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Safe(str):
    """Markup: text that is not escaped again."""

    __slots__ = ()


def clean(text: str) -> str:
    r"""Replace what a document cannot hold by U+FFFD, and write every end of line as a line feed.

    >>> clean("a\r\nb\x00")
    'a\nb�'
    """
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def escape(text: str) -> Safe:
    """Text as markup; markup stays as it is.

    >>> escape("</script> & co")
    '&lt;/script&gt; &amp; co'
    """
    return text if isinstance(text, Safe) else Safe(html.escape(clean(text)))


def join(*parts: str | None) -> Safe:
    """Parts one after the other, each escaped; None is left out."""
    return Safe("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: str | None, **attributes: str | int | float | bool | None) -> Safe:
    """An element.

    >>> tag("td", "a < b", class_="number", data_value=1.5)
    '<td class="number" data-value="1.5">a &lt; b</td>'

    Args:
        name: Of the element.
        children: Text, which is escaped, or markup.
        attributes: `class_` for class, `data_value` for data-value; None and False are left out, True is given bare.
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written += f" {key.rstrip('_').replace('_', '-')}"
        written += "" if value is True else f'="{escape(str(value))}"'
    return Safe(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(*children)}</{name}>")
