"""Round the weights of a backbone's linear layers to 8 or 4 bits, by torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.utils.extras import needs_extra

__all__ = ["QUANTIZATIONS", "check_quantization", "is_quantized", "quantize"]


QUANTIZATIONS = ("int8", "int4")

_GROUP = 32
"""Weights that share one scale under int4."""


def check_quantization(kind: str) -> None:
    """Refuse a quantization that is not known or not possible here.

    Raises:
        ConfigError: An unknown kind, or torchao is missing.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {kind!r}.", hint=did_you_mean(kind, QUANTIZATIONS))
    with needs_extra("quantize", f"quantize = {kind!r}"):
        import torchao  # noqa: F401


def quantize(model: Any, kind: str, device: torch.device) -> None:
    """Round the linear layers' weights to 8 or 4 bits, in place; the output head, embeddings and activations stay.

    Each layer moves to the device when it is rounded, which therefore never holds the whole model. On the CPU torchao
    keeps 4-bit weights in 8-bit cells: their values are right, the memory is that of int8.

    Args:
        model: On the CPU, where its weights are mapped from their file.
        kind: `int8` or `int4`.
        device: Where the model is to be.
    """
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    if kind == "int8":
        config = ao.Int8WeightOnlyConfig()
    elif device.type == "cuda":
        # torch's own kernels; the default format needs a further package.
        config = ao.Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        four: Any = torch.int4  # type: ignore[attr-defined]
        config = ao.IntxWeightOnlyConfig(
            weight_dtype=four, granularity=PerGroup(_GROUP), mapping_type=MappingType.ASYMMETRIC
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        return kind == "int8" or module.in_features % _GROUP == 0

    ao.quantize_(model, config, filter_fn=wanted, device=device)
    model.to(device)


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` has rounded some of a model's weights."""
    return any(type(weight).__module__.partition(".")[0] == "torchao" for weight in model.parameters())
