"""`/v1/models`: what a key may use."""

from __future__ import annotations

import asyncio

from fastapi import Response

from prefixtune.server.api.endpoint import KeyContext
from prefixtune.server.api.openapi import NAME, api_router, errors
from prefixtune.server.api.schemas import Model, Models
from prefixtune.server.responses import json_response

__all__ = ["router"]


router = api_router(401, 403, 500)


@router.get("/v1/models", response_model=Models)
async def list_models(context: KeyContext) -> Response:
    """The models that the key may use."""
    models = await asyncio.to_thread(context.state.catalog.describe_all, context.caller)
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{name:path}", response_model=Model, responses=errors(400, 404, 503), openapi_extra=NAME)
async def show_model(context: KeyContext) -> Response:
    """One model.

    Or several prefixes that are joined, as in `/v1/models/manual+style`; the list has single ones only.
    """
    return json_response(await context.state.catalog.describe_one(context.name, context.caller))
