"""A conversation -> the text that a model reads, by the chat template that a text format names.

A template is a program. So one that came in a prefix's file is not even compiled before somebody has named it. It must
be the model's own, or one that was given to `allow_template`, or one that this user named once on this machine.

This needs a tokenizer's template and special tokens alone, so that other engines write the same text.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, PrefixError, PrefixWarning, RequestError, short_repr
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat, read_text_format
from prefixtune.utils.files import write_text
from prefixtune.utils.folders import cache_folder

OWN_TEMPLATE = "own"
"""Names, among the values of an option, the chat template in the prefix's own file."""

_SENTINEL = "\ue000prefixtune\ue001"
"""A text that stands for the last message; of characters for private use, which no template changes."""
_allowed = {"", MODEL_TEMPLATE}
"""Templates that may be rendered in this process."""


def allow_template(template: str, *, remember: bool = False) -> None:
    """Let prefixes run under a chat template that the user, or a server's administrator, has named.

    Args:
        template: Its text.
        remember: In this user's later processes, too: its digest becomes the name of a file in the cache's folder.
    """
    _allowed.add(_normal(template))
    if remember:
        # If it cannot be written, the user names the template again.
        with contextlib.suppress(PrefixError, OSError):
            if not _note(template).exists():
                write_text(_note(template), template)


def allow_named(name: str, headers: Sequence[Mapping[str, Any]], *, remember: bool = False) -> None:
    """Allow the chat template that an option names.

    Args:
        name: A file with a Jinja template, or `own`: the ones of the prefixes; empty: none.
        headers: Of the prefixes; without any, `own` is a file like others.
        remember: As of `allow_template`.

    Raises:
        ConfigError: The file cannot be read.
    """
    if name == OWN_TEMPLATE and headers:
        formats = filter(None, map(read_text_format, headers))
        templates = [text_format.chat_template for text_format in formats]
    else:
        try:
            templates = [Path(name).read_bytes().decode("utf-8-sig")] if name else []
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the chat template {short_repr(name)} cannot be read: {getattr(error, 'strerror', error)}.",
                hint=f"name a file with a Jinja template, or {OWN_TEMPLATE}: the one in the prefix's file.",
            ) from error
    for template in templates:
        allow_template(template, remember=remember)


def is_allowed(template: str) -> bool:
    """Whether a text format's chat template may be rendered."""
    if _normal(template) not in _allowed:
        with contextlib.suppress(PrefixError, OSError):
            if _note(template).is_file():
                _allowed.add(_normal(template))
    return _normal(template) in _allowed


def _normal(template: str) -> str:
    """A template without what editors change and Jinja does not see: how lines end, and the end of the last one."""
    return template.replace("\r\n", "\n").removesuffix("\n")


def _note(template: str) -> Path:
    """The file that says that this user named a template."""
    digest = hashlib.sha256(_normal(template).encode("utf-8", "surrogatepass")).hexdigest()
    return cache_folder() / "chat_templates" / f"{digest}.jinja"


def template_hash(tokenizer: Any) -> str:
    """Tells a tokenizer's own chat template from another one."""
    return hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest()[:16]


def render_chat(
    tokenizer: Any, text_format: TextFormat, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    """The text of messages, special tokens by name; a tokenizer that reads it must add none.

    Args:
        tokenizer: Of transformers: its template, or its special tokens.
        text_format: Names the template, and the system message of a conversation that has none.
        messages: Each with `role` and `content`.
        add_generation_prompt: Write what opens the assistant's next answer.

    Raises:
        RequestError: The tokenizer has no template, the template refuses the messages, or nobody has named it.
    """
    from jinja2 import TemplateError

    own = text_format.chat_template == MODEL_TEMPLATE
    if not is_allowed(text_format.chat_template):
        raise RequestError(
            "the text format has a chat template that nobody has named, and such a template is not run.",
            hint="read it (`prefixtune inspect FILE --json`) and name it: --chat-template own, or a file with its "
            "text; of a server: --chat-templates FILE; in Python: load(..., chat_template=...). `prefixtune generate "
            "--prefix FILE --chat-template own TEXT` names it once for all commands.",
        )
    conversation = [dict(message) for message in messages]
    if text_format.system and conversation and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": text_format.system})
    try:
        if own and text_format.template_hash not in ("", template_hash(tokenizer)):
            # Python shows a warning once for each place that it comes from.
            what = (
                "the model's chat template is not the one that the prefix was trained with: its answers may be worse."
            )
            warnings.warn(what, PrefixWarning, stacklevel=3)
        return str(
            tokenizer.apply_chat_template(
                conversation,
                chat_template=None if own else text_format.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise RequestError(
            f"the {'model' if own else 'prefix'}'s chat template refuses the messages: {short_repr(str(error), 300)}.",
            hint="change the roles or their order, or train with another template (--chat-template FILE).",
        ) from None


def split_at_last_message(
    tokenizer: Any, text_format: TextFormat, messages: Sequence[Mapping[str, str]]
) -> tuple[str, str]:
    """The text before and after the content of the last message, with what opens the next answer.

    Raises:
        RequestError: The template refuses the messages, or writes the last one never or more than once.
    """
    marked = [*messages[:-1], {**messages[-1], "content": _SENTINEL}]
    parts = render_chat(tokenizer, text_format, marked, add_generation_prompt=True).split(_SENTINEL)
    if len(parts) != 2:
        what = f"the chat template writes the last message {len(parts) - 1} times, so it cannot be cut."
        raise RequestError(what, hint="shorten the message.")
    return parts[0], parts[1]
