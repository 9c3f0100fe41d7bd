"""The loss of next-token prediction at chosen positions, with a gradient made in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["token_losses"]

_ROWS = 64
"""Rows converted to float32 at a time: bounds the memory, and fits the processor's cache."""


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor) -> Tensor:
        normalizer = torch.cat([part.float().logsumexp(-1) for part in logits.split(_ROWS)])
        chosen = logits.gather(1, labels[:, None])[:, 0].float()
        context.save_for_backward(logits, labels, normalizer)
        return normalizer - chosen

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, labels, normalizer = context.saved_tensors
        weights = gradients[0][:, None]
        out = torch.empty_like(logits)
        for rows in torch.arange(len(labels)).split(_ROWS):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            part = logits[span].float().sub_(normalizer[span, None]).exp_().mul_(weights[span])
            part.scatter_add_(1, labels[span, None], -weights[span])
            out[span] = part
        return out, None


def token_losses(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Cross-entropy of each label, computed in float32 whatever the logits' dtype.

    Equals `torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")`, without keeping a float32
    copy of the logits and of their softmax.

    Args:
        logits: One row per label.
        labels: Token ids.
    """
    losses: Tensor = _TokenLosses.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses
