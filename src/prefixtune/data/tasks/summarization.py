"""A document -> its summary: tables of documents and summaries (XSUM, CNN/DailyMail), and SciTLDR.

Columns are named by templates as in `records`; without any, the ones that the well-known sets have are taken. SciTLDR
is read as released (SciTLDR-A: `source` is an abstract's sentences, `target` its summaries) and as JSON lines
`{"document", "references"}`.

Each row stays its own example, so that a set's published scores count them all. Documents and summaries become one
line, since generation for these tasks bans line breaks.

Knows nothing of tokenizers or training, nor of how many tokens of a document a model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.files import Row, join_lines, one_line, read_rows
from prefixtune.data.tasks.records import check_template, render, targets_of
from prefixtune.errors import DataError

__all__ = ["SCITLDR_FORMATS", "read_scitldr", "read_summaries", "read_xsum"]


SCITLDR_FORMATS = (".jsonl", ".json")


def read_summaries(path: Path, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read `.jsonl`, `.json` (a list), `.csv` or `.tsv`, each also `.gz`, or a set of the `datasets` library.

    Args:
        path: The file.
        source: Template of the document; None: the column `document`, or else `article`.
        target: Template of the summary, or the name of a column that holds a list of them; None: the column `summary`,
            or else `highlights`.

    Returns:
        One example a row; `fields` is the row.

    Raises:
        ConfigError: A template is malformed, or the `datasets` library is needed, and not installed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    return _read(path, source, target, ("document", "article"), ("summary", "highlights"))


def read_xsum(path: Path, source: str | None = None, target: str | None = None) -> list[Example]:
    """As `read_summaries`, with XSUM's columns only: `document` and `summary`, unless named."""
    return _read(path, source, target, ("document",), ("summary",))


def read_scitldr(path: Path) -> list[Example]:
    """Read SciTLDR-A (`.jsonl` or `.json`, each also `.gz`), or a set of the `datasets` library.

    Returns:
        One example a row, with each of its summaries; `fields` is the row.

    Raises:
        ConfigError: The `datasets` library is needed, and not installed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    examples = []
    for row in read_rows(path, SCITLDR_FORMATS):
        document, column = _column(row, ("document", "source"), "document")
        if isinstance(document, list):
            document = " ".join(one_line(sentence, column, row.where) for sentence in document)
        summaries, summary_column = _column(row, ("references", "target"), "summaries")
        if not isinstance(summaries, list) or not summaries:
            raise DataError(
                f"{row.where}: {summary_column!r} is {summaries!r}; a list of at least one text is needed.",
                hint=f'write "{summary_column}": ["..."].',
            )
        targets = tuple(one_line(summary, summary_column, row.where) for summary in summaries)
        examples.append(Example(one_line(document, column, row.where), targets, row.values))
    return examples


def _read(
    path: Path, source: str | None, target: str | None, documents: Sequence[str], summaries: Sequence[str]
) -> list[Example]:
    for template in (source, target):
        if template is not None:
            check_template(template)
    examples = []
    for row in read_rows(path):
        from_columns = _column(row, documents, "document", "source")[1] if source is None else source
        to_columns = _column(row, summaries, "summary", "target")[1] if target is None else target
        targets = tuple(join_lines(text) for text in targets_of(to_columns, row))
        examples.append(Example(join_lines(render(from_columns, row.values, row.where)), targets, row.values))
    return examples


def _column(row: Row, names: Sequence[str], what: str, option: str = "") -> tuple[Any, str]:
    """What the first of these columns that a row has holds, and its name."""
    for name in names:
        if name in row.values:
            return row.values[name], name
    raise DataError(
        f"{row.where}: there is no column {' or '.join(map(repr, names))} for the {what}; there are: "
        f"{', '.join(map(str, row.values)) or 'none'}.",
        hint=f"name the column with {option}." if option else "rename the column.",
    )
