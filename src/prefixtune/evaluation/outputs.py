"""The outputs of any system, read from a file: plain lines, or JSON lines with the key `output`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefixtune.data.examples import Example
from prefixtune.data.files import check_file
from prefixtune.data.parsing import LocatedRow, json_lines
from prefixtune.data.streams import MAX_FILE_BYTES, empty_file, shown, text_pieces
from prefixtune.errors import DataError, short_repr

__all__ = ["Output", "check_sources", "check_texts", "read_outputs"]


class Output(NamedTuple):
    """One output.

    Attributes:
        text: What the system wrote.
        source: That of its example, where the row names it.
        location: Of its row, for messages; empty: it is a line of text.
    """

    text: str
    source: str | None = None
    location: str = ""


def read_outputs(path: Path) -> list[Output]:
    """The outputs of a file: its lines, also blank ones, or the values of `output` in JSON lines.

    JSON lines are recognized by the ending `.jsonl`, or by a first line that has `output`. Where they have `number`, as
    those of `prefixtune evaluate`, it gives their order.

    Raises:
        DataError: It is neither, cannot be read, or its numbers are not those of all outputs.
    """
    check_file(path)
    text = "".join(text_pieces(path, MAX_FILE_BYTES))
    if not text:
        raise empty_file(path, "one output")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl") or "output" in (_as_object(text.lstrip().partition("\n")[0]) or {}):
        return [_as_output(row) for row in _in_order(list(json_lines([text], path)))]
    if name.endswith(".json"):
        raise DataError(
            f"{path} is JSON, but outputs are read from lines.",
            hint='write one output a line (.txt), or lines of {"output": "..."} (.jsonl).',
        )
    # Only "\n" ends a line; the one after the last line adds no empty output.
    return [Output(line.removesuffix("\r")) for line in text.removesuffix("\n").split("\n")]


def check_texts(path: Path, outputs: Sequence[Output], examples: Sequence[Example]) -> None:
    """Refuse lines of text that are JSON objects, if no target is one: rows of a file without the key `output`.

    Raises:
        DataError: They are.
    """
    lines = [(number, output.text) for number, output in enumerate(outputs, start=1) if output.text.strip()]
    if not lines or outputs[0].location or any(_as_object(line) is None for _, line in lines):
        return
    if all(_as_object(target) is None for example in examples for target in example.targets):
        number, line = lines[0]
        _as_output((f"{shown(path)}, line {number}", _as_object(line) or {}))


def check_sources(outputs: Sequence[Output], examples: Sequence[Example]) -> None:
    """Refuse outputs that name another source than the example at their place; white space does not count.

    Raises:
        DataError: One does.
    """
    for number, (output, example) in enumerate(zip(outputs, examples, strict=True), start=1):
        if output.source is not None and output.source.split() != example.source.split():
            raise DataError(
                f"{output.location}: the output is for the source {short_repr(output.source)}, but example {number} of "
                f"the references has {short_repr(example.source)}.",
                hint="name the references that these outputs are for; or leave out the key 'source', if they are.",
            )


def _as_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds; None: it holds none."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _in_order(rows: list[LocatedRow]) -> list[LocatedRow]:
    """Rows in the order of their numbers; as they are, if they have none."""
    if not any("number" in values for _, values in rows):
        return rows
    by_number: dict[Any, LocatedRow] = {}
    for location, values in rows:
        number = values.get("number")
        if type(number) is not int or not 0 <= number < len(rows) or number in by_number:
            raise DataError(
                f"{location}: 'number' is {short_repr(number)}; {len(rows):,} outputs have the numbers 0 to "
                f"{len(rows) - 1:,}, each once.",
                hint="take outputs.jsonl of a finished evaluation; or leave the key 'number' out of rows that are in "
                "the order of the examples.",
            )
        by_number[number] = location, values
    return [by_number[number] for number in range(len(rows))]


def _as_output(row: LocatedRow) -> Output:
    location, values = row
    output, source = values.get("output"), values.get("source")
    if not isinstance(output, str):
        raise DataError(
            f"{location}: 'output' is {short_repr(output)}; a text is needed.", hint='write lines as {"output": "..."}.'
        )
    return Output(output, source if isinstance(source, str) else None, location)
