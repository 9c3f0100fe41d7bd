"""A folder of prefixes, NAME.safetensors each, served by name.

A look at the folder reads headers only; a prefix is read and checked as a whole when it is first requested. A bad file
is reported and not served. A replaced file takes effect for requests from then on; whoever has a prefix keeps it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.validation import PrefixValidator
from prefixtune.errors import CheckpointError, PrefixError, RequestError, causes, did_you_mean
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
from prefixtune.prefix.header import JobOrigin, job_origin, read_outline
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.tensor_file import is_unread
from prefixtune.server.logs import log
from prefixtune.server.models.cache import CacheStats, PrefixCache
from prefixtune.utils.files import atomic_path

__all__ = ["PrefixStore", "StoreStats"]


_log = logging.getLogger(__name__)
_MAX_REASON_LENGTH = 500
_LOCK_SECONDS = 10.0
_FEW = 50
"""Names among which a similar one is looked for; among many it would hold up the event loop."""
_MOST_OPENED = 5
"""How often a file is opened that is replaced meanwhile."""


@dataclass(frozen=True)
class StoreStats(CacheStats):
    """The cache, and the files.

    Attributes:
        known: Files that can be served.
        refused: Files that cannot.
    """

    known: int
    refused: int


@dataclass(frozen=True)
class _Known:
    """A file as it was when its header was read; the header as text, which takes the least memory."""

    signature: Signature
    header: str
    origin: JobOrigin | None


@dataclass(frozen=True)
class _Refused:
    """A file that is not served, and why; without a signature it is looked at again the next time."""

    signature: Signature | None
    reason: str
    origin: JobOrigin | None


class PrefixStore:
    """Prefixes by name, from a folder. May be used from any thread.

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
        self._known: dict[str, _Known] = {}
        self._refused: dict[str, _Refused] = {}
        # Over `_known` and `_refused`; held for moments only, so that no request for a loaded prefix waits for a disk.
        self._lock = threading.Lock()
        # One thread at a time reads or writes files.
        self._file_lock = threading.Lock()
        # Names whose files could not be read at the last try.
        self._unread: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unreadable(error) from error
        self.reload()

    # --- what there is ------------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Look at the folder again: new, replaced and removed files.

        Raises:
            PrefixError: The folder itself cannot be read; what was known stays known.
        """
        with self._file_lock:
            names = self._names_in_folder()
            for name in sorted(names):
                self._refresh(name)
            with self._lock:
                for name in (self._known.keys() | self._refused.keys()) - names:
                    self._forget(name)

    def names(self) -> list[str]:
        """All names that can be requested, sorted."""
        with self._lock:
            return sorted(self._known)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._known

    def __len__(self) -> int:
        with self._lock:
            return len(self._known)

    @property
    def has_few(self) -> bool:
        """Whether there are so few names that a similar one may be looked for among them."""
        return len(self) <= _FEW

    def header(self, name: str) -> dict[str, Any]:
        """The header of a prefix's file; its tensors are not read for it.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is not served.
        """
        with self._lock:
            header: dict[str, Any] = json.loads(self._lookup(name).header)
        return header

    def modified(self, name: str) -> int:
        """When the file of a name was last written, in seconds since 1970, as far as it is known; else 0."""
        with self._lock:
            known = self._known.get(name)
        return 0 if known is None else known.signature[0] // 10**9

    def origin(self, name: str) -> JobOrigin | None:
        """The job that made a prefix, also of a file that is not served; None: no job, or no such file."""
        with self._lock:
            entry = self._known.get(name) or self._refused.get(name)
        return None if entry is None else entry.origin

    def results(self, owner: str) -> list[str]:
        """The names of what jobs made for an owner, checkpoints left out, sorted."""
        with self._lock:
            entries: dict[str, _Known | _Refused] = {**self._refused, **self._known}
        origins = {name: entry.origin for name, entry in entries.items() if entry.origin is not None}
        return sorted(name for name, origin in origins.items() if origin.owner == owner and origin.step is None)

    def is_taken(self, name: str) -> bool:
        """Whether there is a file of this name, served or not, known or not yet; may wait for the disk."""
        return name in self or name in self.refused or signature_of(self._path(name)) is not None

    @property
    def refused(self) -> dict[str, str]:
        """Names of files that are not served, and why."""
        with self._lock:
            return {name: refused.reason for name, refused in sorted(self._refused.items())}

    @property
    def stats(self) -> StoreStats:
        """The cache, and the files."""
        with self._lock:
            return StoreStats(**vars(self.cache.stats), known=len(self._known), refused=len(self._refused))

    def look(self, name: str) -> None:
        """Look whether a name that is not known has a file by now; waits for the disk, but reads a header at most."""
        with self._lock:
            if name in self._known or name in self._refused:
                return
        with contextlib.suppress(RequestError):
            check_name(name)
            if signature_of(self._path(name)) is not None:
                with self._file_lock:
                    self._refresh(name)

    def look_for_new(self) -> None:
        """Look whether there are files of names that are not known; waits for the disk.

        Raises:
            PrefixError: The folder itself cannot be read.
        """
        names = self._names_in_folder()
        with self._lock:
            names -= self._known.keys() | self._refused.keys()
        for name in sorted(names):
            self.look(name)

    def refresh(self, name: str) -> None:
        """Look again at the file of a name and at those of its checkpoints, not at all others; waits for the disk.

        Raises:
            PrefixError: The folder itself cannot be read.
        """
        names = self._names_in_folder()
        with self._lock:
            names |= self._known.keys() | self._refused.keys()
        with self._file_lock:
            for one in sorted(names):
                if one == name or one.startswith(f"{name}.step-"):
                    self._refresh(one)

    def _names_in_folder(self) -> set[str]:
        try:
            return set(list_names(self.folder))
        except OSError as error:
            raise _unreadable(error) from error

    # --- getting one --------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Prefix:
        """A prefix, in the backbone's dtype and on its device.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is broken, or was replaced by one that is.
            PrefixError: Its file cannot be read now.
        """
        with self._lock:
            if name not in self._known and name not in self._refused:
                raise self._no_such_prefix(name)
        cached = self.loaded(name)
        if cached is not None:
            return cached
        with self._file_lock:
            # Another thread may have read it meanwhile.
            cached = self.loaded(name)
            if cached is not None:
                return cached
            self._refresh(name)
            with self._lock:
                known = self._lookup(name)
            self.cache.count_miss()
            try:
                prefix = self._load(name)
            except CheckpointError as error:
                self._refuse(name, known.signature, error.message)
                raise
            except PrefixError as error:
                self._note_unread(name, error)
                raise
            self._unread.discard(name)
            self.cache.put(name, known.signature, prefix)
            return prefix

    def loaded(self, name: str) -> Prefix | None:
        """A prefix that is in memory, as its file is now; None: it is not. Waits for no other thread's reading."""
        return self.cache.get(name, signature_of(self._path(name)))

    def open_file(self, name: str) -> tuple[BinaryIO, dict[str, Any]]:
        """A prefix's file, as it is now, to be read and closed, and its header; what replaces it meanwhile is not seen.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is not served.
            PrefixError: It cannot be read now.
        """
        with self._lock:
            if name not in self._known and name not in self._refused:
                raise self._no_such_prefix(name)
        for _ in range(_MOST_OPENED):
            with self._file_lock:
                self._refresh(name)
            with self._lock:
                known = self._lookup(name)
            try:
                file = open(self._path(name), "rb")  # noqa: SIM115
            except FileNotFoundError:
                with self._lock:
                    raise self._no_such_prefix(name) from None
            except OSError as error:
                raise PrefixError(f"cannot read {name!r}: {error.strerror}.", hint="try again later.") from error
            # Otherwise it was replaced between the two looks, and the header is another file's.
            if signature_of_open(file) == known.signature:
                return file, json.loads(known.header)
            file.close()
        raise PrefixError(f"cannot read {name!r}: it is replaced all the time.", hint="try again later.")

    def _load(self, name: str) -> Prefix:
        try:
            return self._validator.load_copy(self._path(name), name)
        except CheckpointError as error:
            if is_unread(error):
                # It may pass, so the file is not refused.
                raise PrefixError(f"cannot read the prefix {name!r} now.", hint="try again.") from error
            raise CheckpointError(self._without_paths(error.message), hint=error.hint) from error

    def _note_unread(self, name: str, error: PrefixError) -> None:
        """Log why a file cannot be read now, as clients are not told; once until it is read again."""
        if name not in self._unread:
            self._unread.add(name)
            refused = (one.strerror or type(one).__name__ for one in causes(error) if isinstance(one, OSError))
            log("prefix_unread", level=logging.WARNING, prefix=name, reason=next(refused, "unknown"))

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
                with atomic_path(self._path(name)) as temporary:
                    with self._file_lock:
                        self._validator.read_header(Path(source))
                        # The copy is checked as a whole: nobody else writes to it.
                        shutil.copyfile(source, temporary)
                        self._validator.load(temporary, name)
                    changing.enter_context(change_folder(self.folder, _LOCK_SECONDS))
                    changing.enter_context(self._file_lock)
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
            self._refresh(name)

    def delete(self, name: str) -> None:
        """Remove a prefix and its file; requests that have it go on.

        Raises:
            RequestError: There is no such prefix.
            FolderBusyError: Jobs are being published all the time.
            PrefixError: The file cannot be removed.
        """
        with self._lock:
            if name not in self._known and name not in self._refused:
                raise self._no_such_prefix(name)
        with change_folder(self.folder, _LOCK_SECONDS), self._file_lock:
            try:
                self._path(name).unlink(missing_ok=True)
            except OSError as error:
                raise PrefixError(
                    f"cannot remove {name!r}: {error.strerror}.", hint="check its permissions."
                ) from error
            with self._lock:
                self._forget(name)

    # --- what is known of each file -----------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return path_of(self.folder, name)

    def _refresh(self, name: str) -> None:
        """Read a file's header if the file is new or was replaced; whatever it contains, this raises nothing."""
        signature = signature_of(self._path(name))
        with self._lock:
            previous = self._known.get(name) or self._refused.get(name)
        # A file that is known, and gone now, has no signature either.
        if previous is not None and previous.signature is not None and previous.signature == signature:
            return
        try:
            check_name(name)
            check_regular_file(self.folder, name)
            header = self._validator.read_header(self._path(name))
        except FileNotFoundError:
            with self._lock:
                self._forget(name)
        except OSError as error:
            # Perhaps only now: looked at again the next time.
            self._refuse(name, None, f"it cannot be read: {error.strerror or error}")
        except PrefixError as error:
            self._refuse(name, signature, error.message, self._origin_of(name))
        except Exception as error:
            # One bad file must not hide the others.
            _log.exception("a file in the folder of prefixes cannot be read.")
            self._refuse(name, signature, f"it cannot be read: {type(error).__name__}")
        else:
            if signature is not None:
                with self._lock:
                    self._forget(name)
                    self._known[name] = _Known(signature, header, job_origin(json.loads(header)))

    def _origin_of(self, name: str) -> JobOrigin | None:
        """The job that made a file that is not served, as far as its header can be read."""
        with contextlib.suppress(OSError, PrefixError):
            check_regular_file(self.folder, name)
            return job_origin(read_outline(self._path(name)).header)
        return None

    def _refuse(self, name: str, signature: Signature | None, reason: str, origin: JobOrigin | None = None) -> None:
        """Do not serve a file; where it does not say who made it, it stays whose it was."""
        with self._lock:
            previous = self._known.get(name) or self._refused.get(name)
            if origin is None and previous is not None:
                origin = previous.origin
            self._forget(name)
            self._refused[name] = _Refused(signature, self._without_paths(reason)[:_MAX_REASON_LENGTH], origin)

    def _forget(self, name: str) -> None:
        """Drop all that is known of a name; the lock is held."""
        self._known.pop(name, None)
        self._refused.pop(name, None)
        self._unread.discard(name)
        self.cache.drop(name)

    def _lookup(self, name: str) -> _Known:
        """A file that can be served; the lock is held."""
        known = self._known.get(name)
        if known is not None:
            return known
        if name in self._refused:
            reason = self._refused[name].reason
            raise CheckpointError(f"the prefix {name!r} is not served: {reason}", hint="replace its file.")
        raise self._no_such_prefix(name)

    def _no_such_prefix(self, name: object) -> RequestError:
        """The error for an unknown name; the lock is held."""
        shown = str(name)[:128]
        # Comparing with very many names would take long.
        hint = did_you_mean(shown, self._known) if 0 < len(self._known) <= 50 else "list the names first."
        return RequestError(f"there is no prefix {shown!r}.", hint=hint)

    def _without_paths(self, message: str) -> str:
        """A message without the folder's path, which callers must not see."""
        return message.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "the folder")


def _unreadable(error: OSError) -> PrefixError:
    return PrefixError(f"the folder of prefixes cannot be read: {error.strerror}.", hint="check its permissions.")
