"""Layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefixtune.prefix.geometry import BackboneKind, Geometry, Site

__all__ = ["Layout", "main_device", "setting"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a model's attention layers are, as seen by running it (see `probe`).

    Attributes:
        geometry: Per site, every layer's KV heads and head sizes.
        layer_of: Attention module -> its (site, layer number); layers that share keys and values share a place.
        kind: `decoder`, `encoder` or `encoder-decoder`.
        packable: Whether rows may be packed: nothing but attention passes between positions, and these can be told.
        forwards_kwargs: Whether an argument of the model's call reaches every attention layer. Where it does not, the
            prefix travels beside the call, and layers cannot be recomputed in the backward pass.
        cache_layers: Where each decoder layer's keys and values lie in the model's cache; None: they cannot be put
            there beforehand, so that generation injects them.
        notes: What a user should know, such as sites that are not available and why.
    """

    geometry: Geometry
    layer_of: Mapping[nn.Module, tuple[Site, int]]
    kind: BackboneKind = "decoder"
    packable: bool = True
    forwards_kwargs: bool = True
    cache_layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def main_device(model: Any) -> torch.device:
    """Where a model's inputs go: the device of its embeddings, also when they are kept elsewhere between calls."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    where = getattr(hook, "execution_device", None)
    if where is not None:
        return torch.device(where)
    device: torch.device = embeddings.weight.device
    return device


def setting(config: Any, name: str) -> Any:
    """A setting of a configuration, or None; where it differs by layer, a list of all of them."""
    try:
        return getattr(config, name, None)
    except Exception:
        # Such a configuration refuses to name one for all layers.
        layers = config.per_layer_config
        return [getattr(one, name, None) for one in (layers.values() if isinstance(layers, Mapping) else layers)]
