"""Read a data file as records, with errors that name the file and the line.

Formats: `.jsonl` (one object per line), `.json` (one list of objects), `.csv` and `.tsv` (a header line; fields in `"`
if needed; a `.csv` may also use `;` between fields, and a first line such as `sep=;` may name the separator) and
`.parquet`, each also gzipped (`.gz`). Text is UTF-8, with or without a byte order mark, or UTF-16 with one. A file is
read as a whole. Instead of a file, a set of the `datasets` library may be read (see `hub`).
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.data.hub import dataset_rows, is_dataset
from prefixtune.data.parquet import parquet_rows
from prefixtune.data.parsing import csv_rows, json_lines, json_list
from prefixtune.errors import DataError, did_you_mean

__all__ = [
    "FORMATS",
    "MAX_FILE_BYTES",
    "Record",
    "check_file",
    "file_format",
    "join_lines",
    "one_line",
    "read_file",
    "read_text",
]


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_GZIP_MAGIC = b"\x1f\x8b"
# A pattern such as `\s*\n\s*` needs time quadratic in the blanks of a text; this one matches a run of white space once.
_WHITE_SPACE = re.compile(r"\s+")
MAX_FILE_BYTES = 2**32
"""Most bytes that are read of a file, after decompression."""
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
"""Byte order mark -> the encoding of the text after it; editors and spreadsheets on Windows write them."""


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes:
        location: Its place, for messages: `data.csv, line 3` (its first line), or `data.json, item 3` (from 1), or
            `set, row 3` in a set of the `datasets` library.
        values: Column -> value; text in CSV and TSV, any JSON value otherwise.
    """

    location: str
    values: dict[str, Any]


def file_format(path: Path, formats: Sequence[str] = FORMATS) -> str:
    """The format of a file by its name, without a final `.gz`.

    >>> file_format(Path("mine/train.CSV.gz"))
    '.csv'

    Raises:
        DataError: The ending is none of `formats`.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    ending = suffixes[-1] if suffixes else ""
    if ending not in formats:
        ending_text = f"the ending {''.join(path.suffixes[-2:])!r}" if path.suffixes else "no ending"
        raise DataError(
            f"{path} has {ending_text}; allowed: {', '.join(formats)}, each with or without .gz.",
            hint=did_you_mean(ending, formats) if ending else "rename the file, with the ending of its format.",
        )
    return ending


def read_text(path: Path, *, max_bytes: int | None = None, needed: str = "one row") -> str:
    """The whole text of a file, decompressed if its name ends with `.gz`, without a byte order mark.

    Args:
        path: The file.
        max_bytes: The most that it may hold, also decompressed; None: `MAX_FILE_BYTES`.
        needed: What an empty file lacks, for the message.

    Raises:
        DataError: The file is missing, a folder, unreadable, empty or too large; or it is not the gzip file that its
            name promises, or neither UTF-8 nor UTF-16 with a byte order mark.
    """
    data = _read_whole(path, max_bytes)
    mark = next((mark for mark in _BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    data, encoding = data[len(mark) :], _BYTE_ORDER_MARKS.get(mark, "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; "
            "only UTF-8 text is allowed.",
            hint="save it as UTF-8, or convert it, as in `iconv -f WINDOWS-1252 -t UTF-8`.",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: there is a NUL character, as in files that are damaged or binary.",
            hint="write the file again, or remove the character.",
        )
    if not text.strip():
        raise DataError(f"{path} is empty; at least {needed} is needed.", hint="check that it is complete.")
    return text


def read_file(path: Path, formats: Sequence[str] = FORMATS) -> list[Record]:
    """All rows of a file, in order; blank lines are ignored.

    Args:
        path: The file, whose ending names its format, or a set of the `datasets` library.
        formats: The allowed endings, of `FORMATS`.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The file cannot be read (see `read_text`), its ending is not allowed, or one of its rows is
            malformed.
    """
    path = Path(path)
    if is_dataset(path):
        return [Record(location, values) for location, values in dataset_rows(path)]
    check_file(path)
    form = file_format(path, formats)
    if form == ".parquet":
        rows = parquet_rows(_read_whole(path), path, MAX_FILE_BYTES)
    elif form == ".jsonl":
        rows = json_lines(read_text(path), path)
    elif form == ".json":
        rows = json_list(read_text(path), path)
    else:
        rows = csv_rows(read_text(path), path, "\t" if form == ".tsv" else "")
    records = [Record(location, values) for location, values in rows]
    if not records:
        raise DataError(f"{path} has no rows; at least one is needed.", hint="check that it is complete.")
    return records


def check_file(path: Path) -> None:
    """Refuse a folder, before its ending is checked.

    Raises:
        DataError: The path is a folder.
    """
    if os.path.isdir(path):  # Path.is_dir raises if the parent folder may not be read
        raise _folder_error(path)


def join_lines(text: str) -> str:
    """A text without outer white space, and with one space instead of each inner line break."""
    return _WHITE_SPACE.sub(lambda run: " " if "\n" in run[0] or "\r" in run[0] else run[0], text.strip())


def one_line(value: Any, column: str, location: str) -> str:
    r"""A value that must be a text, as `join_lines` returns it.

    >>> one_line(" Two\n lines. ", "text", "a.csv, line 2")
    'Two lines.'

    Args:
        value: Should be text.
        column: Its column, for messages.
        location: The location of its row, for messages.

    Raises:
        DataError: It is not a string, or only white space.
    """
    text = join_lines(value) if isinstance(value, str) else ""
    if not text:
        raise DataError(f"{location}: {column!r} holds {value!r}; text is needed.", hint="write it, or drop the row.")
    return text


def _folder_error(path: Path) -> DataError:
    return DataError(f"{path} is a folder; a file is needed.", hint="name one file in it.")


def _read_whole(path: Path, max_bytes: int | None = None) -> bytes:
    """A file's bytes, decompressed if its name ends with `.gz`."""
    data = _read_bytes(path, max_bytes)
    if path.suffix.lower() == ".gz":
        return _decompress(path, data, max_bytes)
    if data.startswith(_GZIP_MAGIC):
        raise DataError(f"{path} is gzipped, but its name does not end with .gz.", hint="add .gz to its name.")
    return data


def _read_bytes(path: Path, max_bytes: int | None) -> bytes:
    try:
        with open(path, "rb") as file:
            return _read_bounded(file, path, max_bytes)
    except FileNotFoundError as error:
        neighbours = [item.name for item in path.parent.glob("*")]
        hint = did_you_mean(path.name, neighbours)
        if not hint.startswith("did you mean"):
            hint = "check the path; a relative one starts at the current folder."
        raise DataError(f"{path} does not exist.", hint=hint) from error
    except IsADirectoryError as error:
        raise _folder_error(path) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", hint="check its permissions.") from error


def _read_bounded(file: io.BufferedIOBase, path: Path, max_bytes: int | None) -> bytes:
    """All bytes of a file, if they are not too many."""
    limit = MAX_FILE_BYTES if max_bytes is None else max_bytes
    pieces: list[bytes] = []
    size = 0
    while piece := file.read(2**20):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise DataError(f"{path} holds more than {limit:,} bytes.", hint="split the file.")
    return b"".join(pieces)


def _decompress(path: Path, data: bytes, max_bytes: int | None) -> bytes:
    if not data.startswith(_GZIP_MAGIC):
        raise DataError(
            f"{path} ends with .gz but is not a gzip file.",
            hint="remove .gz from its name, or compress it with `gzip`.",
        )
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return _read_bounded(file, path, max_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a broken gzip file: {error}.", hint="copy or download it again.") from error
