"""JSON responses, and errors in OpenAI's shape."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from prefixtune.errors import DataError, PrefixError, RequestError, did_you_mean

__all__ = [
    "ApiError",
    "api_error",
    "bad_request",
    "capitalize",
    "forbidden",
    "json_response",
    "json_text",
    "not_found",
    "storage_error",
    "too_many_requests",
    "unavailable",
]


_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_MESSAGE_LENGTH = 1000
# Made once: this is done for every token.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


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
        self.status, self.code = status, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The response."""
        return json_response(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None, *, hint: str = "") -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, f"{message} {capitalize(hint)}" if hint else message, param=param, code=code)


def forbidden(message: str, code: str) -> ApiError:
    """403: the caller may not do this."""
    return ApiError(403, message, code=code)


def not_found(what: str, name: str, known: list[str] | None = None) -> ApiError:
    """404: there is no such thing; suggests the nearest of the `known` names."""
    hint = f" {capitalize(did_you_mean(name, known))}" if known else ""
    return ApiError(404, f"there is no {what} {name[:128]!r}.{hint}", code=f"{what.replace(' ', '_')}_not_found")


def too_many_requests(message: str, code: str, retry_after: float) -> ApiError:
    """429: try again later."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


def unavailable(message: str, code: str, *, retry_after: int = 0) -> ApiError:
    """503: the server is at fault; without `retry_after`, clients should not retry by themselves."""
    headers = {"Retry-After": str(retry_after)} if retry_after else {"x-should-retry": "false"}
    return ApiError(503, message, code=code, headers=headers)


def storage_error(error: BaseException, what: str, folder: str) -> ApiError:
    """What the disk refused, by an error or its causes: it is full, or fails; or too many files are open.

    Args:
        error: What was raised; the response names no path.
        what: There is no space for it.
        folder: What cannot be changed.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    codes = {cause.errno for cause in causes if isinstance(cause, OSError)}
    if codes & {errno.ENOSPC, errno.EDQUOT}:
        return ApiError(507, f"there is no space for {what}; nothing was changed.", code="no_space")
    if codes & {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
        return unavailable("the server has too many files open; try again later.", "busy", retry_after=5)
    reason = next((os.strerror(code) for code in codes if code), "unknown reason")
    return ApiError(507, f"{folder} cannot be changed ({reason}); nothing was changed.", code="storage_failed")


def api_error(error: PrefixError) -> ApiError:
    """An error of this project: 400 where the request is at fault, else 503.

    Only for messages that contain no path: those of the engine, its store, and the tasks.
    """
    if isinstance(error, RequestError | DataError):
        return bad_request(error.message, hint=error.hint)
    return unavailable(error.message, "not_served")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE_LENGTH else f"{text[:_MAX_MESSAGE_LENGTH]} ..."


def capitalize(text: str) -> str:
    """A sentence with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, *, is_large: bool = False
) -> Response:
    """A JSON response; arguments as of `json_text`."""
    return Response(json_text(value, is_large=is_large), status, headers, media_type="application/json")


def json_text(value: Any, *, is_large: bool = False) -> str:
    """A value as compact JSON, valid UTF-8 whatever a model generated.

    Args:
        value: Of JSON's types.
        is_large: Do it in Python, in half the speed: in a thread, other threads then go on meanwhile.
    """
    text = "".join(_ENCODER.iterencode(value)) if is_large else _ENCODER.encode(value)
    # A model's bytes can give half a surrogate pair, which is not UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")
