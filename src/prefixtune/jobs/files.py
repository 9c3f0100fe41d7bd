"""Uploaded files, each with its owner: in the data folder, whole or not at all.

A file is written into a hidden folder, checked as training would read it, and moved to its place in one rename. What a
killed process left is removed at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from prefixtune.data.examples import Example
from prefixtune.data.files import FORMATS, recognize_format
from prefixtune.data.streams import GZIP_MAGIC
from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.file_check import FileFacts, check_file
from prefixtune.jobs.folder import DataFolder, is_file_id
from prefixtune.utils.files import flush_to_disk, fsync, remove_abandoned, work_folder
from prefixtune.utils.locks import file_lock

Purpose = Literal["fine-tune", "document", "fine-tune-results"]
"""What a file is for; results are made by workers."""
_META, _SAMPLE = "meta.json", "sample.json"
_WORK_FOLDERS = _NEW, _DELETED = "new", "deleted"
"""Names of hidden folders."""
_LOCK, _LOCK_SECONDS = ".files.lock", 30.0
"""Among the servers that share the folder: held while a file gets its place."""
_SAMPLES = TypeAdapter(list[Example])
_HEAD, _MAX_FILENAME = 512, 200
"""Bytes by which the format of a file is recognized; and the longest name."""
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")


class UnknownFileError(RequestError):
    """There is no such file, or it is somebody else's."""


class FileRefusedError(RequestError):
    """A file is not taken.

    Attributes:
        code: `empty_file`, `file_too_large`, `too_many_files` or `no_room`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class FileLimits:
    """How much may be kept.

    Attributes:
        max_bytes: Of one file.
        max_files: Uploaded files of one owner.
        max_total_bytes: Of all uploaded files of one owner.
    """

    max_bytes: int = 2**29
    max_files: int = 100
    max_total_bytes: int = 2**30


class StoredFile(BaseModel):
    """What is known about a file.

    Attributes:
        id: `file-...`.
        owner: The name of the key that uploaded it.
        bytes: Its size.
        created_ns: When, in nanoseconds since 1970.
        filename: As its owner calls it: no path, one line.
        purpose: What it is for.
        ending: Of its format, as in `.jsonl.gz`: by its name, or else by its first bytes.
        status: `processed`: it can be trained on; `error`: it cannot.
        status_details: What is wrong with it, and in which row; empty: nothing.
        facts: What it holds; None: it is wrong, or a result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    owner: str
    bytes: int
    created_ns: int
    filename: str
    purpose: Purpose
    ending: str
    status: Literal["processed", "error"] = "processed"
    status_details: str = ""
    facts: FileFacts | None = None

    @property
    def created(self) -> int:
        """When, in seconds since 1970."""
        return self.created_ns // 10**9

    @property
    def data_name(self) -> str:
        """The name that its data have on disk: readers know a format by its ending."""
        return f"data{self.ending}"


def result_file_id(job_id: str) -> str:
    """The id of the file with a job's metrics, the same each time that it is written.

    >>> result_file_id("ftjob-0123456789abcdef01234567")
    'file-0123456789abcdef01234567'
    """
    return f"file-{job_id.removeprefix('ftjob-')}"


class FileStore:
    """The files of all owners. Several processes may use one folder; all methods block.

    Args:
        folder: The data folder; made by the first upload.
    """

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder

    def clear(self) -> int:
        """Remove what killed processes left; returns how many folders there were."""
        return sum(remove_abandoned(owner, name) for owner in _entries(self._folder.owners) for name in _WORK_FOLDERS)

    def put(
        self, owner: str, file: IO[bytes], filename: str, purpose: Purpose, limits: FileLimits | None = None
    ) -> StoredFile:
        """Check an uploaded file, and keep it.

        One whose content is wrong is kept too, so that its owner can read it, with the status `error`.

        Args:
            owner: Whose it will be.
            file: Its bytes.
            filename: As its owner calls it; only its last part is kept.
            purpose: What it is for.
            limits: How much the owner may keep.

        Raises:
            FileRefusedError: It is empty or too large, or there is no room for it.
            OSError: The disk is full, or fails.
        """
        limits, filename = limits or FileLimits(), _shown_name(filename)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_HEAD)
        file.seek(0)
        if not size:
            raise FileRefusedError("empty_file", f"{filename} is empty. Check that it is complete.")
        self._check_room(owner, size, limits)
        stored = _new_file(owner, filename, purpose, size, ending=_ending_of(filename, head, purpose))
        with work_folder(self._owned(owner), _NEW) as made:
            folder = made / "file"
            folder.mkdir()
            with open(folder / stored.data_name, "wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
            try:
                report = check_file(folder / stored.data_name, filename, stored.ending)
            except PrefixError as error:
                details = f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}".strip()[:1000]
                stored = stored.model_copy(update={"status": "error", "status_details": details})
            else:
                (folder / _SAMPLE).write_bytes(_SAMPLES.dump_json(report.sample))
                stored = stored.model_copy(update={"facts": report.facts})
            with file_lock(self._owned(owner) / _LOCK, _LOCK_SECONDS) as held:
                if not held:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                # Other uploads may have ended meanwhile.
                self._check_room(owner, size, limits)
                self._publish(folder, stored)
        return stored

    def put_result(self, owner: str, file_id: str, filename: str, data: bytes) -> StoredFile:
        """Store what a job left; the second time under one id, the first file stays.

        Args:
            owner: The job's.
            file_id: By `result_file_id`.
            filename: As its owner reads it.
            data: All of it.

        Raises:
            OSError: It cannot be written.
        """
        with contextlib.suppress(UnknownFileError):
            return self.get(owner, file_id)
        stored = _new_file(owner, filename, "fine-tune-results", len(data), id=file_id, ending=Path(filename).suffix)
        with work_folder(self._owned(owner), _NEW) as made:
            folder = made / "file"
            folder.mkdir()
            (folder / stored.data_name).write_bytes(data)
            self._publish(folder, stored)
        return stored

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
        path = self._find(owner, file_id)[1] / _SAMPLE
        try:
            return _SAMPLES.validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return []

    def list(self, owner: str | None) -> Sequence[StoredFile]:
        """All files of an owner, or of all owners, the newest first."""
        folders = _entries(self._folder.owners) if owner is None else [self._folder.files_of(owner)]
        found = [_read(file) for folder in folders for file in _entries(folder) if is_file_id(file.name)]
        known = [stored for stored in found if stored is not None]
        return sorted(known, key=lambda stored: (stored.created_ns, stored.id), reverse=True)

    def delete(self, owner: str | None, file_id: str) -> None:
        """Delete a file; jobs that were made of it keep their own links.

        Raises:
            UnknownFileError: There is none.
            OSError: It cannot be deleted.
        """
        folder = self._find(owner, file_id)[1]
        with work_folder(folder.parent, _DELETED) as temporary:
            try:
                # One rename: it is there with all that belongs to it, or not at all.
                os.replace(folder, temporary / "file")
            except FileNotFoundError:
                raise _unknown(file_id) from None
            fsync(folder.parent)

    def _find(self, owner: str | None, file_id: str) -> tuple[StoredFile, Path]:
        if is_file_id(file_id):
            for parent in _entries(self._folder.owners) if owner is None else [self._folder.files_of(owner)]:
                stored = _read(parent / file_id)
                if stored is not None:
                    return stored, parent / file_id
        raise _unknown(file_id)

    def _owned(self, owner: str) -> Path:
        """The folder of an owner's files, made if it is missing."""
        # What is uploaded is nobody else's business.
        self._folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self._folder.files_of(owner)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _check_room(self, owner: str, size: int, limits: FileLimits) -> None:
        """Refuse a file of so many bytes where there is no room for it.

        Raises:
            FileRefusedError: It is refused.
        """
        kept = [file.bytes for file in self.list(owner) if file.purpose != "fine-tune-results"]
        if size > limits.max_bytes:
            message = f"the file has more than {limits.max_bytes:,} bytes, which is the most for one. Split it."
            raise FileRefusedError("file_too_large", message)
        if len(kept) >= limits.max_files:
            message = f"there are {len(kept):,} files already, of {limits.max_files:,} that may be kept."
            raise FileRefusedError("too_many_files", f"{message} Delete one that is not needed.")
        if sum(kept) + size > limits.max_total_bytes:
            message = f"with this file there would be more than {limits.max_total_bytes:,} bytes, the most to be kept."
            raise FileRefusedError("no_room", f"{message} Delete files that are not needed.")

    def _publish(self, folder: Path, stored: StoredFile) -> None:
        """Move a complete folder to its place, if nothing is there."""
        (folder / _META).write_text(stored.model_dump_json(), encoding="utf-8")
        flush_to_disk(*folder.iterdir())
        fsync(folder)
        try:
            os.rename(folder, folder.parents[1] / stored.id)
        except OSError:
            # A result that another worker has just stored.
            if _read(folder.parents[1] / stored.id) is None:
                raise
        fsync(folder.parents[1])


def _new_file(owner: str, filename: str, purpose: Purpose, size: int, **more: Any) -> StoredFile:
    values = {"id": f"file-{secrets.token_hex(12)}", "owner": owner, "bytes": size, "created_ns": time.time_ns()}
    return StoredFile(**{**values, "filename": filename, "purpose": purpose, **more})


def _read(folder: Path) -> StoredFile | None:
    """What is known about a file; None: it is not there, or not readable."""
    try:
        return StoredFile.model_validate_json((folder / _META).read_bytes())
    except (OSError, ValidationError):
        return None


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing, if it is not there."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unknown(file_id: str) -> UnknownFileError:
    return UnknownFileError(f"there is no file {file_id[:128]!r}.")


def _shown_name(filename: str) -> str:
    """A name without a path, in one line."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(character if character.isprintable() else "_" for character in name).strip()
    # The ending is kept.
    return (name if len(name) <= _MAX_FILENAME else name[: _MAX_FILENAME - 50] + name[-50:]) or "upload"


def _ending_of(filename: str, head: bytes, purpose: Purpose) -> str:
    """The ending of a file's format: by its name or, where that says nothing, by its first bytes."""
    suffixes = [suffix.lower() for suffix in Path(filename).suffixes]
    if purpose == "document":
        return suffixes[-1] if suffixes and suffixes[-1] in _TEXT_ENDINGS else ".txt"
    zipped = ".gz" if head.startswith(GZIP_MAGIC) else ""
    named = [suffix for suffix in suffixes if suffix in FORMATS]
    if named:
        return named[-1] + zipped
    if zipped:
        return f".jsonl{zipped}"
    return recognize_format(head) or (".tsv" if b"\t" in head.split(b"\n", 1)[0] else ".csv")
