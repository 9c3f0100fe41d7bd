"""A file that comes in piece by piece, and is checked when it is complete."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from prefixtune.data.files import FORMATS, recognize_format
from prefixtune.data.streams import GZIP_MAGIC
from prefixtune.errors import PrefixError
from prefixtune.jobs.file_check import check_file
from prefixtune.jobs.stored_file import (
    FileLimits,
    FileRefusedError,
    Purpose,
    StoredFile,
    no_room,
    shown_name,
    write_sample,
)
from prefixtune.utils.files import work_folder

__all__ = ["UPLOAD_FOLDER", "Upload"]


UPLOAD_FOLDER = "upload"
"""Name of the hidden folders that receive files."""
_HEAD = 512
"""Bytes by which the format of a file is recognized."""
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")


class Upload:
    """A file that comes in; as a context manager, it leaves nothing behind if `finish` was not reached.

    Args:
        folder: Of the owner's files.
        owner: Whose it will be.
        filename: As its owner calls it.
        purpose: What it is for.
        limits: How much the owner may keep.
        stopped: Set when checks are to end at once.
        kept_bytes: Bytes of the owner's other files.
        publish: Moves the complete file in a folder to its place.

    Attributes:
        owner: Whose it will be.
        size: Bytes so far.
        filename: May be set until the first byte comes.
        purpose: Likewise; None until it is known, at the latest when the file is complete.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        filename: str,
        purpose: Purpose | None,
        limits: FileLimits,
        *,
        stopped: threading.Event,
        kept_bytes: int,
        publish: Callable[[Path, StoredFile], object],
    ) -> None:
        self.owner, self.size = owner, 0
        self.filename, self.purpose = filename, purpose
        self._limits, self._stopped = limits, stopped
        self._kept_bytes, self._publish = kept_bytes, publish
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(work_folder(folder, UPLOAD_FOLDER)) / "file"
        self._folder.mkdir()
        self._head = b""
        self._ending = ""
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, chunk: bytes) -> None:
        """Append some bytes.

        Raises:
            FileRefusedError: The file is too large, or there is no room for it.
            OSError: The disk is full, or fails.
        """
        self.size += len(chunk)
        if self.size > self._limits.max_bytes:
            raise FileRefusedError(
                "file_too_large",
                f"the file has more than {self._limits.max_bytes:,} bytes, which is the most for one.",
                hint="split it.",
            )
        if self._kept_bytes + self.size > self._limits.max_total_bytes:
            raise no_room(self._limits)
        if self._file is not None:
            self._append(chunk)
            return
        self._head += chunk
        if len(self._head) >= _HEAD:
            self._open()

    def finish(self) -> StoredFile:
        """Check the file, and keep it. Blocks.

        A file whose content is wrong is kept too, so that its owner can read it, with the status `error`.

        Raises:
            FileRefusedError: It is empty, there is no room for it any more, or its check was stopped.
            OSError: The disk is full, or fails.
        """
        with self:
            if self.purpose is None:
                raise ValueError("the purpose of the file is not known")
            self.filename = shown_name(self.filename)
            if not self.size:
                raise FileRefusedError("empty_file", f"{self.filename} is empty.", hint="check that it is complete.")
            if self._file is None:
                self._open()
            assert self._file is not None
            self._file.close()
            outcome = self._outcome()
            stored = StoredFile(
                id=f"file-{secrets.token_hex(12)}",
                owner=self.owner,
                bytes=self.size,
                created_ns=time.time_ns(),
                filename=self.filename,
                purpose=self.purpose,
                ending=self._ending,
                **outcome,
            )
            self._publish(self._folder, stored)
            return stored

    def abort(self) -> None:
        """Leave nothing behind; without effect after `finish`."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._stack.close()

    def _open(self) -> None:
        """Open the file on disk, under the name that its format needs."""
        self.filename = shown_name(self.filename)
        head, self._head = self._head, b""
        # A document is read as it is; without a purpose, the file may become one.
        self._ending = _ending_of(self.filename, head, self.purpose)
        self._file = open(self._folder / f"data{self._ending}", "wb", buffering=0)  # noqa: SIM115  closed by `abort`
        self._append(head)

    def _append(self, chunk: bytes) -> None:
        assert self._file is not None
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def _outcome(self) -> dict[str, Any]:
        """The status of the complete file, and what it holds."""
        path = self._folder / f"data{self._ending}"
        if self.purpose == "document":
            self._ending = _ending_of(self.filename, b"", "document")
            path = path.rename(self._folder / f"data{self._ending}")
        try:
            report = check_file(path, self.filename, self._ending, self._stopped)
        except FileRefusedError:
            raise
        except PrefixError as error:
            hint = error.hint[:1].upper() + error.hint[1:]
            return {"status": "error", "status_details": f"{error.message} {hint}".strip()[:1000]}
        write_sample(self._folder, report.sample)
        return {"facts": report.facts}


def _ending_of(filename: str, head: bytes, purpose: Purpose | None) -> str:
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
    is_tabbed = b"\t" in head.split(b"\n", 1)[0]
    return recognize_format(head) or (".tsv" if is_tabbed else ".csv")
