"""Opening a data file and cutting it into rows, with errors that name the file and the line.

Formats: `.jsonl` (one object a line), `.json` (one list of objects), `.csv` and `.tsv` (a header line; fields in `"`
where needed; the fields of a `.csv` may be separated by `;`, too, and a first line such as `sep=;` may say by what) and
`.parquet`, each also gzipped (`.gz`). Text is UTF-8, with or without a byte order mark, or UTF-16 with one. A file is
read whole. A set of the `datasets` library (see `hub`) may stand wherever a file of rows does.

Knows nothing of what a row means: no task, no column name, no template.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.data.hub import dataset_rows, is_dataset
from prefixtune.data.parquet import parquet_rows
from prefixtune.errors import DataError, did_you_mean

__all__ = ["FORMATS", "Row", "check_file", "file_format", "join_lines", "one_line", "read_rows", "read_text"]


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_GZIP_MAGIC = b"\x1f\x8b"
# A pattern such as `\s*\n\s*` takes time quadratic in the blanks of a text: runs of white space are found as a whole.
_WHITE_SPACE = re.compile(r"\s+")
_SEPARATORS = (",", ";")
_DECLARATION = re.compile(r'"?sep=([^\r\n"])"?[ \t]*(?:\r?\n|\r|$)', re.IGNORECASE)
_MOST_BYTES = 2**32
"""What is read of a file, unzipped."""
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
"""Byte order mark -> how the text after it is encoded; as of Windows' editors and spreadsheets."""


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        where: Where it stands, for messages: `data.csv, line 3` (its first line), or `data.json, item 3` (from 1), or
            `set, row 3` in a set of the `datasets` library.
        values: Column -> value; text in CSV and TSV, any JSON value otherwise.
    """

    where: str
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
        got = f"the ending {''.join(path.suffixes[-2:])!r}" if path.suffixes else "no ending"
        raise DataError(
            f"{path} has {got}; allowed: {', '.join(formats)}, each with or without .gz.",
            hint=did_you_mean(ending, formats) if ending else "rename the file so that its ending says what it holds.",
        )
    return ending


def read_text(path: Path) -> str:
    """The whole text of a file, unzipped where its name ends with `.gz`, without a byte order mark.

    Raises:
        DataError: The file is missing, a folder, unreadable, empty, too large, not the gzip that its name promises, or
            not UTF-8 (nor UTF-16 with a byte order mark).
    """
    data = _read_whole(path)
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    data, encoding = data[len(mark) :], _MARKS.get(mark, "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; "
            "only UTF-8 text is allowed.",
            hint="save it anew as UTF-8, or convert it from what it is, as in `iconv -f WINDOWS-1252 -t UTF-8`.",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: there is a NUL character, as in files that are damaged or no text.",
            hint="write the file anew, or remove it.",
        )
    if not text.strip():
        raise DataError(f"{path} is empty; at least one row is needed.", hint="check that it was written to the end.")
    return text


def read_rows(path: Path, formats: Sequence[str] = FORMATS) -> list[Row]:
    """All rows of a file, in order; blank lines are skipped.

    Args:
        path: The file; its ending says its format. Or a set of the `datasets` library.
        formats: The endings allowed, of `FORMATS`.

    Raises:
        ConfigError: The `datasets` library is needed, and not installed.
        DataError: The file cannot be read (see `read_text`), has another ending, or one of its rows is malformed.
    """
    path = Path(path)
    if is_dataset(path):
        return [Row(where, values) for where, values in dataset_rows(path)]
    check_file(path)
    form = file_format(path, formats)
    if form == ".parquet":
        found = parquet_rows(_read_whole(path), path, _MOST_BYTES)
        rows = [Row(f"{path}, row {number}", values) for number, values in enumerate(found, start=1)]
    elif form == ".jsonl":
        rows = list(_json_lines(read_text(path), path))
    elif form == ".json":
        rows = list(_json_list(read_text(path), path))
    else:
        text = read_text(path)
        separator, text = _separator(text, path, "\t" if form == ".tsv" else "")
        rows = list(_table(text, path, separator))
    if not rows:
        raise DataError(f"{path} has no rows; at least one is needed.", hint="check that it was written to the end.")
    return rows


def check_file(path: Path) -> None:
    """Refuse a folder, before anything is said of its ending.

    Raises:
        DataError: The path is a folder.
    """
    if os.path.isdir(path):  # Path.is_dir raises where the parent folder is closed to us
        raise _folder(path)


def join_lines(text: str) -> str:
    """A text without outer white space, and with one space for each inner line break."""
    return _WHITE_SPACE.sub(lambda run: " " if "\n" in run[0] or "\r" in run[0] else run[0], text.strip())


def one_line(value: Any, column: str, where: str) -> str:
    r"""A value that must be a text, as `join_lines` gives it.

    >>> one_line(" Two\n lines. ", "text", "a.csv, line 2")
    'Two lines.'

    Args:
        value: What is to be text.
        column: Its column, for messages.
        where: Its row, for messages.

    Raises:
        DataError: It is no string, or holds nothing but white space.
    """
    text = join_lines(value) if isinstance(value, str) else ""
    if not text:
        raise DataError(f"{where}: {column!r} holds {value!r}; text is needed.", hint="write it, or drop the row.")
    return text


def _folder(path: Path) -> DataError:
    return DataError(f"{path} is a folder; a file is needed.", hint="name one file in it.")


def _read_whole(path: Path) -> bytes:
    """A file's bytes, unzipped where its name ends with `.gz`."""
    data = _read_bytes(path)
    if path.suffix.lower() == ".gz":
        return _unzip(path, data)
    if data.startswith(_GZIP_MAGIC):
        raise DataError(f"{path} is gzipped, but its name does not end with .gz.", hint="add .gz to its name.")
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return _limited(file, path)
    except FileNotFoundError as error:
        near = [item.name for item in path.parent.glob("*")]
        hint = did_you_mean(path.name, near)
        if not hint.startswith("did you mean"):
            hint = "check the path; a relative one starts at the current folder."
        raise DataError(f"{path} does not exist.", hint=hint) from error
    except IsADirectoryError as error:
        raise _folder(path) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", hint="check its permissions.") from error


def _limited(file: io.BufferedIOBase, path: Path) -> bytes:
    """All that a file holds, as long as that is not too much."""
    pieces: list[bytes] = []
    size = 0
    while piece := file.read(2**20):
        pieces.append(piece)
        size += len(piece)
        if size > _MOST_BYTES:
            raise DataError(f"{path} holds more than {_MOST_BYTES:,} bytes.", hint="split the file.")
    return b"".join(pieces)


def _unzip(path: Path, data: bytes) -> bytes:
    if not data.startswith(_GZIP_MAGIC):
        raise DataError(
            f"{path} ends with .gz but is not a gzip file.", hint="drop .gz from its name, or compress it with `gzip`."
        )
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return _limited(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a broken gzip file: {error}.", hint="copy or download it again.") from error


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    # Only "\n" ends a line: JSON strings may hold other separators (U+2028) that str.splitlines would cut at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _as_object(_parse_json(line, path, number), where))


def _json_list(text: str, path: Path) -> Iterator[Row]:
    values = _parse_json(text, path, 1)
    if not isinstance(values, list):
        raise DataError(
            f"{path} holds a JSON {_json_type(values)}; a .json file must hold a list of objects.",
            hint="wrap it in [ ], or name a file with one object a line .jsonl.",
        )
    for number, value in enumerate(values, start=1):
        where = f"{path}, item {number}"
        yield Row(where, _as_object(value, where))


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    """The value of a text that starts at `first_line` of a file."""
    where = f"{path}, line {first_line}"
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            # Half of a surrogate pair is legal in JSON, but no text: no tokenizer takes it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}.",
            hint="look for a missing quote, comma or brace.",
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a surrogate pair (\\ud...) is not text.", hint="write the character."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: this JSON cannot be read: {error}.", hint="use plain strings and numbers."
        ) from error
    return value


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} holds a JSON {_json_type(value)}; an object is needed.",
            hint='write rows as {"column": value, ...}.',
        )
    return value


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _separator(text: str, path: Path, usual: str) -> tuple[str, str]:
    """What stands between the fields of a table, and the table.

    A first line `sep=;`, as Excel has it, says so, and is no row. Otherwise it is `usual`, where there is one; or a
    comma or a semicolon, which spreadsheets write where the comma is the decimal mark: the one that cuts the first row
    into as many fields as the header, or else the one that cuts the header into more. The comma if both do the same.
    """
    declared = _DECLARATION.match(text)
    if declared is not None:
        if declared[1] not in (*_SEPARATORS, "\t"):
            raise DataError(
                f"{path}, line 1 says that {declared[1]!r} separates the fields; only ',', ';' and a tab do.",
                hint="write the file anew with one of these.",
            )
        # An empty line in its place: the lines keep their numbers.
        return declared[1], "\n" + text[declared.end() :]
    if usual:
        return usual, text
    counts = {mark: _first_counts(text, mark) for mark in _SEPARATORS}
    return max(
        counts, key=lambda mark: (counts[mark][0] > 1, counts[mark][0] == counts[mark][1], counts[mark][0])
    ), text


def _first_counts(text: str, separator: str) -> tuple[int, int]:
    """How many fields a header and its first row have; 0 where there is none, or none that can be read."""
    counts = [0, 0]
    records = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    with contextlib.suppress(csv.Error):
        rows = (cells for cells in records if any(cell.strip() for cell in cells))
        for number, cells in enumerate(itertools.islice(rows, 2)):
            counts[number] = len(cells)
    return counts[0], counts[1]


def _table(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    lines = _table_lines(text, path, delimiter)
    number, header = next(lines, (1, [""]))
    columns = [name.strip() for name in header]
    for name, times in Counter(columns).items():
        if times > 1:
            raise DataError(
                f"{path}, line {number}: the header names the column {name!r} twice; names must differ.",
                hint="rename or drop one of the two.",
            )
    for number, cells in lines:
        if len(cells) != len(columns):
            raise DataError(
                f"{path}, line {number} has {len(cells)} fields; the header has {len(columns)}: {', '.join(columns)}.",
                hint=f'put a field that holds the delimiter, {delimiter!r}, in quotes, "like this".',
            )
        yield Row(f"{path}, line {number}", dict(zip(columns, cells, strict=True)))


def _table_lines(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: {error}.",
                hint='a field that starts with " must end with "; write a quote inside it twice; long texts fit JSONL.',
            ) from error
        if cells and any(cell.strip() for cell in cells):
            yield start, cells
