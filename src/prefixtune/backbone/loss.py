"""The loss of a batch: next-token prediction at chosen positions, or a head's labels.

The gradient is computed in the same pass over the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.soft_labels import soft_losses
from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix

__all__ = ["batch_loss", "head_losses", "label_logits", "token_losses"]


_ROWS = 16
"""Rows converted to float32 at a time: bounds the memory, and stays in the processor's cache."""
_HEAD_ROWS = 128
"""Rows of logits that are in memory at a time, where a linear head makes them: enough for quick products."""


def _compute_losses(logits: Tensor, labels: Tensor, losses: Tensor, slopes: Tensor | None) -> None:
    """Fill in the labels' losses, and d loss / d logits = softmax - one-hot, which may replace the logits."""
    for first in range(0, len(labels), _ROWS):
        rows = slice(first, first + _ROWS)
        chosen = labels[rows, None]
        logarithms = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        losses[rows] = -logarithms.gather(1, chosen)[:, 0]
        if slopes is not None:
            probabilities = logarithms.exp_()
            probabilities.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=torch.float32))
            slopes[rows] = probabilities


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        # In the logits' dtype; the logits themselves are not kept.
        slopes = torch.empty_like(logits) if context.needs_input_grad[0] else None
        _compute_losses(logits, labels, losses, slopes)
        context.slopes = slopes
        return losses

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if context.slopes is None:
            raise RuntimeError("the loss keeps its gradient for one backward pass: compute it again for another.")
        # As large as the logits, so nothing else of that size is made.
        slopes, context.slopes = context.slopes, None
        return slopes.mul_(gradients[0][:, None].to(slopes.dtype)), None


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden)
        for first in range(0, len(labels), _HEAD_ROWS):
            rows = slice(first, first + _HEAD_ROWS)
            logits = nn.functional.linear(hidden[rows], weight, bias)
            _compute_losses(logits, labels[rows], losses[rows], logits)
            slopes[rows] = logits @ weight
        context.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = context.saved_tensors
        return (slopes * gradients[0][:, None]).to(slopes.dtype), None, None, None


def head_losses(hidden: Float[Tensor, "N E"], head: nn.Linear, labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """`token_losses(head(hidden), labels)`, without having all logits in memory; differentiable in the hidden states.

    Args:
        hidden: One row per label.
        head: Frozen.
        labels: Token ids.
    """
    losses: Tensor = _HeadLosses.apply(hidden, head.weight, head.bias, labels)  # type: ignore[no-untyped-call]
    return losses


def token_losses(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Cross-entropy of each label, computed in float32 whatever the logits' dtype.

    Equals `torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")`, without keeping a float32
    copy of the logits and of their softmax. Its gradient can be computed once.

    Args:
        logits: One row per label.
        labels: Token ids.
    """
    losses: Tensor = _TokenLosses.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


def batch_loss(backbone: Backbone, prefix: Prefix | Sequence[Prefix | None] | None, batch: Batch) -> Tensor:
    """Each label's loss in a batch, in nats; differentiable in the prefix. Shape (N,).

    With soft labels, it is the divergence of the teacher's distribution from the model's (see `backbone.soft_labels`).

    Args:
        backbone: The frozen model.
        prefix: One for all; or one for each index that the batch's packing counts through.
        batch: Labels and what they are predicted from.
    """
    labels = batch.labels.to(backbone.device)
    if batch.labelled:
        if not isinstance(prefix, Prefix) or prefix.head is None:
            raise ConfigError("labels need a prefix that was trained with a head.", hint="train one first.")
        return token_losses(prefix.head(hidden_states_at(backbone, prefix, batch)), labels)
    head = backbone.linear_head if torch.is_grad_enabled() and batch.soft_labels is None else None
    if head is not None:
        return head_losses(hidden_states_at(backbone, prefix, batch), head, labels)
    logits = label_logits(backbone, prefix, batch)
    if batch.soft_labels is not None:
        return soft_losses(logits, batch.soft_labels.to(backbone.device))
    return token_losses(logits, labels)


def label_logits(
    backbone: Backbone, prefix: Prefix | Sequence[Prefix | None] | None, batch: Batch
) -> Float[Tensor, "N V"]:
    """The logits that a batch's labels, tokens, are predicted by, in their order; arguments as in `batch_loss`."""
    positions = batch.label_positions.to(backbone.device)
    rows, columns = positions // batch.width, positions % batch.width
    arguments = {**batch.inputs(backbone.device), "prefixes": prefix}
    if backbone.supports_logits_to_keep:
        arguments["logits_to_keep"], columns = torch.unique(columns, return_inverse=True)
    logits: Tensor = backbone.forward(**arguments).logits
    # In a packed row the logits are the labels', in order; no need to copy them, nor their gradient.
    return logits.squeeze(0) if batch.packing is not None and logits.shape[1] == len(columns) else logits[rows, columns]


def hidden_states_at(
    backbone: Backbone, prefix: Prefix | Sequence[Prefix | None] | None, batch: Batch
) -> Float[Tensor, "N E"]:
    """The hidden states at a batch's labels: (N, d)."""
    hidden: torch.Tensor = backbone.hidden_states(**batch.inputs(backbone.device), prefixes=prefix)
    positions = batch.label_positions.to(hidden.device)
    return hidden[positions // batch.width, positions % batch.width]
