"""What is known about an uploaded file, and the folder that holds it: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from prefixtune.errors import RequestError
from prefixtune.jobs.file_facts import FileFacts, SampledExample
from prefixtune.utils.files import flush_to_disk, fsync

__all__ = [
    "UPLOAD_PURPOSES",
    "FileLimits",
    "FileRefusedError",
    "Purpose",
    "StoredFile",
    "UnknownFileError",
    "no_room",
    "publish_file",
    "read_sample",
    "read_stored",
    "result_file_id",
    "shown_name",
    "too_many_files",
    "write_sample",
]


Purpose = Literal["fine-tune", "document", "fine-tune-results"]
UPLOAD_PURPOSES: tuple[Purpose, ...] = ("fine-tune", "document")
"""What is uploaded; results are made by workers."""

_META, _SAMPLE = "meta.json", "sample.json"
_MAX_META_BYTES, _MAX_SAMPLE_BYTES = 2**20, 2**23
_SAMPLES = TypeAdapter(list[SampledExample])
_MAX_FILENAME = 200


class UnknownFileError(RequestError):
    """There is no such file, or it is somebody else's."""


class FileRefusedError(RequestError):
    """A file is not taken.

    Attributes:
        code: `empty_file`, `file_too_large`, `too_many_files`, `no_room` or `stopped`.
    """

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


@dataclass(frozen=True)
class FileLimits:
    """How much may be kept.

    Attributes:
        max_bytes: Of one file.
        max_files: Uploaded files of one owner.
        max_total_bytes: Of all files of one owner.
    """

    max_bytes: int = 2**29
    max_files: int = 100
    max_total_bytes: int = 2**30


def too_many_files(count: int, limits: FileLimits) -> FileRefusedError:
    """The owner keeps too many files."""
    return FileRefusedError(
        "too_many_files",
        f"there are {count:,} files already, of {limits.max_files:,} that may be kept.",
        hint="delete one that is not needed.",
    )


def no_room(limits: FileLimits) -> FileRefusedError:
    """The owner's files take too much space."""
    return FileRefusedError(
        "no_room",
        f"with this file there would be more than {limits.max_total_bytes:,} bytes of files, which is the most that "
        "may be kept.",
        hint="delete files that are not needed.",
    )


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


def publish_file(folder: Path, stored: StoredFile, parent: Path) -> None:
    """Move a file with its facts to its place, in one rename."""
    (folder / _META).write_text(stored.model_dump_json(), encoding="utf-8")
    flush_to_disk(*folder.iterdir())
    fsync(folder)
    os.rename(folder, parent / stored.id)
    fsync(parent)


def read_stored(folder: Path) -> StoredFile | None:
    """What is known about a file; None: it is not there, or not readable."""
    try:
        with open(folder / _META, "rb") as file:
            return StoredFile.model_validate_json(file.read(_MAX_META_BYTES))
    except (OSError, ValidationError):
        return None


def write_sample(folder: Path, sample: Sequence[SampledExample]) -> None:
    """Keep a file's sample, before it is published."""
    (folder / _SAMPLE).write_text(_SAMPLES.dump_json(list(sample)).decode(), encoding="utf-8")


def read_sample(folder: Path) -> list[SampledExample]:
    """A file's sample; empty, if it has none."""
    try:
        with open(folder / _SAMPLE, "rb") as file:
            return _SAMPLES.validate_json(file.read(_MAX_SAMPLE_BYTES))
    except (OSError, ValidationError):
        return []


def shown_name(filename: str) -> str:
    """A name without a path, in one line."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(character if character.isprintable() else "_" for character in name).strip()
    # The ending is kept.
    return (name if len(name) <= _MAX_FILENAME else name[: _MAX_FILENAME - 50] + name[-50:]) or "upload"
