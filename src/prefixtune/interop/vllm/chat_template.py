"""A model's chat template, with room for the placeholders of a prefix and for a text in its own format."""

from __future__ import annotations

import re
from pathlib import Path

from prefixtune.utils.files import write_text

__all__ = ["PLACEHOLDERS_VARIABLE", "PROMPT_VARIABLE", "TEMPLATE_VERSION", "as_block", "write_template"]


TEMPLATE_VERSION = 3
"""Changes when `write_template` writes something else."""

PLACEHOLDERS_VARIABLE = "prefixtune_placeholders"
"""The template's variable for the placeholders, which come before the chat."""

PROMPT_VARIABLE = "prefixtune_prompt"
"""The template's variable for a text that replaces the messages: the last one, in a prefix's text format."""


def as_block(template: str) -> str:
    """A template to stand between two tags, the second with a plus (`{%+ endif %}`): it writes what it does alone.

    transformers removes the line break after a tag, the white space before one that begins a line, and the last line
    break of a template.
    """
    return "\n" + re.sub(r"(\r\n|\r|\n)\Z", "", template)


def write_template(path: Path, template: str) -> None:
    """Write a model's chat template, with both variables added; without them it writes what it did.

    Args:
        path: The new file.
        template: The model's own template; empty: it has none, and only prefixes can be used in chats.

    Raises:
        PrefixError: The file cannot be written.
    """
    own = template or "{{ raise_exception('this model has no chat template') }}"
    placeholders = "{{ " + PLACEHOLDERS_VARIABLE + " | default('') }}"
    prompt = "{% if " + PROMPT_VARIABLE + " is defined %}{{ " + PROMPT_VARIABLE + " }}{% else %}"
    write_text(path, placeholders + prompt + as_block(own) + "{%+ endif %}")
