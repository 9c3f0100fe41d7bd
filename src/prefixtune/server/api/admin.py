"""`/admin/...`: upload, list, inspect, delete and reload prefixes, for keys with the right `admin`.

An upload is streamed into a hidden folder beside the prefixes, checked as a whole by the store, and only then moved to
its place: readers see the old prefix or the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Response

from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.folder import FolderBusyError, remove_abandoned_copies
from prefixtune.server.api.body import receive_body
from prefixtune.server.api.endpoint import AdminContext, RequestContext
from prefixtune.server.api.openapi import BYTES_BODY, NAME, api_router, errors
from prefixtune.server.api.schemas import Prefixes, PrefixHeader, Reloaded, Uploaded
from prefixtune.server.logs import log
from prefixtune.server.responses import api_error, bad_request, json_response, not_found, storage_error, unavailable
from prefixtune.utils.files import remove_abandoned, work_folder

__all__ = ["clear_uploads", "router"]


router = api_router(401, 403, 500)
_UPLOAD_FOLDER = "upload"
"""Name of the hidden folders that receive uploads."""
_PATH = "/admin/prefixes/{name}"
_UPLOAD: Any = {
    "response_model": Uploaded,
    "responses": {201: {"model": Uploaded, "description": "Added."}, **errors(400, 408, 413, 503, 507)},
    "openapi_extra": {**NAME, **BYTES_BODY},
}


@router.get("/admin/prefixes", response_model=Prefixes)
async def list_prefixes(context: AdminContext) -> Response:
    """All prefixes, and refused files.

    Needs a key with the right 'admin'.
    """
    store = context.state.store
    await context.state.catalog.look_for_new(context.tenant)
    return json_response({"prefixes": store.names(), "refused": store.refused, "cache": vars(store.stats)})


@router.get(_PATH, response_model=PrefixHeader, responses=errors(404, 503), openapi_extra=NAME)
async def inspect_prefix(context: AdminContext) -> Response:
    """A prefix's header.

    Needs a key with the right 'admin'.
    """
    await _check_known(context)
    return json_response({"name": context.name, "header": context.state.catalog.header(context.name)})


@router.delete(_PATH, status_code=204, responses=errors(400, 404, 503, 507), openapi_extra=NAME)
async def delete_prefix(context: AdminContext) -> Response:
    """Delete a prefix; the result of a job together with its checkpoints.

    Needs a key with the right 'admin'.
    """
    await _check_known(context)
    origin = context.state.store.origin(context.name)
    await _run_in_thread(context, context.state.catalog.remove, context.name)
    if context.state.training is not None:
        await context.state.training.remove_checkpoints(origin)
    log("audit", action="prefix.delete", key=context.caller.name, model=context.name)
    return Response(status_code=204)


@router.post("/admin/reload", response_model=Reloaded, responses=errors(507))
async def reload_prefixes(context: AdminContext) -> Response:
    """Reload the folder.

    Needs a key with the right 'admin'.
    """
    store = context.state.store
    before = set(store.names())
    await _run_in_thread(context, store.reload)
    context.state.folder_error = ""
    after = set(store.names())
    return json_response({"added": sorted(after - before), "removed": sorted(before - after), "refused": store.refused})


@router.put(_PATH, name="put_prefix", **_UPLOAD)
@router.post(_PATH, name="post_prefix", **_UPLOAD)
async def upload_prefix(context: AdminContext) -> Response:
    """Upload or replace a prefix: the body is the file itself.

    Needs a key with the right 'admin'.
    """
    state, name, config = context.state, context.name, context.state.config
    if name == config.model_id:
        raise bad_request(f"{name!r} is the bare backbone's name.", "name", hint="choose another one.")
    limit, seconds, chunk_seconds = config.max_upload_mib * 2**20, config.deadline, config.client_timeout
    try:
        with work_folder(state.store.folder, _UPLOAD_FOLDER) as folder:
            with open(folder / "received", "wb") as file:
                # Into the page cache: not worth a thread.
                size = await receive_body(
                    context.request, file.write, limit=limit, seconds=seconds, chunk_seconds=chunk_seconds
                )
            replaced, origin = await _run_in_thread(context, state.catalog.put, name, folder / "received")
    except OSError as error:
        context.log_fields["storage_error"] = str(error)
        raise storage_error(error, "the prefix", "the folder of prefixes") from None
    if state.training is not None and origin != state.store.origin(name):
        await state.training.remove_checkpoints(origin)
    context.log_fields |= {"prefix": name, "bytes": size}
    log("audit", action="prefix.upload", key=context.caller.name, model=name, bytes=size, replaced=replaced)
    return json_response({"name": name, "bytes": size, "replaced": replaced}, 200 if replaced else 201)


async def _run_in_thread(context: RequestContext, action: Callable[..., Any], *arguments: Any) -> Any:
    """Change the store outside the event loop; its errors become responses that name no path."""
    try:
        return await asyncio.to_thread(action, *arguments)
    except RequestError as error:
        raise api_error(error) from None
    except CheckpointError as error:
        raise bad_request(error.message, "file", "invalid_prefix", hint=error.hint) from None
    except FolderBusyError as error:
        raise unavailable(f"{error.message} Try again later.", "busy", retry_after=5) from None
    except PrefixError as error:
        context.log_fields["storage_error"] = error.message
        raise storage_error(error, "the prefix", "the folder of prefixes") from None


async def _check_known(context: RequestContext) -> None:
    store = context.state.store
    await context.state.catalog.look(context.name, context.tenant)
    if context.name not in store and context.name not in store.refused:
        raise not_found("prefix", context.name, store.names() if store.has_few else None)


def clear_uploads(folder: Path) -> int:
    """Remove what uploads left behind whose process was killed; returns how many there were.

    What is locked belongs to another replica that serves the same folder.
    """
    return remove_abandoned(folder, _UPLOAD_FOLDER) + remove_abandoned_copies(folder)
