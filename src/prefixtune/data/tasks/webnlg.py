"""WebNLG challenge 2017 (Gardent et al.): one to seven triples about a thing -> a text.

Reads the release's XML (a file, or a folder of files such as `train/`), JSON lines `{"category", "triples",
"references"}`, and the hub's sets (`modified_triple_sets` with `lex`, or `input` with `target` and `references`).

Of the texts, only those whose comment is `good` (or that have none) are kept, as the authors of prefix-tuning do; an
entry that has texts, but no good one, is left out. Each entry stays its own example: a set's published scores count
them all, and equal triples occur in several categories.

Knows nothing of tokenizers or training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.files import Row, file_format, read_rows
from prefixtune.data.hub import is_dataset
from prefixtune.data.tasks.triples import (
    Triple,
    check_triples,
    commented_texts,
    read_benchmark,
    references_of,
    split_triple,
)
from prefixtune.errors import DataError

__all__ = ["SEEN_CATEGORIES", "WEBNLG_FORMATS", "linearize", "read_webnlg", "webnlg_entries"]


WEBNLG_FORMATS = (".xml", ".jsonl")

#: The categories of the training set; those of the test set that are none of these are unseen.
SEEN_CATEGORIES = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam"),
    *("University", "WrittenWork"),
)


def linearize(triples: Iterable[Triple]) -> str:
    """Triples as the model reads them (the authors' linearization, with its leading bar).

    >>> linearize([("Aarhus", "leaderName", "Jacob_Bundsgaard"), ("Aarhus", "country", "Denmark")])
    ' | Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return "".join(f" | {subject} : {relation} : {target}" for subject, relation, target in triples)


def read_webnlg(path: Path) -> list[Example]:
    """Read a WebNLG file (`.xml` or `.jsonl`, each also `.gz`), a folder of XML files, or a set of `datasets`.

    Returns:
        One example for each entry with a good text; `fields` is the entry, with `triples`; no targets where the file
        has no texts at all. Groups: `triples` (their number), `category`, and, where a file has unseen categories,
        `seen`: `seen` or `unseen`.

    Raises:
        ConfigError: The `datasets` library is needed, and not installed.
        DataError: The file or one of its entries is wrong; the message names file and line.
    """
    kept = [example for example in webnlg_entries(path) if example is not None]
    if not kept:
        raise DataError(f"{path} has no text whose comment is 'good'.", hint="check the comments of its texts.")
    return kept


def webnlg_entries(path: Path) -> list[Example | None]:
    """Every entry, as `read_webnlg` reads it; None for those that it leaves out."""
    path = Path(path)
    if path.is_dir() and not is_dataset(path):
        rows = [row for file in _xml_files(path) for row in _from_xml(file)]
    elif is_dataset(path) or file_format(path, WEBNLG_FORMATS) == ".jsonl":
        rows = [_from_hub(row) for row in read_rows(path, WEBNLG_FORMATS)]
    else:
        rows = _from_xml(path)
    has_unseen = any(row.values.get("category", SEEN_CATEGORIES[0]) not in SEEN_CATEGORIES for row in rows)
    examples = [(_example(row, has_unseen), "references" in row.values) for row in rows]
    return [example if example.targets or not has_texts else None for example, has_texts in examples]


def _example(row: Row, tell_seen: bool) -> Example:
    values = row.values
    if "triples" not in values:
        raise DataError(
            f"{row.where}: there is no column 'triples'; there are: {', '.join(map(str, values)) or 'none'}.",
            hint='write rows as {"category": "...", "triples": [["s", "p", "o"]], "references": ["..."]}.',
        )
    triples = check_triples(values["triples"], "triples", row.where)
    groups = {"triples": str(len(triples))}
    category = values.get("category")
    if category is not None:
        if not isinstance(category, str) or not category.strip():
            raise DataError(f"{row.where}: 'category' is {category!r}; text is needed.", hint="write it, or drop it.")
        groups["category"] = category
    seen = values.get("seen", category in SEEN_CATEGORIES if tell_seen and category is not None else None)
    if seen is not None:
        if not isinstance(seen, bool):
            raise DataError(f"{row.where}: 'seen' is {seen!r}; true or false is needed.", hint="write it, or drop it.")
        groups["seen"] = "seen" if seen else "unseen"
        values = {**values, "seen": seen}
    texts = references_of(row)
    comments = _comments(row, len(texts))
    good = tuple(text for text, comment in zip(texts, comments, strict=True) if comment in ("good", ""))
    return Example(linearize(triples), good, values, groups)


def _comments(row: Row, count: int) -> Sequence[str]:
    """The comment of each text; all good where a row has none."""
    comments = row.values.get("comments", ["good"] * count)
    if not isinstance(comments, list) or len(comments) != count or not all(isinstance(one, str) for one in comments):
        raise DataError(
            f"{row.where}: 'comments' is {comments!r}; one text for each of the {count} references is needed.",
            hint="write a comment for each, or leave comments out where all are good.",
        )
    return comments


def _xml_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.name.lower().endswith((".xml", ".xml.gz")))
    if not files:
        raise DataError(f"{folder} is a folder without .xml files.", hint="name a file, or a folder of the release.")
    return files


def _from_xml(path: Path) -> list[Row]:
    return [_with_texts(row, row.values.pop("lexicalizations")) for row in read_benchmark(path)]


def _with_texts(row: Row, texts: Iterable[tuple[str, str]]) -> Row:
    """A row with its texts, but for empty ones."""
    kept = [(comment, text) for comment, text in texts if text]
    if not kept:
        return row
    return Row(row.where, {**row.values, "references": [text for _, text in kept], "comments": [c for c, _ in kept]})


def _from_hub(row: Row) -> Row:
    """A row under the names of the JSON lines, where it has those of the hub's sets."""
    values = row.values
    if "modified_triple_sets" in values and "lex" in values:
        rest = {name: value for name, value in values.items() if name not in ("modified_triple_sets", "lex")}
        triples = _split(_first_set(values["modified_triple_sets"]), "modified_triple_sets", row.where)
        texts = commented_texts(values["lex"], "lex", "comment", row.where)
        return _with_texts(Row(row.where, {**rest, "triples": triples}), texts)
    if "input" in values and "triples" not in values:
        # GEM's training rows have an empty list of references beside their one target.
        renamed = {**values, "triples": _split(values["input"], "input", row.where)}
        if "target" in values:
            renamed["references"] = values.get("references") or [values["target"]]
        return Row(row.where, renamed)
    return row


def _first_set(sets: Any) -> Any:
    """The triples of a row's modified sets, of which there is one."""
    alternatives = sets.get("mtriple_set") if isinstance(sets, dict) else None
    return alternatives[0] if isinstance(alternatives, list) and alternatives else sets


def _split(texts: Any, column: str, where: str) -> list[list[str]]:
    if not isinstance(texts, list):
        raise DataError(
            f"{where}: {column!r} is {texts!r}; a list of triples is needed.",
            hint='write ["subject | property | object", ...].',
        )
    return [split_triple(text, where) for text in texts]
