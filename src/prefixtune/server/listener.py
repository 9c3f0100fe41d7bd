"""The socket that a server listens on: an address, or a file."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from prefixtune.errors import ConfigError
from prefixtune.server.settings import ServeConfig

__all__ = ["bind"]


@contextlib.contextmanager
def bind(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket on the server's address while the block runs; it does not listen yet.

    Raises:
        ConfigError: The address cannot be used.
    """
    path = Path(config.socket_file) if config.socket_file else None
    with _bind_address(config) if path is None else _bind_file(path) as listener:
        try:
            yield listener
        finally:
            if path is not None:
                path.unlink(missing_ok=True)


def _bind_address(config: ServeConfig) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}.",
            hint="choose another --port, or 0 for any free one.",
        ) from error
    return listener


def _bind_file(path: Path) -> socket.socket:
    """A Unix socket that only this user can open."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_socket() and not _is_listened_to(path):
            # Of a server that was killed.
            path.unlink()
        listener.bind(str(path))
        # Nobody can connect before it listens.
        path.chmod(0o600)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on the socket {str(path)!r}: {error.strerror or error}.",
            hint="choose another file in --host; a path has at most 107 characters.",
        ) from error
    return listener


def _is_listened_to(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
