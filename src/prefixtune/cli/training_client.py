"""OpenAI's files and fine-tuning jobs of a server, as values with a checked shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from prefixtune.cli.api_client import ApiClient, ServerAwayError
from prefixtune.errors import RequestError

__all__ = ["ENDED", "Event", "FileView", "JobView", "TrainingClient"]

ENDED = ("succeeded", "failed", "cancelled")
_JOBS, _PAGE, _PAUSE = "/fine_tuning/jobs", 100, 1.0
_MOST_BREAKS = 30
"""Of a stream of events in a row, without an event between."""


class _Object(BaseModel):
    """What a server says; it may say more than is needed here."""

    model_config = ConfigDict(extra="allow", strict=True)


class FileView(_Object):
    """An uploaded file."""

    id: str
    filename: str
    bytes: int
    purpose: str
    created_at: int
    status: str = ""
    status_details: str | None = None


class _Error(_Object):
    code: str = ""
    message: str = ""


class JobView(_Object):
    """A job as it stands."""

    id: str
    status: str
    model: str
    created_at: int
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    training_file: str = ""
    error: _Error | None = None
    prefixtune: dict[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the result is, or will be, served as; empty: the server does not say."""
        return self.fine_tuned_model or str(self.prefixtune.get("name") or "")

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED


class Event(_Object):
    """Something that happened in a job."""

    id: str
    created_at: int
    message: str
    level: str = "info"
    type: str | None = None
    data: dict[str, Any] | None = None


class _Model(_Object):
    id: str
    parent: str | None = None


class _Deleted(_Object):
    id: str
    deleted: Literal[True]


class _Jobs(_Object):
    data: list[JobView]
    has_more: bool = False


class _Files(_Object):
    data: list[FileView]
    has_more: bool = False


class _Models(_Object):
    data: list[_Model]


class TrainingClient:
    """What a server can be asked to train.

    Every method raises a `RequestError` where the server is away, refuses, or answers in another shape.

    Args:
        api: The server.
    """

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    def bare_model(self) -> str:
        """The name of the model without a prefix."""
        found = self._api.get("/models", _Models).data
        bare = [model.id for model in found if model.parent is None]
        if len(bare) != 1:
            raise RequestError(
                f"{self._api.url} does not say which of its {len(found)} models is the bare one.",
                hint="name the model to train with --model.",
            )
        return bare[0]

    def upload(self, file: Path, purpose: str) -> FileView:
        """Upload a file."""
        return self._api.upload("/files", FileView, file, {"purpose": purpose})

    def files(self, limit: int) -> list[FileView]:
        """Uploaded files, the newest first."""
        return self._api.get("/files", _Files, limit=limit).data[:limit]

    def delete_file(self, file_id: str) -> None:
        """Delete an uploaded file."""
        self._api.delete(f"/files/{_part(file_id)}", _Deleted)

    def delete_model(self, name: str) -> None:
        """Delete a result: it is served no longer."""
        self._api.delete(f"/models/{_part(name)}", _Deleted)

    def create(self, request: Mapping[str, Any]) -> JobView:
        """Ask for a training."""
        return self._api.create(_JOBS, JobView, request)

    def jobs(self, limit: int) -> list[JobView]:
        """Jobs, the newest first."""
        found: list[JobView] = []
        more: dict[str, str] = {}
        while len(found) < limit:
            page = self._api.get(_JOBS, _Jobs, limit=min(_PAGE, limit - len(found)), **more)
            found += page.data
            if not page.has_more or not page.data:
                break
            more = {"after": page.data[-1].id}
        return found[:limit]

    def job(self, job_id: str) -> JobView:
        """One job."""
        return self._api.get(f"{_JOBS}/{_part(job_id)}", JobView)

    def change(self, job_id: str, action: Literal["cancel", "pause", "resume"]) -> JobView:
        """Cancel, pause or resume a job; returns how it stands then."""
        return self._api.post(f"{_JOBS}/{_part(job_id)}/{action}", JobView)

    def follow(self, job_id: str, on_event: Callable[[Event], None]) -> JobView:
        """Call `on_event` with each event, from the first on, until the job stands still; returns how it stands.

        A server that is away is waited for, as long as the client is patient.
        """
        last, breaks = "", 0
        while True:
            try:
                for event in self._events(job_id, last):
                    last, breaks = event.id, 0
                    on_event(event)
            except ServerAwayError:
                breaks += 1
                if breaks > _MOST_BREAKS:
                    raise
                time.sleep(_PAUSE)
                # Waits for a server that is away.
                self.job(job_id)
                continue
            job = self.job(job_id)
            if job.has_ended or job.status == "paused":
                return job
            time.sleep(_PAUSE)

    def _events(self, job_id: str, after: str) -> Iterator[Event]:
        where = {"after": after} if after else {}
        yield from self._api.stream(f"{_JOBS}/{_part(job_id)}/events", Event, stream="true", **where)


def _part(name: str) -> str:
    """A name as a part of a path."""
    if name in ("", ".", ".."):
        raise RequestError(f"{name!r} names nothing.", hint="`prefixtune jobs` lists the jobs.")
    return quote(name, safe="")
