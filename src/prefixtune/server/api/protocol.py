"""Bodies of requests -> what is asked for, checked field by field.

A field that is unknown is refused, with the nearest known one; one of OpenAI's that asks for nothing here is passed
over; one that would change the output, and that this server cannot do, is refused by name. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune.engine.request import SamplingParams
from prefixtune.errors import RequestError, did_you_mean
from prefixtune.server.limits import Limits
from prefixtune.server.responses import ApiError, bad_request

__all__ = [
    "FIELDS",
    "MAX_STOPS",
    "MAX_STOP_LENGTH",
    "MESSAGE_FIELDS",
    "PASSED_OVER",
    "ROLES",
    "UNSUPPORTED",
    "GenerationRequest",
    "parse_chat",
    "parse_completion",
    "parse_json",
    "parse_task",
]


Prompt = str | tuple[int, ...]

PASSED_OVER = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
)
"""Fields of OpenAI's that are about the service and not about the output."""

UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("tools are not supported", ([],)),
    "tool_choice": ("tools are not supported", ("none", "auto")),
    "functions": ("functions are not supported", ([],)),
    "function_call": ("functions are not supported", ("none", "auto")),
    "response_format": ("only text is written", ({"type": "text"},)),
    "logit_bias": ("tokens cannot be favoured one by one", ({},)),
    "presence_penalty": ("use repetition_penalty", (0,)),
    "frequency_penalty": ("use repetition_penalty", (0,)),
    "best_of": ("use n", (1,)),
    "echo": ("the prompt is not repeated", (False,)),
    "suffix": ("text is written at the end only", ("",)),
    "audio": ("only text is written", ()),
    "modalities": ("only text is written", (["text"],)),
    "prediction": ("outputs cannot be predicted", ()),
    "web_search_options": ("nothing is searched", ()),
    "reasoning_effort": ("there is no separate reasoning", ("none",)),
    "verbosity": ("outputs are as long as they are", ("medium",)),
}
"""Fields that would change the output: why they are refused, and the values that ask for nothing."""

_SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
_SHARED = ("model", *_SAMPLING, "n", "stream", "stream_options", "logprobs")
FIELDS = {
    "completion": ("prompt", *_SHARED),
    "chat": ("messages", *_SHARED, "max_completion_tokens", "top_logprobs"),
    "task": ("source", "fields", "format_of", *_SAMPLING, "stream"),
}
"""Fields that are read, by the kind of request; a task's own come besides."""
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = ("role", "content", "name", "refusal")
"""Of a message; others may be there as long as they say nothing."""
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_DEPTH = 32
"""Lists and objects within each other; a chat's parts take six."""


@dataclass(frozen=True)
class GenerationRequest:
    """What a request asks for.

    Attributes:
        model: Name of a prefix, or of the bare backbone; a task's is in its path.
        prompts: Texts or token ids, of a completion.
        messages: Of a chat.
        fields: A task's own; empty where `source` is given.
        source: A linearized text, of a task.
        format_of: Name of the prefix whose linearization and text format the bare backbone is to be given.
        sampling: How tokens are chosen; its `max_new_tokens` counts only where `says_length`.
        says_length: Whether the request says how many tokens it wants at most.
        given: Names of the sampling fields that the request has.
        n: Texts for each prompt.
        stream: Whether to send pieces as they come.
        include_usage: Whether a stream tells its usage at the end.
    """

    model: str = ""
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    format_of: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    says_length: bool = False
    given: frozenset[str] = frozenset()
    n: int = 1
    stream: bool = False
    include_usage: bool = False


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: It is no JSON, no object, nested too deeply, or holds what is no text or no finite number.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        _check_depth(value)
        # Half a surrogate pair is legal in JSON, but no tokenizer takes it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise bad_request(f"the body is nested more than {MAX_DEPTH} levels deep.", code="invalid_json") from None
    except UnicodeEncodeError:
        raise bad_request("the body holds half a surrogate pair, which is no text.", code="invalid_json") from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8.", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(f"the body is no JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object.", code="invalid_json")
    return value


def parse_completion(body: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    """A body of `/v1/completions`.

    Raises:
        ApiError: A field is wrong, unknown or unsupported; names it.
    """
    _check_fields(body, "completion")
    prompts = _prompts(body.get("prompt"))
    logprobs = _whole(body, "logprobs", limits)
    return _ask(body, limits, len(prompts), logprobs=logprobs, model=_model(body), prompts=prompts)


def parse_chat(body: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    """A body of `/v1/chat/completions`.

    Raises:
        ApiError: A field is wrong, unknown or unsupported; names it.
    """
    _check_fields(body, "chat")
    messages = _messages(body.get("messages"))
    top = _whole(body, "top_logprobs", limits)
    if top is not None and not _truth(body, "logprobs"):
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (top or 0) if _truth(body, "logprobs") else None
    length = _whole(body, "max_completion_tokens", limits)
    if length is not None:
        _whole(body, "max_tokens", limits)
        body = {**body, "max_tokens": length}
    return _ask(body, limits, 1, logprobs=logprobs, model=_model(body), messages=messages)


def parse_task(body: Mapping[str, Any], limits: Limits, columns: Sequence[str]) -> GenerationRequest:
    """A body of `/v1/tasks/{prefix}`: the task's fields, and how to decode, side by side.

    Args:
        body: The object.
        limits: What may be asked for.
        columns: The task's own fields. One that has the name of an option is given within `fields`.

    Raises:
        ApiError: A field is wrong or unknown; names it.
    """
    inner, source = body.get("fields"), body.get("source")
    beside = {name: value for name, value in body.items() if name not in FIELDS["task"]}
    if inner is not None and not isinstance(inner, dict):
        raise bad_request("'fields' must be an object.", "fields")
    if inner is not None and beside:
        name = next(iter(beside))
        raise bad_request(f"{name!r} stands beside 'fields'; all of the task's fields belong there then.", name)
    own: Mapping[str, Any] = beside if inner is None else inner
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
    # Without a word on it the likeliest text is wanted, as in the task's evaluation.
    decoding = {"temperature": 0.0, **{name: body[name] for name in _SAMPLING if body.get(name) is not None}}
    shared = {**decoding, "stream": body.get("stream")}
    return _ask(shared, limits, 1, fields=own, source=source, format_of=format_of or "")


# --- parts of a body --------------------------------------------------------------------------------------------------


def _ask(
    body: Mapping[str, Any], limits: Limits, count: int, *, logprobs: int | None = None, **more: Any
) -> GenerationRequest:
    n = _whole(body, "n", limits) or 1
    if count * n > limits.max_texts:
        raise bad_request(f"{count} prompts times n = {n} are more than {limits.max_texts} texts.", "n")
    length = _whole(body, "max_tokens", limits)
    least = _whole(body, "min_tokens", limits) or 0
    if length is not None and least > length:
        raise bad_request(f"min_tokens is {least}, which is more than max_tokens ({length}).", "min_tokens")
    stream = _truth(body, "stream")
    try:
        sampling = SamplingParams(
            max_new_tokens=length or limits.max_tokens,
            min_new_tokens=least,
            temperature=_number(body, "temperature", limits),
            top_p=_number(body, "top_p", limits),
            top_k=_whole(body, "top_k", limits) or 0,
            repetition_penalty=_number(body, "repetition_penalty", limits),
            seed=_whole(body, "seed", limits),
            stop=_stop(body.get("stop")),
            logprobs=logprobs,
        )
    except RequestError as error:
        raise bad_request(error.message, hint=error.hint) from None
    return GenerationRequest(
        sampling=sampling,
        says_length=length is not None,
        given=frozenset(name for name in _SAMPLING if body.get(name) is not None),
        n=n,
        stream=stream,
        include_usage=_include_usage(body, stream),
        **more,
    )


def _check_fields(body: Mapping[str, Any], kind: str) -> None:
    known = FIELDS[kind]
    for name, value in body.items():
        if name in known or name in PASSED_OVER:
            continue
        if name not in UNSUPPORTED:
            raise bad_request(f"unknown field {name!r}.", name, "unknown_field", hint=did_you_mean(name, known))
        why, neutral = UNSUPPORTED[name]
        # False is no 0 here, but 0.0 is.
        asks = not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)
        if value is not None and asks:
            raise bad_request(f"{name!r} is not supported: {why}.", name, "unsupported_field")


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("'model' must name a model; /v1/models lists them.", "model")
    return model


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt or several, as texts or token ids."""
    if isinstance(value, str):
        return (_text_prompt(value),)
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(_text_prompt(each) for each in value)
        several = isinstance(value[0], list)
        ids = tuple(_token_ids(each) for each in (value if several else [value]))
        if all(ids):
            return ids
    raise bad_request(
        "'prompt' must be a text, a list of texts, a list of token ids, or a list of such lists.", "prompt"
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    """Token ids; empty where there are none, or anything else."""
    ids = tuple(_as_whole(each) for each in value) if isinstance(value, list) else ()
    return tuple(each for each in ids if each is not None) if None not in ids else ()


def _text_prompt(text: str) -> str:
    if not text:
        raise bad_request("'prompt' is empty; some text is needed.", "prompt")
    return text


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise bad_request("'messages' must be a list of at least one message.", "messages")
    return tuple(_message(each, number) for number, each in enumerate(value))


def _message(value: Any, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(value, dict):
        raise bad_request(f"{where} must be an object with 'role' and 'content'.", where)
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise bad_request(f"{where}.role is {role!r}, but must be one of {', '.join(ROLES)}.", f"{where}.role")
    for name in value:
        if name not in MESSAGE_FIELDS and value[name] not in (None, []):
            raise bad_request(
                f"{where}.{name} is not supported: only text is read.", f"{where}.{name}", "unsupported_field"
            )
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise bad_request(f"{where}.content must be a text.", f"{where}.content")
    # Templates know the older word.
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(value: Any, where: str) -> str:
    if isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return str(value["text"])
    raise bad_request(f"{where} is no text part; only text is read.", where, "unsupported_field")


def _stop(value: Any) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(each, str) and each for each in strings):
        raise bad_request("'stop' must be a text or a list of texts, none of them empty.", "stop")
    if len(strings) > MAX_STOPS or any(len(each) > MAX_STOP_LENGTH for each in strings):
        raise bad_request(f"'stop' may have {MAX_STOPS} texts of {MAX_STOP_LENGTH} characters.", "stop")
    return tuple(strings)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_request("'stream_options' goes with stream = true.", "stream_options")
    if not isinstance(options, dict):
        raise bad_request("'stream_options' must be an object.", "stream_options")
    known = ("include_usage", "include_obfuscation")
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise bad_request(
                f"unknown field {name!r} in 'stream_options'.", "stream_options", "unknown_field", hint=hint
            )
    return _truth(options, "include_usage")


def _truth(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name!r} is {_short(value)}, but must be true or false.", name)
    return bool(value)


def _whole(body: Mapping[str, Any], name: str, limits: Limits) -> int | None:
    value, allowed = body.get(name), limits.ranges[name]
    if value is None:
        return allowed.default
    whole = _as_whole(value)
    if whole is None or not allowed.least <= whole <= allowed.most:
        told = f"must be a whole number between {allowed.least} and {allowed.most}"
        raise bad_request(f"{name!r} is {_short(value)}, but {told}.", name)
    return whole


def _as_whole(value: Any) -> int | None:
    """A whole number, which JSON may write as 5 and as 5.0; None: it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _number(body: Mapping[str, Any], name: str, limits: Limits) -> float:
    value, allowed = body.get(name), limits.ranges[name]
    if value is None:
        return float(allowed.default or 0)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not allowed.least <= value <= allowed.most or (allowed.above and value == allowed.least):
        least, most = allowed.least, allowed.most
        told = f"above {least} and at most {most}" if allowed.above else f"between {least} and {most}"
        raise bad_request(f"{name!r} is {_short(value)}, but must be a number {told}.", name)
    return float(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse_constant(name: str) -> ApiError:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _check_depth(value: Any) -> None:
    """Refuse what no request needs: whatever walks through it later, such as a message with it, may recurse.

    Raises:
        RecursionError: Lists and objects stand too deeply within each other.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise RecursionError
