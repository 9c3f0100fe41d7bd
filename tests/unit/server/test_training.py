"""The server's side of training: requests that wait for the database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prefixtune.server import training as training_module
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training import Training


def test_a_request_that_could_not_begin_to_wait_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(ServeConfig(data_folder=str(tmp_path / "data")), is_open=True)
    monkeypatch.setattr(training, "_open_queue", lambda: None)

    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(training._threads, "submit", fail)
        for _ in range(training_module._MOST_WAITING):
            with pytest.raises(RuntimeError):
                asyncio.run(training.ask(lambda _: 1, "ann"))
    assert asyncio.run(training.ask(lambda _: 1, "ann")) == 1
    assert not training._waiting
    training.close()
