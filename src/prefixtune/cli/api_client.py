"""Requests to a server of OpenAI's interface: what comes back is bounded in size and time, and has a checked shape."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from prefixtune.errors import ConfigError, RequestError
from prefixtune.utils.console import safe_text

if TYPE_CHECKING:
    from httpx2 import URL, Client, Response

__all__ = ["ApiClient", "ServerAwayError", "check_url"]

_ModelT = TypeVar("_ModelT", bound=BaseModel)

_MAX_BODY, _MAX_EVENT, _MAX_MESSAGE = 16 * 2**20, 2**20, 2_000
"""Bytes of a response and of an event of a stream; characters of an error's message."""
_CONNECT_SECONDS, _ANSWER_SECONDS, _UPLOAD_SECONDS = 10.0, 60.0, 600.0
_SILENCE_SECONDS = 60.0
"""Longest silence of a stream, in which the server sends a comment every 15 seconds."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
_TRY_AGAIN = (429, 502, 503, 504)


class ServerAwayError(RequestError):
    """The server was not reached, broke off, or asks to come back later: another try may help.

    Args:
        message: As of every error.
        hint: As of every error.
        status: Of its answer; 0: there was none.
        pause: Seconds that the server asks to wait; None: it says nothing of it.
    """

    def __init__(self, message: str, *, hint: str = "", status: int = 0, pause: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status, self.pause = status, pause


class ApiClient:
    """Speaks to one server. A key is sent to it alone: redirects are not followed.

    Args:
        url: Where its interface is, such as `http://127.0.0.1:8000/v1`.
        key: Sent with each request; empty: none.
        patience: Seconds in which something is asked again where the server is away or overloaded.
        on_wait: Called with why the server is asked again.

    Raises:
        ConfigError: The URL or the key is not one.
    """

    def __init__(
        self, url: str, key: str = "", *, patience: float = 10.0, on_wait: Callable[[str], None] = lambda _: None
    ) -> None:
        import httpx2

        self.url = check_url(url)
        if key and not re.fullmatch(r"[\x21-\x7e]{1,4096}", key):
            raise ConfigError(
                "the key has characters that no key has, such as a space or a line break.",
                hint="copy it again, without what is around it.",
            )
        self.patience, self._on_wait, self._reached = patience, on_wait, False
        # Compressed responses would have no bound.
        headers = {"Accept-Encoding": "identity", "User-Agent": "prefixtune"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        host = httpx2.URL(self.url).host
        # Proxies of the environment are for other machines.
        self._client: Client = httpx2.Client(
            headers=headers, follow_redirects=False, trust_env=not _is_this_machine(host)
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, shape: type[_ModelT], **parameters: str | int) -> _ModelT:
        """Ask for something, patiently; `path` begins with a slash.

        Raises:
            ServerAwayError: The server is away or overloaded.
            RequestError: It refuses, or answers in another shape.
        """
        return self._patiently(lambda: self._ask("GET", path, shape, params=parameters), _TRY_AGAIN)

    def post(self, path: str, shape: type[_ModelT], body: Mapping[str, Any] | None = None) -> _ModelT:
        """Send JSON, once; raises as `get` does."""
        return self._ask("POST", path, shape, json=dict(body or {}))

    def create(self, path: str, shape: type[_ModelT], body: Mapping[str, Any]) -> _ModelT:
        """Make something by sending JSON, patiently: the server makes it once; raises as `get` does."""
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        # 429 says that there is too much already.
        statuses = tuple(status for status in _TRY_AGAIN if status != 429)
        return self._patiently(lambda: self._ask("POST", path, shape, json=dict(body), headers=headers), statuses)

    def delete(self, path: str, shape: type[_ModelT]) -> _ModelT:
        """Delete something, once; raises as `get` does."""
        return self._ask("DELETE", path, shape)

    def upload(self, path: str, shape: type[_ModelT], file: Path, fields: Mapping[str, str]) -> _ModelT:
        """Send a file as a form, read while it is sent; raises as `get` does.

        Raises:
            ConfigError: The file cannot be read.
        """
        with _opened(file) as stream:
            form = {"data": dict(fields), "files": {"file": (file.name, stream, "application/octet-stream")}}
            return self._ask("POST", path, shape, seconds=_UPLOAD_SECONDS, **form)

    def stream(self, path: str, shape: type[_ModelT], **parameters: str | int) -> Iterator[_ModelT]:
        """The events of a stream until its end; raises as `get` does, and does not ask again."""
        with self._answering("GET", path, seconds=_SILENCE_SECONDS, params=parameters) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise _foreign(response, "no stream of events")
            for data in _events(response):
                if data == "[DONE]":
                    return
                if data.startswith('{"error"') and (message := _error_message(data)):
                    raise ServerAwayError(message, hint="try again later.", status=200)
                yield _read(response, shape, data)

    def _patiently(self, ask: Callable[[], _ModelT], statuses: Collection[int]) -> _ModelT:
        """Ask again where the server breaks off, or answers with one of these statuses."""
        end, pause = time.monotonic() + self.patience, _FIRST_PAUSE
        while True:
            try:
                return ask()
            except ServerAwayError as error:
                wait = pause if error.pause is None else error.pause
                # One that has never answered may not be there at all.
                in_vain = not self._reached or (error.status and error.status not in statuses)
                if in_vain or time.monotonic() + wait > end:
                    raise
                self._on_wait(error.message)
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _ask(
        self, method: str, path: str, shape: type[_ModelT], *, seconds: float = _ANSWER_SECONDS, **options: Any
    ) -> _ModelT:
        with self._answering(method, path, seconds=seconds, **options) as response:
            return _read(response, shape, _body(response, seconds))

    @contextlib.contextmanager
    def _answering(self, method: str, path: str, *, seconds: float, **options: Any) -> Iterator[Response]:
        """A response of success whose body is not read yet; what the library raises meanwhile becomes one error."""
        import httpx2

        timeout = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS)
        try:
            with self._client.stream(method, self.url + path, timeout=timeout, **options) as response:
                self._reached = True
                _check_status(response)
                yield response
        except httpx2.ConnectTimeout as error:
            raise ServerAwayError(f"{self.url} cannot be reached in time.", hint="does --url name it?") from error
        except httpx2.TimeoutException as error:
            raise ServerAwayError(f"{self.url} does not answer in time.", hint="try again later.") from error
        except httpx2.ConnectError as error:
            raise ServerAwayError(
                f"{self.url} cannot be reached: {_reason(error)}.",
                hint="start it with `prefixtune serve`, or name another one with --url.",
            ) from error
        except httpx2.TransportError as error:
            raise ServerAwayError(
                f"the connection to {self.url} broke off: {_reason(error)}.", hint="try again."
            ) from error


def check_url(text: str) -> str:
    """The address of an interface, without a slash at its end; `/v1` is added where there is no path.

    Raises:
        ConfigError: It is no such address.

    >>> check_url("http://127.0.0.1:8000/"), check_url("https://models.example/prefixtune/v1/")
    ('http://127.0.0.1:8000/v1', 'https://models.example/prefixtune/v1')
    """
    import httpx2

    try:
        url: URL = httpx2.URL(text)
        valid = url.scheme in ("http", "https") and url.host and not (url.userinfo or url.query or url.fragment)
    except (httpx2.InvalidURL, ValueError):
        valid = False
    if not valid:
        raise ConfigError(
            f"--url is {safe_text(text)[:200]!r}, but must be an address of http or https, without a key in it.",
            hint="as in --url http://127.0.0.1:8000/v1.",
        )
    path = url.path.rstrip("/")
    return str(url.copy_with(path=path or "/v1"))


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        stream = file.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {str(file)!r}: {error.strerror or error}.", hint="check the path.") from error
    with stream:
        yield stream


def _body(response: Response, seconds: float) -> bytes:
    """All bytes of a response, within limits of size and time."""
    end, body = time.monotonic() + seconds, bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > _MAX_BODY:
            raise _foreign(response, f"more than {_MAX_BODY:,} bytes")
        if time.monotonic() > end:
            raise ServerAwayError(f"{_origin(response)} answers too slowly.", hint="try again later.")
    return bytes(body)


def _events(response: Response) -> Iterator[str]:
    """The data of each event of a stream, one line each, as servers of this interface write them."""
    buffer = b""
    for chunk in response.iter_raw():
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            name, _, value = line.decode("utf-8", "replace").rstrip("\r").partition(":")
            if name == "data":
                yield value.removeprefix(" ")
        if len(buffer) > _MAX_EVENT:
            raise _foreign(response, f"an event of more than {_MAX_EVENT:,} bytes")


def _check_status(response: Response) -> None:
    """Raise what the server says instead of an answer."""
    status = response.status_code
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        target = safe_text(response.headers.get("location", ""))[:200]
        raise RequestError(
            f"{_origin(response)} redirects to {target!r}, where a key is not sent.",
            hint="name that address with --url if you trust it.",
        )
    message, pause = _message(response), _retry_after(response)
    if status in _TRY_AGAIN:
        hint = "try again later." if pause is None else f"try again in {pause:.0f} s."
        raise ServerAwayError(message, hint=hint, status=status, pause=pause)
    needs_key = status == 401
    raise RequestError(
        message, hint="give a key with --key, or in the variable PREFIXTUNE_API_KEY." if needs_key else ""
    )


def _message(response: Response) -> str:
    """What the server says instead of an answer."""
    status, message = response.status_code, _error_message(_body(response, _ANSWER_SECONDS))
    return message or f"{_origin(response)} answers with the status {status}, and no error of OpenAI's interface."


def _error_message(text: str | bytes) -> str:
    """The message of an error in OpenAI's shape, in one line; empty: it is none."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""
    return " ".join(safe_text(message[:_MAX_MESSAGE]).split()) if isinstance(message, str) else ""


def _retry_after(response: Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


def _read(response: Response, shape: type[_ModelT], text: str | bytes) -> _ModelT:
    try:
        return shape.model_validate(json.loads(text))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))[:100]
        raise _foreign(response, f"{where or 'the object'}: {fault['msg'][:200]}") from error
    except (ValueError, RecursionError) as error:
        raise _foreign(response, "no JSON") from error


def _foreign(response: Response, what: str) -> RequestError:
    return RequestError(
        f"{_origin(response)} answers in a shape that OpenAI's interface does not have: {safe_text(what)}.",
        hint="does --url name a server of `prefixtune serve`, with /v1 at its end?",
    )


def _origin(response: Response) -> str:
    return str(response.request.url.copy_with(query=None))


def _reason(error: Exception) -> str:
    return safe_text(str(error))[:200].rstrip(".") or type(error).__name__
