"""`/v1/models`: what a key may use; upload, download and delete prefixes.

An upload is streamed into a hidden folder beside the prefixes, checked as a whole, and only then moved to its place.
Readers see the old prefix or the new one.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from prefixtune.errors import CheckpointError
from prefixtune.prefix.file import is_unread
from prefixtune.prefix.folder import ENDING
from prefixtune.server.api.endpoint import AdminContext, GenerationContext, KeyContext, key_router
from prefixtune.server.responses import JsonAnswer, bad_request
from prefixtune.utils.files import reporting_write_errors, work_folder

router = key_router()
_UPLOAD_FOLDER = "upload"
"""Name of the hidden folders that receive uploads."""
_PATH = "/v1/models/{name:path}"
_PART = 1 << 20
"""Bytes of a file that are sent at once."""
_BYTES_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {}}}}}


@router.get("/v1/models")
def list_models(context: KeyContext) -> dict[str, Any]:
    """The models that the key may use.

    An admin key also sees which files are refused, and why.
    """
    # Counted, as it looks at every file; but it goes on while the server shuts down.
    context.exit_stack.enter_context(context.caller.request())
    refused = {"refused": context.state.store.refused} if context.caller.rules.admin else {}
    return {"object": "list", "data": context.state.catalog.describe_all(context.caller), **refused}


# Before the route of any name, which takes this path too.
@router.get(f"{_PATH}/file", response_class=StreamingResponse)
def download_model(name: str, context: GenerationContext) -> Response:
    """The file of a prefix that a job of the key's owner trained.

    An admin key gets the file of any prefix.
    """
    file = context.state.catalog.open(name, context.caller)
    context.exit_stack.callback(file.close)
    headers = {"content-length": str(os.fstat(file.fileno()).st_size)}
    headers["content-disposition"] = f'attachment; filename="{name}{ENDING}"'
    parts = iter(() if context.request.scope["is_head"] else iter(partial(file.read, _PART), b""))
    return StreamingResponse(parts, headers=headers, media_type="application/octet-stream")


@router.get(_PATH)
async def show_model(name: str, context: GenerationContext) -> dict[str, Any]:
    """One model.

    Or several prefixes that are joined, as in `/v1/models/manual+style`; the list has single ones only.
    """
    return await context.state.run_loading(context.state.catalog.describe, name, context.caller)


@router.put(_PATH, openapi_extra=_BYTES_BODY)
async def upload_model(name: str, context: AdminContext) -> Response:
    """Upload or replace a prefix: the body is the file itself.

    Needs a key with the right 'admin'.
    """
    state, context.log_fields["prefix"] = context.state, name
    if name == state.config.model_id:
        raise bad_request(f"{name!r} is the bare backbone's name.", "name", hint="choose another one.")
    root = state.store.folder
    with reporting_write_errors(root), work_folder(root, _UPLOAD_FOLDER) as folder:
        with open(folder / "received", "wb") as file:
            async for chunk in context.request.stream():
                # Into the page cache: not worth a thread.
                file.write(chunk)
            size = context.log_fields["bytes"] = file.tell()
        try:
            replaced = await run_in_threadpool(state.catalog.upload, name, folder / "received")
        except CheckpointError as error:
            if is_unread(error):
                raise
            raise bad_request(error.message, "file", "invalid_prefix", hint=error.hint) from None
    return JsonAnswer({"id": name, "object": "model", "bytes": size, "replaced": replaced}, 200 if replaced else 201)


@router.delete(_PATH)
def delete_model(name: str, context: GenerationContext) -> dict[str, Any]:
    """Delete what a job of the key's owner trained, with its checkpoints.

    An admin key deletes any prefix. Requests that have it go on.
    """
    state, context.log_fields["prefix"] = context.state, name
    state.catalog.delete(name, context.caller)
    return {"id": name, "object": "model", "deleted": True}
