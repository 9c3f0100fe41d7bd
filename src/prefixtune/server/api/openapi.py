"""The server's interface as an OpenAPI 3.1 document.

The schemas of requests come from the tables that `protocol` checks them by, and who may call a route from its endpoint.
The schemas of responses are written here; tests compare them with real responses. The document names no prefix and no
key, so every caller may read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from starlette.types import ASGIApp

from prefixtune import __version__
from prefixtune.server.api.endpoint import Endpoint
from prefixtune.server.api.protocol import (
    FIELDS,
    IGNORED,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MESSAGE_FIELDS,
    ROLES,
    UNSUPPORTED,
)
from prefixtune.server.limits import Limits
from prefixtune.server.models.task_schema import FieldKind
from prefixtune.server.settings import ServeConfig

__all__ = ["OPERATIONS", "openapi_document"]


Schema = dict[str, Any]
Paths = Mapping[str, Mapping[str, ASGIApp]]


def openapi_document(paths: Paths, config: ServeConfig, limits: Limits) -> Schema:
    """The document.

    Args:
        paths: The routes: path -> method -> application.
        config: Of the server; the document contains its limits.
        limits: What a request may ask for.
    """
    described: dict[str, Schema] = {}
    for path, methods in paths.items():
        operations = described.setdefault(path.replace(":path", ""), {})
        for method, app in methods.items():
            operations[method.lower()] = _operation(path, method, app, config)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "prefixtune",
            "version": __version__,
            "description": (
                "One frozen language model and many prefixes. /v1/models, /v1/completions and /v1/chat/completions "
                "are OpenAI's; /v1/tasks takes the fields of a prefix's own task. Every GET is also a HEAD."
            ),
        },
        "paths": described,
        "components": {
            "schemas": {**_requests(config, limits), **_RESPONSES},
            "responses": {str(status): _error_response(status) for status in _ERRORS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "A key of this server."}},
        },
    }


# --- pieces of schemas ------------------------------------------------------------------------------------------------


def _object(fields: Mapping[str, Schema], optional: Sequence[str] = (), **more: Any) -> Schema:
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": dict(fields), **({"required": required} if required else {}), **more}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else {"anyOf": [schema, _NULL]}


def _one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_NONEMPTY: Schema = {"type": "string", "minLength": 1}
_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_BOOLEAN: Schema = {"type": "boolean"}
_NULL: Schema = {"type": "null"}
_BYTES: Schema = {"application/octet-stream": {"schema": {}}}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _whole_or_stream(name: str) -> Schema:
    """A whole response or, with `stream`, server-sent events."""
    chunk = {"anyOf": [_ref(f"{name}Chunk"), _ref("Error")]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}
    text = "With stream: one event. The last one is [DONE], except after an error; comments keep the connection alive."
    item = _object({"data": {"anyOf": [_one_of("[DONE]"), data]}}, description=text)
    return {**_json(_ref(name)), "text/event-stream": {"schema": item}}


# --- requests ---------------------------------------------------------------------------------------------------------

_DESCRIPTIONS = {
    "model": "A name that /v1/models lists.",
    "prompt": "With a prefix, a text is a source in the prefix's text format; token ids are used as they are.",
    "messages": "With a prefix, the last one is the source, and must be the user's.",
    "max_tokens": "Most new tokens; by default those of the prefix's task or {length}, as far as they fit.",
    "max_completion_tokens": "The newer name of max_tokens; used if both are present.",
    "min_tokens": "Fewest new tokens; at most max_tokens.",
    "temperature": "0: the likeliest token each time.",
    "top_k": "0: all tokens.",
    "n": "Texts for each prompt; at most {texts} for all prompts together.",
    "stop": "Strings that end a text; they are not part of it.",
    "stream_options": "Only with stream.",
    "top_logprobs": "Only with logprobs.",
    "source": "A text that is already linearized; instead of the task's own fields.",
    "fields": "The task's own fields, if one has the name of an option; otherwise they may be beside the options.",
    "format_of": "With the bare backbone: the prefix whose text format and fields are used.",
}


def _requests(config: ServeConfig, limits: Limits) -> dict[str, Schema]:
    """The schemas of bodies, from the tables of `protocol`."""

    def body(kind: str, required: Sequence[str], others: Schema, **own: Schema) -> Schema:
        fields = {name: own[name] if name in own else _field(name, limits) for name in FIELDS[kind]}
        for name, text in _DESCRIPTIONS.items():
            if name in fields:
                text = text.format(length=config.default_max_tokens, texts=limits.max_texts)
                fields[name] = {**fields[name], "description": text}
        return _object({**fields, **others}, [name for name in (*fields, *others) if name not in required])

    # OpenAI's clients may send them.
    others = {name: {"description": "Ignored."} for name in IGNORED} | {
        name: {**_one_of(*neutral, None), "description": f"Not supported: {why}."}
        for name, (why, neutral) in UNSUPPORTED.items()
    }
    closed = {"additionalProperties": False}
    task = {
        "max_tokens": {**_field("max_tokens", limits), "description": "Most new tokens; by default the task's own."},
        "temperature": {**_field("temperature", limits), "default": 0},
    }
    return {
        "CompletionRequest": {**body("completion", ("model", "prompt"), others), **closed},
        "ChatRequest": {**body("chat", ("model", "messages"), others, logprobs=_or_null(_BOOLEAN)), **closed},
        "TaskRequest": {
            **body("task", (), {}, **task),
            "description": "Options, and beside them the task's own fields, which GET lists.",
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
    """The schema of a field; null is the same as no field, except where the field is required."""
    if name in limits.ranges:
        allowed = limits.ranges[name]
        schema = _or_null(_INTEGER if allowed.integer else _NUMBER)
        minimum = "exclusiveMinimum" if allowed.exclusive_minimum else "minimum"
        schema |= {minimum: allowed.minimum, "maximum": allowed.maximum}
        return schema if allowed.default is None else {**schema, "default": allowed.default}
    if name == "prompt":
        count, ids = {"minItems": 1, "maxItems": limits.max_texts}, _list(_INTEGER, minItems=1)
        return {"anyOf": [_NONEMPTY, _list(_NONEMPTY, **count), ids, _list(ids, **count)]}
    if name == "stop":
        string = {**_NONEMPTY, "maxLength": MAX_STOP_LENGTH}
        return {"anyOf": [string, _list(string, maxItems=MAX_STOPS), _NULL]}
    if name == "stream_options":
        known = {"include_usage": _or_null(_BOOLEAN), "include_obfuscation": {}}
        return _or_null(_object(known, list(known), additionalProperties=False))
    return dict(_FIELDS[name])


_FIELDS: dict[str, Schema] = {
    "model": _NONEMPTY,
    "messages": _list(_ref("Message"), minItems=1),
    "stream": _or_null(_BOOLEAN),
    "source": _or_null(_TEXT),
    "format_of": _or_null(_TEXT),
    "fields": _or_null({"type": "object"}),
}


# --- responses --------------------------------------------------------------------------------------------------------


def _completion(kind: str, own: Mapping[str, Schema], logprobs: str, *, chunk: bool = False) -> Schema:
    """A response in OpenAI's shape, or a chunk of it in a stream."""
    reasons = (*_FINISH_REASONS, None) if chunk else _FINISH_REASONS
    shared = {"logprobs": _or_null(_ref(logprobs)), "finish_reason": _one_of(*reasons)}
    choices = _list(_object({"index": _INTEGER, **own, **shared}))
    head = {"id": _TEXT, "object": _one_of(kind), "created": _INTEGER, "model": _TEXT}
    usage = _or_null(_USAGE) if chunk else _USAGE
    return _object({**head, "choices": choices, "usage": usage}, ("usage",) if chunk else ())


_FINISH_REASONS = ("stop", "length")
_USAGE = _ref("Usage")
_TASK_HEAD = {"id": _TEXT, "created": _INTEGER, "model": _TEXT}
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list(_INTEGER))}
_MESSAGE = _object({"role": _one_of("assistant"), "content": _TEXT, "refusal": _NULL})
_DELTA = _object({"role": _one_of("assistant"), "content": _TEXT}, ("role", "content"))
_CACHE = ("hits", "misses", "evictions", "bytes", "loaded", "known", "refused")
_REASONS: Schema = {"type": "object", "additionalProperties": _TEXT, "description": "Why each file is not served."}

_RESPONSES: dict[str, Schema] = {
    "Error": _object({
        "error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)}),
    }),
    "Models": _object({"object": _one_of("list"), "data": _list(_ref("Model"))}),
    "Model": _object({
        "id": _TEXT, "object": _one_of("model"), "created": _INTEGER, "owned_by": _TEXT,
        "kind": _one_of("backbone", "prefix"), "description": _TEXT, "task": _or_null(_TEXT), "license": _TEXT,
        "prefix_length": {"type": "object", "description": "Positions, by site."},
    }, ("prefix_length", "license")),
    "Usage": _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _INTEGER)),
    "Logprobs": _object({
        "tokens": _list(_TEXT), "token_logprobs": _list(_NUMBER), "text_offset": _list(_INTEGER),
        "top_logprobs": _list({"type": "object", "additionalProperties": _NUMBER}),
    }),
    "ChatLogprobs": _object({
        "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})), "refusal": _NULL,
    }),
    "Completion": _completion("text_completion", {"text": _TEXT}, "Logprobs"),
    "CompletionChunk": _completion("text_completion", {"text": _TEXT}, "Logprobs", chunk=True),
    "Chat": _completion("chat.completion", {"message": _MESSAGE}, "ChatLogprobs"),
    "ChatChunk": _completion("chat.completion.chunk", {"delta": _DELTA}, "ChatLogprobs", chunk=True),
    "Task": _object({
        "id": _TEXT, "task": _or_null(_TEXT), "fields": _list(_ref("TaskField")),
        "max_tokens": {**_or_null(_INTEGER), "description": "The task's own."},
    }),
    "TaskField": _object({
        "name": _TEXT, "kind": _one_of(*get_args(FieldKind)), "example": {}, "parts": _list(_TEXT),
    }),
    "TaskOutput": _object({
        **_TASK_HEAD, "object": _one_of("task.output"), "source": _TEXT, "output": _TEXT,
        "finish_reason": _one_of(*_FINISH_REASONS), "usage": _USAGE,
    }),
    "TaskOutputChunk": {"anyOf": [
        _object({**_TASK_HEAD, "object": _one_of("task.output.chunk"), "delta": _TEXT}),
        {**_ref("TaskOutput"), "description": "The last one."},
    ]},
    "Status": _object({
        "draining": _BOOLEAN, "seconds": _NUMBER,
        **dict.fromkeys(("slots", "waiting", "steps", "tokens"), _INTEGER),
        "running": _list(_object({
            "slot": _INTEGER, "model": _or_null(_TEXT), "prompt_tokens": _INTEGER, "new_tokens": _INTEGER,
        })),
        "cache": _object(dict.fromkeys(("prefixes", "bytes", "hits", "misses"), _INTEGER)),
    }),
    "Health": _object({"status": _TEXT, "folder": _TEXT}),
    "Prefixes": _object({
        "prefixes": _list(_TEXT), "refused": _REASONS, "cache": _object(dict.fromkeys(_CACHE, _INTEGER)),
    }),
    "PrefixHeader": _object({"name": _TEXT, "header": {"type": "object"}}),
    "Uploaded": _object({"name": _TEXT, "bytes": _INTEGER, "replaced": _BOOLEAN}),
    "Reloaded": _object({"added": _list(_TEXT), "removed": _list(_TEXT), "refused": _REASONS}),
}  # fmt: skip


# --- operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation:
    """One method of one path.

    Attributes:
        name: Its `operationId`.
        summary: What it does, in a few words.
        responses: Content by status.
        body: Content of the request's body; None: it has none.
        errors: Its error statuses besides those of all similar operations.
    """

    name: str
    summary: str
    responses: Mapping[int, Schema | None]
    body: Schema | None = None
    errors: tuple[int, ...] = ()


_HEALTH = {200: _json(_ref("Health")), 503: _json(_ref("Health"))}
_UPLOAD = {200: _json(_ref("Uploaded")), 201: _json(_ref("Uploaded"))}
_PREFIX_PATH = "/admin/prefixes/{name}"
OPERATIONS = {
    ("GET", "/v1/models"): _Operation("list_models", "The models that the key may use", {200: _json(_ref("Models"))}),
    ("GET", "/v1/models/{name}"): _Operation("show_model", "One model", {200: _json(_ref("Model"))}, errors=(404, 503)),
    ("POST", "/v1/completions"): _Operation(
        "complete", "Continue a prompt", {200: _whole_or_stream("Completion")}, _json(_ref("CompletionRequest"))
    ),
    ("POST", "/v1/chat/completions"): _Operation(
        "chat",
        "Answer a chat, in the prefix's text format or the backbone's chat template",
        {200: _whole_or_stream("Chat")},
        _json(_ref("ChatRequest")),
    ),
    ("GET", "/v1/tasks/{name}"): _Operation(
        "show_task", "The fields of a prefix's task", {200: _json(_ref("Task"))}, errors=(404, 503)
    ),
    ("POST", "/v1/tasks/{name}"): _Operation(
        "do_task", "The output of a prefix's task", {200: _whole_or_stream("TaskOutput")}, _json(_ref("TaskRequest"))
    ),
    ("GET", "/v1/status"): _Operation("show_status", "What runs now", {200: _json(_ref("Status"))}),
    ("GET", "/admin/prefixes"): _Operation(
        "list_prefixes", "All prefixes, and refused files", {200: _json(_ref("Prefixes"))}
    ),
    ("GET", _PREFIX_PATH): _Operation(
        "inspect_prefix", "A prefix's header", {200: _json(_ref("PrefixHeader"))}, errors=(404, 503)
    ),
    ("PUT", _PREFIX_PATH): _Operation("put_prefix", "Upload or replace a prefix", _UPLOAD, _BYTES),
    ("POST", _PREFIX_PATH): _Operation("post_prefix", "The same as PUT", _UPLOAD, _BYTES),
    ("DELETE", _PREFIX_PATH): _Operation("delete_prefix", "Delete a prefix", {204: None}, errors=(400, 404, 507)),
    ("POST", "/admin/reload"): _Operation(
        "reload_prefixes", "Reload the folder", {200: _json(_ref("Reloaded"))}, errors=(507,)
    ),
    ("GET", "/healthz"): _Operation("is_alive", "Whether the engine runs", _HEALTH),
    ("GET", "/readyz"): _Operation("is_ready", "Whether requests are accepted", _HEALTH),
    ("GET", "/metrics"): _Operation("show_metrics", "Metrics for Prometheus", {200: {"text/plain": {"schema": _TEXT}}}),
    ("GET", "/openapi.json"): _Operation("show_interface", "This document", {200: _json({"type": "object"})}),
    ("GET", "/"): _Operation("show_page", "A page to try things on", {200: {"text/html": {"schema": _TEXT}}}),
}

_ERRORS = {
    400: "A field (`param`), the name or the body is wrong.",
    401: "The key is missing or unknown.",
    403: "The key may not use this model or endpoint.",
    404: "No such model or prefix.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "A limit of the key or the address, or a full queue.",
    500: "An internal error; the log has more under the response's `x-request-id`.",
    503: "Shutting down, the engine is restarting, or the model's file is broken.",
    504: "The request was not done in time.",
    507: "No space, or the folder cannot be written; nothing was changed.",
}
_RETRY_AFTER: Schema = {"Retry-After": {"description": "Seconds, if a retry may succeed.", "schema": _INTEGER}}


def _operation(path: str, method: str, app: ASGIApp, config: ServeConfig) -> Schema:
    path = path.replace(":path", "")
    operation = OPERATIONS[method, path]
    described: Schema = {"operationId": operation.name, "summary": operation.summary}
    if "{name}" in path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _NONEMPTY}]
    errors = {500, *operation.errors}
    if operation.body is not None:
        errors |= {400, 408, 413}
        uploads = operation.body is _BYTES
        errors |= {507} if uploads else {415}
        limit = config.max_upload_mib * 2**20 if uploads else config.max_body_kib * 2**10
        text = f"At most {limit:,} bytes."
        described["requestBody"] = {"required": True, "description": text, "content": operation.body}
    # Health and the playground need no key.
    if isinstance(app, Endpoint):
        errors |= {401, 403}
        described["security"] = [{"key": []}] if config.keys else []
        if app.right != "key":
            described["description"] = f"Needs a key with the right {app.right!r}."
        if app.limited:
            errors |= {404, 429, 503, 504}
    described["responses"] = {
        **{str(status): _response(status, content) for status, content in operation.responses.items()},
        **{
            str(status): {"$ref": f"#/components/responses/{status}"}
            for status in sorted(errors - operation.responses.keys())
        },
    }
    return described


def _response(status: int, content: Schema | None) -> Schema:
    text = {201: "Added.", 204: "Deleted.", 503: "Not ready."}.get(status, "Success.")
    return {"description": text, **({} if content is None else {"content": content})}


def _error_response(status: int) -> Schema:
    described = {"description": _ERRORS[status], "content": _json(_ref("Error"))}
    return {**described, "headers": _RETRY_AFTER} if status in (429, 503) else described
