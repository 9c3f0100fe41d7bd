"""`/v1/files`: data and documents to train on. An upload is streamed to disk and checked while it comes in.

Each key sees its own files; an admin key, and everybody where there are no keys, sees all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse

from prefixtune.server.api.body import receive_body
from prefixtune.server.api.endpoint import RequestContext, TrainingContext
from prefixtune.server.api.multipart import FORM_OVERHEAD, FormReader
from prefixtune.server.api.openapi import FILE_ID, FORM_BODY, api_router, errors
from prefixtune.server.api.paging import ORDER, PAGE, page_of, parameter, read_page
from prefixtune.server.api.streaming import file_stream
from prefixtune.server.api.training_schemas import DeletedFile, File, Files
from prefixtune.server.limits import QueueFull
from prefixtune.server.responses import (
    ApiError,
    bad_request,
    capitalize,
    json_response,
    not_found,
    storage_error,
)
from prefixtune.server.training import Training

if TYPE_CHECKING:
    from prefixtune.jobs.files import FileLimits, StoredFile, Upload

__all__ = ["file_object", "file_or_404", "find_file", "router"]


router = api_router(401, 403, 404, 429, 500, 503)
_PATH = "/v1/files/{file_id}"
_FIELDS = ("purpose", "expires_after", "expires_after[anchor]", "expires_after[seconds]")
_MOST_LISTED = 10_000
_PIECE = 2**18
"""Bytes of an upload that a thread reads at once."""
_PURPOSE = parameter("purpose", "Of the files.", type="string")
_CONTENT: dict[int | str, Any] = {
    200: {"content": {"application/octet-stream": {"schema": {}}}, "description": "The file, as it was uploaded."}
}

T = TypeVar("T")


@router.post("/v1/files", response_model=File, responses=errors(400, 408, 413, 415, 507), openapi_extra=FORM_BODY)
async def upload_file(context: TrainingContext) -> Response:
    """Upload a file to train on.

    Rows are checked while they come in. A file with a wrong row is kept, with the status `error`; `status_details`
    names the row.
    """
    training = context.training
    if not training.uploads.has_room(1, context.tenant):
        raise QueueFull(f"{training.uploads.used} files are being uploaded", 5.0)
    with training.uploads.hold(1, context.tenant):
        stored = await _store(context, training)
    context.log_fields |= {"file": stored.id, "bytes": stored.bytes}
    context.state.metrics.uploads.labels(stored.status).inc()
    await training.audit(
        context.caller, "file.create", file=stored.id, bytes=stored.bytes, purpose=stored.purpose, status=stored.status
    )
    return json_response(file_object(stored))


@router.get(
    "/v1/files", response_model=Files, responses=errors(400), openapi_extra={"parameters": [_PURPOSE, *PAGE, ORDER]}
)
async def list_files(context: TrainingContext) -> Response:
    """The files of the key, the newest first."""
    training = context.training
    page = read_page(context.request, default=_MOST_LISTED, largest=_MOST_LISTED)
    purpose = context.request.query_params.get("purpose")

    def read() -> dict[str, Any]:
        files = [file for file in training.files.list(_owner(context, training)) if purpose in (None, file.purpose)]
        return page_of([file_object(file) for file in (files if page.order == "desc" else reversed(files))], page)

    return json_response(await training.look(read, context.tenant))


@router.get(_PATH, response_model=File, openapi_extra=FILE_ID)
async def show_file(context: TrainingContext) -> Response:
    """What is known about a file."""
    return json_response(file_object(await find_file(context)))


@router.get(f"{_PATH}/content", response_class=StreamingResponse, responses=_CONTENT, openapi_extra=FILE_ID)
async def download_file(context: TrainingContext) -> Response:
    """A file's content, as it was uploaded."""
    training, stored = context.training, await find_file(context)
    file = await file_or_404(context, lambda: training.files.open(stored.owner, stored.id))
    return file_stream(context, file, stored.filename)


@router.delete(_PATH, response_model=DeletedFile, responses=errors(507), openapi_extra=FILE_ID)
async def delete_file(context: TrainingContext) -> Response:
    """Delete a file.

    Jobs that were made of it go on.
    """
    training, stored = context.training, await find_file(context)
    try:
        await file_or_404(context, lambda: training.files.delete(stored.owner, stored.id))
    except OSError as error:
        context.log_fields["storage_error"] = str(error)
        raise storage_error(error, "the file", "the data folder") from None
    await training.audit(context.caller, "file.delete", file=stored.id, owner=stored.owner)
    return json_response({"id": stored.id, "object": "file", "deleted": True})


def file_object(stored: StoredFile) -> dict[str, Any]:
    """A file as OpenAI's clients read it, and what it holds."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": stored.created,
        "expires_at": None,
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": stored.status,
        "status_details": stored.status_details or None,
        "prefixtune": None if stored.facts is None else stored.facts.model_dump(),
    }


async def find_file(context: RequestContext) -> StoredFile:
    """The file that the path names, as far as the caller may see it.

    Raises:
        ApiError: There is none.
    """
    training = context.training
    file_id = str(context.request.path_params["file_id"])
    return await file_or_404(context, lambda: training.files.get(_owner(context, training), file_id))


# --- an upload -------------------------------------------------------------------------------------------------------


async def _store(context: RequestContext, training: Training) -> StoredFile:
    """Receive a form, and keep its file."""
    from prefixtune.jobs.files import FileRefusedError

    config, limits = context.state.config, _limits(context, training)
    try:
        upload = await asyncio.to_thread(training.files.open_upload, context.caller.name, limits=limits)
        try:
            form = FormReader(context.request, _FIELDS, "file", _Target(upload))
            pieces = _Pieces(context, form)
            limit, chunk_seconds = limits.max_bytes + FORM_OVERHEAD, config.client_timeout
            await receive_body(
                context.request, pieces.write, limit=limit, seconds=config.deadline, chunk_seconds=chunk_seconds
            )
            await pieces.flush()
            form.close()
            if upload.purpose is None:
                raise bad_request("the field 'purpose' is missing.", "purpose", hint=_purposes())
        except BaseException:
            await asyncio.to_thread(upload.abort)
            raise
        return await training.read(upload.finish, context.tenant)
    except FileRefusedError as error:
        raise _refusal(error.code, f"{error.message} {capitalize(error.hint)}") from None
    except OSError as error:
        context.log_fields["storage_error"] = str(error)
        raise storage_error(error, "the file", "the data folder") from None


class _Pieces:
    """Reads a form in threads, piece by piece in their order: no other request waits for its parser or the disk."""

    def __init__(self, context: RequestContext, form: FormReader) -> None:
        self._context, self._form = context, form
        self._pending = bytearray()

    async def write(self, chunk: bytes) -> None:
        """Take a chunk; small ones are read together."""
        self._pending += chunk
        if len(self._pending) >= _PIECE:
            await self.flush()

    async def flush(self) -> None:
        """Read what has come; when this returns or raises, no thread uses the form any more."""
        piece, self._pending = bytes(self._pending), bytearray()
        await self._context.training.look(partial(self._form.feed, piece), self._context.tenant)


class _Target:
    """Takes what is in a form for an upload."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def take_field(self, name: str, text: str) -> None:
        """The purpose; files do not expire."""
        from prefixtune.jobs.files import UPLOAD_PURPOSES

        if name != "purpose":
            raise bad_request(
                "files do not expire here.", "expires_after", hint="delete them when they are not needed."
            )
        purpose = next((known for known in UPLOAD_PURPOSES if known == text), None)
        if purpose is None:
            raise bad_request(f"'purpose' is {text[:40]!r}.", "purpose", hint=_purposes())
        self._upload.purpose = purpose

    def begin_file(self, filename: str) -> None:
        """Its name."""
        self._upload.filename = filename

    def write(self, data: bytes) -> None:
        """A piece of it."""
        self._upload.write(data)


def _purposes() -> str:
    from prefixtune.jobs.files import UPLOAD_PURPOSES

    return f"write {' or '.join(map(repr, UPLOAD_PURPOSES))}."


def _limits(context: RequestContext, training: Training) -> FileLimits:
    from prefixtune.jobs.files import FileLimits

    rules = context.caller.rules
    return FileLimits(context.state.config.max_file_mib * 2**20, rules.max_files, rules.max_storage_mib * 2**20)


def _refusal(code: str, message: str) -> ApiError:
    statuses = {"empty_file": 400, "file_too_large": 413, "no_room": 413, "stopped": 503}
    return ApiError(statuses.get(code, 403), message, code=code, param="file")


# --- small parts -----------------------------------------------------------------------------------------------------


def _owner(context: RequestContext, training: Training) -> str | None:
    """Whose files the caller sees; None: everybody's."""
    return None if training.sees_all(context.caller) else context.caller.name


async def file_or_404(context: RequestContext, work: Callable[[], T]) -> T:
    """Do something with the file that the path names, in a thread.

    Raises:
        ApiError: There is none any more.
    """
    from prefixtune.jobs.files import UnknownFileError

    try:
        return await context.training.look(work, context.tenant)
    except UnknownFileError:
        raise not_found("file", str(context.request.path_params["file_id"])) from None
