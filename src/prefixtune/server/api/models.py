"""`/v1/models`: what a key may use; upload, download and delete prefixes.

An upload is streamed into a hidden folder beside the prefixes, checked as a whole by the store, and only then moved to
its place: readers see the old prefix or the new one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.folder import FolderBusyError, remove_abandoned_copies
from prefixtune.server.api.endpoint import AdminContext, GenerationContext, KeyContext, RequestContext
from prefixtune.server.api.streaming import file_stream
from prefixtune.server.responses import (
    ApiError,
    api_error,
    bad_request,
    forbidden,
    json_response,
    not_found,
    storage_error,
    unavailable,
)
from prefixtune.utils.files import remove_abandoned, work_folder

__all__ = ["clear_uploads", "router"]


router = APIRouter()
_UPLOAD_FOLDER = "upload"
"""Name of the hidden folders that receive uploads."""
_PATH = "/v1/models/{name:path}"
_BYTES_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {}}}}}


@router.get("/v1/models")
def list_models(context: KeyContext) -> dict[str, Any]:
    """The models that the key may use.

    An admin key also sees which files are refused, and why.
    """
    refused = {"refused": context.state.store.refused} if context.caller.rules.admin else {}
    return {"object": "list", "data": context.state.catalog.describe_all(context.caller), **refused}


# Before the route of any name, which takes this path too.
@router.get(f"{_PATH}/file", response_class=StreamingResponse)
def download_model(name: str, context: GenerationContext) -> Response:
    """The file of a prefix that a job of the key's owner trained.

    An admin key gets the file of any prefix.
    """
    catalog = context.state.catalog
    if not context.caller.rules.admin:
        catalog.check_access((name,), context.caller)
        if not catalog.owns(name, context.caller):
            raise forbidden(f"the file of {name[:128]!r} is for the owner of its training job only.", "not_the_owner")
    try:
        file, header = context.state.store.open_file(name)
    except RequestError:
        raise not_found("model", name) from None
    except PrefixError:
        raise unavailable(f"the file of {name!r} is not served.", "model_not_served") from None
    if not catalog.may_copy(header, context.caller):
        # It has replaced the file that was known.
        file.close()
        raise not_found("model", name)
    return file_stream(context, file, f"{name}.safetensors")


@router.get(_PATH)
async def show_model(name: str, context: KeyContext) -> dict[str, Any]:
    """One model.

    Or several prefixes that are joined, as in `/v1/models/manual+style`; the list has single ones only.
    """
    catalog = context.state.catalog
    if len(catalog.parts(name)) > 1:
        context.count()
    return await run_in_threadpool(catalog.describe, name, context.caller)


@router.put(_PATH, openapi_extra=_BYTES_BODY)
async def upload_model(name: str, context: AdminContext) -> Response:
    """Upload or replace a prefix: the body is the file itself.

    Needs a key with the right 'admin'.
    """
    state = context.state
    if name == state.config.model_id:
        raise bad_request(f"{name!r} is the bare backbone's name.", "name", hint="choose another one.")
    try:
        with work_folder(state.store.folder, _UPLOAD_FOLDER) as folder:
            with open(folder / "received", "wb") as file:
                async for chunk in context.request.stream():
                    # Into the page cache: not worth a thread.
                    file.write(chunk)
                size = file.tell()
            replaced, origin = await run_in_threadpool(_put, context, name, folder / "received")
    except OSError as error:
        context.log_fields["storage_error"] = str(error)
        raise storage_error(error, "the folder of prefixes") from None
    if state.training is not None and origin != await run_in_threadpool(state.store.origin, name):
        await run_in_threadpool(state.training.remove_checkpoints, origin)
    context.log_fields |= {"prefix": name, "bytes": size}
    return json_response({"id": name, "object": "model", "bytes": size, "replaced": replaced}, 200 if replaced else 201)


def _put(context: RequestContext, name: str, file: Path) -> Any:
    """Put an upload into the folder; errors become responses that name no path."""
    try:
        return context.state.catalog.put(name, file)
    except CheckpointError as error:
        raise bad_request(error.message, "file", "invalid_prefix", hint=error.hint) from None
    except PrefixError as error:
        raise _refusal(context, error) from None


@router.delete(_PATH)
def delete_model(name: str, context: GenerationContext) -> dict[str, Any]:
    """Delete what a job of the key's owner trained, with its checkpoints.

    An admin key deletes any prefix. Requests that have it go on.
    """
    state = context.state
    origin = state.store.origin(name)
    try:
        state.catalog.delete(name, context.caller)
    except PrefixError as error:
        raise _refusal(context, error) from None
    context.log_fields["prefix"] = name
    if state.training is not None:
        state.training.remove_checkpoints(origin)
    return {"id": name, "object": "model", "deleted": True}


def _refusal(context: RequestContext, error: PrefixError) -> ApiError:
    """Why the folder was not changed."""
    if isinstance(error, RequestError):
        return api_error(error)
    if isinstance(error, FolderBusyError):
        return unavailable(f"{error.message} Try again later.", "busy", retry_after=5)
    context.log_fields["storage_error"] = error.message
    return storage_error(error, "the folder of prefixes")


def clear_uploads(folder: Path) -> int:
    """Remove what uploads left behind whose process was killed; returns how many there were.

    What is locked belongs to another replica that serves the same folder.
    """
    return remove_abandoned(folder, _UPLOAD_FOLDER) + remove_abandoned_copies(folder)
