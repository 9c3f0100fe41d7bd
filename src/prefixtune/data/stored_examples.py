"""Examples that are too many for Python objects: they are in a file, and one is made when it is asked for.

Examples are gathered one by one. While they are few, they stay a list; otherwise they go to columns in files (see
`cache`), and the result behaves as the same list. What is asked of all examples, such as which have one source, is
answered by arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Int

from prefixtune import __version__
from prefixtune.data.cache import ColumnWriter, Stored, content_key, stored
from prefixtune.data.examples import Example, Message, limit_targets, merge_examples, merge_key, source_key
from prefixtune.data.streams import read_chunks

__all__ = [
    "StoredExamples",
    "change_examples",
    "count_answers",
    "distinct_sources",
    "file_key",
    "first_targets",
    "gather",
    "gather_file",
    "has_messages",
    "has_targets",
    "select",
    "source_ids",
]

FEW = 20_000
"""Most examples that stay Python objects; they take about 2 kB each, with their tokens."""
FEW_CHARS = 2**25
"""Most characters of them."""
KEPT_BYTES = 2**21
"""A file of this size is worth keeping as examples from run to run."""
_VERSION = 3
"""Of what the columns mean, and of how examples are made: to be raised when a reader's results change."""
_BLOCK = 1024
"""Examples that are read or written at a time."""

Change = Callable[[Example], Example]


@dataclass(frozen=True, eq=False)
class StoredExamples(Sequence[Example]):
    """Examples in a file.

    Attributes:
        entry: The columns: `rows`, one example a row as JSON; `row_ends`; `members`, the rows of each example, of which
            the first has the fields and all have targets, up to `member_ends`; `target_counts`, `message_counts`, and
            `answer_counts` of the assistant's messages; `source_ids`, for each example the first one with its source.
        chosen: The indices of those that count, in order.
        last_targets: Targets of the last of them; None: all.
        change: Made of each example when it is asked for.
    """

    entry: Stored
    chosen: Int[np.ndarray, " N"]
    last_targets: int | None = None
    change: Change | None = None

    @classmethod
    def of_entry(cls, entry: Stored) -> StoredExamples:
        """All examples of an entry."""
        return cls(entry, np.arange(len(entry.columns["member_ends"])))

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        example = self._read(int(self.chosen[index]))
        if self.last_targets is not None and index == len(self) - 1:
            example = dataclasses.replace(example, targets=example.targets[: self.last_targets])
        return example if self.change is None else self.change(example)

    def __iter__(self) -> Iterator[Example]:
        for first in range(0, len(self), _BLOCK):
            yield from self[first : first + _BLOCK]
            self.entry.release()

    def _read(self, index: int) -> Example:
        """An example of the entry."""
        columns = self.entry.columns
        ends = columns["member_ends"]
        first, *others = columns["members"][int(ends[index - 1]) if index else 0 : int(ends[index])].tolist()
        example = self._read_row(first)
        if not others:
            return example
        targets = (example.targets, *(self._read_row(row).targets for row in others))
        return dataclasses.replace(example, targets=tuple(target for some in targets for target in some))

    def _read_row(self, row: int) -> Example:
        ends = self.entry.columns["row_ends"]
        data = self.entry.columns["rows"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()
        source, targets, fields, groups, messages, tuples = json.loads(data.decode("utf-8", "surrogatepass"))
        fields |= {name: tuple(fields[name]) for name in tuples}
        return Example(source, tuple(targets), fields, groups, tuple(Message(*message) for message in messages))

    @property
    def digest(self) -> str:
        """Tells these examples from any other, but for a change."""
        chosen = hashlib.sha256(self.chosen.astype("<i8").tobytes()).hexdigest()
        return content_key(entry=self.entry.facts["digest"], chosen=chosen, last_targets=self.last_targets)

    @property
    def target_counts(self) -> Int[np.ndarray, " N"]:
        """The targets of each example."""
        counts = np.asarray(self.entry.columns["target_counts"][self.chosen], np.int64)
        if self.last_targets is not None and len(counts):
            counts[-1] = min(counts[-1], self.last_targets)
        return counts

    @property
    def source_ids(self) -> Int[np.ndarray, " N"]:
        """A number for each example; examples of one source have the same."""
        return np.asarray(self.entry.columns["source_ids"][self.chosen])


# --- gathering -------------------------------------------------------------------------------------------------------


def gather(examples: Iterable[Example], *, merge: bool = False) -> Sequence[Example]:
    """The examples as a list, or in a temporary file if they are many.

    Args:
        examples: One after the other.
        merge: Equal sources of one turn become one example, in order of first appearance, with all their targets in
            order and the rest of the first.
    """
    few: list[Example] = []
    chars = 0
    stream = iter(examples)
    for example in stream:
        few.append(example)
        chars += len(example.source) + sum(map(len, example.targets))
        if len(few) > FEW or chars > FEW_CHARS:
            return StoredExamples.of_entry(stored(None, lambda writer: _write(writer, few, stream, merge=merge)))
    return merge_examples(few) if merge else few


def gather_file(
    path: Path, read: Callable[[], Iterable[Example]], *, merge: bool = False, keep: bool = True, **facts: Any
) -> Sequence[Example]:
    """The examples of a file as a list, or if it is large in the cache, where the next run finds them.

    Args:
        path: The file.
        read: Reads its examples.
        merge: As for `gather`.
        keep: Whether they may stay in the cache.
        **facts: What the examples depend on besides the file's bytes, as JSON.
    """
    if not keep or not path.is_file() or path.stat().st_size < KEPT_BYTES:
        return gather(read(), merge=merge)
    key = content_key(
        file=file_key(path), ending=path.suffixes[-2:], merge=merge, version=[__version__, _VERSION], **facts
    )
    return StoredExamples.of_entry(stored(key, lambda writer: _write(writer, [], iter(read()), merge=merge)))


def file_key(path: Path) -> str:
    """A hash of a file's bytes, which are read a megabyte at a time."""
    total = hashlib.sha256()
    for piece in read_chunks(path):
        total.update(piece)
    return total.hexdigest()


def _write(writer: ColumnWriter, few: list[Example], rest: Iterator[Example], *, merge: bool) -> Mapping[str, Any]:
    """Write the columns of examples; `few` is emptied, so that its memory is free."""
    total = hashlib.sha256(b"merged" if merge else b"")
    counts, sources, keys, ends = array("q"), array("Q"), array("Q"), array("q")
    messages, answers = array("i"), array("i")
    rows: list[bytes] = []
    end = 0
    few.reverse()
    while (example := few.pop() if few else next(rest, None)) is not None:
        row = _row(example)
        end += len(row)
        rows.append(row)
        ends.append(end)
        counts.append(len(example.targets))
        messages.append(len(example.messages))
        answers.append(sum(message.role == "assistant" for message in example.messages))
        key = source_key(example)
        own = _hash(f"row {len(ends)}".encode())
        sources.frombytes(own if key is None else _hash_key(key))
        if merge:
            key = merge_key(example)
            keys.frombytes(own if key is None else _hash_key(key))
        if len(rows) == _BLOCK:
            _flush(writer, rows, total)
    _flush(writer, rows, total)
    writer.append("row_ends", np.frombuffer(ends, "<i8") if ends else np.empty(0, "<i8"))
    first_of = _first_equal(keys) if merge else np.arange(len(ends))
    members = np.argsort(first_of, kind="stable")
    firsts = np.flatnonzero(first_of == np.arange(len(first_of)))
    member_ends = np.searchsorted(first_of[members], firsts, side="right")
    sums = np.concatenate([[0], np.cumsum(np.frombuffer(counts, "<i8")[members] if counts else [])]).astype("<i8")
    by_source = _first_equal(sources)[firsts]
    writer.append("members", members.astype("<i8"))
    writer.append("member_ends", member_ends.astype("<i8"))
    writer.append("target_counts", np.diff(sums[np.concatenate([[0], member_ends]).astype(int)]))
    for name, column in (("message_counts", messages), ("answer_counts", answers)):
        writer.append(name, np.array(column, "<i4")[firsts])
    writer.append("source_ids", np.searchsorted(firsts, by_source).astype("<i8"))
    return {"digest": total.hexdigest(), "num_rows": len(ends)}


def _row(example: Example) -> bytes:
    """An example as JSON; what is no JSON among its fields becomes text."""
    fields = dict(example.fields)
    tuples = [name for name, value in fields.items() if isinstance(value, tuple)]
    values = [example.source, example.targets, fields, dict(example.groups), example.messages, tuples]
    return json.dumps(values, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _flush(writer: ColumnWriter, rows: list[bytes], total: Any) -> None:
    data = b"".join(rows)
    rows.clear()
    total.update(data)
    writer.append("rows", np.frombuffer(data, np.uint8))


def _hash_key(key: tuple[str, tuple[Message, ...]]) -> bytes:
    return _hash(json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _first_equal(hashes: array[int]) -> Int[np.ndarray, " N"]:
    """For each hash of 128 bits the index of the first one that equals it."""
    if not hashes:
        return np.empty(0, np.int64)
    low, high = np.frombuffer(hashes, np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: equal ones stay in order
    same = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    first_of = np.empty(len(order), np.int64)
    first_of[order] = np.repeat(order[starts], np.diff(np.concatenate([starts, [len(order)]])))
    return first_of


# --- what is asked of all examples, by arrays where there are some ----------------------------------------------------


def source_ids(examples: Sequence[Example]) -> Int[np.ndarray, " N"]:
    """A number for each example; examples of one source have the same."""
    if isinstance(examples, StoredExamples):
        return examples.source_ids
    ids: dict[Any, int] = {}
    keys = (source_key(example) or number for number, example in enumerate(examples))
    return np.array([ids.setdefault(key, len(ids)) for key in keys], np.int64)


def has_targets(examples: Sequence[Example]) -> Int[np.ndarray, " N"]:
    """For each example whether it has a target: 1 or 0."""
    if isinstance(examples, StoredExamples):
        return (examples.target_counts > 0).astype(np.int64)
    return np.array([bool(example.targets) for example in examples], np.int64)


def has_messages(examples: Sequence[Example]) -> bool:
    """Whether some example has messages."""
    if isinstance(examples, StoredExamples):
        return bool(examples.entry.columns["message_counts"][examples.chosen].any())
    return any(example.messages for example in examples)


def count_answers(examples: Sequence[Example]) -> int:
    """The targets of all examples, and the assistant's messages before them."""
    if isinstance(examples, StoredExamples):
        return int(examples.target_counts.sum() + examples.entry.columns["answer_counts"][examples.chosen].sum())
    return sum(len(e.targets) + sum(message.role == "assistant" for message in e.messages) for e in examples)


def distinct_sources(examples: Sequence[Example]) -> Int[np.ndarray, " S"]:
    """The index of the first example with a target of each source that has one, in order."""
    candidates = np.flatnonzero(has_targets(examples))
    _, first = np.unique(source_ids(examples)[candidates], return_index=True)
    return np.sort(candidates[first])


def select(examples: Sequence[Example], indices: Int[np.ndarray, " M"]) -> Sequence[Example]:
    """The examples with these indices."""
    if not isinstance(examples, StoredExamples):
        return [examples[index] for index in indices.tolist()]
    keeps_last = len(indices) > 0 and indices[-1] == len(examples) - 1
    return dataclasses.replace(
        examples, chosen=examples.chosen[indices], last_targets=examples.last_targets if keeps_last else None
    )


def first_targets(examples: Sequence[Example], limit: int) -> Sequence[Example]:
    """As `limit_targets`: the first `limit` targets, with their sources; 0: all of them."""
    if not limit:
        return examples
    if not isinstance(examples, StoredExamples):
        return limit_targets(examples, limit)
    counts = examples.target_counts
    before = np.cumsum(counts) - counts
    kept_count = int(np.searchsorted(before, limit, side="left"))
    last = min(limit - int(before[kept_count - 1]), int(counts[kept_count - 1])) if kept_count else None
    return dataclasses.replace(examples, chosen=examples.chosen[:kept_count], last_targets=last)


def change_examples(examples: Sequence[Example], change: Change) -> Sequence[Example]:
    """Each example changed, without its number of targets or its source changing."""
    if not isinstance(examples, StoredExamples):
        return [change(example) for example in examples]
    before = examples.change
    return dataclasses.replace(examples, change=change if before is None else lambda example: change(before(example)))
