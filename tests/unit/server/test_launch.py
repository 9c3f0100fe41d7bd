"""Start and stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any


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
