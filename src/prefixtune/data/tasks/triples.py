"""Sets of triples (subject, property, object), and the XML in which WebNLG, and DART's test set, are released.

    <benchmark><entries>
      <entry category="Airport" eid="Id1" size="1">
        <modifiedtripleset><mtriple>Aarhus | leaderName | Jacob_Bundsgaard</mtriple></modifiedtripleset>
        <lex comment="good" lid="Id1">The leader of Aarhus is Jacob Bundsgaard.</lex>
      </entry> ...

Texts become one line, without outer white space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prefixtune.data.files import Record, join_lines, one_line
from prefixtune.data.streams import open_bytes, reading, shown
from prefixtune.errors import DataError, short_repr

Triple = tuple[str, str, str]
_SHAPE = 'write it as [["subject", "property", "object"], ...].'


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
        DataError: The file cannot be read, is not XML of this kind, or has texts in several languages.
    """
    name, language, records = shown(path), Language(), list[Record]()
    try:
        with reading(path), open_bytes(path) as file:
            for _, element in ElementTree.iterparse(file):
                if element.tag == "entry":
                    records.append(_entry(element, f"{name}, entry {len(records) + 1}", language))
                    element.clear()
    except (ElementTree.ParseError, LookupError) as error:  # of an encoding that is not known: LookupError
        raise DataError(f"{name} is not XML: {error}.", hint="copy or download the file again.") from error
    if not records:
        raise DataError(
            f"{name} has no entries; at least one <entry> is needed.", hint="check that it is a file of the set."
        )
    return records


def _entry(element: ElementTree.Element, location: str, language: Language) -> Record:
    triples = [split_triple(join_lines(triple.text or ""), location) for triple in element.iter("mtriple")]
    texts = []
    for lex in element.iter("lex"):
        language.check(lex.get("lang", ""), location, f'<lex lang="{lex.get("lang")}">')
        text = "".join([lex.text or "", *(inner.tail or "" for inner in lex)])
        texts.append((lex.get("comment", ""), join_lines(text)))
    return Record(location, {**element.attrib, "triples": triples, "lexicalizations": texts})
