"""Start and stop."""

import asyncio
import os
import signal
import threading

import pytest

from prefixtune.utils.console import Console


def test_the_first_signal_drains_and_the_second_ends_the_process(make_server):
    from prefixtune.server.launch import GracefulServer

    _, state = make_server(drain_seconds=1000.0)
    server = GracefulServer(state)

    async def signals():
        seen = []
        server.loop = asyncio.get_running_loop()
        state.num_open += 1
        for _ in range(2):
            server.handle_exit(signal.SIGTERM, None)
            await asyncio.sleep(0.01)
            seen.append((state.draining, server.should_exit, server.force_exit))
        state.num_open -= 1
        await server.stopping
        return seen

    assert asyncio.run(signals()) == [(True, False, False), (True, True, True)]


@pytest.mark.parametrize("fails", [True, False])
def test_a_server_whose_engine_fails_exits_with_1(fails, make_server, monkeypatch):
    from prefixtune.engine.request import Request
    from prefixtune.server import launch

    _, state = make_server(port=0)

    def broken():
        raise RuntimeError("broken")

    def end():
        if fails:
            monkeypatch.setattr(state.worker, "step", broken)
            state.worker.submit(Request((1,)), lambda output: None)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch, "_load", lambda *_: state)
    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    monkeypatch.setattr(launch, "start_worker", lambda *_: None)
    timer = threading.Timer(0.5, end)
    timer.start()
    try:
        assert launch.run(state.config, Console(quiet=True)) == int(fails)
    finally:
        timer.join()
