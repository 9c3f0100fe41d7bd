"""Uploaded files, each with its owner: in the data folder, whole or not at all.

A file is written into a hidden folder, checked as training would read it, and moved to its place in one rename. What a
killed process left is removed by the next upload.

A large file is checked by a process. In a thread of the server, Python would slow down all texts that are generated,
and what a few kilobytes unpack to may need more memory than there is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json, to_json

from prefixtune.data.files import FORMATS, iter_file, recognize_format
from prefixtune.data.forms import describe_data, fitting_forms, preview_of
from prefixtune.data.registry import read_data
from prefixtune.data.streams import GZIP_MAGIC, read_text
from prefixtune.errors import DataError, PrefixError
from prefixtune.jobs.folder import FILE_ID, DataFolder
from prefixtune.jobs.job import metrics_file_id
from prefixtune.utils.files import atomic_files, fsync, remove_abandoned, work_folder
from prefixtune.utils.locks import change_folder

Purpose = Literal["fine-tune", "document", "fine-tune-results"]
"""What a file is for; results are made by workers."""
MAX_DOCUMENT_BYTES = 2**24
"""Most bytes of a document."""
_META, _PREVIEW, _METRICS = "meta.json", "preview.json", "step_metrics.csv"
"""What is known of a file; some of its examples; and what a job's metrics are called, as OpenAI calls them."""
_LOCK_SECONDS = 30.0
_HEAD, _MAX_FILENAME = 512, 200
"""Bytes by which the format of a file is recognized; and the longest name."""
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")
_INLINE_BYTES, _MEMORY, _SECONDS = 2**18, 2**32, 300.0
"""Largest file that is checked in a thread; memory and time of the process that checks."""
_PROCESSES = threading.BoundedSemaphore(2)
_MODULE = "prefixtune.jobs.files"


class FileFacts(BaseModel, frozen=True):
    """What an uploaded file holds.

    Attributes:
        summary: One line for people.
        form: As jobs name it; `document`: a text; empty: several fit, and a job must name one of `forms`.
        forms: All forms that its columns fit.
        task: Of the form.
        rows: Of the file; 0 for a document.
        examples: After equal sources are merged; 0 where the form is not known.
        targets: With earlier answers of conversations; 0: nothing to train on, as in a file of questions.
        labels: How many different ones; 0: the examples have none, or their tags are not counted.
        characters: Of all examples, or of the document.
    """

    summary: str = ""
    form: str = ""
    forms: list[str] = []
    task: str = "records"
    rows: int = 0
    examples: int = 0
    targets: int = 0
    labels: int = 0
    characters: int = 0


class StoredFile(BaseModel, frozen=True):
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
        status_details: What is wrong with it, and in which row; it names no path. Empty: nothing.
        facts: What it holds; None: it is wrong, or a result.
    """

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


CheckRoom = Callable[[int, Sequence[StoredFile]], None]
"""Raises an error where there is no room for an upload of so many bytes beside the other uploads of its owner."""


class FileStore:
    """The files of all owners. Several processes may use one folder; all methods block.

    Args:
        folder: The data folder; made by the first upload.
    """

    def __init__(self, folder: DataFolder) -> None:
        self._folder, self._root = folder, folder.files

    def put(
        self, owner: str, file: IO[bytes], filename: str, purpose: Purpose, check_room: CheckRoom = lambda *_: None
    ) -> StoredFile:
        """Check an uploaded file, and keep it.

        One whose content is wrong is kept too, so that its owner can read it, with the status `error`.

        Args:
            owner: Whose it will be.
            file: Its bytes.
            filename: As its owner calls it; only its last part is kept.
            purpose: What it is for.
            check_room: Called before it is read and, as other uploads may have ended meanwhile, before it is kept.

        Raises:
            PrefixError, OSError: The disk is full, or fails.
        """
        filename, head, size = _shown_name(filename), file.read(_HEAD), file.seek(0, os.SEEK_END)
        file.seek(0)
        check_room(size, self._uploads(owner))
        ending = _ending_of(filename, head, purpose)
        stored = StoredFile(owner=owner, bytes=size, filename=filename, purpose=purpose, ending=ending)
        self._folder.make()
        remove_abandoned(self._root)
        with contextlib.ExitStack() as stack, atomic_files(self._root / stored.id) as made:
            path = made / f"data{ending}"
            with open(path, "wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
            stored = check_file(path, stored)
            (made / _META).write_text(stored.model_dump_json(), encoding="utf-8")
            stack.enter_context(change_folder(self._root, _LOCK_SECONDS))
            check_room(size, self._uploads(owner))
        return stored

    def put_metrics(self, owner: str, job_id: str, data: bytes) -> StoredFile:
        """Store the metrics of a job, whose id is in the file's; the second time, they are replaced.

        Args:
            owner: The job's.
            job_id: The job's.
            data: A table as CSV.

        Raises:
            PrefixError: It cannot be written.
        """
        facts: Any = {"owner": owner, "bytes": len(data), "filename": _METRICS, "purpose": "fine-tune-results"}
        stored = StoredFile(id=metrics_file_id(job_id), ending=".csv", **facts)
        self._folder.make()
        with change_folder(self._root, _LOCK_SECONDS), atomic_files(self._root / stored.id) as made:
            (made / "data.csv").write_bytes(data)
            (made / _META).write_text(stored.model_dump_json(), encoding="utf-8")
        return stored

    def get(self, owner: str | None, file_id: str) -> StoredFile | None:
        """What is known about a file; None: there is none.

        Args:
            owner: Whose it must be; None: anybody's.
            file_id: Its id.
        """
        stored = _read(self._root / file_id) if FILE_ID.fullmatch(file_id) else None
        return stored if stored is not None and owner in (None, stored.owner) else None

    def path(self, file: StoredFile) -> Path:
        """Where a file's data are; their ending is that of their format. To be linked, never changed."""
        return self._root / file.id / f"data{file.ending}"

    def preview(self, file: StoredFile) -> Any:
        """Some of a file's examples, as `preview_of` gave them; none of a result, or of one that is wrong."""
        path = self._root / file.id / _PREVIEW
        return from_json(path.read_bytes()) if path.exists() else []

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
        with work_folder(self._root, "deleted") as temporary, contextlib.suppress(FileNotFoundError):
            # One rename: it is there with all that belongs to it, or not at all.
            os.replace(self._root / file.id, temporary / "file")
            fsync(self._root)

    def _uploads(self, owner: str) -> Sequence[StoredFile]:
        return [file for file in self.list(owner) if file.purpose != "fine-tune-results"]


def _read(folder: Path) -> StoredFile | None:
    """What is known about a file; None: it is not there, or not readable."""
    with contextlib.suppress(OSError, ValidationError):
        return StoredFile.model_validate_json((folder / _META).read_bytes())
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
    table = ".tsv" if b"\t" in head.split(b"\n", 1)[0] else ".csv"
    recognized = ".jsonl" if zipped else recognize_format(head) or table
    return next((suffix for suffix in reversed(suffixes) if suffix in FORMATS), recognized) + zipped


# --- what a file holds ------------------------------------------------------------------------------------------------


def check_file(path: Path, file: StoredFile) -> StoredFile:
    """What is known about a file after it has been read; blocks.

    Args:
        path: Its data; the ending is that of its format.
        file: What is known before.
    """
    # A small file that is packed may be large.
    if file.bytes <= _INLINE_BYTES and path.suffix not in (".gz", ".parquet"):
        return _read_whole(path, file)
    try:
        with _PROCESSES:
            # Not among its arguments, which everybody on the machine may read.
            work, command = to_json([path, file]), [sys.executable, "-P", "-m", _MODULE]
            done = subprocess.run(command, input=work, capture_output=True, timeout=_SECONDS, check=True)
        return StoredFile.model_validate_json(done.stdout)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        what = f"{file.filename} could not be read to its end in {_SECONDS:,.0f} seconds or for lack of memory."
        return _wrong(file, f"{what} Split it.")


def main() -> None:
    """Read from standard input which file is to be checked, and check it: in bounded memory, and without haste."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
    path, file = from_json(sys.stdin.buffer.read())
    checked = _read_whole(Path(path), StoredFile.model_validate(file))
    sys.stdout.buffer.write(checked.model_dump_json().encode())


def _read_whole(path: Path, file: StoredFile) -> StoredFile:
    facts_of = _document_facts if file.purpose == "document" else _row_facts
    try:
        facts = facts_of(path, file.filename)
        # Here, as it may need much memory.
        examples = preview_of(path, None if file.purpose == "document" else facts.form)
        path.with_name(_PREVIEW).write_bytes(to_json(examples))
        return file.model_copy(update={"facts": facts})
    except PrefixError as error:
        # Hints may name options of a command line, which is not the reader's.
        hint = "" if "--" in error.hint else error.hint
        return _wrong(file, f"{error.message} {hint[:1].upper()}{hint[1:]}".replace(str(path), file.filename).strip())


def _wrong(file: StoredFile, what: str) -> StoredFile:
    return file.model_copy(update={"status": "error", "status_details": what[:1000]})


def _document_facts(path: Path, name: str) -> FileFacts:
    text = read_text(path, max_bytes=MAX_DOCUMENT_BYTES)
    if not any(map(str.isalnum, text)):
        raise DataError(f"{name} holds no words.", hint="check that it is the right file.")
    summary = f"{name}: a document of {len(text.split()):,} words"
    return FileFacts(summary=summary, form="document", forms=["document"], task="document", characters=len(text))


def _row_facts(path: Path, name: str) -> FileFacts:
    first = next(iter_file(path)).values
    forms = fitting_forms(first)
    rows = sum(1 for _ in iter_file(path))
    if len(forms) > 1:
        readings = " or ".join(f"{form.title} ({form.name})" for form in forms)
        summary = f"{name}: rows of {readings}: a job must name the form"
        return FileFacts(summary=summary, forms=[form.name for form in forms], rows=rows)
    # Questions may stand alone: those about a document.
    is_open = not forms and "question" in first
    read = read_data("records", path, form="question" if is_open else "", needs_targets=not is_open)
    assert read.form is not None
    turns = [message for example in read.examples for message in example.messages]
    targets = [target for example in read.examples for target in example.targets]
    sources = [message.content for message in turns] + [one.source for one in read.examples if not one.messages]
    summary, form = describe_data(read.form, read.examples, name, read.columns), read.form.name
    counts = {"rows": rows, "examples": len(read.examples), "characters": sum(map(len, sources + targets))}
    counts["labels"] = len({*targets}) if read.task == "classification" else 0
    counts["targets"] = len(targets) + sum(message.role == "assistant" for message in turns)
    return FileFacts(summary=summary, form=form, forms=[form], task=read.task, **counts)


if __name__ == "__main__":
    main()
