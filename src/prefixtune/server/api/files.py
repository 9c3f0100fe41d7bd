"""`/v1/files`: data and documents to train on, and what training would read of them.

Each key sees its own files; an admin key, and everybody where there are no keys, sees all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.datastructures import FormData, UploadFile

from prefixtune.jobs.files import StoredFile
from prefixtune.server.api.endpoint import RequestContext, TrainingContext, key_router
from prefixtune.server.api.training_views import After, page_of
from prefixtune.server.responses import ApiError, bad_request

router = key_router()
_PATH = "/v1/files/{file_id}"
_MOST_LISTED = 10_000


class Upload(BaseModel):
    """The form of an upload."""

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    purpose: Literal["fine-tune", "document"]


_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": Upload.model_json_schema()}}}}


@router.post("/v1/files", openapi_extra=_FORM)
async def upload_file(context: TrainingContext) -> dict[str, Any]:
    """Upload a file to train on.

    A file with a wrong row is kept, with the status `error`; `status_details` names the row.
    """
    # Not by FastAPI's parameters: it would read the form of somebody without a key.
    if not context.request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "the content type must be multipart/form-data.", code="unsupported_media_type")
    with context.training.uploads.admit(tenant=context.caller.name):
        try:
            async with context.request.form(max_files=1, max_fields=4) as form:
                stored = await run_in_threadpool(_store, context, form)
        except UnicodeError:
            raise bad_request("the form is not in its charset.", hint="write UTF-8, and name no charset.") from None
    context.log_fields |= {"file": stored.id, "bytes": stored.bytes}
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
    check = partial(_check_room, context)
    return context.training.files.put(context.caller.name, file.file, file.filename or "", purpose, check)


def _check_room(context: RequestContext, size: int, kept: Sequence[StoredFile]) -> None:
    """Refuse an upload of so many bytes where there is no room for it beside those that its owner keeps.

    Raises:
        ApiError: It is refused.
    """
    rules, most_bytes = context.caller.rules, context.state.config.max_file_mib * 2**20
    most_in_all, kept_bytes = rules.max_storage_mib * 2**20, sum(file.bytes for file in kept)
    for status, code, is_wrong, message in (
        (400, "empty_file", not size, "the file is empty"),
        (413, "file_too_large", size > most_bytes, f"a file may have {most_bytes:,} bytes; split it"),
        (403, "too_many_files", len(kept) >= rules.max_files, f"{rules.max_files:,} files may be kept; delete one"),
        (413, "no_room", kept_bytes + size > most_in_all, f"{most_in_all:,} bytes may be kept; delete a file"),
    ):
        if is_wrong:
            raise ApiError(status, f"{message}.", code=code, param="file")


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


@router.get(f"{_PATH}/content", response_class=FileResponse)
def download_file(file_id: str, context: TrainingContext) -> Response:
    """A file's content, as it was uploaded."""
    stored = find_file(context, file_id)
    path = context.training.files.path(stored)
    return FileResponse(path, filename=stored.filename, media_type="application/octet-stream")


@router.delete(_PATH)
def delete_file(file_id: str, context: TrainingContext) -> dict[str, Any]:
    """Delete a file.

    Jobs that were made of it go on.
    """
    stored = find_file(context, file_id)
    context.training.files.delete(stored)
    context.log_fields["file"] = stored.id
    return {"id": stored.id, "object": "file", "deleted": True}


def file_object(stored: StoredFile) -> dict[str, Any]:
    """A file as OpenAI's clients read it, and what it holds."""
    return {
        "object": "file",
        **stored.model_dump(include={"id", "bytes", "filename", "purpose", "status"}),
        "created_at": stored.created_ns // 10**9,
        "expires_at": None,
        "status_details": stored.status_details or None,
        "prefixtune": None if stored.facts is None else stored.facts.model_dump(),
    }


def find_file(context: RequestContext, file_id: str, param: str | None = None) -> StoredFile:
    """A file, as far as the caller may see it; `param` is the field that names it.

    Raises:
        ApiError: 404: there is none.
    """
    stored = context.training.files.get(context.training.whose(context.caller), file_id)
    if stored is None:
        raise ApiError(404, f"there is no file {file_id[:128]!r}.", param=param, code="file_not_found")
    return stored


@router.get(f"{_PATH}/preview")
def preview_file(file_id: str, context: TrainingContext) -> dict[str, Any]:
    """What training would read of a file: some examples, or the beginning of a document."""
    stored = find_file(context, file_id)
    return {"id": stored.id, "object": "file.preview", "examples": context.training.files.preview(stored)}
