"""Where a model's attention layers are, where its inputs go, and its cache."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefixtune.prefix.geometry import BackboneKind, Geometry, Site


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a model's attention layers are, as seen by running it (see `probe`).

    Attributes:
        geometry: Per site, every layer's KV heads and head sizes.
        layer_of: Attention module -> its (site, index); layers that share keys and values have the same.
        kind: `decoder`, `encoder` or `encoder-decoder`.
        packable: Whether rows may be packed: only attention mixes positions, and positions can be set from outside.
        cache_layers: Index of each decoder layer's keys and values in the model's cache; None: programs that put a
            prefix into it cannot have one of this model.
        notes: What a user should know, such as sites that are not available and why.
        repeats: Whether a layer is run several times in one pass, each time with keys and values of its own.
    """

    geometry: Geometry
    layer_of: Mapping[nn.Module, tuple[Site, int]]
    kind: BackboneKind = "decoder"
    packable: bool = True
    cache_layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    repeats: bool = False


def main_device(model: Any) -> torch.device:
    """Where a model's inputs go: the device of its embeddings, also when they are kept elsewhere between calls."""
    embeddings = model.get_input_embeddings()
    where = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(embeddings.weight.device if where is None else where)


def passes_gradients(model: nn.Module) -> bool:
    """Whether gradients pass through a model: torch's product with the 4-bit weights of a GPU has none."""
    return all(type(weight).__name__ != "Int4TilePackedTo4dTensor" for weight in model.parameters())


def setting(config: Any, name: str) -> Any:
    """A setting of a configuration, or None; a list where it differs by layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        # Configurations with settings by layer refuse to name one for all.
        layers = config.per_layer_config
        return [getattr(layer, name, None) for layer in (layers.values() if isinstance(layers, Mapping) else layers)]


@contextlib.contextmanager
def using(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    """While the block runs, a variable has a value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def cache_argument(model: Any) -> str:
    """The name under which a model's forward takes its cache (transformers 5.24 renamed it)."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def growing_cache(model: Any) -> Any:
    """An empty cache that forgets nothing; the mask applies the window.

    A windowed layer's own cache would forget the prefix, and cannot be shortened.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache
