"""DART (Nan et al. 2021): triples from tables, WebNLG and E2E -> a text.

Reads the release's JSON (a list of `{"tripleset", "annotations": [{"source", "text"}]}`) and XML, JSON lines
`{"triples", "references", "sources"}`, and the hub's sets, whose columns are those of the release's JSON, or, in GEM's,
`tripleset`, `target` and `references`.

A text that is empty is dropped (the release has one), and so is an entry left without any. Each entry stays its own
example, though many have equal triples: the official scores count them all. The references that the official scorer
uses, where a row has them (`official_references_3`), are in the field `official_references`.

Knows nothing of tokenizers or training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from prefixtune.data.examples import Example
from prefixtune.data.files import Row, file_format, read_rows
from prefixtune.data.hub import is_dataset
from prefixtune.data.tasks.triples import Triple, check_triples, commented_texts, read_benchmark, references_of
from prefixtune.errors import DataError

__all__ = ["DART_FORMATS", "dart_entries", "linearize", "read_dart"]


DART_FORMATS = (".json", ".jsonl", ".xml")


def linearize(triples: Iterable[Triple]) -> str:
    """Triples as the model reads them (the authors' linearization: relations in lower case).

    >>> linearize([("Mars Hill College", "JOINED", "1973"), ("Mars Hill College", "LOCATION", "Mars Hill")])
    'Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill'
    """
    return " | ".join(f"{subject} : {relation.lower()} : {target}" for subject, relation, target in triples)


def read_dart(path: Path) -> list[Example]:
    """Read a DART file (`.json`, `.jsonl` or `.xml`, each also `.gz`), or a set of the `datasets` library.

    Returns:
        One example for each entry; `fields` is the entry, with `triples` and, where given, `official_references`; no
        targets where the file has no texts at all. Groups: `triples` (their number), and `source`, where all texts of
        the entry come from one.

    Raises:
        ConfigError: The `datasets` library is needed, and not installed.
        DataError: The file or one of its entries is wrong; the message names file and line.
    """
    examples = [example for example in dart_entries(path) if example is not None]
    if not examples:
        raise DataError(f"{path} has no text: all are empty.", hint="check that it was written to the end.")
    return examples


def dart_entries(path: Path) -> list[Example | None]:
    """Every entry, as `read_dart` reads it; None for those that it leaves out, as they have empty texts alone."""
    path = Path(path)
    if not is_dataset(path) and file_format(path, DART_FORMATS) == ".xml":
        rows = [_with_texts(row, row.values.pop("lexicalizations")) for row in read_benchmark(path)]
    else:
        rows = [_from_release(row) for row in read_rows(path, DART_FORMATS)]
    return [None if row is None else _example(row) for row in rows]


def _example(row: Row) -> Example:
    values = row.values
    if "triples" not in values:
        raise DataError(
            f"{row.where}: there is no column 'triples' or 'tripleset'; there are: "
            f"{', '.join(map(str, values)) or 'none'}.",
            hint='write rows as {"triples": [["s", "r", "o"]], "references": ["..."]}.',
        )
    triples = check_triples(values["triples"], "triples", row.where)
    groups = {"triples": str(len(triples))}
    sources = set(_texts(row, "sources"))
    if len(sources) == 1:
        groups["source"] = sources.pop()
    if "official_references_3" in values:
        values = {name: value for name, value in values.items() if name != "official_references_3"}
        values["official_references"] = _texts(row, "official_references_3")
    return Example(linearize(triples), references_of(row), values, groups)


def _texts(row: Row, column: str) -> tuple[str, ...]:
    """A column that may be absent, or hold texts, which may be empty."""
    values = row.values.get(column, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(
            f"{row.where}: {column!r} is {values!r}; a list of texts is needed.", hint="write it, or drop it."
        )
    return tuple(values)


def _with_texts(row: Row, texts: Sequence[tuple[str, str]]) -> Row | None:
    """A row with its (source, text) pairs, but for empty texts; None where all of them are empty."""
    kept = [(source, text) for source, text in texts if text]
    if not kept:
        return None if texts else row
    values = {"references": [text for _, text in kept], "sources": [source for source, _ in kept if source]}
    return Row(row.where, {**row.values, **values})


def _from_release(row: Row) -> Row | None:
    """A row under the names of the JSON lines, where it has those of the release or of the hub's sets."""
    values = row.values
    if "tripleset" not in values:
        return row
    rest = {name: value for name, value in values.items() if name not in ("tripleset", "annotations")}
    renamed = {**rest, "triples": values["tripleset"]}
    if "annotations" in values:
        texts = commented_texts(values["annotations"], "annotations", "source", row.where)
        return _with_texts(Row(row.where, renamed), texts)
    # GEM's training rows have an empty list of references beside their one target.
    if "target" in values:
        renamed["references"] = values.get("references") or [values["target"]]
    return Row(row.where, {**renamed, "sources": values.get("target_sources", [])})
