"""WebNLG challenge 2017 (Gardent et al.): one to seven triples about a thing -> a text.

Reads the release's XML (a file, or a folder of files such as `train/`), JSON lines `{"category", "triples",
"references"}`, and the hub's sets (`modified_triple_sets` with `lex`, or `input` with `target` and `references`).

Only texts whose comment is `good` (or that have none) are read, as the authors of prefix-tuning do; an entry that has
texts, but no good one, is left out. Each entry is an example of its own: a set's published scores count them all, and
equal triples occur in several categories.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, one_line, read_file, task_format
from prefixtune.data.hub import is_dataset
from prefixtune.data.streams import shown
from prefixtune.data.tasks.triples import (
    Language,
    Triple,
    check_triples,
    commented_texts,
    read_benchmark,
    references_of,
    split_triple,
)
from prefixtune.errors import DataError

WEBNLG_FORMATS = (".xml", ".jsonl")

#: The categories of the training set of 2017, and those of its test set alone. Later releases train on more of them.
SEEN_CATEGORIES = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam"),
    *("University", "WrittenWork"),
)
UNSEEN_CATEGORIES = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")


def linearize(triples: Iterable[Triple]) -> str:
    """Triples as the model reads them (the authors' linearization, with its leading bar).

    >>> linearize([("Aarhus", "leaderName", "Jacob_Bundsgaard"), ("Aarhus", "country", "Denmark")])
    ' | Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return "".join(f" | {subject} : {relation} : {target}" for subject, relation, target in triples)


def read_webnlg(path: Path) -> list[Example]:
    """Read a WebNLG file (`.xml` or `.jsonl`, each also `.gz`), a folder of XML files, or a set of `datasets`.

    Returns:
        One example for each entry with a good text; `fields` is the entry, with `triples`; no targets if the file has
        no texts at all. Groups: `triples` (their number), `category`, and `seen`: `seen` or `unseen`, where the rows
        say it, or where the categories are those of 2017 with some that are in its test set alone.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The file or one of its entries is wrong; the message names file and line.
    """
    kept = [example for example in webnlg_entries(path) if example is not None]
    if not kept:
        raise DataError(f"{shown(path)} has no text whose comment is 'good'.", hint="check the comments of its texts.")
    return kept


def webnlg_entries(path: Path) -> list[Example | None]:
    """Every entry, as `read_webnlg` reads it; None for those that it leaves out."""
    path = Path(path)
    if path.is_dir() and not is_dataset(path):
        records = [record for file in _xml_files(path) for record in _from_xml(file)]
    elif task_format(path, WEBNLG_FORMATS, ".xml") == ".xml":
        records = _from_xml(path)
    else:
        language = Language()
        records = [_from_hub(record, language) for record in read_file(path, WEBNLG_FORMATS)]
    categories = {category for record in records if isinstance(category := record.values.get("category"), str)}
    by_category = categories <= {*SEEN_CATEGORIES, *UNSEEN_CATEGORIES} and not categories <= {*SEEN_CATEGORIES}
    examples = [(_example(record, by_category), "references" in record.values) for record in records]
    return [example if example.targets or not has_texts else None for example, has_texts in examples]


def _example(record: Record, group_by_seen: bool) -> Example:
    values = record.values
    if "triples" not in values:
        raise DataError(
            f"{record.location}: there is no column 'triples'; there are: {', '.join(map(str, values)) or 'none'}.",
            hint='write rows as {"category": "...", "triples": [["s", "p", "o"]], "references": ["..."]}.',
        )
    triples = check_triples(values["triples"], "triples", record.location)
    groups = {"triples": str(len(triples))}
    category = values.get("category")
    if category is not None:
        groups["category"] = one_line(category, "category", record.location)
    seen = values.get("seen", category in SEEN_CATEGORIES if group_by_seen and category is not None else None)
    if seen is not None:
        if not isinstance(seen, bool):
            raise DataError(
                f"{record.location}: 'seen' is {seen!r}; true or false is needed.", hint="write it, or leave it out."
            )
        groups["seen"] = "seen" if seen else "unseen"
        values = {**values, "seen": seen}
    texts = references_of(record)
    comments = _comments(record, len(texts))
    good = tuple(text for text, comment in zip(texts, comments, strict=True) if comment in ("good", ""))
    return Example(linearize(triples), good, values, groups)


def _comments(record: Record, count: int) -> Sequence[str]:
    """The comment of each text; all good if a record has no comments."""
    comments = record.values.get("comments", ["good"] * count)
    if not isinstance(comments, list) or len(comments) != count or not all(isinstance(one, str) for one in comments):
        raise DataError(
            f"{record.location}: 'comments' is {comments!r}; one text for each of the {count} references is needed.",
            hint="write a comment for each, or leave comments out if all are good.",
        )
    return comments


def _xml_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.name.lower().endswith((".xml", ".xml.gz")))
    if not files:
        raise DataError(f"{folder} is a folder without .xml files.", hint="name a file, or a folder of the release.")
    return files


def _from_xml(path: Path) -> list[Record]:
    return [_with_texts(record, record.values.pop("lexicalizations")) for record in read_benchmark(path)]


def _with_texts(record: Record, texts: Iterable[tuple[str, str]]) -> Record:
    """A record with its texts, without empty ones."""
    kept = [(comment, text) for comment, text in texts if text]
    if not kept:
        return record
    return Record(
        record.location, {**record.values, "references": [text for _, text in kept], "comments": [c for c, _ in kept]}
    )


def _from_hub(record: Record, language: Language) -> Record:
    """A record with the column names of the JSON lines instead of those of the hub's sets.

    Raises:
        DataError: It has another shape, or a text in another language than those before it.
    """
    values = record.values
    if "modified_triple_sets" in values and "lex" in values:
        rest = {name: value for name, value in values.items() if name not in ("modified_triple_sets", "lex")}
        triples = _split(_first_set(values["modified_triple_sets"]), "modified_triple_sets", record.location)
        texts = commented_texts(values["lex"], "lex", "comment", record.location)
        for name in _languages(values["lex"]):
            language.check(name, record.location, f"text of 'lex' whose 'lang' is {name!r}")
        return _with_texts(Record(record.location, {**rest, "triples": triples}), texts)
    if "input" in values and "triples" not in values:
        # GEM's training rows have an empty list of references and one target.
        renamed = {**values, "triples": _split(values["input"], "input", record.location)}
        if "target" in values:
            renamed["references"] = values.get("references") or [values["target"]]
        return Record(record.location, renamed)
    return record


def _languages(lex: Any) -> list[str]:
    """The languages that a record names of its texts."""
    names = lex.get("lang") if isinstance(lex, dict) else [item.get("lang") for item in lex]
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _first_set(sets: Any) -> Any:
    """The triples of a record's modified sets, of which there is one."""
    alternatives = sets.get("mtriple_set") if isinstance(sets, dict) else None
    return alternatives[0] if isinstance(alternatives, list) and alternatives else sets


def _split(texts: Any, column: str, location: str) -> list[list[str]]:
    if not isinstance(texts, list):
        raise DataError(
            f"{location}: {column!r} is {texts!r}; a list of triples is needed.",
            hint='write ["subject | property | object", ...].',
        )
    return [split_triple(text, location) for text in texts]
