"""Read a data file as records, with errors that name the file and the line.

Formats: `.jsonl` (one object per line), `.json` (one list of objects), `.csv` and `.tsv` (a header line; fields in `"`
if needed; a `.csv` may also use `;` between fields, and a first line such as `sep=;` may name the separator) and
`.parquet`, each also gzipped (`.gz`); `-` is standard input, whose format is recognized. A `.json` file is read as a
whole, everything else row by row. Instead of a file, a set of the `datasets` library may be read (see `hub`).
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.data.hub import dataset_rows, is_dataset
from prefixtune.data.parquet import parquet_rows
from prefixtune.data.parsing import LocatedRow, csv_rows, json_lines, json_list
from prefixtune.data.streams import check_exists, is_stdin, read_chunks, read_text, shown, text_pieces
from prefixtune.errors import DataError, did_you_mean

__all__ = [
    "FORMATS",
    "Record",
    "check_file",
    "file_format",
    "iter_file",
    "iter_rows",
    "join_lines",
    "one_line",
    "read_file",
    "recognize_format",
]


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# A pattern such as `\s*\n\s*` needs time quadratic in the blanks of a text; this one matches a run of white space once.
_WHITE_SPACE = re.compile(r"\s+")


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
        DataError: The ending is none of `formats`, perhaps as there is no such file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    ending = suffixes[-1] if suffixes else ""
    if ending not in formats:
        check_exists(path)
        ending_text = f"the ending {''.join(path.suffixes[-2:])!r}" if path.suffixes else "no ending"
        raise DataError(
            f"{path} has {ending_text}; allowed: {', '.join(formats)}, each with or without .gz.",
            hint=did_you_mean(ending, formats) if ending else "rename the file, with the ending of its format.",
        )
    return ending


def read_file(path: Path, formats: Sequence[str] = FORMATS) -> list[Record]:
    """All rows of a file, as `iter_file` gives them one at a time.

    Raises:
        PrefixError: As for `iter_file`.
    """
    return list(iter_file(path, formats))


def iter_file(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Record]:
    """The rows of a file, in order and one at a time; blank lines are ignored.

    Only a piece of the file is in memory (of a `.json` file the whole).

    Args:
        path: The file, whose ending names its format; `-`: standard input; or a set of the `datasets` library.
        formats: The allowed endings, of `FORMATS`.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The file cannot be read (see `streams.read_chunks`), its ending is not allowed, it has no rows, or
            one of its rows is malformed; raised when the row is reached.
    """
    path = Path(path)
    yield from _records(_located_rows(path, formats), path)


def _records(rows: Iterator[LocatedRow], path: Path) -> Iterator[Record]:
    is_empty = True
    for location, values in rows:
        is_empty = False
        yield Record(location, values)
    if is_empty:
        raise DataError(f"{shown(path)} has no rows; at least one is needed.", hint="check that it is complete.")


def _located_rows(path: Path, formats: Sequence[str]) -> Iterator[LocatedRow]:
    if is_dataset(path):
        return dataset_rows(path)
    check_file(path)
    form = _stdin_format(formats) if is_stdin(path) else file_format(path, formats)
    if form == ".parquet":
        return parquet_rows(path)
    return _text_rows(text_pieces(path), path, form) if form != ".json" else json_list(read_text(path), path)


def iter_rows(pieces: Iterator[str], path: Path, form: str) -> Iterator[Record]:
    """As `iter_file`, of a text that is read piece by piece, perhaps while it is still being written.

    Args:
        pieces: The text.
        path: The file's, for messages.
        form: `.jsonl`, `.csv`, `.tsv`, or empty: a table with any separator.

    Raises:
        DataError: As for `iter_file`.
    """
    yield from _records(_text_rows(pieces, path, form), path)


def _text_rows(pieces: Iterator[str], path: Path, form: str) -> Iterator[LocatedRow]:
    if form == ".jsonl":
        return json_lines(pieces, path)
    separators = {".tsv": "\t", ".csv": ",;"}
    return csv_rows(pieces, path, separators.get(form, ",;\t"))


def _stdin_format(formats: Sequence[str]) -> str:
    """The format of standard input, by its first characters: `.jsonl`, `.json`, `.parquet`, or a table (empty).

    Raises:
        DataError: It is none of `formats`.
    """
    form = recognize_format(next(read_chunks(Path("-")), b""))
    if (form or ".csv") not in formats:
        raise DataError(
            f"stdin holds {form or 'a table, or text'}; allowed: {', '.join(formats)}.",
            hint="save it as a file of one of these formats.",
        )
    return form


def recognize_format(start: bytes) -> str:
    """The format of a file by its first bytes: `.jsonl`, `.json`, `.parquet`, or a table or a text (empty).

    >>> recognize_format(b' {"text": "a"}'), recognize_format(b"["), recognize_format('{"text"'.encode("utf-16"))
    ('.jsonl', '.json', '.jsonl')
    """
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if start.startswith(mark):
            start = start[: len(start) // 2 * 2].decode(encoding, errors="replace").encode()
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"PAR1"):
        return ".parquet"
    if text.startswith((b"{", b"[")):
        return ".jsonl" if text.startswith(b"{") else ".json"
    return ""


def check_file(path: Path) -> None:
    """Refuse a folder, before its ending is checked.

    Raises:
        DataError: The path is a folder.
    """
    if os.path.isdir(path):  # Path.is_dir raises if the parent folder may not be read
        raise DataError(f"{path} is a folder; a file is needed.", hint="name one file in it.")


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
