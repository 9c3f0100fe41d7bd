"""The text of a data file -> rows: JSON lines, a JSON list, CSV and TSV, with errors that name file and line.

JSON lines and tables are read from pieces of the text, and only the row that is read is in memory.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefixtune.data.streams import MAX_ROW_CHARS, empty_file, shown, text_lines
from prefixtune.errors import DataError

__all__ = ["LocatedRow", "check_names", "csv_rows", "json_lines", "json_list"]


LocatedRow = tuple[str, dict[str, Any]]
"""A row's location, for messages, and its values by column."""

_DECLARATION = re.compile(r'"?sep=([^\r\n"])"?[ \t]*(?:\r?\n|\r|$)', re.IGNORECASE)
_SAMPLE_CHARS = 2**22
"""The most that is read ahead to find what separates the fields."""


def json_lines(pieces: Iterable[str], path: Path) -> Iterator[LocatedRow]:
    """The objects of JSON lines."""
    name, is_empty = shown(path), True
    # Only "\n" ends a line: JSON strings may contain other separators (U+2028) at which str.splitlines would split.
    for number, line in enumerate(text_lines(pieces, name), start=1):
        if line.strip():
            is_empty = False
            location = f"{name}, line {number}"
            yield location, _as_object(_parse_json(line.removesuffix("\n"), name, number), location)
    if is_empty:
        raise empty_file(path)


def json_list(text: str, path: Path) -> Iterator[LocatedRow]:
    """The objects of one JSON list."""
    name = shown(path)
    try:
        values = _parse_json(text, name, 1)
    except DataError:
        if text.lstrip().startswith("{") and _is_json(text.lstrip().partition("\n")[0]):
            raise DataError(f"{name} has one object a line.", hint="name such a file .jsonl.") from None
        raise
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
    location = f"{name}, line {first_line}"
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            # An unpaired surrogate is legal in JSON, but not text: no tokenizer accepts it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {first_line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}.",
            hint="look for a missing quote, comma or brace.",
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: an unpaired surrogate (\\ud...) is not text.", hint="write the character."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: this JSON cannot be read: {error}.", hint="use plain strings and numbers."
        ) from error
    return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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


def csv_rows(pieces: Iterable[str], path: Path, separators: str = ",;") -> Iterator[LocatedRow]:
    """The rows of a table with a header line.

    Args:
        pieces: The table's text; a first line such as `sep=;` names the separator.
        path: The file, for messages.
        separators: What may separate fields otherwise; of several, the one that fits.
    """
    name = shown(path)
    separator, text = _find_separator(text_lines(pieces, name, universal=True), name, separators)
    lines = _csv_lines(text, name, separator)
    number, header = next(lines, (0, []))
    if not number:
        raise empty_file(path)
    columns = [column.strip() for column in header]
    check_names(columns, f"{name}, line {number}: the header")
    for number, cells in lines:
        if separator == "\t" and any(_holds_rows(cell, index, len(columns)) for index, cell in enumerate(cells)):
            raise DataError(
                f"{name}, line {number}: a field that starts with a quote goes on over several rows.",
                hint='write a quote at the start of a field as """, or use JSON lines.',
            )
        if len(cells) != len(columns):
            raise DataError(
                f"{name}, line {number} has {len(cells)} fields; the header has {len(columns)}: {', '.join(columns)}.",
                hint=f'put a field that contains the separator, {separator!r}, in quotes, "like this".',
            )
        yield f"{name}, line {number}", dict(zip(columns, cells, strict=True))


def check_names(columns: Iterable[str], what: str) -> None:
    """Refuse columns of one name.

    Args:
        columns: Of a table.
        what: What names them, for messages.

    Raises:
        DataError: Two have the same name.
    """
    for column, times in Counter(columns).items():
        if times > 1:
            raise DataError(
                f"{what} names the column {column!r} twice; names must differ.", hint="rename or drop one of the two."
            )


def _holds_rows(cell: str, index: int, num_columns: int) -> bool:
    r"""Whether a cell looks like several rows between two quotes that are text.

    >>> _holds_rows("Wow\tgood\nFine\tgood\nBad", 0, 2), _holds_rows("two\nlines", 0, 2)
    (True, False)
    >>> _holds_rows("Great\nneg\tBad\npos\tReally good.", 1, 2), _holds_rows("two\nlines", 1, 2)
    (True, False)
    """
    last = num_columns - 1
    # In a table of one column nothing tells a row from a line.
    if "\n" not in cell or not last:
        return False
    lines = cell.split("\n")
    if index == last and not all(line.partition("\t")[0].strip() for line in lines[1:]):
        # A line that begins with a tab is indented rather than a row.
        return False
    first_line, *between, last_line = (line.count("\t") for line in lines)
    return first_line == last - index and last_line == index and all(count == last for count in between)


def _find_separator(lines: Iterator[str], name: str, separators: str) -> tuple[str, Iterator[str]]:
    """The separator of a table's fields, and the table's lines.

    A first line such as `sep=;`, which Excel understands, names the separator and is not a row. Otherwise it is the
    only one of `separators`; or of several (spreadsheets write semicolons if the comma is the decimal mark) the one
    that splits the first row into as many fields as the header, then the one that splits the header into more fields,
    then the first.
    """
    first = next(lines, "")
    declared = _DECLARATION.match(first)
    if declared is not None:
        if declared[1] not in (",", ";", "\t"):
            raise DataError(
                f"{name}, line 1 says that {declared[1]!r} separates the fields; allowed: ',', ';' and a tab.",
                hint="save the file with one of these.",
            )
        # An empty line replaces it, so that the lines keep their numbers.
        return declared[1], itertools.chain(["\n"], lines)
    sample = [first]
    counts = {mark: _count_fields(_sampled(sample, lines), mark) for mark in separators} if separators[1:] else {}

    def preference(mark: str) -> tuple[bool, bool, int]:
        header, first_row = counts[mark]
        return header > 1, header == first_row, header

    return max(counts, key=preference, default=separators), itertools.chain(sample, lines)


def _sampled(sample: list[str], lines: Iterator[str]) -> Iterator[str]:
    """The first lines of a table: those of the sample, then others, which are added to it."""
    yield from sample
    size = sum(map(len, sample))
    while size < _SAMPLE_CHARS and (line := next(lines, "")):
        sample.append(line)
        size += len(line)
        yield line


def _count_fields(lines: Iterator[str], separator: str) -> tuple[int, int]:
    """How many fields the header and the first row have; 0 if there is none, or it cannot be read."""
    counts = [0, 0]
    with contextlib.suppress(DataError):
        for index, (_, cells) in enumerate(itertools.islice(_csv_lines(lines, "", separator), 2)):
            counts[index] = len(cells)
    return counts[0], counts[1]


def _csv_lines(lines: Iterator[str], name: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not blank, with the number of its first line."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        # The limit is the whole program's, and by default shorter than a long document.
        limit = csv.field_size_limit(MAX_ROW_CHARS)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}, line {start}: {error}.",
                hint='end a field that starts with " with "; double quotes inside it; use JSON lines for long texts.',
            ) from error
        finally:
            csv.field_size_limit(limit)
        if cells and any(cell.strip() for cell in cells):
            yield start, cells
