"""A folder of prefixes, NAME.safetensors each, served by name.

A file is looked at on each request, by its header; it is read and checked as a whole when it is first requested. A bad
file is reported and not served. Whoever has a prefix keeps it when its file is replaced.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.file import HEADER_KEY, is_unread, read_table
from prefixtune.prefix.folder import (
    FolderBusyError,
    Signature,
    change_folder,
    check_name,
    check_regular_file,
    list_names,
    path_of,
    signature_of,
    signature_of_open,
)
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix
from prefixtune.server.logs import log
from prefixtune.utils.files import atomic_path

__all__ = ["PrefixCache", "PrefixStore", "StoreStats"]


_log = logging.getLogger(__name__)
_MAX_REASON_LENGTH = 500
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class StoreStats:
    """What the cache did so far, what is in it, and the files.

    Attributes:
        hits: Requested prefixes that were in memory.
        misses: Those that had to be read, or joined.
        evictions: Prefixes dropped to make room.
        bytes: Memory of the prefixes.
        loaded: How many are in memory.
        known: Files that can be served.
        refused: Files that cannot.
    """

    hits: int
    misses: int
    evictions: int
    bytes: int
    loaded: int
    known: int = 0
    refused: int = 0


class PrefixCache:
    """Loaded and joined prefixes, each with the version of its files. May be used from any thread.

    Args:
        max_bytes: Most that all prefixes together may take; the least recently used ones make room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Hashable, Prefix]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, version: Hashable) -> Prefix | None:
        """The prefix of this very version; None: it is not in memory."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] != version:
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: Hashable, version: Hashable, prefix: Prefix) -> None:
        """Keep a prefix that had to be read, or joined."""
        with self._lock:
            self._misses += 1
            self._drop(key)
            self._entries[key] = (version, prefix)
            self._bytes += prefix.num_bytes
            while self._bytes > self.max_bytes and len(self._entries) > 1:
                self._drop(next(iter(self._entries)))
                self._evictions += 1

    def drop(self, key: Hashable) -> None:
        """Forget a prefix."""
        with self._lock:
            self._drop(key)

    @property
    def stats(self) -> StoreStats:
        """What the cache did so far, and what is in it."""
        with self._lock:
            return StoreStats(self._hits, self._misses, self._evictions, self._bytes, len(self._entries))

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1].num_bytes


@dataclass(frozen=True)
class _File:
    """A file as it was when its header was read.

    Attributes:
        signature: None: it could not be read, and is looked at again the next time.
        header: As text, which takes the least memory; empty: it is not served.
        reason: Why it is not served.
        origin: The job that made it.
    """

    signature: Signature | None
    header: str = ""
    reason: str = ""
    origin: JobOrigin | None = None


class PrefixStore:
    """Prefixes by name, from a folder. May be used from any thread; all methods may wait for the disk.

    Args:
        folder: Created if it is missing.
        backbone: The model that they must fit.
        max_bytes: Most that all loaded prefixes together may take, in the backbone's dtype.
        allow_other_backbone: Accept prefixes that were trained for other weights, if the shapes fit.

    Attributes:
        cache: The prefixes in memory.

    Raises:
        PrefixError: The folder cannot be created or read.
    """

    def __init__(
        self, folder: str | Path, backbone: Backbone, *, max_bytes: int = 2**30, allow_other_backbone: bool = False
    ) -> None:
        self.folder = Path(folder).absolute()
        self._validator = PrefixValidator(backbone, max_bytes, allow_other_backbone=allow_other_backbone)
        self.cache = PrefixCache(max_bytes)
        self._files: dict[str, _File] = {}
        # One thread at a time reads a whole prefix: requests for the same one at once wait for one reading.
        self._loading = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unreadable(error) from error
        self.names()

    # --- what there is ------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All names that can be requested, sorted, as the folder is now.

        Raises:
            PrefixError: The folder itself cannot be read.
        """
        return sorted(name for name, file in self._look_at_all().items() if file.header)

    @property
    def refused(self) -> dict[str, str]:
        """Names of files that are not served, and why; as `names`."""
        return {name: file.reason for name, file in sorted(self._look_at_all().items()) if not file.header}

    def __contains__(self, name: str) -> bool:
        """Whether there is a file of this name, served or not."""
        return self._look(name) is not None

    def header(self, name: str) -> dict[str, Any]:
        """The header of a prefix's file; its tensors are not read for it.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is not served.
        """
        header: dict[str, Any] = json.loads(self._find(name).header)
        return header

    def modified(self, name: str) -> int:
        """When the file of a name was last written, in seconds since 1970; 0: it is not known."""
        file = self._look(name)
        return 0 if file is None or file.signature is None else file.signature[0] // 10**9

    def origin(self, name: str) -> JobOrigin | None:
        """The job that made a prefix, also of a file that is not served; None: no job, or no such file."""
        file = self._look(name)
        return None if file is None else file.origin

    def origins(self) -> dict[str, JobOrigin]:
        """All files that jobs made, served or not."""
        return {name: file.origin for name, file in self._look_at_all().items() if file.origin is not None}

    @property
    def stats(self) -> StoreStats:
        """The cache, and the files as they were last looked at; waits for no disk."""
        files = list(self._files.values())
        known = sum(bool(file.header) for file in files)
        return StoreStats(**{**vars(self.cache.stats), "known": known, "refused": len(files) - known})

    # --- getting one --------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Prefix:
        """A prefix, in the backbone's dtype and on its device.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is broken, or was replaced by one that is.
            PrefixError: Its file cannot be read now.
        """
        file = self._find(name)
        cached = self.cache.get(name, file.signature)
        if cached is not None:
            return cached
        with self._loading:
            file = self._find(name)
            cached = self.cache.get(name, file.signature)
            if cached is not None:
                return cached
            try:
                prefix = self._validator.load_copy(path_of(self.folder, name), name)
            except CheckpointError as error:
                if is_unread(error):
                    # It may pass, so the file is not refused.
                    log("prefix_unread", level=logging.WARNING, prefix=name, reason=str(error.__cause__ or error))
                    raise PrefixError(f"cannot read the prefix {name!r} now.", hint="try again.") from error
                self._files[name] = self._refused(name, file.signature, error.message, file.origin)
                raise CheckpointError(self._files[name].reason, hint=error.hint) from error
            self.cache.put(name, file.signature, prefix)
            return prefix

    def version(self, name: str) -> Hashable:
        """What changes when the file of a name does."""
        file = self._look(name)
        return None if file is None else file.signature

    def open_file(self, name: str) -> tuple[BinaryIO, dict[str, Any]]:
        """A prefix's file, as it is now, to be read and closed, and its header; what replaces it meanwhile is not seen.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is not served.
            PrefixError: It cannot be read now.
        """
        known = self._find(name)
        try:
            file = open(path_of(self.folder, name), "rb")  # noqa: SIM115
        except OSError as error:
            raise PrefixError(f"cannot read {name!r}: {error.strerror}.", hint="try again later.") from error
        # Otherwise it was replaced between the two looks, and the header is another file's.
        if signature_of_open(file) == known.signature:
            return file, json.loads(known.header)
        file.close()
        raise PrefixError(f"cannot read {name!r}: it is being replaced.", hint="try again later.")

    # --- changing the folder ------------------------------------------------------------------------------------------

    def put(self, name: str, source: str | Path) -> None:
        """Add a file under a name, or replace the one of that name: checked as a whole, then moved there at once.

        Raises:
            RequestError: The name is not allowed.
            CheckpointError: The file is broken or does not fit the backbone; nothing was changed.
            FolderBusyError: Jobs are being published all the time; nothing was changed.
            PrefixError: It cannot be read, or the folder cannot be written; nothing was changed.
        """
        check_name(name)
        with contextlib.ExitStack() as changing:
            try:
                with atomic_path(path_of(self.folder, name)) as temporary:
                    self._validator.read_header(Path(source))
                    # The copy is checked as a whole: nobody else writes to it.
                    shutil.copyfile(source, temporary)
                    self._validator.load(temporary, name)
                    changing.enter_context(change_folder(self.folder, _LOCK_SECONDS))
            except OSError as error:
                raise PrefixError(f"cannot read the file for {name!r}: {error.strerror}.", hint="try again.") from error
            except CheckpointError as error:
                if is_unread(error):
                    raise PrefixError(f"cannot read the file for {name!r} now.", hint="try again.") from error
                reason = self._without_paths(error.message.replace(str(source), name))
                raise CheckpointError(f"the file for {name!r} is not accepted: {reason}", hint=error.hint) from error
            except FolderBusyError:
                raise
            except PrefixError as error:
                raise PrefixError(self._without_paths(error.message), hint=error.hint) from error

    def delete(self, name: str) -> None:
        """Remove a prefix and its file; requests that have it go on.

        Raises:
            RequestError: There is no such prefix.
            FolderBusyError: Jobs are being published all the time.
            PrefixError: The file cannot be removed.
        """
        if self._look(name) is None:
            raise _no_such_prefix(name)
        with change_folder(self.folder, _LOCK_SECONDS):
            try:
                path_of(self.folder, name).unlink(missing_ok=True)
            except OSError as error:
                raise PrefixError(
                    f"cannot remove {name!r}: {error.strerror}.", hint="check its permissions."
                ) from error

    # --- what is known of each file -----------------------------------------------------------------------------------

    def _look_at_all(self) -> dict[str, _File]:
        try:
            names = list_names(self.folder)
        except OSError as error:
            raise _unreadable(error) from error
        found = {name: self._look(name) for name in names | self._files.keys()}
        return {name: file for name, file in found.items() if file is not None}

    def _find(self, name: str) -> _File:
        """A file that can be served.

        Raises:
            RequestError: There is none of that name.
            CheckpointError: It is not served.
        """
        file = self._look(name)
        if file is None:
            raise _no_such_prefix(name)
        if not file.header:
            raise CheckpointError(f"the prefix {name!r} is not served: {file.reason}", hint="replace its file.")
        return file

    def _look(self, name: str) -> _File | None:
        """A file as it is now; its header is read if it is new or was replaced. None: there is none."""
        previous = self._files.get(name)
        # A name from outside must not lead out of the folder.
        if os.sep in name or "\0" in name or name.startswith("."):
            return None
        signature = signature_of(path_of(self.folder, name))
        if previous is not None and previous.signature is not None and previous.signature == signature:
            return previous
        file = self._read(name, signature, previous.origin if previous else None)
        if file is None:
            self._files.pop(name, None)
        else:
            self._files[name] = file
        if previous is not None:
            self.cache.drop(name)
        return file

    def _read(self, name: str, signature: Signature | None, origin: JobOrigin | None) -> _File | None:
        """What a file's header says, or why it is not served; whatever it contains, this raises nothing."""
        path = path_of(self.folder, name)
        try:
            if signature is None and not os.path.lexists(path):
                return None
            check_name(name)
            check_regular_file(self.folder, name)
            header = self._validator.read_header(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            # Perhaps only now: looked at again the next time.
            return self._refused(name, None, f"it cannot be read: {getattr(error, 'strerror', None) or error}", origin)
        except PrefixError as error:
            return self._refused(name, signature, error.message, self._origin_of(name) or origin)
        except Exception as error:
            # One bad file must not hide the others.
            _log.exception("a file in the folder of prefixes cannot be read.")
            return self._refused(name, signature, f"it cannot be read: {type(error).__name__}", origin)
        return _File(signature, header, origin=job_origin(json.loads(header))) if signature is not None else None

    def _origin_of(self, name: str) -> JobOrigin | None:
        """The job that made a file that is not served, as far as its header can be read."""
        with contextlib.suppress(OSError, ValueError, PrefixError):
            check_regular_file(self.folder, name)
            return job_origin(read_table(path_of(self.folder, name), HEADER_KEY)[1])
        return None

    def _refused(self, name: str, signature: Signature | None, reason: str, origin: JobOrigin | None) -> _File:
        """A file that is not served; where it does not say who made it, it stays whose it was."""
        return _File(signature, reason=self._without_paths(reason)[:_MAX_REASON_LENGTH], origin=origin)

    def _without_paths(self, message: str) -> str:
        """A message without the folder's path, which callers must not see."""
        return message.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "the folder")


def _no_such_prefix(name: str) -> RequestError:
    return RequestError(f"there is no prefix {name[:128]!r}.", hint="list the names first.")


def _unreadable(error: OSError) -> PrefixError:
    return PrefixError(f"the folder of prefixes cannot be read: {error.strerror}.", hint="check its permissions.")
