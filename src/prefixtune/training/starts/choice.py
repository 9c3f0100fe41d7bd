"""Which training examples a prefix starts from: random ones, ones that differ, or the best of some random sets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.forward import run_encoder
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import hidden_states_at
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.losses import target_losses

__all__ = ["SolvedExample", "choose_best", "choose_diverse", "choose_random", "farthest_first", "source_states"]


NUM_SETS = 8
"""Random sets that `loss` compares."""
NUM_DEV_TARGETS = 64
"""Development targets that `loss` compares them by."""
_BATCH = 16


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


def choose_random(candidates: Sequence[SolvedExample], count: int, room: int, seed: int) -> list[SolvedExample]:
    """Random examples.

    Args:
        candidates: To choose from.
        count: How many; 0: as many as fit.
        room: Most tokens of all together.
        seed: Of the choice.
    """
    order = list(range(len(candidates)))
    random.Random(f"{seed}/choice").shuffle(order)
    return _take(candidates, order, count, room)


def choose_diverse(
    backbone: Backbone, candidates: Sequence[SolvedExample], count: int, room: int
) -> list[SolvedExample]:
    """The most central example, then again and again the one whose source is farthest from all before it (k-center).

    Args:
        backbone: Its last hidden states tell sources apart.
        candidates: To choose from.
        count: How many; 0: as many as fit.
        room: Most tokens of all together.
    """
    return _take(candidates, farthest_first(source_states(backbone, candidates)), count, room)


def choose_best(
    backbone: Backbone,
    candidates: Sequence[SolvedExample],
    count: int,
    room: int,
    seed: int,
    make_prefix: Callable[[Sequence[SolvedExample]], Prefix],
    encode_dev: Callable[[Sequence[SolvedExample]], Sequence[TokenizedExample]],
) -> list[SolvedExample]:
    """The one of some random sets with the lowest loss per token on development examples, before any training.

    Args:
        backbone: The frozen model.
        candidates: To choose from.
        count: How many of them; 0: as many as fit.
        room: Most tokens of all together.
        seed: Of the sets.
        make_prefix: The prefix of a set.
        encode_dev: Development examples as tokens, behind the prefix of a set.
    """
    sets = [choose_random(candidates, count, room, seed + number * 1_000_003) for number in range(NUM_SETS)]
    # Sets of fewer examples than asked for are refused later; the first is as good as any.
    if not sets[0] or len({some.index for chosen in sets for some in chosen}) <= len(sets[0]):
        return sets[0]

    def loss(chosen: Sequence[SolvedExample]) -> float:
        dev = encode_dev(chosen)
        sums = target_losses(backbone, make_prefix(chosen), dev, _BATCH).sum(0)
        return float(sums[0] / sums[1])

    return min(sets, key=loss)


def _take(candidates: Sequence[SolvedExample], order: Iterable[int], count: int, room: int) -> list[SolvedExample]:
    """The first `count` candidates of an order that fit; one that does not fit what is left is skipped."""
    chosen: list[SolvedExample] = []
    for index in order:
        if count and len(chosen) == count:
            break
        length = len(candidates[index].row)
        if length <= room:
            chosen.append(candidates[index])
            room -= length
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
