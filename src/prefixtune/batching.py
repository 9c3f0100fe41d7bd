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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.backbone import Backbone
from prefixtune.config import TrainConfig, check_names, type_fault
from prefixtune.errors import ConfigError, DataError, RequestError, describe_value
from prefixtune.packing import Group, Packing
from prefixtune.prefix import Prefix
from prefixtune.tasks import Example
from prefixtune.text_format import TextFormat, cut_prompt, fit_ids, read_text_format

__all__ = [
    "Batch",
    "Encoded",
    "Encoding",
    "TextFormatLike",
    "around_lengths",
    "as_text_format",
    "check_texts",
    "collate",
    "default_format",
    "encode_examples",
    "encode_prompts",
    "fit_prompt",
    "format_of",
    "join",
    "pack",
    "pack_pairs",
    "pad",
    "plan_epoch",
    "position_limit",
    "report_cut",
    "training_format",
]


@dataclass(frozen=True)
class Encoded:
    """One source and its targets as token ids; a target's ids end with the end token.

    Where a head is trained, there is one target, of label numbers.

    Attributes:
        prompt: The source's tokens.
        targets: Each target's tokens; or the label numbers.
        places: Where in the prompt each label is predicted; None: the targets are tokens.
    """

    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    places: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Encoding:
    """Encoded examples, how many sources had to be cut to fit, and the tokens of the longest prompt that was not."""

    examples: tuple[Encoded, ...]
    num_cut: int
    longest_prompt: int = 0

    @property
    def num_targets(self) -> int:
        """Targets over all examples."""
        return sum(len(example.targets) for example in self.examples)

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target; 0 where labels are predicted."""
        rows = (example.targets for example in self.examples if example.places is None)
        return max((len(target) for targets in rows for target in targets), default=0)


@dataclass(frozen=True)
class Batch:
    """One packed row, or padded rows.

    Attributes:
        input_ids: The tokens; of an encoder-decoder, the sources.
        label_positions: Where a label is predicted, counted through all rows of logits; logits are needed here only.
        labels: What is predicted there.
        sentences: Which target a label belongs to, counted from 0.
        packing: Who sees whom in a packed row; None: rows are padded.
        attention_mask: Padded rows only: 1 where a token is real.
        decoder_input_ids: Encoder-decoder only: what the decoder reads.
        decoder_attention_mask: Padded rows of an encoder-decoder only.
        source_rows: Padded rows of an encoder-decoder only: which source each target looks at.
        labelled: The labels are those of a head, not tokens.
    """

    input_ids: Int[Tensor, "R T"]
    label_positions: Int[Tensor, " N"]
    labels: Int[Tensor, " N"]
    sentences: Int[Tensor, " N"]
    packing: Packing | None = None
    attention_mask: Int[Tensor, "R T"] | None = None
    decoder_input_ids: Int[Tensor, "Rd Td"] | None = None
    decoder_attention_mask: Int[Tensor, "Rd Td"] | None = None
    source_rows: Int[Tensor, " Rd"] | None = None
    labelled: bool = False

    @property
    def num_sentences(self) -> int:
        """Targets in the batch."""
        return int(self.sentences[-1]) + 1

    @property
    def width(self) -> int:
        """Positions of a row of logits."""
        ids = self.input_ids if self.decoder_input_ids is None else self.decoder_input_ids
        return int(ids.shape[1])

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The arguments of `Backbone.forward`, on a device."""
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "source_rows")
        given = {name: getattr(self, name) for name in names}
        tensors = {name: value.to(device) for name, value in given.items() if value is not None}
        return {**tensors, "packing": self.packing}

    def weights(self, reduction: str, num_sentences: int, num_tokens: int) -> Float[Tensor, " N"]:
        """Each label's weight in the loss.

        Args:
            reduction: `sentence`: a target's losses are summed, and targets averaged; `token`: tokens are averaged.
            num_sentences: Targets of the whole optimizer step.
            num_tokens: Labels of the whole optimizer step.
        """
        total = num_sentences if reduction == "sentence" else num_tokens
        return torch.full((len(self.labels),), 1.0 / total)


def default_format(backbone: Backbone, *, for_head: bool = False) -> TextFormat:
    """The text around source and target that suits a kind of model.

    A decoder-only model reads both in one text, with a separator between (the authors' format); an encoder reads the
    source as it is, within the tokenizer's own special tokens. For a head a decoder-only model reads the source alone:
    what it holds at a separator says little of the text before.
    """
    if for_head and backbone.kind == "decoder":
        return TextFormat(" {source}", "{target}")
    return TextFormat() if backbone.kind == "decoder" else TextFormat("{source}", "{target}")


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is no list of strings.

    Raises:
        RequestError: It is none.
    """
    if isinstance(texts, str):
        raise RequestError(f"texts is one string, {texts[:40]!r}, not a list of them.", hint="write [text].")
    if isinstance(texts, Mapping) or not (hasattr(texts, "__len__") and hasattr(texts, "__iter__")):
        raise RequestError(f"texts is {describe_value(texts)}, not a list of strings.", hint="write [text].")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise RequestError(f"text {number} is {describe_value(text)}, not a string.", hint="write a list of texts.")


TextFormatLike = TextFormat | Mapping[str, Any]
"""What stands for a text format: itself, or a dict of its fields."""


def as_text_format(given: TextFormatLike | None) -> TextFormat | None:
    """The text format that a caller means; None: none was given.

    >>> as_text_format({"prompt": "{source} ="}).prompt
    '{source} ='

    Raises:
        ConfigError: It is neither a `TextFormat` nor a dict of its fields.
        DataError: A template lacks its text.
    """
    hint = 'write {"prompt": "{source} =", "target": " {target}"}, say.'
    if given is None or isinstance(given, TextFormat):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"text_format is {describe_value(given)}, but must be a TextFormat or a dict.", hint=hint)
    check_names(TextFormat, given, "text_format has unknown keys", hint)
    for name, value in given.items():
        if fault := type_fault(f"text_format.{name}", value, type(getattr(TextFormat, name))):
            raise ConfigError(f"{fault}.", hint=hint)
    return TextFormat(**given)


def format_of(backbone: Backbone, prefix: Prefix | None, given: TextFormat | None = None) -> TextFormat:
    """The text format of a request: as asked for, else the prefix's, else what suits the backbone.

    Raises:
        CheckpointError: That in the prefix's header cannot be used.
    """
    stored = None if prefix is None or given is not None else read_text_format(prefix.header)
    return given or stored or default_format(backbone)


def training_format(config: TrainConfig, backbone: Backbone, *, for_head: bool = False) -> TextFormat:
    """The text format of a training run, as its header stores it.

    Raises:
        DataError: A template is one that no header may hold.
    """
    usual = default_format(backbone, for_head=for_head)
    made = TextFormat(
        config.prompt_format or usual.prompt,
        config.target_format or usual.target,
        backbone.separator,
        backbone.end,
        config.source,
        config.target,
        config.max_length,
        config.on_too_long,
    )
    made.check_stored()
    return made


def encode_prompts(backbone: Backbone, text_format: TextFormat, sources: Sequence[str]) -> list[list[int]]:
    """Token ids of what stands before the targets, or of what an encoder reads."""
    return backbone.encode_sources([text_format.format_prompt(source, backbone.separator) for source in sources])


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
        max_length: Positions of source and target together (of each, for an encoder-decoder); 0: what the backbone
            allows.
        on_too_long: `cut` the source from its end, or raise an `error`.

    Raises:
        DataError: No example, one without a target, a target longer than the limit, or a too long example where
            cutting is not wanted.
    """
    if not examples:
        raise DataError("there is no example to train on.", hint="check the file and `limit`.")
    for number, example in enumerate(examples):
        if not example.targets:
            raise DataError(
                f"example {number + 1} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )
    limit = position_limit(backbone, prefix_length, max_length)
    prompts = encode_prompts(backbone, text_format, [example.source for example in examples])
    flat = backbone.encode_targets([text_format.format_target(t) for example in examples for t in example.targets])
    before, after = around_lengths(backbone, text_format)
    apart = backbone.kind == "encoder-decoder"
    encoded, cut, place, longest_prompt = [], 0, 0, 0
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        targets = tuple(tuple(ids) for ids in flat[place : place + len(example.targets)])
        place += len(targets)
        longest = max(len(target) for target in targets)
        room = limit if apart else limit - longest
        if longest > limit or (len(prompt) > room and room <= before + after):
            raise DataError(
                f"a target of example {number + 1} ({example.source[:60]!r}) takes {longest} tokens, but only {limit} "
                f"positions are there for {'it' if apart else 'source and target'}, and the text around a source takes "
                f"{before + after}.",
                hint="shorten it or raise max_length; targets are never cut.",
            )
        if len(prompt) > room:
            if on_too_long == "error":
                raise DataError(
                    f"example {number + 1} ({example.source[:60]!r}) takes {len(prompt)} tokens and its longest target "
                    f"{longest}, but {limit} positions are allowed.",
                    hint="raise max_length, or let on_too_long = 'cut' shorten the source.",
                )
            cut += 1
            prompt = cut_prompt(prompt, room, after)
        else:
            longest_prompt = max(longest_prompt, len(prompt))
        encoded.append(Encoded(tuple(prompt), targets))
    return Encoding(tuple(encoded), cut, longest_prompt)


def around_lengths(backbone: Backbone, text_format: TextFormat) -> tuple[int, int]:
    """Tokens before and after a prompt's source: what the format puts there, and special tokens.

    A cut leaves them, and is refused where it would leave nothing else.
    """
    before, after = (len(backbone.encode(text)) for text in text_format.around(backbone.separator))
    if backbone.kind != "decoder":
        special = set(backbone.tokenizer.all_special_ids)
        ids = backbone.encode_sources(["a"])[0]
        before, after = (
            count + next((n for n, token in enumerate(row) if token not in special), 0)
            for count, row in ((before, ids), (after, ids[::-1]))
        )
    return before, after


def fit_prompt(
    backbone: Backbone,
    text_format: TextFormat,
    prompt: Sequence[int],
    *,
    prefix_length: int,
    new_tokens: int,
    positions: int | None = None,
    name: str = "the text",
) -> list[int]:
    """A prompt's tokens, with a source that is too long treated as in training.

    One that does not fit the backbone is left as it is where its format says `error`: whoever computes it refuses it.

    Args:
        backbone: Whose tokenizer and positions count.
        text_format: Says what becomes of long sources, and how long they may be.
        prompt: As `encode_prompts` makes it.
        prefix_length: P; the prefix takes as many of a decoder-only backbone's positions.
        new_tokens: Most tokens that are to be generated.
        positions: Of the whole, the prefix included; None: the backbone's.
        name: What to call the text, in messages.

    Raises:
        RequestError: It is longer than the training allowed, and is not to be cut; or nothing of its source would stay.
    """
    whole = backbone.max_positions if positions is None else positions
    return fit_ids(
        text_format,
        prompt,
        positions=None if whole is None else whole - backbone.taken_positions(prefix_length),
        new_tokens=new_tokens,
        around=lambda: around_lengths(backbone, text_format),
        apart=backbone.kind == "encoder-decoder",
        name=name,
    )


def report_cut(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], on_cut: Callable[[Sequence[int]], None] | None
) -> None:
    """Tell which prompts were cut, counted from 0; by a warning where nobody listens."""
    cut = [number for number, (whole, ids) in enumerate(zip(before, after, strict=True)) if len(ids) < len(whole)]
    if cut and on_cut is not None:
        on_cut(cut)
    elif cut:
        # To whoever called `generate` or `classify`.
        warnings.warn(f"{len(cut)} of {len(after)} sources were cut to fit (on_too_long is 'cut').", stacklevel=4)


def position_limit(backbone: Backbone, prefix_length: int, max_length: int) -> int:
    """Positions for source and target together."""
    allowed = backbone.max_positions
    if allowed is None:
        return max_length or 1 << 30
    taken = backbone.taken_positions(prefix_length)
    if allowed - taken < 2:
        raise DataError(
            f"a prefix of {prefix_length} leaves no room in the {allowed} positions of {backbone.name!r}.",
            hint="choose a shorter prefix_length.",
        )
    return min(max_length or allowed, allowed - taken)


def collate(backbone: Backbone, examples: Sequence[Encoded]) -> Batch:
    """Lay examples into the batch that suits the model: packed where it can be, padded otherwise.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    if examples[0].places is not None:
        return _collate_labelled(backbone, examples)
    start = backbone.start_id if backbone.kind == "encoder-decoder" else None
    if not backbone.layout.packable:
        return pad(examples, pad_id=backbone.pad_id, start_id=start)
    return pack(examples) if start is None else pack_pairs(examples, start_id=start)


def _collate_labelled(backbone: Backbone, examples: Sequence[Encoded]) -> Batch:
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
        torch.tensor([start + place for start, example in pairs for place in example.places or ()]),
        torch.tensor([label for example in examples for label in example.targets[0]]),
        torch.tensor([number for number, example in enumerate(examples) for _ in example.targets[0]]),
        packing,
        attention_mask=mask,
        labelled=True,
    )


def _check_prompts(examples: Sequence[Encoded]) -> None:
    if not all(example.prompt for example in examples):
        raise DataError(
            "an empty prompt cannot predict a target's first token.", hint="use a prompt format with a separator."
        )


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


def pack_pairs(examples: Sequence[Encoded], *, start_id: int) -> Batch:
    """Lay examples into two rows: the sources for the encoder, the targets for the decoder.

    Every position of the decoder's row predicts a label.

    Args:
        examples: Sources and their targets.
        start_id: What the decoder reads before a target's first token.

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
        decoder_input_ids=torch.tensor([[token for target in targets for token in (start_id, *target[:-1])]]),
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
        sentences.append(batch.sentences + count)
        width, count = width + batch.width, count + batch.num_sentences
    rows = [batch.decoder_input_ids for batch in batches if batch.decoder_input_ids is not None]
    return Batch(
        torch.cat([batch.input_ids for batch in batches], dim=1),
        torch.cat(positions),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(sentences),
        Packing(tuple(groups), tuple(sources) if rows else None, tuple(owners)),
        decoder_input_ids=torch.cat(rows, dim=1) if rows else None,
    )


def pad(examples: Sequence[Encoded], *, pad_id: int, start_id: int | None = None) -> Batch:
    """One row per target, padded on the right; for an encoder-decoder, one source row per example besides.

    Args:
        examples: Sources and their targets.
        pad_id: What padding is filled with.
        start_id: Encoder-decoder: what the decoder reads before a target's first token; None: a decoder-only model.

    Raises:
        DataError: A prompt is empty: nothing would predict the first token.
    """
    _check_prompts(examples)
    pairs = [(example.prompt, target) for example in examples for target in example.targets]
    if start_id is None:
        rows = [(*prompt, *target[:-1]) for prompt, target in pairs]
        firsts = [len(prompt) - 1 for prompt, _ in pairs]
    else:
        rows = [(start_id, *target[:-1]) for _, target in pairs]
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
    if start_id is None:
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
        hands.extend(
            dataclasses.replace(example, targets=tuple(targets[i : i + size])) for i in range(0, len(targets), size)
        )
    if order is not None:
        order.shuffle(hands)
    batch: list[Encoded] = []
    room = batch_size
    for hand in hands:
        if len(hand.targets) > room:
            # Fill the batch up with a part of the hand; the rest opens the next one.
            if room:
                batch.append(dataclasses.replace(hand, targets=hand.targets[:room]))
            yield batch
            hand, batch, room = dataclasses.replace(hand, targets=hand.targets[room:]), [], batch_size
        batch.append(hand)
        room -= len(hand.targets)
    if batch:
        yield batch
