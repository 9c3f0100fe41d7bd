"""`/v1/files`: data and documents to train on.

Each key sees its own files; an admin key, and everybody where there are no keys, sees all.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile

from prefixtune.jobs.files import FileLimits, FileRefusedError, StoredFile
from prefixtune.server.api.endpoint import RequestContext, TrainingContext, key_router
from prefixtune.server.api.paging import After, page_of
from prefixtune.server.api.streaming import file_stream
from prefixtune.server.responses import ApiError, bad_request, storage_error

__all__ = ["find_file", "router"]


router = key_router()
_PATH = "/v1/files/{file_id}"
_MOST_LISTED = 10_000
_STATUSES = {"empty_file": 400, "file_too_large": 413, "no_room": 413, "too_many_files": 403}
_PROPERTIES = {
    "file": {"type": "string", "format": "binary"},
    "purpose": {"type": "string", "enum": ["fine-tune", "document"]},
}
_SCHEMA = {
    "type": "object",
    "properties": _PROPERTIES,
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCHEMA}}}}


@router.post("/v1/files", openapi_extra=_FORM)
async def upload_file(context: TrainingContext) -> dict[str, Any]:
    """Upload a file to train on.

    A file with a wrong row is kept, with the status `error`; `status_details` names the row.
    """
    # Not by FastAPI's parameters: it would read the form of somebody without a key.
    if not context.request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "the content type must be multipart/form-data.", code="unsupported_media_type")
    try:
        with context.training.uploads.admit(tenant=context.caller.name):
            async with context.request.form(max_files=1, max_fields=4) as form:
                stored = await run_in_threadpool(_store, context, form)
    except OSError as error:
        context.log_fields["storage_error"] = str(error)
        raise storage_error(error, "the data folder") from None
    context.log_fields |= {"file": stored.id, "bytes": stored.bytes}
    context.state.metrics.uploads.labels(stored.status).inc()
    return file_object(stored)


def _store(context: RequestContext, form: FormData) -> StoredFile:
    """Check a form's file and keep it."""
    if unknown := form.keys() - {"file", "purpose"}:
        raise bad_request(f"{min(unknown)}: unknown field.", min(unknown), "unknown_field")
    file = form.get("file")
    purpose: Any = form.get("purpose")
    if not isinstance(file, UploadFile):
        raise bad_request("the field 'file' with the file and its name is missing.", "file")
    if purpose not in ("fine-tune", "document"):
        raise bad_request("'purpose' must be 'fine-tune' or 'document'.", "purpose")
    rules = context.caller.rules
    limits = FileLimits(context.state.config.max_file_mib * 2**20, rules.max_files, rules.max_storage_mib * 2**20)
    try:
        return context.training.files.put(context.caller.name, file.file, file.filename or "", purpose, limits)
    except FileRefusedError as error:
        raise ApiError(_STATUSES[error.code], error.message, code=error.code, param="file") from None


@router.get("/v1/files")
def list_files(
    context: TrainingContext,
    after: After = "",
    limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = _MOST_LISTED,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """The files of the key, the newest first."""
    known = context.training.files.list(context.training.whose(context.caller))
    files = [file for file in known if purpose in (None, file.purpose)]
    return page_of([file_object(file) for file in (files if order == "desc" else reversed(files))], after, limit)


@router.get(_PATH)
def show_file(file_id: str, context: TrainingContext) -> dict[str, Any]:
    """What is known about a file."""
    return file_object(find_file(context, file_id))


@router.get(f"{_PATH}/content", response_class=StreamingResponse)
def download_file(file_id: str, context: TrainingContext) -> Response:
    """A file's content, as it was uploaded."""
    stored = find_file(context, file_id)
    return file_stream(context, context.training.files.open(stored.owner, stored.id), stored.filename)


@router.delete(_PATH)
def delete_file(file_id: str, context: TrainingContext) -> dict[str, Any]:
    """Delete a file.

    Jobs that were made of it go on.
    """
    stored = find_file(context, file_id)
    try:
        context.training.files.delete(stored.owner, stored.id)
    except OSError as error:
        context.log_fields["storage_error"] = str(error)
        raise storage_error(error, "the data folder") from None
    context.log_fields["file"] = stored.id
    return {"id": stored.id, "object": "file", "deleted": True}


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


def find_file(context: RequestContext, file_id: str) -> StoredFile:
    """A file, as far as the caller may see it.

    Raises:
        UnknownFileError: There is none.
    """
    return context.training.files.get(context.training.whose(context.caller), file_id)
