"""The middleware of vLLM's server: prefixes of a folder are models there.

A request for one is rewritten into one for the backbone: its text in the format that the prefix was trained with,
placeholders in front of its tokens, the prefix in the connector's parameters, a salt of its own for the cache. In what
comes back the prefix's name stands again, the target alone is left of a text, and the placeholders are not counted. All
else passes through untouched: decoding is vLLM's own, whatever the prefix's task. Knows nothing of tensors.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.errors import CheckpointError, RequestError
from prefixtune.interop.vllm.settings import Known, PrefixFolder, Settings, geometry_of, weights_of
from prefixtune.prefix.text_format import TargetStream, TextFormat, fit_ids
from prefixtune.prefix.token_offsets import TargetOffsets

__all__ = ["PROMPT_VARIABLE", "TEMPLATE_VARIABLE", "PrefixMiddleware"]


TEMPLATE_VARIABLE = "prefixtune_placeholders"
"""What a chat template begins with, so that the server can put placeholders in front of a chat."""

PROMPT_VARIABLE = "prefixtune_prompt"
"""What a chat template gives in place of the messages, so that a chat can have a prefix's text format."""

_COMPLETIONS, _CHAT, _MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "echo": ("the prompt is not repeated", (None, False)),
    "prompt_logprobs": ("the prompt's tokens are not told", (None,)),
    "truncate_prompt_tokens": ("the prefix would be cut off", (None,)),
    "prompt_embeds": ("tokens are needed", (None,)),
    "use_beam_search": ("beams do not carry it", (None, False)),
    "kv_transfer_params": ("the server sets them", (None,)),
    "chat_template": ("the server sets it", (None,)),
}
"""Fields that do not go with a prefix: why, and the values that ask for nothing."""

_OF_TOKENIZERS = ("tokenize", "truncation", "max_length", "padding", "tokenizer_kwargs", "add_special_tokens")
"""Arguments of a chat template's that could cut placeholders off."""
_MOST_PROMPTS = 1024
"""Of one request, as vLLM has it."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Refusal(Exception):
    """A request that is answered here, in OpenAI's shape."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter = status, message, parameter

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": self.message, "type": kind, "param": self.parameter, "code": self.status}
        return json.dumps({"error": told}).encode()


@dataclass(frozen=True)
class _Serving:
    """What is known once vLLM has started."""

    settings: Settings
    prefixes: PrefixFolder
    base: str
    own_names: frozenset[str]
    tokenizer: Any
    placeholder: int
    has_template: bool
    has_prompt: bool
    has_keys: bool
    positions: int | None = None

    @property
    def placeholder_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.placeholder))


class PrefixMiddleware:
    """Named in vLLM's `--middleware`.

    Args:
        app: vLLM's own.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._serving: _Serving | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, method = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"]
        if method == "GET" and path == _MODELS:
            serving = await self._ready(scope)
            found = await asyncio.to_thread(serving.prefixes.all)
            return await self.app(scope, receive, _Rewriter(send, lambda value: _with_models(value, found, serving)))
        if method != "POST" or path not in (_COMPLETIONS, _CHAT):
            return await self.app(scope, receive, send)
        serving = await self._ready(scope)
        if serving.has_keys and await self._turned_away(scope, receive, send):
            return None
        body = await _read(receive, serving.settings.max_body_bytes)
        try:
            if body is None:
                raise _Refusal(f"the request is longer than {serving.settings.max_body_bytes} bytes.", status=413)
            rewritten = await asyncio.to_thread(_rewrite, serving, body, path == _CHAT)
        except _Refusal as refusal:
            told = refusal.body()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            return await send({"type": "http.response.body", "body": told})
        if rewritten is None:
            return await self.app(scope, _replay(body, receive), send)
        return await self.app(
            _with_length(scope, len(rewritten.body)),
            _replay(rewritten.body, receive),
            _Rewriter(send, lambda value: _as_told(value, rewritten), rewritten.headers),
        )

    async def _ready(self, scope: Scope) -> _Serving:
        if self._serving is None:
            self._serving = await asyncio.to_thread(_begin, scope["app"].state)
        return self._serving

    async def _turned_away(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether vLLM does not let the client in; then its own answer was sent. It stands behind this middleware."""
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        await self.app({**scope, "method": "GET", "path": _MODELS, "raw_path": _MODELS.encode()}, receive, hold)
        if held[0]["type"] == "http.response.start" and held[0]["status"] not in (401, 403):
            return False
        for message in held:
            await send(message)
        return True


def _begin(state: Any) -> _Serving:
    """Read what vLLM runs.

    Raises:
        ConfigError: It is not set up for prefixes.
    """
    config = state.vllm_config
    settings = Settings.from_vllm(config)
    model = config.model_config
    folder = Path(str(model.model))
    weights = weights_of(folder) if folder.is_dir() else None
    names = tuple(state.args.served_model_name or [state.args.model])
    tokenizer = state.engine_client.get_tokenizer()
    placeholder = _placeholder(tokenizer)
    template = str(getattr(state.online_renderer, "chat_template", None) or "")
    # In a chat the placeholders are text first.
    text = tokenizer.convert_ids_to_tokens(placeholder) * 3
    spelt = tokenizer(text, add_special_tokens=False)["input_ids"] == [placeholder] * 3
    return _Serving(
        settings,
        PrefixFolder(settings, geometry_of(model), names[0], weights),
        names[0],
        frozenset(names),
        tokenizer,
        placeholder,
        TEMPLATE_VARIABLE in template and spelt,
        PROMPT_VARIABLE in template,
        bool(state.args.api_key or os.environ.get("VLLM_API_KEY")),
        getattr(model, "max_model_len", None),
    )


def _placeholder(tokenizer: Any) -> int:
    """A token that stands for a prefix's position: it is never computed, but penalties of repetition see it."""
    ending = tokenizer.eos_token_id
    ids = [tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return int(next((each for each in ids if each is not None and each != ending), ending or 0))


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rewritten:
    """A request for the backbone.

    Attributes:
        body: As vLLM reads it.
        known: The prefix.
        prompts: How many there are.
        streams: Whether the reply comes in pieces.
        text_format: Of the prompts; None: they went as they were.
        headers: Of the reply: what was cut or dropped.
        targets: Of a stream: what is held back of each choice.
        offsets: Of each choice's tokens within its target.
    """

    body: bytes
    known: Known
    prompts: int
    streams: bool
    text_format: TextFormat | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    targets: dict[int, TargetStream] = dataclasses.field(default_factory=dict)
    offsets: dict[int, TargetOffsets] = dataclasses.field(default_factory=dict)


def _rewrite(serving: _Serving, body: bytes, chat: bool) -> _Rewritten | None:
    """The request for the backbone that a request for a prefix becomes; None: it is for something else.

    Raises:
        _Refusal: It cannot be served.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = asked.get("model") if isinstance(asked, dict) else None
    if not isinstance(name, str) or name in serving.own_names:
        return None
    try:
        known = serving.prefixes.find(name)
    except CheckpointError as error:
        raise _Refusal(f"{error.message} {error.hint}".strip(), "model", 503) from None
    if known is None:
        return None
    try:
        # Half a surrogate pair is legal in JSON, but no tokenizer takes it.
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Refusal("the body holds half a surrogate pair, which is no text.") from None
    except RecursionError:
        raise _Refusal("the body is nested too deeply.") from None
    for field, (why, neutral) in _REFUSED.items():
        if field in asked and asked[field] not in neutral:
            raise _Refusal(f"{field!r} does not go with a prefix: {why}.", field)
    salt = asked.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise _Refusal("'cache_salt' must be a text.", "cache_salt")
    secret = serving.settings.secret
    asked |= {
        "model": serving.base,
        "cache_salt": known.asked.salt(secret, salt),
        "kv_transfer_params": known.asked.parameters(secret),
    }
    count, headers = 1, dict[str, str]()
    form = _format_of(serving, known, asked, chat)
    if chat:
        prompt = None if form is None else _chat_prompt(serving, asked, known, form, headers)
        _with_placeholders_in_chat(serving, asked, known.asked.length, prompt)
    else:
        prompts = _prompts(serving, asked) if form is None else _source_prompts(serving, asked, known, form, headers)
        front = [serving.placeholder] * known.asked.length
        count = len(prompts)
        asked["prompt"] = [front + ids for ids in prompts] if count > 1 else front + prompts[0]
        asked.pop("add_special_tokens", None)
    return _Rewritten(json.dumps(asked).encode(), known, count, bool(asked.get("stream")), form, headers)


def _format_of(serving: _Serving, known: Known, asked: dict[str, Any], chat: bool) -> TextFormat | None:
    """The text format of a request's texts; None: they go as they are."""
    prompt = asked.get("prompt")
    texts = chat or isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], str))
    if known.text_format is None or not texts or (serving.settings.raw_completions and not chat):
        return None
    return known.text_format.with_lengths(on_too_long=serving.settings.on_too_long)


def _separator(tokenizer: Any) -> str:
    return str(tokenizer.bos_token or tokenizer.eos_token)


def _encode(serving: _Serving, text: str) -> list[int]:
    ids: list[int] = serving.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _fit(
    serving: _Serving, known: Known, form: TextFormat, ids: list[int], asked: dict[str, Any]
) -> tuple[list[int], int]:
    """A prompt's tokens, and how many of its source's were cut off as in training.

    Raises:
        _Refusal: It is longer than the training allowed.
    """
    # What vLLM takes where a completion says nothing.
    wanted = asked.get("max_completion_tokens") or asked.get("max_tokens") or 16

    def around() -> tuple[int, int]:
        before, after = form.around(_separator(serving.tokenizer))
        return len(_encode(serving, before)), len(_encode(serving, after))

    try:
        fitting = fit_ids(
            form,
            ids,
            positions=None if serving.positions is None else serving.positions - known.asked.length,
            new_tokens=wanted if _is_whole(wanted) else 16,
            around=around,
            name="the prompt",
        )
    except RequestError as error:
        raise _Refusal(f"{error.message} {error.hint}", "prompt") from None
    return fitting, len(ids) - len(fitting)


def _source_prompts(
    serving: _Serving, asked: dict[str, Any], known: Known, form: TextFormat, headers: dict[str, str]
) -> list[list[int]]:
    """Token ids of sources, each in the prefix's text format."""
    given = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
    if len(given) > _MOST_PROMPTS:
        raise _Refusal(f"'prompt' has {len(given)} prompts, but at most {_MOST_PROMPTS} are taken.", "prompt")
    separator, prompts, cut = _separator(serving.tokenizer), [], 0
    for source in given:
        if not isinstance(source, str) or not source:
            raise _Refusal("'prompt' must be a text, token ids, or a list of either; none of them empty.", "prompt")
        ids, less = _fit(serving, known, form, _encode(serving, form.format_prompt(source, separator)), asked)
        prompts.append(ids)
        cut += less
    if cut:
        headers["x-prefixtune-cut-tokens"] = str(cut)
    return prompts


def _chat_prompt(
    serving: _Serving, asked: dict[str, Any], known: Known, form: TextFormat, headers: dict[str, str]
) -> str:
    """The text of a chat's last message, in the prefix's text format.

    Raises:
        _Refusal: It is not the user's or no text, others stand before it, or it is too long.
    """
    messages = asked.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(messages, list) or not isinstance(last, dict) or last.get("role") != "user":
        raise _Refusal("'messages' must end with a message of the user's.", "messages")
    content = last.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in _objects(content) if isinstance(part.get("text"), str)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str) or not content.strip():
        raise _Refusal("the last message must be a text that is not empty.", "messages")
    if len(messages) > 1 and serving.settings.earlier_messages == "refuse":
        raise _Refusal(
            f"this prefix reads one text, but the chat has {len(messages)} messages. Send the last "
            "user message alone, or have the server drop the others (earlier_messages = 'drop').",
            "messages",
        )
    if len(messages) > 1:
        headers["x-prefixtune-dropped-messages"] = str(len(messages) - 1)
    if not serving.has_prompt:
        raise _Refusal(
            "this server takes no chats for this prefix: its chat template has no place for the prefix's text format. "
            "`prefixtune serve --engine vllm` gives it one; /v1/completions works.",
            "messages",
        )
    text = form.format_prompt(content, _separator(serving.tokenizer))
    ids = _encode(serving, text)
    if _fit(serving, known, form, ids, asked)[1]:
        raise _Refusal(f"the message takes {len(ids)} tokens and would be cut; /v1/completions does that.", "messages")
    return text


def _with_placeholders_in_chat(serving: _Serving, asked: dict[str, Any], length: int, prompt: str | None) -> None:
    if not serving.has_template:
        raise _Refusal(
            "this server takes no chats for prefixes: its chat template has no place for them. "
            "`prefixtune serve --engine vllm` gives it one, of models with a template; /v1/completions works.",
            "messages",
        )
    if asked.get("add_special_tokens"):
        raise _Refusal("'add_special_tokens' does not go with a prefix: they would stand before it.", "messages")
    options = asked.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise _Refusal("'chat_template_kwargs' must be an object.", "chat_template_kwargs")
    for field in options or {}:
        if field in _OF_TOKENIZERS or field.startswith("return_"):
            raise _Refusal(f"{field!r} in 'chat_template_kwargs' does not go with a prefix.", "chat_template_kwargs")
    own = {TEMPLATE_VARIABLE: serving.placeholder_text * length, PROMPT_VARIABLE: prompt}
    asked["chat_template_kwargs"] = {**(options or {}), **{name: text for name, text in own.items() if text}}


def _prompts(serving: _Serving, asked: dict[str, Any]) -> list[list[int]]:
    """Token ids of every prompt; of texts, as training had them: nothing added unless asked for."""
    value, special = asked.get("prompt"), bool(asked.get("add_special_tokens"))
    given = value if isinstance(value, list) and value and not _is_whole(value[0]) else [value]
    if len(given) > _MOST_PROMPTS:
        raise _Refusal(f"'prompt' has {len(given)} prompts, but at most {_MOST_PROMPTS} are taken.", "prompt")
    prompts = []
    for each in given:
        if isinstance(each, str):
            ids = serving.tokenizer(each, add_special_tokens=special, verbose=False)["input_ids"]
        elif isinstance(each, list) and all(map(_is_whole, each)):
            ids = each
        else:
            raise _Refusal("'prompt' must be a text, token ids, or a list of either.", "prompt")
        if not ids:
            raise _Refusal("'prompt' is empty; some text is needed.", "prompt")
        prompts.append(list(ids))
    return prompts


def _is_whole(value: object) -> bool:
    return type(value) is int


# --- replies ----------------------------------------------------------------------------------------------------------


def _as_told(value: Any, rewritten: _Rewritten) -> Any:
    """A reply, or a piece of one, as the client is told it."""
    if not isinstance(value, dict):
        return value
    if "model" in value:
        value["model"] = rewritten.known.asked.name
    value.pop("kv_transfer_params", None)
    for each in (value, *_objects(value.get("choices"))):
        if isinstance(each.get("prompt_token_ids"), list):
            each["prompt_token_ids"] = each["prompt_token_ids"][rewritten.known.asked.length :]
    if rewritten.text_format is not None:
        for number, choice in enumerate(_objects(value.get("choices"))):
            _with_target(choice, rewritten, number)
    usage = value.get("usage")
    if isinstance(usage, dict):
        # A piece with text counts the prompt that it belongs to; a whole reply and a stream's end count them all.
        prompts = 1 if rewritten.streams and value.get("choices") else rewritten.prompts
        placeholders = rewritten.known.asked.length * prompts
        for key in ("prompt_tokens", "total_tokens"):
            if isinstance(usage.get(key), int):
                usage[key] -= placeholders
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            details["cached_tokens"] = max(details["cached_tokens"] - placeholders, 0)
    return value


def _with_target(choice: dict[str, Any], rewritten: _Rewritten, number: int) -> None:
    """Leave the target alone of a choice's text, or of a piece of it."""
    form = rewritten.text_format
    inner = next((choice[key] for key in ("message", "delta") if isinstance(choice.get(key), dict)), choice)
    key = "text" if inner is choice else "content"
    if form is None or not (isinstance(inner.get(key), str) or (rewritten.streams and choice.get("finish_reason"))):
        return
    text, index = inner.get(key) or "", choice.get("index", number)
    last = not rewritten.streams or choice.get("finish_reason") is not None
    if rewritten.streams:
        inner[key] = rewritten.targets.setdefault(index, TargetStream(form)).add(text, last=last)
    else:
        inner[key] = form.extract_target(text)
    if key == "text" and "logprobs" in choice:
        offsets = rewritten.offsets.setdefault(index, TargetOffsets(form))
        choice["logprobs"] = offsets.add(inner[key], choice["logprobs"], last=last)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _with_models(value: Any, found: dict[str, Known], serving: _Serving) -> Any:
    """The list of models, prefixes included."""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value["data"] += [
            {
                "id": name,
                "object": "model",
                "created": known.created,
                "owned_by": "prefixtune",
                "root": serving.base,
                "parent": serving.base,
                "description": known.description,
                "prefix_length": known.asked.length,
            }
            for name, known in found.items()
            if name not in serving.own_names
        ]
    return value


class _Rewriter:
    """Sends a reply on, every JSON value in it changed: a whole body, or the events of a stream.

    Args:
        send: Where to.
        change: Value -> value.
        headers: Of the reply, besides its own.
    """

    def __init__(self, send: Send, change: Callable[[Any], Any], headers: Mapping[str, str] | None = None) -> None:
        self.send, self.change = send, change
        self.headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.start: Message = {}
        self.held = b""
        self.streams = False

    async def __call__(self, message: Message) -> None:
        """A part of the reply."""
        if message["type"] == "http.response.start":
            self.start = {**message, "headers": [*message["headers"], *self.headers]}
            kinds = [value for key, value in message["headers"] if key.lower() == b"content-type"]
            self.streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            if self.streams:
                await self.send(self.start)
            return
        if message["type"] != "http.response.body":
            await self.send(message)
            return
        self.held += message.get("body", b"")
        more = bool(message.get("more_body"))
        if self.streams:
            whole, mark, rest = self.held.rpartition(b"\n\n")
            done, self.held = (whole + mark, rest) if more else (self.held, b"")
            if done or not more:
                changed = b"\n".join(map(self._line, done.split(b"\n")))
                await self.send({"type": "http.response.body", "body": changed, "more_body": more})
        elif not more:
            body = self._value(self.held)
            headers = [pair for pair in self.start["headers"] if pair[0].lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self.send({**self.start, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})

    def _line(self, line: bytes) -> bytes:
        field, colon, value = line.partition(b": ")
        return field + colon + self._value(value) if field == b"data" and value.startswith(b"{") else line

    def _value(self, text: bytes) -> bytes:
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return json.dumps(self.change(value), ensure_ascii=False, separators=(",", ":")).encode()


async def _read(receive: Receive, most: int) -> bytes | None:
    """A request's body; None: it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes | None, receive: Receive) -> Receive:
    """What gives a body that was read, or another in its place, and then what else comes (a client's leaving)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body or b"", "more_body": False}

    return replay


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}
