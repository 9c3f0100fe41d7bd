"""Uploaded files, each with its owner: in the data folder, whole or not at all.

A file is written into a hidden folder, checked as training would read it, and moved to its place in one rename. What a
killed process left is removed by the next upload.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefixtune.data.examples import Example
from prefixtune.data.files import FORMATS, recognize_format
from prefixtune.data.streams import GZIP_MAGIC
from prefixtune.errors import RequestError
from prefixtune.jobs.file_check import FileFacts, check_file, sample_rows
from prefixtune.jobs.folder import DataFolder, is_file_id
from prefixtune.utils.files import flush_to_disk, fsync, work_folder
from prefixtune.utils.locks import file_lock

Purpose = Literal["fine-tune", "document", "fine-tune-results"]
"""What a file is for; results are made by workers."""
_META = "meta.json"
_LOCK, _LOCK_SECONDS = ".files.lock", 30.0
"""Among the servers that share the folder: held while a file gets its place."""
_HEAD, _MAX_FILENAME, _MAX_SAMPLED = 512, 200, 100
"""Bytes by which the format of a file is recognized; the longest name; and examples of a sample."""
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

    id: str = Field(default_factory=lambda: f"file-{secrets.token_hex(12)}")
    owner: str
    bytes: int
    created_ns: int = Field(default_factory=time.time_ns)
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
        self._root = folder.files

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
        self._check_room(owner, size, limits)
        ending = _ending_of(filename, head, purpose)
        stored = StoredFile(owner=owner, bytes=size, filename=filename, purpose=purpose, ending=ending)
        with self._work() as made:
            with open(made / f"data{ending}", "wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
            report = check_file(made / f"data{ending}", filename, ending)
            status = "error" if report.error else "processed"
            stored = stored.model_copy(update={"status": status, "status_details": report.error, "facts": report.facts})
            with file_lock(self._root / _LOCK, _LOCK_SECONDS) as held:
                if not held:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                # Other uploads may have ended meanwhile.
                self._check_room(owner, size, limits)
                _publish(made, stored)
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
        facts: dict[str, Any] = {"id": file_id, "owner": owner, "bytes": len(data), "filename": filename}
        stored = StoredFile(**facts, purpose="fine-tune-results", ending=Path(filename).suffix)
        with self._work() as made:
            (made / f"data{stored.ending}").write_bytes(data)
            # Another worker may have stored it just now.
            with contextlib.suppress(FileExistsError):
                _publish(made, stored)
        return self.get(owner, file_id)

    def get(self, owner: str | None, file_id: str) -> StoredFile:
        """What is known about a file.

        Args:
            owner: Whose it must be; None: anybody's.
            file_id: Its id.

        Raises:
            UnknownFileError: There is none.
        """
        stored = _read(self._root / file_id) if is_file_id(file_id) else None
        if stored is None or owner not in (None, stored.owner):
            raise UnknownFileError(f"there is no file {file_id[:128]!r}.")
        return stored

    def path(self, file: StoredFile) -> Path:
        """Where a file's data are; their ending is that of their format. To be linked, never changed."""
        return self._root / file.id / f"data{file.ending}"

    def sample(self, file: StoredFile) -> Sequence[Example]:
        """The first examples of a file; none of a document, or where its form is not known."""
        form = file.facts.form if file.facts and file.purpose == "fine-tune" else ""
        return sample_rows(self.path(file), file.ending, form, _MAX_SAMPLED) if form else []

    def list(self, owner: str | None) -> Sequence[StoredFile]:
        """All files of an owner, or of all owners, the newest first."""
        found = [_read(folder) for folder in self._root.glob("file-*")]
        known = [stored for stored in found if stored is not None and owner in (None, stored.owner)]
        return sorted(known, key=lambda stored: (stored.created_ns, stored.id), reverse=True)

    def delete(self, file: StoredFile) -> None:
        """Delete a file; jobs that were made of it keep their own links.

        Raises:
            OSError: It cannot be deleted.
        """
        with self._work() as temporary, contextlib.suppress(FileNotFoundError):
            # One rename: it is there with all that belongs to it, or not at all.
            os.replace(self._root / file.id, temporary / "file")
            fsync(self._root)

    @contextlib.contextmanager
    def _work(self) -> Iterator[Path]:
        """A hidden folder for what comes or goes; those that killed processes left are removed."""
        # What is uploaded is nobody else's business.
        self._root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root.mkdir(exist_ok=True)
        with work_folder(self._root, "work") as folder:
            yield folder

    def _check_room(self, owner: str, size: int, limits: FileLimits) -> None:
        """Refuse a file of so many bytes where there is no room for it.

        Raises:
            FileRefusedError: It is refused.
        """
        kept = [file.bytes for file in self.list(owner) if file.purpose != "fine-tune-results"]
        for code, is_wrong, message in (
            ("empty_file", not size, "the file is empty"),
            ("file_too_large", size > limits.max_bytes, f"a file may have {limits.max_bytes:,} bytes; split it"),
            ("too_many_files", len(kept) >= limits.max_files, f"{limits.max_files:,} files may be kept; delete one"),
            (
                "no_room",
                sum(kept) + size > limits.max_total_bytes,
                f"all files may have {limits.max_total_bytes:,} bytes",
            ),
        ):
            if is_wrong:
                raise FileRefusedError(code, f"{message}.")


def _publish(folder: Path, stored: StoredFile) -> None:
    """Move a complete folder to its place.

    Raises:
        FileExistsError: Something is there.
        OSError: It cannot be moved.
    """
    (folder / _META).write_text(stored.model_dump_json(), encoding="utf-8")
    flush_to_disk(*folder.iterdir())
    fsync(folder)
    try:
        os.rename(folder, folder.parent / stored.id)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(error.errno, error.strerror) from None
        raise
    fsync(folder.parent)


def _read(folder: Path) -> StoredFile | None:
    """What is known about a file; None: it is not there, or not readable."""
    try:
        return StoredFile.model_validate_json((folder / _META).read_bytes())
    except (OSError, ValidationError):
        return None


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
