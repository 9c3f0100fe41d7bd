"""A folder of prefixes, NAME.safetensors each, served by name.

A file's status is asked for on each request, and its header is read when that has changed; the file is read and checked
as a whole when it is first requested. A bad file is reported and not served; but a prefix in memory is, while its file
is being copied over, or was replaced by a bad one. Whoever has a prefix keeps it when its file is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.file import HEADER_KEY, is_unread, read_table
from prefixtune.prefix.folder import Signature, check_name, check_regular_file, list_names, path_of, signature_of
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix
from prefixtune.utils.files import atomic_path, reporting_write_errors
from prefixtune.utils.locks import change_folder

_log = logging.getLogger(__name__)
_LOCK_SECONDS = 10.0
_MOST_READERS = 4
"""Prefixes that are read from the disk at once."""


class _UnreadError(PrefixError):
    """The disk does not give a file now."""


@dataclass(frozen=True)
class PrefixFile:
    """A file as it was when its header was read.

    Attributes:
        signature: Differs once the file has changed; None: it could not be read, and is looked at again the next time.
        header: Empty if it is not served.
        reason: Why it is not served; empty: it is.
        origin: The job that made it, if one did.
    """

    signature: Signature | None
    header: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    origin: JobOrigin | None = None


class PrefixFolder:
    """Prefixes by name. May be used from any thread; all methods may wait for the disk.

    Args:
        folder: Created if it is missing.
        backbone: The model that they must fit.
        max_bytes: Most that all loaded prefixes together may take, in the backbone's dtype.

    Attributes:
        hits: Requested prefixes that were in memory.
        misses: Those that had to be read, or joined.
        num_bytes: Memory of those that are loaded.

    Raises:
        PrefixError: The folder cannot be created or read.
    """

    def __init__(self, folder: str | Path, backbone: Backbone, *, max_bytes: int = 2**30) -> None:
        self.folder, self.backbone, self.max_bytes = Path(folder).absolute(), backbone, max_bytes
        self._validator = PrefixValidator(backbone, max_bytes)
        self._files: dict[str, PrefixFile] = {}
        # By the names that are joined, the least recently used first.
        self._loaded: OrderedDict[tuple[str, ...], tuple[tuple[PrefixFile | None, ...], Prefix]] = OrderedDict()
        self.num_bytes = self.hits = self.misses = 0
        # Those that are being read or joined; few, so that a slow disk does not take all threads of the server.
        self._reading: dict[tuple[str, ...], threading.Lock] = {}
        self._lock, self._readers = threading.Lock(), threading.BoundedSemaphore(_MOST_READERS)
        with reporting_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.files()

    # --- what there is ------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, PrefixFile]:
        """All files by name, sorted, as they are now.

        Raises:
            PrefixError: The folder cannot be read.
        """
        with reporting_write_errors(self.folder):
            names = list_names(self.folder)
        found = {name: self._current(name) for name in sorted(names | self._files.keys())}
        return {name: file for name, file in found.items() if file is not None}

    def names(self) -> list[str]:
        """The names that can be requested; as `files`."""
        return [name for name, file in self.files().items() if not file.reason or self._last_good(name, file)]

    @property
    def refused(self) -> dict[str, str]:
        """The files that are not served, and why; as `files`."""
        return {name: file.reason for name, file in self.files().items() if file.reason}

    def origins(self) -> dict[str, JobOrigin]:
        """The files that jobs made, served or not; as `files`."""
        return {name: file.origin for name, file in self.files().items() if file.origin is not None}

    def file(self, name: str) -> PrefixFile | None:
        """The file of a name as it is now, served or not; None: there is none.

        If it cannot be served now, and the same owner's that it replaced is in memory: that one.
        """
        file = self._current(name)
        return file and (self._last_good(name, file) or file)

    def _last_good(self, name: str, file: PrefixFile) -> PrefixFile | None:
        """What is in memory of a file that cannot be served now."""
        with self._lock:
            (last,), _ = self._loaded.get((name,), ((None,), None))
        return last if file.reason and last is not None and last.origin == file.origin else None

    @property
    def num_stale(self) -> int:
        """How many names are served as they were, because their files cannot be, as they were last looked at."""
        return sum(self._last_good(name, file) is not None for name, file in list(self._files.items()))

    def _current(self, name: str) -> PrefixFile | None:
        # A name from outside must not lead out of the folder.
        if os.sep in name or "\0" in name or name.startswith("."):
            return None
        known, signature = self._files.get(name), signature_of(path_of(self.folder, name))
        if known is not None and known.signature is not None and known.signature == signature:
            return known
        file = self._look(name, signature, known.origin if known is not None else None)
        with self._lock:
            if file is None:
                self._files.pop(name, None)
            else:
                self._files[name] = file
        return file

    @property
    def num_loaded(self) -> int:
        """How many prefixes are in memory, joined ones included."""
        return len(self._loaded)

    @property
    def num_refused(self) -> int:
        """How many files cannot be served, as they were last looked at."""
        return sum(bool(file.reason) for file in list(self._files.values()))

    # --- getting one --------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Prefix:
        """The prefix of a name; see `load`."""
        return self.load({name: self.file(name)})

    def load(self, files: Mapping[str, PrefixFile | None]) -> Prefix:
        """A prefix, or several joined in this order, in the backbone's dtype and on its device.

        While the disk does not give a new file, this is what is in memory, if that is the same owner's.

        Args:
            files: By name, as `file` returned them.

        Raises:
            RequestError: There is no such prefix; or too many bytes would be joined.
            CheckpointError: A file is not served, or is broken.
            ConfigError, BackboneError: They cannot be joined.
            PrefixError: A file cannot be read now, or was replaced by another owner's.
        """
        try:
            return self._load(files)
        except _UnreadError:
            with self._lock:
                known, last = self._loaded.get(tuple(files), ((), None))
            if last is None or _origins(known) != _origins(self._current(name) for name in files):
                raise
            return last

    def _load(self, files: Mapping[str, PrefixFile | None]) -> Prefix:
        names = tuple(files)
        held = self._held(files)
        if held is not None:
            return held
        with self._lock:
            reading = self._reading.setdefault(names, threading.Lock())
        try:
            # Requests for the same prefix at once wait for one result.
            with reading:
                held = self._held(files)
                if held is None:
                    held = self._join(files) if len(files) > 1 else self._read(names[0], files[names[0]])
                    self._keep(files, held)
                return held
        except CheckpointError:
            served = {name: self.file(name) for name in names}
            if served == files:
                raise
            return self._load(served)
        finally:
            with self._lock:
                self._reading.pop(names, None)

    def _held(self, files: Mapping[str, PrefixFile | None]) -> Prefix | None:
        with self._lock:
            known, prefix = self._loaded.get(tuple(files), ((), None))
            if prefix is None or _versions(known) != _versions(files.values()) or None in _versions(known):
                return None
            self.hits += 1
            self._loaded.move_to_end(tuple(files))
            return prefix

    def _keep(self, files: Mapping[str, PrefixFile | None], prefix: Prefix) -> None:
        with self._lock:
            self.misses += 1
            self._drop(tuple(files))
            self._loaded[tuple(files)] = tuple(files.values()), prefix
            self.num_bytes += prefix.num_bytes
            while self.num_bytes > self.max_bytes and len(self._loaded) > 1:
                self._drop(next(iter(self._loaded)))

    def _drop(self, names: tuple[str, ...]) -> None:
        entry = self._loaded.pop(names, None)
        if entry is not None:
            self.num_bytes -= entry[1].num_bytes

    def _read(self, name: str, file: PrefixFile | None, *, exact: bool = False) -> Prefix:
        """A whole file, checked."""
        if file is None:
            raise _no_such_prefix(name)
        if not file.reason:
            try:
                with self._readers:
                    prefix = self._validator.load(path_of(self.folder, name), name, exact=exact)
            except CheckpointError as error:
                if is_unread(error):
                    _log.warning("the prefix %r cannot be read now: %s", name, error.__cause__ or error)
                    raise _UnreadError(f"cannot read the prefix {name!r} now.", hint="try again.") from None
                self._files[name] = self._refused(file.signature, error.message, file.origin)
            else:
                if job_origin(prefix.header) != file.origin:
                    raise PrefixError(f"the file of the prefix {name!r} was replaced.", hint="try again.")
                return prefix
        raise not_served(name)

    def _join(self, files: Mapping[str, PrefixFile | None]) -> Prefix:
        parts = [self._load({name: file}) for name, file in files.items()]
        size = sum(part.num_bytes for part in parts)
        if 2 * size > self.max_bytes:
            message = f"the joined prefixes take {size:,} bytes, but {self.max_bytes // 2:,} are the most."
            raise RequestError(message, hint="join fewer of them.")
        # The header numbers the parts: it names no prefix.
        if not self.backbone.geometry:
            return concatenate(parts, None)
        if self.backbone.dtype.itemsize < 4:
            # As the files have them: keys are rounded once, after they are turned.
            parts = [self._read(name, file, exact=True) for name, file in files.items()]
        return concatenate(parts, self.backbone.rotation).to(self.backbone.dtype, self.backbone.device)

    # --- changing the folder ------------------------------------------------------------------------------------------

    def put(self, name: str, source: str | Path) -> None:
        """Add a file under a name, or replace the one of that name: checked as a whole, then moved there at once.

        A file that says that a job made it belongs to nobody, unless it replaces what that job made.

        Raises:
            RequestError: The name is not allowed.
            CheckpointError: The file is broken or does not fit the backbone; nothing was changed.
            FolderBusyError: Jobs are being published all the time; nothing was changed.
            PrefixError: The disk refuses; nothing was changed.
        """
        check_name(name)
        with contextlib.ExitStack() as changing, atomic_path(path_of(self.folder, name)) as temporary:
            # The copy is checked: nobody else writes to it.
            shutil.copyfile(source, temporary)
            try:
                origin = job_origin(self._validator.read_header(temporary))
                self._validator.load(temporary, name)
            except CheckpointError as error:
                reason = self._without_paths(error.message.replace(str(temporary), name))
                raise CheckpointError(f"the file for {name!r} is not accepted: {reason}", hint=error.hint) from error
            old = self._current(name)
            if origin is not None and origin != (old and old.origin):
                prefix = read_artifact(temporary)
                header = {key: value for key, value in prefix.header.items() if key != "job"}
                save_prefix(temporary, Prefix(prefix.layers, header, prefix.head), dtype=prefix.dtype)
            changing.enter_context(change_folder(self.folder, _LOCK_SECONDS))

    def delete(self, name: str) -> None:
        """Remove a prefix and its file; requests that have it go on.

        Raises:
            RequestError: There is no such prefix.
            FolderBusyError: Jobs are being published all the time.
            PrefixError: The file cannot be removed.
        """
        if self._current(name) is None:
            raise _no_such_prefix(name)
        path = path_of(self.folder, name)
        with change_folder(self.folder, _LOCK_SECONDS), reporting_write_errors(path):
            path.unlink(missing_ok=True)

    # --- one file -----------------------------------------------------------------------------------------------------

    def _look(self, name: str, signature: Signature | None, last: JobOrigin | None) -> PrefixFile | None:
        """What a file's header says, or why it is not served; whatever it contains, this raises nothing.

        One that is not served and does not say who made it stays whose it was, the `last` one's.
        """
        path = path_of(self.folder, name)
        if signature is None and not os.path.lexists(path):
            return None
        try:
            check_name(name)
            check_regular_file(self.folder, name)
            header = self._validator.read_header(path)
            return PrefixFile(signature, header, origin=job_origin(header)) if signature is not None else None
        except FileNotFoundError:
            return None
        except PrefixError as error:
            return self._refused(None if is_unread(error) else signature, error.message, _origin_of(path) or last)
        except Exception as error:
            # One bad file must not hide the others. Perhaps it is only now: it is looked at again the next time.
            return self._refused(None, f"it cannot be read: {getattr(error, 'strerror', None) or error}", last)

    def _refused(self, signature: Signature | None, reason: str, origin: JobOrigin | None) -> PrefixFile:
        return PrefixFile(signature, reason=self._without_paths(reason), origin=origin)

    def _without_paths(self, message: str) -> str:
        """A message without the folder's path, which callers must not see."""
        return message.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "the folder")


def _versions(files: Iterable[PrefixFile | None]) -> list[Signature | None]:
    return [file.signature if file else None for file in files]


def _origins(files: Iterable[PrefixFile | None]) -> list[tuple[bool, JobOrigin | None]]:
    """Which files there are, and whose."""
    return [(file is not None, file.origin if file else None) for file in files]


def _origin_of(path: Path) -> JobOrigin | None:
    """The job that made a file that is not served, as far as its header can be read."""
    with contextlib.suppress(OSError, ValueError, PrefixError):
        return job_origin(read_table(path, HEADER_KEY)[1]) if path.is_file() else None
    return None


def not_served(name: str) -> CheckpointError:
    """What is known of a file that is not served. The reason is for admins only: it may name paths and models."""
    return CheckpointError(f"the file of {name[:128]!r} is not served; /v1/models tells an admin why.", hint="mend it.")


def _no_such_prefix(name: str) -> RequestError:
    return RequestError(f"there is no prefix {name[:128]!r}.", hint="list the names first.")
