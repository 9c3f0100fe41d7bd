"""The prompts of a request for a prefix: in its text format where it has one, and with placeholders in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

from prefixtune.errors import RequestError
from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE, PROMPT_VARIABLE
from prefixtune.interop.vllm.http import APIError
from prefixtune.interop.vllm.state import ServerState
from prefixtune.prefix.bounds import bounded
from prefixtune.prefix.chat_format import render_chat, split_at_last_message
from prefixtune.prefix.text_format import TextFormat, fit_ids

__all__ = ["Formatter", "chat_prompt", "chat_template_kwargs", "list_prompts", "tokenize_prompts"]


Messages = Sequence[Mapping[str, str]]
"""Messages of a chat, each with `role` and `content`."""

_MAX_PROMPTS = 1024
"""Of one request, as in vLLM."""
_DEFAULT_MAX_TOKENS = 16
"""What vLLM generates where a completion sets no limit."""
_TOKENIZER_ARGUMENTS = ("tokenize", "truncation", "max_length", "padding", "tokenizer_kwargs", "add_special_tokens")
"""Arguments of chat templates that could cut placeholders off."""


@dataclass(frozen=True)
class Formatter:
    """Puts sources into a prefix's text format, and cuts them as its training did.

    Attributes:
        state: The running server.
        text_format: The prefix's.
        prefix_length: P.
        max_new_tokens: Most tokens that the request generates.
    """

    state: ServerState
    text_format: TextFormat
    prefix_length: int
    max_new_tokens: int

    @classmethod
    def from_fields(
        cls, state: ServerState, text_format: TextFormat, prefix_length: int, fields: Mapping[str, Any]
    ) -> Formatter:
        """For a request with these fields."""
        max_tokens = fields.get("max_completion_tokens") or fields.get("max_tokens")
        return cls(state, text_format, prefix_length, max_tokens if _is_int(max_tokens) else _DEFAULT_MAX_TOKENS)

    def format(self, source: str, messages: Messages | None = None) -> str:
        """The source in the text format.

        Args:
            source: The text, or the last message's.
            messages: With a chat template: the whole conversation; None: the source is one user message.

        Raises:
            APIError: The chat template refuses the messages.
        """
        if not self.text_format.is_chat:
            return self.text_format.format_prompt(source, self.state.separator)
        tokenizer, conversation = self.state.tokenizer, messages or _only(source)
        try:
            return render_chat(tokenizer, self.text_format, conversation, add_generation_prompt=True)
        except RequestError as error:
            raise APIError(f"{error.message} {error.hint}", "messages") from None

    def fit(self, ids: list[int], source: str, messages: Messages | None = None) -> list[int]:
        """A formatted prompt's token ids; where it is too long, its source is cut as in training.

        Args:
            ids: Of the prompt.
            source: As for `format`.
            messages: As for `format`.

        Raises:
            APIError: It is longer than the training allowed.
        """
        max_positions = self.state.max_positions
        try:
            return fit_ids(
                self.text_format,
                ids,
                positions=None if max_positions is None else max_positions - self.prefix_length,
                new_tokens=self.max_new_tokens,
                around=partial(self._count_around, source, messages),
                name="the prompt",
            )
        except RequestError as error:
            raise APIError(f"{error.message} {error.hint}", "prompt") from None

    @property
    def end_ids(self) -> list[int]:
        """The token that ends an answer, where a chat template writes another one than the tokenizer's end token."""
        end, tokenizer = self.text_format.end, self.state.tokenizer
        if not self.text_format.is_chat or not end or end == tokenizer.eos_token:
            return []
        ids = self.state.encode(end)
        return ids if len(ids) == 1 else []

    def _count_around(self, source: str, messages: Messages | None) -> tuple[int, int]:
        """How many tokens come before the source, and after it."""
        if self.text_format.is_chat:
            conversation = messages or _only(source)
            before, after = split_at_last_message(self.state.tokenizer, self.text_format, conversation)
        else:
            before, after = self.text_format.around(self.state.separator)
        return len(self.state.encode(before)), len(self.state.encode(after))


# --- completions ------------------------------------------------------------------------------------------------------


def list_prompts(prompt: Any) -> list[Any]:
    """The prompts of a completion: strings or lists of token ids, not checked yet.

    Raises:
        APIError: There are too many.
    """
    prompts = prompt if isinstance(prompt, list) and prompt and not _is_int(prompt[0]) else [prompt]
    if len(prompts) > _MAX_PROMPTS:
        raise APIError(f"'prompt' has {len(prompts)} prompts, but at most {_MAX_PROMPTS} are allowed.", "prompt")
    return prompts


def tokenize_prompts(
    state: ServerState, prompts: list[Any], formatter: Formatter | None, *, add_special_tokens: bool = False
) -> tuple[list[list[int]], int]:
    """Token ids of every prompt, and how many tokens of sources were cut.

    Args:
        state: The running server.
        prompts: From `list_prompts`.
        formatter: Every prompt is a source for it; None: prompts are used as they are.
        add_special_tokens: Without a formatter: have the tokenizer add its own; training added none.

    Raises:
        APIError: A prompt is empty, too long, or neither a string nor token ids.
    """
    tokenized, num_cut = [], 0
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = _bounded(state, prompt, "prompt")
        if isinstance(prompt, str) and formatter is not None:
            whole = state.encode(formatter.format(prompt)) if prompt else []
            ids = formatter.fit(whole, prompt) if whole else []
            num_cut += len(whole) - len(ids)
        elif isinstance(prompt, str):
            ids = state.encode(prompt, add_special_tokens=add_special_tokens)
        elif formatter is None and isinstance(prompt, list) and all(map(_is_int, prompt)):
            ids = prompt
        else:
            raise APIError("'prompt' must be a string, token ids, or a list of either.", "prompt")
        if not ids:
            raise APIError("'prompt' is empty, but must have some text.", "prompt")
        tokenized.append(list(ids))
    return tokenized, num_cut


def _bounded(state: ServerState, text: str, field: str) -> str:
    """A text; of one that cannot fit, as much as is needed to cut or to refuse it.

    Raises:
        APIError: It holds half a surrogate pair.
    """
    try:
        return bounded(state, text, state.max_positions)
    except RequestError as error:
        raise APIError(f"{error.message} {error.hint}", field) from None


def _is_int(value: object) -> TypeGuard[int]:
    return type(value) is int


# --- chats ------------------------------------------------------------------------------------------------------------


def chat_prompt(state: ServerState, messages: Any, formatter: Formatter) -> tuple[str, int]:
    """A chat in the prefix's text format, and how many messages before the last one were dropped.

    With a chat template all messages are written, else the last one.

    Raises:
        APIError: The last one is not the user's or no text, there are others that the prefix cannot read, it is too
            long, or the tokenizer would read the chat otherwise than in training.
    """
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        raise APIError("'messages' must end with a user message.", "messages")
    source = _bounded(state, _message_text(last, "the last message"), "messages")
    is_chat = formatter.text_format.is_chat
    if len(messages) > 1 and not is_chat and state.settings.earlier_messages == "refuse":
        raise APIError(
            f"this prefix reads one text, but the chat has {len(messages)} messages. Send the last user message alone, "
            "or have the server drop the others (earlier_messages = 'drop').",
            "messages",
        )
    if not state.has_prompt:
        raise APIError(
            "this server cannot use this prefix in chats: its chat template has no variable for the prefix's text "
            "format. `prefixtune serve --engine vllm` adds one; /v1/completions works.",
            "messages",
        )
    conversation = [_as_message(state, message) for message in messages] if is_chat else None
    text = formatter.format(source, conversation)
    ids = state.encode(text)
    if state.encode(state.placeholder_text + text) != [state.placeholder_id, *ids]:
        # Some tokenizers mark the start of a text, which the placeholders take here.
        raise APIError(
            "this prefix cannot be used in chats: behind placeholders its text format has other tokens than in "
            "training; /v1/completions works.",
            "messages",
        )
    if len(formatter.fit(ids, source, conversation)) < len(ids):
        raise APIError(f"the message takes {len(ids)} tokens and would be cut; /v1/completions does that.", "messages")
    return text, 0 if is_chat else len(messages) - 1


def _only(source: str) -> Messages:
    return [{"role": "user", "content": source}]


def _as_message(state: ServerState, message: Any) -> dict[str, str]:
    """A message as chat templates read it, bounded.

    Raises:
        APIError: It has another role, or is no text.
    """
    roles = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
    role = roles.get(str(message.get("role"))) if isinstance(message, dict) else None
    if role is None:
        raise APIError(f"a message's role must be one of {', '.join(roles)}.", "messages")
    return {"role": role, "content": _bounded(state, _message_text(message, f"the {role}'s message"), "messages")}


def _message_text(message: dict[str, Any], name: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str) or not content.strip():
        raise APIError(f"{name} must be a text that is not empty.", "messages")
    return content


def chat_template_kwargs(
    state: ServerState, fields: Mapping[str, Any], prefix_length: int, prompt: str | None
) -> dict[str, Any]:
    """The arguments of the chat template: the client's own, the placeholders, and a text in place of the messages.

    Raises:
        APIError: The template has no variable for placeholders, or an argument could cut them off.
    """
    if not state.has_placeholders:
        raise APIError(
            "this server cannot use prefixes in chats: its chat template has no variable for their placeholders. "
            "`prefixtune serve --engine vllm` adds one to a model's own template; /v1/completions works.",
            "messages",
        )
    if fields.get("add_special_tokens"):
        raise APIError("'add_special_tokens' cannot be used with a prefix: they would come before it.", "messages")
    kwargs = fields.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise APIError("'chat_template_kwargs' must be an object.", "chat_template_kwargs")
    for name in kwargs or {}:
        if name in _TOKENIZER_ARGUMENTS or name.startswith("return_"):
            raise APIError(f"{name!r} in 'chat_template_kwargs' cannot be used with a prefix.", "chat_template_kwargs")
    added = {PLACEHOLDERS_VARIABLE: state.placeholder_text * prefix_length, PROMPT_VARIABLE: prompt}
    return {**(kwargs or {}), **{name: text for name, text in added.items() if text}}
