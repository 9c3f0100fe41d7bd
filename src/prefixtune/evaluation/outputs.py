"""The outputs of any system, read from a file: plain lines, or JSON lines with the key `output`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prefixtune.data.examples import Example
from prefixtune.data.files import LocatedRow, check_file, json_lines
from prefixtune.data.registry import read_all_entries
from prefixtune.data.streams import MAX_FILE_BYTES, empty_file, open_bytes, reading, shown, whole_text
from prefixtune.errors import DataError, short_repr


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
    """The outputs of a file: its lines, also blank ones, or of JSON lines the values of `output`.

    Raises:
        DataError: It cannot be read, or a row has no output.
    """
    check_file(path)
    with reading(path), open_bytes(path) as file:
        text = whole_text(file, shown(path), MAX_FILE_BYTES)
    if not text:
        raise empty_file(path, "one output")
    if path.name.lower().removesuffix(".gz").endswith(".jsonl") or _is_row(text.lstrip().partition("\n")[0]):
        rows = list(json_lines(text.split("\n"), shown(path)))
        if all(type(values.get("number")) is int for _, values in rows):
            # An evaluation decodes by length, and writes `decoded.jsonl` in that order.
            rows.sort(key=lambda row: row[1]["number"])
        return [_as_output(row) for row in rows]
    # Only "\n" ends a line; the one after the last line adds no empty output.
    return [Output(line.removesuffix("\r")) for line in text.removesuffix("\n").split("\n")]


def outputs_of(examples: Sequence[Example], path: Path, *, task: str, data: str, split: str, limit: int) -> list[str]:
    """The outputs of a file, one for each example, or for the first ones.

    Args:
        examples: All that were read.
        path: Of the outputs: as many as examples, as `limit`, or as the data has entries, also without a reference.
        task: Of the examples.
        data: Their file.
        split: Its part; empty: there is one.
        limit: How many are scored; 0: all.

    Raises:
        DataError: Their number is another one, they are rows without outputs, or one names the source of another
            example.
    """
    outputs, chosen = read_outputs(path), examples[: limit or None]
    if len(outputs) not in (len(chosen), len(examples)):
        entries = read_all_entries(task, data, split=split or None)
        if len(outputs) != len(entries):
            raise DataError(
                f"{str(path)!r} has {len(outputs):,} outputs, but {data!r} has {len(examples):,} examples.",
                hint="write one output for each distinct source, in order; --limit N takes the first ones.",
            )
        outputs = [output for output, entry in zip(outputs, entries, strict=True) if entry is not None]
    for number, (output, example) in enumerate(zip(outputs, chosen, strict=False), start=1):
        # White space does not count.
        if output.source is not None and output.source.split() != example.source.split():
            raise DataError(
                f"{output.location}: the output is for the source {short_repr(output.source)}, but example {number} of "
                f"the references has {short_repr(example.source)}.",
                hint="name the references that these outputs are for; or leave out the key 'source', if they are.",
            )
    return [output.text for output in outputs[: len(chosen)]]


def _is_row(line: str) -> bool:
    """Whether a line is a JSON object with an output."""
    try:
        return line.startswith("{") and "output" in json.loads(line)
    except (ValueError, RecursionError):
        return False


def _as_output(row: LocatedRow) -> Output:
    location, values = row
    output, source = values.get("output"), values.get("source")
    if not isinstance(output, str):
        raise DataError(
            f"{location}: 'output' is {short_repr(output)}; a text is needed.", hint='write lines as {"output": "..."}.'
        )
    return Output(output, source if isinstance(source, str) else None, location)
