"""A request for a prefix, or for several joined ones, rewritten into a request for the backbone.

The prompts get the prefix's text format and the placeholders; the prefix goes into `kv_transfer_params`, with a
`cache_salt` of its own. All other fields stay: decoding is vLLM's, whatever the prefix's task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import CheckpointError, RequestError, short_repr
from prefixtune.interop.vllm.folder import ServedPrefix
from prefixtune.interop.vllm.http import APIError
from prefixtune.interop.vllm.prompts import (
    Formatter,
    chat_prompt,
    chat_template_kwargs,
    list_prompts,
    tokenize_prompts,
)
from prefixtune.interop.vllm.reference import JOINER
from prefixtune.interop.vllm.state import ServerState
from prefixtune.prefix.text_format import TextFormat

__all__ = ["BackboneRequest", "rewrite_request"]


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
    "kv_transfer_params": (None,),
    "chat_template": (None,),
}
"""Fields that cannot be used with a prefix, and their values that mean nothing."""

_NOT_IN_TEXT_FORMAT: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "documents": (None, []),
    "reasoning_effort": (None, "none"),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}
"""Those of a chat that only the model's own template can follow, which a prefix with a text format replaces."""


@dataclass(frozen=True)
class BackboneRequest:
    """A request for the backbone.

    Attributes:
        body: The request's JSON.
        prefix: The prefix that it uses.
        num_prompts: How many prompts it has.
        stream: Whether the response comes as a stream of events.
        text_format: Of the prompts; None: they were used as they were.
        headers: Of the response: what was cut or dropped.
    """

    body: bytes
    prefix: ServedPrefix
    num_prompts: int
    stream: bool
    text_format: TextFormat | None
    headers: Mapping[str, str]


def rewrite_request(state: ServerState, body: bytes, *, is_chat: bool) -> BackboneRequest | None:
    """The request for the backbone that a request for a prefix becomes; None: it is not for a prefix.

    Raises:
        APIError: It cannot be served.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    prefix = _find_prefix(state, fields)
    if prefix is None:
        return None
    _check_fields(fields, uses_text_format=is_chat and prefix.text_format is not None)
    secret, length = state.settings.secret, prefix.reference.length
    fields |= {
        "model": state.model_name,
        "cache_salt": prefix.reference.cache_salt(secret, fields.get("cache_salt")),
        "kv_transfer_params": prefix.reference.to_kv_transfer_params(secret),
    }
    text_format = _text_format_for(state, prefix, fields, is_chat)
    formatter = None if text_format is None else Formatter.from_fields(state, text_format, length, fields)
    stops = fields.get("stop_token_ids") or []
    if formatter is not None and formatter.end_ids and isinstance(stops, list):
        fields["stop_token_ids"] = [*stops, *formatter.end_ids]
    num_prompts, num_cut, num_dropped = 1, 0, 0
    if is_chat:
        prompt = None
        if formatter is not None:
            prompt, num_dropped = chat_prompt(state, fields.get("messages"), formatter)
        fields["chat_template_kwargs"] = chat_template_kwargs(state, fields, length, prompt)
    else:
        prompts, add_special_tokens = list_prompts(fields.get("prompt")), bool(fields.pop("add_special_tokens", None))
        tokenized, num_cut = tokenize_prompts(state, prompts, formatter, add_special_tokens=add_special_tokens)
        num_prompts = len(tokenized)
        tokenized = [[state.placeholder_id] * length + ids for ids in tokenized]
        fields["prompt"] = tokenized if num_prompts > 1 else tokenized[0]
    counts = {"x-prefixtune-cut-tokens": num_cut, "x-prefixtune-dropped-messages": num_dropped}
    headers = {name: str(count) for name, count in counts.items() if count}
    stream = bool(fields.get("stream"))
    return BackboneRequest(json.dumps(fields).encode(), prefix, num_prompts, stream, text_format, headers)


def _find_prefix(state: ServerState, fields: Any) -> ServedPrefix | None:
    """The prefix that a request names, or several as one; None: it names none. Takes `prefixes` out of the fields.

    Raises:
        APIError: A prefix is there, but not served; or several cannot be joined.
    """
    if not isinstance(fields, dict):
        return None
    param = "model" if fields.get("prefixes") is None else "prefixes"
    names = _requested_names(state, fields)
    # Other models of vLLM's, such as its adapters, may have any name.
    if not names or (param == "model" and _find(state, names[0]) is None):
        return None
    _check_names(state, names, param)
    found = {name: _find(state, name) for name in names}
    missing = ", ".join(repr(name[:128]) for name, prefix in found.items() if prefix is None)
    if missing:
        raise APIError(f"there is no prefix {missing}.", param, 404)
    prefixes = [prefix for prefix in found.values() if prefix is not None]
    if len(prefixes) == 1:
        return prefixes[0]
    length = sum(prefix.reference.length for prefix in prefixes)
    if state.max_positions is not None and length >= state.max_positions:
        raise APIError(
            f"the joined prefixes take {length} positions, but the limit is {state.max_positions}, text included.",
            param,
        )
    try:
        return state.prefixes.join(prefixes)
    except RequestError as error:
        raise APIError(f"{error.message} {error.hint}".strip(), param) from None


def _find(state: ServerState, name: str) -> ServedPrefix | None:
    """The prefix of that name; None: there is none.

    Raises:
        APIError: It is there, but not served.
    """
    try:
        return state.prefixes.find(name)
    except CheckpointError as error:
        raise APIError(f"{error.message} {error.hint}".strip(), "model", 503) from None


def _requested_names(state: ServerState, fields: dict[str, Any]) -> list[str]:
    """The names in `prefixes`, which is taken out, or in `model`; empty: the bare model's, or none at all.

    Raises:
        APIError: `prefixes` is no list of names, or `model` says something else.
    """
    model, names = fields.get("model"), fields.pop("prefixes", None)
    if names is None:
        return model.split(JOINER) if isinstance(model, str) and model not in state.own_names else []
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise APIError("'prefixes' must be a list of names of prefixes, at least one.", "prefixes")
    if model is not None and model not in state.own_names and model != JOINER.join(names):
        raise APIError(
            f"the model is {short_repr(model)}, but 'prefixes' names others. Leave it out, or write "
            f"{state.model_name!r}.",
            "model",
        )
    return names


def _check_names(state: ServerState, names: Sequence[str], param: str) -> None:
    """Refuse names that are not joined.

    Raises:
        APIError: There are too many, one is the bare model, or one is there twice.
    """
    most = state.settings.max_joined_prefixes
    if len(names) > most or len(set(names)) < len(names) or state.own_names & set(names):
        raise APIError(f"at most {most} prefixes are joined, each of them once, and never the bare model.", param)


def _check_fields(fields: dict[str, Any], *, uses_text_format: bool) -> None:
    """Refuse what vLLM would take, but not together with a prefix.

    Args:
        fields: The request's.
        uses_text_format: It is a chat in the prefix's text format.

    Raises:
        APIError: What it is.
    """
    try:
        # Half a surrogate pair is legal in JSON, but no tokenizer takes it.
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise APIError("the body contains half a surrogate pair, which is not a character.") from None
    except RecursionError:
        raise APIError("the body is nested too deeply.") from None
    for name, neutral_values in {**_UNSUPPORTED, **(_NOT_IN_TEXT_FORMAT if uses_text_format else {})}.items():
        if name in fields and fields[name] not in neutral_values:
            raise APIError(f"{name!r} cannot be used with this prefix.", name)
    salt = fields.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise APIError("'cache_salt' must be a string.", "cache_salt")


def _text_format_for(
    state: ServerState, prefix: ServedPrefix, fields: dict[str, Any], is_chat: bool
) -> TextFormat | None:
    """The text format of a request's prompts; None: they are used as they are."""
    prompt = fields.get("prompt")
    is_text = is_chat or isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], str))
    if prefix.text_format is None or not is_text or (state.settings.raw_completions and not is_chat):
        return None
    return prefix.text_format.with_lengths(on_too_long=state.settings.on_too_long)
