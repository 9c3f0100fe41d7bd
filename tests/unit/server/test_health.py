"""Health, status, and the watch on the folder."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_client import Response, bearer, completion, send
from prefixtune.errors import PrefixError
from prefixtune.jobs.files import FileStore
from prefixtune.server.auth import hash_key
from prefixtune.server.launch import FolderWatch, watch_folder
from prefixtune.server.settings import KeyConfig


def test_while_draining_only_running_requests_go_on(make_server: Callable[..., Any]) -> None:
    app, state = make_server()

    async def drain() -> tuple[Response, Response, Response, Response, bool]:
        running = asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(max_tokens=100)))
        while not state.admission.texts:
            await asyncio.sleep(0.005)
        draining = asyncio.ensure_future(state.drain(20))
        await asyncio.sleep(0)
        refused = await send(app, "POST", "/v1/completions", completion())
        alive, ready = await send(app, "GET", "/healthz"), await send(app, "GET", "/readyz")
        return await running, refused, alive, ready, await draining

    done, refused, alive, ready, in_time = asyncio.run(drain())
    assert (done.status, done.json["usage"]["completion_tokens"]) == (200, 100)
    assert (refused.status, refused.code) == (503, "draining")
    assert "retry-after" in refused.headers
    assert (alive.status, ready.status, in_time) == (200, 503, True)


def test_a_request_that_is_not_admitted_yet_goes_on_while_draining(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server()
    begun, release = threading.Event(), threading.Event()

    def look_slowly(self: FileStore, *_: Any) -> list[Any]:
        begun.set()
        assert release.wait(20)
        return []

    monkeypatch.setattr(FileStore, "list", look_slowly)

    async def drain() -> tuple[bool, Response, bool]:
        running = asyncio.ensure_future(send(app, "GET", "/v1/files"))
        assert await asyncio.to_thread(begun.wait, 20)
        draining = asyncio.ensure_future(state.drain(20))
        await asyncio.sleep(0.05)
        waits = not draining.done()
        release.set()
        return waits, await running, await draining

    waits, response, in_time = asyncio.run(drain())
    assert (waits, response.status, in_time) == (True, 200, True)


def test_status_hides_the_names_of_other_callers_models(make_server: Callable[..., Any]) -> None:
    keys = {name: KeyConfig(hash=hash_key(f"pt-{name}"), prefixes=(name,)) for name in "ab"}
    app, state = make_server(keys=keys)

    async def look() -> list[Response]:
        disconnected = asyncio.Event()
        running = [
            asyncio.ensure_future(
                send(
                    app,
                    "POST",
                    "/v1/completions",
                    completion(model=name, max_tokens=500),
                    headers=bearer(name),
                    disconnected=disconnected,
                )
            )
            for name in "ab"
        ]
        while len(state.worker.snapshot().running) < 2:
            await asyncio.sleep(0.005)
        statuses = [await send(app, "GET", "/v1/status", headers=bearer(name)) for name in "ab"]
        disconnected.set()
        await asyncio.gather(*running)
        return statuses

    for name, response in zip("ab", asyncio.run(look()), strict=True):
        assert sorted(str(text["model"]) for text in response.json["running"]) == sorted(["None", name])


def test_a_link_to_itself_is_one_bad_file_and_watching_goes_on(make_server: Callable[..., Any], tmp_path: Path) -> None:
    _, state = make_server(reload_seconds=0.02)
    folder = tmp_path / "prefixes"

    async def watch() -> None:
        watching = asyncio.ensure_future(watch_folder(state))
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        async with asyncio.timeout(10):
            while "loop" not in state.store.refused:
                await asyncio.sleep(0.01)
            (folder / "c.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
            while "c" not in state.store:
                await asyncio.sleep(0.01)
        assert not watching.done()
        watching.cancel()

    asyncio.run(watch())
    assert state.store.names() == ["a", "b", "c"]
    assert list(state.store.refused) == ["loop"]


def test_a_folder_that_is_back_as_it_was_is_well_again(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixtune.server.launch._WATCH_SECONDS", 0.02)
    _, state = make_server(train_workers=1)
    due, failures = FolderWatch.is_due, list[int]()

    def fails_twice(self: FolderWatch) -> bool:
        # After the looks at the start, which find nothing new later.
        if self._seen is not None and self._next_look == math.inf and len(failures) < 2:
            failures.append(1)
            raise OSError(errno.ESTALE, "stale")
        return due(self)

    monkeypatch.setattr(FolderWatch, "is_due", fails_twice)

    async def watch() -> None:
        watching = asyncio.ensure_future(watch_folder(state))
        async with asyncio.timeout(10):
            while not state.folder_error:
                await asyncio.sleep(0.005)
            while state.folder_error:
                await asyncio.sleep(0.005)
        watching.cancel()

    asyncio.run(watch())
    assert len(failures) == 2


@pytest.mark.parametrize("error", [RuntimeError("/srv/x"), PrefixError("/srv/x"), RecursionError(), MemoryError()])
def test_after_any_error_watching_goes_on_with_pauses_and_health_reports_it(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    app, state = make_server(reload_seconds=0.01)
    reload, times, asked = state.store.reload, list[float](), threading.Event()

    def failing() -> None:
        times.append(time.monotonic())
        if len(times) <= 4:
            raise error
        # The folder is well again only once its error has been asked for.
        assert asked.wait(20)
        reload()

    monkeypatch.setattr(state.store, "reload", failing)

    async def watch() -> list[Any]:
        watching, reports = asyncio.ensure_future(watch_folder(state)), []
        async with asyncio.timeout(20):
            while len(times) < 5:
                await asyncio.sleep(0.001)
            reports.append([(await send(app, "GET", path)) for path in ("/healthz", "/readyz")])
            asked.set()
            while len(times) < 7:
                await asyncio.sleep(0.001)
            reports.append([(await send(app, "GET", path)) for path in ("/healthz", "/readyz")])
        watching.cancel()
        return reports

    with caplog.at_level(logging.WARNING, "prefixtune.server"):
        bad, good = asyncio.run(watch())
    # Loaded prefixes are still served.
    assert [(response.status, response.json) for response in bad] == [
        (200, {"status": "ok", "folder": "cannot be read"})
    ] * 2
    assert [(response.status, response.json) for response in good] == [(200, {"status": "ok", "folder": "ok"})] * 2
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(pause > 0.018 * 2**index for index, pause in enumerate(pauses[:4])), "each pause is twice the one before"
    assert [record.getMessage() for record in caplog.records] == ["reload_failed"] * 4
