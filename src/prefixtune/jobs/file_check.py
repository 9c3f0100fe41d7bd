"""Read an uploaded file as training would read it, and say what it holds.

A large one is read by a process. In a thread of the server, Python would slow down all texts that are generated, and
what a few kilobytes unpack to may need more memory than there is.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from prefixtune.data.examples import Example, merge_key
from prefixtune.data.files import FORMATS, Record, iter_rows
from prefixtune.data.forms import FORMS, describe_counts, detect_form, fitting_forms, make_example
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
    characters: int = Field(0, description="Of all examples, or of the document.")


class FileReport(BaseModel):
    """What was read of a file.

    Attributes:
        facts: Of all of it; None: it is wrong.
        error: What is wrong with it, and in which row; it names no path.
    """

    facts: FileFacts | None = None
    error: str = ""


class _Task(BaseModel):
    path: Path
    filename: str
    ending: str


def check_file(path: Path, filename: str, ending: str) -> FileReport:
    """What a file holds; blocks.

    Args:
        path: The file.
        filename: What messages call it.
        ending: Of its format, as in `.jsonl.gz`; of a document any other.
    """
    task = _Task(path=path, filename=filename, ending=ending)
    # A small file that is packed may be large.
    if path.stat().st_size <= _INLINE_BYTES and (ending in _PLAIN or _format(ending) not in FORMATS):
        return _read(task)
    command = [sys.executable, "-P", "-m", _MODULE]
    try:
        with _PROCESSES:
            # Not among its arguments, which everybody on the machine may read.
            work = task.model_dump_json().encode()
            done = subprocess.run(command, input=work, capture_output=True, timeout=_SECONDS, check=True)
        return FileReport.model_validate_json(done.stdout)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        error = f"{filename} could not be read to its end in {_SECONDS:,.0f} seconds or for lack of memory. Split it."
        return FileReport(error=error)


def main() -> None:
    """Read a task from standard input, and check its file: in bounded memory, and without haste."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
    sys.stdout.write(_read(_Task.model_validate_json(sys.stdin.buffer.read())).model_dump_json())


# --- reading ---------------------------------------------------------------------------------------------------------


def _format(ending: str) -> str:
    return ending.removesuffix(".gz")


def _read(task: _Task) -> FileReport:
    """Read a file to its end."""
    name, form = task.filename, _format(task.ending)
    try:
        with reading(Path(name)), open(task.path, "rb") as file:
            if form not in FORMATS:
                return FileReport(facts=_document_facts(file, name))
            unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if task.ending.endswith(".gz") else file
            limit = _MAX_WHOLE_BYTES if form == ".json" else _MAX_ROWS_BYTES
            return FileReport(facts=_row_facts(iter_rows(unpacked, name, form, limit), name))
    except PrefixError as error:
        # Hints may name options of a command line, which is not the reader's.
        hint = "" if "--" in error.hint else error.hint
        return FileReport(error=f"{error.message} {hint[:1].upper()}{hint[1:]}".strip()[:1000])


def _document_facts(file: IO[bytes], filename: str) -> FileFacts:
    text = whole_text(file, filename, MAX_DOCUMENT_BYTES)
    if not any(map(str.isalnum, text)):
        raise DataError(f"{filename} holds no words.", hint="check that it is the right file.")
    summary = f"{filename}: a document of {len(text.split()):,} words"
    counts: dict[str, Any] = {"characters": len(text)}
    return FileFacts(summary=summary, form="document", forms=["document"], task="document", **counts)


def _row_facts(records: Iterator[Record], filename: str) -> FileFacts:
    first = next(records)
    forms = fitting_forms(first.values)
    # Questions may stand alone: those about a document.
    needs_targets = bool(forms) or "question" not in first.values
    forms = forms or ([detect_form(first.values, first.location)] if needs_targets else [FORMS["question"]])
    form = forms[0] if len(forms) == 1 else None
    sources = set[int]()
    counts: dict[str, Any] = {"rows": 0, "targets": 0, "characters": 0}
    for number, record in enumerate(itertools.chain([first], records), start=1):
        if number > MAX_ROWS:
            raise DataError(f"{filename} has more than {MAX_ROWS:,} rows.", hint="leave some out.")
        counts["rows"] += 1
        if form is None:
            continue
        example = make_example(record, form, needs_targets=needs_targets)
        counts["targets"] += len(example.targets) + sum(message.role == "assistant" for message in example.messages)
        source = sum(len(message.content) for message in example.messages) or len(example.source)
        counts["characters"] += source + sum(map(len, example.targets))
        key = merge_key(example) if form.task == "records" else None
        # 64 bits tell a million sources apart.
        sources.add(number if key is None else hash(key))
    names = [one.name for one in forms]
    if form is None:
        readings = " or ".join(f"{one.title} ({one.name})" for one in forms)
        summary = f"{filename}: rows of {readings}: a job must name the form"
        return FileFacts(summary=summary, forms=names, **counts)
    summary = describe_counts(form, len(sources), counts["targets"], Path(filename), map(str, first.values))
    return FileFacts(summary=summary, form=form.name, forms=names, task=form.task, examples=len(sources), **counts)


def sample_rows(path: Path, ending: str, form: str, most: int) -> list[Example]:
    """The first examples of a file that has been checked.

    Args:
        path: The file.
        ending: Of its format.
        form: Of its rows.
        most: Rows to read.
    """
    with open(path, "rb") as file:
        unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if ending.endswith(".gz") else file
        records = iter_rows(unpacked, path.name, _format(ending), _MAX_ROWS_BYTES)
        return [make_example(record, FORMS[form]) for record in itertools.islice(records, most)]


if __name__ == "__main__":
    main()
