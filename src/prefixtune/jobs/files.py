"""Uploaded files, each with its owner: in the data folder, whole or not at all.

A file is written into a hidden folder, checked as training would read it, and moved to its place. What a killed process
left is removed at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from prefixtune.data.examples import Example
from prefixtune.jobs.folder import DataFolder, is_file_id
from prefixtune.jobs.stored_file import (
    UPLOAD_PURPOSES,
    FileLimits,
    FileRefusedError,
    Purpose,
    StoredFile,
    UnknownFileError,
    no_room,
    publish_file,
    read_sample,
    read_stored,
    result_file_id,
    shown_name,
    too_many_files,
)
from prefixtune.jobs.upload import UPLOAD_FOLDER, Upload
from prefixtune.utils.files import flush_to_disk, fsync, remove_abandoned, work_folder
from prefixtune.utils.locks import file_lock

__all__ = [
    "UPLOAD_PURPOSES",
    "FileLimits",
    "FileRefusedError",
    "FileStore",
    "Purpose",
    "StoredFile",
    "UnknownFileError",
    "Upload",
    "result_file_id",
]


_RESULT, _DELETED = "result", "deleted"
"""Names of hidden folders."""
_LOCK, _LOCK_SECONDS = ".files.lock", 30.0
"""Among the servers that share the folder: held while a file gets its place."""


class FileStore:
    """The files of all owners. Several processes may use one folder; all methods block.

    Args:
        folder: The data folder; made by the first upload.
    """

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        self._closed = threading.Event()

    def close(self) -> None:
        """End the checks of uploads, which are refused then; from any thread."""
        self._closed.set()

    def clear(self) -> int:
        """Remove what killed processes left; returns how many folders there were."""
        names = (UPLOAD_FOLDER, _RESULT, _DELETED)
        return sum(remove_abandoned(owner, name) for owner in self._owners() for name in names)

    def open_upload(
        self, owner: str, filename: str = "", purpose: Purpose | None = None, *, limits: FileLimits | None = None
    ) -> Upload:
        """Begin an upload.

        Args:
            owner: Whose file it will be.
            filename: As its owner calls it; only its last part is kept.
            purpose: What it is for; None: the upload is told later, as it may be of the filename.
            limits: How much the owner may keep.

        Raises:
            FileRefusedError: The owner keeps too many files.
            OSError: The data folder cannot be written.
        """
        limits = limits or FileLimits()
        self._make_folder(owner)
        files = self._uploaded(owner)
        if len(files) >= limits.max_files:
            raise too_many_files(len(files), limits)
        return Upload(
            self._folder.files_of(owner),
            owner,
            filename,
            purpose,
            limits,
            stopped=self._closed,
            kept_bytes=sum(file.bytes for file in files),
            publish=partial(self._publish, limits),
        )

    def get(self, owner: str | None, file_id: str) -> StoredFile:
        """What is known about a file.

        Args:
            owner: Whose it must be; None: anybody's.
            file_id: Its id.

        Raises:
            UnknownFileError: There is none.
        """
        return self._find(owner, file_id)[0]

    def path(self, owner: str | None, file_id: str) -> Path:
        """Where a file's data are; their ending is that of their format. To be linked, never changed.

        Raises:
            UnknownFileError: There is none.
        """
        stored, folder = self._find(owner, file_id)
        return folder / stored.data_name

    def open(self, owner: str | None, file_id: str) -> IO[bytes]:
        """A file's data; they can be read to the end even if the file is deleted meanwhile.

        Raises:
            UnknownFileError: There is none.
        """
        try:
            return open(self.path(owner, file_id), "rb")
        except FileNotFoundError:
            raise _unknown(file_id) from None

    def sample(self, owner: str | None, file_id: str) -> Sequence[Example]:
        """Some examples of a file, evenly spaced, the first one among them; none where its form is not known.

        Raises:
            UnknownFileError: There is no such file.
        """
        return [sampled.example for sampled in read_sample(self._find(owner, file_id)[1])]

    def list(self, owner: str | None) -> Sequence[StoredFile]:
        """All files of an owner, or of all owners, the newest first."""
        folders = self._owners() if owner is None else [self._folder.files_of(owner)]
        found: list[StoredFile] = []
        for folder in folders:
            for file in _entries(folder):
                stored = read_stored(file) if is_file_id(file.name) else None
                if stored is not None:
                    found.append(stored)
        return sorted(found, key=lambda stored: (stored.created_ns, stored.id), reverse=True)

    def delete(self, owner: str | None, file_id: str) -> StoredFile:
        """Delete a file; jobs that were made of it keep their own links.

        Raises:
            UnknownFileError: There is none.
            OSError: It cannot be deleted.
        """
        stored, folder = self._find(owner, file_id)
        with work_folder(folder.parent, _DELETED) as temporary:
            try:
                # One rename: it is there with all that belongs to it, or not at all.
                os.replace(folder, temporary / "file")
            except FileNotFoundError:
                raise _unknown(file_id) from None
            fsync(folder.parent)
        return stored

    def put_result(self, owner: str, file_id: str, filename: str, data: bytes) -> StoredFile:
        """Store what a job left; the second time under one id, the first file stays.

        Args:
            owner: The job's.
            file_id: By `result_file_id`.
            filename: As its owner reads it.
            data: All of it.

        Raises:
            ValueError: That is no id of a file.
            OSError: It cannot be written.
        """
        if not is_file_id(file_id):
            raise ValueError(f"{file_id[:64]!r} is no id of a file")
        with contextlib.suppress(UnknownFileError):
            return self.get(owner, file_id)
        name = shown_name(filename)
        stored = StoredFile(
            id=file_id,
            owner=owner,
            bytes=len(data),
            created_ns=time.time_ns(),
            filename=name,
            purpose="fine-tune-results",
            ending=Path(name).suffix[:10] or ".csv",
        )
        self._make_folder(owner)
        with work_folder(self._folder.files_of(owner), _RESULT) as temporary:
            folder = temporary / "file"
            folder.mkdir()
            (folder / stored.data_name).write_bytes(data)
            try:
                publish_file(folder, stored, self._folder.files_of(owner))
            except OSError:
                # Another worker was first.
                with contextlib.suppress(UnknownFileError):
                    return self.get(owner, file_id)
                raise
        return stored

    def _find(self, owner: str | None, file_id: str) -> tuple[StoredFile, Path]:
        if is_file_id(file_id):
            for parent in self._owners() if owner is None else [self._folder.files_of(owner)]:
                stored = read_stored(parent / file_id)
                if stored is not None:
                    return stored, parent / file_id
        raise _unknown(file_id)

    def _owners(self) -> Sequence[Path]:
        return [path for path in _entries(self._folder.owners) if path.is_dir()]

    def _make_folder(self, owner: str) -> None:
        # What is uploaded is nobody else's business.
        self._folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.files_of(owner).mkdir(parents=True, exist_ok=True)

    def _publish(self, limits: FileLimits, folder: Path, stored: StoredFile) -> None:
        """Move a complete file to its place, if there is still room for it: other uploads may have ended meanwhile.

        Raises:
            FileRefusedError: There is none.
            OSError: The disk fails, or others hold the lock of the owner's files all the time.
        """
        parent = self._folder.files_of(stored.owner)
        # What takes long comes before the lock.
        flush_to_disk(*folder.iterdir())
        with file_lock(parent / _LOCK, _LOCK_SECONDS) as held:
            if not held:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            files = self._uploaded(stored.owner)
            if len(files) >= limits.max_files:
                raise too_many_files(len(files), limits)
            if sum(file.bytes for file in files) + stored.bytes > limits.max_total_bytes:
                raise no_room(limits)
            publish_file(folder, stored, parent)

    def _uploaded(self, owner: str) -> Sequence[StoredFile]:
        return [file for file in self.list(owner) if file.purpose != "fine-tune-results"]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing, if it is not there."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _unknown(file_id: str) -> UnknownFileError:
    return UnknownFileError(f"there is no file {file_id[:64]!r}.")
