"""Load the usual checkpoint without transformers' general loader: its weights are mapped from disk.

They are read while transformers is imported. The general loader renames and converts what checkpoints of any type hold;
one whose tensors have exactly the names and shapes of the model's parameters needs none of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefixtune.prefix.header import parse_header

__all__ = ["PLAIN_TYPES", "Weights", "load_plain", "read_ahead"]


PLAIN_TYPES = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2", "qwen3"})
"""Model types of which transformers changes no weight while it loads them."""
_WEIGHTS = "model.safetensors"

Weights = Mapping[str, Tensor]
"""A checkpoint's tensors by name; empty where they cannot be read."""


def read_ahead(folder: Path, dtype: torch.dtype) -> Future[Weights] | None:
    """Begin to read a checkpoint of one file in another thread; None: the general loader is needed.

    Weights that have the dtype already stay on disk until they are used; other processes share them.

    Args:
        folder: With the checkpoint.
        dtype: Of the weights.
    """
    try:
        config = parse_header((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    plain = config.get("model_type") in PLAIN_TYPES and not config.get("quantization_config")
    if not plain or not (folder / _WEIGHTS).is_file():
        return None
    reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
    try:
        return reader.submit(_read, folder / _WEIGHTS, dtype)
    finally:
        reader.shutdown(wait=False)


def load_plain(auto: Any, config: Any, dtype: torch.dtype, weights: Weights) -> Any | None:
    """Make a model of weights that were read ahead; None: they are not exactly its parameters.

    Args:
        auto: Which of transformers' classes loads it.
        config: Its configuration.
        dtype: Of the weights.
        weights: What `read_ahead` read.
    """
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = auto.from_config(config, dtype=dtype)
        model.tie_weights()
    stored = model.state_dict(keep_vars=True)
    wanted = dict(model.named_parameters()) | {n: buffer for n, buffer in model.named_buffers() if n in stored}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()} != {
        name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()
    }:
        return None
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return None
    return model.eval()


def _read(file: Path, dtype: torch.dtype) -> Weights:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return {}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
