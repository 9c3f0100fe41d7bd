"""`/v1/models`: what a key may use."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse

from prefixtune.errors import PrefixError, RequestError
from prefixtune.prefix.folder import FolderBusyError
from prefixtune.server.api.endpoint import KeyContext
from prefixtune.server.api.openapi import NAME, api_router, errors
from prefixtune.server.api.schemas import Deleted, Model, Models
from prefixtune.server.api.streaming import file_stream
from prefixtune.server.responses import ApiError, forbidden, json_response, not_found, unavailable

__all__ = ["router"]


router = api_router(401, 403, 429, 500)
_FILE: dict[int | str, Any] = {
    200: {"content": {"application/octet-stream": {"schema": {}}}, "description": "The safetensors file."}
}


@router.get("/v1/models", response_model=Models)
async def list_models(context: KeyContext) -> Response:
    """The models that the key may use."""
    await context.state.catalog.look_for_new(context.tenant)
    describe = partial(context.state.catalog.describe_all, context.caller)
    models = await context.state.response_threads.run(context.tenant, describe)
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
    name, catalog = context.name, context.state.catalog
    context.count()
    if not context.caller.rules.admin:
        await catalog.check_access((name,), context.caller, context.tenant)
        if not catalog.access.owns(name, context.caller):
            raise forbidden(f"the file of {name[:128]!r} is for the owner of its training job only.", "not_the_owner")
    await catalog.look(name, context.tenant)
    try:
        opening = partial(context.state.store.open_file, name)
        file, header = await context.state.response_threads.run(context.tenant, opening)
    except RequestError:
        raise not_found("model", name) from None
    except PrefixError:
        raise unavailable(f"the file of {name!r} is not served.", "model_not_served") from None
    if not catalog.access.may_copy(header, context.caller):
        # It has replaced the file that was known.
        file.close()
        raise not_found("model", name)
    return file_stream(context, file, f"{name}.safetensors")


@router.get("/v1/models/{name:path}", response_model=Model, responses=errors(400, 404, 503), openapi_extra=NAME)
async def show_model(context: KeyContext) -> Response:
    """One model.

    Or several prefixes that are joined, as in `/v1/models/manual+style`; the list has single ones only.
    """
    catalog = context.state.catalog
    if len(catalog.parts(context.name)) > 1:
        context.count()
    return json_response(await catalog.describe_one(context.name, context.caller, tenant=context.tenant))


@router.delete(
    "/v1/models/{name:path}", response_model=Deleted, responses=errors(400, 404, 503, 507), openapi_extra=NAME
)
async def delete_model(context: KeyContext) -> Response:
    """Delete what a job of the key's owner trained, with its checkpoints.

    An admin key deletes any prefix. Requests that have it go on.
    """
    state, name = context.state, context.name
    context.count()
    await state.catalog.look(name, context.tenant)
    origin = state.store.origin(name)
    try:
        names = await state.catalog.delete(name, context.caller, context.tenant)
    except FolderBusyError as error:
        raise unavailable(f"{error.message} Try again later.", "busy", retry_after=5) from None
    except PrefixError as error:
        context.log_fields["storage_error"] = error.message
        raise ApiError(507, "the folder of prefixes cannot be changed.", code="storage_failed") from None
    context.log_fields["prefix"] = name
    if state.training is not None:
        await state.training.remove_checkpoints(origin)
        await state.training.audit(context.caller, "model.delete", model=name, files=len(names))
    return json_response({"id": name, "object": "model", "deleted": True})
