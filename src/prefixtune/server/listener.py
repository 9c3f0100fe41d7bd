"""The socket that a server listens on: an address, or a file."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.server.settings import ServeConfig
from prefixtune.utils.locks import file_lock

__all__ = ["bind"]


@contextlib.contextmanager
def bind(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket on the server's address while the block runs; it does not listen yet.

    Raises:
        ConfigError: The address cannot be used.
    """
    if not config.socket_file:
        with _bind_address(config) as listener:
            yield listener
        return
    path = Path(config.socket_file)
    with _only_server(path), _bind_file(path) as listener:
        try:
            yield listener
        finally:
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


@contextlib.contextmanager
def _only_server(path: Path) -> Iterator[None]:
    """Keep other servers from a socket's file while the block runs: also before this one listens, and while it ends.

    Raises:
        ConfigError: Another server has the file, or its folder cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_listen(path, error) from error
    with contextlib.ExitStack() as stack:
        try:
            # In a folder that may not be written, everybody gets the lock, and nobody can bind the socket.
            is_held = stack.enter_context(file_lock(Path(f"{path}.lock")))
        except PrefixError as error:
            raise ConfigError(error.message, hint=error.hint) from error
        if not is_held:
            raise ConfigError(
                f"cannot listen on the socket {str(path)!r}: it is in use by another server, which may be starting or "
                "ending.",
                hint="wait until that one has ended, or choose another file in --host.",
            )
        yield


def _bind_file(path: Path) -> socket.socket:
    """A Unix socket that only this user can open."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _is_listened_to(path):
            # Of a server that was killed.
            path.unlink()
        listener.bind(str(path))
        # Nobody can connect before it listens.
        path.chmod(0o600)
    except OSError as error:
        listener.close()
        raise _cannot_listen(path, error) from error
    return listener


def _cannot_listen(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on the socket {str(path)!r}: {error.strerror or error}.",
        hint="choose another file in --host; a path has at most 107 characters.",
    )


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
