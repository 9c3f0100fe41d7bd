"""`/admin/...`: upload, list, inspect, delete and reload prefixes. For keys with the right `admin`.

An upload is streamed to a hidden folder beside the prefixes, checked as a whole, and only then moved into place:
whoever looks sees the old prefix or the new one. Knows nothing of what makes a prefix good; the store does.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.server.api.endpoint import Call, check_length, too_large
from prefixtune.server.responses import ApiError, as_api_error, bad_request, not_found, reply, unavailable
from prefixtune.utils.files import remove_abandoned, work_folder

__all__ = ["clear_uploads", "delete_prefix", "inspect_prefix", "list_prefixes", "reload_prefixes", "upload_prefix"]


_UPLOAD = "upload"
"""Name of the hidden folders that uploads are received in."""


async def list_prefixes(call: Call) -> ASGIApp:
    """`GET /admin/prefixes`."""
    store = call.services.store
    return reply({"prefixes": store.names(), "refused": store.refused, "cache": vars(store.stats)})


async def inspect_prefix(call: Call) -> ASGIApp:
    """`GET /admin/prefixes/{name}`."""
    _check_known(call)
    return reply({"name": call.name, "header": call.services.catalog.header(call.name)})


async def delete_prefix(call: Call) -> ASGIApp:
    """`DELETE /admin/prefixes/{name}`."""
    _check_known(call)
    await _in_thread(call, call.services.store.delete, call.name)
    return Response(status_code=204)


async def reload_prefixes(call: Call) -> ASGIApp:
    """`POST /admin/reload`."""
    before = set(call.services.store.names())
    await _in_thread(call, call.services.store.reload)
    call.services.folder_error = ""
    now = set(call.services.store.names())
    store = call.services.store
    return reply({"added": sorted(now - before), "removed": sorted(before - now), "refused": store.refused})


async def upload_prefix(call: Call) -> ASGIApp:
    """`PUT` or `POST /admin/prefixes/{name}`: the file itself is the body."""
    services, name = call.services, call.name
    if name == services.config.model_id:
        raise bad_request(f"{name!r} is the bare backbone's name.", "name", hint="choose another one.")
    existed = name in services.store
    most = services.config.max_upload_mib * 2**20
    check_length(call.request, most)
    try:
        with work_folder(services.store.folder, _UPLOAD) as folder:
            size = await _receive(call, folder / "received", most)
            await _in_thread(call, services.store.put, name, folder / "received")
    except OSError as error:
        call.facts["storage_error"] = str(error)
        raise _not_stored(error) from None
    call.facts |= {"prefix": name, "bytes": size}
    return reply({"name": name, "bytes": size, "replaced": existed}, 200 if existed else 201)


async def _receive(call: Call, path: Path, most: int) -> int:
    """Write the body to a file; returns its size."""
    size, config = 0, call.services.config
    # A piece now and then is not enough: all of it has the time of a request.
    clock = asyncio.get_running_loop().time
    end = clock() + config.deadline
    stream = call.request.stream()
    with open(path, "wb") as handle:
        while True:
            try:
                async with asyncio.timeout(min(config.client_timeout, end - clock())):
                    chunk = await anext(stream, None)
            except TimeoutError:
                limits = f"a piece has {config.client_timeout:g} seconds to arrive, and the file {config.deadline:g}."
                raise ApiError(408, limits, code="body_timeout") from None
            if chunk is None:
                return size
            size += len(chunk)
            if size > most:
                raise too_large(most)
            # To the page cache, a piece of at most 64 KiB: not worth a thread.
            handle.write(chunk)


async def _in_thread(call: Call, do: Any, *given: Any) -> Any:
    """Do something to the store, away from the event loop; its errors are told without paths."""
    try:
        return await asyncio.to_thread(do, *given)
    except RequestError as error:
        raise as_api_error(error) from None
    except CheckpointError as error:
        raise bad_request(error.message, "file", "invalid_prefix", hint=error.hint) from None
    except PrefixError as error:
        call.facts["storage_error"] = error.message
        raise _not_stored(error) from None


def _not_stored(error: BaseException) -> ApiError:
    """What the folder's disk refused, by an error or what it came from: full, or another fault; or too many files."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return ApiError(507, "there is no space for the prefix; what was there is untouched.", code="no_space")
    if numbers & {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
        return unavailable("the server has too much open now; try again later.", "busy", retry_after=5)
    reason = next((os.strerror(number) for number in numbers if number), "an unknown fault")
    message = f"the folder of prefixes cannot be changed ({reason}); what was there is untouched."
    return ApiError(507, message, code="storage_failed")


def _check_known(call: Call) -> None:
    if call.name not in call.services.store and call.name not in call.services.store.refused:
        raise not_found("prefix", call.name, call.services.store.names())


def clear_uploads(folder: Path) -> int:
    """Remove what uploads left behind whose process was killed; returns how many there were.

    What is locked belongs to another replica that serves the same folder.
    """
    return remove_abandoned(folder, _UPLOAD)
