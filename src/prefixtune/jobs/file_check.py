"""Check an uploaded file as training would read it: of rows while it comes in, and where it is large, in a process.

Reading is Python's work: in a thread of the server it would slow down all texts that are generated, and what a few
kilobytes unpack to may need more memory than there is.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from prefixtune.data.files import FORMATS, Record, iter_rows
from prefixtune.data.parquet import parquet_rows
from prefixtune.data.parsing import json_list
from prefixtune.data.streams import decode, unpack
from prefixtune.errors import DataError, PrefixError
from prefixtune.jobs.file_facts import FileReport, document_facts, read_facts
from prefixtune.jobs.stored_file import FileRefusedError

__all__ = ["FileCheck", "main"]


INLINE_BYTES = 2**18
"""Largest file that is checked in a thread."""
MAX_DOCUMENT_BYTES = 2**24
"""Most bytes of a document."""
_MAX_WHOLE_BYTES = 2**26
"""Most bytes of a `.json` file, which is read as a whole."""
_MAX_ROWS_BYTES = 2**31
"""Most bytes of a file that is read row by row, after decompression."""
_MEMORY = 2**32
"""Most bytes of memory of the process that checks."""
_SECONDS = 300.0
"""Longest time that is waited for it, once the file is there."""
_POLLING_SECONDS = 0.05
_COMMAND = "from prefixtune.jobs.file_check import main; main()"
_NOT_TEXT = {b"%PDF": "a PDF file", b"PK\x03\x04": "an Office file or an archive"}


class FileCheck:
    """The check of one file, which may still be growing.

    Args:
        path: The file.
        filename: What messages call it.
        ending: Of its format, as in `.jsonl.gz`; of a document any other.
        stopped: Set when nobody waits for results any more.
    """

    def __init__(self, path: Path, filename: str, ending: str, stopped: threading.Event) -> None:
        self._path, self._filename, self._ending, self._stopped = path, filename, ending, stopped
        self._process: subprocess.Popen[bytes] | None = None

    def note_size(self, size: int) -> None:
        """The file has grown to this many bytes: begin to read its rows if it is large."""
        is_whole = self._ending not in (".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")
        if self._process is None and size > INLINE_BYTES and not is_whole:
            self._start()

    def result(self) -> FileReport:
        """What the file holds; it grows no more. Blocks.

        Raises:
            FileRefusedError: The check was stopped.
            PrefixError: It is wrong; the message names the row and no path.
        """
        size = self._path.stat().st_size
        is_document = _format(self._ending) not in FORMATS
        # A small file that is packed may be large.
        is_plain = self._ending in (".jsonl", ".json", ".csv", ".tsv")
        if self._process is None and size <= INLINE_BYTES and (is_document or is_plain):
            with open(self._path, "rb") as file:
                return _check(file.read, self._path, self._filename, self._ending)
        if self._process is None:
            self._start()
        return self._wait()

    def cancel(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:
                pass

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process = process
        assert process.stdin is not None
        # Not among its arguments, which everybody on the machine may read.
        task = json.dumps({"path": str(self._path), "filename": self._filename, "ending": self._ending})
        with contextlib.suppress(OSError):
            process.stdin.write(task.encode() + b"\n")
            process.stdin.flush()

    def _wait(self) -> FileReport:
        try:
            output = self._output()
        finally:
            self.cancel()
        try:
            found = json.loads(output)
        except ValueError:
            raise DataError(
                f"{self._filename} could not be read to its end, perhaps for lack of memory.", hint="split the file."
            ) from None
        if "error" in found:
            raise DataError(found["error"]["message"], hint=found["error"]["hint"])
        return FileReport.model_validate(found)

    def _output(self) -> bytes:
        """What the process writes, when it is done."""
        assert self._process is not None
        end = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # The end of its input says that the file is complete.
                return self._process.communicate(timeout=_POLLING_SECONDS)[0]
            if self._stopped.is_set():
                raise FileRefusedError("stopped", f"{self._filename} was not read to its end.", hint="upload it again.")
            if time.monotonic() > end:
                raise DataError(
                    f"{self._filename} was not read within {_SECONDS:,.0f} seconds.", hint="split the file."
                )


# --- reading ---------------------------------------------------------------------------------------------------------


def _format(ending: str) -> str:
    return ending.removesuffix(".gz")


def _check(read: Callable[[int], bytes], path: Path, filename: str, ending: str) -> FileReport:
    """Read a file to its end.

    Args:
        read: Reads it; at its end it returns nothing, perhaps after waiting for more.
        path: The file, for a format that is not read in order.
        filename: For messages.
        ending: Of the format.

    Raises:
        PrefixError: It is wrong.
    """
    name, zipped = Path(filename), ending.endswith(".gz")
    try:
        if _format(ending) not in FORMATS:
            return document_facts(_document(read, name), filename)
        return read_facts(_rows(read, path, name, _format(ending), zipped=zipped), filename)
    except PrefixError as error:
        # Parquet's reader knows the file by its path alone.
        message = error.message.replace(str(path), filename)
        # Hints may name options of a command line, which is not the reader's.
        raise DataError(message, hint="" if "--" in error.hint else error.hint) from None


def _rows(read: Callable[[int], bytes], path: Path, name: Path, form: str, *, zipped: bool) -> Iterator[Record]:
    if form == ".parquet":
        return (Record(*row) for row in parquet_rows(path))
    limit = _MAX_WHOLE_BYTES if form == ".json" else _MAX_ROWS_BYTES
    pieces = decode(unpack(read, name, zipped=zipped, max_bytes=limit), str(name))
    if form == ".json":
        return (Record(*row) for row in json_list("".join(pieces), name))
    return iter_rows(pieces, name, form)


def _document(read: Callable[[int], bytes], name: Path) -> str:
    chunks = unpack(read, name, zipped=False, max_bytes=MAX_DOCUMENT_BYTES)
    first = next(chunks, b"")
    for magic, kind in _NOT_TEXT.items():
        if first.startswith(magic):
            raise DataError(f"{name} is {kind}, not text.", hint="save its text as UTF-8.")

    def all_chunks() -> Iterator[bytes]:
        yield first
        yield from chunks

    return "".join(decode(all_chunks(), str(name)))


# --- the process -----------------------------------------------------------------------------------------------------


class _GrowingFile:
    """Reads a file that another process writes, until the writer is done.

    Args:
        file: Not buffered.
        done: Set when nothing is written any more.
    """

    def __init__(self, file: IO[bytes], done: threading.Event) -> None:
        self._file, self._done = file, done

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while True:
            is_complete = self._done.is_set()
            if (data := self._file.read(size)) or is_complete:
                return data
            self._done.wait(_POLLING_SECONDS)


def _lower_priority() -> None:
    """Leave the processor to others, and bound the memory, where the system can."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main() -> None:
    """Read a task from standard input and check its file; the end of the input is the end of the file."""
    _lower_priority()
    task, done = json.loads(sys.stdin.buffer.readline()), threading.Event()
    path = Path(task["path"])

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        done.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    found: dict[str, Any]
    try:
        with open(path, "rb", buffering=0) as file:
            found = _check(_GrowingFile(file, done).read, path, task["filename"], task["ending"]).model_dump()
    except PrefixError as error:
        found = {"error": {"message": error.message, "hint": error.hint}}
    except MemoryError:
        found = {"error": {"message": f"{task['filename']} needs too much memory.", "hint": "split the file."}}
    # The writer may not be done: what is wrong is wrong already, but it waits for the answer at the end alone.
    done.wait()
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    # A daemon thread holds the input's lock.
    os._exit(0)
