"""Tokenized examples: sources and targets as token ids, and the batches of an epoch."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from prefixtune.backbone.batch import WHOLE, Front, SoftLabels


@dataclass(frozen=True)
class TokenizedExample:
    """One source and its targets as token ids; a target's ids end with the end token.

    For a head there is one target, whose ids are label indices.

    Attributes:
        prompt: The source's tokens.
        targets: Each target's tokens, or the label indices.
        label_positions: For a head: where in the prompt each label is predicted; None: the targets are tokens.
        hidden: Positions of the prefix that the example does not see while it is trained on (see `Group.hidden`).
        front: What is in front of it while it is trained on.
        soft_targets: A teacher's distribution at each label of each target; empty: the targets are certain.
        turns: Of a conversation, which has one target: the parts [first, stop) of it that are labels, the assistant's
            turns, each of which counts as a target; the rest is read only. Empty: all of every target is labels.
    """

    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    label_positions: tuple[int, ...] | None = None
    hidden: tuple[int, ...] = ()
    front: Front = WHOLE
    soft_targets: tuple[SoftLabels, ...] = field(default=(), compare=False)
    turns: tuple[tuple[int, int], ...] = ()

    @property
    def num_targets(self) -> int:
        """The targets, or the turns of a conversation."""
        return len(self.turns) or len(self.targets)

    def label_spans(self) -> list[list[tuple[int, int]]]:
        """The parts [first, stop) of each target that are labels: the turns of a conversation, else all of it."""
        return [list(self.turns)] if self.turns else [[(0, len(target))] for target in self.targets]

    def beside(self, company: tuple[int, ...], length: int) -> TokenizedExample:
        """The same with others behind the prefix that trains, which has so many positions: no others are hidden."""
        if not company:
            return self
        seen = length if self.front.length is None else min(length, self.front.length)
        hidden = tuple(position for position in self.hidden if position < seen)
        return replace(self, hidden=hidden, front=self.front._replace(company=company))

    def with_targets(self, chosen: Sequence[int]) -> TokenizedExample:
        """The same source with some of its targets, by their indices."""
        soft_targets = tuple(self.soft_targets[index] for index in chosen) if self.soft_targets else ()
        return replace(self, targets=tuple(self.targets[index] for index in chosen), soft_targets=soft_targets)


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
    origins: Sequence[int] = ()

    @classmethod
    def of_one(cls, *rows: TokenizedExample, prompt_length: int = 0) -> TokenizedDataset:
        """What one example became; with the tokens that its prompt had before it was cut."""
        kept = max(len(row.prompt) for row in rows)
        is_cut = kept < prompt_length
        return cls(rows, int(is_cut), 0 if is_cut else kept)

    @classmethod
    def of_all(cls, parts: Iterable[TokenizedDataset]) -> TokenizedDataset:
        """All examples, of what each one became."""
        parts = list(parts)
        origins = tuple(index for index, part in enumerate(parts) for _ in part.examples)
        return cls(
            tuple(row for part in parts for row in part.examples),
            sum(part.num_truncated for part in parts),
            max(part.longest_prompt for part in parts),
            sum(part.num_dropped_turns for part in parts),
            sum(part.num_unpacked for part in parts),
            () if len(origins) == len(parts) else origins,
        )

    @property
    def num_targets(self) -> int:
        """Targets over all examples; each turn of a conversation is one."""
        return sum(example.num_targets for example in self.examples)

    @property
    def num_sources(self) -> int:
        """Sources, or conversations."""
        return len(set(self.origins)) or len(self.examples)

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target, or turn of a conversation; 0 if labels are predicted."""
        rows = (example.label_spans() for example in self.examples if example.label_positions is None)
        return max((stop - first for spans in rows for target in spans for first, stop in target), default=0)


# --- what is asked of all examples -----------------------------------------------------------------------------------


def longest_text(examples: Sequence[TokenizedExample]) -> int:
    """Tokens of the longest prompt with its longest target."""
    return max((len(e.prompt) + max(map(len, e.targets), default=0) for e in examples), default=0)


def hash_tokens(examples: Sequence[TokenizedExample], update: Callable[[bytes], None]) -> None:
    """Give a hash all token ids: each row's length and ids, and a 0 behind each example, as 64-bit numbers."""
    for example in examples:
        for ids in (example.prompt, *example.targets, ()):
            update(array("q", (len(ids), *ids)).tobytes())


def epoch_batches(
    examples: Sequence[TokenizedExample], *, batch_size: int, targets_per_source: int, seed: int | None, epoch: int = 0
) -> Iterator[list[TokenizedExample]]:
    """One pass over all targets, as lists of examples to `pack`.

    Every target comes once. A source's targets are divided into groups of at most `targets_per_source`, the groups are
    shuffled, and a batch takes groups until it has `batch_size` targets. The order depends on seed and epoch alone.

    A conversation counts as many targets as it has turns and is never divided: a batch may be smaller for it, and is
    larger where the conversation alone has more turns.

    Args:
        examples: All examples.
        batch_size: Targets per batch.
        targets_per_source: Most targets of one source in a group.
        seed: None: nothing is shuffled.
        epoch: Which pass.
    """
    rng = None if seed is None else random.Random(f"{seed}/{epoch}")
    most = min(batch_size, targets_per_source)
    groups: list[tuple[TokenizedExample, list[int]]] = []
    for example in examples:
        targets = list(range(len(example.targets)))
        if rng is not None:
            rng.shuffle(targets)
        groups += [(example, targets[start : start + most]) for start in range(0, len(targets), most)]
    if rng is not None:
        rng.shuffle(groups)
    batch: list[TokenizedExample] = []
    room = batch_size
    for example, targets in groups:
        size = len(example.turns)
        if size > room and batch:
            yield batch
            batch, room = [], batch_size
        if not size and len(targets) > room:
            # Fill the batch with a part of the group; the rest begins the next batch.
            if room > 0:
                batch.append(example.with_targets(targets[:room]))
            yield batch
            targets, batch, room = targets[max(room, 0) :], [], batch_size
        batch.append(example.with_targets(targets))
        room -= size or len(targets)
    if batch:
        yield batch
