"""What a model computes, recorded while it runs: the keys and values of a text, and relative position biases."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.injection import Injection, injecting_beside
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.attention.layout import Layout, main_device
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import KeyValue, Prefix

__all__ = ["ScoreRecorder", "add_noise", "compute_kv", "prefix_from_tokens", "relative_bias"]


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
    recorded_kv: list[tuple[nn.Module, Tensor, Tensor]] = []
    injection = Injection(layout.layer_of, recorded_kv=recorded_kv)
    call: dict[str, Any] = {**inputs, "prefix_injection": injection}
    if layout.kind != "encoder":
        call["use_cache"] = False
    with injecting_beside(layout, injection):
        model(**call)
    kv_of: dict[tuple[Site, int], KeyValue] = {}
    for module, key, value in recorded_kv:
        layer = layout.layer_of.get(module)
        if layer is not None:
            kv_of.setdefault(layer, (key[0].float(), value[0].float()))
    return Prefix({site: tuple(kv_of[site, n] for n in range(len(shapes))) for site, shapes in layout.geometry.items()})


def relative_bias(
    model: Any, layout: Layout, length: int, encoded: Float[Tensor, "1 S E"]
) -> dict[int, Float[Tensor, "Hq N"]]:
    """What an encoder-decoder's decoder adds to scores at each distance, from 0 on: by layer, where it adds anything.

    Recorded by running a row of `length` tokens. Beyond `relative_attention_max_distance`, where the model's
    configuration names one, all distances are alike, so that the row need be no longer.
    """
    farthest = getattr(model.config, "relative_attention_max_distance", None)
    count = length if farthest is None else min(length, farthest + 1)
    biases: dict[int, Float[Tensor, "Hq N"]] = {}
    # A row of one token shows whether there is any bias; in models without one, positions may be few.
    for tokens in (1, count):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=main_device(model))
        recorder = ScoreRecorder()
        forward_with_backend(model, layout, ids, torch.arange(tokens, device=ids.device)[None], recorder, None, encoded)
        for (site, index), scores in recorder.scores.items():
            if site == "decoder" and scores.position_bias is not None:
                # As the last token sees them.
                biases[index] = scores.position_bias[0, :, -1].flip(-1)
        if not biases:
            break
    return biases


class ScoreRecorder:
    """An attention backend that records how layers attend, and does not attend.

    Attributes:
        scores: How each layer that ran makes its scores.
    """

    def __init__(self) -> None:
        self.scores: dict[tuple[Site, int], ScoreOptions] = {}

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Record; what is returned has the right shape only."""
        self.scores[layer] = scores
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
