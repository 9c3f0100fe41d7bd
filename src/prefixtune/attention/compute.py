"""What a model computes, recorded while it runs: the keys and values of a text, and relative position biases."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.forward import forward_with_prefixes
from prefixtune.attention.injection import trace_calls
from prefixtune.attention.layout import Layout, main_device
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["add_noise", "compute_kv", "prefix_from_tokens", "record_kv", "relative_bias"]


@torch.no_grad()
def prefix_from_tokens(model: Any, layout: Layout, input_ids: Int[Tensor, "1 T"], *, first_position: int = 0) -> Prefix:
    """The keys and values that the model computes for a text, as its attention sees them: a prefix of T positions.

    An encoder-decoder reads the text on both sides; the site `cross` is what its decoder sees of the encoded text.

    Args:
        model: The frozen model.
        layout: What `probe` found.
        input_ids: The text.
        first_position: The position of its first token; other than 0 in a decoder-only model only.
    """
    inputs = {"input_ids": input_ids}
    if first_position:
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + first_position
    if layout.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = input_ids
    return compute_kv(model, layout, **inputs).to(device="cpu")


def add_noise(prefix: Prefix, generator: torch.Generator) -> Prefix:
    """A prefix of a text on the CPU, moved a little at random, as training moves it, to where no text has one."""

    def noisy(tensor: Tensor) -> Tensor:
        return tensor + 0.25 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)

    return Prefix({site: tuple((noisy(k), noisy(v)) for k, v in layers) for site, layers in prefix.layers.items()})


def compute_kv(model: Any, layout: Layout, **inputs: Tensor) -> Prefix:
    """The keys and values that the model computes for its inputs (one row), differentiable in them, in float32."""
    kv = record_kv(model, layout, **inputs)
    return Prefix(
        {
            site: tuple((kv[site, n][0][0].float(), kv[site, n][1][0].float()) for n in range(len(shapes)))
            for site, shapes in layout.geometry.items()
        }
    )


def record_kv(model: Any, layout: Layout, **inputs: Tensor) -> dict[tuple[Site, int], tuple[Tensor, Tensor]]:
    """Every layer's own keys, (B, H, T, D), and values, (B, H, T, Dv); of one that is repeated, the first time."""
    call: dict[str, Any] = dict(inputs)
    if layout.kind != "encoder":
        call["use_cache"] = False
    with trace_calls(model) as calls:
        model(**call)
    kv: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
    for made in calls:
        if made.module in layout.layer_of:
            kv.setdefault(layout.layer_of[made.module], (made.key, made.value))
    return kv


@torch.no_grad()
def relative_bias(model: Any, layout: Layout, length: int) -> dict[int, Float[Tensor, "Hq N"]]:
    """What an encoder-decoder's decoder adds to scores at each distance, from 0 on: by layer, where it adds anything.

    Seen by running a row of `length` tokens. Beyond `relative_attention_max_distance`, where the model's configuration
    names one, all distances are alike, so that the row need be no longer.
    """
    farthest = getattr(model.config, "relative_attention_max_distance", None)
    count = length if farthest is None else min(length, farthest + 1)
    biases: dict[int, Float[Tensor, "Hq N"]] = {}
    # A row of one token shows whether there is any bias; in models without one, positions may be few.
    for tokens in (1, count):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=main_device(model))
        with trace_calls(model) as calls:
            forward_with_prefixes(model, layout, ids[:, :1], decoder_input_ids=ids)
        for call in calls:
            site, index = layout.layer_of.get(call.module, ("", 0))
            bias = call.arguments.get("position_bias")
            if site == "decoder" and bias is not None:
                # As the last token sees them.
                biases[index] = bias[0, :, -1].flip(-1)
        if not biases:
            break
    return biases
