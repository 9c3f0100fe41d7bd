"""Tokenized examples -> batches: the token ids, which token attends to which, and where each label is predicted.

All examples of a step share one packed row. A source appears once, followed by its targets; each target attends to the
source and to itself, and its positions continue from the end of the source. For a causal model this equals one padded
row per pair of source and target, because a source never attends to its target; packing only computes less. A
conversation is one such target, of which the assistant's turns are labels: each turn sees what was before it. For an
encoder-decoder the sources are in the encoder's row and the targets in the decoder's, and all targets of a source share
its encoder states.

Models that cannot be packed (state-space layers mix all positions of a row) get padded rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from prefixtune.attention.packing import Group, Packing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.soft_labels import SoftLabels
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import ConfigError, DataError

__all__ = ["collate", "divide", "join", "pack", "pad"]


def collate(backbone: Backbone, examples: Sequence[TokenizedExample]) -> Batch:
    """Make the batch that suits the model: packed if the model can be packed, padded otherwise.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    if examples[0].label_positions is not None:
        return _collate_labelled(backbone, examples)
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    if backbone.layout.packable:
        return pack(examples, decoder_start_id=start)
    return pad(examples, pad_id=backbone.pad_id, decoder_start_id=start)


def divide(examples: Sequence[TokenizedExample], most_positions: int) -> list[list[TokenizedExample]]:
    """Divide the examples of a batch, in their order, into parts of about the same size, to be computed one by one.

    Args:
        examples: A batch.
        most_positions: Tokens of a part, at most, unless a single example has more; 0: nothing is divided.
    """
    sizes = [len(example.prompt) + sum(map(len, example.targets)) for example in examples]
    if not most_positions or sum(sizes) <= most_positions:
        return [list(examples)]
    room = sum(sizes) / -(-sum(sizes) // most_positions)
    parts: list[list[TokenizedExample]] = []
    left = 0.0
    for example, size in zip(examples, sizes, strict=True):
        if not parts or size > left:
            parts.append([])
            left = room
        parts[-1].append(example)
        left -= size
    return parts


def _collate_labelled(backbone: Backbone, examples: Sequence[TokenizedExample]) -> Batch:
    """Sources with labels at some of their positions, for a head."""
    prompts = [example.prompt for example in examples]
    packing = mask = None
    if backbone.layout.packable and backbone.kind == "decoder":
        starts = list(itertools.accumulate(map(len, prompts[:-1]), initial=0))
        ids = torch.tensor([[token for prompt in prompts for token in prompt]])
        packing = Packing(
            tuple(
                Group(start, len(example.prompt), (), example.hidden)
                for start, example in zip(starts, examples, strict=True)
            )
        )
    else:
        ids, mask = _pad_rows(prompts, backbone.pad_id)
        starts = [row * ids.shape[1] for row in range(len(prompts))]
    label_positions = [
        start + position
        for start, example in zip(starts, examples, strict=True)
        for position in example.label_positions or ()
    ]
    return Batch(
        ids,
        torch.tensor(label_positions),
        *_labels(examples),
        packing,
        attention_mask=mask,
        labelled=True,
        visible_lengths=_one_length(examples),
        hidden=None if packing is not None else _hidden_rows([example.hidden for example in examples]),
    )


def pack(examples: Sequence[TokenizedExample], *, decoder_start_id: int | None = None) -> Batch:
    """Pack examples into one row; for an encoder-decoder, into one row of sources and one of targets.

    Each target begins with an opening token, from which its first token is predicted: the last token of its source for
    a decoder-only model (so that token opens every target instead of ending the source), `decoder_start_id` for an
    encoder-decoder.

    Args:
        examples: Sources and their targets.
        decoder_start_id: Encoder-decoder: what the decoder reads before a target's first token; None: a decoder-only
            model.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    _check_prompts(examples)
    ids: list[int] = []
    groups: list[Group] = []
    label_positions: list[int] = []
    for example in examples:
        if decoder_start_id is None:
            shared, opening = example.prompt[:-1], example.prompt[-1]
        else:
            shared, opening = (), decoder_start_id
        groups.append(Group(len(ids), len(shared), tuple(map(len, example.targets)), example.hidden))
        ids.extend(shared)
        for target, spans in zip(example.targets, example.label_spans(), strict=True):
            label_positions.extend(len(ids) + offset for first, stop in spans for offset in range(first, stop))
            ids.extend((opening, *target[:-1]))
    labels = (torch.tensor(label_positions), *_labels(examples))
    soft_labels = _soft_labels(examples)
    lengths, prefix_index = _visible_lengths(examples)
    if decoder_start_id is None:
        packing = Packing(tuple(groups), None, prefix_index)
        return Batch(torch.tensor([ids]), *labels, packing, visible_lengths=lengths, soft_labels=soft_labels)
    sources = torch.tensor([[token for example in examples for token in example.prompt]])
    packing = Packing(tuple(groups), tuple(len(example.prompt) for example in examples), prefix_index)
    return Batch(
        sources,
        *labels,
        packing,
        decoder_input_ids=torch.tensor([ids]),
        visible_lengths=lengths,
        soft_labels=soft_labels,
    )


def pad(examples: Sequence[TokenizedExample], *, pad_id: int, decoder_start_id: int | None = None) -> Batch:
    """One row per target, padded on the right; for an encoder-decoder, also one row per source.

    Args:
        examples: Sources and their targets.
        pad_id: The padding token.
        decoder_start_id: As in `pack`.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    _check_prompts(examples)
    # What the decoder reads before a target's first label is predicted from its last token.
    pairs = [
        (example.prompt if decoder_start_id is None else (decoder_start_id,), target, spans)
        for example in examples
        for target, spans in zip(example.targets, example.label_spans(), strict=True)
    ]
    ids, mask = _pad_rows([(*context, *target[:-1]) for context, target, _ in pairs], pad_id)
    width = ids.shape[1]
    label_positions = [
        row * width + len(context) - 1 + offset
        for row, (context, _, spans) in enumerate(pairs)
        for first, stop in spans
        for offset in range(first, stop)
    ]
    labels = (torch.tensor(label_positions), *_labels(examples))
    soft_labels = _soft_labels(examples)
    lengths = _one_length(examples)
    if decoder_start_id is None:
        hidden = _hidden_rows([example.hidden for example in examples for _ in example.targets])
        return Batch(ids, *labels, attention_mask=mask, visible_lengths=lengths, hidden=hidden, soft_labels=soft_labels)
    sources, source_mask = _pad_rows([example.prompt for example in examples], pad_id)
    return Batch(
        sources,
        *labels,
        attention_mask=source_mask,
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        source_rows=torch.tensor([row for row, example in enumerate(examples) for _ in example.targets]),
        visible_lengths=lengths,
        hidden=_hidden_rows([example.hidden for example in examples]),
        soft_labels=soft_labels,
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenate packed rows into one row, in which each of them keeps a prefix of its own.

    Args:
        batches: Packed, of one kind. The groups of the first batch attend to the first prefix, and so on; a batch whose
            groups have several prefixes takes as many.

    Raises:
        ConfigError: One of them is padded, or for a head.
    """
    if any(batch.packing is None or batch.labelled for batch in batches):
        raise ConfigError("only packed rows that predict tokens can be joined.", hint="run the batches one by one.")
    groups: list[Group] = []
    sources: list[int] = []
    prefix_index: list[int] = []
    label_positions: list[Tensor] = []
    target_index: list[Tensor] = []
    width = num_targets = 0
    num_prefixes = 0
    for batch in batches:
        packing = batch.packing or Packing(())
        groups.extend(dataclasses.replace(group, start=group.start + width) for group in packing.groups)
        sources.extend(packing.sources or ())
        own_index = packing.prefix_index or (0,) * len(packing.groups)
        prefix_index.extend(num_prefixes + index for index in own_index)
        num_prefixes += batch.num_prefixes
        label_positions.append(batch.label_positions + width)
        target_index.append(batch.target_index + num_targets)
        width, num_targets = width + batch.width, num_targets + batch.num_targets
    decoder_rows = [batch.decoder_input_ids for batch in batches if batch.decoder_input_ids is not None]
    return Batch(
        torch.cat([batch.input_ids for batch in batches], dim=1),
        torch.cat(label_positions),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(target_index),
        Packing(tuple(groups), tuple(sources) if decoder_rows else None, tuple(prefix_index)),
        decoder_input_ids=torch.cat(decoder_rows, dim=1) if decoder_rows else None,
        soft_labels=_join_soft_labels([batch.soft_labels for batch in batches], [batch.labels for batch in batches]),
    )


def _labels(examples: Sequence[TokenizedExample]) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """All labels in order, and which target each belongs to; each turn of a conversation is one."""
    labels = [
        target[first:stop]
        for example in examples
        for target, spans in zip(example.targets, example.label_spans(), strict=True)
        for first, stop in spans
    ]
    return (
        torch.tensor([label for ids in labels for label in ids]),
        torch.tensor([index for index, ids in enumerate(labels) for _ in ids]),
    )


def _visible_lengths(
    examples: Sequence[TokenizedExample],
) -> tuple[tuple[int | None, ...], tuple[int, ...] | None]:
    """The different lengths of the prefix in a packed row, and which of them is in front of each group.

    Where all groups have the same, there is no index; where that is the whole prefix, no length either.
    """
    lengths = tuple(dict.fromkeys(example.visible_length for example in examples))
    if len(lengths) == 1:
        return (() if lengths[0] is None else lengths), None
    return lengths, tuple(lengths.index(example.visible_length) for example in examples)


def _one_length(examples: Sequence[TokenizedExample]) -> tuple[int | None, ...]:
    """The length of the prefix of a batch with one prefix.

    Raises:
        ConfigError: The examples have several.
    """
    lengths, prefix_index = _visible_lengths(examples)
    if prefix_index is not None:
        raise ConfigError("padded rows and heads have one length of the prefix.", hint="give all examples the same.")
    return lengths


def _soft_labels(examples: Sequence[TokenizedExample]) -> SoftLabels | None:
    """The teacher's distribution at every label; None: no example has one."""
    soft = [SoftLabels.cat(example.soft_targets) if example.soft_targets else None for example in examples]
    return _join_soft_labels(soft, [_labels([example])[0] for example in examples])


def _join_soft_labels(parts: Sequence[SoftLabels | None], labels: Sequence[Int[Tensor, " _N"]]) -> SoftLabels | None:
    """One after the other; where some parts have none, their labels are certain. None: no part has any."""
    sizes = {part.k for part in parts if part is not None}
    if not sizes:
        return None
    return SoftLabels.cat(
        [
            SoftLabels.from_labels(own, max(sizes)) if part is None else part
            for part, own in zip(parts, labels, strict=True)
        ]
    )


def _pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Token ids padded on the right, and their mask: 1 where a token is real."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _hidden_rows(hidden: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...] | None:
    """What each row does not see of the prefix; None: every row sees all."""
    return tuple(hidden) if any(hidden) else None


def _check_prompts(examples: Sequence[TokenizedExample]) -> None:
    if not all(example.prompt for example in examples):
        raise DataError(
            "an empty prompt cannot predict a target's first token.", hint="use a prompt format with a separator."
        )
