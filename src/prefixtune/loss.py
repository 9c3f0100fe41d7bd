"""The loss of next-token prediction at chosen positions, with its gradient made in the same pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["token_losses"]

_ROWS = 16
"""Rows converted to float32 at a time: bounds the memory, and stays in the processor's cache."""


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        # d loss / d logits = softmax - one-hot, in the logits' dtype; the logits themselves are not kept.
        slopes = torch.empty_like(logits) if context.needs_input_grad[0] else None
        for first in range(0, len(labels), _ROWS):
            rows = slice(first, first + _ROWS)
            chosen = labels[rows, None]
            logarithms = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
            losses[rows] = -logarithms.gather(1, chosen)[:, 0]
            if slopes is not None:
                probabilities = logarithms.exp_()
                probabilities.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=torch.float32))
                slopes[rows] = probabilities
        context.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slopes,) = context.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None


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
