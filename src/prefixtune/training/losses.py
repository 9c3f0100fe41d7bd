"""The loss of each target, for intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.order import epoch_batches
from prefixtune.prefix.prefix import Prefix

__all__ = ["target_losses"]


@torch.no_grad()
def target_losses(
    backbone: Backbone,
    prefix: Prefix | None,
    examples: Sequence[TokenizedExample],
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "N 2"]:
    """The loss of each target in nats, summed over its tokens, and how many tokens these are.

    The rows are in the order of the examples and their targets; the sum of the first column divided by that of the
    second is the loss per token of a training's evaluations.

    Args:
        backbone: The frozen model.
        prefix: In front of all; None: nothing is.
        examples: Sources and targets.
        batch_size: Targets in a pass.
        on_batch: Called after each pass with the number of targets so far; may raise, to stop.
    """
    rows: list[Tensor] = []
    done = 0
    for target_groups in epoch_batches(examples, batch_size=batch_size, targets_per_source=batch_size, seed=None):
        batch = collate(backbone, target_groups, share_beginnings=True)
        losses = batch_loss(backbone, prefix, batch).double().cpu()
        sums = torch.zeros(batch.num_targets, 2, dtype=torch.float64)
        sums[:, 0].index_add_(0, batch.target_index, losses)
        sums[:, 1].index_add_(0, batch.target_index, torch.ones_like(losses))
        rows.append(sums)
        done += batch.num_targets
        if on_batch is not None:
            on_batch(done)
    return torch.cat(rows)
