"""The server's interface as an OpenAPI 3.1 document, from the routes and the models of their bodies and responses.

It contains the limits of this server, but no prefix and no key, so every caller may read it.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from prefixtune.server.api.endpoint import KeyContext
from prefixtune.server.api.openai_protocol import ChatRequest, CompletionRequest
from prefixtune.server.api.protocol import with_limits
from prefixtune.server.api.schemas import ChatChunk, CompletionChunk, Error, TaskOutputChunk
from prefixtune.server.api.task_protocol import ClassifyRequest, TaskRequest
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.api.training_schemas import FineTuningEvent
from prefixtune.server.limits import Limits
from prefixtune.server.settings import ServeConfig

__all__ = [
    "BYTES_BODY",
    "FILE_ID",
    "FORM_BODY",
    "NAME",
    "api_router",
    "errors",
    "json_body",
    "openapi_document",
    "router",
    "whole_or_stream",
]


_REF = "#/components/schemas/{model}"
_REQUESTS = (CompletionRequest, ChatRequest, TaskRequest, ClassifyRequest, FineTuningRequest)
_ERRORS = {
    400: "A field (`param`), the name or the body is wrong.",
    401: "The key is missing or unknown.",
    403: "The key may not use this model or endpoint.",
    404: "No such model, prefix or file.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body has another content type.",
    429: "A limit of the key or the address, or a full queue.",
    500: "An internal error; the log has more under the response's `x-request-id`.",
    503: "Shutting down, the engine is restarting, or the model's file is broken.",
    504: "The request was not done in time.",
    507: "No space, or the folder cannot be written; nothing was changed.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds, if a retry may succeed.", "schema": {"type": "integer"}}}

NAME = {
    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
}
"""The name in a path."""
FILE_ID = {
    "parameters": [{"name": "file_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
}
"""The id of a file in a path."""
FORM_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune", "document"]},
                    },
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
"""A form with a file to train on."""
BYTES_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {}}}}}
"""A file as the body."""


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}


def json_body(body: type[BaseModel], **example: Any) -> dict[str, Any]:
    """A model as the body, with an example of it."""
    content = {"application/json": {"schema": _ref(body), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses with these statuses are errors."""
    content = {"application/json": {"schema": _ref(Error)}}
    return {
        status: {"description": _ERRORS[status], "content": content}
        | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})
        for status in statuses
    }


def api_router(*statuses: int) -> APIRouter:
    """A router whose operations may all fail with these statuses; their ids are the names of the functions."""
    return APIRouter(responses=errors(*statuses), generate_unique_id_function=lambda route: route.name)


def whole_or_stream(whole: type[BaseModel], *events: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A whole response or, with `stream`, server-sent events."""
    event = {"anyOf": [*map(_ref, events), _ref(Error)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": event}
    stream = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"enum": ["[DONE]"]}, data]}},
        "required": ["data"],
        "description": "With stream: one event. The last one is [DONE], except after an error; comments keep the "
        "connection alive.",
    }
    return {200: {"model": whole, "content": {"text/event-stream": {"schema": stream}}}}


router = api_router(401, 403, 500)


@router.get("/openapi.json", response_model=dict[str, Any])
async def show_interface(context: KeyContext) -> Response:
    """This document."""
    return Response(context.request.app.state.document, media_type="application/json")


def openapi_document(app: FastAPI, config: ServeConfig, limits: Limits) -> dict[str, Any]:
    """The document.

    Args:
        app: The application.
        config: Of the server; the document contains its limits.
        limits: What a request may ask for.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, openapi_version="3.1.0"
    )
    for methods in document["paths"].values():
        for operation in methods.values():
            summary, _, description = operation.pop("description").partition("\n\n")
            operation |= {"summary": summary.rstrip("."), **({"description": description} if description else {})}
            if not config.keys:
                operation["security"] = []
            if body := operation.get("requestBody"):
                sizes = {
                    "application/octet-stream": config.max_upload_mib * 2**20,
                    "multipart/form-data": config.max_file_mib * 2**20,
                }
                size = next((sizes[kind] for kind in sizes if kind in body["content"]), config.max_body_kib * 2**10)
                body["description"] = f"At most {size:,} bytes."
    if not config.keys:
        del document["components"]["securitySchemes"]
    document["components"]["schemas"] |= _schemas(config, limits)
    return document


def _schemas(config: ServeConfig, limits: Limits) -> dict[str, Any]:
    """The models that FastAPI does not see: bodies, which are read within limits, and events."""
    models: list[Any] = [Error, CompletionChunk, ChatChunk, TaskOutputChunk, FineTuningEvent]
    models += [with_limits(model, limits) for model in _REQUESTS]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas: dict[str, Any] = definitions["$defs"]
    for model in _REQUESTS:
        for field in schemas[model.__name__]["properties"].values():
            if "description" in field:
                numbers = {
                    "length": config.default_max_tokens,
                    "texts": limits.max_texts,
                    "joined": limits.max_joined,
                }
                field["description"] = field["description"].format(**numbers)
    for model in (CompletionRequest, ChatRequest):
        schema = schemas[model.__name__]
        schema["properties"]["prefixes"] |= {"maxItems": limits.max_joined}
        schema["required"].remove("model")
        schema["anyOf"] = [{"required": ["model"]}, {"required": ["prefixes"]}]
    for prompt in schemas["CompletionRequest"]["properties"]["prompt"]["oneOf"]:
        if prompt["type"] == "array" and prompt["items"]["type"] != "integer":
            prompt["maxItems"] = limits.max_texts
    return schemas
