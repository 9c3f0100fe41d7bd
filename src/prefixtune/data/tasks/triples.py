"""Sets of triples (subject, property, object), and the XML in which WebNLG, and DART's test set, are released.

    <benchmark><entries>
      <entry category="Airport" eid="Id1" size="1">
        <modifiedtripleset><mtriple>Aarhus | leaderName | Jacob_Bundsgaard</mtriple></modifiedtripleset>
        <lex comment="good" lid="Id1">The leader of Aarhus is Jacob Bundsgaard.</lex>
      </entry> ...

Such a file may not define anything: a document type, which could declare entities, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from prefixtune.data.files import Record, join_lines, one_line
from prefixtune.data.streams import read_text, shown
from prefixtune.errors import DataError, short_repr

__all__ = [
    "Language",
    "Triple",
    "check_triples",
    "commented_texts",
    "read_benchmark",
    "references_of",
    "split_triple",
]


Triple = tuple[str, str, str]
_SHAPE = 'write it as [["subject", "property", "object"], ...].'
_MAX_DEPTH = 64


def check_triples(value: Any, column: str, location: str) -> tuple[Triple, ...]:
    """A list of triples, each of three texts; outer white space is removed, and an inner line break becomes one space.

    A part may be empty, as DART's tables have empty cells.

    Raises:
        DataError: It is not such a list, or is empty.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{location}: {column!r} is {short_repr(value)}; a list of at least one triple is needed.", hint=_SHAPE
        )
    triples: list[Triple] = []
    for number, triple in enumerate(value, start=1):
        parts = triple if isinstance(triple, list | tuple) else ()
        if len(parts) != 3 or not all(isinstance(part, str) for part in parts):
            raise DataError(
                f"{location}: triple {number} of {column!r} is {short_repr(triple)}; three texts are needed.",
                hint=_SHAPE,
            )
        subject, relation, target = map(join_lines, parts)
        triples.append((subject, relation, target))
    return tuple(triples)


def split_triple(text: Any, location: str) -> list[str]:
    """The three parts of `subject | property | object`.

    >>> split_triple("Aarhus | leaderName | Jacob_Bundsgaard", "line 1")
    ['Aarhus', 'leaderName', 'Jacob_Bundsgaard']

    Raises:
        DataError: The text does not have three parts.
    """
    parts = [part.strip() for part in text.split(" | ")] if isinstance(text, str) else []
    if len(parts) != 3:
        raise DataError(
            f"{location}: triple {short_repr(text)} has {len(parts)} parts; three are needed.",
            hint="write it as subject | property | object.",
        )
    return parts


def references_of(record: Record) -> tuple[str, ...]:
    """The texts of the column `references`; none if there is no such column, as in data that is only for generation.

    Raises:
        DataError: It is not a list of at least one text.
    """
    if "references" not in record.values:
        return ()
    references = record.values["references"]
    if not isinstance(references, list) or not references:
        raise DataError(
            f"{record.location}: 'references' is {short_repr(references)}; a list of at least one string is needed.",
            hint='write "references": ["..."], or leave it out of every row.',
        )
    return tuple(one_line(reference, "references", record.location) for reference in references)


def commented_texts(value: Any, column: str, comment: str, location: str) -> list[tuple[str, str]]:
    """Pairs of (comment, text), from a list of objects or, as in some sets of the hub, from an object of lists.

    >>> commented_texts({"source": ["e2e"], "text": [" A pub. "]}, "annotations", "source", "row 1")
    [('e2e', 'A pub.')]

    Args:
        value: The column's value.
        column: Its name, for messages.
        comment: The key of the comment; that of the text is `text`.
        location: The location of its record, for messages.

    Raises:
        DataError: It has another shape.
    """
    items: Any = value
    if isinstance(value, dict):
        comments, texts = value.get(comment), value.get("text")
        items = None
        if isinstance(comments, list) and isinstance(texts, list) and len(comments) == len(texts):
            items = [{comment: one, "text": text} for one, text in zip(comments, texts, strict=True)]
    if not isinstance(items, list) or not items:
        raise DataError(
            f"{location}: {column!r} is {short_repr(value)}; a list of at least one object is needed.",
            hint=f'write it as [{{"{comment}": "...", "text": "..."}}, ...].',
        )
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in (comment, "text")):
            raise DataError(
                f"{location}: item {number} of {column!r} is {short_repr(item)}; "
                f"texts under {comment!r} and 'text' are needed.",
                hint="write both as text.",
            )
    return [(item[comment], join_lines(item["text"])) for item in items]


@dataclass
class Language:
    """The language of the texts so far; empty: none was named."""

    name: str = ""

    def check(self, name: str, location: str, mark: str) -> None:
        """Refuse a text in another language than those before it: as a reference it would be no other wording.

        Args:
            name: The language of the text; empty: unknown.
            location: The location of the text, for messages.
            mark: How the file marks texts of this language.

        Raises:
            DataError: It is another one.
        """
        if self.name and name not in ("", self.name):
            raise DataError(
                f"{location}: this text has the language {name!r}, but those before it {self.name!r}.",
                hint=f"keep the texts of one language, as by removing every {mark}.",
            )
        self.name = self.name or name


def read_benchmark(path: Path) -> list[Record]:
    """The entries of an XML file, in order.

    Returns:
        Records with the attributes of an entry (`category`, `eid`, ...), `triples`, and `lexicalizations`: a list of
        (comment, text) for each `lex`, the texts in one line.

    Raises:
        DataError: The file cannot be read, is not XML of this kind, declares a document type, or has texts in several
            languages; the message names the line.
    """
    reader = _Benchmark(shown(path))
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = lambda name, attributes: reader.start(parser.CurrentLineNumber, name, attributes)
    parser.EndElementHandler = lambda name: reader.end(name)
    parser.CharacterDataHandler = lambda text: reader.text(text)
    parser.StartDoctypeDeclHandler = lambda *_: reader.refuse_doctype(parser.CurrentLineNumber)
    try:
        parser.Parse(read_text(path), True)
    except expat.ExpatError as error:
        raise DataError(
            f"{reader.name}, line {error.lineno}, column {error.offset + 1}: not XML: {expat.ErrorString(error.code)}.",
            hint="copy or download the file again, or repair the line.",
        ) from error
    if not reader.records:
        raise DataError(
            f"{reader.name} has no entries; at least one <entry> is needed.", hint="check that it is a file of the set."
        )
    return reader.records


@dataclass
class _Benchmark:
    """What was read of one file so far."""

    name: str
    records: list[Record] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    comment: str = ""
    language: Language = field(default_factory=Language)
    pieces: list[str] = field(default_factory=list)

    def start(self, line: int, name: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        location = f"{self.name}, line {line}"
        if not self.open and name != "benchmark":
            raise DataError(
                f"{location}: the outermost element is <{name}>; <benchmark> is needed.", hint="check the file."
            )
        if len(self.open) == _MAX_DEPTH:
            raise DataError(f"{location}: elements are nested more than {_MAX_DEPTH} deep.", hint="check the file.")
        self.open.append(name)
        if name == "entry":
            self.records.append(Record(location, {**attributes, "triples": [], "lexicalizations": []}))
        elif name in ("lex", "mtriple"):
            if "entry" not in self.open:
                raise DataError(f"{location}: <{name}> is outside an <entry>.", hint="check the file.")
            self.comment, self.pieces = attributes.get("comment", ""), []
            if name == "lex":
                language = attributes.get("lang", "")
                self.language.check(language, location, f'<lex lang="{language}">')

    def text(self, text: str) -> None:
        """Characters within an element."""
        if self.open and self.open[-1] in ("lex", "mtriple"):
            self.pieces.append(text)

    def end(self, name: str) -> None:
        """An element ends."""
        self.open.pop()
        if name not in ("lex", "mtriple"):
            return
        record, text = self.records[-1], join_lines("".join(self.pieces))
        if name == "mtriple":
            record.values["triples"].append(split_triple(text, record.location))
        else:
            record.values["lexicalizations"].append((self.comment, text))

    def refuse_doctype(self, line: int) -> None:
        """A document type, in which entities could be declared."""
        raise DataError(
            f"{self.name}, line {line}: a document type (<!DOCTYPE ...>) is not allowed; a file of the set has none.",
            hint="remove it, with the entities that it declares.",
        )
