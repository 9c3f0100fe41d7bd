"""Read a data file as rows, with errors that name the file and the line.

Formats: `.jsonl` (one object per line), `.json` (one list of objects), `.csv` and `.tsv` (a header line; fields in `"`
if needed) and `.parquet`, each also gzipped (`.gz`); of benchmarks also XML (WebNLG's). `-` is
standard input, whose format is recognized. A list and XML are read as a whole, everything else row by row.
Instead of a file, a set of the `datasets` library may be read (see `sets`).
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from pydantic_core import from_json

from prefixtune.data.sets import dataset_rows, is_dataset, parquet_rows
from prefixtune.data.streams import is_stdin, open_bytes, read_bytes, reading, shown, text_lines, whole_text
from prefixtune.errors import DataError, did_you_mean, short_repr

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_ROW_CHARS = 2**20
"""Most characters of text in a row: a text takes some 350 bytes of memory per token until it is cut."""
LocatedRow = tuple[str, dict[str, Any]]
"""A row's location, for messages, and its values by column."""
# A pattern such as `\s*\n\s*` needs time quadratic in the blanks of a text; this one matches a run of white space once.
_WRONG = "correct the row, or leave it out."
_WHITE_SPACE = re.compile(r"\s+")
MAX_XML_BYTES = 2**27
"""Most bytes of XML, which takes many times their memory."""
_TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes:
        location: Its place, for messages: `data.csv, line 3` (its first line), or `data.json, item 3` (from 1), or
            `set, row 3` in a set of the `datasets` library.
        values: Column -> value; text in CSV and TSV, any JSON value otherwise.

    Raises:
        DataError: It holds more than `MAX_ROW_CHARS` characters.
    """

    location: str
    values: dict[str, Any]

    def __post_init__(self) -> None:
        if _text_size(self.values) > MAX_ROW_CHARS:
            what = f"{self.location} holds more than {MAX_ROW_CHARS:,} characters, the most for one row."
            raise DataError(what, hint="divide it into several rows, or leave out columns that are not needed.")


def _text_size(value: Any) -> int:
    """The characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list | tuple) else 0


def file_format(path: Path, formats: Sequence[str] = FORMATS) -> str:
    """The format of a file by its name, without a final `.gz`.

    >>> file_format(Path("mine/train.CSV.gz"))
    '.csv'

    Raises:
        DataError: It is a folder, or its ending is none of `formats`, perhaps as there is no such file.
    """
    if os.path.isdir(path):  # Path.is_dir raises if the parent folder may not be read
        raise DataError(f"{path} is a folder; a file is needed.", hint="name one file in it.")
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending not in formats:
        with reading(path):
            os.stat(path)
        raise DataError(f"{path} does not end with {', '.join(formats)}.", hint=did_you_mean(ending, formats))
    return ending


def iter_file(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Record]:
    """The rows of a file, in order and one at a time; blank lines are ignored.

    Args:
        path: The file, whose ending names its format; `-`: standard input; or a set of the `datasets` library.
        formats: The allowed endings.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The file cannot be read (see `streams.reading`), its ending is not allowed, it has no rows, or
            one of its rows is malformed; raised when the row is reached.
    """
    path = Path(path)
    if is_dataset(path):
        yield from itertools.starmap(Record, dataset_rows(path))
        return
    form = _stdin_format(formats) if is_stdin(path) else file_format(path, formats)
    name, is_empty = shown(path), True
    with reading(path), open_bytes(path) as file:
        if form == ".parquet":
            rows = parquet_rows(file, name)
        elif form == ".json":
            rows = _json_list(whole_text(file, name), name)
        elif form == ".jsonl":
            rows = json_lines(text_lines(file, name), name)
        elif form == ".xml":
            rows = xml_rows(file, name)
        else:
            rows = _table_rows(text_lines(file, name), name, {".csv": ",", ".tsv": "\t"}.get(form, ""))
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
            yield location, _as_object(_parse_json(line, location), location)


def _json_list(text: str, name: str) -> Iterator[LocatedRow]:
    """The objects of one JSON list."""
    values = _parse_json(text or "[]", name)
    if not isinstance(values, list):
        raise wrong_value(name, "the file", values, "a list of objects")
    for number, value in enumerate(values, start=1):
        yield f"{name}, item {number}", _as_object(value, f"{name}, item {number}")


def _parse_json(text: str, location: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise DataError(f"{location}: not JSON: {error}.", hint="write one object a line, or a list.") from error


def _as_object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_value(location, "the row", value, "an object")
    return value


def _table_rows(lines: Iterator[str], name: str, separator: str) -> Iterator[LocatedRow]:
    """The rows of a table with a header line; blank ones are ignored. Without a separator: tabs, or else commas."""
    if not separator:
        first = next(lines, "")
        separator, lines = "\t" if "\t" in first else ",", itertools.chain([first], lines)
    line = 0
    # By default a field is shorter than a long document; the limit is the whole program's.
    csv.field_size_limit(2 * MAX_ROW_CHARS)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            location, line = f"{name}, line {line + 1}", reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                if len(set(columns)) < len(columns):
                    raise DataError(f"{location}: two columns have the same name.", hint="rename or drop one of them.")
                continue
            # In a table of tabs, quotes may be text, and what is between them several rows; a line that begins with a
            # tab is indented.
            holds_rows = separator == "\t" and any(
                "\t" in cell and "\n" in cell and "\n\t" not in cell for cell in cells
            )
            if len(cells) != len(columns) or holds_rows:
                what = f"{location} has {len(cells)} fields, or several rows in one; the header has {listed(columns)}."
                raise DataError(what, hint=f"put a field with {separator!r} in quotes, or use JSON lines.")
            yield location, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        hint = 'double a " within a field in quotes, and end lines with LF.'
        raise DataError(f"{name}, line {line + 1}: {error}.", hint=hint) from error


def is_tag(text: str) -> bool:
    """Whether a text is a tag of the BIO scheme.

    >>> is_tag("O"), is_tag("B-TRAIN"), is_tag("NN")
    (True, True, False)
    """
    return _TAG.fullmatch(text) is not None


def xml_rows(file: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry's location, and its values with the names of the hub's sets.

    These are its attributes, `input` (the triples as texts) and, if it has some, `lex`: objects of `text`, `comment`
    and `lang`.

    Raises:
        DataError: It is no XML, or too large.
    """
    try:
        parsed = ElementTree.iterparse(io.BytesIO(read_bytes(file, name, MAX_XML_BYTES)))
        for number, entry in enumerate((element for _, element in parsed if element.tag == "entry"), start=1):
            texts = [
                {
                    "text": "".join([lex.text or "", *(inner.tail or "" for inner in lex)]),
                    "comment": lex.get("comment", ""),
                    "lang": lex.get("lang", ""),
                }
                for lex in entry.iter("lex")
            ]
            triples = [triple.text or "" for triple in entry.iter("mtriple")]
            yield f"{name}, entry {number}", {**entry.attrib, "input": triples, **({"lex": texts} if texts else {})}
            entry.clear()
    except (ElementTree.ParseError, LookupError) as error:  # of an encoding that is not known: LookupError
        raise DataError(f"{name} is not XML: {error}.", hint="copy or download the file again.") from error


def _stdin_format(formats: Sequence[str]) -> str:
    """The format of standard input, by its first characters; empty: a table.

    Raises:
        DataError: It is none of `formats`.
    """
    path = Path("-")
    with reading(path), open_bytes(path) as file:
        form = recognize_format(file.read(2**12)) or ".csv"
    if form not in formats:
        raise DataError(f"stdin holds {form}; allowed: {', '.join(formats)}.", hint="convert it to one of these.")
    return "" if form == ".csv" else form


def recognize_format(start: bytes) -> str:
    """The format of a file by its first bytes: `.jsonl`, `.json`, `.parquet`, or a table or a text (empty).

    >>> recognize_format(b' {"text": "a"}'), recognize_format(b"["), recognize_format(b"text,label")
    ('.jsonl', '.json', '')
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"PAR1"):
        return ".parquet"
    return {b"{": ".jsonl", b"[": ".json"}.get(text[:1], "")


def listed(columns: Iterable[Any]) -> str:
    """Names of columns as messages list them, the first twelve.

    >>> listed(["text", "label"]), listed([])
    ('text, label', 'none')
    """
    return ", ".join(str(name)[:40] for name in itertools.islice(columns, 12)) or "none"


def wrong_value(location: str, column: str, value: Any, needed: str) -> DataError:
    """The error of a value in a row.

    Args:
        location: Of its row.
        column: Its column.
        value: What is there.
        needed: What should be, as in `a list of texts`.
    """
    return DataError(f"{location}: {short_repr(column)} is {short_repr(value)}; {needed} is needed.", hint=_WRONG)


def missing_column(location: str, columns: Iterable[str], values: Iterable[Any]) -> DataError:
    """The error of a row that has none of some columns."""
    what = f"{location}: there is no column {' or '.join(map(short_repr, columns))}; there are: {listed(values)}."
    return DataError(what, hint="rename the column, or name it, as with --source and --target.")


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
        raise wrong_value(location, column, value, "text")
    return text
