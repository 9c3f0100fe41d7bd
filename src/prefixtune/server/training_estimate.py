"""How long a training will take, before there was any: from the model's size and the machine's speed."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone

__all__ = ["training_seconds"]


_FLOPS_PER_WEIGHT = 4
"""Of a position: forward, and backward to the prefix; frozen weights get no gradients."""
_ROUNDS, _ROUND_SECONDS = 5, 0.02
_SHAPE = (512, 576, 1536)
"""As in a small model: rows, and the sides of a weight."""


def training_seconds(backbone: Backbone, positions: float, threads: int) -> float | None:
    """Seconds of a training, by a short measurement of matrix products; within a factor of two or so.

    Args:
        backbone: The model that is trained in front of.
        positions: That it computes in all steps together.
        threads: Of the training, on a processor.

    Returns:
        None: the model's weights are not here.
    """
    if not hasattr(backbone.model, "parameters"):
        return None
    device, dtype = str(backbone.device), str(backbone.dtype).removeprefix("torch.")
    return positions * _FLOPS_PER_WEIGHT * _multiplied_weights(backbone) / _flops(device, dtype, threads)


def _multiplied_weights(backbone: Backbone) -> int:
    """Weights that each position is multiplied by: all but an embedding that is only looked up."""
    model = backbone.model
    count = sum(parameter.numel() for parameter in model.parameters())
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    if words is not None and output is not None and words.weight is not output.weight:
        count -= words.weight.numel()
    return int(count)


@functools.lru_cache(maxsize=4)
def _flops(device: str, dtype: str, threads: int) -> float:
    """Floating-point operations a second of matrix products."""
    import torch

    rows, inner, columns = _SHAPE
    left = torch.ones(rows, inner, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(inner, columns, dtype=getattr(torch, dtype), device=device)
    (left @ right).sum().item()
    best = 0.0
    for _ in range(_ROUNDS):
        started, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < _ROUND_SECONDS:
            # Waits for the device.
            (left @ right)[0, 0].item()
            count += 1
        best = max(best, count * 2 * rows * inner * columns / seconds)
    return best * (threads / torch.get_num_threads() if device == "cpu" else 1.0)
