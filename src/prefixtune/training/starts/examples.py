"""A start from solved training examples: the keys and values that the frozen model computes for them.

An example is its prompt, its first target and the end token, as training reads them. Which examples are used, and so
how long the prefix is, is planned before the data are tokenized, as the prefix takes some of the model's positions.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.forward import run_encoder
from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import hidden_states_at
from prefixtune.data.batching import collate
from prefixtune.data.encoding import encode_pairs
from prefixtune.data.examples import Example, distinct_sources, source_ids
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample
from prefixtune.data.truncation import position_limit
from prefixtune.errors import CheckpointError, ConfigError, DataError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.compaction import evenly_spaced, moved, side_by_side, take
from prefixtune.training.starts.words import Start, from_words, read_init_text

MAX_CANDIDATES = 256
"""Training examples that are looked at to choose from, where more are not asked for."""
UNBOUNDED = 1 << 30
_BATCH = 16
_DECODER_LENGTH = 10
"""P of an encoder-decoder's decoder, where no length is given: its own start is words."""


@dataclass(frozen=True)
class SolvedExample:
    """A training example with its first target, as token ids.

    Attributes:
        index: Of the training examples.
        prompt: Tokens of the source and the text around it.
        target: Tokens of the target and the end token.
    """

    index: int
    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """All tokens, as the model reads them in training, and the end token."""
        return self.prompt + self.target


@dataclass(frozen=True)
class ExamplePlan:
    """The examples that a prefix starts from.

    Attributes:
        chosen: In the order of the prefix.
        lengths: Positions of each in the prefix.
        site_lengths: P by site.
        description: What the header says of the start.
    """

    chosen: tuple[SolvedExample, ...]
    lengths: tuple[int, ...]
    site_lengths: dict[Site, int]
    description: dict[str, Any]

    @property
    def blocks(self) -> dict[int, tuple[int, int]]:
        """By index of a training example: the positions `[first, stop)` of its block in the prefix."""
        blocks: dict[int, tuple[int, int]] = {}
        first = 0
        for example, length in zip(self.chosen, self.lengths, strict=True):
            blocks[example.index] = (first, first + length)
            first += length
        return blocks


def plan_examples(
    config: TrainConfig,
    backbone: Backbone,
    text_format: TextFormat,
    examples: Sequence[Example],
    site_lengths: Mapping[Site, int],
    stored: Mapping[str, Any] | None = None,
) -> ExamplePlan:
    """Choose the examples to start from.

    Args:
        config: The run.
        backbone: The frozen model.
        text_format: That of the run.
        examples: The training examples; labels are words.
        site_lengths: By site, the most positions that the run gives it; 0: as many as the examples take.
        stored: The description of the start in the state to resume from; None: the run begins.

    Raises:
        CheckpointError: The state names examples that there are not.
        ConfigError: There are fewer sources with a target than are asked for, or only one; or the run gives a length
            to no site that examples can be at.
        DataError: Fewer examples fit than are asked for, or none.
    """
    wanted, available = max(config.init_examples, 2), 0 if config.form == "text" else len(distinct_sources(examples))
    if available < wanted:
        raise ConfigError(
            f"initialization by init_examples needs {wanted} different sources, not {available}.",
            hint="start from words.",
        )
    # Where the model reads sources.
    readers: tuple[Site, ...] = ("encoder", "cross") if backbone.kind == "encoder-decoder" else ("decoder",)
    sites = [site for site in readers if site in site_lengths]
    if not sites:
        raise ConfigError(
            f"initialization is 'examples', which are at {' and '.join(readers)}, but sites is {config.sites!r}.",
            hint="add one of them.",
        )
    limits = [site_lengths[site] for site in sites if site_lengths[site]]
    # An encoder reads each alone, and gives a prefix no position.
    most = UNBOUNDED if backbone.kind == "encoder-decoder" else backbone.max_positions or UNBOUNDED
    room = min(limits, default=most)
    # As many examples as asked for are brought to the positions that the run gives them.
    compacts = bool(limits and config.init_examples)
    if stored is None:
        chosen = _choose(config, backbone, text_format, examples, room, compacts=compacts)
    else:
        indices: list[int] = stored["examples"]
        if max(indices) >= len(examples):
            raise CheckpointError(
                f"the run in {config.output!r} starts from examples not in this data.", hint="give it the same files."
            )
        chosen = _solve(backbone, text_format, examples, indices)
    lengths = _block_lengths([len(example.row) for example in chosen], room if compacts else UNBOUNDED)
    by_site: dict[Site, int] = {
        site: sum(lengths) if site in sites else site_lengths[site] or _DECODER_LENGTH for site in site_lengths
    }
    description = stored or {
        "kind": "examples",
        "examples": [example.index for example in chosen],
        "tokens": [len(example.row) for example in chosen],
        "lengths": list(lengths),
        "prefix_length": sum(lengths),
    }
    return ExamplePlan(tuple(chosen), lengths, by_site, dict(description))


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


def _solve(
    backbone: Backbone, text_format: TextFormat, examples: Sequence[Example], indices: Sequence[int]
) -> list[SolvedExample]:
    """Examples as tokens, none of them cut."""
    pairs = encode_pairs(backbone, text_format, [examples[index] for index in indices])
    return [SolvedExample(index, *pair) for index, pair in zip(indices, pairs, strict=True)]


# --- choosing -----------------------------------------------------------------------------------------------------


def _choose(
    config: TrainConfig,
    backbone: Backbone,
    text_format: TextFormat,
    examples: Sequence[Example],
    room: int,
    *,
    compacts: bool,
) -> list[SolvedExample]:
    """Diverse examples out of a random sample of those that fit the run's limits whole, each source once.

    Raises:
        DataError: Fewer than asked for fit the room, or none.
    """
    indices, count = distinct_sources(examples), config.init_examples
    sample = max(MAX_CANDIDATES, 2 * count)
    if len(indices) > sample:
        indices = sorted(random.Random(f"{config.seed}/candidates").sample(indices, sample))
    limit = position_limit(backbone, 0, config.max_length)
    # An encoder-decoder reads source and target apart in training, and both as one text here.
    taken, longest = (max if backbone.kind == "encoder-decoder" else sum), backbone.max_positions or UNBOUNDED
    solved = _solve(backbone, text_format, examples, indices)
    candidates = [
        one for one in solved if taken((len(one.prompt), len(one.target))) <= limit and len(one.row) <= longest
    ]
    chosen: list[SolvedExample] = []
    left = UNBOUNDED if compacts else room
    for index in farthest_first(source_states(backbone, candidates)) if candidates else []:
        # One that does not fit what is left is skipped.
        length = len(candidates[index].row)
        if length <= left and not (count and len(chosen) == count):
            chosen.append(candidates[index])
            left -= length
    if min(len(chosen), room) < max(count, 1):
        lengths = sorted(len(example.row) for example in candidates) or [0]
        raise DataError(
            f"init_examples is {count}, but {len(chosen)} of {len(candidates)} training examples fit {room} positions "
            f"(prefix_length, or those of {backbone.name!r}): they take {lengths[0]} to {lengths[-1]} tokens each.",
            hint="ask for fewer, raise prefix_length or max_length, or start from words.",
        )
    return chosen


@torch.no_grad()
def source_states(backbone: Backbone, candidates: Sequence[SolvedExample]) -> Float[Tensor, "N d"]:
    """Each source's mean last hidden state, in float32 on the CPU."""
    prompts = [candidate.prompt for candidate in candidates]
    if backbone.kind == "encoder-decoder":
        rows = [torch.tensor([prompt], device=backbone.device) for prompt in prompts]
        encoded = [run_encoder(backbone.model, backbone.layout, row, None) for row in rows]
        return torch.stack([states[0].float().mean(0).cpu() for states in encoded])
    means: list[Tensor] = []
    for first in range(0, len(prompts), _BATCH):
        some = prompts[first : first + _BATCH]
        # As with a head, states are wanted at all positions of the sources.
        batch = collate(backbone, [TokenizedExample(p, ((0,) * len(p),), tuple(range(len(p)))) for p in some])
        states = hidden_states_at(backbone, None, batch).float().cpu()
        means.extend(part.mean(0) for part in states.split([len(prompt) for prompt in some]))
    return torch.stack(means)


def farthest_first(states: Float[Tensor, "N d"]) -> list[int]:
    """All rows, each the farthest from those before it, by the angle between their differences from the mean.

    The first is the one nearest to the mean. Ties go to the lower index.
    """
    centered = states - states.mean(0)
    first = int(centered.square().sum(1).argmin())
    directions = torch.nn.functional.normalize(centered, dim=1)
    order, distance = [first], 1 - directions @ directions[first]
    distance[first] = -torch.inf
    while len(order) < len(states):
        index = int(distance.argmax())
        order.append(index)
        distance = torch.minimum(distance, 1 - directions @ directions[index])
        distance[index] = -torch.inf
    return order


# --- keys and values -------------------------------------------------------------------------------------------------


def from_examples(
    backbone: Backbone, rows: Sequence[tuple[int, ...]], *, lengths: Sequence[int] | None = None
) -> Prefix:
    """The keys and values that the frozen model computes for some texts, each alone.

    In a decoder-only model a text has its own positions, those after the texts before it; in an encoder, whose texts
    keep their positions behind a prefix, it is at position 0. In an encoder-decoder the keys and values are those of
    the sites `encoder` and `cross`, where it reads prompt and target as one text.

    Args:
        backbone: The frozen model.
        rows: The texts' tokens.
        lengths: How many positions of each text are kept, evenly spaced ones with its first among them; the next text's
            positions follow on these. So that what follows stands as far from the kept keys as from the text's own, a
            decoder's keys are those of a text that ends where its kept positions end. None: all.
    """
    sites: list[Site] = [site for site in backbone.geometry if backbone.kind == "decoder" or site != "decoder"]
    parts: list[Prefix] = []
    first = 0
    for row, length in zip(rows, lengths or [len(row) for row in rows], strict=True):
        ids = torch.tensor([row], device=backbone.device)
        # Where it would begin before position 0, its keys are turned back from there, if they can be turned; where
        # positions are added to the input, they stay.
        begin = first + length - len(row) if backbone.kind == "decoder" else 0
        whole = prefix_from_tokens(backbone.model, backbone.layout, ids, first_position=max(begin, 0))
        kept = take(whole, dict.fromkeys(sites, evenly_spaced(len(row), length)))
        parts.append(moved(backbone, kept, min(begin, 0))[0])
        first += length
    return side_by_side(parts)


def start_from_plan(config: TrainConfig, backbone: Backbone, plan: ExamplePlan) -> Start:
    """The start of a run: the examples where the model reads sources, words at an encoder-decoder's decoder."""
    rows = [example.row for example in plan.chosen]
    layers = dict(from_examples(backbone, rows, lengths=plan.lengths).layers)
    if backbone.kind == "encoder-decoder" and "decoder" in plan.site_lengths:
        only: dict[Site, int] = {"decoder": plan.site_lengths["decoder"]}
        layers.update(from_words(backbone, read_init_text(config.init_text)[0], only).layers)
    return Start(Prefix({site: layers[site] for site in plan.site_lengths}), plan.description)


def hide_own_blocks(
    dataset: TokenizedDataset, examples: Sequence[Example], plan: ExamplePlan
) -> Sequence[TokenizedExample]:
    """Training examples that do not see themselves in the prefix: neither those in it nor others of the same source.

    Each example of the prefix was computed alone, so that this is exact: the same as a prefix without these positions.
    The earlier turns of a conversation that is in the prefix do not see it either.

    Args:
        dataset: The training examples as tokens.
        examples: The same ones, which have their sources whole.
        plan: What is in the prefix.
    """
    # Sources are compared, not prompts, which may be cut.
    sources = source_ids(examples)
    blocks = {sources[index]: tuple(range(*block)) for index, block in plan.blocks.items()}
    if dataset.origins:
        sources = [sources[origin] for origin in dataset.origins]
    return tuple(
        dataclasses.replace(example, hidden=blocks[source]) if source in blocks else example
        for source, example in zip(sources, dataset.examples, strict=True)
    )
