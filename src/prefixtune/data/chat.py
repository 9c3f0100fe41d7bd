"""A conversation -> token ids, by the backbone's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import RequestError

__all__ = ["encode_chat", "has_chat_template"]


def has_chat_template(backbone: Backbone) -> bool:
    """Whether the backbone was trained for conversations."""
    return bool(backbone.tokenizer.chat_template)


def encode_chat(backbone: Backbone, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of messages with `role` and `content`, up to where the next answer begins.

    Raises:
        RequestError: The template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        ids: list[int] = backbone.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise RequestError(
            f"the backbone's chat template refuses the messages: {error}.", hint="change their roles or their order."
        ) from None
    return ids
