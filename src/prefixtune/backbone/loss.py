"""The loss of a batch: next-token prediction at chosen positions, or a head's labels.

The gradient is computed in the same pass over the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch, SoftLabels
from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix

Prefixes = Prefix | Sequence[Prefix | None] | None
"""What is in front of a batch: one prefix for all, or one for each index that its packing counts through."""
_CPU_BYTES = 3 * 2**20
"""What rows that are computed at a time take on a CPU, in float32: 16 of 49,152 tokens, which its caches hold."""
_BYTES = 2**28
"""The same elsewhere, where few large steps are quick."""
_HEAD_SHARE = 8
"""How many times more rows a linear head makes at a time on a CPU: enough for quick products."""


def _chunks(count: int, width: int, device: torch.device, share: int = 1) -> Iterator[slice]:
    """Rows that are computed at a time, `width` numbers each: as many as the bytes allow, which bounds the memory."""
    size = max(1, (share * _CPU_BYTES if device.type == "cpu" else _BYTES) // (4 * width))
    return (slice(first, first + size) for first in range(0, count, size))


_Compute = Callable[[Tensor, slice, Tensor | None], Tensor]
"""Returns the losses of some rows, and fills in the slopes of all rows that it is given."""


def _in_chunks(given: Tensor, width: int, compute: _Compute, *, once: bool = False, share: int = 1) -> Tensor:
    """Losses of rows, chunk by chunk; `once`: their gradient is computed once, in place."""
    chunks = _chunks(len(given), width, given.device, share)
    losses: Tensor = _Losses.apply(given, compute, chunks, once)  # type: ignore[no-untyped-call]
    return losses


class _Losses(torch.autograd.Function):
    """Losses of rows, with their gradient by what they are made of, in its dtype."""

    @staticmethod
    def forward(context: Any, given: Tensor, compute: _Compute, chunks: Iterator[slice], once: bool) -> Tensor:
        slopes = torch.empty_like(given) if context.needs_input_grad[0] else None
        context.slopes, context.once = slopes, once
        return torch.cat([compute(given, rows, slopes) for rows in chunks] or [given.new_empty(0)])

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        slopes, factors = context.slopes, gradients[0][:, None]
        if not context.once:
            return (slopes * factors).to(slopes.dtype), None, None, None
        if slopes is None:
            raise RuntimeError("the loss keeps its gradient for one backward pass: compute it again for another.")
        # As large as the logits, so nothing else of that size is made.
        context.slopes = None
        return slopes.mul_(factors.to(slopes.dtype)), None, None, None


def _losses_of(labels: Int[Tensor, " N"]) -> _Compute:
    """Cross-entropy for `_Losses`; d loss / d logits = softmax - one-hot."""

    def compute(logits: Tensor, rows: slice, slopes: Tensor | None) -> Tensor:
        chosen = labels[rows, None]
        logarithms = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        losses = -logarithms.gather(1, chosen)[:, 0]
        if slopes is not None:
            probabilities = logarithms.exp_()
            slopes[rows] = probabilities.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=torch.float32))
        return losses

    return compute


def token_losses(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Cross-entropy of each label, computed in float32 whatever the logits' dtype.

    Equals `torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")`, without keeping a float32
    copy of the logits and of their softmax. Its gradient can be computed once.

    Args:
        logits: One row per label.
        labels: Token ids.
    """
    return _in_chunks(logits, logits.shape[1], _losses_of(labels), once=True)


def soft_losses(logits: Float[Tensor, "N V"], labels: SoftLabels) -> Float[Tensor, " N"]:
    """The divergence of each label's distribution from the student's, in nats, in float32 (float64 stays).

    Args:
        logits: The student's, one row per label.
        labels: The teacher's, on the same device.
    """
    return _in_chunks(logits, logits.shape[1], labels.losses)


def head_losses(hidden: Float[Tensor, "N E"], head: nn.Linear, labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """`token_losses(head(hidden), labels)`, without having all logits in memory; differentiable in the hidden states.

    Args:
        hidden: One row per label.
        head: Frozen.
        labels: Token ids.
    """
    weight, bias = head.weight, head.bias

    def compute(hidden: Tensor, rows: slice, slopes: Tensor | None) -> Tensor:
        logits = nn.functional.linear(hidden[rows], weight, bias)
        # The gradient by the logits takes their place.
        parts, own = _chunks(len(logits), logits.shape[1], logits.device), _losses_of(labels[rows])
        losses = torch.cat([own(logits, part, None if slopes is None else logits) for part in parts])
        if slopes is not None:
            slopes[rows] = logits @ weight
        return losses

    return _in_chunks(hidden, len(weight), compute, share=_HEAD_SHARE)


def batch_loss(backbone: Backbone, prefix: Prefixes, batch: Batch) -> Tensor:
    """Each label's loss in a batch, in nats; differentiable in the prefix. Shape (N,).

    With soft labels, it is the divergence of the teacher's distribution from the model's (see `backbone.batch`).

    Args:
        backbone: The frozen model.
        prefix: One for all; or one for each index that the batch's packing counts through.
        batch: Labels and what they are predicted from.
    """
    if batch.labelled:
        if not isinstance(prefix, Prefix) or prefix.head is None:
            raise ConfigError("labels need a prefix that was trained with a head.", hint="train one first.")
        hidden, labels = _hidden_states(backbone, prefix, batch)
        return token_losses(prefix.head(hidden), labels)
    head = backbone.linear_head if torch.is_grad_enabled() and batch.soft_labels is None else None
    if head is not None:
        hidden, labels = _hidden_states(backbone, prefix, batch)
        return head_losses(hidden, head, labels)
    logits, given = _logits(backbone, prefix, batch)
    if batch.soft_labels is not None:
        return soft_losses(logits, SoftLabels(given["soft_ids"], given["soft_log_probs"]))
    return token_losses(logits, given["labels"])


def label_logits(backbone: Backbone, prefix: Prefixes, batch: Batch) -> Float[Tensor, "N V"]:
    """The logits that a batch's labels, tokens, are predicted by, in their order; arguments as in `batch_loss`."""
    return _logits(backbone, prefix, batch)[0]


def hidden_states_at(backbone: Backbone, prefix: Prefixes, batch: Batch) -> Float[Tensor, "N E"]:
    """The hidden states at a batch's labels: (N, d)."""
    return _hidden_states(backbone, prefix, batch)[0]


def _logits(backbone: Backbone, prefix: Prefixes, batch: Batch) -> tuple[Float[Tensor, "N V"], dict[str, Tensor]]:
    """The labels' logits, and on the same device the labels, which take one transfer with the batch."""
    rows, columns = batch.label_positions // batch.width, batch.label_positions % batch.width
    own = {"labels": batch.labels}
    if batch.soft_labels is not None:
        own = {"soft_ids": batch.soft_labels.ids, "soft_log_probs": batch.soft_labels.log_probs}
    chosen: dict[str, Tensor] = {}
    if backbone.supports_logits_to_keep:
        # Where the batch was made: on a GPU the number of columns would have to be waited for.
        chosen["logits_to_keep"], columns = torch.unique(columns, return_inverse=True)
    given = batch.inputs(backbone.device, rows=rows, columns=columns, **own, **chosen)
    labels = {name: given.pop(name) for name in own}
    rows, columns = given.pop("rows"), given.pop("columns")
    logits: Tensor = backbone.forward(**given, prefixes=prefix).logits
    # In a packed row the logits are the labels', in order; no need to copy them, nor their gradient.
    in_order = batch.packing is not None and logits.shape[1] == len(columns)
    return logits.squeeze(0) if in_order else logits[rows, columns], labels


def _hidden_states(
    backbone: Backbone, prefix: Prefixes, batch: Batch
) -> tuple[Float[Tensor, "N E"], Int[Tensor, " N"]]:
    """The hidden states at the labels, and the labels on the same device."""
    given = batch.inputs(backbone.device, positions=batch.label_positions, labels=batch.labels)
    positions, labels = given.pop("positions"), given.pop("labels")
    hidden: Tensor = backbone.hidden_states(**given, prefixes=prefix)
    positions = positions.to(hidden.device)
    return hidden[positions // batch.width, positions % batch.width], labels.to(hidden.device)
