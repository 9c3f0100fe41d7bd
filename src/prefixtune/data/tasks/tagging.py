"""Tokens -> one tag a token, in the BIO scheme: `B-TYPE` begins a span, `I-TYPE` goes on with it, `O` is outside.

Two kinds of file. JSON lines (or one JSON list) with two columns of lists of equal length, `tokens` and `tags`. And
text as for the CoNLL tasks: one token a line with its columns, which tabs separate, or spaces where a line has no tab;
the token is the first column and the tag the last; a blank line ends a sentence. `-DOCSTART-` lines are skipped, and
comments: lines that start with `#`, unless they have the columns of a token line and end with a tag.

A source is the tokens with a space between, and the target likewise the tags, so no token may hold white space. Each
sentence stays its own example. `I-TYPE` may also begin a span (after `O` or another type), as in older files.

Knows nothing of models, nor of how a tokenizer cuts a token into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.files import Row, check_file, file_format, read_rows, read_text
from prefixtune.data.hub import is_dataset
from prefixtune.errors import ConfigError, DataError, did_you_mean

__all__ = ["TAGGING_FORMATS", "check_tags", "read_tagging", "tag_names", "tagged"]


_JSON = (".jsonl", ".json")
_CONLL = (".conll", ".bio", ".txt")
TAGGING_FORMATS = (*_JSON, *_CONLL)
_TAG = re.compile(r"O|[BI]-\S+")
_BLANK = " \t\r"
_SHAPE = "write O, B-TYPE or I-TYPE, as in B-STATION."


def read_tagging(path: Path, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read `.jsonl`, `.json`, or `.conll`, `.bio`, `.txt` (one token a line), each also `.gz`.

    Args:
        path: The file.
        source: JSON: name of the column of tokens; None: `tokens`.
        target: JSON: name of the column of tags; None: `tags`.

    Returns:
        One example a sentence; `fields` is `{"tokens": ..., "tags": ...}`, two tuples of equal length.

    Raises:
        ConfigError: A column is named for a file that has none, or by a template.
        DataError: The file or one of its sentences is wrong; the message names file and line.
    """
    path = Path(path)
    if not is_dataset(path):
        check_file(path)
    if is_dataset(path) or file_format(path, TAGGING_FORMATS) in _JSON:
        names = ("tokens" if source is None else source, "tags" if target is None else target)
        for name in names:
            if not name.strip() or "{" in name or "}" in name:
                raise ConfigError(
                    f"tagging: {name!r} is no column's name; a column that holds a list is needed.",
                    hint="name one column, without braces.",
                )
        return [_from_row(row, *names) for row in read_rows(path, _JSON)]
    for option, given in (("source", source), ("target", target)):
        if given is not None:
            raise ConfigError(
                f"{path} has a token a line and no named columns, but {option} is {given!r}.",
                hint=f"leave {option} out: the token is the first column, and the tag the last.",
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

    Both tags of a type are there even where only one occurs, so that a longer span elsewhere is no unknown tag.

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
                    f"tag {tag!r} of example {number} ({example.source[:60]!r}) is none of the {len(tags)} known tags.",
                    hint=did_you_mean(tag, tags),
                )


def _tags(example: Example, number: int) -> tuple[str, ...]:
    tags = example.fields.get("tags")
    if not isinstance(tags, tuple):
        raise DataError(
            f"example {number} ({example.source[:60]!r}) has no tags.", hint="read it with the task 'tagging'."
        )
    return tags


def _from_row(row: Row, source: str, target: str) -> Example:
    tokens, tags = (_strings(row, column) for column in (source, target))
    if len(tokens) != len(tags):
        raise DataError(
            f"{row.where}: {len(tokens)} tokens but {len(tags)} tags; their numbers must agree.",
            hint="give each token one tag.",
        )
    for token, tag in zip(tokens, tags, strict=True):
        _check_pair(token, tag, row.where)
    return tagged(tokens, tags)


def _strings(row: Row, column: str) -> list[str]:
    if column not in row.values:
        raise DataError(
            f"{row.where}: there is no column {column!r}; there are: {', '.join(row.values) or 'none'}.",
            hint="name the column of the tokens with source, and that of the tags with target.",
        )
    values: Any = row.values[column]
    if not isinstance(values, list) or not values:
        raise DataError(
            f"{row.where}: {column!r} is {_short(values)}; a list of at least one string is needed.",
            hint=f'write "{column}": ["...", "..."], or drop the row.',
        )
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise DataError(
                f"{row.where}: item {number} of {column!r} is {_short(value)}; a string is needed.",
                hint="write numbers as text, and numbered tags by their names.",
            )
    return values


def _from_lines(text: str, path: Path) -> Iterator[Example]:
    # Only "\n" ends a line, as in the other formats: a token may hold a character that str.splitlines would cut at.
    lines = [_cells(line) for line in text.split("\n")]
    plain = (cells for cells in lines if cells and not cells[0].startswith(("#", "-DOCSTART-")))
    width = len(next(plain, []))
    sentence: list[tuple[str, str]] = []
    num_targets = 0
    for number, cells in enumerate([*lines, []], start=1):
        if not cells or cells[0].startswith("-DOCSTART-"):
            if sentence:
                num_targets += 1
                yield tagged([token for token, _ in sentence], [tag for _, tag in sentence])
            sentence = []
        elif cells[0].startswith("#") and not (len(cells) == width and _TAG.fullmatch(cells[-1])):
            continue
        else:
            where = f"{path}, line {number}"
            if len(cells) < 2:
                raise DataError(
                    f"{where} is {cells[0]!r} alone; a token and a tag are needed.",
                    hint="separate the columns by tabs or by spaces; a blank line ends a sentence.",
                )
            _check_pair(cells[0], cells[-1], where)
            sentence.append((cells[0], cells[-1]))
    if not num_targets:
        raise DataError(f"{path} has no sentences; at least one is needed.", hint="write one token and its tag a line.")


def _cells(line: str) -> list[str]:
    """The columns of a line; none where it is blank."""
    line = line.strip(_BLANK)
    if not line:
        return []
    return [cell.strip(_BLANK) for cell in line.split("\t")] if "\t" in line else re.split(" +", line)


def _check_pair(token: str, tag: str, where: str) -> None:
    if token.split() != [token]:
        fault, hint = "is empty", "write it, or drop it and its tag."
        if token.strip():
            fault, hint = (
                "holds white space",
                "cut it up, each token with a tag; separate columns by tabs or by spaces.",
            )
        raise DataError(f"{where}: token {token!r} {fault}; a token is a text without white space.", hint=hint)
    if not _TAG.fullmatch(tag):
        hint = _SHAPE
        if re.fullmatch(r"[ESLU]-\S+", tag):
            hint = "this is the BIOES scheme: write E- (or L-) as I-, and S- (or U-) as B-."
        raise DataError(f"{where}: tag {tag!r} of {token!r} is none of the BIO scheme.", hint=hint)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
