"""JSON responses, and errors in OpenAI's shape: one class that endpoints raise, and how all others are told."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from prefixtune.errors import BackboneError, CheckpointError, ConfigError, DataError, PrefixError, RequestError, causes

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "unknown_path", 405: "method_not_allowed", 413: "body_too_large"}
_MAX_MESSAGE_LENGTH = 1000
_MAX_FAULTS = 10
"""Most fields at fault that an answer lists."""
# Made once: this is done for every token.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_FIELD = re.compile(r"(?!(str|int|float|bool)$)[a-z_]+")
"""A field in the place of an error; other parts of it name types."""


def json_text(value: Any) -> str:
    """A value as compact JSON, valid UTF-8 whatever a model generated."""
    # A model's bytes can give half a surrogate pair, which is not UTF-8.
    return _ENCODER.encode(value).encode("utf-8", "replace").decode("utf-8")


class JsonAnswer(JSONResponse):
    """A JSON response."""

    def render(self, content: Any) -> bytes:
        """As `json_text`."""
        return json_text(content).encode()


class ApiError(Exception):
    """A request is answered with an error.

    Attributes:
        status: HTTP status.
        message: For people; names no path.
        code: For programs.
        param: The field at fault.
        headers: Such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        # Both may repeat what was sent, however long it was.
        self.message, self.param = _shorten(message), None if param is None else _shorten(param)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonAnswer:
        """The response."""
        return JsonAnswer(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None, *, hint: str = "") -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, f"{message} {hint[:1].upper()}{hint[1:]}".rstrip(), param=param, code=code)


def forbidden(message: str, code: str) -> ApiError:
    """403: the caller may not do this."""
    return ApiError(403, message, code=code)


def not_found(what: str, name: str) -> ApiError:
    """404: there is no such thing."""
    return ApiError(404, f"there is no {what} {name[:128]!r}.", code=f"{what.replace(' ', '_')}_not_found")


def too_many_requests(message: str, code: str, retry_after: float) -> ApiError:
    """429: try again later."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


def unavailable(message: str, code: str, *, retry_after: int = 0) -> ApiError:
    """503: the server is at fault; without `retry_after`, clients should not retry by themselves."""
    headers = {"Retry-After": str(retry_after)} if retry_after else {"x-should-retry": "false"}
    return ApiError(503, message, code=code, headers=headers)


def storage_error(error: BaseException) -> ApiError:
    """507: the disk refused something, by an error or its causes; the response names no path."""
    codes = [one.errno for one in causes(error) if isinstance(one, OSError) and one.errno]
    reason = os.strerror(codes[0]) if codes else "unknown reason"
    return ApiError(507, f"a folder of this server cannot be used ({reason}).", code="storage_failed")


def api_error(error: PrefixError) -> ApiError:
    """An error of this project: 507 where the disk refuses, 400 where the request is at fault, else 503.

    Only for messages that contain no path: those of the engine, the folder of prefixes, and the tasks.
    """
    if any(isinstance(one, OSError) for one in causes(error)):
        return storage_error(error)
    if isinstance(error, RequestError | DataError | BackboneError | ConfigError):
        # Some say what is at fault.
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return bad_request(error.message, param, code, hint=error.hint)
    if isinstance(error, CheckpointError):
        return unavailable(error.message, "model_not_served")
    return unavailable(error.message, "busy", retry_after=5)


# --- what FastAPI and this project raise ------------------------------------------------------------------------------


def handle_errors(app: FastAPI) -> None:
    """Answer all errors of an application in OpenAI's shape."""
    for kind in (ApiError, PrefixError, OSError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _respond)


async def _respond(request: Request, error: Exception) -> JsonAnswer:
    refusal, log_fields = _refusal(error), request.scope["log_fields"]
    log_fields["refused"] = refusal.code or "invalid_request"
    if refusal.status == 507:
        log_fields.setdefault("storage_error", str(error))
    if refusal.status in (401, 403, 429, 503):
        request.app.state.server.metrics.rejected.labels(refusal.code or "unavailable").inc()
    return refusal.response()


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PrefixError):
        return api_error(error)
    if isinstance(error, OSError):
        return storage_error(error)
    if isinstance(error, RequestValidationError):
        return _explain(error)
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), code=_CODES.get(error.status_code), headers=error.headers)


def _explain(error: RequestValidationError) -> ApiError:
    """The faults that pydantic found, a field each, with the first one's name and code."""
    faults = error.errors()
    first = faults[0]
    if isinstance(first.get("input"), bytes):
        return ApiError(415, "the content type must be application/json.", code="unsupported_media_type")
    if first["type"] == "json_invalid":
        return bad_request(f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}.")
    told: dict[str, str] = {}
    for fault in faults:
        text = "unknown field" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        # Of a field that takes several types, only the first fault is told.
        told.setdefault(_param(fault["loc"], fault["type"]), text)
    sentences = [f"{name}: {text}" if name else text for name, text in list(told.items())[:_MAX_FAULTS]]
    code = "unknown_field" if first["type"] == "extra_forbidden" else None
    return bad_request(f"{'; '.join(sentences)}.", next(iter(told)) or None, code)


def _param(place: tuple[int | str, ...], kind: str) -> str:
    """The field at an error's place, as in `messages[0].role`."""
    name = ""
    for number, part in enumerate(place[1:], 2):
        if isinstance(part, str) and not (
            _FIELD.fullmatch(part) or (kind == "extra_forbidden" and number == len(place))
        ):
            break
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE_LENGTH else f"{text[:_MAX_MESSAGE_LENGTH]} ..."
