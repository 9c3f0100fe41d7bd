"""The loss of each target: what every evaluation, comparison and report of losses is a sum over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, divide
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.tokenized import epoch_batches
from prefixtune.prefix.prefix import Head, Prefix
from prefixtune.training.distributed import SINGLE_PROCESS, ProcessGroup

MOST_POSITIONS = 8192
"""Most tokens that go through the backbone at once, unless a single example has more: memory does not grow with the
batches."""


@torch.no_grad()
def score_targets(
    backbone: Backbone,
    prefix: Prefix | None,
    examples: Sequence[TokenizedExample],
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
    *,
    head: Head | None = None,
    most_positions: int = MOST_POSITIONS,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Float[Tensor, "N 2"]:
    """The loss of each target in nats, summed over its labels, and how many labels these are; in float64 on the CPU.

    The rows are in the order of the examples and their targets; each turn of a conversation is one. The sum of the
    first column divided by that of the second is the loss per token.

    Args:
        backbone: The frozen model.
        prefix: In front of all; None: nothing is.
        examples: Sources and targets; with soft targets, the loss is the divergence from them.
        batch_size: Targets in a pass.
        on_batch: Called after each pass with the number of targets so far; may raise, to stop.
        head: Of labels, in place of the prefix's own.
        most_positions: Tokens of a pass; a larger one is computed in parts.
        processes: They share the work: rows of another process are zero.
    """
    prefix = None if prefix is None else prefix.to(device=backbone.device)
    losses: list[Tensor] = []
    places: list[Tensor] = []
    done = 0
    batches = epoch_batches(examples, batch_size=batch_size, targets_per_source=batch_size, seed=None)
    for groups in divided(backbone, batches, most_positions * processes.size):
        firsts = [done]
        for group in groups:
            firsts.append(firsts[-1] + group.num_targets)
        done = firsts.pop()
        batch, counts = local_batch(backbone, groups, processes)
        found = batch_loss(backbone, prefix, batch, head=head)
        if counts:
            own = processes.split_between_processes(list(zip(firsts, groups, strict=True)))
            rows = torch.tensor([first + index for first, group in own for index in range(group.num_targets)])
            losses.append(found)
            places.append(rows[batch.target_index])
        if on_batch is not None:
            on_batch(done)
    scores = torch.zeros(done, 2, dtype=torch.float64)
    if losses:
        # Once, at the end, for what a GPU computes meanwhile.
        values, place = torch.cat(losses).cpu().double(), torch.cat(places)
        scores.index_add_(0, place, torch.stack([values, torch.ones_like(values)], dim=1))
    return scores


def evaluation_loss(
    backbone: Backbone,
    prefix: Prefix | None,
    examples: Sequence[TokenizedExample],
    batch_size: int = 64,
    processes: ProcessGroup = SINGLE_PROCESS,
    most_positions: int = MOST_POSITIONS,
) -> float:
    """Mean loss per target token, in nats, over all targets of `examples`; the processes share the work."""
    scores = score_targets(backbone, prefix, examples, batch_size, most_positions=most_positions, processes=processes)
    total, count = processes.all_reduce(*scores.sum(0).tolist())
    return total / count


def divided(
    backbone: Backbone, batches: Iterable[Sequence[TokenizedExample]], most_positions: int, **options: Any
) -> Iterator[list[TokenizedExample]]:
    """The batches, each in as few parts as have at most `most_positions` tokens at once, with options of `divide`."""
    for batch in batches:
        yield from divide(backbone, batch, most_positions, share_beginnings=True, **options)


def local_batch(backbone: Backbone, groups: Sequence[TokenizedExample], processes: ProcessGroup) -> tuple[Batch, bool]:
    """This process's part of a batch, and whether it counts.

    Where a process has no part, it computes something of the others' that counts for nothing: with a split backbone all
    processes must run the model together.
    """
    own = processes.split_between_processes(groups)
    return collate(backbone, own or groups[:1], share_beginnings=True), bool(own)
