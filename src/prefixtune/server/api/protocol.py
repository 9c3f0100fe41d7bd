"""The body of a request -> a `GenerationRequest`, checked field by field.

An unknown field is refused, with the nearest known one. Of OpenAI's fields, those that do not concern the output are
ignored; those that would change it and are not supported are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune.engine.request import SamplingParams
from prefixtune.errors import RequestError, did_you_mean
from prefixtune.server.limits import Limits
from prefixtune.server.responses import bad_request

__all__ = [
    "FIELDS",
    "IGNORED",
    "MAX_STOPS",
    "MAX_STOP_LENGTH",
    "MESSAGE_FIELDS",
    "ROLES",
    "UNSUPPORTED",
    "GenerationRequest",
    "parse_chat",
    "parse_completion",
    "parse_task",
]


Prompt = str | tuple[int, ...]

IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
)
"""OpenAI's fields that concern the service and not the output."""

UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("tools are not supported", ([],)),
    "tool_choice": ("tools are not supported", ("none", "auto")),
    "functions": ("functions are not supported", ([],)),
    "function_call": ("functions are not supported", ("none", "auto")),
    "response_format": ("only text is generated", ({"type": "text"},)),
    "logit_bias": ("there is no bias for single tokens", ({},)),
    "presence_penalty": ("use repetition_penalty", (0,)),
    "frequency_penalty": ("use repetition_penalty", (0,)),
    "best_of": ("use n", (1,)),
    "echo": ("the prompt is not repeated", (False,)),
    "suffix": ("text is generated after the prompt only", ("",)),
    "audio": ("only text is generated", ()),
    "modalities": ("only text is generated", (["text"],)),
    "prediction": ("there are no predicted outputs", ()),
    "web_search_options": ("there is no search", ()),
    "reasoning_effort": ("there is no separate reasoning", ("none",)),
    "verbosity": ("the length of outputs is set by max_tokens", ("medium",)),
}
"""Fields that would change the output: why they are refused, and the values that change nothing."""

_SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
_SHARED = ("model", *_SAMPLING, "n", "stream", "stream_options", "logprobs")
FIELDS = {
    "completion": ("prompt", *_SHARED),
    "chat": ("messages", *_SHARED, "max_completion_tokens", "top_logprobs"),
    "task": ("source", "fields", "format_of", *_SAMPLING, "stream"),
}
"""Fields that are read, by the kind of request; a task has its own as well."""
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = ("role", "content", "name", "refusal")
"""Of a message; others may be present only if they are empty."""
MAX_STOPS, MAX_STOP_LENGTH = 16, 256


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        model: Name of a prefix, or of the bare backbone; a task's is in its path.
        prompts: Texts or token ids, of a completion.
        messages: Of a chat.
        fields: A task's own; empty if there is a `source`.
        source: A linearized text, of a task.
        format_of: With the bare backbone: the prefix whose linearization and text format it gets.
        sampling: How tokens are chosen; its `max_new_tokens` counts only if `has_max_tokens`.
        fields_set: Names of the sampling fields that the body has.
        n: Texts for each prompt.
        stream: Whether to send pieces as they are generated.
        include_usage: Whether a stream ends with its usage.
    """

    model: str = ""
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    format_of: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    fields_set: frozenset[str] = frozenset()
    n: int = 1
    stream: bool = False
    include_usage: bool = False

    @property
    def has_max_tokens(self) -> bool:
        """Whether the body has a `max_tokens`, or its newer name."""
        return "max_tokens" in self.fields_set


def parse_completion(body: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    """A body of `/v1/completions`.

    Raises:
        ApiError: A field is wrong, unknown or not supported; the error names it.
    """
    _check_fields(body, "completion")
    prompts = _prompts(body.get("prompt"))
    logprobs = _integer(body, "logprobs", limits)
    return _generation_request(body, limits, len(prompts), logprobs=logprobs, model=_model(body), prompts=prompts)


def parse_chat(body: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    """A body of `/v1/chat/completions`.

    Raises:
        ApiError: A field is wrong, unknown or not supported; the error names it.
    """
    _check_fields(body, "chat")
    messages = _messages(body.get("messages"))
    top = _integer(body, "top_logprobs", limits)
    if top is not None and not _boolean(body, "logprobs"):
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (top or 0) if _boolean(body, "logprobs") else None
    length = _integer(body, "max_completion_tokens", limits)
    if length is not None:
        _integer(body, "max_tokens", limits)
        body = {**body, "max_tokens": length}
    return _generation_request(body, limits, 1, logprobs=logprobs, model=_model(body), messages=messages)


def parse_task(body: Mapping[str, Any], limits: Limits, columns: Sequence[str]) -> GenerationRequest:
    """A body of `/v1/tasks/{prefix}`: the task's own fields, beside the options of decoding.

    Args:
        body: The object.
        limits: What a request may ask for.
        columns: The task's own fields. One with the name of an option must be inside `fields`.

    Raises:
        ApiError: A field is wrong or unknown; the error names it.
    """
    inner, source = body.get("fields"), body.get("source")
    outside = {name: value for name, value in body.items() if name not in FIELDS["task"]}
    if inner is not None and not isinstance(inner, dict):
        raise bad_request("'fields' must be an object.", "fields")
    if inner is not None and outside:
        name = next(iter(outside))
        raise bad_request(f"{name!r} is outside 'fields', but all of the task's fields must be inside.", name)
    own: Mapping[str, Any] = outside if inner is None else inner
    for name in own:
        if name not in columns:
            known = [*columns, *(FIELDS["task"] if inner is None else ())]
            raise bad_request(f"unknown field {name!r}.", name, "unknown_field", hint=did_you_mean(name, known))
    if source is not None and not isinstance(source, str):
        raise bad_request("'source' must be a text.", "source")
    if source is None and not own:
        hint = f"give {', '.join(map(repr, columns))}, or 'source'." if columns else "give 'source'."
        raise bad_request("the request has none of the task's fields.", columns[0] if columns else "source", hint=hint)
    if source is not None and own:
        raise bad_request("give either 'source' or the task's fields, not both.", "source")
    format_of = body.get("format_of")
    if format_of is not None and not isinstance(format_of, str):
        raise bad_request("'format_of' must be the name of a prefix.", "format_of")
    # Greedy unless the request says otherwise, as in the task's evaluation.
    decoding = {"temperature": 0.0, **{name: body[name] for name in _SAMPLING if body.get(name) is not None}}
    shared = {**decoding, "stream": body.get("stream")}
    return _generation_request(shared, limits, 1, fields=own, source=source, format_of=format_of or "")


# --- parts of a body --------------------------------------------------------------------------------------------------


def _generation_request(
    body: Mapping[str, Any], limits: Limits, count: int, *, logprobs: int | None = None, **more: Any
) -> GenerationRequest:
    n = _integer(body, "n", limits) or 1
    if count * n > limits.max_texts:
        raise bad_request(f"{count} prompts times n = {n} are more than {limits.max_texts} texts.", "n")
    length = _integer(body, "max_tokens", limits)
    min_tokens = _integer(body, "min_tokens", limits) or 0
    if length is not None and min_tokens > length:
        raise bad_request(f"min_tokens is {min_tokens}, which is more than max_tokens ({length}).", "min_tokens")
    stream = _boolean(body, "stream")
    try:
        sampling = SamplingParams(
            max_new_tokens=length or limits.max_tokens,
            min_new_tokens=min_tokens,
            temperature=_number(body, "temperature", limits),
            top_p=_number(body, "top_p", limits),
            top_k=_integer(body, "top_k", limits) or 0,
            repetition_penalty=_number(body, "repetition_penalty", limits),
            seed=_integer(body, "seed", limits),
            stop=_stop(body.get("stop")),
            logprobs=logprobs,
        )
    except RequestError as error:
        raise bad_request(error.message, hint=error.hint) from None
    return GenerationRequest(
        sampling=sampling,
        fields_set=frozenset(name for name in _SAMPLING if body.get(name) is not None),
        n=n,
        stream=stream,
        include_usage=_include_usage(body, stream),
        **more,
    )


def _check_fields(body: Mapping[str, Any], kind: str) -> None:
    known = FIELDS[kind]
    for name, value in body.items():
        if name in known or name in IGNORED:
            continue
        if name not in UNSUPPORTED:
            raise bad_request(f"unknown field {name!r}.", name, "unknown_field", hint=did_you_mean(name, known))
        why, neutral = UNSUPPORTED[name]
        # False is not 0 here, but 0.0 is.
        harmless = any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
        if value is not None and not harmless:
            raise bad_request(f"{name!r} is not supported: {why}.", name, "unsupported_field")


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("'model' must be the name of a model; /v1/models lists them.", "model")
    return model


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt or several, as texts or token ids."""
    if isinstance(value, str):
        return (_text_prompt(value),)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(_text_prompt(item) for item in value)
        several = isinstance(value[0], list)
        ids = tuple(_token_ids(item) for item in (value if several else [value]))
        if all(ids):
            return ids
    raise bad_request(
        "'prompt' must be a text, a list of texts, a list of token ids, or a list of such lists.", "prompt"
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    """Token ids; empty if the value is anything else."""
    ids = tuple(_as_integer(item) for item in value) if isinstance(value, list) else ()
    return tuple(token for token in ids if token is not None) if None not in ids else ()


def _text_prompt(text: str) -> str:
    if not text:
        raise bad_request("'prompt' is empty; some text is needed.", "prompt")
    return text


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise bad_request("'messages' must be a list of at least one message.", "messages")
    return tuple(_message(item, index) for index, item in enumerate(value))


def _message(value: Any, index: int) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise bad_request(f"{where} must be an object with 'role' and 'content'.", where)
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise bad_request(f"{where}.role is {role!r}, but must be one of {', '.join(ROLES)}.", f"{where}.role")
    for name in value:
        if name not in MESSAGE_FIELDS and value[name] not in (None, []):
            raise bad_request(
                f"{where}.{name} is not supported: only text is allowed.", f"{where}.{name}", "unsupported_field"
            )
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise bad_request(f"{where}.content must be a text.", f"{where}.content")
    # Templates only know the older name.
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(value: Any, where: str) -> str:
    if isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return str(value["text"])
    raise bad_request(f"{where} is not a text part; only text is allowed.", where, "unsupported_field")


def _stop(value: Any) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(item, str) and item for item in strings):
        raise bad_request("'stop' must be a text or a list of texts, none of them empty.", "stop")
    if len(strings) > MAX_STOPS or any(len(string) > MAX_STOP_LENGTH for string in strings):
        raise bad_request(
            f"'stop' may have at most {MAX_STOPS} texts, of at most {MAX_STOP_LENGTH} characters each.", "stop"
        )
    return tuple(strings)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_request("'stream_options' needs stream to be true.", "stream_options")
    if not isinstance(options, dict):
        raise bad_request("'stream_options' must be an object.", "stream_options")
    known = ("include_usage", "include_obfuscation")
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise bad_request(
                f"unknown field {name!r} in 'stream_options'.", "stream_options", "unknown_field", hint=hint
            )
    return _boolean(options, "include_usage")


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name!r} is {_short(value)}, but must be true or false.", name)
    return bool(value)


def _integer(body: Mapping[str, Any], name: str, limits: Limits) -> int | None:
    value, allowed = body.get(name), limits.ranges[name]
    if value is None:
        return allowed.default
    integer = _as_integer(value)
    if integer is None or not allowed.minimum <= integer <= allowed.maximum:
        message = f"must be a whole number between {allowed.minimum} and {allowed.maximum}"
        raise bad_request(f"{name!r} is {_short(value)}, but {message}.", name)
    return integer


def _as_integer(value: Any) -> int | None:
    """A whole number, which JSON may write as 5 or as 5.0; None: it is something else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _number(body: Mapping[str, Any], name: str, limits: Limits) -> float:
    value, allowed = body.get(name), limits.ranges[name]
    if value is None:
        return float(allowed.default or 0)
    minimum, maximum, exclusive = allowed.minimum, allowed.maximum, allowed.exclusive_minimum
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or (exclusive and value == minimum):
        message = f"above {minimum} and at most {maximum}" if exclusive else f"between {minimum} and {maximum}"
        raise bad_request(f"{name!r} is {_short(value)}, but must be a number {message}.", name)
    return float(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
