"""Tokenized examples -> batches: the token ids, which token attends to which, and where each label is predicted.

All examples of a step share one packed row. A source appears once, followed by its targets; each target attends to the
source and to itself, and its positions continue from the end of the source. For a causal model this equals one padded
row per pair of source and target, because a source never attends to its target; packing only computes less. A
conversation is one such target. The assistant's turns are its labels: each turn sees what was before it. Sources that
begin alike, as with a chat template, may share that beginning in the same way: it becomes the source, and the rest of
each stands in front of its target. For an encoder-decoder the sources are in the encoder's row and the targets in the
decoder's, and all targets of a source share its encoder states.

Models that cannot be packed (state-space layers mix all positions of a row) get padded rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from prefixtune.attention.packing import Group, Packing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch, Front, SoftLabels
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import ConfigError, DataError

_SCORES_PER_POSITION = 1024
"""How many scores of a layer's attention take as long as the layer's other work on one position, in about."""


def collate(backbone: Backbone, examples: Sequence[TokenizedExample], *, share_beginnings: bool = False) -> Batch:
    """Make the batch that suits the model: packed if the model can be packed, padded otherwise.

    Args:
        backbone: The model.
        examples: Sources and their targets.
        share_beginnings: As in `pack`; without effect on padded rows, for a head, and for an encoder-decoder.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    if examples[0].label_positions is not None:
        return _collate_labelled(backbone, examples)
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    if backbone.layout.packable and not backbone.counts_by_row:
        return pack(examples, decoder_start_id=start, share_beginnings=share_beginnings)
    return pad(examples, pad_id=backbone.pad_id, decoder_start_id=start)


def divide(
    backbone: Backbone,
    examples: Sequence[TokenizedExample],
    most_positions: int,
    *,
    share_beginnings: bool = False,
    front_size: Callable[[Front], int] = lambda front: 0,
) -> list[list[TokenizedExample]]:
    """Divide the examples of a batch, in their order, into parts as large as they may be, to be computed one by one.

    Args:
        backbone: The model.
        examples: A batch.
        most_positions: Tokens of a part, at most, unless a single example has more; 0: nothing is divided.
        share_beginnings: As in `collate`: what is computed once in a part counts once.
        front_size: The positions that each thing in front of some examples counts for, once in a part.
    """
    of_tokens = examples[0].label_positions is None
    share_beginnings = share_beginnings and of_tokens and backbone.kind == "decoder" and backbone.layout.packable
    if not most_positions:
        return [list(examples)]
    parts: list[list[TokenizedExample]] = []
    fronts: set[Front] = set()
    group, left = None, 0
    for example in examples:
        joined = group.join(example) if group is not None and share_beginnings else None
        added = _size(example) if joined is None or group is None else joined.size - group.size
        added += 0 if example.front in fronts else front_size(example.front)
        if not parts or added > left:
            parts.append([])
            fronts = set()
            joined, added, left = None, _size(example) + front_size(example.front), most_positions
        fronts.add(example.front)
        group = joined or _SharedBeginning.of(example)
        parts[-1].append(example)
        left -= added
    return parts


@dataclass(frozen=True)
class _SharedBeginning:
    """Examples, one after the other, whose sources begin alike: the beginning is computed once.

    Attributes:
        examples: They see the same of the prefix, and each has one target, unless it is alone.
        length: Positions of the beginning; of an example alone, of its source without the last.
        size: Positions of all.
    """

    examples: tuple[TokenizedExample, ...]
    length: int
    size: int

    @classmethod
    def of(cls, example: TokenizedExample) -> _SharedBeginning:
        """An example alone."""
        return cls((example,), len(example.prompt) - 1, _size(example))

    def join(self, example: TokenizedExample) -> _SharedBeginning | None:
        """With another example; None: it cannot be, or is no gain: the positions of a group all meet in attention."""
        last = self.examples[-1]
        sees_alike = (last.hidden, last.front) == (example.hidden, example.front)
        if max(len(last.targets), len(example.targets)) > 1 or not sees_alike:
            return None
        pairs = enumerate(zip(last.prompt, example.prompt, strict=False))
        common = next((index for index, (one, other) in pairs if one != other), self.length)
        length = min(self.length, len(example.prompt) - 1, common)
        count = len(self.examples)
        saved_before = self.length * (count - 1)
        saved = length * count - saved_before
        rests = self.size + saved_before - length * count
        if saved <= 0 or 2 * (_size(example) - length) * rests > saved * _SCORES_PER_POSITION:
            return None
        return _SharedBeginning((*self.examples, example), length, self.size + _size(example) - saved)


def _size(example: TokenizedExample) -> int:
    """How many positions an example takes; each target begins with the last token of the source."""
    return len(example.prompt) - 1 + sum(map(len, example.targets))


def _collate_labelled(backbone: Backbone, examples: Sequence[TokenizedExample]) -> Batch:
    """Sources with labels at some of their positions, for a head."""
    prompts = [example.prompt for example in examples]
    packing = mask = hidden = None
    if backbone.layout.packable and backbone.kind == "decoder":
        starts = [0, *itertools.accumulate(map(len, prompts))]
        ids = torch.tensor([[token for prompt in prompts for token in prompt]])
        rows = zip(starts, examples, strict=False)
        packing = Packing(tuple(Group(start, len(one.prompt), (), one.hidden) for start, one in rows))
    else:
        ids, mask = _pad_rows(prompts, backbone.pad_id)
        starts = [row * ids.shape[1] for row in range(len(prompts))]
        hidden = _hidden_rows(examples)
    positions = [start + at for start, one in zip(starts, examples, strict=False) for at in one.label_positions or ()]
    return Batch(
        ids,
        torch.tensor(positions),
        *_labels(examples),
        packing,
        attention_mask=mask,
        labelled=True,
        fronts=_one_front(examples),
        hidden=hidden,
    )


def pack(
    examples: Sequence[TokenizedExample], *, decoder_start_id: int | None = None, share_beginnings: bool = False
) -> Batch:
    """Pack examples into one row; for an encoder-decoder, into one row of sources and one of targets.

    Each target begins with an opening token, from which its first token is predicted: the last token of its source for
    a decoder-only model (so that token opens every target instead of ending the source), `decoder_start_id` for an
    encoder-decoder.

    Args:
        examples: Sources and their targets.
        decoder_start_id: Encoder-decoder: what the decoder reads before a target's first token; None: a decoder-only
            model.
        share_beginnings: Decoder-only: examples that follow one another, see the same of the prefix and begin alike are
            one group, whose source is their common beginning, where that saves more than it costs. The labels and their
            order stay as they are.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    check_prompts(examples)
    apart = decoder_start_id is not None
    ids: list[int] = []
    groups: list[Group] = []
    label_positions: list[int] = []
    shared: list[_SharedBeginning] = []
    for example in examples:
        joined = shared[-1].join(example) if shared and share_beginnings and not apart else None
        if joined is None:
            shared.append(_SharedBeginning.of(example))
        else:
            shared[-1] = joined
    for group in shared:
        start, target_lengths = len(ids), []
        shared_length = 0 if apart else group.length
        ids.extend(group.examples[0].prompt[:shared_length])
        for example in group.examples:
            rest = example.prompt[shared_length:] if decoder_start_id is None else (decoder_start_id,)
            for target, spans in zip(example.targets, example.label_spans(), strict=True):
                first_label = len(ids) + len(rest) - 1
                label_positions.extend(first_label + offset for span in spans for offset in range(*span))
                target_lengths.append(len(rest) - 1 + len(target))
                ids.extend((*rest, *target[:-1]))
        groups.append(Group(start, shared_length, tuple(target_lengths), group.examples[0].hidden))
    fronts, prefix_index = _fronts([group.examples[0] for group in shared])
    sources = tuple(len(example.prompt) for example in examples) if apart else None
    row = torch.tensor([ids])
    return Batch(
        torch.tensor([[token for example in examples for token in example.prompt]]) if apart else row,
        torch.tensor(label_positions),
        *_labels(examples),
        Packing(tuple(groups), sources, prefix_index),
        decoder_input_ids=row if apart else None,
        fronts=fronts,
        soft_labels=_soft_labels(examples),
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
    check_prompts(examples)
    apart = decoder_start_id is not None
    # What the decoder reads before a target's first label is predicted from its last token.
    pairs = [
        (example.prompt if decoder_start_id is None else (decoder_start_id,), target, spans)
        for example in examples
        for target, spans in zip(example.targets, example.label_spans(), strict=True)
    ]
    owners = [row for row, example in enumerate(examples) for _ in example.targets]
    ids, mask = _pad_rows([(*context, *target[:-1]) for context, target, _ in pairs], pad_id)
    label_positions = [
        row * ids.shape[1] + len(context) - 1 + offset
        for row, (context, _, spans) in enumerate(pairs)
        for span in spans
        for offset in range(*span)
    ]
    sources, source_mask = _pad_rows([example.prompt for example in examples], pad_id) if apart else (ids, mask)
    return Batch(
        sources,
        torch.tensor(label_positions),
        *_labels(examples),
        attention_mask=source_mask,
        decoder_input_ids=ids if apart else None,
        decoder_attention_mask=mask if apart else None,
        source_rows=torch.tensor(owners) if apart else None,
        fronts=_one_front(examples),
        hidden=_hidden_rows(examples if apart else [examples[owner] for owner in owners]),
        soft_labels=_soft_labels(examples),
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenate packed rows into one row, in which each of them keeps a prefix of its own.

    Args:
        batches: Packed, of one kind. The groups of the first batch attend to the first prefix, and so on; a batch whose
            groups have several prefixes takes as many.

    Raises:
        ConfigError: One of them is padded, or for a head.
    """
    groups: list[Group] = []
    sources: list[int] = []
    prefix_index: list[int] = []
    label_positions: list[Tensor] = []
    target_index: list[Tensor] = []
    width = num_targets = num_prefixes = 0
    for batch in batches:
        if (packing := batch.packing) is None or batch.labelled:
            raise ConfigError("only packed rows that predict tokens can be joined.", hint="run the batches one by one.")
        groups += [dataclasses.replace(group, start=group.start + width) for group in packing.groups]
        sources += packing.sources or ()
        prefix_index += [num_prefixes + index for index in packing.prefix_index or (0,) * len(packing.groups)]
        label_positions.append(batch.label_positions + width)
        target_index.append(batch.target_index + num_targets)
        num_prefixes += batch.num_prefixes
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


def _fronts(examples: Sequence[TokenizedExample]) -> tuple[tuple[Front, ...], tuple[int, ...] | None]:
    """What stands in front of some group of a packed row, and which of it is in front of each; None: the same."""
    fronts = tuple(dict.fromkeys(example.front for example in examples))
    return fronts, None if len(fronts) == 1 else tuple(fronts.index(example.front) for example in examples)


def _one_front(examples: Sequence[TokenizedExample]) -> tuple[Front, ...]:
    """What is in front of a batch with one prefix.

    Raises:
        ConfigError: The examples have several.
    """
    fronts, prefix_index = _fronts(examples)
    if prefix_index is not None:
        raise ConfigError("padded rows and heads have one prefix in front.", hint="give all examples the same.")
    return fronts


def _soft_labels(examples: Sequence[TokenizedExample]) -> SoftLabels | None:
    """The teacher's distribution at every label; None: no example has one."""
    soft = [SoftLabels.cat(example.soft_targets) if example.soft_targets else None for example in examples]
    return _join_soft_labels(soft, [_labels([example])[0] for example in examples])


def _join_soft_labels(parts: Sequence[SoftLabels | None], labels: Sequence[Int[Tensor, " _N"]]) -> SoftLabels | None:
    """One after the other; where some parts have none, their labels are certain. None: no part has any."""
    sizes = [part.k for part in parts if part is not None]
    pairs = zip(parts, labels, strict=True)
    whole = [SoftLabels.from_labels(own, max(sizes)) if part is None else part for part, own in pairs] if sizes else []
    return SoftLabels.cat(whole) if whole else None


def _pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Token ids padded on the right, and their mask: 1 where a token is real."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _hidden_rows(examples: Sequence[TokenizedExample]) -> tuple[tuple[int, ...], ...] | None:
    """What the row of each example does not see of the prefix; None: every row sees all."""
    hidden = tuple(example.hidden for example in examples)
    return hidden if any(hidden) else None


def check_prompts(examples: Sequence[TokenizedExample]) -> None:
    """Refuse an empty prompt.

    Raises:
        DataError: There is one.
    """
    if not all(example.prompt for example in examples):
        raise DataError("an empty prompt predicts no first token.", hint="use a prompt format with a separator.")
