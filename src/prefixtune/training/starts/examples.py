"""A start from solved training examples: the keys and values that the frozen model computes for them.

An example is its prompt, its first target and the end token, as training reads them. Which examples are used, and so
how long the prefix is, is planned before the data are tokenized, as the prefix takes some of the model's positions.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import encode_pairs
from prefixtune.data.examples import Example
from prefixtune.data.stored_examples import distinct_sources, source_ids
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample, TokenTable
from prefixtune.data.truncation import position_limit
from prefixtune.errors import CheckpointError, ConfigError, DataError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import KeyValue, Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.choice import (
    NUM_DEV_TARGETS,
    SolvedExample,
    choose_best,
    choose_diverse,
    choose_random,
)
from prefixtune.training.starts.compaction import can_move, evenly_spaced, match, moved, take
from prefixtune.training.starts.source import read_init_text
from prefixtune.training.starts.start import Start
from prefixtune.training.starts.words import from_words

__all__ = ["ExamplePlan", "check_example_count", "from_examples", "hide_own_blocks", "plan_examples", "start_from_plan"]


MAX_CANDIDATES = 256
"""Training examples that are looked at to choose from, where more are not asked for."""
UNBOUNDED = 1 << 30
_DECODER_LENGTH = 10
"""P of an encoder-decoder's decoder, where no length is given: its own start is words."""

Rows = Sequence[tuple[int, ...]]
"""Token ids of examples."""


@dataclass(frozen=True)
class ExamplePlan:
    """The examples that a prefix starts from.

    Attributes:
        chosen: In the order of the prefix.
        lengths: Positions of each in the prefix.
        site_lengths: P by site.
        description: What the header says of the start.
        compaction: How examples that take more positions are compacted; empty: none does.
        is_resumed: The start itself is in the state to resume from, and is not computed.
    """

    chosen: tuple[SolvedExample, ...]
    lengths: tuple[int, ...]
    site_lengths: dict[Site, int]
    description: dict[str, Any]
    compaction: str = ""
    is_resumed: bool = False

    @property
    def blocks(self) -> dict[int, tuple[int, int]]:
        """By index of a training example: the positions `[first, stop)` of its block in the prefix."""
        blocks: dict[int, tuple[int, int]] = {}
        first = 0
        for example, length in zip(self.chosen, self.lengths, strict=True):
            blocks[example.index] = (first, first + length)
            first += length
        return blocks


def check_example_count(config: TrainConfig, examples: Sequence[Example]) -> None:
    """Refuse more examples to start from than there are, or none beside it, before a backbone loads.

    Raises:
        ConfigError: There are fewer different sources with a target; or there is only one, which leave-one-out hides.
    """
    if config.initialization != "examples" or not examples:
        return
    available = len(distinct_sources(examples))
    if available == 1 and config.leave_one_out:
        raise ConfigError(
            "every training example is hidden from the whole prefix: there is one training source, and leave_one_out "
            "hides its block, so that nothing would be learned.",
            hint="give more examples, set leave_one_out to false, or start from words.",
        )
    if available < config.init_examples:
        raise ConfigError(
            f"init_examples is {config.init_examples}, but there are {available} training examples with different "
            "sources.",
            hint=f"set init_examples to at most {available}.",
        )


def plan_examples(
    config: TrainConfig,
    backbone: Backbone,
    text_format: TextFormat,
    examples: Sequence[Example],
    dev_examples: Sequence[Example],
    encode: Callable[[Sequence[Example], int], Sequence[TokenizedExample]],
    site_lengths: Mapping[Site, int],
    stored: Mapping[str, Any] | None = None,
) -> ExamplePlan:
    """Choose the examples to start from.

    Args:
        config: The run.
        backbone: The frozen model.
        text_format: That of the run.
        examples: The training examples; labels are words.
        dev_examples: The development examples, for `example_choice` `loss`.
        encode: Examples -> tokens, behind a prefix of a given length at the site `decoder`.
        site_lengths: By site, the most positions that the run gives it; 0: as many as the examples take.
        stored: The description of the start in the state to resume from; None: the run begins.

    Raises:
        CheckpointError: The state names examples that there are not.
        ConfigError: The run gives a length to no site that examples can be at.
        DataError: Fewer examples fit than are asked for, or none.
    """
    sites = _example_sites(backbone, site_lengths)
    limits = [site_lengths[site] for site in sites if site_lengths[site]]
    room = min(limits, default=_most_positions(config, backbone))
    compacts = bool(config.compact_examples)
    if stored is not None:
        chosen = _solve(backbone, text_format, examples, _stored_indices(config, stored, len(examples)))
    else:
        candidates = _candidates(config, backbone, text_format, examples)
        dev = _sample_dev(config, dev_examples)
        chosen = _choose(config, backbone, candidates, room, partial(encode, dev))
        _check_chosen(config, backbone, candidates, chosen, room, is_limited=bool(limits) and not compacts)
    lengths = _block_lengths([len(example.row) for example in chosen], room if compacts else UNBOUNDED)
    by_site: dict[Site, int] = {
        site: sum(lengths) if site in sites else site_lengths[site] or _DECODER_LENGTH for site in site_lengths
    }
    description = dict(stored) if stored is not None else _describe(config, chosen, lengths)
    return ExamplePlan(
        tuple(chosen), lengths, by_site, description, config.compact_examples, is_resumed=stored is not None
    )


def _block_lengths(lengths: Sequence[int], room: int) -> tuple[int, ...]:
    """Positions that examples of these lengths get: what they take, or equal shares of the room.

    >>> _block_lengths([30, 5, 40], 100), _block_lengths([30, 5, 40], 50)
    ((30, 5, 40), (23, 5, 22))
    """
    if sum(lengths) <= room:
        return tuple(lengths)
    shares = [0] * len(lengths)
    for _ in range(room):
        unfilled = [index for index, length in enumerate(lengths) if shares[index] < length]
        shares[min(unfilled, key=shares.__getitem__)] += 1
    return tuple(shares)


def _sample_dev(config: TrainConfig, dev_examples: Sequence[Example]) -> list[Example]:
    """Some development examples, with a target each."""
    dev = [dataclasses.replace(example, targets=example.targets[:1]) for example in dev_examples if example.targets]
    random.Random(f"{config.seed}/dev").shuffle(dev)
    return dev[:NUM_DEV_TARGETS]


def _example_sites(backbone: Backbone, site_lengths: Mapping[Site, int]) -> list[Site]:
    """The sites at which examples can be: those where the model reads sources.

    Raises:
        ConfigError: The run has none of them.
    """
    wanted: tuple[Site, ...] = ("encoder", "cross") if backbone.kind == "encoder-decoder" else ("decoder",)
    sites = [site for site in wanted if site in site_lengths]
    if not sites:
        raise ConfigError(
            f"initialization is 'examples', which are at {' and '.join(wanted)} in an encoder-decoder, but sites names "
            f"{', '.join(site_lengths)}.",
            hint="add one of them to sites, or start from words.",
        )
    return sites


def _most_positions(config: TrainConfig, backbone: Backbone) -> int:
    """Tokens of examples that could be in front at all; an encoder reads each alone, and gives a prefix no position."""
    if backbone.kind == "encoder-decoder" and config.example_attention == "own":
        return UNBOUNDED
    return backbone.max_positions or UNBOUNDED


def _stored_indices(config: TrainConfig, stored: Mapping[str, Any], available: int) -> list[int]:
    """The examples that a state names.

    Raises:
        CheckpointError: It names none, or others than there are.
    """
    indices = stored.get("examples")
    if not isinstance(indices, list) or not indices or not all(type(i) is int and 0 <= i < available for i in indices):
        raise CheckpointError(
            f"the run in {config.output!r} starts from training examples that are not in this data.",
            hint="give it the same files, or start again in another --output.",
        )
    return indices


def _candidates(
    config: TrainConfig, backbone: Backbone, text_format: TextFormat, examples: Sequence[Example]
) -> list[SolvedExample]:
    """A random sample of the training examples that fit the run's limits whole, each source once."""
    indices: list[int] = distinct_sources(examples).tolist()
    count = max(MAX_CANDIDATES, 2 * config.init_examples)
    if len(indices) > count:
        indices = sorted(random.Random(f"{config.seed}/candidates").sample(indices, count))
    solved = _solve(backbone, text_format, examples, indices)
    limit = position_limit(backbone, 0, config.max_length)
    separate = backbone.kind == "encoder-decoder"
    return [
        example
        for example in solved
        if (max(len(example.prompt), len(example.target)) if separate else len(example.row)) <= limit
    ]


def _solve(
    backbone: Backbone, text_format: TextFormat, examples: Sequence[Example], indices: Sequence[int]
) -> list[SolvedExample]:
    """Examples as tokens, none of them cut."""
    pairs = encode_pairs(backbone, text_format, [examples[index] for index in indices])
    return [SolvedExample(index, *pair) for index, pair in zip(indices, pairs, strict=True)]


def _choose(
    config: TrainConfig,
    backbone: Backbone,
    candidates: Sequence[SolvedExample],
    room: int,
    encode_dev: Callable[[int], Sequence[TokenizedExample]],
) -> list[SolvedExample]:
    """Candidates that fit, by the run's `example_choice`; with `compact_examples` all do."""
    count = config.init_examples
    fits = UNBOUNDED if config.compact_examples else room
    if not candidates or config.example_choice == "random":
        return choose_random(candidates, count, fits, config.seed)
    if config.example_choice == "diverse":
        return choose_diverse(backbone, candidates, count, fits)

    def lengths_of(chosen: Sequence[SolvedExample]) -> tuple[int, ...]:
        return _block_lengths([len(example.row) for example in chosen], room)

    def make_prefix(chosen: Sequence[SolvedExample]) -> Prefix:
        rows, alone = [example.row for example in chosen], config.example_attention == "own"
        lengths = lengths_of(chosen) if alone else None
        return from_examples(backbone, rows, alone=alone, lengths=lengths, compaction=config.compact_examples)

    def dev_behind(chosen: Sequence[SolvedExample]) -> Sequence[TokenizedExample]:
        return encode_dev(sum(lengths_of(chosen)) if backbone.kind == "decoder" else 0)

    return choose_best(backbone, candidates, count, fits, config.seed, make_prefix, dev_behind)


def _check_chosen(
    config: TrainConfig,
    backbone: Backbone,
    candidates: Sequence[SolvedExample],
    chosen: Sequence[SolvedExample],
    room: int,
    *,
    is_limited: bool,
) -> None:
    """Refuse a choice of too few examples.

    Raises:
        DataError: Fewer than asked for fit, or none.
    """
    if not candidates:
        raise DataError(
            "no training example fits the model's positions whole, so the prefix cannot start from one.",
            hint="raise max_length, or start from words (initialization = 'words').",
        )
    if len(chosen) >= max(config.init_examples, 1):
        return
    lengths = sorted(len(example.row) for example in candidates)
    where = f"prefix_length {room}" if is_limited else f"the {room} positions of {backbone.name!r}"
    if not chosen:
        raise DataError(
            f"no training example fits {where}: they take {lengths[0]} to {lengths[-1]} tokens.",
            hint=f"set prefix_length to at least {lengths[0]}, or to 0 and init_examples to their number.",
        )
    if is_limited:
        enough = sum(lengths[-config.init_examples :])
        hint = f"set init_examples to {len(chosen)}, or prefix_length to 0 or to {enough:,}, in which any of them fit."
    else:
        hint = f"set init_examples to at most {len(chosen)}; the texts need positions, too."
    raise DataError(
        f"init_examples is {config.init_examples}, but only {len(chosen)} of the chosen fit {where}: they take "
        f"{lengths[0]} to {lengths[-1]} tokens each.",
        hint=hint,
    )


def _describe(config: TrainConfig, chosen: Sequence[SolvedExample], lengths: Sequence[int]) -> dict[str, Any]:
    """What the header says of a start."""
    return {
        "kind": "examples",
        "examples": [example.index for example in chosen],
        "tokens": [len(example.row) for example in chosen],
        "lengths": list(lengths),
        "prefix_length": sum(lengths),
        "at_most": config.prefix_length,
        "compaction": config.compact_examples,
        "choice": config.example_choice,
        "attention": config.example_attention,
        "leave_one_out": config.leave_one_out,
        # Their numbers count what was left to train on.
        **({"held_out": {"share": config.hold_out, "seed": config.seed}} if config.hold_out and not config.dev else {}),
    }


# --- keys and values -------------------------------------------------------------------------------------------------


def from_examples(
    backbone: Backbone, rows: Rows, *, alone: bool, lengths: Sequence[int] | None = None, compaction: str = "stride"
) -> Prefix:
    """The keys and values that the frozen model computes for some texts.

    In an encoder-decoder they are those of the sites `encoder` and `cross`, where it reads prompt and target as one
    text.

    Args:
        backbone: The frozen model.
        rows: The texts' tokens.
        alone: Each text is computed alone: in a decoder-only model at its own positions, those after the texts before
            it; in an encoder, whose texts keep their positions behind a prefix, from position 0. Otherwise, all of them
            are computed as one text.
        lengths: With `alone`: how many positions of each text are kept, its first among them; the next text's positions
            follow on these. So that what follows stands as far from the kept keys as from the text's own, a decoder's
            keys are those of a text that ends where its kept positions end (see `_compacted`). None: all.
        compaction: Which are kept: `stride`: evenly spaced ones; `match`: see `compaction.match`.
    """
    if not alone:
        rows = [tuple(token for row in rows for token in row)]
    sites: list[Site] = [site for site in backbone.geometry if backbone.kind == "decoder" or site != "decoder"]
    parts: list[Prefix] = []
    first = 0
    for row, length in zip(rows, lengths or [len(row) for row in rows], strict=True):
        parts.append(_compacted(backbone, row, first, length, sites, compaction))
        first += length
    return Prefix({site: _concatenate([part.layers[site] for part in parts]) for site in sites})


def _compacted(
    backbone: Backbone, row: Sequence[int], first: int, length: int, sites: Sequence[Site], compaction: str
) -> Prefix:
    """A text's keys and values at some of its positions, in a decoder-only model those of a text that ends with them.

    It would begin at `first + length - len(row)`. Where that is before position 0, its keys are turned back from there
    if they can be turned; where positions are added to the input, they stay.

    Args:
        backbone: The frozen model.
        row: The text's tokens.
        first: Where its kept positions begin in the prefix.
        length: How many are kept.
        sites: Where.
        compaction: As in `from_examples`.
    """
    ids = torch.tensor([row], device=backbone.device)
    begin = first + length - len(row) if backbone.kind == "decoder" else 0
    matches = length < len(row) and compaction == "match"
    # Queries are matched right behind the text. Keys that cannot be turned are computed where they are to stand.
    computed_at = 0 if matches and can_move(backbone) else max(begin, 0)
    whole = prefix_from_tokens(backbone.model, backbone.layout, ids, first_position=computed_at)
    if matches:
        try:
            kept = match(backbone, whole, row, dict.fromkeys(sites, length))
        except ConfigError as error:
            raise ConfigError(error.message, hint="give --compact-examples stride.") from error
    else:
        kept = take(whole, dict.fromkeys(sites, evenly_spaced(len(row), length)))
    return moved(backbone, kept, begin - computed_at)[0]


def _concatenate(parts: Sequence[Sequence[KeyValue]]) -> tuple[KeyValue, ...]:
    return tuple(
        (torch.cat([key for key, _ in pairs], dim=1), torch.cat([value for _, value in pairs], dim=1))
        for pairs in zip(*parts, strict=True)
    )


def start_from_plan(config: TrainConfig, backbone: Backbone, plan: ExamplePlan) -> Start:
    """The start of a run: the examples where the model reads sources, words at an encoder-decoder's decoder.

    Raises:
        DataError: The texts together are longer than the model reads at once.
    """
    if plan.is_resumed:
        return Start(None, plan.description, plan.blocks)
    alone = config.example_attention == "own"
    rows = [example.row for example in plan.chosen]
    _check_positions(backbone, rows, alone=alone)
    lengths = plan.lengths if alone else None
    layers = dict(from_examples(backbone, rows, alone=alone, lengths=lengths, compaction=plan.compaction).layers)
    if backbone.kind == "encoder-decoder" and "decoder" in plan.site_lengths:
        length = plan.site_lengths["decoder"]
        words = read_init_text(config.init_text).text
        layers["decoder"] = from_words(backbone, words, {"decoder": length}).layers["decoder"]
    return Start(Prefix({site: layers[site] for site in plan.site_lengths}), plan.description, plan.blocks)


def _check_positions(backbone: Backbone, rows: Rows, *, alone: bool) -> None:
    """Refuse texts that an encoder cannot read; a decoder-only model's are checked with the texts behind them.

    Raises:
        DataError: They are too long.
    """
    length = max(map(len, rows)) if alone else sum(map(len, rows))
    if backbone.max_positions is not None and length > backbone.max_positions:
        what = "an example with its target takes" if alone else "the examples, computed as one text, take"
        raise DataError(
            f"{what} {length} of the {backbone.max_positions} positions of {backbone.name!r}.",
            hint="start from fewer examples (init_examples), or compute each alone (example_attention = 'own').",
        )


def hide_own_blocks(
    dataset: TokenizedDataset, examples: Sequence[Example], plan: ExamplePlan
) -> Sequence[TokenizedExample]:
    """Training examples that do not see themselves in the prefix: neither those in it nor others of the same source.

    Where each example of the prefix was computed alone, that is exact: the same as a prefix without these positions.
    Where they were computed as one text, later examples have seen an earlier one, so that a trace of it is left. The
    earlier turns of a conversation that is in the prefix do not see it either.

    Args:
        dataset: The training examples as tokens.
        examples: The same ones, which have their sources whole.
        plan: What is in the prefix.
    """
    tokenized = dataset.examples
    # Sources are compared, not prompts, which may be cut.
    sources = source_ids(examples)
    blocks = {int(sources[index]): tuple(range(*block)) for index, block in plan.blocks.items()}
    if len(dataset.origins):
        sources = sources[np.asarray(dataset.origins)]
    rows = np.flatnonzero(np.isin(sources, list(blocks))).tolist()
    hidden = {row: blocks[int(sources[row])] for row in rows}
    if isinstance(tokenized, TokenTable):
        return dataclasses.replace(tokenized, hidden=hidden)
    return tuple(
        dataclasses.replace(example, hidden=hidden[row]) if row in hidden else example
        for row, example in enumerate(tokenized)
    )
