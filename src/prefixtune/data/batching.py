"""Examples -> batches: tokens, the structure of who sees whom, and which positions carry a loss.

A step's examples stand in one row. A source stands there once, followed by its targets; each target sees the source and
itself, and its positions go on where the source ends. For a causal model this equals one padded row per pair, since a
source never sees its target; it only computes less. In an encoder-decoder the sources stand in the encoder's row, the
targets in the decoder's, and a source's targets share what the encoder made of it.

Models that cannot be packed (state-space layers mix all positions of a row) get padded rows.

Knows the tokenizer through the backbone, and of a prefix its text format; knows nothing of losses or optimizers.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from prefixtune.attention.packing import Group, Packing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import ConfigError, DataError

__all__ = ["collate", "epoch_batches", "join", "pack", "pack_pairs", "pad"]


def collate(backbone: Backbone, examples: Sequence[TokenizedExample]) -> Batch:
    """Lay examples into the batch that suits the model: packed where it can be, padded otherwise.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    if examples[0].label_positions is not None:
        return _collate_labelled(backbone, examples)
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    if not backbone.layout.packable:
        return pad(examples, pad_id=backbone.pad_id, decoder_start_id=start)
    return pack(examples) if start is None else pack_pairs(examples, decoder_start_id=start)


def _collate_labelled(backbone: Backbone, examples: Sequence[TokenizedExample]) -> Batch:
    """Sources with labels at some of their positions, for a head."""
    if backbone.layout.packable and backbone.kind == "decoder":
        starts = [0, *itertools.accumulate(len(example.prompt) for example in examples)]
        groups = [Group(start, len(e.prompt), ()) for start, e in zip(starts, examples, strict=False)]
        ids = torch.tensor([[token for example in examples for token in example.prompt]])
        mask, packing = None, Packing(tuple(groups))
    else:
        ids, mask = _pad_rows([example.prompt for example in examples], backbone.pad_id)
        starts, packing = [number * ids.shape[1] for number in range(len(examples))], None
    pairs = list(zip(starts, examples, strict=False))
    return Batch(
        ids,
        torch.tensor([start + place for start, example in pairs for place in example.label_positions or ()]),
        torch.tensor([label for example in examples for label in example.targets[0]]),
        torch.tensor([number for number, example in enumerate(examples) for _ in example.targets[0]]),
        packing,
        attention_mask=mask,
        labelled=True,
    )


def _check_prompts(examples: Sequence[TokenizedExample]) -> None:
    if not all(example.prompt for example in examples):
        raise DataError(
            "an empty prompt cannot predict a target's first token.", hint="use a prompt format with a separator."
        )


def pack(examples: Sequence[TokenizedExample]) -> Batch:
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
    _check_prompts(examples)
    for example in examples:
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
        torch.tensor(positions),
        torch.tensor(labels),
        torch.tensor(sentences),
        Packing(tuple(groups)),
    )


def pack_pairs(examples: Sequence[TokenizedExample], *, decoder_start_id: int) -> Batch:
    """Lay examples into two rows: the sources for the encoder, the targets for the decoder.

    Every position of the decoder's row predicts a label.

    Args:
        examples: Sources and their targets.
        decoder_start_id: What the decoder reads before a target's first token.

    Raises:
        DataError: A source has no token.
    """
    _check_prompts(examples)
    ids = [token for example in examples for token in example.prompt]
    targets = [target for example in examples for target in example.targets]
    groups: list[Group] = []
    for example in examples:
        start = groups[-1].stop if groups else 0
        groups.append(Group(start, 0, tuple(map(len, example.targets))))
    labels = [token for target in targets for token in target]
    return Batch(
        torch.tensor([ids]),
        torch.arange(len(labels)),
        torch.tensor(labels),
        torch.tensor([number for number, target in enumerate(targets) for _ in target]),
        Packing(tuple(groups), tuple(len(example.prompt) for example in examples)),
        decoder_input_ids=torch.tensor([[token for target in targets for token in (decoder_start_id, *target[:-1])]]),
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Lay packed rows side by side as one, in which each of them has a prefix of its own.

    Args:
        batches: Packed, of one kind. The groups of the first have the first prefix in front, and so on.

    Raises:
        ConfigError: One of them is padded, or for a head.
    """
    if any(batch.packing is None or batch.labelled for batch in batches):
        raise ConfigError("only packed rows that predict tokens stand side by side.", hint="run them one by one.")
    groups: list[Group] = []
    sources: list[int] = []
    owners: list[int] = []
    positions: list[Tensor] = []
    sentences: list[Tensor] = []
    width = count = 0
    for number, batch in enumerate(batches):
        packing = batch.packing or Packing(())
        groups.extend(dataclasses.replace(group, start=group.start + width) for group in packing.groups)
        sources.extend(packing.sources or ())
        owners.extend([number] * len(packing.groups))
        positions.append(batch.label_positions + width)
        sentences.append(batch.target_index + count)
        width, count = width + batch.width, count + batch.num_targets
    rows = [batch.decoder_input_ids for batch in batches if batch.decoder_input_ids is not None]
    return Batch(
        torch.cat([batch.input_ids for batch in batches], dim=1),
        torch.cat(positions),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(sentences),
        Packing(tuple(groups), tuple(sources) if rows else None, tuple(owners)),
        decoder_input_ids=torch.cat(rows, dim=1) if rows else None,
    )


def pad(examples: Sequence[TokenizedExample], *, pad_id: int, decoder_start_id: int | None = None) -> Batch:
    """One row per target, padded on the right; for an encoder-decoder, one source row per example besides.

    Args:
        examples: Sources and their targets.
        pad_id: What padding is filled with.
        decoder_start_id: Encoder-decoder: what the decoder reads before a target's first token; None: a decoder-only
            model.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    _check_prompts(examples)
    pairs = [(example.prompt, target) for example in examples for target in example.targets]
    if decoder_start_id is None:
        rows = [(*prompt, *target[:-1]) for prompt, target in pairs]
        firsts = [len(prompt) - 1 for prompt, _ in pairs]
    else:
        rows = [(decoder_start_id, *target[:-1]) for _, target in pairs]
        firsts = [0] * len(pairs)
    ids, mask = _pad_rows(rows, pad_id)
    width = ids.shape[1]
    places = [
        number * width + first + n
        for number, ((_, target), first) in enumerate(zip(pairs, firsts, strict=True))
        for n in range(len(target))
    ]
    marks = (
        torch.tensor(places),
        torch.tensor([token for _, target in pairs for token in target]),
        torch.tensor([number for number, (_, target) in enumerate(pairs) for _ in target]),
    )
    if decoder_start_id is None:
        return Batch(ids, *marks, attention_mask=mask)
    sources, source_mask = _pad_rows([example.prompt for example in examples], pad_id)
    owners = torch.tensor([number for number, example in enumerate(examples) for _ in example.targets])
    return Batch(
        sources,
        *marks,
        attention_mask=source_mask,
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        source_rows=owners,
    )


def _pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Token ids padded on the right, and where they are real."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def epoch_batches(
    examples: Sequence[TokenizedExample], *, batch_size: int, targets_per_source: int, seed: int | None, epoch: int = 0
) -> Iterator[list[TokenizedExample]]:
    """One pass over all targets, as lists of examples to `pack`.

    Every target comes once. A source's targets are divided into groups of at most `targets_per_source`, the groups are
    shuffled, and a batch takes groups until it holds `batch_size` targets. The order depends on seed and epoch alone.

    Args:
        examples: All of them.
        batch_size: Targets per batch.
        targets_per_source: Most targets of one source in a group.
        seed: None: nothing is shuffled, and target_groups are full.
        epoch: Which pass.
    """
    order = None if seed is None else random.Random(f"{seed}/{epoch}")
    size = min(batch_size, targets_per_source)
    target_groups: list[TokenizedExample] = []
    for example in examples:
        targets = list(example.targets)
        if order is not None:
            order.shuffle(targets)
        target_groups.extend(
            dataclasses.replace(example, targets=tuple(targets[i : i + size])) for i in range(0, len(targets), size)
        )
    if order is not None:
        order.shuffle(target_groups)
    batch: list[TokenizedExample] = []
    room = batch_size
    for group in target_groups:
        if len(group.targets) > room:
            # Fill the batch up with a part of the group; the rest opens the next one.
            if room:
                batch.append(dataclasses.replace(group, targets=group.targets[:room]))
            yield batch
            group, batch, room = dataclasses.replace(group, targets=group.targets[room:]), [], batch_size
        batch.append(group)
        room -= len(group.targets)
    if batch:
        yield batch
