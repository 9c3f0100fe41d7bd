"""Examples -> packed rows: tokens, the structure of who sees whom, and which positions carry a loss.

A step's examples stand in one row. A source stands there once, followed by its targets; each target sees the source and
itself, and its positions go on where the source ends. For a causal model this equals one padded row per pair, since a
source never sees its target; it only computes less.

Knows the tokenizer through the backbone; knows nothing of prefixes, losses or optimizers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attach import Group, Packing
from prefixtune.backbone import Backbone
from prefixtune.errors import DataError
from prefixtune.tasks import Example, TextFormat

__all__ = ["Batch", "Encoded", "Encoding", "encode_examples", "encode_prompt", "pack", "plan_epoch"]


@dataclass(frozen=True)
class Encoded:
    """One source and its targets as token ids; a target's ids end with the end token."""

    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Encoding:
    """Encoded examples, and how many sources had to be cut to fit."""

    examples: tuple[Encoded, ...]
    num_cut: int

    @property
    def num_targets(self) -> int:
        """Targets over all examples."""
        return sum(len(example.targets) for example in self.examples)


@dataclass(frozen=True)
class Batch:
    """One packed row.

    Attributes:
        input_ids: The tokens.
        packing: Who sees whom.
        label_positions: Where a label is predicted; logits are needed here only.
        labels: What is predicted there.
        sentences: Which target a label belongs to, counted from 0.
    """

    input_ids: Int[Tensor, "1 T"]
    packing: Packing
    label_positions: Int[Tensor, " N"]
    labels: Int[Tensor, " N"]
    sentences: Int[Tensor, " N"]

    @property
    def num_sentences(self) -> int:
        """Targets in the row."""
        return sum(len(group.target_lengths) for group in self.packing.groups)

    def weights(self, reduction: str, num_sentences: int, num_tokens: int) -> Float[Tensor, " N"]:
        """Each label's weight in the loss.

        Args:
            reduction: `sentence`: a target's losses are summed, and targets averaged; `token`: tokens are averaged.
            num_sentences: Targets of the whole optimizer step.
            num_tokens: Labels of the whole optimizer step.
        """
        total = num_sentences if reduction == "sentence" else num_tokens
        return torch.full((len(self.labels),), 1.0 / total)


def encode_prompt(backbone: Backbone, text_format: TextFormat, source: str) -> list[int]:
    """Token ids of the text before the target."""
    return backbone.encode(text_format.format_prompt(source, backbone.separator))


def encode_examples(
    backbone: Backbone,
    examples: Sequence[Example],
    text_format: TextFormat,
    *,
    prefix_length: int,
    max_length: int = 0,
    on_too_long: str = "cut",
) -> Encoding:
    """Turn examples into token ids, cutting sources that do not fit; targets are never cut.

    Args:
        backbone: Whose tokenizer and positions count.
        examples: With at least one target each.
        text_format: The text around source and target.
        prefix_length: P; the prefix takes as many of the backbone's positions.
        max_length: Positions of source and target together; 0: what the backbone allows.
        on_too_long: `cut` the source from its end, or raise an `error`.

    Raises:
        DataError: No example, one without a target, a target longer than the limit, or a too long example where
            cutting is not wanted.
    """
    if not examples:
        raise DataError("there is no example to train on.", hint="check the file and `limit`.")
    limit = _limit(backbone, prefix_length, max_length)
    prompts = _encode_many(backbone, [text_format.format_prompt(e.source, backbone.separator) for e in examples])
    flat = _encode_many(backbone, [text_format.format_target(t) for e in examples for t in e.targets])
    ending = text_format.prompt.split("{source}", 1)[1].replace("{separator}", backbone.separator)
    kept_ending = len(backbone.encode(ending))
    encoded, cut, place = [], 0, 0
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        targets = tuple((*ids, backbone.end_id) for ids in flat[place : place + len(example.targets)])
        place += len(targets)
        if not targets:
            raise DataError(
                f"example {number + 1} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )
        room = limit - max(len(target) for target in targets)
        if room < kept_ending + 1:
            raise DataError(
                f"a target of example {number + 1} ({example.source[:60]!r}) takes "
                f"{max(map(len, targets))} tokens, but only {limit} positions are there for source and target.",
                hint="shorten it or raise max_length; targets are never cut.",
            )
        if len(prompt) > room:
            if on_too_long == "error":
                raise DataError(
                    f"example {number + 1} ({example.source[:60]!r}) takes {len(prompt)} tokens and its longest target "
                    f"{max(map(len, targets))}, but {limit} positions are allowed.",
                    hint="raise max_length, or let on_too_long = 'cut' shorten the source.",
                )
            cut += 1
            prompt = prompt[: room - kept_ending] + prompt[len(prompt) - kept_ending :]
        encoded.append(Encoded(tuple(prompt), targets))
    return Encoding(tuple(encoded), cut)


def _limit(backbone: Backbone, prefix_length: int, max_length: int) -> int:
    """Positions for source and target together."""
    allowed = backbone.max_positions
    if allowed is None:
        return max_length or 1 << 30
    if allowed - prefix_length < 2:
        raise DataError(
            f"a prefix of {prefix_length} leaves no room in the {allowed} positions of {backbone.name!r}.",
            hint="choose a shorter prefix_length.",
        )
    return min(max_length or allowed, allowed - prefix_length)


def _encode_many(backbone: Backbone, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = backbone.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def pack(examples: Sequence[Encoded]) -> Batch:
    """Lay examples into one row.

    The first token of a target is predicted from the last token of its source; so that token opens every target
    instead of closing the source.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    ids: list[int] = []
    groups: list[Group] = []
    positions: list[int] = []
    labels: list[int] = []
    sentences: list[int] = []
    sentence = 0
    for example in examples:
        if not example.prompt:
            raise DataError(
                "an empty prompt cannot predict a target's first token.", hint="use a prompt format with a separator."
            )
        start = len(ids)
        ids.extend(example.prompt[:-1])
        for target in example.targets:
            positions.extend(range(len(ids), len(ids) + len(target)))
            ids.append(example.prompt[-1])
            ids.extend(target[:-1])
            labels.extend(target)
            sentences.extend([sentence] * len(target))
            sentence += 1
        groups.append(Group(start, len(example.prompt) - 1, tuple(map(len, example.targets))))
    return Batch(
        torch.tensor([ids]),
        Packing(tuple(groups)),
        torch.tensor(positions),
        torch.tensor(labels),
        torch.tensor(sentences),
    )


def plan_epoch(
    examples: Sequence[Encoded], *, batch_size: int, targets_per_source: int, seed: int | None, epoch: int = 0
) -> Iterator[list[Encoded]]:
    """One pass over all targets, as lists of examples to `pack`.

    Every target comes once. A source's targets are dealt in hands of at most `targets_per_source`, the hands are
    shuffled, and a batch takes hands until it holds `batch_size` targets. The order depends on seed and epoch alone.

    Args:
        examples: All of them.
        batch_size: Targets per batch.
        targets_per_source: Most targets of one source in a hand.
        seed: None: nothing is shuffled, and hands are full.
        epoch: Which pass.
    """
    order = None if seed is None else random.Random(f"{seed}/{epoch}")
    size = min(batch_size, targets_per_source)
    hands: list[Encoded] = []
    for example in examples:
        targets = list(example.targets)
        if order is not None:
            order.shuffle(targets)
        hands.extend(Encoded(example.prompt, tuple(targets[i : i + size])) for i in range(0, len(targets), size))
    if order is not None:
        order.shuffle(hands)
    batch: list[Encoded] = []
    room = batch_size
    for hand in hands:
        if len(hand.targets) > room:
            # Fill the batch up with a part of the hand; the rest opens the next one.
            if room:
                batch.append(Encoded(hand.prompt, hand.targets[:room]))
            yield batch
            hand, batch, room = Encoded(hand.prompt, hand.targets[room:]), [], batch_size
        batch.append(hand)
        room -= len(hand.targets)
    if batch:
        yield batch
