"""`/v1/models`: what a key may use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from fastapi import Response
from fastapi.responses import StreamingResponse

from prefixtune.errors import PrefixError, RequestError
from prefixtune.server.api.endpoint import KeyContext, RequestContext
from prefixtune.server.api.openapi import NAME, api_router, errors
from prefixtune.server.api.schemas import Model, Models
from prefixtune.server.responses import forbidden, json_response, not_found, unavailable

__all__ = ["router"]


router = api_router(401, 403, 500)
_CHUNK_BYTES = 2**18
_FILE: dict[int | str, Any] = {
    200: {"content": {"application/octet-stream": {"schema": {}}}, "description": "The safetensors file."}
}


@router.get("/v1/models", response_model=Models)
async def list_models(context: KeyContext) -> Response:
    """The models that the key may use."""
    models = await asyncio.to_thread(context.state.catalog.describe_all, context.caller)
    return json_response({"object": "list", "data": models})


# Before the route of any name, which takes this path too.
@router.get(
    "/v1/models/{name:path}/file",
    response_class=StreamingResponse,
    responses={**_FILE, **errors(404, 503)},
    openapi_extra=NAME,
)
async def download_model(context: KeyContext) -> Response:
    """The file of a prefix that a job of the key's owner trained.

    An admin key gets the file of any prefix.
    """
    name = context.name
    if not context.caller.rules.admin:
        context.state.catalog.check_access((name,), context.caller)
        if not _is_own(context, name):
            raise forbidden(f"the file of {name[:128]!r} is for the owner of its training job only.", "not_the_owner")
    try:
        file = await asyncio.to_thread(context.state.store.open_file, name)
    except RequestError:
        raise not_found("model", name) from None
    except PrefixError:
        raise unavailable(f"the file of {name!r} is not served.", "model_not_served") from None
    headers = {
        "content-length": str(os.fstat(file.fileno()).st_size),
        # A name has no character that would end the quotes.
        "content-disposition": f'attachment; filename="{name}.safetensors"',
    }
    return StreamingResponse(_chunks(file), headers=headers, media_type="application/octet-stream")


def _is_own(context: RequestContext, name: str) -> bool:
    """Whether a job of the caller made a prefix; without keys, everybody is its owner."""
    job = context.state.catalog.header(name).get("job")
    if not isinstance(job, dict):
        return False
    return context.state.keyring.is_open or job.get("owner") == context.caller.name


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
            yield chunk


@router.get("/v1/models/{name:path}", response_model=Model, responses=errors(400, 404, 503), openapi_extra=NAME)
async def show_model(context: KeyContext) -> Response:
    """One model.

    Or several prefixes that are joined, as in `/v1/models/manual+style`; the list has single ones only.
    """
    return json_response(await context.state.catalog.describe_one(context.name, context.caller))
