"""Read an uploaded file as training would read it, and say what it holds.

Where it is large, a process reads it: in a thread of the server, Python would slow down all texts that are generated,
and what a few kilobytes unpack to may need more memory than there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from prefixtune.data.examples import Example, merge_key
from prefixtune.data.files import FORMATS, Record, iter_rows
from prefixtune.data.forms import FORMS, Form, describe_counts, detect_form, fitting_forms, make_example
from prefixtune.data.streams import reading, whole_text
from prefixtune.errors import DataError, PrefixError

MAX_DOCUMENT_BYTES = 2**24
"""Most bytes of a document."""
MAX_ROWS = 1_000_000
"""Most rows of an uploaded file."""
_INLINE_BYTES, _MEMORY, _SECONDS = 2**18, 2**32, 300.0
"""Largest file that is checked in a thread; memory and time of the process that checks."""
_PROCESSES = threading.BoundedSemaphore(2)
_MAX_WHOLE_BYTES, _MAX_ROWS_BYTES = 2**26, 2**31
"""Most bytes of a `.json` file, which is read as a whole; and of one that is read by rows, after decompression."""
_MAX_COLUMNS, _MAX_COLUMN_CHARS, _MAX_SHOWN_CHARS = 50, 80, 1_000
_MAX_SAMPLED, _MAX_SAMPLE_CHARS = 100, 500_000
_NOT_TEXT = {b"%PDF": "a PDF file", b"PK\x03\x04": "an Office file or an archive"}
_MODULE = "prefixtune.jobs.file_check"
_PLAIN = (".jsonl", ".json", ".csv", ".tsv")


class FileFacts(BaseModel):
    """What an uploaded file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: str = Field("", description="One line for people.")
    form: str = Field(
        "", description="As jobs name it; `document`: a text; empty: several fit, and a job must name one of `forms`."
    )
    forms: list[str] = Field([], description="All forms that its columns fit.")
    task: str = Field("records", description="Of the form.")
    rows: int = Field(0, description="Of the file; 0 for a document.")
    examples: int = Field(0, description="After equal sources are merged; 0 where the form is not known.")
    targets: int = Field(
        0, description="With earlier answers of conversations; 0: nothing to train on, as in a file of questions."
    )
    columns: list[str] = Field([], description=f"Of the first row, at most {_MAX_COLUMNS}.")
    characters: int = Field(0, description="Of all examples, or of the document.")
    longest: int = Field(0, description="Characters of the longest example.")
    source: str = Field(
        "", description=f"Of the first example, or of the document; at most {_MAX_SHOWN_CHARS:,} characters."
    )
    target: str = Field("", description="Of the first example, likewise.")


class FileReport(BaseModel):
    """What was read of a file.

    Attributes:
        facts: Of all of it.
        sample: Some of its examples, evenly spaced, the first one among them; none of a document.
    """

    facts: FileFacts
    sample: list[Example] = []


def check_file(path: Path, filename: str, ending: str) -> FileReport:
    """What a file holds; blocks.

    Args:
        path: The file.
        filename: What messages call it.
        ending: Of its format, as in `.jsonl.gz`; of a document any other.

    Raises:
        PrefixError: It is wrong; the message names the row and no path.
    """
    # A small file that is packed may be large.
    if path.stat().st_size <= _INLINE_BYTES and (ending in _PLAIN or _format(ending) not in FORMATS):
        return _read(path, filename, ending)
    command = [sys.executable, "-P", "-m", _MODULE]
    # Not among its arguments, which everybody on the machine may read.
    task = json.dumps({"path": str(path), "filename": filename, "ending": ending}).encode()
    try:
        with _PROCESSES:
            done = subprocess.run(command, input=task, capture_output=True, timeout=_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        message = f"{filename} was not read within {_SECONDS:,.0f} seconds."
        raise DataError(message, hint="split the file.") from None
    except subprocess.CalledProcessError:
        message = f"{filename} could not be read to its end, perhaps for lack of memory."
        raise DataError(message, hint="split the file.") from None
    found = json.loads(done.stdout)
    if "error" in found:
        message, hint = found["error"]
        raise DataError(message, hint=hint)
    return FileReport.model_validate(found)


def main() -> None:
    """Read a task from standard input, and check its file: in bounded memory, and without haste."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
    task = json.loads(sys.stdin.buffer.read())
    try:
        found = _read(Path(task["path"]), task["filename"], task["ending"]).model_dump_json()
    except PrefixError as error:
        found = json.dumps({"error": [error.message, error.hint]})
    sys.stdout.write(found)


# --- reading ---------------------------------------------------------------------------------------------------------


def _format(ending: str) -> str:
    return ending.removesuffix(".gz")


def _read(path: Path, filename: str, ending: str) -> FileReport:
    """Read a file to its end.

    Raises:
        PrefixError: It is wrong.
    """
    try:
        with reading(Path(filename)), open(path, "rb") as file:
            if _format(ending) not in FORMATS:
                return _document_facts(file, filename)
            unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if ending.endswith(".gz") else file
            limit = _MAX_WHOLE_BYTES if _format(ending) == ".json" else _MAX_ROWS_BYTES
            return _read_rows(iter_rows(unpacked, filename, _format(ending), limit), filename)
    except PrefixError as error:
        # Hints may name options of a command line, which is not the reader's.
        raise DataError(error.message, hint="" if "--" in error.hint else error.hint) from None


def _document_facts(file: IO[bytes], filename: str) -> FileReport:
    first = file.read(8)
    for magic, kind in _NOT_TEXT.items():
        if first.startswith(magic):
            raise DataError(f"{filename} is {kind}, not text.", hint="save its text as UTF-8.")
    file.seek(0)
    text = whole_text(file, filename, MAX_DOCUMENT_BYTES)
    if not any(map(str.isalnum, text)):
        raise DataError(f"{filename} holds no words.", hint="check that it is the right file.")
    summary = f"{filename}: a document of {len(text.split()):,} words"
    counts: dict[str, Any] = {"characters": len(text), "longest": len(text), "source": text[:_MAX_SHOWN_CHARS]}
    return FileReport(facts=FileFacts(summary=summary, form="document", forms=["document"], task="document", **counts))


def _read_rows(records: Iterable[Record], filename: str) -> FileReport:
    counter: _Counter | None = None
    for number, record in enumerate(records, start=1):
        if number > MAX_ROWS:
            raise DataError(f"{filename} has more than {MAX_ROWS:,} rows.", hint="leave some out.")
        counter = counter or _Counter(record)
        counter.add(record)
    assert counter is not None, "a file without rows is refused"
    return FileReport(facts=counter.facts(filename), sample=counter.sample)


class _Counter:
    """Counts the examples of a file's rows, and keeps a sample: evenly spaced, of bounded number and size.

    Args:
        first: The first row, which has the form of the file.

    Raises:
        DataError: It has no known form.
    """

    def __init__(self, first: Record) -> None:
        self._columns = list(map(str, first.values))
        fitting = fitting_forms(first.values)
        # Questions may stand alone: those about a document.
        self._needs_targets = bool(fitting) or "question" not in first.values
        if not fitting and not self._needs_targets:
            fitting = [FORMS["question"]]
        self._forms = fitting or [detect_form(first.values, first.location)]
        self._form: Form | None = self._forms[0] if len(self._forms) == 1 else None
        self._rows = self._examples = self._targets = self._characters = self._longest = 0
        self._sources: set[int] = set()
        self.sample: list[Example] = []
        self._sizes: list[int] = []
        self._every = 1

    def add(self, record: Record) -> None:
        """Count one row."""
        self._rows += 1
        if self._form is None:
            return
        example = make_example(record, self._form, needs_targets=self._needs_targets)
        self._targets += len(example.targets) + sum(message.role == "assistant" for message in example.messages)
        size = sum(map(len, example.targets)) + (
            sum(len(message.content) for message in example.messages) or len(example.source)
        )
        self._characters += size
        self._longest = max(self._longest, size)
        self._keep(example, size)
        key = merge_key(example) if self._form.task == "records" else None
        # 64 bits tell a million sources apart.
        number = self._rows if key is None else hash(key)
        if key is None or number not in self._sources:
            self._examples += 1
        if key is not None:
            self._sources.add(number)

    def _keep(self, example: Example, size: int) -> None:
        if (self._rows - 1) % self._every == 0 and size <= _MAX_SAMPLE_CHARS:
            self.sample.append(dataclasses.replace(example, fields={}, groups={}))
            self._sizes.append(size)
        while len(self.sample) > _MAX_SAMPLED or sum(self._sizes) > _MAX_SAMPLE_CHARS:
            self.sample, self._sizes, self._every = self.sample[::2], self._sizes[::2], 2 * self._every

    def facts(self, filename: str) -> FileFacts:
        """What all rows hold."""
        columns = [name[:_MAX_COLUMN_CHARS] for name in self._columns[:_MAX_COLUMNS]]
        names = [form.name for form in self._forms]
        if self._form is None:
            readings = " or ".join(f"{form.title} ({form.name})" for form in self._forms)
            summary = f"{filename}: rows of {readings}: a job must name the form"
            known: dict[str, Any] = {"summary": summary, "forms": names, "rows": self._rows, "columns": columns}
            return FileFacts(**known)
        first = self.sample[0] if self.sample else Example("")
        return FileFacts(
            summary=describe_counts(self._form, self._examples, self._targets, Path(filename), self._columns),
            form=self._form.name,
            forms=names,
            task=self._form.task,
            rows=self._rows,
            examples=self._examples,
            targets=self._targets,
            columns=columns,
            characters=self._characters,
            longest=self._longest,
            source=first.source[:_MAX_SHOWN_CHARS],
            target=first.targets[0][:_MAX_SHOWN_CHARS] if first.targets else "",
        )


if __name__ == "__main__":
    main()
