"""Tokens -> one tag per token, in the BIO scheme: `B-TYPE` begins a span, `I-TYPE` continues it, `O` is outside.

There are two kinds of file. JSON lines, one JSON list and Parquet have two columns of lists of equal length, `tokens`
and `tags`. Text files as of the CoNLL tasks have one token per line with its columns, separated by tabs, or by spaces
if the line has no tab; the token is the first column and the tag the last; a blank line ends a sentence. `-DOCSTART-`
lines are ignored, and so are comments: lines that start with `#`, unless they have the columns of a token line and end
with a tag.

A source is the tokens with a space between, and its target the tags likewise, so a token may not contain white space.
Each sentence is an example of its own. `I-TYPE` may also begin a span (after `O` or another type), as in older files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, iter_file, task_format
from prefixtune.data.streams import read_text, shown
from prefixtune.errors import ConfigError, DataError, did_you_mean, short_repr

_ROWS = (".jsonl", ".json", ".parquet")
"""Formats whose rows can hold lists."""
_CONLL = (".conll", ".bio", ".txt")
TAGGING_FORMATS = (*_ROWS, *_CONLL)
_TAG = re.compile(r"O|[BI]-\S+")
_BLANK = " \t\r"


def read_tagging(path: Path, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read `.jsonl`, `.json`, `.parquet`, or `.conll`, `.bio`, `.txt` (one token per line), each also `.gz`.

    Args:
        path: The file; `-`: standard input, of any of these; or a set of the `datasets` library.
        source: Of rows: name of the column of tokens; None: `tokens`.
        target: Of rows: name of the column of tags; None: `tags`.

    Returns:
        One example per sentence; `fields` is `{"tokens": ..., "tags": ...}`, two tuples of equal length.

    Raises:
        ConfigError: A column is named for a file that has none, or by a template.
        DataError: The file or one of its sentences is wrong; the message names file and line.
    """
    path = Path(path)
    if task_format(path, TAGGING_FORMATS, ".conll") not in _CONLL:
        names = ("tokens" if source is None else source, "tags" if target is None else target)
        return [tagged_example(record, *names) for record in iter_file(path, _ROWS)]
    if source is not None or target is not None:
        raise ConfigError(
            f"{shown(path)} has one token per line and no named columns.",
            hint="leave source and target out: the token is the first column, and the tag the last.",
        )
    return list(_from_lines(read_text(path), path))


def tagged(tokens: Sequence[str], tags: Sequence[str]) -> Example:
    """The example of one sentence.

    >>> example = tagged(["The", "Grey", "Wolf"], ["O", "B-TRAIN", "I-TRAIN"])
    >>> example.source, example.targets
    ('The Grey Wolf', ('O B-TRAIN I-TRAIN',))
    >>> example.fields["tags"]
    ('O', 'B-TRAIN', 'I-TRAIN')
    """
    return Example(" ".join(tokens), (" ".join(tags),), {"tokens": tuple(tokens), "tags": tuple(tags)})


def tag_names(examples: Iterable[Example]) -> tuple[str, ...]:
    """All tags of the types that a training set has: `O`, then for each type, sorted, `B-` and `I-`.

    Both tags of a type are listed even if only one occurs, so that a longer span elsewhere has no unknown tag.

    >>> tag_names([tagged(["Westport", "at", "six"], ["B-STATION", "O", "B-TIME"])])
    ('O', 'B-STATION', 'I-STATION', 'B-TIME', 'I-TIME')

    Raises:
        DataError: There is no span, or an example has no tags.
    """
    types = {tag[2:] for number, example in enumerate(examples, start=1) for tag in _tags(example, number)} - {""}
    if not types:
        raise DataError("there is no span: no tag but O; at least one span is needed.", hint="check the tag column.")
    return ("O", *(f"{position}-{name}" for name in sorted(types) for position in "BI"))


def check_tags(examples: Iterable[Example], tags: Sequence[str]) -> None:
    """Check that a development or test set has no tag that the training set lacks.

    Args:
        examples: The set to check.
        tags: The known tags, as `tag_names` gives them.

    Raises:
        DataError: A tag is unknown (the message names it, its example and the nearest known one), or an example has no
            tags.
    """
    for number, example in enumerate(examples, start=1):
        for tag in _tags(example, number):
            if tag not in tags:
                raise DataError(
                    f"tag {tag!r} of example {number} ({example.source[:60]!r}) is not one of the {len(tags)} known "
                    "tags.",
                    hint=did_you_mean(tag, tags),
                )


def _tags(example: Example, number: int) -> tuple[str, ...]:
    tags = example.fields.get("tags")
    if not isinstance(tags, tuple):
        raise DataError(
            f"example {number} ({example.source[:60]!r}) has no tags.", hint="read it with the task 'tagging'."
        )
    return tags


def tagged_example(record: Record, source: str, target: str) -> Example:
    """The example of a row: a column of tokens, and one of their tags.

    Raises:
        DataError: A column is missing or holds no such list, or there are not as many tags as tokens.
    """
    tokens, tags = (_strings(record, column) for column in (source, target))
    if len(tokens) != len(tags):
        raise DataError(
            f"{record.location}: {len(tokens)} tokens but {len(tags)} tags; their numbers must agree.",
            hint="give each token one tag.",
        )
    for token, tag in zip(tokens, tags, strict=True):
        _check_pair(token, tag, record.location)
    return tagged(tokens, tags)


def untagged_example(record: Record, source: str) -> Example:
    """The example of a row without tags: a column of tokens.

    Raises:
        DataError: The column is missing or holds no such list.
    """
    tokens = _strings(record, source)
    for token in tokens:
        _check_pair(token, "O", record.location)
    return Example(" ".join(tokens), (), {"tokens": tuple(tokens)})


def _strings(record: Record, column: str) -> list[str]:
    if column not in record.values:
        raise DataError(
            f"{record.location}: there is no column {column!r}; there are: {', '.join(record.values) or 'none'}.",
            hint="name the column of the tokens with source, and that of the tags with target.",
        )
    values: Any = record.values[column]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(
            f"{record.location}: {column!r} is {short_repr(values)}; a list of at least one text is needed.",
            hint=f'write "{column}": ["...", "..."], or drop the row.',
        )
    return values


def _from_lines(text: str, path: Path) -> Iterator[Example]:
    # Only "\n" ends a line, as in the other formats: a token may contain a character at which str.splitlines would
    # split.
    lines = [_cells(line) for line in text.split("\n")]
    plain = (cells for cells in lines if cells and not cells[0].startswith(("#", "-DOCSTART-")))
    width = len(next(plain, []))
    sentence: list[tuple[str, str]] = []
    num_sentences = 0
    for number, cells in enumerate([*lines, []], start=1):
        if not cells or cells[0].startswith("-DOCSTART-"):
            if sentence:
                num_sentences += 1
                yield tagged([token for token, _ in sentence], [tag for _, tag in sentence])
            sentence = []
        elif cells[0].startswith("#") and not (len(cells) == width and _TAG.fullmatch(cells[-1])):
            continue
        else:
            location = f"{shown(path)}, line {number}"
            if len(cells) < 2:
                raise DataError(
                    f"{location} is {cells[0]!r} alone; a token and a tag are needed.",
                    hint="separate the columns by tabs or by spaces; a blank line ends a sentence.",
                )
            _check_pair(cells[0], cells[-1], location)
            sentence.append((cells[0], cells[-1]))
    if not num_sentences:
        raise DataError(
            f"{shown(path)} has no sentences; at least one is needed.", hint="write one token and its tag per line."
        )


def _cells(line: str) -> list[str]:
    """The columns of a line; none if it is blank."""
    line = line.strip(_BLANK)
    if not line:
        return []
    return [cell.strip(_BLANK) for cell in line.split("\t")] if "\t" in line else re.split(" +", line)


def _check_pair(token: str, tag: str, location: str) -> None:
    if token.split() != [token]:
        raise DataError(
            f"{location}: token {token!r} is not a text without white space.",
            hint="split it into words with a tag each.",
        )
    if not _TAG.fullmatch(tag):
        raise DataError(
            f"{location}: tag {tag!r} of {token!r} is not in the BIO scheme.",
            hint="write O, B-TYPE or I-TYPE, as in B-STATION.",
        )
