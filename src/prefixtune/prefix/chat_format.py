"""A conversation -> the text that a model reads, by the chat template that a text format names.

It needs a tokenizer's template and special tokens alone, so that other engines write the same text.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.errors import PrefixWarning, RequestError
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat

_SENTINEL = "\ue000prefixtune\ue001"
"""A text that stands for the last message; of characters for private use, which no template changes."""
_HINT = "change the roles or their order, or train with another template (--chat-template FILE)."


def template_hash(tokenizer: Any) -> str:
    """Tells a tokenizer's own chat template from another one."""
    return hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest()[:16]


def render_chat(
    tokenizer: Any,
    text_format: TextFormat,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of messages, special tokens by name; a tokenizer that reads it must add none.

    Args:
        tokenizer: Of transformers: its template, or its special tokens.
        text_format: Names the template, and the system message of a conversation that has none.
        messages: Each with `role` and `content`.
        add_generation_prompt: Write what opens the assistant's next answer.

    Raises:
        RequestError: The tokenizer has no template, or the template refuses the messages.
    """
    conversation = [dict(message) for message in messages]
    if text_format.system and conversation and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": text_format.system})
    if text_format.chat_template == MODEL_TEMPLATE:
        return _render_own(tokenizer, text_format, conversation, add_generation_prompt)
    from prefixtune.prefix.bounded_template import TemplateFault, render_bounded

    variables = {
        **{str(name): str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        "messages": conversation,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return render_bounded(text_format.chat_template, variables)
    except TemplateFault as error:
        raise _refused("the prefix's chat template", error) from None


def _render_own(tokenizer: Any, text_format: TextFormat, messages: list[dict[str, str]], opens: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "the text format names the model's own chat template, but its tokenizer has none.",
            hint="use the tokenizer that the prefix was trained with.",
        )
    if text_format.template_hash and text_format.template_hash != template_hash(tokenizer):
        # Python shows a warning once for each place that it comes from.
        warnings.warn(
            "the model's chat template is not the one that the prefix was trained with: its answers may be worse. Use "
            "the tokenizer of the training.",
            PrefixWarning,
            stacklevel=2,
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens))
    except (TemplateError, TypeError, LookupError, AttributeError) as error:
        raise _refused("the model's chat template", error) from None


def _refused(template: str, error: Exception) -> RequestError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return RequestError(f"{template} refuses the messages: {reason}.", hint=_HINT)


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
        raise RequestError(
            f"the chat template writes the last message {len(parts) - 1} times, so it cannot be cut.",
            hint="shorten the message.",
        )
    return parts[0], parts[1]
