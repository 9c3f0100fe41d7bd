"""API keys: who calls, what they may use, and how much at once."""

import asyncio
import contextlib

import pytest

from asgi_client import completion, send
from prefixtune.server.auth import Caller, Gate, Keyring, hash_key
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import KeyConfig


def test_a_key_is_found_by_its_hash_only():
    keyring = Keyring({"a": KeyConfig(hash=hash_key("pt-a")), "b": KeyConfig(hash=hash_key("pt-b"))})
    assert not keyring.is_open
    caller = keyring.find("Bearer pt-b")
    assert caller.name == "b"
    assert keyring.find("bearer  pt-a ") is keyring.find("Bearer pt-a")
    for wrong in (None, "", "Bearer", "Bearer ", "pt-a", "Basic pt-a", "Bearer pt-ab", f"Bearer {hash_key('pt-a')}"):
        assert keyring.find(wrong) is None
    # Any bytes may be in a header.
    assert keyring.find("Bearer \udcff\x00é") is None


def test_the_queue_is_bounded(make_server, monkeypatch):
    app, state = make_server(max_queue=2)
    monkeypatch.setattr(state.worker, "submit", lambda *_, **__: None)

    async def fill():
        disconnected = asyncio.Event()
        running = [
            asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(n=3), disconnected=disconnected))
            for _ in range(2)
        ]
        while state.gate.count < 6:
            await asyncio.sleep(0.005)
        refused = await send(app, "POST", "/v1/completions", completion())
        health = await send(app, "GET", "/healthz")
        disconnected.set()
        await asyncio.gather(*running)
        return refused, health

    refused, health = asyncio.run(fill())
    assert (refused.status, refused.code) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert health.status == 200
    assert state.gate.count == 0


def test_a_stream_that_nobody_reads_keeps_no_place(make_server):
    app, state = make_server(deadline=0.5)
    unread = send(app, "POST", "/v1/completions", completion(stream=True), before_reading=asyncio.Event().wait)
    assert (asyncio.run(unread).ended, state.gate.count) == (False, 0)


def test_no_key_fills_the_gate_alone():
    gate = Gate(16, tenants=3)  # 2 for each, and 10 for all
    with contextlib.ExitStack() as inside:
        for _ in range(2 + 5):
            inside.enter_context(gate.admit(1, "busy"))
        with pytest.raises(ApiError) as caught:
            inside.enter_context(gate.admit(1, "busy"))
        assert caught.value.code == "queue_full"
        # Whoever has nothing of what is for all finds all that is left.
        inside.enter_context(gate.admit(7, "other"))
        inside.enter_context(gate.admit(2, "third"))
        assert gate.count == 16
    assert gate.count == 0
    with gate.admit(12, "one request may be large"):
        pass
    for tenants, most in ((1, 16), (3, 12)):
        with pytest.raises(ApiError) as caught, Gate(16, tenants).admit(most + 1):
            pass
        assert caught.value.status == 400, "it would never fit"


def test_many_busy_keys_leave_room_for_the_last():
    gate = Gate(288, tenants=30)
    with contextlib.ExitStack() as inside:
        for tenant in range(29):
            with contextlib.suppress(ApiError):
                while True:
                    inside.enter_context(gate.admit(1, f"busy {tenant}"))
        inside.enter_context(gate.admit(4, "last"))
        assert gate.count <= gate.limit


def test_requests_per_minute():
    now = [0.0]
    limit = Caller("a", KeyConfig(hash=hash_key(""), requests_per_minute=3), clock=lambda: now[0])

    def request_once():
        with limit.request():
            pass

    for _ in range(3):
        request_once()
    with pytest.raises(ApiError) as caught:
        request_once()
    assert (caught.value.code, caught.value.headers["Retry-After"]) == ("rate_limit_exceeded", "20")
    # A third of a minute later there is room for exactly one; a long pause saves up no more than one minute.
    for later, room in ((20.0, 1), (10_000.0, 3)):
        now[0] = later
        for _ in range(room):
            request_once()
        with pytest.raises(ApiError):
            request_once()


def test_concurrent_requests_are_counted_down_whatever_happens():
    limit = Caller("a", KeyConfig(hash=hash_key(""), concurrent=2))
    with limit.request(), limit.request():
        with pytest.raises(ApiError) as caught, limit.request():
            pass
        assert caught.value.code == "concurrency_limit_exceeded"
    with pytest.raises(OSError, match="gone"), limit.request():
        raise OSError("gone")
    with limit.request(), limit.request():
        pass
