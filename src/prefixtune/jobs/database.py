"""A data folder and a database belong together.

With another database, the folders of its jobs would look as if nobody had queued them, and be removed. With another
folder, as where a disk is not mounted, the files of all queued jobs would be missing, and the jobs would fail.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.jobs.folder import DataFolder, is_job_id
from prefixtune.utils.files import flush_to_disk
from prefixtune.utils.locks import file_lock

if TYPE_CHECKING:
    from prefixtune.jobs.queue import JobQueue

__all__ = ["check_database", "claim_database", "claim_folder"]


_LONGEST = 200
_LOCK_SECONDS = 5.0
"""Nobody takes long to rename a file."""
_SQLITE = "sqlite:///"


def check_database(data: DataFolder, url: str) -> None:
    """See that a data folder belongs to a database, or to none yet; writes nothing.

    Args:
        data: The folder; it may not be there yet.
        url: Of the database.

    Raises:
        ConfigError: It belongs to another one, or cannot be read.
    """
    known = _read(data.database_marker)
    if known and known != _digest(data, url):
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
        ConfigError: It belongs to another one, or cannot be read.
        PrefixError: It cannot be written.
    """
    _make_once(data, data.database_marker, _digest(data, url))
    check_database(data, url)


def claim_database(data: DataFolder, queue: JobQueue) -> None:
    """See that the jobs of a database belong to a data folder; if they belong to none, they do from now on.

    A folder without jobs is not that of a database which has some: its disk may not be mounted.

    Args:
        data: The folder, which is there.
        queue: The jobs of the database.

    Raises:
        ConfigError: They belong to another one, or this one cannot be read.
        PrefixError: The folder cannot be written.
        QueueUnavailableError: The database cannot be reached.
    """
    known = queue.folder()
    if not known:
        if _has_jobs(data) or not queue.has_jobs():
            _make_once(data, data.id_file, secrets.token_hex(16))
            known = queue.claim(_read(data.id_file))
        else:
            # Those jobs may be of another server, which has claimed the database meanwhile.
            known = queue.folder()
    if not known or known != _read(data.id_file):
        restored = (
            f"if this is their folder (restored from a backup, say), write {known} into {data.id_file.name} there"
        )
        raise ConfigError(
            f"the jobs of this database belong to another data folder than {str(data.root)!r}.",
            hint="name their folder by --data-folder, and check that its disk is mounted; for other jobs, name another "
            f"database by --database-url{f'; {restored}' if known else ''}.",
        )


def _has_jobs(data: DataFolder) -> bool:
    with contextlib.suppress(FileNotFoundError), os.scandir(data.jobs) as entries:
        return any(is_job_id(entry.name) for entry in entries)
    return False


def _read(path: Path) -> str:
    """A short file's text; empty: there is no such file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST).strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error


def _make_once(data: DataFolder, path: Path, text: str) -> None:
    """Make a short file in the data folder, if it is not there.

    Raises:
        PrefixError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        if path.exists():
            return
        temporary.write_text(f"{text}\n", encoding="utf-8")
        flush_to_disk(temporary)
        _name_once(temporary, path)
    except OSError as error:
        raise PrefixError(
            f"the data folder {str(data.root)!r} cannot be written: {error.strerror or error}.",
            hint="check its permissions.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _name_once(temporary: Path, path: Path) -> None:
    """Give a file its name unless another has it: the first of several processes wins.

    Raises:
        OSError: It cannot be renamed.
        PrefixError: The lock belongs to another user.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        # A file system without links: there, a file that is renamed replaces another.
        with file_lock(path.with_name(f".{path.name}.lock"), _LOCK_SECONDS) as held:
            if not held:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from None
            if not path.exists():
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
