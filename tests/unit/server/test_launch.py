"""Start and stop."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.server.settings import ServeConfig
from prefixtune.utils.console import Console


def test_the_first_signal_drains_and_the_second_ends_the_process(make_server: Callable[..., Any]) -> None:
    from prefixtune.server.launch import GracefulServer

    _, state = make_server(drain_seconds=1000.0)
    server = GracefulServer(state)

    async def signals() -> list[tuple[bool, bool, bool]]:
        seen = []
        server.loop = asyncio.get_running_loop()
        with state.open_requests.request():
            for _ in range(2):
                server.handle_exit(signal.SIGTERM, None)
                await asyncio.sleep(0.01)
                seen.append((state.draining, server.should_exit, server.force_exit))
        assert server.stopping is not None
        await server.stopping
        return seen

    assert asyncio.run(signals()) == [(True, False, False), (True, True, True)]


def test_an_error_while_it_stops_ends_the_server_all_the_same(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune.server.launch import GracefulServer

    _, state = make_server()
    server = GracefulServer(state)

    async def fail(seconds: float) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(state, "drain", fail)

    async def stop() -> None:
        server.loop = asyncio.get_running_loop()
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.sleep(0.01)
        assert server.stopping is not None
        await server.stopping

    with pytest.raises(ZeroDivisionError):
        asyncio.run(stop())
    assert (server.should_exit, server.force_exit) == (True, False)


def test_too_many_slots_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_slots"):
        ServeConfig(prefixes=str(tmp_path), num_slots=10**9, backbone="/no/model")


def test_a_data_folder_that_cannot_be_written_is_said_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefixtune.server.launch import run

    # Such as a disk that is not mounted.
    (tmp_path / "data").symlink_to(tmp_path / "missing" / "data")
    config = ServeConfig(prefixes=str(tmp_path), data_folder=str(tmp_path / "data"), backbone="/no/model")
    # Texts are generated all the same: the model is loaded.
    with pytest.raises(PrefixError, match="/no/model"):
        run(config, Console())
    assert "requests to train will be refused: cannot write" in capsys.readouterr().err


def test_the_collector_does_not_look_at_what_a_server_has_loaded(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune.server import launch

    _, state = make_server(port=0, train_workers=0)
    kept: list[int] = []
    monkeypatch.setattr(launch, "_load", lambda *_: state)
    monkeypatch.setattr(launch, "configure_logging", lambda _: None)
    monkeypatch.setattr(launch.GracefulServer, "run", lambda *_, **__: kept.append(gc.get_freeze_count()))
    assert launch.run(state.config, Console(quiet=True)) == 0
    assert kept[0] > 0
