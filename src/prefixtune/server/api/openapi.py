"""What the server offers, as an OpenAPI 3.1 document.

What requests may hold comes from the tables that `asks` checks them by, and who may call a route from its endpoint;
what replies hold is written here, and the tests hold it against real ones. Knows nothing of the prefixes that are there
and of keys, so that nothing is told that a caller might not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from prefixtune import __version__
from prefixtune.server.api.endpoint import Endpoint
from prefixtune.server.api.protocol import (
    FIELDS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MESSAGE_FIELDS,
    PASSED_OVER,
    ROLES,
    UNSUPPORTED,
)
from prefixtune.server.limits import Limits
from prefixtune.server.settings import ServeConfig

__all__ = ["describe"]


Schema = dict[str, Any]
Paths = Mapping[str, Mapping[str, ASGIApp]]


def describe(paths: Paths, config: ServeConfig, limits: Limits) -> Schema:
    """The document.

    Args:
        paths: The routes: path -> method -> application.
        config: Whose limits are told.
        limits: Of what a request may ask for.
    """
    told: dict[str, Schema] = {}
    for path, methods in paths.items():
        place = told.setdefault(path.replace(":path", ""), {})
        for method, app in methods.items():
            place[method.lower()] = _operation(path, method, app, config)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "prefixtune",
            "version": __version__,
            "description": (
                "One frozen language model and many prefixes. /v1/models, /v1/completions and /v1/chat/completions "
                "are OpenAI's; /v1/tasks takes the fields of a prefix's own task. Where there is GET, there is HEAD."
            ),
        },
        "paths": told,
        "components": {
            "schemas": {**_requests(config, limits), **_REPLIES},
            "responses": {str(status): _failure(status) for status in _ERRORS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "A key of this server."}},
        },
    }


# --- pieces of schemas ------------------------------------------------------------------------------------------------


def _object(fields: Mapping[str, Schema], optional: Sequence[str] = (), **more: Any) -> Schema:
    needed = [name for name in fields if name not in optional]
    return {"type": "object", "properties": dict(fields), **({"required": needed} if needed else {}), **more}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else {"anyOf": [schema, _NULL]}


def _one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_SOME_TEXT: Schema = {"type": "string", "minLength": 1}
_WHOLE: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_TRUTH: Schema = {"type": "boolean"}
_NULL: Schema = {"type": "null"}
_BYTES: Schema = {"application/octet-stream": {"schema": {}}}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _whole_or_stream(name: str) -> Schema:
    """A reply, or, with `stream`, server-sent events."""
    piece = {"anyOf": [_ref(f"{name}Chunk"), _ref("Error")]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": piece}
    told = "With stream: each event. The last one is [DONE], but after an error; comments say that the server is alive."
    each = _object({"data": {"anyOf": [_one_of("[DONE]"), data]}}, description=told)
    return {**_json(_ref(name)), "text/event-stream": {"schema": each}}


# --- requests ---------------------------------------------------------------------------------------------------------

_NOTES = {
    "model": "A name that /v1/models lists.",
    "prompt": "With a prefix, a text is a source, in the text format of its training; token ids go as they are.",
    "messages": "With a prefix, the last one is the source, and must be the user's.",
    "max_tokens": "Most new tokens; unless given, those of the prefix's task or {length}, as far as they fit.",
    "max_completion_tokens": "The newer name of max_tokens, before which it goes.",
    "min_tokens": "Fewest new tokens; at most max_tokens.",
    "temperature": "0: the likeliest token each time.",
    "top_k": "0: all tokens.",
    "n": "Texts for each prompt; all prompts together may have {texts} texts.",
    "stop": "What ends a text, and is left out of it.",
    "stream_options": "With stream only.",
    "top_logprobs": "With logprobs only.",
    "source": "A text that is linearized already; or else the task's own fields.",
    "fields": "The task's own fields, where one is called like an option; otherwise they stand beside the options.",
    "format_of": "With the bare backbone: a prefix, whose text format and fields are taken.",
}


def _requests(config: ServeConfig, limits: Limits) -> dict[str, Schema]:
    """What bodies may hold, by the tables of `asks`."""

    def body(kind: str, needed: Sequence[str], others: Schema, **own: Schema) -> Schema:
        fields = {name: own[name] if name in own else _field(name, limits) for name in FIELDS[kind]}
        for name, note in _NOTES.items():
            if name in fields:
                told = note.format(length=config.default_max_tokens, texts=limits.max_texts)
                fields[name] = {**fields[name], "description": told}
        return _object({**fields, **others}, [name for name in (*fields, *others) if name not in needed])

    # OpenAI's clients may send them.
    others = {name: {"description": "Passed over."} for name in PASSED_OVER} | {
        name: {**_one_of(*neutral, None), "description": f"Not supported: {why}."}
        for name, (why, neutral) in UNSUPPORTED.items()
    }
    closed = {"additionalProperties": False}
    task = {
        "max_tokens": {**_field("max_tokens", limits), "description": "Most new tokens; unless given, the task's own."},
        "temperature": {**_field("temperature", limits), "default": 0},
    }
    return {
        "CompletionRequest": {**body("completion", ("model", "prompt"), others), **closed},
        "ChatRequest": {**body("chat", ("model", "messages"), others, logprobs=_or_null(_TRUTH)), **closed},
        "TaskRequest": {
            **body("task", (), {}, **task),
            "description": "Options, and beside them the task's own fields, which GET tells.",
        },
        "Message": _object(
            {
                **{name: {} for name in MESSAGE_FIELDS},
                "role": _one_of(*ROLES),
                "content": {"anyOf": [_TEXT, _list(_ref("TextPart"))]},
            },
            [name for name in MESSAGE_FIELDS if name not in ("role", "content")],
            additionalProperties=_one_of(None, []),
        ),
        "TextPart": _object({"type": _one_of("text"), "text": _TEXT}),
    }


def _field(name: str, limits: Limits) -> Schema:
    """What a field of a request may be; null stands for nothing, but in fields that are needed."""
    if name in limits.ranges:
        allowed = limits.ranges[name]
        told = _or_null(_WHOLE if allowed.whole else _NUMBER)
        told |= {"exclusiveMinimum" if allowed.above else "minimum": allowed.least, "maximum": allowed.most}
        return told if allowed.default is None else {**told, "default": allowed.default}
    if name == "prompt":
        most, ids = {"minItems": 1, "maxItems": limits.max_texts}, _list(_WHOLE, minItems=1)
        return {"anyOf": [_SOME_TEXT, _list(_SOME_TEXT, **most), ids, _list(ids, **most)]}
    if name == "stop":
        string = {**_SOME_TEXT, "maxLength": MAX_STOP_LENGTH}
        return {"anyOf": [string, _list(string, maxItems=MAX_STOPS), _NULL]}
    if name == "stream_options":
        known = {"include_usage": _or_null(_TRUTH), "include_obfuscation": {}}
        return _or_null(_object(known, list(known), additionalProperties=False))
    return dict(_FIELDS[name])


_FIELDS: dict[str, Schema] = {
    "model": _SOME_TEXT,
    "messages": _list(_ref("Message"), minItems=1),
    "stream": _or_null(_TRUTH),
    "source": _or_null(_TEXT),
    "format_of": _or_null(_TEXT),
    "fields": _or_null({"type": "object"}),
}


# --- replies ----------------------------------------------------------------------------------------------------------


def _writing(kind: str, own: Mapping[str, Schema], logprobs: str, *, piece: bool = False) -> Schema:
    """A reply of OpenAI's, or a piece of it in a stream."""
    ends = (*_ENDS, None) if piece else _ENDS
    told = {"logprobs": _or_null(_ref(logprobs)), "finish_reason": _one_of(*ends)}
    choices = _list(_object({"index": _WHOLE, **own, **told}))
    head = {"id": _TEXT, "object": _one_of(kind), "created": _WHOLE, "model": _TEXT}
    usage = _or_null(_USAGE) if piece else _USAGE
    return _object({**head, "choices": choices, "usage": usage}, ("usage",) if piece else ())


_ENDS = ("stop", "length")
_USAGE = _ref("Usage")
_TASK_HEAD = {"id": _TEXT, "created": _WHOLE, "model": _TEXT}
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list(_WHOLE))}
_MESSAGE = _object({"role": _one_of("assistant"), "content": _TEXT, "refusal": _NULL})
_DELTA = _object({"role": _one_of("assistant"), "content": _TEXT}, ("role", "content"))
_CACHE = ("hits", "misses", "evictions", "bytes", "loaded", "known", "refused")
_REASONS: Schema = {"type": "object", "additionalProperties": _TEXT, "description": "Why a file is not served."}

_REPLIES: dict[str, Schema] = {
    "Error": _object({
        "error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)}),
    }),
    "Models": _object({"object": _one_of("list"), "data": _list(_ref("Model"))}),
    "Model": _object({
        "id": _TEXT, "object": _one_of("model"), "created": _WHOLE, "owned_by": _TEXT,
        "kind": _one_of("backbone", "prefix"), "description": _TEXT, "task": _or_null(_TEXT), "license": _TEXT,
        "prefix_length": {"type": "object", "description": "Positions, by site."},
    }, ("prefix_length", "license")),
    "Usage": _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _WHOLE)),
    "Logprobs": _object({
        "tokens": _list(_TEXT), "token_logprobs": _list(_NUMBER), "text_offset": _list(_WHOLE),
        "top_logprobs": _list({"type": "object", "additionalProperties": _NUMBER}),
    }),
    "ChatLogprobs": _object({
        "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})), "refusal": _NULL,
    }),
    "Completion": _writing("text_completion", {"text": _TEXT}, "Logprobs"),
    "CompletionChunk": _writing("text_completion", {"text": _TEXT}, "Logprobs", piece=True),
    "Chat": _writing("chat.completion", {"message": _MESSAGE}, "ChatLogprobs"),
    "ChatChunk": _writing("chat.completion.chunk", {"delta": _DELTA}, "ChatLogprobs", piece=True),
    "Task": _object({
        "id": _TEXT, "task": _or_null(_TEXT), "fields": _list(_ref("TaskField")),
        "max_tokens": {**_or_null(_WHOLE), "description": "The task's own."},
    }),
    "TaskField": _object({
        "name": _TEXT, "kind": _one_of("line", "text", "attributes", "triples"), "example": {}, "parts": _list(_TEXT),
    }),
    "TaskOutput": _object({
        **_TASK_HEAD, "object": _one_of("task.output"), "source": _TEXT, "output": _TEXT,
        "finish_reason": _one_of(*_ENDS), "usage": _USAGE,
    }),
    "TaskOutputChunk": {"anyOf": [
        _object({**_TASK_HEAD, "object": _one_of("task.output.chunk"), "delta": _TEXT}),
        {**_ref("TaskOutput"), "description": "The last one."},
    ]},
    "Status": _object({
        "draining": _TRUTH, "seconds": _NUMBER, "slots": _WHOLE, "waiting": _WHOLE, "steps": _WHOLE, "tokens": _WHOLE,
        "running": _list(_object({
            "slot": _WHOLE, "model": _or_null(_TEXT), "prompt_tokens": _WHOLE, "new_tokens": _WHOLE,
        })),
        "cache": _object(dict.fromkeys(("prefixes", "bytes", "hits", "misses"), _WHOLE)),
    }),
    "Health": _object({"status": _TEXT, "folder": _TEXT}),
    "Prefixes": _object({
        "prefixes": _list(_TEXT), "refused": _REASONS, "cache": _object(dict.fromkeys(_CACHE, _WHOLE)),
    }),
    "PrefixHeader": _object({"name": _TEXT, "header": {"type": "object"}}),
    "Uploaded": _object({"name": _TEXT, "bytes": _WHOLE, "replaced": _TRUTH}),
    "Reloaded": _object({"added": _list(_TEXT), "removed": _list(_TEXT), "refused": _REASONS}),
}  # fmt: skip


# --- operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation:
    """What one method of one path does.

    Attributes:
        name: In programs.
        summary: In a few words.
        replies: Content by status.
        body: Content of the request's body; None: it has none.
        errors: Statuses that are not those of its kind.
    """

    name: str
    summary: str
    replies: Mapping[int, Schema | None]
    body: Schema | None = None
    errors: tuple[int, ...] = ()


_HEALTH = {200: _json(_ref("Health")), 503: _json(_ref("Health"))}
_UPLOAD = {200: _json(_ref("Uploaded")), 201: _json(_ref("Uploaded"))}
_PLACE = "/admin/prefixes/{name}"
_OPERATIONS = {
    ("GET", "/v1/models"): _Operation("list_models", "The models that the key may use", {200: _json(_ref("Models"))}),
    ("GET", "/v1/models/{name}"): _Operation("show_model", "One model", {200: _json(_ref("Model"))}, errors=(404, 503)),
    ("POST", "/v1/completions"): _Operation(
        "complete", "Text after a prompt", {200: _whole_or_stream("Completion")}, _json(_ref("CompletionRequest"))
    ),
    ("POST", "/v1/chat/completions"): _Operation(
        "chat",
        "An answer, by the prefix's text format or the backbone's chat template",
        {200: _whole_or_stream("Chat")},
        _json(_ref("ChatRequest")),
    ),
    ("GET", "/v1/tasks/{name}"): _Operation(
        "show_task", "What a prefix's task takes", {200: _json(_ref("Task"))}, errors=(404, 503)
    ),
    ("POST", "/v1/tasks/{name}"): _Operation(
        "do_task", "The output of a prefix's task", {200: _whole_or_stream("TaskOutput")}, _json(_ref("TaskRequest"))
    ),
    ("GET", "/v1/status"): _Operation("show_status", "What runs now", {200: _json(_ref("Status"))}),
    ("GET", "/admin/prefixes"): _Operation(
        "list_prefixes", "All prefixes, and refused files", {200: _json(_ref("Prefixes"))}
    ),
    ("GET", _PLACE): _Operation(
        "inspect_prefix", "A prefix's header", {200: _json(_ref("PrefixHeader"))}, errors=(404, 503)
    ),
    ("PUT", _PLACE): _Operation("put_prefix", "Upload or replace a prefix", _UPLOAD, _BYTES),
    ("POST", _PLACE): _Operation("post_prefix", "The same as PUT", _UPLOAD, _BYTES),
    ("DELETE", _PLACE): _Operation("delete_prefix", "Delete a prefix", {204: None}, errors=(400, 404, 507)),
    ("POST", "/admin/reload"): _Operation(
        "reload_prefixes", "Look through the folder", {200: _json(_ref("Reloaded"))}, errors=(507,)
    ),
    ("GET", "/healthz"): _Operation("is_alive", "Whether the engine runs", _HEALTH),
    ("GET", "/readyz"): _Operation("is_ready", "Whether requests are taken", _HEALTH),
    ("GET", "/metrics"): _Operation("show_metrics", "Figures for Prometheus", {200: {"text/plain": {"schema": _TEXT}}}),
    ("GET", "/openapi.json"): _Operation("show_interface", "This document", {200: _json({"type": "object"})}),
    ("GET", "/"): _Operation("show_page", "A page to try things on", {200: {"text/html": {"schema": _TEXT}}}),
}

_ERRORS = {
    400: "A field (`param`), the name or the body is wrong.",
    401: "No key, or an unknown one.",
    403: "Not this key's model or right.",
    404: "No such model or prefix.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The key's limits, or a full queue.",
    500: "Something failed here; the log tells more of the reply's `x-request-id`.",
    503: "About to stop, the engine is being made anew, or the model's file is broken.",
    504: "Not done in time.",
    507: "No space, or the folder cannot be written; what was there is untouched.",
}
_LATER: Schema = {"Retry-After": {"description": "Seconds, where it is worth it.", "schema": _WHOLE}}


def _operation(path: str, method: str, app: ASGIApp, config: ServeConfig) -> Schema:
    path = path.replace(":path", "")
    operation = _OPERATIONS[method, path]
    told: Schema = {"operationId": operation.name, "summary": operation.summary}
    if "{name}" in path:
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _SOME_TEXT}]
    errors = {500, *operation.errors}
    if operation.body is not None:
        errors |= {400, 408, 413}
        uploads = operation.body is _BYTES
        errors |= {507} if uploads else {415}
        most = config.max_upload_mib * 2**20 if uploads else config.max_body_kib * 2**10
        text = f"At most {most:,} bytes."
        told["requestBody"] = {"required": True, "description": text, "content": operation.body}
    # Health and the page are for whoever asks.
    if isinstance(app, Endpoint):
        errors |= {401, 403}
        told["security"] = [{"key": []}] if config.keys else []
        if app.needs != "key":
            told["description"] = f"Needs a key with the right {app.needs!r}."
        if app.counted:
            errors |= {404, 429, 503, 504}
    told["responses"] = {
        **{str(status): _response(status, content) for status, content in operation.replies.items()},
        **{
            str(status): {"$ref": f"#/components/responses/{status}"}
            for status in sorted(errors - operation.replies.keys())
        },
    }
    return told


def _response(status: int, content: Schema | None) -> Schema:
    text = {201: "Taken in; it is new.", 204: "Deleted.", 503: "Not now."}.get(status, "As asked.")
    return {"description": text, **({} if content is None else {"content": content})}


def _failure(status: int) -> Schema:
    told = {"description": _ERRORS[status], "content": _json(_ref("Error"))}
    return {**told, "headers": _LATER} if status in (429, 503) else told
