"""Rows of the files in which benchmarks are released: WebNLG's XML, and CoNLL's lines of tokens.

    <benchmark><entries>
      <entry category="Airport" eid="Id1" size="1">
        <modifiedtripleset><mtriple>Aarhus | leaderName | Jacob_Bundsgaard</mtriple></modifiedtripleset>
        <lex comment="good" lid="Id1">The leader of Aarhus is Jacob Bundsgaard.</lex>
      </entry> ...

A CoNLL file has one token per line with its columns, separated by tabs, or by spaces if the line has no tab; the token
is the first column and the tag the last; a blank line ends a sentence. `-DOCSTART-` lines are ignored, and so are
comments: lines that start with `#`, unless they have the columns of a token line and end with a tag.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import IO, Any
from xml.etree import ElementTree

from prefixtune.data.streams import read_bytes
from prefixtune.errors import DataError

MAX_XML_BYTES = 2**27
"""Most bytes of XML, which takes many times their memory."""
_TAG = re.compile(r"O|[BI]-\S+")
_BLANK = " \t\r"


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
    number = 0
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(read_bytes(file, name, MAX_XML_BYTES))):
            if element.tag == "entry":
                number += 1
                texts = [
                    {
                        "text": "".join([lex.text or "", *(inner.tail or "" for inner in lex)]),
                        "comment": lex.get("comment", ""),
                        "lang": lex.get("lang", ""),
                    }
                    for lex in element.iter("lex")
                ]
                triples = [triple.text or "" for triple in element.iter("mtriple")]
                yield (
                    f"{name}, entry {number}",
                    {**element.attrib, "input": triples, **({"lex": texts} if texts else {})},
                )
                element.clear()
    except (ElementTree.ParseError, LookupError) as error:  # of an encoding that is not known: LookupError
        raise DataError(f"{name} is not XML: {error}.", hint="copy or download the file again.") from error


def conll_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The location (of its first line), the `tokens` and the `tags` of each sentence.

    Raises:
        DataError: A line has no tag.
    """
    # Only "\n" ends a line, as in the other formats: a token may contain a character at which str.splitlines would
    # split.
    lines = [_cells(line) for line in text.split("\n")]
    plain = (cells for cells in lines if cells and not cells[0].startswith(("#", "-DOCSTART-")))
    width = len(next(plain, []))
    tokens: list[str] = []
    tags: list[str] = []
    first = 0
    for number, cells in enumerate([*lines, []], start=1):
        if not cells or cells[0].startswith("-DOCSTART-"):
            if tokens:
                yield f"{name}, line {first}", {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
        elif not cells[0].startswith("#") or (len(cells) == width and is_tag(cells[-1])):
            if len(cells) < 2:
                raise DataError(f"{name}, line {number} is one word.", hint="write a token and a tag on each line.")
            first = first if tokens else number
            tokens.append(cells[0])
            tags.append(cells[-1])


def _cells(line: str) -> list[str]:
    """The columns of a line; none if it is blank."""
    line = line.strip(_BLANK)
    if not line:
        return []
    return [cell.strip(_BLANK) for cell in line.split("\t")] if "\t" in line else re.split(" +", line)
