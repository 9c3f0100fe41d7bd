"""A document -> its summary: tables of documents and summaries (XSUM, CNN/DailyMail), and SciTLDR.

Columns are named by templates as in `records`; without templates, those of the well-known sets are used. SciTLDR is
read as released (SciTLDR-A: `source` is an abstract's sentences, `target` its summaries) and as JSON lines
`{"document", "references"}`.

Each row is an example of its own, because a set's published scores count them all. Documents and summaries become one
line, because generation for these tasks bans line breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, iter_file, join_lines, one_line
from prefixtune.data.templates import check_template, render, targets_of
from prefixtune.errors import DataError

SCITLDR_FORMATS = (".jsonl", ".json")
DOCUMENT_COLUMNS, SUMMARY_COLUMNS = ("document", "article"), ("summary", "highlights")
"""Where no column is named: the first of these that is there."""


def read_summaries(path: Path, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read a file of documents and summaries (see `files.FORMATS`), or a set of the `datasets` library.

    Args:
        path: The file.
        source: Template of the document; None: the column `document` or `article`.
        target: Template of the summary, or the name of a column that holds a list of them; None: the column `summary`
            or `highlights`.

    Returns:
        One example per row; `fields` is the row.

    Raises:
        ConfigError: A template is malformed, or the `datasets` library is needed and not installed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    for template in (source, target):
        if template is not None:
            check_template(template)
    return [summary_example(record, source, target) for record in iter_file(path)]


def read_scitldr(path: Path) -> list[Example]:
    """Read SciTLDR-A (`.jsonl` or `.json`, each also `.gz`), or a set of the `datasets` library.

    Returns:
        One example per row, with all of its summaries; `fields` is the row.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    examples = []
    for record in iter_file(path, SCITLDR_FORMATS):
        document, column = _column(record, ("document", "source"), "document")
        if isinstance(document, list):
            document = " ".join(one_line(sentence, column, record.location) for sentence in document)
        summaries, summary_column = _column(record, ("references", "target"), "summaries")
        if not isinstance(summaries, list) or not summaries:
            raise DataError(
                f"{record.location}: {summary_column!r} is {summaries!r}; a list of at least one text is needed.",
                hint=f'write "{summary_column}": ["..."].',
            )
        targets = tuple(one_line(summary, summary_column, record.location) for summary in summaries)
        examples.append(Example(one_line(document, column, record.location), targets, record.values))
    return examples


def summary_example(
    record: Record,
    source: str | None = None,
    target: str | None = None,
    *,
    needs_target: bool = True,
) -> Example:
    """The example of a row: a document and its summaries, each in one line.

    Args:
        record: The row.
        source: Template of the document; None: the first of `DOCUMENT_COLUMNS` that is there.
        target: Template of the summary; None: the first of `SUMMARY_COLUMNS` that is there.
        needs_target: A row without a summary is refused.

    Raises:
        DataError: A column is missing or has no text.
    """
    from_columns = _column(record, DOCUMENT_COLUMNS, "document", "source")[1] if source is None else source
    if not needs_target and all(record.values.get(name) is None for name in SUMMARY_COLUMNS):
        return Example(join_lines(render(from_columns, record.values, record.location)), (), record.values)
    to_columns = _column(record, SUMMARY_COLUMNS, "summary", "target")[1] if target is None else target
    targets = tuple(join_lines(text) for text in targets_of(to_columns, record))
    return Example(join_lines(render(from_columns, record.values, record.location)), targets, record.values)


def _column(record: Record, names: Sequence[str], what: str, option: str = "") -> tuple[Any, str]:
    """The value of the first of these columns that a record has, and the column's name."""
    for name in names:
        if name in record.values:
            return record.values[name], name
    raise DataError(
        f"{record.location}: there is no column {' or '.join(map(repr, names))} for the {what}; there are: "
        f"{', '.join(map(str, record.values)) or 'none'}.",
        hint=f"name the column with {option}." if option else "rename the column.",
    )
