"""The text of a data file -> rows: JSON lines, a JSON list, CSV and TSV, with errors that name file and line."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixtune.errors import DataError

__all__ = ["csv_rows", "json_lines", "json_list"]


LocatedRow = tuple[str, dict[str, Any]]
"""A row's location, for messages, and its values by column."""

_SEPARATORS = (",", ";")
_DECLARATION = re.compile(r'"?sep=([^\r\n"])"?[ \t]*(?:\r?\n|\r|$)', re.IGNORECASE)


def json_lines(text: str, path: Path) -> Iterator[LocatedRow]:
    """The objects of JSON lines."""
    # Only "\n" ends a line: JSON strings may contain other separators (U+2028) at which str.splitlines would split.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            location = f"{path}, line {number}"
            yield location, _as_object(_parse_json(line, path, number), location)


def json_list(text: str, path: Path) -> Iterator[LocatedRow]:
    """The objects of one JSON list."""
    values = _parse_json(text, path, 1)
    if not isinstance(values, list):
        raise DataError(
            f"{path} holds a JSON {_json_type(values)}; a .json file must hold a list of objects.",
            hint="wrap it in [ ], or name a file with one object a line .jsonl.",
        )
    for number, value in enumerate(values, start=1):
        location = f"{path}, item {number}"
        yield location, _as_object(value, location)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    """The value of a text that starts at this line of a file."""
    location = f"{path}, line {first_line}"
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            # An unpaired surrogate is legal in JSON, but not text: no tokenizer accepts it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}.",
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


def csv_rows(text: str, path: Path, default_separator: str = "") -> Iterator[LocatedRow]:
    """The rows of a table with a header line.

    Args:
        text: The table; a first line such as `sep=;` names the separator.
        path: The file, for messages.
        default_separator: What separates fields otherwise; empty: a comma or a semicolon, whichever fits.
    """
    separator, text = _find_separator(text, path, default_separator)
    lines = _csv_lines(text, path, separator)
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
                hint=f'put a field that contains the separator, {separator!r}, in quotes, "like this".',
            )
        yield f"{path}, line {number}", dict(zip(columns, cells, strict=True))


def _find_separator(text: str, path: Path, default: str) -> tuple[str, str]:
    """The separator of a table's fields, and the table.

    A first line such as `sep=;`, which Excel understands, names the separator and is not a row. Otherwise it is
    `default`, if there is one; or else a comma or a semicolon (spreadsheets write semicolons if the comma is the
    decimal mark): the one that splits the first row into as many fields as the header, then the one that splits the
    header into more fields, then the comma.
    """
    declared = _DECLARATION.match(text)
    if declared is not None:
        if declared[1] not in (*_SEPARATORS, "\t"):
            raise DataError(
                f"{path}, line 1 says that {declared[1]!r} separates the fields; allowed: ',', ';' and a tab.",
                hint="save the file with one of these.",
            )
        # An empty line replaces it, so that the lines keep their numbers.
        return declared[1], "\n" + text[declared.end() :]
    if default:
        return default, text
    counts = {mark: _count_fields(text, mark) for mark in _SEPARATORS}

    def preference(mark: str) -> tuple[bool, bool, int]:
        header, first_row = counts[mark]
        return header > 1, header == first_row, header

    return max(counts, key=preference), text


def _count_fields(text: str, separator: str) -> tuple[int, int]:
    """How many fields the header and the first row have; 0 if there is none, or it cannot be read."""
    counts = [0, 0]
    records = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    with contextlib.suppress(csv.Error):
        rows = (cells for cells in records if any(cell.strip() for cell in cells))
        for index, cells in enumerate(itertools.islice(rows, 2)):
            counts[index] = len(cells)
    return counts[0], counts[1]


def _csv_lines(text: str, path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not blank, with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: {error}.",
                hint='end a field that starts with " with "; double quotes inside it; use JSON lines for long texts.',
            ) from error
        if cells and any(cell.strip() for cell in cells):
            yield start, cells
