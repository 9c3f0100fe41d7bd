"""Tokenized examples: one as an object, many as arrays that may be mapped from files.

A million examples as Python objects take gigabytes; as arrays they take four bytes a token, and mapped from files the
system keeps of them what it has room for. An object is made when an example is asked for.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from jaxtyping import Int

from prefixtune.backbone.soft_labels import SoftLabels

__all__ = [
    "DTYPES",
    "Columns",
    "TokenTable",
    "TokenizedDataset",
    "TokenizedExample",
    "any_hidden",
    "hash_tokens",
    "longest_target",
    "longest_text",
    "target_counts",
    "turn_counts",
]


DTYPES = {name: np.dtype("<i4") for name in ("tokens", "label_positions", "turns")} | {
    name: np.dtype("<i8") for name in ("row_ends", "first_rows", "label_ends", "turn_ends")
}
"""What the numbers of each column of a `TokenTable` are."""
_CHUNK = 16384
"""Examples whose numbers are hashed at a time."""


@dataclass(frozen=True)
class TokenizedExample:
    """One source and its targets as token ids; a target's ids end with the end token.

    For a head there is one target, whose ids are label indices.

    Attributes:
        prompt: The source's tokens.
        targets: Each target's tokens, or the label indices.
        label_positions: For a head: where in the prompt each label is predicted; None: the targets are tokens.
        hidden: Positions of the prefix that the example does not see while it is trained on (see `Group.hidden`).
        visible_length: It is trained with the first positions of the prefix alone, as if there were no others; None:
            with the whole prefix.
        soft_targets: A teacher's distribution at each label of each target; empty: the targets are certain.
        turns: Of a conversation, which has one target: the parts [first, stop) of it that are labels, the assistant's
            turns, each of which counts as a target; the rest is read only. Empty: all of every target is labels.
    """

    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    label_positions: tuple[int, ...] | None = None
    hidden: tuple[int, ...] = ()
    visible_length: int | None = None
    soft_targets: tuple[SoftLabels, ...] = field(default=(), compare=False)
    turns: tuple[tuple[int, int], ...] = ()

    @property
    def num_targets(self) -> int:
        """The targets, or the turns of a conversation."""
        return len(self.turns) or len(self.targets)

    def label_spans(self) -> list[list[tuple[int, int]]]:
        """The parts [first, stop) of each target that are labels: the turns of a conversation, else all of it."""
        return [list(self.turns)] if self.turns else [[(0, len(target))] for target in self.targets]

    def with_targets(self, chosen: Sequence[int]) -> TokenizedExample:
        """The same source with some of its targets, by their indices."""
        soft_targets = tuple(self.soft_targets[index] for index in chosen) if self.soft_targets else ()
        return replace(self, targets=tuple(self.targets[index] for index in chosen), soft_targets=soft_targets)


@dataclass(frozen=True, eq=False)
class TokenTable(Sequence[TokenizedExample]):
    """Tokenized examples as arrays; each example is made when it is asked for.

    A row is a prompt or a target; an example is a prompt's row and those of its targets after it.

    Attributes:
        tokens: Those of all rows, one row after the other.
        row_ends: Where each row ends in `tokens`.
        first_rows: The row of each example's prompt, and at the end the number of rows.
        label_positions: For a head: those of all examples, one after the other; None: the targets are tokens.
        label_ends: Where each example's positions end in `label_positions`.
        turns: `first` and `stop` of all turns, one after the other; empty: there is no conversation.
        turn_ends: Where each example's turns end in `turns`.
        hidden: By index of an example: what it does not see of the prefix; None: all see all.
    """

    tokens: Int[np.ndarray, " K"]
    row_ends: Int[np.ndarray, " R"]
    first_rows: Int[np.ndarray, " F"]
    label_positions: Int[np.ndarray, " N"] | None = None
    label_ends: Int[np.ndarray, " E"] | None = None
    turns: Int[np.ndarray, " C"] | None = None
    turn_ends: Int[np.ndarray, " E"] | None = None
    hidden: Mapping[int, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, examples: Iterable[TokenizedExample]) -> TokenTable:
        """The table of some examples, without what a step or a teacher adds to them."""
        columns = Columns()
        columns.extend(examples)
        arrays: dict[str, Any] = {name: numbers for name, numbers in columns.take().items() if name in columns.used}
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.first_rows) - 1

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenizedExample, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | tuple[TokenizedExample, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        index = range(len(self))[index]
        first, stop = self.first_rows[index : index + 2].tolist()
        ends = self.row_ends[max(first - 1, 0) : stop].tolist()
        starts = [0, *ends] if first == 0 else ends
        ids = self.tokens[starts[0] : starts[-1]].tolist()
        prompt, *targets = (tuple(ids[a - starts[0] : b - starts[0]]) for a, b in itertools.pairwise(starts))
        labels = _part(self.label_positions, self.label_ends, index)
        turns = _part(self.turns, self.turn_ends, index)
        return TokenizedExample(
            prompt,
            tuple(targets),
            None if labels is None else tuple(labels),
            (self.hidden or {}).get(index, ()),
            turns=tuple(zip(turns[::2], turns[1::2], strict=True)) if turns else (),
        )

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    @property
    def target_counts(self) -> Int[np.ndarray, " E"]:
        """The targets of each example; the turns of a conversation are one."""
        return np.diff(self.first_rows) - 1

    @property
    def turn_counts(self) -> Int[np.ndarray, " E"] | None:
        """The turns of each example; None: there is no conversation."""
        return None if self.turn_ends is None else np.diff(self.turn_ends, prepend=0) // 2

    @property
    def num_targets(self) -> int:
        """Targets over all examples; each turn of a conversation is one."""
        counts, turns = self.target_counts, self.turn_counts
        return int((counts if turns is None else np.where(turns > 0, turns, counts)).sum())

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target, or turn of a conversation; 0 if labels are predicted."""
        if self.label_positions is not None:
            return 0
        lengths, turns = self._targets_longest(), self.turn_counts
        if turns is None or self.turns is None:
            return int(lengths.max(initial=0))
        spans = self.turns[1::2] - self.turns[::2]
        return max(int(lengths[turns == 0].max(initial=0)), int(spans.max(initial=0)))

    @property
    def longest_text(self) -> int:
        """Tokens of the longest prompt with its longest target."""
        return int((self._lengths()[self.first_rows[:-1]] + self._targets_longest()).max(initial=0))

    def _lengths(self) -> Int[np.ndarray, " R"]:
        return np.diff(self.row_ends, prepend=0)

    def _targets_longest(self) -> Int[np.ndarray, " E"]:
        """Tokens of each example's longest target; 0 where it has none."""
        lengths = self._lengths()
        lengths[self.first_rows[:-1]] = 0  # prompts
        return np.maximum.reduceat(lengths, self.first_rows[:-1]) if len(self) else lengths


class Columns:
    """The columns of a `TokenTable` while they grow; what there is so far may be taken to somewhere else."""

    def __init__(self) -> None:
        self._ends = {"tokens": 0, "label_positions": 0, "turns": 0}
        self._rows = 0
        self._labelled = False
        self._clear()
        self._columns["first_rows"].append(0)

    def _clear(self) -> None:
        self._columns = {name: array("i" if dtype.itemsize == 4 else "q") for name, dtype in DTYPES.items()}

    @property
    def used(self) -> set[str]:
        """The columns that the examples so far need."""
        used = {"tokens", "row_ends", "first_rows"}
        if self._labelled:
            used |= {"label_positions", "label_ends"}
        if self._ends["turns"]:
            used |= {"turns", "turn_ends"}
        return used

    def extend(self, examples: Iterable[TokenizedExample]) -> None:
        """Append some examples."""
        columns = self._columns
        for example in examples:
            for row in (example.prompt, *example.targets):
                columns["row_ends"].append(self._append("tokens", row))
            self._rows += 1 + len(example.targets)
            columns["first_rows"].append(self._rows)
            self._labelled |= example.label_positions is not None
            columns["label_ends"].append(self._append("label_positions", example.label_positions or ()))
            columns["turn_ends"].append(self._append("turns", tuple(itertools.chain(*example.turns))))

    def _append(self, name: str, numbers: Sequence[int]) -> int:
        """Append to a column; returns where it ends now."""
        if numbers:
            self._columns[name].extend(numbers)
            self._ends[name] += len(numbers)
        return self._ends[name]

    def take(self) -> dict[str, npt.NDArray[Any]]:
        """The numbers since the last time, by column; of all columns, used or not."""
        taken = {
            name: np.frombuffer(column, dtype) if column else np.empty(0, dtype)
            for (name, column), dtype in zip(self._columns.items(), DTYPES.values(), strict=True)
        }
        self._clear()
        return taken


def _part(values: Any, ends: Any, index: int) -> list[int] | None:
    """An example's part of a column; None: there is no such column."""
    if values is None:
        return None
    part: list[int] = values[ends[index - 1] if index else 0 : ends[index]].tolist()
    return part


@dataclass(frozen=True)
class TokenizedDataset:
    """Tokenized examples.

    Attributes:
        examples: The examples.
        num_truncated: How many sources were truncated to fit.
        longest_prompt: Tokens of the longest prompt that was not truncated.
        num_dropped_turns: Answers at the end of conversations that were left out, as they did not fit.
        num_unpacked: Conversations whose turns are examples of their own.
        origins: Which example each one comes from; empty: there is one for each.
    """

    examples: Sequence[TokenizedExample]
    num_truncated: int
    longest_prompt: int = 0
    num_dropped_turns: int = 0
    num_unpacked: int = 0
    origins: Sequence[int] | Int[np.ndarray, " N"] = ()

    @classmethod
    def from_prompts(
        cls, examples: Sequence[TokenizedExample], whole_prompts: Sequence[Sequence[int]]
    ) -> TokenizedDataset:
        """The dataset of these examples, whose prompts had the tokens `whole_prompts` before truncation."""
        lengths = [(len(example.prompt), len(whole)) for example, whole in zip(examples, whole_prompts, strict=True)]
        return cls(
            tuple(examples),
            sum(kept < whole for kept, whole in lengths),
            max((whole for kept, whole in lengths if kept == whole), default=0),
        )

    @property
    def num_targets(self) -> int:
        """Targets over all examples; each turn of a conversation is one."""
        if isinstance(self.examples, TokenTable):
            return self.examples.num_targets
        return sum(example.num_targets for example in self.examples)

    @property
    def num_sources(self) -> int:
        """Sources, or conversations."""
        return len(np.unique(np.asarray(self.origins))) if len(self.origins) else len(self.examples)

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target, or turn of a conversation; 0 if labels are predicted."""
        return longest_target(self.examples)


# --- what is asked of all examples, by arrays where there are some ----------------------------------------------------


def target_counts(examples: Sequence[TokenizedExample]) -> array[int]:
    """The targets of each example; the turns of a conversation are one."""
    if isinstance(examples, TokenTable):
        return array("q", examples.target_counts.astype(np.int64).tobytes())
    return array("q", (len(example.targets) for example in examples))


def turn_counts(examples: Sequence[TokenizedExample]) -> array[int] | None:
    """The turns of each example; None: there is no conversation."""
    if isinstance(examples, TokenTable):
        counts = examples.turn_counts
        return None if counts is None else array("q", counts.astype(np.int64).tobytes())
    turns = array("q", (len(example.turns) for example in examples))
    return turns if any(turns) else None


def longest_target(examples: Sequence[TokenizedExample]) -> int:
    """Tokens of the longest target, or turn of a conversation; 0 if labels are predicted."""
    if isinstance(examples, TokenTable):
        return examples.longest_target
    rows = (example.label_spans() for example in examples if example.label_positions is None)
    return max((stop - first for spans in rows for target in spans for first, stop in target), default=0)


def longest_text(examples: Sequence[TokenizedExample]) -> int:
    """Tokens of the longest prompt with its longest target."""
    if isinstance(examples, TokenTable):
        return examples.longest_text
    return max((len(e.prompt) + max(map(len, e.targets), default=0) for e in examples), default=0)


def any_hidden(examples: Sequence[TokenizedExample]) -> bool:
    """Whether some example does not see all of the prefix."""
    if isinstance(examples, TokenTable):
        return any((examples.hidden or {}).values())
    return any(example.hidden for example in examples)


def hash_tokens(examples: Sequence[TokenizedExample], update: Callable[[bytes], None]) -> None:
    """Give a hash all token ids: each row's length and ids, and a 0 behind each example, as 64-bit numbers."""
    if not isinstance(examples, TokenTable):
        for example in examples:
            for ids in (example.prompt, *example.targets, ()):
                update(array("q", (len(ids), *ids)).tobytes())
        return
    for first in range(0, len(examples), _CHUNK):
        rows = examples.first_rows[first : first + _CHUNK + 1].astype(np.int64)
        ends = examples.row_ends[rows[0] : rows[-1]].astype(np.int64)
        start = int(examples.row_ends[rows[0] - 1]) if rows[0] else 0
        lengths = np.diff(ends, prepend=start)
        numbers = np.zeros(int(ends[-1]) - start + len(lengths) + len(rows) - 1, np.int64)
        # Before each row there are the lengths of the rows before it, and a 0 for each example before its own.
        own = np.repeat(np.arange(len(rows) - 1), np.diff(rows))
        places = ends - lengths - start + np.arange(len(lengths)) + own
        is_token = np.ones(len(numbers), bool)
        is_token[places] = False
        is_token[places[rows[1:] - rows[0] - 1] + lengths[rows[1:] - rows[0] - 1] + 1] = False
        numbers[places] = lengths
        numbers[is_token] = examples.tokens[start : int(ends[-1])]
        update(numbers.tobytes())
