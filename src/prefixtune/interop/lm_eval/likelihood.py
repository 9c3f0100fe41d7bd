"""How likely continuations of contexts are, each behind its own prefix.

Continuations of one context share its computation (`data.batching.collate`), so a multiple-choice question is read once
for all its choices; and prefixes are mixed in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_hits
from prefixtune.data.batching import collate, join
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import DataError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.score import MOST_POSITIONS

_SHORT_CONTEXT = 256
"""Continuations of a context share a group while they take no more positions than it, or than this: attention within a
group costs the square of its positions."""
Key = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood is asked for.

    Attributes:
        context: The tokens before them, at least one; of an encoder-decoder, what the encoder reads.
        tokens: The continuation, at least one token.
        prefix: In front of the context; None: nothing is.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    prefix: Prefix | None

    @property
    def key(self) -> Key:
        """The same for continuations that have the same likelihood."""
        return id(self.prefix), self.context, self.tokens


@torch.inference_mode()
def score_continuations(
    backbone: Backbone,
    continuations: Sequence[Continuation],
    *,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Each continuation's log-likelihood in nats, and whether greedy decoding would write it.

    Args:
        backbone: Decoder-only or encoder-decoder.
        continuations: In any order; equal ones are computed once.
        batch_size: Most continuations that are computed at a time. The longest come first, so that too little memory
            shows at once.
        on_batch: Called after each batch with the number of different continuations so far.

    Raises:
        DataError: A context or a continuation is empty.
        BackboneError: A prefix does not fit the backbone.
    """
    if not all(one.tokens for one in continuations):
        raise DataError("a continuation has no token: every text begins with it.", hint="leave it out.")
    unique = {one.key: one for one in continuations}
    results: dict[Key, tuple[float, bool]] = {}
    for batch in _batches(backbone, _group(list(unique.values())), batch_size):
        results.update(_score_batch(backbone, batch))
        if on_batch is not None:
            on_batch(len(results))
    return [results[one.key] for one in continuations]


def _group(continuations: Sequence[Continuation]) -> list[list[Continuation]]:
    """Continuations that share the computation of their context, the longest groups first."""
    by_context: dict[tuple[int, tuple[int, ...]], list[Continuation]] = {}
    for one in continuations:
        by_context.setdefault((id(one.prefix), one.context), []).append(one)
    groups: list[list[Continuation]] = []
    for same in by_context.values():
        room = 0
        for one in sorted(same, key=lambda one: -len(one.tokens)):
            if len(one.tokens) > room:
                groups.append([])
                room = max(len(one.context), _SHORT_CONTEXT, len(one.tokens))
            groups[-1].append(one)
            room -= len(one.tokens)
    return sorted(groups, key=lambda group: -len(group[0].context) - sum(len(one.tokens) for one in group))


def _batches(
    backbone: Backbone, groups: Sequence[Sequence[Continuation]], batch_size: int
) -> Iterator[list[list[Continuation]]]:
    """Groups that are computed together: at most `batch_size` continuations, and tokens unless one group has more."""
    batch: list[list[Continuation]] = []
    room, positions, mixes = batch_size, MOST_POSITIONS, backbone.layout.packable and not backbone.counts_by_row
    if not mixes:
        # Only prefixes of one kind share a batch: each its own. The sort is stable.
        groups = sorted(groups, key=lambda group: id(group[0].prefix))
    for group in groups:
        for start in range(0, len(group), batch_size):
            part = list(group[start : start + batch_size])
            size = len(part[0].context) + sum(len(one.tokens) for one in part)
            alike = not batch or mixes or batch[0][0].prefix is part[0].prefix
            if batch and (len(part) > room or size > positions or not alike):
                yield batch
                batch, room, positions = [], batch_size, MOST_POSITIONS
            batch.append(part)
            room, positions = room - len(part), positions - size
    if batch:
        yield batch


def _score_batch(
    backbone: Backbone, groups: Sequence[Sequence[Continuation]]
) -> Iterator[tuple[Key, tuple[float, bool]]]:
    """The key and the result of every continuation of a batch."""
    by_prefix: dict[int, list[Sequence[Continuation]]] = {}
    for group in groups:
        by_prefix.setdefault(id(group[0].prefix), []).append(group)
    prefixes = [same[0][0].prefix for same in by_prefix.values()]
    batches = [
        collate(backbone, [TokenizedExample(one[0].context, tuple(each.tokens for each in one)) for one in same])
        for same in by_prefix.values()
    ]
    batch = batches[0] if len(batches) == 1 else join(batches)
    losses, hits = batch_hits(backbone, prefixes[0] if len(prefixes) == 1 else prefixes, batch)
    target, size = batch.target_index.cpu(), batch.num_targets
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, target, -losses.double().cpu())
    misses = torch.zeros(size, dtype=torch.long).index_add_(0, target, (~hits.cpu()).long())
    ordered = (one for same in by_prefix.values() for group in same for one in group)
    for one, total, missed in zip(ordered, sums.tolist(), misses.tolist(), strict=True):
        yield one.key, (float(total), not missed)
