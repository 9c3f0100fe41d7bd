"""Bodies: JSON, their content type, and the memory that they may take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import NEVER, Response, bearer, completion, send
from prefixtune.server.api.body import parse_json
from prefixtune.server.auth import hash_key
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import KeyConfig


def refused(parse: Any, *arguments: Any, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(*arguments, **body)
    assert caught.value.status == 400
    return caught.value


def test_a_form_of_another_site_is_refused_by_its_content_type(make_server: Callable[..., Any]) -> None:
    app, _ = make_server()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(), headers={"content-type": kind}))
        assert (response.status, response.code) == (415, "unsupported_media_type")
    kind = "application/json; charset=utf-8"
    assert asyncio.run(send(app, "POST", "/v1/completions", completion(), headers={"content-type": kind})).status == 200


def test_a_body_of_unknown_length_counts_with_its_real_size_once_it_is_read(make_server: Callable[..., Any]) -> None:
    app, state = make_server(max_pending_mib=1, max_body_kib=512)

    async def several() -> list[Response]:
        # All wait for the tokenizer, with their bodies in memory.
        async with state.tokenizer_lock.hold("somebody"):
            running = []
            for _ in range(3):
                running.append(asyncio.ensure_future(send(app, "POST", "/v1/completions", completion())))
                await asyncio.sleep(0.05)
            held = state.pending_bytes.used
        assert held == 3 * len(json.dumps(completion()).encode())
        return list(await asyncio.gather(*running))

    assert [response.status for response in asyncio.run(several())] == [200, 200, 200]
    assert state.pending_bytes.used == 0


def test_the_memory_for_bodies_is_bounded_and_shared_fairly(make_server: Callable[..., Any]) -> None:
    keys = {name: KeyConfig(hash=hash_key(f"pt-{name}")) for name in ("heavy", "light")}
    app, state = make_server(keys=keys, max_pending_mib=1)
    large, small = ({"content-length": str(kib * 1024)} for kib in (1000, 100))

    async def fill() -> list[Response]:
        # The body never arrives, but its size is announced.
        held = asyncio.ensure_future(send(app, "POST", "/v1/completions", NEVER, headers=bearer("heavy") | large))
        while not state.pending_bytes.used:
            await asyncio.sleep(0.001)
        responses = [
            await send(app, "POST", "/v1/completions", completion(), headers=bearer(name) | small)
            for name in ("heavy", "light")
        ]
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        return responses

    heavy, light = asyncio.run(fill())
    assert (heavy.status, heavy.code, light.status) == (429, "queue_full", 200)
    assert int(heavy.headers["retry-after"]) >= 1
    assert state.pending_bytes.used == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b'{"a": "\\ud800"}',
        b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b'{"a": 1e999}', b'{"a": [{"b": -1e999}]}',
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"a":' * 40 + b"1" + b"}" * 40,
    ],
)  # fmt: skip
def test_bodies_that_are_not_a_json_object(body: bytes) -> None:
    assert refused(parse_json, body).code == "invalid_json"


def test_a_body_is_read_as_it_is() -> None:
    value = {"a": "é\n€ \U0001f686", "b": [1, 2.5, None, True, 1e308, 10**4000], "c": [[[[[[[[[[{"d": []}]]]]]]]]]]}
    assert parse_json(json.dumps(value).encode()) == value
