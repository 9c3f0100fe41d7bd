"""OpenAI's files and fine-tuning jobs of a server."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefixtune.errors import ConfigError, RequestError

__all__ = ["Event", "FileView", "JobView", "JobsClient"]

_ViewT = TypeVar("_ViewT", bound="_View")
_ENDED = ("succeeded", "failed", "cancelled", "paused")
_JOBS, _PAGE = "/fine_tuning/jobs", 100
_PAUSE = 1.0
_AWAY = (502, 503, 504)
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 600.0


class _View(BaseModel):
    """What a server says; it may say more than is needed here."""

    model_config = ConfigDict(extra="allow")

    id: str


class FileView(_View):
    """An uploaded file."""

    filename: str = ""
    bytes: int = 0
    purpose: str = ""
    created_at: int = 0
    status: str = ""
    status_details: str | None = None


class JobView(_View):
    """A job as it stands."""

    status: str
    model: str = ""
    created_at: int = 0
    fine_tuned_model: str | None = None
    error: dict[str, Any] | None = None
    prefixtune: dict[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the result is, or will be, served as; empty: the server does not say."""
        return self.fine_tuned_model or str(self.prefixtune.get("name") or "")


class Event(_View):
    """Something that happened in a job."""

    message: str = ""
    level: str = "info"
    type: str | None = None
    data: dict[str, Any] | None = None


class JobsClient:
    """What a server can be asked to train.

    A key is sent to this server alone: redirects are not followed. Every method raises a `RequestError` where the
    server is away, refuses, or answers in another shape.

    Args:
        url: Where its interface is, such as `http://127.0.0.1:8000/v1`.
        key: Sent with each request; empty: none.
        patience: Seconds in which a question is asked again while the server is away.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(self, url: str, key: str, patience: float) -> None:
        import httpx2

        if not re.match(r"https?://[^@/?#]+(/[^?#]*)?$", url):
            raise ConfigError(
                "--url must be an address of http or https, without a key in it.", hint="http://127.0.0.1:8000/v1, say."
            )
        self.url, self._patience = url.rstrip("/"), patience
        # Proxies of the environment are for other machines.
        is_here = httpx2.URL(url).host in ("localhost", "127.0.0.1", "::1")
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=not is_here,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def bare_model(self) -> str:
        """The name of the model without a prefix."""
        models = self._list("/models", _View)
        bare = [model.id for model in models if (model.model_extra or {}).get("parent") is None]
        if len(bare) != 1:
            raise RequestError(
                f"{self.url} does not say which of its models is the bare one.", hint="name it with --model."
            )
        return bare[0]

    def upload(self, file: Path, purpose: str) -> FileView:
        """Upload a file."""
        try:
            with file.open("rb") as stream:
                return self._one(FileView, "POST", "/files", data={"purpose": purpose}, files={"file": stream})
        except OSError as error:
            raise ConfigError(f"cannot read {str(file)!r}: {error.strerror}.", hint="check the path.") from error

    def files(self, limit: int) -> list[FileView]:
        """Uploaded files, the newest first."""
        return self._list("/files", FileView, limit=limit)

    def jobs(self, limit: int) -> list[JobView]:
        """Jobs, the newest first."""
        return self._list(_JOBS, JobView, limit=limit)

    def delete(self, kind: str, name: str) -> None:
        """Delete one of the `files` or `models`."""
        self._ask("DELETE", f"/{kind}/{quote(name, safe='')}")

    def create(self, request: dict[str, Any]) -> JobView:
        """Ask for a training, again if need be: by its key the server makes it once."""
        return self._one(JobView, "POST", _JOBS, json=request, headers={"Idempotency-Key": secrets.token_hex(16)})

    def job(self, job_id: str) -> JobView:
        """One job."""
        return self._one(JobView, "GET", f"{_JOBS}/{quote(job_id, safe='')}")

    def change(self, job_id: str, action: str) -> JobView:
        """Cancel, pause or resume a job; returns how it stands then."""
        return self._one(JobView, "POST", f"{_JOBS}/{quote(job_id, safe='')}/{action}")

    def follow(self, job_id: str, on_event: Callable[[Event], None]) -> JobView:
        """Call `on_event` with each event, from the first on, until the job stands still; returns how it stands."""
        last = ""
        while True:
            job = self.job(job_id)
            for event in reversed(list(self._events_after(job_id, last))):
                last = event.id
                on_event(event)
            if job.status in _ENDED:
                return job
            time.sleep(_PAUSE)

    def _events_after(self, job_id: str, last: str) -> Iterator[Event]:
        """The events that came after one, the newest first."""
        where: dict[str, Any] = {"limit": _PAGE}
        while page := self._list(f"{_JOBS}/{quote(job_id, safe='')}/events", Event, **where):
            for event in page:
                if event.id == last:
                    return
                yield event
            if len(page) < _PAGE:
                return
            where["after"] = page[-1].id

    def _one(self, shape: type[_ViewT], method: str, path: str, **options: Any) -> _ViewT:
        return self._read(shape, self._ask(method, path, **options))

    def _list(self, path: str, shape: type[_ViewT], **parameters: str | int) -> list[_ViewT]:
        data = self._ask("GET", path, params=parameters)
        found = data.get("data") if isinstance(data, dict) else None
        return [self._read(shape, item) for item in (found if isinstance(found, list) else [None])]

    def _read(self, shape: type[_ViewT], value: object) -> _ViewT:
        try:
            return shape.model_validate(value)
        except ValidationError as error:
            raise self._foreign() from error

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer; a question, or what has a key, is asked again while the server is away."""
        import httpx2

        end = time.monotonic() + self._patience
        while True:
            try:
                response = self._client.request(method, self.url + path, **options)
                if response.is_success:
                    return response.json()
                message = str(response.json()["error"]["message"])
            except httpx2.HTTPError as error:
                status, message = 0, f"{self.url} cannot be reached: {error}."
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise self._foreign() from error
            else:
                status = response.status_code
            if (
                not (method == "GET" or "headers" in options)
                or (status and status not in _AWAY)
                or time.monotonic() > end
            ):
                hint = "does --url name a server of `prefixtune serve`?" if not status else ""
                hint = "give a key with --key, or in the variable PREFIXTUNE_API_KEY." if status == 401 else hint
                raise RequestError(message, hint=hint)
            time.sleep(_PAUSE)

    def _foreign(self) -> RequestError:
        return RequestError(
            f"{self.url} answers in a shape that OpenAI's interface does not have.",
            hint="does --url name a server of `prefixtune serve`, with /v1 at its end?",
        )
