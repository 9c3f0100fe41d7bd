"""Read a data file as records, with errors that name the file and the line.

Formats: `.jsonl` (one object per line), `.json` (one list of objects), `.csv` and `.tsv` (a header line; fields in `"`
if needed) and `.parquet`, each also gzipped (`.gz`); `-` is standard input, whose format is recognized. A `.json` file
is read as a whole, everything else row by row. Instead of a file, a set of the `datasets` library may be read (see
`hub`).
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from prefixtune.data.hub import dataset_rows, is_dataset, parquet_rows
from prefixtune.data.streams import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    check_exists,
    empty_file,
    first_bytes,
    is_stdin,
    open_bytes,
    reading,
    shown,
    text_lines,
    whole_text,
)
from prefixtune.errors import DataError, did_you_mean

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LocatedRow = tuple[str, dict[str, Any]]
"""A row's location, for messages, and its values by column."""
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
        DataError: The file cannot be read (see `streams.reading`), its ending is not allowed, it has no rows, or
            one of its rows is malformed; raised when the row is reached.
    """
    path = Path(path)
    if is_dataset(path):
        yield from itertools.starmap(Record, dataset_rows(path))
        return
    check_file(path)
    form = _stdin_format(formats) if is_stdin(path) else file_format(path, formats)
    with reading(path), open_bytes(path) as file:
        yield from iter_rows(file, shown(path), form)


def iter_rows(file: IO[bytes], name: str, form: str, max_bytes: int | None = None) -> Iterator[Record]:
    """As `iter_file`, of a file that is open.

    Args:
        file: Its bytes; of Parquet, to be read at any place.
        name: What messages call it.
        form: One of `FORMATS`, or empty: a table whose fields are separated by tabs, if its header has one, or commas.
        max_bytes: The most that is read of JSON and tables; None: any number of rows, and `MAX_FILE_BYTES` of a list.

    Raises:
        DataError: As for `iter_file`.
    """
    if form == ".parquet":
        rows = parquet_rows(file, name)
    elif form == ".json":
        rows = _json_list(whole_text(file, name, max_bytes or MAX_FILE_BYTES), name)
    elif form == ".jsonl":
        rows = json_lines(text_lines(file, name, max_bytes), name)
    else:
        rows = _table_rows(text_lines(file, name, max_bytes), name, {".csv": ",", ".tsv": "\t"}.get(form, ""))
    is_empty = True
    for location, values in rows:
        is_empty = False
        yield Record(location, values)
    if is_empty:
        raise DataError(f"{name} has no rows; at least one is needed.", hint="check that it is complete.")


def json_lines(lines: Iterable[str], name: str) -> Iterator[LocatedRow]:
    """The objects of JSON lines; blank ones are ignored.

    Raises:
        DataError: A line is not JSON, or no object.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            location = f"{name}, line {number}"
            yield location, _as_object(_parse_json(line.removesuffix("\n"), name, number), location)


def _json_list(text: str, name: str) -> Iterator[LocatedRow]:
    """The objects of one JSON list."""
    if not text.strip():
        raise empty_file(name)
    values = _parse_json(text, name, 1)
    if not isinstance(values, list):
        raise DataError(
            f"{name} holds a JSON {_json_type(values)}; a .json file must hold a list of objects.",
            hint="wrap it in [ ], or name a file with one object a line .jsonl.",
        )
    for number, value in enumerate(values, start=1):
        location = f"{name}, item {number}"
        yield location, _as_object(value, location)


def _parse_json(text: str, name: str, first_line: int) -> Any:
    """The value of a text that starts at this line of a file."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {first_line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}.",
            hint="a .jsonl file has one object a line, a .json file one list of objects.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}, line {first_line}: this JSON cannot be read: {error}.", hint="use plain strings and numbers."
        ) from error


def _as_object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{location} holds a JSON {_json_type(value)}; an object is needed.",
            hint='write rows as {"column": value, ...}.',
        )
    return value


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _table_rows(lines: Iterator[str], name: str, separator: str) -> Iterator[LocatedRow]:
    """The rows of a table with a header line; blank ones are ignored."""
    if not separator:
        first = next(lines, "")
        separator, lines = "\t" if "\t" in first else ",", itertools.chain([first], lines)
    # By default a field is shorter than a long document; the limit is the whole program's.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    columns: list[str] = []
    line = 0
    try:
        for cells in reader:
            location, line = f"{name}, line {line + 1}", reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                if len(set(columns)) < len(columns):
                    raise DataError(f"{location}: two columns have the same name.", hint="rename or drop one of them.")
            elif len(cells) != len(columns):
                raise DataError(
                    f"{location} has {len(cells)} fields; the header has {len(columns)}: {', '.join(columns)}.",
                    hint=f'put a field that contains the separator, {separator!r}, in quotes, "like this".',
                )
            elif separator == "\t" and any(_holds_rows(cell, n, len(columns) - 1) for n, cell in enumerate(cells)):
                raise DataError(
                    f"{location}: a field that starts with a quote goes on over several rows.",
                    hint='write a quote at the start of a field as """, or use JSON lines.',
                )
            else:
                yield location, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{name}, line {line + 1}: {error}.",
            hint='end a field that starts with " with "; double quotes inside it; use JSON lines for long texts.',
        ) from error


def _holds_rows(cell: str, index: int, last: int) -> bool:
    r"""Whether a cell looks like several rows between two quotes that are text; `last` is the last column's index.

    >>> _holds_rows("Wow\tgood\nFine\tgood\nBad", 0, 1), _holds_rows("two\nlines", 0, 1)
    (True, False)
    """
    tabs = [line.count("\t") for line in cell.split("\n")]
    # In a table of one column nothing tells a row from a line; a line that begins with a tab is indented.
    looks_so = last > 0 and len(tabs) > 1 and "\n\t" not in cell
    return looks_so and (tabs[0], tabs[-1]) == (last - index, index) and set(tabs[1:-1]) <= {last}


def _stdin_format(formats: Sequence[str]) -> str:
    """The format of standard input, by its first characters: `.jsonl`, `.json`, `.parquet`, or a table (empty).

    Raises:
        DataError: It is none of `formats`.
    """
    form = recognize_format(first_bytes(Path("-")))
    if (form or ".csv") not in formats:
        raise DataError(
            f"stdin holds {form or 'a table, or text'}; allowed: {', '.join(formats)}.",
            hint="save it as a file of one of these formats.",
        )
    return form


def recognize_format(start: bytes) -> str:
    """The format of a file by its first bytes: `.jsonl`, `.json`, `.parquet`, or a table or a text (empty).

    >>> recognize_format(b' {"text": "a"}'), recognize_format(b"["), recognize_format(b"text,label")
    ('.jsonl', '.json', '')
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"PAR1"):
        return ".parquet"
    if text.startswith((b"{", b"[")):
        return ".jsonl" if text.startswith(b"{") else ".json"
    return ""


def task_format(path: Path, formats: Sequence[str], own: str) -> str:
    """The format of a file by its ending, and of standard input by its beginning; empty: a set of the hub's library.

    Args:
        path: The file; `-`: standard input; or a set of the `datasets` library.
        formats: The endings that the task reads.
        own: The format of standard input that is neither JSON nor Parquet.

    Raises:
        DataError: It is a folder, cannot be read, or has another ending.
    """
    if is_dataset(path):
        return ""
    if is_stdin(path):
        return recognize_format(first_bytes(path)) or own
    check_file(path)
    return file_format(path, formats)


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
