"""Tokens -> one tag per token, in the BIO scheme: `B-TYPE` begins a span, `I-TYPE` continues it, `O` is outside.

A row has two columns of lists of equal length, tokens and tags; CoNLL's files are read as such rows. A source is the
tokens with a space between, and its target the tags likewise, so a token may not contain white space. Each sentence is
an example of its own. `I-TYPE` may also begin a span (after `O` or another type), as in older files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefixtune.data.benchmark_rows import is_tag
from prefixtune.data.examples import Example
from prefixtune.data.files import Record, missing_column, wrong_value


def tagged(tokens: Sequence[str], tags: Sequence[str]) -> Example:
    """The example of one sentence.

    >>> example = tagged(["The", "Grey", "Wolf"], ["O", "B-TRAIN", "I-TRAIN"])
    >>> example.source, example.targets
    ('The Grey Wolf', ('O B-TRAIN I-TRAIN',))
    >>> example.fields["tags"]
    ('O', 'B-TRAIN', 'I-TRAIN')
    """
    return Example(" ".join(tokens), (" ".join(tags),), {"tokens": tuple(tokens), "tags": tuple(tags)})


def tagged_example(record: Record, source: str, target: str | None) -> Example:
    """The example of a row.

    Args:
        record: The row.
        source: Its column of tokens.
        target: Its column of tags; None: it has none.

    Raises:
        DataError: A column is missing or holds no list of these, or there are not as many tags as tokens.
    """
    tokens = _strings(record, source)
    for token in tokens:
        if token.split() != [token]:
            raise wrong_value(record.location, source, token, "a token without white space")
    if target is None:
        return Example(" ".join(tokens), (), {"tokens": tuple(tokens)})
    tags = _strings(record, target)
    for tag in tags:
        if not is_tag(tag):
            raise wrong_value(record.location, target, tag, "a tag of the BIO scheme (O, B-TYPE or I-TYPE)")
    if len(tokens) != len(tags):
        raise wrong_value(record.location, target, tags, f"a list of {len(tokens)} tags, one for each token,")
    return tagged(tokens, tags)


def _strings(record: Record, column: str) -> list[str]:
    if column not in record.values:
        raise missing_column(record.location, (column,), record.values)
    values: Any = record.values[column]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise wrong_value(record.location, column, values, "a list of at least one text")
    return values
