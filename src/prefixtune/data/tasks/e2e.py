"""E2E NLG (Novikova et al. 2017): restaurant descriptions from attribute-value pairs.

Reads the original release's CSV (columns `mr`, `ref`; only `mr` in the test set without references), JSON lines
`{"mr": ..., "references": [...]}`, and the hub's sets, also exported to such files (`meaning_representation` with
`human_reference`, or with `target` and `references`). Equal meaning representations become one example, in order of
first appearance, with their references in order (repeated ones are kept).

References keep their words and case; only outer white space is removed, and an inner line break becomes one space,
because generation for this task bans line breaks. In the data that the authors of prefix-tuning released, texts are
also tokenized (`city centre .`); this reader keeps the original spelling, which BLEU's tokenizer expects.
"""

from __future__ import annotations

import re
from pathlib import Path

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, one_line, read_file
from prefixtune.data.hub import is_dataset
from prefixtune.errors import DataError, did_you_mean

#: The eight attributes of E2E -> their names in the linearization (the authors': four are renamed).
ATTRIBUTES = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}
E2E_FORMATS = (".csv", ".jsonl")
_REFERENCES = ("references", "ref", "human_reference", "target")
"""Columns of texts: the first that is filled."""
_PAIR = re.compile(r"([^\[\],]*)\[([^\[\]]*)\]\s*")
_SHAPE = "write it as name[Blue Spice], eatType[pub], area[riverside]."


def parse_mr(mr: str) -> dict[str, str]:
    """The attributes of a meaning representation, in its order.

    >>> parse_mr("name[Blue Spice], eatType[coffee shop]")
    {'name': 'Blue Spice', 'eatType': 'coffee shop'}

    Raises:
        DataError: The text is malformed, or an attribute is unknown, empty or given twice.
    """
    values: dict[str, str] = {}
    position = 0
    while True:
        pair = _PAIR.match(mr, position)
        if pair is None:
            raise DataError(f"meaning representation {mr!r} is malformed from {mr[position:]!r} on.", hint=_SHAPE)
        attribute, value = pair[1].strip(), pair[2].strip()
        if attribute not in ATTRIBUTES:
            raise DataError(
                f"meaning representation {mr!r} has the unknown attribute {attribute!r}.",
                hint=did_you_mean(attribute, ATTRIBUTES),
            )
        if not value or attribute in values:
            fault = "given twice" if attribute in values else "empty"
            raise DataError(
                f"meaning representation {mr!r}: {attribute!r} is {fault}; each attribute has one value.",
                hint="keep one value, or leave the attribute out.",
            )
        values[attribute] = value
        position = pair.end()
        if position == len(mr):
            return values
        if mr[position] != ",":
            raise DataError(f"meaning representation {mr!r} lacks a comma before {mr[position:]!r}.", hint=_SHAPE)
        position += 1


def linearize(mr: str) -> str:
    """A meaning representation as the model reads it (the authors' linearization; the order is kept).

    >>> linearize("name[The Vaults], eatType[pub], priceRange[more than £30], familyFriendly[yes]")
    'name : The Vaults | Type : pub | price : more than £30 | family friendly : yes'

    Raises:
        DataError: As `parse_mr`.
    """
    return " | ".join(f"{ATTRIBUTES[attribute]} : {value}" for attribute, value in parse_mr(mr).items())


def read_e2e(path: Path) -> list[Example]:
    """Read an E2E file (`.csv` or `.jsonl`, each also `.gz`), or a set of the `datasets` library.

    Args:
        path: The file. Column names may be in either case, or those of the hub's sets; other columns are ignored.

    Returns:
        One example for each distinct meaning representation; `fields` is `{"mr": the original text}`, and the group
        `attributes` is the number of its attributes; no targets if the file has no references.

    Raises:
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    path = Path(path)
    sources: dict[str, str] = {}
    targets: dict[str, list[str]] = {}
    for record in read_file(path, E2E_FORMATS):
        mr, references = _read_row(record, needs_references=not is_dataset(path))
        if mr not in sources:
            try:
                sources[mr] = linearize(mr)
            except DataError as error:
                raise DataError(f"{record.location}: {error.message}", hint=error.hint) from error
        targets.setdefault(mr, []).extend(references)
    return [
        Example(source, tuple(targets[mr]), {"mr": mr}, {"attributes": str(len(parse_mr(mr)))})
        for mr, source in sources.items()
    ]


def _read_row(record: Record, *, needs_references: bool) -> tuple[str, list[str]]:
    """The meaning representation and the cleaned references of one record.

    Args:
        record: The row.
        needs_references: One that has more than the meaning representation must have a reference; a set has columns of
            its own, such as ids.
    """
    values = {name.lower(): value for name, value in record.values.items()}
    mr = values.get("mr", values.get("meaning_representation"))
    if not isinstance(mr, str):
        raise DataError(f"{record.location}: 'mr' is {mr!r}; a string is needed.", hint=_SHAPE)
    # GEM's training rows have an empty list of references and one target.
    column = next((name for name in _REFERENCES if values.get(name) not in (None, [])), None)
    if column is None:
        if needs_references and len(values) > 1:
            raise DataError(
                f"{record.location}: no column {' or '.join(map(repr, _REFERENCES))} is filled.",
                hint='write "references": ["..."], or no other column than mr.',
            )
        return mr.strip(), []
    references = values[column] if isinstance(values[column], list) else [values[column]]
    return mr.strip(), [one_line(reference, column, record.location) for reference in references]
