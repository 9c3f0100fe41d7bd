"""A server's own socket file: no other server takes it, from before it listens until it has ended."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from child_process import kill, start_child
from prefixtune.errors import ConfigError
from prefixtune.server.listener import bind
from prefixtune.server.settings import ServeConfig

LOADING = """
from prefixtune.server.listener import bind
from prefixtune.server.settings import ServeConfig
with bind(ServeConfig(host=sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "serve.sock"


@pytest.fixture
def config(path: Path) -> ServeConfig:
    return ServeConfig(host=f"unix:{path}")


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_a_server_that_loads_or_ends_keeps_its_socket(path: Path, config: ServeConfig) -> None:
    with bind(config) as listener:
        # It loads its model: the file is there, and nobody listens yet.
        with pytest.raises(ConfigError, match="in use by another server") as refused, bind(config):
            pass
        assert "choose another file in --host" in refused.value.hint
        listener.listen()
        assert answers(path)
        # It ends: its worker saves, and nobody listens any more.
        listener.close()
        with pytest.raises(ConfigError, match="in use by another server"), bind(config):
            pass
        assert path.is_socket()
    # Whoever made the folder can remove it.
    assert list(path.parent.iterdir()) == []
    with bind(config) as listener:
        listener.listen()
        assert answers(path)


def test_the_lock_of_a_server_ends_with_it_however_that_ends(path: Path, config: ServeConfig) -> None:
    other = start_child(LOADING, config.host)
    try:
        with pytest.raises(ConfigError, match="in use by another server"), bind(config):
            pass
    finally:
        kill(other)
    # Its files are left.
    assert path.is_socket()
    with bind(config) as listener:
        listener.listen()
        assert answers(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EACCES, errno.EROFS])
def test_where_there_are_no_locks_a_server_starts_all_the_same(
    path: Path, config: ServeConfig, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr("prefixtune.utils.locks.acquire_lock", fail)
    with bind(config) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match="in use"), bind(config):
            pass
        assert answers(path)


def test_a_lock_of_another_user_is_named(path: Path, config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("prefixtune.utils.locks.acquire_lock", fail)
    path.parent.mkdir()
    (path.parent / "serve.sock.lock").touch()
    with pytest.raises(ConfigError, match="belongs to another user"), bind(config):
        pass
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="cannot listen on the socket"),
        bind(ServeConfig(host=f"unix:{tmp_path / 'file' / 'serve.sock'}")),
    ):
        pass
