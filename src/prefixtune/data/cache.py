"""Columns of numbers in files: written piece by piece, mapped into memory, and kept in the user's cache by content.

An entry is a folder with an `index.json` and one file for each column, the numbers alone in little-endian order. Its
name is a hash of everything that its content depends on, so that an entry never has to be refreshed; what was not used
for longest is removed where all entries together are too large. An entry that is not as it was written is built again.
Where it cannot be kept, or another process that builds it stands still, it is a temporary one.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from prefixtune.errors import ConfigError, PrefixError, PrefixWarning
from prefixtune.utils.files import flush_to_disk, fsync, remove_abandoned, reporting_write_errors, work_folder
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.locks import file_lock

__all__ = ["SWITCH", "ColumnWriter", "Stored", "content_key", "data_folder", "stored"]

SWITCH = "PREFIXTUNE_DATA_CACHE"
"""Environment variable: most gigabytes that the cache of data holds; 0: data is not kept."""
DEFAULT_GIGABYTES = 20.0

_INDEX = "index.json"
_FORMAT = 1
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_BLOCK = 2**22
_LOOK = 10.0
"""Seconds after which a process that waits for another one looks whether that goes on."""
_PATIENCE = 300.0
"""Seconds for which the other one may write nothing."""


@dataclass(frozen=True, eq=False)
class Stored:
    """An entry that is open.

    Attributes:
        columns: Its numbers by name, mapped from the files.
        facts: What else was stored, as JSON.
        maps: The memory that the columns are in.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Any]
    maps: tuple[mmap.mmap, ...] = field(default=(), repr=False)

    def release(self) -> None:
        """Take what was read out of this process's memory; the system may still have it when it is read again."""
        for memory in self.maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                memory.madvise(mmap.MADV_DONTNEED)


class ColumnWriter:
    """Appends to the columns of an entry.

    Args:
        folder: Of the entry.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._columns: dict[str, dict[str, Any]] = {}

    def append(self, column: str, numbers: npt.NDArray[Any]) -> None:
        """Append numbers to a column, which all have one type."""
        numbers = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
        if column not in self._files:
            self._files[column] = open(_file(self._folder, column), "wb", buffering=_BLOCK)  # noqa: SIM115  see close
            self._columns[column] = {"dtype": numbers.dtype.str, "count": 0, "crc32": 0}
        stored, data = self._columns[column], np.ascontiguousarray(numbers).data.cast("B")
        self._files[column].write(data)
        stored["count"] += len(numbers)
        stored["crc32"] = zlib.crc32(data, stored["crc32"])

    def drop(self, column: str) -> None:
        """Leave a column out after all."""
        if column in self._files:
            self._files.pop(column).close()
            del self._columns[column]
            _file(self._folder, column).unlink()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the index, and flush everything to disk."""
        self.close()
        index = _folder_index(self._columns, facts)
        (self._folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        flush_to_disk(*(_file(self._folder, column) for column in self._columns), self._folder / _INDEX)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


Build = Callable[[ColumnWriter], Mapping[str, Any]]
"""Writes the columns of an entry and returns its facts."""


def content_key(**facts: Any) -> str:
    """A name for what depends on these facts alone."""
    return hashlib.sha256(json.dumps([_FORMAT, facts], sort_keys=True).encode()).hexdigest()[:40]


def data_folder() -> Path:
    """Where entries are kept: `data` in the folder for everything that can be made again."""
    return cache_folder() / "data"


def stored(key: str | None, build: Build) -> Stored:
    """The entry of a key: the one that is there, or one that is built; two processes build it once.

    A process that waits for another one warns of it, and builds a temporary entry if that stands still.

    Args:
        key: From `content_key`; None: the entry is temporary, and removed when it is no longer used or the program
            ends.
        build: Makes the entry.

    Raises:
        PrefixError: The disk is full, or the folder cannot be written.
        ConfigError: The environment variable holds no number.
    """
    limit = _limit_bytes()
    if key is None or not limit:
        return _temporary(build)
    folder = data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in _UNWRITABLE:  # a container's home may be read-only
            return _temporary(build)
        raise _no_room(folder, error) from error
    entry = folder / key
    if (found := _open(entry)) is not None:
        return found
    with _lock_to_build(folder, key) as mine:
        if (found := _open(entry)) is None and mine:
            shutil.rmtree(entry, ignore_errors=True)
            with _reporting(folder), work_folder(folder, key) as work:
                made = work / "entry"
                _write(made, build)
                with contextlib.suppress(OSError):  # without locks, another process may have been quicker
                    os.replace(made, entry)
                fsync(folder)
            found = _open(entry)
            _remove_oldest(folder, limit, keep=key)
    # None: the other process stands still, or one that needs room has removed the entry before it was open.
    return _temporary(build) if found is None else found


@contextlib.contextmanager
def _lock_to_build(folder: Path, key: str) -> Iterator[bool]:
    """Hold the lock of an entry while the block runs; yields False if another process has it and stands still."""
    written, idle = -1, 0.0
    while idle < _PATIENCE:
        with file_lock(folder / f"{key}.lock", timeout=_LOOK) as mine:
            if mine:
                yield True
                return
        if written < 0:
            _warn(f"another process prepares the same data in {str(folder)!r}; waiting for it.")
        before, written = written, _written(folder, key)
        idle = idle + _LOOK if written == before else 0.0
    _warn(f"the other process has written nothing for {idle:.0f} seconds; the data is prepared for this run alone.")
    yield False


def _written(folder: Path, key: str) -> int:
    """Bytes of an entry that is being built."""
    size = 0
    for file in folder.glob(f".{key}.*.tmp/entry/*"):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size


def _warn(text: str) -> None:
    warnings.warn(text, PrefixWarning, stacklevel=2)


def _temporary(build: Build) -> Stored:
    parent = tempfile.gettempdir()
    with _reporting(Path(parent)):
        made = Path(tempfile.mkdtemp(prefix="prefixtune-data-", dir=parent))
        try:
            _write(made / "entry", build)
            found = _open(made / "entry", check=False)
        finally:
            # What is mapped stays readable without its name; where the system removes no such file, it goes at the end.
            shutil.rmtree(made, ignore_errors=True)
            if made.exists():
                atexit.register(shutil.rmtree, made, ignore_errors=True)
    if found is None:
        raise PrefixError(f"{str(made)!r} cannot be read back.", hint="check the disk.")
    return found


def _write(folder: Path, build: Build) -> None:
    folder.mkdir()
    writer = ColumnWriter(folder)
    try:
        writer.finish(build(writer))
    finally:
        with contextlib.suppress(OSError):  # a failed write was reported already
            writer.close()


def _open(folder: Path, *, check: bool = True) -> Stored | None:
    """An entry; None: there is none, or it is not as it was written."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        described = index["columns"]
        if index != _folder_index(described, index["facts"]):
            return None
        maps = {name: _map(_file(folder, name), facts, check=check) for name, facts in described.items()}
        columns = {name: _numbers(maps[name], facts["dtype"]) for name, facts in described.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    with contextlib.suppress(OSError):  # an entry of another user
        os.utime(folder / _INDEX)
    return Stored(columns, index["facts"], tuple(some for some in maps.values() if some is not None))


def _map(path: Path, facts: Mapping[str, Any], *, check: bool) -> mmap.mmap | None:
    """A column's file in memory; None: it is empty.

    Raises:
        ValueError: The file is not as it was written.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size != facts["count"] * np.dtype(facts["dtype"]).itemsize:
            raise ValueError("another size")
        crc = 0
        while check and (block := file.read(_BLOCK)):
            crc = zlib.crc32(block, crc)
        if check and crc != facts["crc32"]:
            raise ValueError("other numbers")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if facts["count"] else None


def _numbers(memory: mmap.mmap | None, dtype: str) -> npt.NDArray[Any]:
    return np.empty(0, dtype) if memory is None else np.frombuffer(memory, dtype)


def _folder_index(columns: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([columns, facts], sort_keys=True).encode()).hexdigest()
    return {"format": _FORMAT, "columns": dict(columns), "facts": dict(facts), "sha256": digest}


def _file(folder: Path, column: str) -> Path:
    return folder / f"{column}.bin"


def _remove_oldest(folder: Path, limit: int, *, keep: str) -> None:
    """Remove what killed processes left, and the entries that were not used for longest until the rest fits.

    Files that are mapped stay readable.
    """
    for name in {left.name[1:].partition(".")[0] for left in folder.glob(".*.tmp")}:
        remove_abandoned(folder, name)
    entries: list[tuple[float, int, Path]] = []
    for index in folder.glob(f"*/{_INDEX}"):
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in index.parent.iterdir())
            entries.append((index.stat().st_mtime, size, index.parent))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= limit:
            return
        if entry.name != keep:
            # The index first: what is left of a removed entry is no entry.
            with contextlib.suppress(OSError):
                (entry / _INDEX).unlink()
                total -= size
            shutil.rmtree(entry, ignore_errors=True)


def _limit_bytes() -> int:
    """Most bytes of all entries; 0: nothing is kept.

    Raises:
        ConfigError: The environment variable holds no number.
    """
    text = os.environ.get(SWITCH, "").strip()
    try:
        gigabytes = float(text) if text else DEFAULT_GIGABYTES
        if not 0 <= gigabytes < math.inf:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{SWITCH} is {text!r}, but must be a number of gigabytes.", hint="set it to 20, or to 0 to keep no data."
        ) from None
    return int(gigabytes * 1e9)


@contextlib.contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """Turn errors of writing into one line that names the way out."""
    try:
        with reporting_write_errors(folder):
            yield
    except PrefixError as error:
        if type(error) is PrefixError and isinstance(error.__cause__, OSError):
            raise _no_room(folder, error.__cause__) from error
        raise


def _no_room(folder: Path, error: OSError) -> PrefixError:
    return PrefixError(
        f"the data cannot be written to {str(folder)!r}: {error.strerror or error}.",
        hint="free some space, or choose another folder: PREFIXTUNE_HOME for data that is kept, TMPDIR for other data.",
    )
