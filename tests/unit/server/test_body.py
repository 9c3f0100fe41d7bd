"""Bodies: JSON, their content type, and the memory that they may take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import NEVER, Response, bearer, completion, send
from prefixtune.sampling.grammar import check_json_schema
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


def test_a_body_in_chunks_counts_as_the_largest_whatever_length_it_announces(make_server: Callable[..., Any]) -> None:
    app, state = make_server(max_pending_mib=1, max_body_kib=512)

    async def held() -> int:
        headers = {"content-length": "1", "transfer-encoding": "chunked"}
        running = asyncio.ensure_future(send(app, "POST", "/v1/completions", NEVER, headers=headers))
        while not state.pending_bytes.used:
            await asyncio.sleep(0.001)
        used = state.pending_bytes.used
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return int(used)

    assert asyncio.run(held()) == 512 * 1024


def test_tenants_take_turns_with_large_bodies(make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make_server()
    tenants: list[str] = []
    run = state.parse_threads.run

    async def noted(tenant: str, work: Callable[[], Any]) -> Any:
        tenants.append(tenant)
        return await run(tenant, work)

    monkeypatch.setattr(state.parse_threads, "run", noted)
    # A large body, and one of a task with a great many fields.
    for path, body in (("/v1/completions", completion(prompt=["x" * 20_000])), ("/v1/tasks/a", dict.fromkeys("x" * 9))):
        asyncio.run(send(app, "POST", path, body, client="127.0.0.2"))
    assert tenants == ["127.0.0.2"]
    asyncio.run(send(app, "POST", "/v1/tasks/a", {f"x{n}": "" for n in range(200)}, client="127.0.0.3"))
    assert tenants == ["127.0.0.2", "127.0.0.3"]


def test_a_large_body_waits_no_longer_than_its_deadline(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server(deadline=0.1)

    async def wait(tenant: str, work: Callable[[], Any]) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(state.parse_threads, "run", wait)
    response = asyncio.run(send(app, "POST", "/v1/completions", completion(prompt=["x" * 20_000])))
    assert (response.status, response.code) == (504, "deadline_exceeded")


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
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"a":' * 80 + b"1" + b"}" * 80,
    ],
)  # fmt: skip
def test_bodies_that_are_not_a_json_object(body: bytes) -> None:
    assert refused(parse_json, body).code == "invalid_json"


def test_a_body_is_read_as_it_is() -> None:
    value = {"a": "é\n€ \U0001f686", "b": [1, 2.5, None, True, 1e308, 10**4000], "c": [[[[[[[[[[{"d": []}]]]]]]]]]]}
    assert parse_json(json.dumps(value).encode()) == value


def test_a_body_has_room_for_the_deepest_schema() -> None:
    schema: dict[str, Any] = {"type": "object"}
    while check_json_schema(schema).count("{") < 64:
        schema = {"items": schema}
    body = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    assert parse_json(json.dumps(body).encode()) == body
