"""Compute."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prefixtune.attention.injection import Injection, injecting
from prefixtune.attention.layout import Layout
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import KeyValue, Prefix

__all__ = ["compute_kv", "prefix_from_tokens"]


@torch.no_grad()
def prefix_from_tokens(model: Any, layout: Layout, input_ids: Int[Tensor, "1 T"]) -> Prefix:
    """The keys and values that the model computes for a text, as its attention sees them: a prefix of T positions.

    An encoder-decoder reads the text on both sides; the site `cross` is what its decoder sees of the encoded text.
    """
    inputs = {"input_ids": input_ids}
    if layout.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = input_ids
    return compute_kv(model, layout, **inputs).to(device="cpu")


def compute_kv(model: Any, layout: Layout, **inputs: Tensor) -> Prefix:
    """The keys and values that the model computes for its inputs (one row), differentiable in them, in float32."""
    recorded: list[tuple[nn.Module, Tensor, Tensor]] = []
    injection = Injection(layout.layer_of, recorded=recorded)
    call: dict[str, Any] = {**inputs, "prefix_injection": injection}
    if layout.kind != "encoder":
        call["use_cache"] = False
    with contextlib.nullcontext() if layout.forwards_kwargs else injecting(injection):
        model(**call)
    found: dict[tuple[Site, int], KeyValue] = {}
    for module, key, value in recorded:
        place = layout.layer_of.get(module)
        if place is not None:
            found.setdefault(place, (key[0].float(), value[0].float()))
    return Prefix({site: tuple(found[site, n] for n in range(len(shapes))) for site, shapes in layout.geometry.items()})
