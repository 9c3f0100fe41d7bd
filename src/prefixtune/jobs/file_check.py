"""Check an uploaded file as training would read it: where it is large, in a process.

Reading is Python's work: in a thread of the server it would slow down all texts that are generated, and what a few
kilobytes unpack to may need more memory than there is.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, cast

from prefixtune.data.files import FORMATS, iter_rows
from prefixtune.data.streams import reading, whole_text
from prefixtune.errors import DataError, PrefixError
from prefixtune.jobs.file_facts import FileReport, document_facts, read_facts
from prefixtune.jobs.stored_file import FileRefusedError

__all__ = ["check_file", "main"]


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


def check_file(path: Path, filename: str, ending: str, stopped: threading.Event) -> FileReport:
    """What a file holds; blocks.

    Args:
        path: The file.
        filename: What messages call it.
        ending: Of its format, as in `.jsonl.gz`; of a document any other.
        stopped: Set when nobody waits for the result any more.

    Raises:
        FileRefusedError: The check was stopped.
        PrefixError: It is wrong; the message names the row and no path.
    """
    # A small file that is packed may be large.
    is_plain = ending in (".jsonl", ".json", ".csv", ".tsv") or _format(ending) not in FORMATS
    if path.stat().st_size <= INLINE_BYTES and is_plain:
        return _check(path, filename, ending)
    try:
        found = json.loads(_run(path, filename, ending, stopped))
    except ValueError:
        raise DataError(
            f"{filename} could not be read to its end, perhaps for lack of memory.", hint="split the file."
        ) from None
    if "error" in found:
        raise DataError(found["error"]["message"], hint=found["error"]["hint"])
    return FileReport.model_validate(found)


def _run(path: Path, filename: str, ending: str, stopped: threading.Event) -> bytes:
    """What a process that checks a file writes."""
    # Not among its arguments, which everybody on the machine may read.
    task: bytes | None = json.dumps({"path": str(path), "filename": filename, "ending": ending}).encode()
    end = time.monotonic() + _SECONDS
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            while True:
                try:
                    return process.communicate(task, timeout=_POLLING_SECONDS)[0]
                except subprocess.TimeoutExpired:
                    # It is sent only once.
                    task = None
                if stopped.is_set():
                    raise FileRefusedError("stopped", f"{filename} was not read to its end.", hint="upload it again.")
                if time.monotonic() > end:
                    raise DataError(f"{filename} was not read within {_SECONDS:,.0f} seconds.", hint="split the file.")
        finally:
            process.kill()


# --- reading ---------------------------------------------------------------------------------------------------------


def _format(ending: str) -> str:
    return ending.removesuffix(".gz")


def _check(path: Path, filename: str, ending: str) -> FileReport:
    """Read a file to its end.

    Raises:
        PrefixError: It is wrong.
    """
    try:
        with reading(Path(filename)), open(path, "rb") as file:
            if _format(ending) not in FORMATS:
                return document_facts(_document(file, filename), filename)
            unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if ending.endswith(".gz") else file
            limit = _MAX_WHOLE_BYTES if _format(ending) == ".json" else _MAX_ROWS_BYTES
            return read_facts(iter_rows(unpacked, filename, _format(ending), limit), filename)
    except PrefixError as error:
        # Hints may name options of a command line, which is not the reader's.
        raise DataError(error.message, hint="" if "--" in error.hint else error.hint) from None


def _document(file: IO[bytes], filename: str) -> str:
    first = file.read(8)
    for magic, kind in _NOT_TEXT.items():
        if first.startswith(magic):
            raise DataError(f"{filename} is {kind}, not text.", hint="save its text as UTF-8.")
    file.seek(0)
    return whole_text(file, filename, MAX_DOCUMENT_BYTES)


# --- the process -----------------------------------------------------------------------------------------------------


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
    """Read a task from standard input, and check its file."""
    _lower_priority()
    task = json.loads(sys.stdin.buffer.read())
    found: dict[str, Any]
    try:
        found = _check(Path(task["path"]), task["filename"], task["ending"]).model_dump()
    except PrefixError as error:
        found = {"error": {"message": error.message, "hint": error.hint}}
    except MemoryError:
        found = {"error": {"message": f"{task['filename']} needs too much memory.", "hint": "split the file."}}
    sys.stdout.write(json.dumps(found))
