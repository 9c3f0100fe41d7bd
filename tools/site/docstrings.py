"""The reference of Python: code marked as in Markdown, and configurations without their seventy fields.

The fields have a page of their own, generated from the same classes.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

from prefixtune.utils.config import Config

CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def mark_code(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn `code` into ``code``, as reStructuredText has it."""
    text = CODE.sub(lambda code: f"``{code[1]}``" + "\\ " * bool(code[2]), "\n".join(lines))
    lines[:] = text.split("\n")


def shorten(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A configuration takes its fields as keywords."""
    if what == "class" and inspect.isclass(obj) and issubclass(obj, Config):
        return "(**fields)", None
    return signature, returns
