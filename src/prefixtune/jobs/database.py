"""Which database a data folder belongs to: with another one, the folders of its jobs would look as if nobody had queued
them, and be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.jobs.folder import DataFolder

__all__ = ["check_database", "claim_folder"]


_LONGEST = 200
_SQLITE = "sqlite:///"


def check_database(data: DataFolder, url: str) -> None:
    """See that a data folder belongs to a database, or to none yet; writes nothing.

    Args:
        data: The folder; it may not be there yet.
        url: Of the database.

    Raises:
        ConfigError: It belongs to another one.
    """
    try:
        with open(data.database_marker, encoding="utf-8", errors="replace") as file:
            known = file.read(_LONGEST).strip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"{str(data.database_marker)!r} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error
    if known != _digest(data, url):
        raise ConfigError(
            f"the jobs of the data folder {str(data.root)!r} are queued in another database.",
            hint="give the --database-url that it was used with, or another --data-folder; if only the database's "
            f"address has changed, remove {data.database_marker.name} there.",
        )


def claim_folder(data: DataFolder, url: str) -> None:
    """As `check_database`; a folder that belongs to none belongs to this database from now on.

    Args:
        data: The folder, which is there.
        url: Of the database.

    Raises:
        ConfigError: It belongs to another one.
        PrefixError: It cannot be written.
    """
    marker = data.database_marker
    if not marker.exists():
        temporary = marker.with_name(f".{marker.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_text(f"{_digest(data, url)}\n", encoding="utf-8")
            _name_once(temporary, marker)
        except OSError as error:
            raise PrefixError(
                f"the data folder {str(data.root)!r} cannot be written: {error.strerror or error}.",
                hint="check its permissions.",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    check_database(data, url)


def _name_once(temporary: Path, path: Path) -> None:
    """Give a file its name unless another has it: the first of several processes wins."""
    with contextlib.suppress(FileExistsError):
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without links.
            os.replace(temporary, path)


def _digest(data: DataFolder, url: str) -> str:
    """A database's place without its user and password; inside of the data folder, wherever that lies."""
    if url.startswith(_SQLITE):
        path = Path(url.removeprefix(_SQLITE)).absolute()
        root = data.root.absolute()
        place = ["sqlite", str(path.relative_to(root) if path.is_relative_to(root) else path)]
    else:
        parts = urlsplit(url)
        options = parse_qs(parts.query)
        hosts = [parts.hostname or "", *options.get("host", []), os.environ.get("PGHOST", "")]
        ports = [str(parts.port or ""), *options.get("port", []), os.environ.get("PGPORT", ""), "5432"]
        place = ["postgresql", next(filter(None, hosts), ""), next(filter(None, ports)), unquote(parts.path)]
    return hashlib.sha256(json.dumps(place).encode("utf-8", "surrogateescape")).hexdigest()
